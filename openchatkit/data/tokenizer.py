"""A tokenizer as training uses it: text in, ids out, and special tokens in a text are only characters.

It is loaded as transformers loads it for the finished model, from a folder, without remote code. Truncation and padding
that a `tokenizer.json` may ask for are off, nothing is put around a text, and special tokens are encoded as the
characters they are written with: the tokeniser appends end-of-text, and no user can type it.
"""

import functools
import hashlib
import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer as Backend

from openchatkit.errors import UserError
from openchatkit.formats.tokenizer_files import has_tokenizer, load_tokenizer_files
from openchatkit.texts import reason_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Texts -> the ids of each, tokenised by itself.
Encode = Callable[[Sequence[str]], list[list[int]]]


class Tokenizer:
    """`vocab_size` is one more than the largest id; `digest` is a hash of everything that decides a text's ids.

    `end_of_text` and `padding` are ids, `end_of_text_token` is how the first is written; a tokenizer without a padding
    token pads with end-of-text. `chat_template` is the model's own, in Jinja, if it has one.
    """

    def __init__(self, folder: Path) -> None:
        loaded = _load(Path(folder))
        backend = getattr(loaded, "backend_tokenizer", None)
        if not isinstance(backend, Backend):
            raise UserError(
                f"the tokenizer in {folder} is a {type(loaded).__name__}, which has no tokenizer.json: "
                "expected one of the tokenizers library, a byte-level BPE tokenizer for example"
            )
        self._backend = _make_plain(backend)
        self._loaded = loaded
        self.chat_template: str | dict[str, str] | None = loaded.chat_template
        self._special = {
            token.content: (id, token)
            for id, token in self._backend.get_added_tokens_decoder().items()
            if token.special and token.content
        }
        names = sorted(map(re.escape, self._special), key=len, reverse=True)
        self._borders = re.compile(f"({'|'.join(names)})")
        if loaded.eos_token_id is None:
            raise UserError(f"the tokenizer in {folder} has no end-of-text token: set eos_token in its configuration")
        self.end_of_text: int = loaded.eos_token_id
        self.end_of_text_token: str = loaded.eos_token
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
        """The tokenizer as a string, from which `encoder` makes the same one in another process."""
        return self._backend.to_str()

    @functools.cached_property
    def prefix(self) -> tuple[int, ...]:
        """The ids that this tokenizer's models expect before any text, beginning-of-text say; `encode` adds none."""
        encoding = self._backend.encode("a")
        added = itertools.takewhile(lambda pair: pair[1], zip(encoding.ids, encoding.special_tokens_mask, strict=True))
        return tuple(id for id, _ in added)

    @functools.cached_property
    def used_size(self) -> int:
        """One more than the largest id in any prompt, without special tokens such as [PAD] that nothing writes."""
        template = str(self.chat_template or "")
        written = {self.end_of_text, self._loaded.bos_token_id, *self.prefix}
        unused = {id for name, (id, _) in self._special.items() if id not in written and name not in template}
        return max(id for id in self._backend.get_vocab(with_added_tokens=True).values() if id not in unused) + 1

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text by itself; the texts are spread over all cores with the GIL released."""
        return _encode(self._backend, texts)

    def encode_pieces(self, pieces: Sequence[tuple[str, bool]]) -> list[int]:
        """Return the ids of a text in pieces, each with whether the special tokens that it spells are meant.

        Where they are not, they are characters, as in `encode`. Text is tokenised across the borders of pieces, so the
        ids are those of the whole text wherever no piece spells a special token that is not meant.
        """
        runs: list[str | int] = [""]
        for text, meant in pieces:
            for part in self.split_special(text) if meant else [text]:
                if isinstance(part, str) and isinstance(runs[-1], str):
                    runs[-1] += part
                else:
                    runs.append(part)
        encoded = iter(self.encode([run for run in runs if isinstance(run, str)]))
        return [id for run in runs for id in (next(encoded) if isinstance(run, str) else [run])]

    def split_special(self, text: str) -> list[str | int]:
        """Cut `text` at the special tokens that it spells; return their ids, and the texts between them."""
        texts = self._borders.split(text) if self._special else [text]
        parts: list[str | int] = [*texts]
        for place in range(1, len(texts), 2):
            parts[place], token = self._special[texts[place]]
            # Some tokens swallow the space beside them.
            texts[place - 1] = texts[place - 1].rstrip() if token.lstrip else texts[place - 1]
            texts[place + 1] = texts[place + 1].lstrip() if token.rstrip else texts[place + 1]
        parts[::2] = texts[::2]
        return [part for part in parts if part != ""]

    def apply_chat_template(self, messages: Sequence[dict[str, str]], *, generation_prompt: bool) -> str:
        """Render messages by the model's own template; raise jinja2's errors where it fails or refuses them."""
        text = self._loaded.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation_prompt)
        assert isinstance(text, str), type(text)
        return text

    def decode(self, ids: Sequence[int], *, special: bool = True) -> str:
        """Return the text of these ids, with or without `special` tokens."""
        return self._backend.decode(ids, skip_special_tokens=not special)


def encoder(serialised: str) -> Encode:
    """Return `Tokenizer.encode` of a serialised tokenizer; this needs neither torch nor transformers."""
    return functools.partial(_encode, _make_plain(Backend.from_str(serialised)))


def _make_plain(backend: Backend) -> Backend:
    """Turn off truncation and padding, and make special tokens in a text ordinary characters."""
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return backend


def _encode(backend: Backend, texts: Sequence[str]) -> list[list[int]]:
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _load(folder: Path) -> "PreTrainedTokenizerBase":
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: expected one that holds a tokenizer (tokenizer.json)")
    if not has_tokenizer(folder):
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise UserError(f"{folder} holds no tokenizer: expected tokenizer.json there, found {found}")
    try:
        return load_tokenizer_files(folder)
    except Exception as error:  # the tokenizers library raises Exception itself
        reason = reason_of(error)
        raise UserError(f"the tokenizer in {folder} cannot be loaded: {reason}") from error
