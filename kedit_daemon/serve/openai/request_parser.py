"""From a request in OpenAI's form to wishes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from kedit_daemon.serve.errors import RequestError, bad_request
from kedit_daemon.serve.inference.reader import Reader
from kedit_daemon.serve.inference.types import BASE, EDITED, GenerationRequest

COMPLETION_TOKENS = 16  # as OpenAI has it
CHAT_TOKENS = 4096  # where the context would allow more
BASE_SUFFIX, GENERATION_SUFFIX = "@base", "@gen-"
# Fields that would change the answer and are not carried out, with the values that change nothing.
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
    """A request as it is carried out: a wish for each choice, those of a prompt together."""

    model: str
    is_chat: bool
    generation_requests: tuple[GenerationRequest, ...]
    prompt_tokens: int
    is_streaming: bool
    needs_usage: bool  # whether a stream ends with what it has cost


class _StrictModel(BaseModel):
    # As OpenAI's servers do, and no text becomes a number.
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
        """What is said in it."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class _ChatBody(_RequestBody):
    messages: Annotated[list[_Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


RequestParser = Callable[[bytes, Reader, int], ParsedRequest]
"""The body of a request, the model, and how many wishes there may be; raises Refused."""


def parse_completion(body: bytes, reader: Reader, most: int) -> ParsedRequest:
    """A request to continue text."""
    given = _validate_body(body, _CompletionBody)
    which = _parse_model_name(given.model, reader.name)
    prompts = _split_prompts(given.prompt)
    _check_count(len(prompts), given, most)
    tokens = given.max_tokens or COMPLETION_TOKENS
    ids = [_encode_prompt(p, reader, tokens) for p in prompts]
    return _build_request(given, which, ids, tokens, given.logprobs)


def parse_chat(body: bytes, reader: Reader, most: int) -> ParsedRequest:
    """A request to go on with a conversation."""
    given = _validate_body(body, _ChatBody)
    which = _parse_model_name(given.model, reader.name)
    if given.top_logprobs is not None and not given.logprobs:
        raise bad_request("top_logprobs is told only where logprobs is true", "top_logprobs")
    _check_count(1, given, most)
    # The newer name of the same role, which templates do not know.
    messages = [("system" if m.role == "developer" else m.role, m.text) for m in given.messages]
    _check_characters(sum(len(text) for _, text in messages), reader, "messages")
    ids = reader.encode_messages(messages)
    if not ids:
        raise bad_request("there is nothing in the messages", "messages")
    room = max(1, min(reader.positions - len(ids), CHAT_TOKENS))
    tokens = given.max_completion_tokens or given.max_tokens or room
    _check_tokens(len(ids), tokens, reader, "messages")
    logprobs = (given.top_logprobs or 0) if given.logprobs else None
    return _build_request(given, which, [tuple(ids)], tokens, logprobs)


def _check_count(prompts: int, given: _RequestBody, most: int) -> None:
    if prompts * (given.n or 1) > most:
        raise bad_request(f"more than {most} answers are asked for at once", "n")


def _check_characters(characters: int, reader: Reader, param: str) -> None:
    """Refuse a text that is too long whatever its tokens are, before it is made into tokens."""
    if characters > reader.positions * reader.longest_token_chars:
        raise _context_exceeded(f"{characters} characters are more than the model can read", param)


def _check_tokens(prompt: int, tokens: int, reader: Reader, param: str) -> None:
    if prompt + tokens > reader.positions:
        what = f"a prompt of {prompt} tokens with an answer of up to {tokens}"
        raise _context_exceeded(f"{what}: both together may have {reader.positions}", param)


def _context_exceeded(message: str, param: str) -> RequestError:
    return RequestError(message, status=400, code="context_length_exceeded", param=param)


def _build_request(
    given: _RequestBody,
    which: str | int,
    prompts: Sequence[tuple[int, ...]],
    tokens: int,
    logprobs: int | None,
) -> ParsedRequest:
    stop = (given.stop,) if isinstance(given.stop, str) else tuple(given.stop or ())
    top_p = 1.0 if given.top_p is None else given.top_p
    wishes = [
        GenerationRequest(
            ids,
            which,
            tokens,
            # Where nothing but the likeliest is left to choose from.
            (1.0 if given.temperature is None else given.temperature) if top_p else 0.0,
            top_p or 1.0,
            None if given.seed is None else (given.seed + choice) % (1 << 63),
            tuple(text for text in stop if text),
            logprobs,
        )
        for ids in prompts
        for choice in range(given.n or 1)
    ]
    usage = bool(given.stream_options and given.stream_options.include_usage)
    return ParsedRequest(
        given.model,
        isinstance(given, _ChatBody),
        tuple(wishes),
        sum(map(len, prompts)),
        bool(given.stream),
        usage,
    )


Body = TypeVar("Body", bound=_RequestBody)


def _validate_body(body: bytes, form: type[Body]) -> Body:
    try:
        said = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise bad_request(f"the body is not JSON: {error}") from error
    if not isinstance(said, dict):
        raise bad_request("the body must be a JSON object")
    for field, harmless in _HARMLESS_VALUES.items():
        if said.get(field) is not None and said[field] not in harmless:
            raise RequestError(
                f"{field} is not supported here", status=400, code="unsupported", param=field
            )
    try:
        return form.model_validate(said)
    except ValidationError as error:
        raise _describe_invalid(error) from error


def _describe_invalid(error: ValidationError) -> RequestError:
    problem = error.errors(include_url=False, include_input=False)[0]
    # Behind the field stand places in lists, and names of ours for the forms that it may have.
    where = [str(step) for step in problem["loc"] if isinstance(step, int)]
    param = ".".join([str(problem["loc"][0]), *where])
    return bad_request(f"{param}: {problem['msg']}", param)


def _parse_model_name(asked: str, name: str) -> str | int:
    """What a model's name stands for."""
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


def _split_prompts(given: Any) -> list[Any]:
    """One text, or ids, for each prompt."""
    if isinstance(given, str):
        return [given]
    if isinstance(given, list) and given:
        if all(_is_token_id(n) for n in given):
            return [given]
        if all(isinstance(p, str) for p in given):
            return given
        if all(isinstance(p, list) and all(_is_token_id(n) for n in p) for p in given):
            return given
    raise bad_request("prompt must be a text, ids of tokens, or a list of either", "prompt")


def _is_token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _encode_prompt(prompt: str | list[int], reader: Reader, tokens: int) -> tuple[int, ...]:
    """A prompt's ids, where an answer of so many tokens has room behind them."""
    if isinstance(prompt, str):
        _check_characters(len(prompt), reader, "prompt")
        prompt = reader.encode(prompt)
    if not prompt:
        raise bad_request("there is nothing in the prompt", "prompt")
    _check_tokens(len(prompt), tokens, reader, "prompt")
    if not all(0 <= n < reader.vocabulary_size for n in prompt):
        raise bad_request(f"ids of tokens go from 0 to {reader.vocabulary_size - 1}", "prompt")
    return tuple(prompt)
