"""`data/batch.py`: padding as one document."""

import torch

from openchatkit.data.batch import IGNORE, Batch


def make(labels: list[list[int]], starts: list[list[int]] | None) -> Batch:
    labels = torch.tensor(labels)
    return Batch(3, labels + 1, labels, None if starts is None else torch.tensor(starts), torch.zeros(len(labels)))


def test_padding_at_the_end_of_a_row_becomes_one_document():
    no = IGNORE
    batch = make(
        [
            [1, 2, no, no, no, no],  # two documents, three places of padding
            [1, 2, 3, 4, no, no],  # a trained document of one token, then padding
            [1, no, no, no, no, no],  # one document, whose end is not trained
            [no, no, no, no, no, no],  # nothing but padding
            [1, no, 3, no, 5, no],  # an untrained document of one token within the row, and one at its end
        ],
        [[0, 0, 0, 3, 4, 5], [0, 0, 0, 3, 4, 5], [0, 0, 0, 0, 0, 0], [0, 1, 2, 3, 4, 5], [0, 0, 2, 3, 4, 5]],
    )
    merged = batch.merge_padding()
    assert merged.document_starts.tolist() == [
        [0, 0, 0, 3, 3, 3],
        [0, 0, 0, 3, 4, 4],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 2, 3, 4, 5],
    ]
    assert merged.document_starts.dtype == torch.int64
    assert batch.document_starts[0].tolist() == [0, 0, 0, 3, 4, 5], "the batch itself is as it was"
    assert (merged.first, merged.tokens, merged.labels) == (batch.first, batch.tokens, batch.labels)


def test_without_documents_there_is_nothing_to_merge():
    batch = make([[1, IGNORE]], None)
    assert batch.merge_padding() is batch
