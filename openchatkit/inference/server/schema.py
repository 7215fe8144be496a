"""Requests of OpenAI's API, checked and turned into what a responder takes.

Every field is honoured, ignored (the answer's header names it), or refused by name: unknown fields, and fields that
would change the reply in a way that is not supported.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from openchatkit.errors import UserError
from openchatkit.inference.conversation import conversation
from openchatkit.inference.conversation.conversation import Conversation, to_answer
from openchatkit.inference.engine.sampling import LEAST_PENALTY, MOST_PENALTY, Sampling
from openchatkit.inference.server.fields import Fields, check_text, check_texts, invalid, preview
from openchatkit.inference.server.responses import ApiError

_MOST_MESSAGES = 1000
_MOST_PASSAGES = 100
_MOST_STOPS = 64

# Fields that name, group, speed up or price a request, or set what models here do not have.
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
# Fields that are not supported may still be sent with a value that asks for nothing.
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
# Names of speakers (models read roles, not names), and the reasoning of earlier replies.
_MESSAGE_IGNORED = ("name", "id", "cache_control", "reasoning", "reasoning_content")
# The server's own replies come back as messages with these, empty.
_MESSAGE_DEFAULTS: Mapping[str, Sequence[object]] = {"annotations": ([],), "refusal": ("",), "tool_calls": ([],)}
_ROLES = ("system", "developer", "user", "assistant", *conversation.TOOL_ROLES)


@dataclass(frozen=True)
class ServedModel:
    """The model's name, the settings and seed of requests without their own, the longest reply in tokens.

    `retrieval` says whether there is an index to search.
    """

    model: str
    sampling: Sampling
    max_new_tokens: int
    seed: int | None = None
    retrieval: bool = False


@dataclass(frozen=True)
class CompletionRequest:
    """A conversation to answer or a prompt to continue, with its settings; `ignored` are names of ignored fields."""

    subject: Conversation | str
    sampling: Sampling
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    retrieval: bool = False
    ignored: tuple[str, ...] = ()


def parse_chat(body: Mapping[str, object], served: ServedModel) -> CompletionRequest:
    """Read a request to /v1/chat/completions. ApiError 400 or 404 if it is invalid."""
    fields = Fields(body)
    _check_model(fields, served)
    subject, ignored = _conversation(fields.take("messages"), _passages(fields, "passages"))
    retrieval = _retrieval(fields.take("retrieval"), served)
    request = _read_rest(subject, fields, served, ("max_completion_tokens", "max_tokens"))
    return replace(request, retrieval=retrieval, ignored=(*request.ignored, *ignored))


def parse_completion(body: Mapping[str, object], served: ServedModel) -> CompletionRequest:
    """Read a request to /v1/completions. ApiError 400 or 404 if it is invalid."""
    fields = Fields(body)
    _check_model(fields, served)
    prompt = fields.take("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str) or not prompt:
        raise invalid("prompt", prompt, "a string that is not empty, or a list with one")
    return _read_rest(check_text("prompt", prompt), fields, served, ("max_tokens",))


def _conversation(messages: object, passages: Sequence[str]) -> tuple[Conversation, list[str]]:
    """Return the conversation of a list of messages, and their ignored fields; `passages` belong to the last question.

    The last message is a question, a tool's result, or the beginning of the reply.
    """
    if not isinstance(messages, list) or not 1 <= len(messages) <= _MOST_MESSAGES:
        raise invalid("messages", messages, f"a list of 1 to {_MOST_MESSAGES} messages")
    ignored: dict[str, None] = {}  # in this order
    read = []
    for number, message in enumerate(messages):
        read.append(_message(message, f"messages[{number}]", ignored))
    try:
        asked = to_answer(read)
        for turn in asked.turns:
            check_text("messages", turn.text)  # with the text of tool calls
    except UserError as error:
        raise ApiError(400, str(error), param="messages", code="invalid_value") from error
    if passages:
        question = asked.turns[-1]
        question = replace(question, passages=(*question.passages, *passages))
        asked = replace(asked, turns=(*asked.turns[:-1], question))
    return asked, [f"messages[].{name}" for name in ignored]


def _message(message: object, name: str, ignored: dict[str, None]) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise invalid(name, message, "an object with role and content")
    fields = Fields(message, f"{name}.")
    role = fields.take("role")
    if role not in _ROLES:
        raise invalid(f"{name}.role", role, "system, developer, user, assistant or tool")
    content = fields.take("content")
    read: dict[str, Any] = {"role": role}
    if role == "assistant":
        read |= {key: fields.take(key) for key in ("tool_calls", "function_call")}
        refusal = fields.take("refusal")
        content = (refusal or ("" if conversation.has_calls(read) else None)) if content is None else content
    elif role in conversation.TOOL_ROLES:
        read |= {key: fields.take(key) for key in ("name", "tool_call_id")}
    if isinstance(content, list):
        content = "\n".join(_part(part, f"{name}.content[{number}]") for number, part in enumerate(content))
    if not isinstance(content, str):
        raise invalid(f"{name}.content", content, "a string or a list of text parts")
    read["content"] = check_text(f"{name}.content", content)
    if role == "user":
        read["passages"] = _passages(fields, f"{name}.passages")
    ignored.update(dict.fromkeys(fields.reject_rest(_MESSAGE_DEFAULTS, _MESSAGE_IGNORED)))
    return read


def _passages(fields: Fields, name: str) -> tuple[str, ...]:
    passages = fields.take("passages")
    return () if passages is None else check_texts(name, passages, most=_MOST_PASSAGES)


def _retrieval(value: object, served: ServedModel) -> bool:
    """Whether to search for passages: wherever there is an index, unless the request says no."""
    if value is None:
        return served.retrieval
    if not isinstance(value, bool):
        raise invalid("retrieval", value, "true or false")
    if value and not served.retrieval:
        message = "retrieval is true: this server was started without --retrieval, so there is nothing to look in"
        raise ApiError(400, message, param="retrieval", code="unsupported_parameter")
    return value


def _part(part: object, name: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        raise invalid(name, part, 'a text part, {"type": "text", "text": ...}')
    return check_text(f"{name}.text", part.get("text"))


def _check_model(fields: Fields, served: ServedModel) -> None:
    name = fields.take("model")
    if name not in (None, served.model):
        raise no_model(name, served)


def no_model(name: object, served: ServedModel) -> ApiError:
    """Return the error for a model that is not served here."""
    message = f"there is no model {preview(name)}: this server has {preview(served.model)}"
    return ApiError(404, message, param="model", code="model_not_found")


def _read_rest(
    subject: Conversation | str, fields: Fields, served: ServedModel, lengths: Sequence[str]
) -> CompletionRequest:
    sampling, seed = _sampling(fields, served, lengths), fields.integer("seed", -(1 << 63), (1 << 63) - 1)
    seed = served.seed if seed is None else seed
    stop, stream = fields.take("stop"), fields.boolean("stream")
    if stop is not None:
        stop = check_texts("stop", [stop] if isinstance(stop, str) else stop, most=_MOST_STOPS)
    include_usage = _include_usage(fields.take("stream_options"), stream)
    ignored = fields.reject_rest(_DEFAULTS, _IGNORED)
    return CompletionRequest(subject, sampling, seed, stop or (), stream, include_usage, ignored=tuple(ignored))


def _sampling(fields: Fields, served: ServedModel, lengths: Sequence[str]) -> Sampling:
    asked: dict[str, Any] = {
        "max_tokens": _max_tokens(fields, served, lengths),
        "temperature": fields.number("temperature", 0, 2),
        "top_p": fields.number("top_p", 0, 1, above=True),
        "top_k": _top_k(fields),
        "min_p": fields.number("min_p", 0, 1),
        "repetition_penalty": fields.number("repetition_penalty", LEAST_PENALTY, MOST_PENALTY),
    }
    if asked["temperature"] is not None:
        asked["sample"] = True  # whatever the server's own default is
    return replace(served.sampling, **{name: value for name, value in asked.items() if value is not None})


def _top_k(fields: Fields) -> int | None:
    """Return the number of tokens to draw among; 0, or -1, takes all."""
    given = fields.integer("top_k", -1, (1 << 31) - 1)
    return 0 if given == -1 else given


def _max_tokens(fields: Fields, served: ServedModel, names: Sequence[str]) -> int | None:
    """Return the longest reply in tokens: at most the server's limit, which -1 (no limit) stands for."""
    given: dict[str, int] = {}
    for name in names:
        if (value := fields.take(name)) is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or (value < 1 and value != -1):
            raise invalid(name, value, "a whole number of at least 1, or -1 for no limit")
        given[name] = value
    if not given:
        return None
    (first, most), *others = given.items()
    for name, value in others:
        if value != most:
            raise invalid(name, value, f"the same as {first}, {most}, or only one of the two")
    return served.max_new_tokens if most == -1 else min(most, served.max_new_tokens)


def _include_usage(options: object, stream: bool) -> bool:
    if options is None:
        return False
    if not isinstance(options, dict) or not stream:
        raise invalid("stream_options", options, "an object, together with stream: true")
    fields = Fields(options, "stream_options.")
    include = fields.boolean("include_usage")
    fields.reject_rest({}, ("include_obfuscation", "continuous_usage_stats"))
    return include
