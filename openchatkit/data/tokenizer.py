"""A tokenizer as training uses it: text in, ids out, and nothing that a text spells is more than text.

It is loaded as transformers loads it for the finished model, from a folder, without remote code. Truncation and padding
that a `tokenizer.json` may ask for are off, nothing is put around a text, and special tokens are encoded as the
characters they are written with: end-of-text is what the tokeniser appends, never what a user typed.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from tokenizers import Tokenizer as Backend

from openchatkit.errors import UserError
from openchatkit.formats.tokenizer_files import has_tokenizer

# Texts -> the ids of each by itself.
Encode = Callable[[Sequence[str]], list[list[int]]]


class Tokenizer:
    """`vocab_size` is one more than the largest id, `digest` a name for everything that decides a text's ids.

    `end_of_text` and `padding` are ids; a tokenizer without a padding token pads with end-of-text.
    """

    def __init__(self, folder: Path) -> None:
        loaded = _load(Path(folder))
        backend = getattr(loaded, "backend_tokenizer", None)
        if not isinstance(backend, Backend):
            raise UserError(
                f"the tokenizer in {folder} is a {type(loaded).__name__}, which has no tokenizer.json: "
                "expected one of the tokenizers library, a byte-level BPE tokenizer for example"
            )
        self._backend = _plain(backend)
        if loaded.eos_token_id is None:
            raise UserError(f"the tokenizer in {folder} has no end-of-text token: set eos_token in its configuration")
        self.end_of_text: int = loaded.eos_token_id
        self.padding: int = self.end_of_text if loaded.pad_token_id is None else loaded.pad_token_id
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        self.digest = hashlib.sha256(f"{self.end_of_text} {self._backend.to_str()}".encode()).hexdigest()
        if self.end_of_text in self.encode([loaded.eos_token])[0]:
            raise UserError(
                f"the tokenizer in {folder} takes {loaded.eos_token!r} in a text for its end-of-text token: "
                "expected one that can encode it as characters, a byte-level BPE tokenizer for example"
            )

    @property
    def serialised(self) -> str:
        """What `encoder` needs, in another process, to give the same ids."""
        return self._backend.to_str()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text by itself; the texts are spread over the machine's cores with the GIL released."""
        return _encode(self._backend, texts)

    def decode(self, ids: Sequence[int], *, special: bool = True) -> str:
        """The text that these ids stand for; `special` tokens are spelled out, or left out."""
        return self._backend.decode(ids, skip_special_tokens=not special)


def encoder(serialised: str) -> Encode:
    """`Tokenizer.encode` of a serialised tokenizer; needs neither torch nor transformers."""
    return functools.partial(_encode, _plain(Backend.from_str(serialised)))


def _plain(backend: Backend) -> Backend:
    """Nothing cut off, nothing put around a text, and special tokens taken for the characters they are written with."""
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return backend


def _encode(backend: Backend, texts: Sequence[str]) -> list[list[int]]:
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _load(folder: Path) -> object:
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: expected one that holds a tokenizer (tokenizer.json)")
    if not has_tokenizer(folder):
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise UserError(f"{folder} holds no tokenizer: expected tokenizer.json there, found {found}")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises Exception itself
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the tokenizer in {folder} cannot be loaded: {reason}") from error
