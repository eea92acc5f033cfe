"""From a request in OpenAI's form to wishes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from kedit_daemon.serve.errors import Refused, wrong
from kedit_daemon.serve.inference.reader import Reader
from kedit_daemon.serve.inference.types import BASE, EDITED, Wish

COMPLETION_TOKENS = 16  # as OpenAI has it
CHAT_TOKENS = 4096  # where the context would allow more
AT_BASE, AT_GENERATION = "@base", "@gen-"
# Fields that would change the answer and are not carried out, with the values that change nothing.
_HARMLESS: Mapping[str, tuple[Any, ...]] = {
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
class Asked:
    """A request as it is carried out: a wish for each choice, those of a prompt together."""

    model: str
    chat: bool
    wishes: tuple[Wish, ...]
    prompt_tokens: int
    stream: bool
    usage: bool  # whether a stream ends with what it has cost


class _Given(BaseModel):
    # As OpenAI's servers do, and no text becomes a number.
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)


class _StreamOptions(_Given):
    include_usage: bool | None = None


class _Request(_Given):
    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None


class _Completion(_Request):
    prompt: Any
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None


class _TextPart(_Given):
    type: Literal["text"]
    text: str


class _Message(_Given):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_TextPart]

    @property
    def text(self) -> str:
        """What is said in it."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class _Chat(_Request):
    messages: Annotated[list[_Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


Read = Callable[[bytes, Reader, int], Asked]
"""The body of a request, the model, and how many wishes there may be; raises Refused."""


def completion(body: bytes, reader: Reader, most: int) -> Asked:
    """A request to continue text."""
    given = _read(body, _Completion)
    which = _which(given.model, reader.name)
    prompts = _prompts(given.prompt)
    _few(len(prompts), given, most)
    tokens = given.max_tokens or COMPLETION_TOKENS
    ids = [_ids(p, reader, tokens) for p in prompts]
    return _asked(given, which, ids, tokens, given.logprobs)


def chat(body: bytes, reader: Reader, most: int) -> Asked:
    """A request to go on with a conversation."""
    given = _read(body, _Chat)
    which = _which(given.model, reader.name)
    if given.top_logprobs is not None and not given.logprobs:
        raise wrong("top_logprobs is told only where logprobs is true", "top_logprobs")
    _few(1, given, most)
    # The newer name of the same role, which templates do not know.
    messages = [("system" if m.role == "developer" else m.role, m.text) for m in given.messages]
    _short(sum(len(text) for _, text in messages), reader, "messages")
    ids = reader.conversation(messages)
    if not ids:
        raise wrong("there is nothing in the messages", "messages")
    room = max(1, min(reader.positions - len(ids), CHAT_TOKENS))
    tokens = given.max_completion_tokens or given.max_tokens or room
    _fitting(len(ids), tokens, reader, "messages")
    logprobs = (given.top_logprobs or 0) if given.logprobs else None
    return _asked(given, which, [tuple(ids)], tokens, logprobs)


def _few(prompts: int, given: _Request, most: int) -> None:
    if prompts * (given.n or 1) > most:
        raise wrong(f"more than {most} answers are asked for at once", "n")


def _short(characters: int, reader: Reader, param: str) -> None:
    """Refuse a text that is too long whatever its tokens are, before it is made into tokens."""
    if characters > reader.positions * reader.longest_token:
        raise _too_long(f"{characters} characters are more than the model can read", param)


def _fitting(prompt: int, tokens: int, reader: Reader, param: str) -> None:
    if prompt + tokens > reader.positions:
        what = f"a prompt of {prompt} tokens with an answer of up to {tokens}"
        raise _too_long(f"{what}: both together may have {reader.positions}", param)


def _too_long(message: str, param: str) -> Refused:
    return Refused(message, status=400, code="context_length_exceeded", param=param)


def _asked(
    given: _Request,
    which: str | int,
    prompts: Sequence[tuple[int, ...]],
    tokens: int,
    logprobs: int | None,
) -> Asked:
    stop = (given.stop,) if isinstance(given.stop, str) else tuple(given.stop or ())
    top_p = 1.0 if given.top_p is None else given.top_p
    wishes = [
        Wish(
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
    return Asked(
        given.model,
        isinstance(given, _Chat),
        tuple(wishes),
        sum(map(len, prompts)),
        bool(given.stream),
        usage,
    )


Request = TypeVar("Request", bound=_Request)


def _read(body: bytes, form: type[Request]) -> Request:
    try:
        said = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise wrong(f"the body is not JSON: {error}") from error
    if not isinstance(said, dict):
        raise wrong("the body must be a JSON object")
    for field, harmless in _HARMLESS.items():
        if said.get(field) is not None and said[field] not in harmless:
            raise Refused(
                f"{field} is not supported here", status=400, code="unsupported", param=field
            )
    try:
        return form.model_validate(said)
    except ValidationError as error:
        raise _explained(error) from error


def _explained(error: ValidationError) -> Refused:
    problem = error.errors(include_url=False, include_input=False)[0]
    # Behind the field stand places in lists, and names of ours for the forms that it may have.
    where = [str(step) for step in problem["loc"] if isinstance(step, int)]
    param = ".".join([str(problem["loc"][0]), *where])
    return wrong(f"{param}: {problem['msg']}", param)


def _which(asked: str, name: str) -> str | int:
    """What a model's name stands for."""
    if asked == name:
        return EDITED
    if asked == name + AT_BASE:
        return BASE
    number = asked.removeprefix(name + AT_GENERATION)
    if number != asked and number.isascii() and number.isdecimal() and len(number) <= 18:
        return int(number)
    raise Refused(
        f"there is no model {asked!r} here: see /v1/models",
        status=404,
        code="model_not_found",
        param="model",
    )


def _prompts(given: Any) -> list[Any]:
    """One text, or ids, for each prompt."""
    if isinstance(given, str):
        return [given]
    if isinstance(given, list) and given:
        if all(_is_id(n) for n in given):
            return [given]
        if all(isinstance(p, str) for p in given):
            return given
        if all(isinstance(p, list) and all(_is_id(n) for n in p) for p in given):
            return given
    raise wrong("prompt must be a text, ids of tokens, or a list of either", "prompt")


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _ids(prompt: str | list[int], reader: Reader, tokens: int) -> tuple[int, ...]:
    """A prompt's ids, where an answer of so many tokens has room behind them."""
    if isinstance(prompt, str):
        _short(len(prompt), reader, "prompt")
        prompt = reader.encode(prompt)
    if not prompt:
        raise wrong("there is nothing in the prompt", "prompt")
    _fitting(len(prompt), tokens, reader, "prompt")
    if not all(0 <= n < reader.vocabulary for n in prompt):
        raise wrong(f"ids of tokens go from 0 to {reader.vocabulary - 1}", "prompt")
    return tuple(prompt)
