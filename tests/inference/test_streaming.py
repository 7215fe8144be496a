"""What of a stream of tokens is shown, and when."""

import random

import pytest

from openchatkit.data.tokenizer import Tokenizer
from openchatkit.inference.streaming import Detokeniser, ReplyStream, StopMatcher, TerminalFilter, Trimmer, clean

TEXTS = (
    "plain words",
    "日本 😀 é",
    "👩‍👩‍👧 family, Z̷a̷l̷g̷o̷",
    "tabs\tand\nlines  and   runs",
    "a\ufffdb",
    "\u2028 odd \u0000 ones",
)
STOPS = ("\n<human>:", "\n<bot>:")


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer) -> Tokenizer:
    return Tokenizer(tiny_tokenizer)


class Letters:
    """A tokenizer whose tokens are whole strings, so that a test can cut text where it likes."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces

    def decode(self, ids) -> str:
        return "".join(self.pieces[number] for number in ids)


def stream(*pieces: str, **options) -> tuple[list[str], ReplyStream]:
    reply = ReplyStream(Letters(*pieces).decode, **options)
    return [*(reply.push(number) for number in range(len(pieces))), reply.flush()], reply


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_out_as_it_went_in_and_no_character_early(tokenizer, text):
    detokeniser = Detokeniser(tokenizer.decode)
    shown = ""
    for token in tokenizer.encode([text])[0]:
        shown += detokeniser.push(token)
        assert text.startswith(shown)
    assert shown == text


def test_any_tokens_give_what_decoding_them_at_once_gives(tokenizer):
    rng = random.Random(0)
    for _ in range(300):
        tokens = [rng.randrange(2, tokenizer.vocab_size) for _ in range(rng.randrange(1, 60))]
        detokeniser = Detokeniser(tokenizer.decode)
        shown = "".join(map(detokeniser.push, tokens))
        whole = tokenizer.decode(tokens)
        assert whole.startswith(shown)
        assert set(whole[len(shown) :]) <= {"\ufffd"}
        assert len(whole) - len(shown) <= 3


def test_what_goes_on_from_a_text_keeps_the_space_that_its_tokenizer_would_leave_out_at_a_start():
    def decode(ids):  # as the decoders of Llama and of Gemma
        return Letters("It", " is", " so").decode(ids).removeprefix(" ")

    for trim in (True, False):
        reply = ReplyStream(decode, before=[0], trim=trim)
        assert "".join([reply.push(1), reply.push(2), reply.flush()]) == " is so"


def test_bytes_that_never_become_characters_do_not_widen_the_window(tokenizer):
    continuation = tokenizer.encode(["é"])[0][-1]  # the second byte of a two-byte character
    decoded = []

    def decode(ids):
        decoded.append(len(ids))
        return tokenizer.decode(ids)

    detokeniser = Detokeniser(decode)
    shown = "".join(detokeniser.push(continuation) for _ in range(500))
    assert max(decoded) < 20
    assert set(shown) == {"\ufffd"}
    assert 500 - len(shown) <= 3


def test_each_token_is_decoded_a_bounded_number_of_times(tokenizer):
    decoded = 0

    def decode(ids):
        nonlocal decoded
        decoded += len(ids)
        return tokenizer.decode(ids)

    tokens = tokenizer.encode(["The answer is 日本 😀. " * 100])[0]
    detokeniser = Detokeniser(decode)
    for token in tokens:
        detokeniser.push(token)
    assert decoded < 10 * len(tokens)


def test_an_unfinished_character_is_dropped_at_the_end(tokenizer):
    tokens = tokenizer.encode(["ok 😀"])[0]
    reply = ReplyStream(tokenizer.decode)
    shown = "".join(map(reply.push, tokens[:-1])) + reply.flush()
    assert shown == reply.text == "ok"


@pytest.mark.parametrize("stop", STOPS)
def test_a_stop_string_is_found_however_it_is_cut(stop):
    text = f"An answer.{stop} more"
    for first in range(1, len(text)):
        for second in range(first, len(text)):
            pieces = [text[:first], text[first:second], text[second:]]
            matcher = StopMatcher(STOPS)
            shown = "".join(map(matcher.push, pieces)) + matcher.flush()
            assert shown == "An answer."
            assert matcher.stopped


def test_what_only_looks_like_a_stop_string_is_shown_at_once_it_is_none():
    matcher = StopMatcher(STOPS)
    assert matcher.push("a\n<hum") == "a"
    assert matcher.push("ble>") == "\n<humble>"
    assert not matcher.stopped


def test_what_was_held_back_is_shown_at_the_end():
    shown, reply = stream("less ", "<", stop_strings=("<<",))
    assert "".join(shown) == "less <"
    assert not reply.stopped


def test_text_before_a_stop_in_the_same_token_is_kept():
    shown, reply = stream(" yes\n<human>: no", stop_strings=STOPS)
    assert (shown, reply.stopped, reply.text) == (["yes", ""], True, "yes")


def test_nothing_comes_after_a_stop():
    matcher = StopMatcher(["stop"])
    assert [matcher.push("a stop"), matcher.push("b"), matcher.flush()] == ["a ", "", ""]


@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        ("red \x1b[31mtext\x1b[0m", "red text"),
        ("\x1b]0;title\x07after", "after"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x9b2Jcleared", "cleared"),
        ("\x9d0;title\x9cafter", "after"),
        ("\x1bPq#0;2;0\x1b\\image", "image"),
        ("\x1b(Bset", "set"),
        ("\x1b\x1b[1mtwice", "twice"),
        ("\x1b[12\x1b[1mbroken off", "broken off"),
        ("back\x08space\x7f\x00\x07\r\n", "backspace\n"),
        ("never ended \x1b]0;title\nnext line", "never ended \nnext line"),
        ("csi cut by a line \x1b[3\nnext", "csi cut by a line \nnext"),
        ("\u202eevil\u202c \u2066x\u2069\u200f", "evil x"),
        ("\ud800lone", "lone"),
        ("tab\tand\nline, é 日本", "tab\tand\nline, é 日本"),
    ],
)
def test_what_a_terminal_would_obey_is_taken_out_however_it_is_cut(sent, shown):
    assert clean(sent) == shown
    one_by_one = TerminalFilter()
    assert "".join(map(one_by_one.push, sent)) == shown


def test_a_stop_string_hidden_in_control_characters_is_found():
    _, reply = stream("yes\n<hu\x00man", ">: no", stop_strings=STOPS)
    assert (reply.text, reply.stopped) == ("yes", True)


def test_white_space_goes_from_both_ends_and_stays_within():
    trimmer = Trimmer(" ")
    assert [trimmer.push(piece) for piece in (" ", "a ", "\n", " b", "\n", " ")] == ["", "a", "", " \n b", "", ""]


@pytest.mark.parametrize(
    ("pieces", "separator", "shown"),
    [
        ("     if x:\n        y", " ", "    if x:\n        y"),
        ("    if x:", "", "    if x:"),
        (" yes", "", "yes"),
        ("  yes", " ", " yes"),
        ("yes", " ", "yes"),
        (" \n\n    if x:", " ", "    if x:"),
        ("\n \n yes", "", " yes"),
        ("\tx", " ", "\tx"),
        ("   ", " ", ""),
    ],
)
def test_the_indentation_of_a_reply_s_first_line_stays(pieces, separator, shown):
    for trimmer, parts in ((Trimmer(separator), list(pieces)), (Trimmer(separator), [pieces])):
        assert "".join(map(trimmer.push, parts)) == shown


def test_untrimmed_text_keeps_its_white_space():
    assert "".join(stream(" a ", "\n", trim=False)[0]) == " a \n"
