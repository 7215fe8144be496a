"""Perplexities of an evaluation: by the token, and by the character, which compares models of other tokenizers."""

import math
import sys

from openchatkit.data.batch import IGNORE
from openchatkit.data.dataset import Dataset
from openchatkit.data.tokenizer import Tokenizer

_ROWS = 64  # read at a time


def to_perplexity(loss: float) -> float:
    """Return e to a loss; infinite where that is no float."""
    return math.inf if loss > math.log(sys.float_info.max) else math.exp(loss)


def count_characters(dataset: Dataset, tokenizer: Tokenizer, first: int, rows: int) -> int:
    """Return the characters of the tokens that are predicted in some rows, without those of special tokens."""
    total = 0
    for start in range(first, first + rows, _ROWS):
        labels = dataset.batch(start, min(_ROWS, first + rows - start)).labels
        total += sum(len(tokenizer.decode(row[row != IGNORE].tolist(), special=False)) for row in labels)
    return total
