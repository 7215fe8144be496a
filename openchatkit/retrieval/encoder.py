"""Texts -> vectors, by an encoder of sentence-transformers, which is imported when the first text is embedded.

Importing it takes seconds and half a gigabyte; counting tokens and identifying an encoder need neither. A plain BERT,
such as contriever-msmarco, is used as its authors do: the mean over tokens, not normalised, compared by inner product.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from openchatkit.errors import UserError
from openchatkit.formats import sentence_encoder
from openchatkit.formats.retrieval_index import EncoderRecord

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_WINDOW = 1024  # texts between two reports of progress
_BATCH = 32  # texts of similar length in one forward pass; more on a GPU
_BATCH_ON_GPU = 256
_TOKENS = 512  # the limit if neither the encoder nor its network has one
_COUNTED = 4096  # texts tokenised at a time for counting


class Encoder:
    """An encoder from a folder or the hub. `name` is its absolute path or its name on the hub.

    `max_tokens` replaces the encoder's own limit of tokens a text, up to that of its network. Everything is loaded at
    first use; the first use of the folder raises UserError if it is not found.
    """

    def __init__(self, name: str | Path, device: str = "auto", max_tokens: int | None = None) -> None:
        folder = Path(name).expanduser()
        self.name = str(folder.resolve()) if folder.is_dir() else str(name)
        self._device, self._max_tokens = device, max_tokens

    @functools.cached_property
    def folder(self) -> Path:
        """Folder of its files; fetched if needed."""
        return sentence_encoder.fetch(self.name)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of everything that vectors depend on: weights, tokenizer, pooling."""
        return sentence_encoder.digest(self.folder)

    @property
    def dimension(self) -> int:
        """Numbers in a vector."""
        return cast(int, self._model.get_embedding_dimension())

    @functools.cached_property
    def metric(self) -> str:
        """How vectors are compared: "cosine" (they have length 1) or "dot"."""
        found = sentence_encoder.similarity(self.folder)
        if found not in ("cosine", "dot"):
            raise UserError(f"{self.name} compares vectors by {found}: expected an encoder for cosine or dot")
        return found

    @property
    def max_tokens(self) -> int:
        """The most tokens of a text, special ones included; the rest is cut."""
        return cast(int, self._model.max_seq_length)  # `_model` has set it

    @property
    def pooling(self) -> str:
        """How the vectors of tokens become that of a text: "mean", "cls", ..."""
        modes = (getattr(module, "pooling_mode", None) for module in self._model)
        return next((str(mode) for mode in modes if mode), "")

    def record(self) -> EncoderRecord:
        """Return the record that an index keeps of its encoder."""
        return EncoderRecord(self.name, self.digest, self.dimension, self.metric, self.max_tokens, self.pooling)

    def encode(
        self, texts: Sequence[str], *, query: bool = False, progress: Callable[[int], None] | None = None
    ) -> np.ndarray:
        """Return float32 [texts, dimension]; `progress` is called with the number of texts done since the last call.

        Texts get the encoder's prefix for questions if `query`, else that for passages.
        UserError: a vector with numbers that are not finite.
        """
        vectors = np.empty((len(texts), self.dimension), np.float32)
        # Texts of similar length are batched, so that little is computed for padding.
        order = sorted(range(len(texts)), key=lambda number: -len(texts[number]))
        encode = self._model.encode_query if query else self._model.encode_document
        for first in range(0, len(order), _WINDOW):
            some = order[first : first + _WINDOW]
            vectors[some] = encode(
                [texts[number] for number in some],
                batch_size=_BATCH if self._model.device.type == "cpu" else _BATCH_ON_GPU,
                show_progress_bar=False,
                normalize_embeddings=self.metric == "cosine",
            )
            if progress:
                progress(len(some))
        if not (finite := np.isfinite(vectors).all(axis=1)).all():
            text = texts[int(np.argmin(finite))]
            raise UserError(
                f"{self.name} makes numbers that are not finite of {text[:60]!r}: its weights are damaged, or it needs "
                "another precision; fetch it again"
            )
        return vectors

    def count(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text, without special ones."""
        return [
            size
            for first in range(0, len(texts), _COUNTED)
            for size in self._count_batch(texts[first : first + _COUNTED])
        ]

    def _count_batch(self, texts: Sequence[str]) -> list[int]:
        if hasattr(self._tokenizer, "encode_batch_fast"):
            return [len(each) for each in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        return [len(ids) for ids in self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]]

    @functools.cached_property
    def _tokenizer(self) -> Any:
        """Tokenizer of the tokenizers library, which loads fast; of transformers if there is only an older file."""
        if path := sentence_encoder.vocabulary(self.folder):
            from tokenizers import Tokenizer

            try:
                tokenizer = Tokenizer.from_file(str(path))
            except Exception as error:  # the library raises nothing more specific
                raise UserError(f"cannot read {path}: {error}; fetch or copy the encoder again") from error
            tokenizer.no_truncation()
            tokenizer.no_padding()
            return tokenizer
        from transformers import AutoTokenizer

        from openchatkit.libraries import hf_transformers

        hf_transformers.silence()  # it warns of texts longer than the limit of the network
        return AutoTokenizer.from_pretrained(str(self.folder), local_files_only=True)

    @functools.cached_property
    def _model(self) -> "SentenceTransformer":
        library, device = import_sentence_transformers(), device_name(self._device)
        try:
            # A folder without modules becomes a transformer with the mean over tokens.
            model = library.SentenceTransformer(str(self.folder), device=device, local_files_only=True)
        except Exception as error:  # any error of three libraries for a broken file
            raise describe_load_error(self.folder, error) from error
        most = getattr(model[0].auto_model.config, "max_position_embeddings", None)
        wanted = self._max_tokens or model.max_seq_length or most or _TOKENS
        model.max_seq_length = min(wanted, most) if most else wanted
        return model


def device_name(device: str) -> str:
    """Return the device to embed on as sentence-transformers names it; see `hardware.choose_device`.

    Embedding is in float32 on every device, so that an index made on one machine can be searched on another.
    """
    from openchatkit.loading import hardware

    return str(hardware.choose_device(device))


def import_sentence_transformers() -> Any:
    """Import sentence-transformers and silence it; UserError: it is not installed."""
    try:
        import sentence_transformers
    except ImportError as error:
        raise UserError(
            "embedding needs sentence-transformers, which is not installed: pip install 'openchatkit[retrieval]'"
        ) from error
    from openchatkit.libraries import hf_transformers

    hf_transformers.silence()  # it warns of tensors that an encoder does not need
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)  # it warns of folders without modules
    return sentence_transformers


def describe_load_error(folder: Path, error: Exception) -> UserError:
    """Return the UserError for a folder that a library cannot load, with the first line of its message."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(f"{folder} cannot be loaded: {reason}; fetch or copy it again")
