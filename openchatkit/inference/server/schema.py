"""What a client may ask: the requests of OpenAI's API, checked and turned into what a responder takes.

Every field is honoured, or is passed over, which the answer's header says, or is refused by name: what would change the
reply and cannot be done, and what is not known.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from openchatkit.errors import UserError
from openchatkit.inference.conversation import tools
from openchatkit.inference.conversation.conversation import Conversation, to_answer
from openchatkit.inference.engine.sampling import Sampling
from openchatkit.inference.server.errors import ApiError
from openchatkit.inference.server.fields import Fields, shown, text, texts, wrong

MOST_MESSAGES = 1000
MOST_PASSAGES = 100
MOST_STOPS = 64
MOST_PENALTY = 100

# They name, group, speed or price a request, or set what a model here does not have, and are passed over.
_IGNORED = (
    "cache_prompt",
    "chat_template_kwargs",
    "keep_alive",
    "metadata",
    "parallel_tool_calls",
    "prediction",
    "priority",
    "prompt_cache_key",
    "prompt_cache_retention",
    "reasoning",
    "reasoning_effort",
    "safety_identifier",
    "service_tier",
    "thinking",
    "user",
    "verbosity",
)
# What is not supported may still be sent with the value that asks for nothing.
_DEFAULTS: Mapping[str, Sequence[object]] = {
    "add_generation_prompt": (True,),
    "best_of": (1,),
    "continue_final_message": (False,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "min_tokens": (0,),
    "mirostat": (0,),
    "modalities": (["text"],),
    "n": (1,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "retrieval": (False,),
    "skip_special_tokens": (True,),
    "store": (False,),
    "suffix": ("",),
    "tfs_z": (1,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "typical_p": (1,),
    "use_beam_search": (False,),
}
# Who of several people or programs speaks (models read sides, not names), and what an earlier reply thought.
_MESSAGE_IGNORED = ("name", "id", "cache_control", "reasoning", "reasoning_content")
# A reply of ours comes back as a message with these, empty.
_MESSAGE_DEFAULTS: Mapping[str, Sequence[object]] = {"annotations": ([],), "refusal": ("",), "tool_calls": ([],)}
_ROLES = ("system", "developer", "user", "assistant", *tools.RESULTS)


@dataclass(frozen=True)
class Served:
    """What is offered: the model's name, the settings and seed of a request that names none, the longest reply that is
    made, and whether there is an index to look in."""

    model: str
    sampling: Sampling
    max_new_tokens: int
    seed: int | None = None
    retrieval: bool = False


@dataclass(frozen=True)
class Ask:
    """A request: a conversation to answer, or a prompt to go on from, and how; and which fields were passed over."""

    subject: Conversation | str
    sampling: Sampling
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    retrieval: bool = False
    ignored: tuple[str, ...] = ()


def chat(body: Mapping[str, object], served: Served) -> Ask:
    """A request to /v1/chat/completions. ApiError 400 or 404 for what is wrong with it."""
    fields = Fields(body)
    _check_model(fields, served)
    subject, ignored = conversation(fields.take("messages"), _passages(fields, "passages"))
    retrieval = _retrieval(fields.take("retrieval"), served)
    ask = _ask(subject, fields, served, ("max_completion_tokens", "max_tokens"))
    return replace(ask, retrieval=retrieval, ignored=(*ask.ignored, *ignored))


def completion(body: Mapping[str, object], served: Served) -> Ask:
    """A request to /v1/completions. ApiError 400 or 404 for what is wrong with it."""
    fields = Fields(body)
    _check_model(fields, served)
    prompt = fields.take("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str) or not prompt:
        raise wrong("prompt", prompt, "a string that is not empty, or a list with one")
    return _ask(text("prompt", prompt), fields, served, ("max_tokens",))


def conversation(messages: object, passages: Sequence[str] = ()) -> tuple[Conversation, list[str]]:
    """The conversation of a list of messages, and what was passed over in them; `passages` belong to the last question.

    The last message is a question, a tool's result, or the beginning of the reply.
    """
    if not isinstance(messages, list) or not 1 <= len(messages) <= MOST_MESSAGES:
        raise wrong("messages", messages, f"a list of 1 to {MOST_MESSAGES} messages")
    ignored: dict[str, None] = {}  # in this order
    read = []
    for number, message in enumerate(messages):
        read.append(_message(message, f"messages[{number}]", ignored))
    try:
        asked = to_answer(read)
        for turn in asked.turns:
            text("messages", turn.text)  # with what calls of tools say
    except UserError as error:
        raise ApiError(400, str(error), param="messages", code="invalid_value") from error
    if passages:
        question = asked.turns[-1]
        question = replace(question, passages=(*question.passages, *passages))
        asked = replace(asked, turns=(*asked.turns[:-1], question))
    return asked, [f"messages[].{name}" for name in ignored]


def _message(message: object, name: str, ignored: dict[str, None]) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise wrong(name, message, "an object with role and content")
    fields = Fields(message, f"{name}.")
    role = fields.take("role")
    if role not in _ROLES:
        raise wrong(f"{name}.role", role, "system, developer, user, assistant or tool")
    content = fields.take("content")
    read: dict[str, Any] = {"role": role}
    if role == "assistant":
        read |= {key: fields.take(key) for key in ("tool_calls", "function_call")}
        refusal = fields.take("refusal")
        content = (refusal or ("" if tools.calls_something(read) else None)) if content is None else content
    elif role in tools.RESULTS:
        read |= {key: fields.take(key) for key in ("name", "tool_call_id")}
    if isinstance(content, list):
        content = "\n".join(_part(part, f"{name}.content[{number}]") for number, part in enumerate(content))
    if not isinstance(content, str):
        raise wrong(f"{name}.content", content, "a string or a list of text parts")
    read["content"] = text(f"{name}.content", content)
    if role == "user":
        read["passages"] = _passages(fields, f"{name}.passages")
    ignored.update(dict.fromkeys(fields.refuse(_MESSAGE_DEFAULTS, _MESSAGE_IGNORED)))
    return read


def _passages(fields: Fields, name: str) -> tuple[str, ...]:
    passages = fields.take("passages")
    return () if passages is None else texts(name, passages, most=MOST_PASSAGES)


def _retrieval(value: object, served: Served) -> bool:
    """Whether passages are looked for: wherever there is an index, unless the request says not."""
    if value is None:
        return served.retrieval
    if not isinstance(value, bool):
        raise wrong("retrieval", value, "true or false")
    if value and not served.retrieval:
        message = "retrieval is true: this server was started without --retrieval, so there is nothing to look in"
        raise ApiError(400, message, param="retrieval", code="unsupported_parameter")
    return value


def _part(part: object, name: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        raise wrong(name, part, 'a text part, {"type": "text", "text": ...}')
    return text(f"{name}.text", part.get("text"))


def _check_model(fields: Fields, served: Served) -> None:
    name = fields.take("model")
    if name not in (None, served.model):
        raise no_model(name, served)


def no_model(name: object, served: Served) -> ApiError:
    """The error for a model that is not served here."""
    message = f"there is no model {shown(name)}: this server has {shown(served.model)}"
    return ApiError(404, message, param="model", code="model_not_found")


def _ask(subject: Conversation | str, fields: Fields, served: Served, lengths: Sequence[str]) -> Ask:
    sampling, seed = _sampling(fields, served, lengths), fields.whole("seed", -(1 << 63), (1 << 63) - 1)
    seed = served.seed if seed is None else seed
    stop, stream = fields.take("stop"), fields.truth("stream")
    if stop is not None:
        stop = texts("stop", [stop] if isinstance(stop, str) else stop, most=MOST_STOPS)
    include_usage = _include_usage(fields.take("stream_options"), stream)
    ignored = fields.refuse(_DEFAULTS, _IGNORED)
    return Ask(subject, sampling, seed, stop or (), stream, include_usage, ignored=tuple(ignored))


def _sampling(fields: Fields, served: Served, lengths: Sequence[str]) -> Sampling:
    asked: dict[str, object] = {
        "max_tokens": _max_tokens(fields, served, lengths),
        "temperature": fields.number("temperature", 0, 2),
        "top_p": fields.number("top_p", 0, 1, above=True),
        "top_k": _top_k(fields),
        "min_p": fields.number("min_p", 0, 1),
        "repetition_penalty": fields.number("repetition_penalty", 0, MOST_PENALTY, above=True),
    }
    if asked["temperature"] is not None:
        asked["sample"] = True  # whatever the server's own default is
    return replace(served.sampling, **{name: value for name, value in asked.items() if value is not None})


def _top_k(fields: Fields) -> int | None:
    """The tokens to draw among; -1, as 0, takes all."""
    given = fields.whole("top_k", -1, (1 << 31) - 1)
    return 0 if given == -1 else given


def _max_tokens(fields: Fields, served: Served, names: Sequence[str]) -> int | None:
    """The longest reply: no longer than the server makes, and that long where it is -1, which asks for no limit."""
    given = [(name, value) for name in names if (value := fields.take(name)) is not None]
    for name, value in given:
        if not isinstance(value, int) or isinstance(value, bool) or (value < 1 and value != -1):
            raise wrong(name, value, "a whole number of at least 1, or -1 for no limit")
    if len({value for _, value in given}) > 1:
        raise wrong(*given[1], f"the same as {given[0][0]}, {given[0][1]}, or only one of the two")
    if not given:
        return None
    most = given[0][1]
    return served.max_new_tokens if most == -1 else min(most, served.max_new_tokens)


def _include_usage(options: object, stream: bool) -> bool:
    if options is None:
        return False
    if not isinstance(options, dict) or not stream:
        raise wrong("stream_options", options, "an object, together with stream: true")
    fields = Fields(options, "stream_options.")
    include = fields.truth("include_usage")
    fields.refuse({}, ("include_obfuscation", "continuous_usage_stats"))
    return include
