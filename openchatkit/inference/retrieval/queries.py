"""Search queries for a question that is asked in a conversation.

The rules are few and of English words; a question in another language is searched for as it stands. They order the
queries, and do not judge whether a question has an answer: no list of words can tell that a question is about "fine" or
"mine", and the index, which knows how near is near enough, finds nothing for small talk.

- A mere greeting ("hello", "thank you") is not searched for.
- A question without telling words ("why?", "tell me more") is searched for after the last question with some, then as
  it stands; one that is short and points back ("who built it?"), only after that question.
- One with words of small talk and no telling words ("that's fine") is searched for as it stands.
- Any other is searched for as it stands; a short one for which nothing is found, then after the last question, too.
"""

import re
from collections.abc import Sequence

from openchatkit.formats.chat import Turn

_SHORT = 3  # telling words
_WORD = re.compile(r"(?<![\w'\u2019])[^\W_]\w*")  # of "isn't" and "it's", the part before the apostrophe


def queries(turns: Sequence[Turn]) -> list[str]:
    """Queries to try in this order until something is found; `turns` end with the question."""
    *before, question = turns
    all_words = _WORD.findall(question.text.lower())
    telling = telling_words(question.text)
    if _GREETINGS.issuperset(all_words):
        return []
    if not telling and not _SMALL_TALK.isdisjoint(all_words):
        return [question.text]
    asked = [turn.text for turn in reversed(before) if turn.role == "human" and telling_words(turn.text)]
    joined = [f"{asked[0]}\n{question.text}"] if asked else []
    if not telling:
        return [*joined, question.text]
    if len(telling) > _SHORT:
        return [question.text]
    if joined and not _POINTING.isdisjoint(all_words):
        return joined
    return [question.text, *joined]


def telling_words(text: str) -> list[str]:
    """The words that tell what a text is about."""
    return [word for word in _WORD.findall(text.lower()) if word not in _EMPTY]


def _set(*lines: str) -> frozenset[str]:
    return frozenset(" ".join(lines).split())


_GREETINGS = _set("hello hi hey hiya bye goodbye thanks thank you ok okay yes yeah yep no nope please lol haha wow")
_SMALL_TALK = _set(
    "hello hi hey hiya greetings welcome morning afternoon evening goodbye bye thanks thank please sorry ok okay yes",
    "no yeah yep nope sure great good nice cool fine well right alright wow haha lol cheers",
)
_POINTING = _set("it its they them their theirs he him his she her hers this that these those one ones")
_EMPTY = (
    _SMALL_TALK
    | _POINTING
    | _set(
        "a an the and or but if so than then to of in on at by for from with about into as also too not only just",
        "i me my mine you your yours we us our who whom whose what which when where why how",
        "is isn are aren was wasn were be been being am do don does doesn did didn doing done have has had can could",
        "will would should shall may might must tell know think mean explain more else again another other any some",
        "there here now today everyone all much many very really",
    )
)
