"""Parsing of requests in OpenAI's form into generation requests."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kedit_daemon.serve.errors import RequestError, bad_request
from kedit_daemon.serve.inference.reader import Reader
from kedit_daemon.serve.inference.types import BASE, EDITED, GenerationRequest
from kedit_daemon.serve.openai.request_forms import (
    ChatBody,
    CompletionBody,
    RequestBody,
    validate_body,
)

COMPLETION_TOKENS = 16  # OpenAI's default
MAX_PICTURES = 16  # of a conversation
CHAT_TOKENS = 4096  # default at most
BASE_SUFFIX, GENERATION_SUFFIX = "@base", "@gen-"


@dataclass(frozen=True)
class ParsedRequest:
    """A valid request: one generation request per choice, those of a prompt together."""

    model: str
    is_chat: bool
    generation_requests: tuple[GenerationRequest, ...]
    prompt_tokens: int
    is_streaming: bool
    needs_usage: bool  # whether a stream ends with its token counts
    echoes: tuple[str, ...] = ()  # by choice, the prompts that the answers begin with


RequestParser = Callable[[bytes, Reader, int], ParsedRequest]
"""Takes a body, the model and the maximum number of choices; raises RequestError."""


def parse_completion(body: bytes, reader: Reader, max_choices: int) -> ParsedRequest:
    """Parse a request to continue text."""
    form = validate_body(body, CompletionBody)
    variant = _parse_model_name(form.model, reader.name)
    prompts = _split_prompts(form.prompt)
    _check_count(len(prompts), form, max_choices)
    tokens = COMPLETION_TOKENS if form.max_tokens is None else form.max_tokens
    if not tokens and not form.echo:
        raise bad_request("max_tokens: 0 is for a prompt with echo", "max_tokens")
    ids = [_encode_prompt(prompt, reader, tokens) for prompt in prompts]
    parsed = _build_request(form, variant, ids, tokens, form.logprobs)
    if not form.echo:
        return parsed
    texts = [
        prompt if isinstance(prompt, str) else "".join(map(reader.token_text, prompt))
        for prompt in prompts
    ]
    return replace(parsed, echoes=tuple(text for text in texts for _ in range(form.n or 1)))


def parse_chat(body: bytes, reader: Reader, max_choices: int) -> ParsedRequest:
    """Parse a request to continue a conversation."""
    form = validate_body(body, ChatBody)
    variant = _parse_model_name(form.model, reader.name)
    if form.top_logprobs is not None and not form.logprobs:
        raise bad_request("top_logprobs needs logprobs to be true", "top_logprobs")
    _check_count(1, form, max_choices)
    if sum(message.count_pictures() for message in form.messages) > MAX_PICTURES:
        raise bad_request(f"messages: more than {MAX_PICTURES} pictures", "messages")
    # The newer name of the same role, which templates do not know.
    messages = [
        (
            "system" if m.role == "developer" else m.role,
            m.write_text(f"messages.{n}", reader.show_picture),
        )
        for n, m in enumerate(form.messages)
    ]
    _check_characters(sum(len(text) for _, text in messages), reader, "messages")
    ids = reader.encode_messages(messages)
    if not ids:
        raise bad_request("there is nothing in the messages", "messages")
    default = max(1, min(reader.positions - len(ids), CHAT_TOKENS))
    tokens = form.max_completion_tokens or form.max_tokens or default
    _check_tokens(len(ids), tokens, reader, "messages")
    logprobs = (form.top_logprobs or 0) if form.logprobs else None
    return _build_request(form, variant, [tuple(ids)], tokens, logprobs)


def _check_count(prompts: int, form: RequestBody, max_choices: int) -> None:
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
    form: RequestBody,
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
            isinstance(form, CompletionBody) and bool(form.echo),
            isinstance(form, ChatBody),
        )
        for ids in prompts
        for choice in range(form.n or 1)
    ]
    return ParsedRequest(
        form.model,
        isinstance(form, ChatBody),
        tuple(requests),
        sum(map(len, prompts)),
        bool(form.stream),
        bool(form.stream_options and form.stream_options.include_usage),
    )


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


def _split_prompts(prompt: str | list[int] | list[str] | list[list[int]]) -> list[str | list[int]]:
    """Return a list of prompts, each a text or token ids."""
    if isinstance(prompt, str):
        return [prompt]
    texts = [one for one in prompt if not isinstance(one, int)]
    return texts or [[one for one in prompt if isinstance(one, int)]]


def _encode_prompt(prompt: str | list[int], reader: Reader, tokens: int) -> tuple[int, ...]:
    """Return a prompt's token ids; check that an answer of `tokens` fits after them."""
    if isinstance(prompt, str):
        _check_characters(len(prompt), reader, "prompt")
        prompt = reader.encode(prompt)
    elif not all(0 <= n < reader.vocabulary_size for n in prompt):
        raise bad_request(f"ids of tokens go from 0 to {reader.vocabulary_size - 1}", "prompt")
    if not prompt:
        raise bad_request("there is nothing in the prompt", "prompt")
    _check_tokens(len(prompt), tokens, reader, "prompt")
    return tuple(prompt)
