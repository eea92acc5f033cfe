"""Parsing of requests in OpenAI's form into generation requests."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from kedit_daemon.serve.errors import RequestError, bad_request
from kedit_daemon.serve.inference.reader import Reader
from kedit_daemon.serve.inference.types import BASE, EDITED, GenerationRequest

COMPLETION_TOKENS = 16  # OpenAI's default
CHAT_TOKENS = 4096  # default at most
BASE_SUFFIX, GENERATION_SUFFIX = "@base", "@gen-"
# Unsupported fields that would change the answer, with the values that change nothing.
_HARMLESS_VALUES: Mapping[str, tuple[Any, ...]] = {
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
}


@dataclass(frozen=True)
class ParsedRequest:
    """A valid request: one generation request per choice, those of a prompt together."""

    model: str
    is_chat: bool
    generation_requests: tuple[GenerationRequest, ...]
    prompt_tokens: int
    is_streaming: bool
    needs_usage: bool  # whether a stream ends with its token counts


class _StrictModel(BaseModel):
    # Unknown fields are ignored, as by OpenAI's servers; no text becomes a number.
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)


class _StreamOptions(_StrictModel):
    include_usage: bool | None = None


class _RequestBody(_StrictModel):
    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None


class _CompletionBody(_RequestBody):
    prompt: Any
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None


class _TextPart(_StrictModel):
    type: Literal["text"]
    text: str


class _Message(_StrictModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_TextPart]

    @property
    def text(self) -> str:
        """The text of all its parts."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class _ChatBody(_RequestBody):
    messages: Annotated[list[_Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


RequestParser = Callable[[bytes, Reader, int], ParsedRequest]
"""Takes a body, the model and the maximum number of choices; raises RequestError."""


def parse_completion(body: bytes, reader: Reader, max_choices: int) -> ParsedRequest:
    """Parse a request to continue text."""
    form = _validate_body(body, _CompletionBody)
    variant = _parse_model_name(form.model, reader.name)
    prompts = _split_prompts(form.prompt)
    _check_count(len(prompts), form, max_choices)
    tokens = form.max_tokens or COMPLETION_TOKENS
    ids = [_encode_prompt(prompt, reader, tokens) for prompt in prompts]
    return _build_request(form, variant, ids, tokens, form.logprobs)


def parse_chat(body: bytes, reader: Reader, max_choices: int) -> ParsedRequest:
    """Parse a request to continue a conversation."""
    form = _validate_body(body, _ChatBody)
    variant = _parse_model_name(form.model, reader.name)
    if form.top_logprobs is not None and not form.logprobs:
        raise bad_request("top_logprobs needs logprobs to be true", "top_logprobs")
    _check_count(1, form, max_choices)
    # The newer name of the same role, which templates do not know.
    messages = [("system" if m.role == "developer" else m.role, m.text) for m in form.messages]
    _check_characters(sum(len(text) for _, text in messages), reader, "messages")
    ids = reader.encode_messages(messages)
    if not ids:
        raise bad_request("there is nothing in the messages", "messages")
    default = max(1, min(reader.positions - len(ids), CHAT_TOKENS))
    tokens = form.max_completion_tokens or form.max_tokens or default
    _check_tokens(len(ids), tokens, reader, "messages")
    logprobs = (form.top_logprobs or 0) if form.logprobs else None
    return _build_request(form, variant, [tuple(ids)], tokens, logprobs)


def _check_count(prompts: int, form: _RequestBody, max_choices: int) -> None:
    if prompts * (form.n or 1) > max_choices:
        raise bad_request(f"more than {max_choices} answers are asked for at once", "n")


def _check_characters(characters: int, reader: Reader, param: str) -> None:
    """Refuse a text that is too long for any tokens, before it is encoded."""
    if characters > reader.positions * reader.longest_token_chars:
        raise _context_exceeded(f"{characters} characters are more than the model can read", param)


def _check_tokens(prompt: int, tokens: int, reader: Reader, param: str) -> None:
    if prompt + tokens > reader.positions:
        what = f"a prompt of {prompt} tokens with an answer of up to {tokens}"
        raise _context_exceeded(f"{what}: both together may have {reader.positions}", param)


def _context_exceeded(message: str, param: str) -> RequestError:
    return RequestError(message, status=400, code="context_length_exceeded", param=param)


def _build_request(
    form: _RequestBody,
    variant: str | int,
    prompts: Sequence[tuple[int, ...]],
    tokens: int,
    logprobs: int | None,
) -> ParsedRequest:
    stop = (form.stop,) if isinstance(form.stop, str) else tuple(form.stop or ())
    top_p = 1.0 if form.top_p is None else form.top_p
    # top_p 0 leaves only the most likely token.
    temperature = (1.0 if form.temperature is None else form.temperature) if top_p else 0.0
    requests = [
        GenerationRequest(
            ids,
            variant,
            tokens,
            temperature,
            top_p or 1.0,
            None if form.seed is None else (form.seed + choice) % (1 << 63),
            tuple(text for text in stop if text),
            logprobs,
        )
        for ids in prompts
        for choice in range(form.n or 1)
    ]
    return ParsedRequest(
        form.model,
        isinstance(form, _ChatBody),
        tuple(requests),
        sum(map(len, prompts)),
        bool(form.stream),
        bool(form.stream_options and form.stream_options.include_usage),
    )


Body = TypeVar("Body", bound=_RequestBody)


def _validate_body(body: bytes, form: type[Body]) -> Body:
    try:
        fields = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise bad_request(f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise bad_request("the body must be a JSON object")
    for field, harmless in _HARMLESS_VALUES.items():
        if fields.get(field) is not None and fields[field] not in harmless:
            message = f"{field} is not supported here"
            raise RequestError(message, status=400, code="unsupported", param=field)
    try:
        return form.model_validate(fields)
    except ValidationError as error:
        raise _describe_invalid(error) from error


def _describe_invalid(error: ValidationError) -> RequestError:
    problem = error.errors(include_url=False, include_input=False)[0]
    # After the field come indices of lists, and names of our classes, which say nothing outside.
    indices = [str(step) for step in problem["loc"] if isinstance(step, int)]
    param = ".".join([str(problem["loc"][0]), *indices])
    return bad_request(f"{param}: {problem['msg']}", param)


def _parse_model_name(asked: str, name: str) -> str | int:
    """Return the variant that a model's name stands for."""
    if asked == name:
        return EDITED
    if asked == name + BASE_SUFFIX:
        return BASE
    number = asked.removeprefix(name + GENERATION_SUFFIX)
    if number != asked and number.isascii() and number.isdecimal() and len(number) <= 18:
        return int(number)
    raise RequestError(
        f"there is no model {asked!r} here: see /v1/models",
        status=404,
        code="model_not_found",
        param="model",
    )


def _split_prompts(prompt: Any) -> list[Any]:
    """Return a list of prompts, each a text or token ids."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(_is_token_id(n) for n in prompt):
            return [prompt]
        if all(isinstance(p, str) for p in prompt):
            return prompt
        if all(isinstance(p, list) and all(_is_token_id(n) for n in p) for p in prompt):
            return prompt
    raise bad_request("prompt must be a string, token ids, or a list of either", "prompt")


def _is_token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _encode_prompt(prompt: str | list[int], reader: Reader, tokens: int) -> tuple[int, ...]:
    """Return a prompt's token ids; check that an answer of `tokens` fits after them."""
    if isinstance(prompt, str):
        _check_characters(len(prompt), reader, "prompt")
        prompt = reader.encode(prompt)
    if not prompt:
        raise bad_request("there is nothing in the prompt", "prompt")
    _check_tokens(len(prompt), tokens, reader, "prompt")
    if not all(0 <= n < reader.vocabulary_size for n in prompt):
        raise bad_request(f"ids of tokens go from 0 to {reader.vocabulary_size - 1}", "prompt")
    return tuple(prompt)
