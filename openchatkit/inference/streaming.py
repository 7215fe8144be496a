"""From token ids to text that is safe to show, as early as it is final.

Owns what may be shown and when: characters whose bytes are complete, nothing of a stop string, no control sequences, no
white space around a reply except its first line's indentation. Each step costs the same however long the reply is.
"""

import re
from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

_REPLACEMENT = "\ufffd"
# An unfinished UTF-8 sequence is at most three bytes, hence at most three tokens and three replacement characters.
_UNFINISHED = 3
# Control characters but tab and newline; marks that reorder text on screen; lone surrogates, which cannot be written.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

# What opens a sequence in ECMA-48: ESC, CSI, and the strings DCS, SOS, OSC, PM and APC in their one-character form.
_OPENERS = {"\x1b": "escape", "\x9b": "csi", **dict.fromkeys("\x90\x98\x9d\x9e\x9f", "string")}


class Detokeniser:
    """Text of tokens that arrive one at a time: `push` returns what has become final.

    `before` are the tokens of a text that they continue. Characters can be spread over tokens, and some tokenizers
    write a token differently at the start of a text, so a short window of tokens is decoded at each step, and the text
    that it had before is cut off.
    """

    def __init__(self, decode: Decode, before: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = list(before[-_UNFINISHED - 1 :])
        self._finished = len(self._window)  # tokens at the window's start whose text was returned to the last character
        self._returned = len(decode(self._window)) if before else 0  # characters of its text that were returned

    def push(self, token: int) -> str:
        """Return the characters that this token completes; none while a multi-byte character is unfinished."""
        self._window.append(token)
        text = self._decode(self._window)
        if text.endswith(_REPLACEMENT) and not self._decode([token]):
            # An id without a token, in a vocabulary padded with rows: the bytes of a character go on after it.
            del self._window[-1]
            return ""
        final = len(text)
        while final > max(self._returned, len(text) - _UNFINISHED) and text[final - 1] == _REPLACEMENT:
            final -= 1
        new = text[self._returned : final]
        self._returned = final
        if final == len(text):
            self._shorten(self._finished, keep_back=0)
            self._finished = len(self._window)
        elif len(self._window) - self._finished > 2 * _UNFINISHED:
            # Bytes that never become characters: the window must hold the unfinished sequence and a token before it.
            self._shorten(len(self._window) - _UNFINISHED - 1, keep_back=len(text) - final)
            self._finished = 0
        return new

    def _shorten(self, start: int, *, keep_back: int) -> None:
        if start:
            del self._window[:start]
            self._returned = max(0, len(self._decode(self._window)) - keep_back)


class TerminalFilter:
    """Removes what a terminal would execute rather than show: control characters, escape sequences, text reordering.

    A sequence may be spread over any number of pushes. A string sequence (a window title, say) that is never ended
    hides at most the rest of its line.
    """

    def __init__(self) -> None:
        self._state = "text"

    def push(self, text: str) -> str:
        """Return the part of `text` that may be shown."""
        if self._state == "text" and not _UNSAFE.search(text):
            return text
        return "".join(character for character in text if self._shows(character))

    def _shows(self, character: str) -> bool:
        # ESC and CSI take intermediate or parameter characters and then a final one; BEL or ST ends a string.
        state, self._state = self._state, "text"
        if state == "text":
            self._state = _OPENERS.get(character, "text")
            return not _UNSAFE.match(character)
        if state == "string":
            if character == "\x1b":
                self._state = "escape"
            elif character not in "\x07\x9c\n":
                self._state = "string"
            return character == "\n"
        if state == "escape" and character in "[]PX^_":
            self._state = "csi" if character == "[" else "string"
            return False
        if " " <= character <= ("/" if state == "escape" else "?"):
            self._state = state
            return False
        if " " <= character <= "~":
            return False  # the final byte
        return self._shows(character)  # not a sequence after all: this character is text, or opens one


class StopMatcher:
    """Finds the first stop string, in whatever pieces it arrives, and lets nothing of it through."""

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self._stop_strings = tuple(stop_strings)
        self._longest = max(map(len, self._stop_strings), default=0)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Return text that cannot belong to a stop string; once one is found, the text before it, then nothing."""
        if self.stopped:
            return ""
        text = self._held + text
        starts = [start for stop in self._stop_strings if (start := text.find(stop)) >= 0]
        if starts:
            self.stopped, self._held = True, ""
            return text[: min(starts)]
        held = min(len(text), self._longest - 1)
        while held > 0 and not any(stop.startswith(text[-held:]) for stop in self._stop_strings):
            held -= 1
        cut = len(text) - max(held, 0)
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """Return the text that was held back because it could have become a stop string."""
        held, self._held = self._held, ""
        return held


class Trimmer:
    """Strips empty lines and `separator` from the start of a text that arrives in pieces, and white space from its end.

    Without a separator it strips a single space at the start, which some models write by habit; more are indentation.
    Nothing is stripped at the start of a text that is `begun` already.
    """

    def __init__(self, separator: str, *, begun: bool = False) -> None:
        self._separator = separator
        self._started = begun
        self._held = ""

    def push(self, text: str) -> str:
        """Return text that is neither stripped at the start nor, so far, white space at the end."""
        body = text.rstrip()
        if not body:
            self._held += text
            return ""
        shown, self._held = self._held + body, text[len(body) :]
        if not self._started:
            self._started = True
            shown = self._begin(shown)
        return shown

    def _begin(self, text: str) -> str:
        body = text.lstrip()
        _, newline, indentation = text[: len(text) - len(body)].rpartition("\n")
        if not newline:
            habit = " " if indentation == " " else ""
            indentation = indentation.removeprefix(self._separator or habit)
        return indentation + body


class ReplyStream:
    """The steps above in their order, for one reply; `text` is the text let through so far.

    `before` are the tokens of the text that the reply continues, if any.
    """

    def __init__(
        self,
        decode: Decode,
        *,
        before: Sequence[int] = (),
        stop_strings: Sequence[str] = (),
        trim: bool = True,
        separator: str = "",
    ) -> None:
        self._detokeniser = Detokeniser(decode, before)
        self._filter = TerminalFilter()
        self._matcher = StopMatcher(stop_strings)
        self._trimmer = Trimmer(separator, begun=bool(before)) if trim else None
        self._shown: list[str] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._matcher.stopped

    @property
    def text(self) -> str:
        return "".join(self._shown)

    def push(self, token: int) -> str:
        """Return what this token adds to the shown text."""
        return self._show(self._matcher.push(self._filter.push(self._detokeniser.push(token))))

    def flush(self) -> str:
        """Return the rest of the shown text. Bytes of a character that was never finished are dropped."""
        return self._show(self._matcher.flush())

    def _show(self, text: str) -> str:
        if self._trimmer:
            text = self._trimmer.push(text)
        if text:
            self._shown.append(text)
        return text


def clean(text: str) -> str:
    """Return a whole text as `TerminalFilter` lets it through."""
    return TerminalFilter().push(text)
