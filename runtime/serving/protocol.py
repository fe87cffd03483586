"""A chat request in OpenAI's shape: read strictly, and turned into what the engine is asked.

What would change an answer and is not done is refused by name; what changes none is passed over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, field_validator, model_validator

from leanvlm.runtime.errors import InputError
from leanvlm.runtime.generation import MAX_TOP_LOGPROBS, GenerateOptions
from leanvlm.runtime.records import shorten
from leanvlm.runtime.serving.problems import RequestError
from leanvlm.runtime.serving.service import Service
from leanvlm.runtime.text import Message

MAX_MESSAGES = 1024
MAX_STOPS, MAX_STOP = 4, 1024
MAX_VALUES = 1 << 16
# Of a prompt's text; of 100,000 words.
MAX_COMMAS = 1 << 18
# Characters of a prompt for each position that it may take; text of words has some five, and tokenising takes time.
CHARACTERS = 32
# Of a nucleus that holds one token.
LEAST_TOP_P = 1e-9

HARMLESS = frozenset(
    {
        "metadata", "parallel_tool_calls", "prediction", "prompt_cache_key", "prompt_cache_retention", "safety_identifier",
        "service_tier", "store", "user",
    }
)  # fmt: skip
"""Fields of OpenAI's that change no answer here."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "n": (1,),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Fields of OpenAI's that would change an answer, with the values that do not."""


class _Strict(BaseModel):
    """A record of JSON: types as they are written, nothing unknown; a null is a field that is not there."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


class ImageAddress(_Strict):
    """Where an image is: a data URI, or an address."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class Part(_Strict):
    """A part of a message."""

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageAddress | None = None

    @model_validator(mode="after")
    def _holds_its_type(self) -> Part:
        other = {"text": "image_url", "image_url": "text"}[self.type]
        if getattr(self, self.type) is None or getattr(self, other) is not None:
            raise ValueError(f"a part of type {self.type} has the field {self.type}, and {other} not")
        return self


class ChatMessage(_Strict):
    """A message; what an answer of ours holds beside its text may come back with it."""

    role: Literal["system", "user", "assistant"]
    # Of a hundred thousand wrong ones, errors would take 200 MB.
    content: Annotated[list[Part], FailFast()]
    name: str = ""
    annotations: list[Any] = Field([], max_length=0)
    tool_calls: list[Any] = Field([], max_length=0)

    @field_validator("role", mode="before")
    @classmethod
    def _role(cls, role: Any) -> Any:
        return "system" if role == "developer" else role

    @field_validator("content", mode="before")
    @classmethod
    def _parts(cls, content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content


class StreamOptions(_Strict):
    """How an answer is streamed."""

    include_usage: bool = False
    include_obfuscation: bool = False


Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP)]


class ChatRequest(_Strict):
    """The body of a chat request."""

    model_config = ConfigDict(strict=True, extra="allow")

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: list[Stop] = Field([], max_length=MAX_STOPS)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    min_tokens: int | None = Field(None, ge=0)
    temperature: float = Field(0.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    # Beyond, logits leave what fp32 holds.
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    ignore_eos: bool = False
    budget: int | None = None
    details: bool = False

    @field_validator("stop", mode="before")
    @classmethod
    def _several(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @property
    def addresses(self) -> list[tuple[str, str]]:
        """Of each image, in order, the field that names it and its address."""
        return [
            (f"messages[{m}].content[{p}].image_url", part.image_url.url)
            for m, message in enumerate(self.messages)
            for p, part in enumerate(message.content)
            if part.image_url is not None
        ]


@dataclass(frozen=True)
class Asked:
    """What a request asks, without its images.

    Attributes:
        messages: The conversation, as templates take it.
        addresses: Of each image, in order, the field that names it and its address.
        options: How to generate.
        budget: Image tokens kept per crop.
        stream: Whether the answer comes in chunks.
        usage: Whether a last chunk counts tokens.
        details: Whether what pruning kept is told.
    """

    messages: list[Message]
    addresses: list[tuple[str, str]]
    options: GenerateOptions
    budget: int
    stream: bool
    usage: bool
    details: bool


def read_request(body: bytes, service: Service) -> Asked:
    """Read the body of a chat request.

    Args:
        body: As it came.
        service: What is asked.

    Raises:
        RequestError: It cannot be answered as it is.
    """
    # Parsed, an empty list takes twenty times its three bytes.
    values, most = sum(map(body.count, (b",", b"[", b"{"))), MAX_VALUES + min(CHARACTERS * service.prompt_limit, MAX_COMMAS)
    if values > most:
        raise RequestError(f"the body has over {most} values; an image is one", code="invalid_json")
    request = _parse(body)
    if request.model is not None and request.model != service.name:
        message = f"the model {shorten(request.model)!r} is not here; this server has {service.name!r}"
        raise RequestError(message, "model", "model_not_found", 404)
    _check_extra(request.model_extra or {})
    _check_messages(request, service)
    asked = service.config.budget if request.budget is None else request.budget
    try:
        budget = service.session.manifest.budget(asked)
    except InputError as error:
        raise RequestError(str(error), "budget") from error
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options goes with stream: true", "stream_options")
    usage = request.stream_options is not None and request.stream_options.include_usage
    options = _options(request, service)
    messages = [_message(message) for message in request.messages]
    return Asked(messages, request.addresses, options, budget, request.stream, usage, request.details)


def _parse(body: bytes) -> ChatRequest:
    try:
        # Bytes may also be in UTF-16, and another program would read other things into them.
        data = json.loads(body.decode(), parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {shorten(error)}", code="invalid_json") from error
    if not isinstance(data, dict):
        raise RequestError("the body is not a JSON object", code="invalid_json")
    try:
        return ChatRequest.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        param = _path(first["loc"])
        raise RequestError(f"{param or 'the body'}: {first['msg'].removeprefix('Value error, ')}", param or None) from error


def _path(location: tuple[int | str, ...]) -> str:
    """Write where a value stands: messages[0].content."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in location).removeprefix(".")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has a key twice")
    return found


def _check_extra(extra: Mapping[str, Any]) -> None:
    """Refuse what is not done, or not known."""
    for name, value in extra.items():
        if name in HARMLESS:
            continue
        if name not in NEUTRAL:
            raise RequestError(f"the field {shorten(name)!r} is not known here", shorten(name), "unknown_parameter")
        if value not in NEUTRAL[name] or isinstance(value, bool):
            way_out = " or ".join(json.dumps(neutral) for neutral in NEUTRAL[name])
            hint = f"leave it out{f', or give {way_out}' if way_out else ''}"
            raise RequestError(f"{name} is not supported: {hint}", name, "unsupported_parameter")


def _check_messages(request: ChatRequest, service: Service) -> None:
    images, allowed = len(request.addresses), service.config.max_images
    if images > allowed:
        many = f"the request has {images} images; this server takes {allowed} at most"
        raise RequestError(many, "messages", "too_many_images")
    characters = 0
    for number, message in enumerate(request.messages):
        if message.role in service.left_out:
            passed = f"the model's template passes over messages of role {message.role}"
            raise RequestError(passed, f"messages[{number}].role")
        if message.role != "user" and any(part.image_url for part in message.content):
            param = f"messages[{number}].content"
            raise RequestError(f"{param}: images go with messages of the user, not of role {message.role}", param)
        said = [part for part in message.content if part.image_url or (part.text or "").strip()]
        if message.role != "assistant" and not said:
            raise RequestError(f"messages[{number}].content is empty", f"messages[{number}].content")
        characters += sum(len(part.text or "") for part in message.content)
    most = CHARACTERS * service.prompt_limit
    if characters > most:
        long = f"the messages have {characters} characters; at most {most} are read"
        raise RequestError(long, "messages", "context_length_exceeded")


def _options(request: ChatRequest, service: Service) -> GenerateOptions:
    config = service.config
    asked = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(asked) > 1:
        raise RequestError("max_tokens and max_completion_tokens differ; give one of them", "max_tokens")
    named = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
    most = asked.pop() if asked else min(config.default_new_tokens, config.max_new_tokens, max(service.context // 4, 1))
    assert most is not None
    if most > config.max_new_tokens:
        raise RequestError(f"{named} {most} is more than this server gives, {config.max_new_tokens}", named)
    if request.top_logprobs is not None and not request.logprobs:
        raise RequestError("top_logprobs goes with logprobs: true", "top_logprobs")
    settings = {
        # Of 0, which clients may send, the most probable token alone is left.
        "top_p": request.top_p if request.top_p != 0 else LEAST_TOP_P,
        "top_k": request.top_k,
        "min_p": request.min_p,
        "repetition_penalty": request.repetition_penalty,
        "min_new_tokens": request.min_tokens,
    }
    try:
        return service.session.settings.options(
            max_new_tokens=most,
            temperature=request.temperature,
            # As two's complement has it: OpenAI's seeds may be negative.
            seed=None if request.seed is None else request.seed % 2**64,
            stop=request.stop,
            ignore_end=request.ignore_eos,
            top_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
            **settings,
        )
    except InputError as error:
        param = next((name for name in ChatRequest.model_fields if str(error).startswith(name)), None)
        raise RequestError(str(error), param) from error


def _message(message: ChatMessage) -> Message:
    """Return a message as templates take it: an image part for each image, text as it is."""
    parts = [{"type": "image"} if part.image_url else {"type": "text", "text": part.text} for part in message.content]
    return {"role": message.role, "content": parts}
