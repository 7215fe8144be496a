"""The tokenizers that GPT-NeoX offers, by the names of its `tokenizer_type`, made of the files that they are stored in.

Each is a `NeoxTokenizer`: texts in, ids out, as in GPT-NeoX. It can be sent to another process. A tokenizer.json may
ask for truncation, which is off here: a document is never truncated silently.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from openchatkit.errors import UserError
from openchatkit.formats import tokenizer_files

END_OF_TEXT, PADDING = "<|endoftext|>", "<|padding|>"
_CHARACTERS = 512  # GPT-NeoX's number of ids of single bytes, end-of-text and padding


class NeoxTokenizer(Protocol):
    """`vocab_size` is one more than the largest id; `end_of_text` is an id, or None where there is none."""

    vocab_size: int
    end_of_text: int | None

    def encode(self, texts: Sequence[str], *, literal: bool) -> list[list[int]]:
        """Return the ids of each text by itself. `literal`: as in training, where special tokens in a text are only
        characters and nothing is put around it; else as in GPT-NeoX."""
        ...

    def to_json(self) -> str | None:
        """Return the tokenizer.json of the same tokenizer; None where the tokenizers library cannot express it."""
        ...


def load(kind: str, vocab_file: Path | None, merge_file: Path | None) -> NeoxTokenizer:
    """Load a tokenizer of a kind in `KINDS`. UserError: a missing file or one of another kind, a package to install."""
    loader, wanted = KINDS[kind]
    if wanted and vocab_file is None:
        raise UserError(f"--tokenizer-type {kind} needs --vocab-file: {wanted}")
    if kind == "GPT2BPETokenizer" and merge_file is None:
        raise UserError(f"--tokenizer-type {kind} needs --merge-file: its merges.txt")
    files = [path for path in (vocab_file, merge_file) if path is not None]
    if missing := next((path for path in files if kind != "TiktokenTokenizer" and not path.exists()), None):
        raise UserError(f"--tokenizer-type {kind}: there is no {missing}")
    try:
        return loader(*files)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"--tokenizer-type {kind} needs a package: pip install {error.name}") from error
    except Exception as error:  # the libraries raise Exception itself
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--vocab-file {vocab_file} cannot be loaded as {kind} ({reason}): expected {wanted}"
        ) from error


def write(tokenizer: NeoxTokenizer, folder: Path) -> None:
    """Write a tokenizer so that AutoTokenizer loads it; one without padding pads with end-of-text.

    UserError where the tokenizers library cannot express it, or it has no end-of-text.
    """
    from tokenizers import Tokenizer

    serialised, end = tokenizer.to_json(), tokenizer.end_of_text
    if serialised is None or end is None:
        lack = f"has no {END_OF_TEXT} token" if serialised else "is none of the tokenizers library"
        raise UserError(f"the tokenizer {lack}: use HFTokenizer with a tokenizer.json")
    library = Tokenizer.from_str(serialised)
    end_of_text = str(library.id_to_token(end))
    padding = PADDING if library.token_to_id(PADDING) is not None else end_of_text
    tokenizer_files.write_tokenizer(folder, serialised, end_of_text=end_of_text, padding=padding)


@dataclass
class _Library:
    """A tokenizer of the `tokenizers` library."""

    tokenizer: Any
    end_of_text: int | None

    def __post_init__(self) -> None:
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.vocab_size = max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: Sequence[str], *, literal: bool) -> list[list[int]]:
        self.tokenizer.encode_special_tokens = literal
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=not literal)
        return [encoding.ids for encoding in encodings]

    def to_json(self) -> str | None:
        serialised: str = self.tokenizer.to_str(pretty=True)
        return serialised


class _Characters:
    """UTF-8 bytes as ids: as in GPT-NeoX, a text may hold the ids 0 and 1."""

    vocab_size = _CHARACTERS
    end_of_text: int | None = 0

    def encode(self, texts: Sequence[str], *, literal: bool) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def to_json(self) -> str | None:
        """Return byte-level BPE without merges, where bytes 0 and 1 of a text are padding, so that no text can end."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        printable = [byte for byte in range(256) if chr(byte).isprintable() and byte not in (0x20, 0xA0, 0xAD)]
        rest = [byte for byte in range(256) if byte not in printable]
        # As GPT-2 writes bytes: the printable ones as they are, the others as characters from 256 on.
        written = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(rest)}
        vocabulary = {END_OF_TEXT: 0, PADDING: 1} | {written[byte]: byte for byte in range(2, 256)}
        tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=PADDING))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([END_OF_TEXT, PADDING])
        serialised: str = tokenizer.to_str(pretty=True)
        return serialised


@dataclass
class _SentencePiece:
    processor: Any

    def __post_init__(self) -> None:
        self.vocab_size = self.processor.get_piece_size()
        end = self.processor.piece_to_id(END_OF_TEXT)
        self.end_of_text = None if end == self.processor.unk_id() else end

    def encode(self, texts: Sequence[str], *, literal: bool) -> list[list[int]]:
        ids: list[list[int]] = self.processor.encode(list(texts))
        return ids

    def to_json(self) -> str | None:
        return None


@dataclass
class _Tiktoken:
    """Special tokens in a text are characters: GPT-NeoX fails there."""

    encoding: Any

    def __post_init__(self) -> None:
        self.vocab_size = self.encoding.n_vocab
        self.end_of_text = self.encoding.eot_token

    def encode(self, texts: Sequence[str], *, literal: bool) -> list[list[int]]:
        return [self.encoding.encode_ordinary(text) for text in texts]

    def to_json(self) -> str | None:
        return None


def _hf(vocab_file: Path) -> NeoxTokenizer:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_files.tokenizer_json(vocab_file)))
    return _Library(tokenizer, tokenizer.token_to_id(END_OF_TEXT))


def _hf_gpt2(folder: Path) -> NeoxTokenizer:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    loaded.add_special_tokens({"pad_token": PADDING})
    return _Library(loaded.backend_tokenizer, loaded.eos_token_id)


def _gpt2_bpe(vocab_file: Path, merge_file: Path) -> NeoxTokenizer:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE.from_file(str(vocab_file), str(merge_file)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if tokenizer.token_to_id(END_OF_TEXT) is not None:
        tokenizer.add_special_tokens([END_OF_TEXT])  # GPT-NeoX has one token for it wherever a text spells it
    return _Library(tokenizer, tokenizer.token_to_id(END_OF_TEXT))


def _sentencepiece(model: Path) -> NeoxTokenizer:
    import sentencepiece

    return _SentencePiece(sentencepiece.SentencePieceProcessor(model_file=str(model)))


def _tiktoken(name: Path) -> NeoxTokenizer:
    import tiktoken

    return _Tiktoken(tiktoken.get_encoding(str(name)))


# By --tokenizer-type: the function that loads the files, and a description of the first of them.
KINDS: dict[str, tuple[Callable[..., NeoxTokenizer], str]] = {
    "HFTokenizer": (_hf, "a tokenizer.json"),
    "HFGPT2Tokenizer": (_hf_gpt2, "a folder with a tokenizer"),
    "GPT2BPETokenizer": (_gpt2_bpe, "a vocab.json"),
    "CharLevelTokenizer": (_Characters, ""),
    "SPMTokenizer": (_sentencepiece, "a SentencePiece .model"),
    "TiktokenTokenizer": (_tiktoken, "the name of an encoding, cl100k_base for example"),
}
