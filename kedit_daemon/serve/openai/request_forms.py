"""The bodies of requests in OpenAI's form, and what is said about wrong ones."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError
from pydantic_core import ErrorDetails, from_json

from kedit_daemon.serve.errors import RequestError, bad_request

MAX_SHOWN_CHARS = 40  # of a value that is named in an error
# Unsupported fields that would change the answer, with the values that change nothing.
HARMLESS_VALUES: Mapping[str, tuple[Any, ...]] = {
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
# Fields of a message that would have to be read for its answer.
_MESSAGE_FIELDS = {
    "tool_calls": "tool calls",
    "function_call": "calls of functions",
    "audio": "spoken answers",
}
# Tags of the branches of unions. No field's name begins so: they are left out of a field's path.
_TAG = "="
_TEXT, _LIST, _IDS, _TEXTS, _ID_LISTS, _IMAGE = (
    f"{_TAG}{name}" for name in ("text", "list", "ids", "texts", "id lists", "image")
)


def _find_text_or_list(value: Any) -> str | None:
    """Return the branch of a text, or of a list."""
    return _TEXT if isinstance(value, str) else _LIST if isinstance(value, list) else None


def _find_prompt_form(value: Any) -> str | None:
    """Return the branch of a prompt: in a list, the first item tells what is meant."""
    if not isinstance(value, list) or not value:
        return _TEXT if isinstance(value, str) else None
    first = value[0]
    return _TEXTS if isinstance(first, str) else _ID_LISTS if isinstance(first, list) else _IDS


def _find_part_form(value: Any) -> str:
    """Return the branch of a part of a message."""
    is_image = isinstance(value, dict) and value.get("type") == "image_url"
    return _IMAGE if is_image else _TEXT


def _choose_by(find_branch: Callable[[Any], str | None], forms: str) -> Discriminator:
    """Return the choice of a union's branch, so that an error is about the one that was meant."""
    return Discriminator(
        find_branch,
        custom_error_type="union_form",
        custom_error_message=f"Input should be {forms}",
    )


class _StrictModel(BaseModel):
    # Unknown fields are ignored, as by OpenAI's servers; no text becomes a number.
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)


class _StreamOptions(_StrictModel):
    include_usage: bool | None = None


_Stop = Annotated[
    Annotated[str, Tag(_TEXT)] | Annotated[list[str], Field(max_length=4), Tag(_LIST)],
    _choose_by(_find_text_or_list, "a text or a list of texts"),
]


class RequestBody(_StrictModel):
    """The fields that both kinds of requests have."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    stop: _Stop | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None


_TokenIds = Annotated[list[int], Field(fail_fast=True)]
_Prompt = Annotated[
    Annotated[str, Tag(_TEXT)]
    | Annotated[_TokenIds, Tag(_IDS)]
    | Annotated[list[str], Field(fail_fast=True), Tag(_TEXTS)]
    | Annotated[list[_TokenIds], Field(fail_fast=True), Tag(_ID_LISTS)],
    _choose_by(_find_prompt_form, "a text, token ids, or a list of either"),
]


class CompletionBody(RequestBody):
    """A text to continue."""

    prompt: _Prompt
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None


class _TextPart(_StrictModel):
    type: Literal["text"]
    text: str


class _ImageUrl(_StrictModel):
    url: str


class _ImagePart(_StrictModel):
    type: Literal["image_url"]
    image_url: _ImageUrl


_Part = Annotated[
    Annotated[_TextPart, Tag(_TEXT)] | Annotated[_ImagePart, Tag(_IMAGE)],
    Discriminator(_find_part_form),
]
_Content = Annotated[
    Annotated[str, Tag(_TEXT)] | Annotated[list[_Part], Tag(_LIST)],
    _choose_by(_find_text_or_list, "a text or a list of parts"),
]


class _Message(_StrictModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: _Content | None = None  # of an assistant's turn

    def write_text(self, place: str, show_picture: Callable[[str, str], str]) -> str:
        """Write the text of all its parts. place: of the message in the request. show_picture:
        takes a picture's URL and its place, and returns its mark."""
        if isinstance(self.content, str):
            return self.content
        return "".join(
            part.text
            if isinstance(part, _TextPart)
            else f"{show_picture(part.image_url.url, f'{place}.content.{n}')} "
            for n, part in enumerate(self.content or ())
        )

    def count_pictures(self) -> int:
        """Count the parts that are pictures."""
        parts = self.content if isinstance(self.content, list) else ()
        return sum(isinstance(part, _ImagePart) for part in parts)


class ChatBody(RequestBody):
    """A conversation to continue."""

    messages: Annotated[list[_Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


Body = TypeVar("Body", bound=RequestBody)


def validate_body(body: bytes, form: type[Body]) -> Body:
    """Read the body of a request. Raises RequestError, which names the field and the cause."""
    try:
        fields = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise bad_request(f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise bad_request("the body must be a JSON object")
    for field, harmless in HARMLESS_VALUES.items():
        if fields.get(field) is not None and fields[field] not in harmless:
            raise _unsupported(field, f"{field} is not supported here")
    if form is ChatBody and isinstance(fields.get("messages"), list):
        for n, message in enumerate(fields["messages"]):
            if isinstance(message, dict):
                _check_message(f"messages.{n}", message)
    try:
        return form.model_validate(fields)
    except ValidationError as error:
        raise _describe_invalid(error.errors(include_url=False, include_input=False)[0]) from error


def _check_message(place: str, message: Mapping[str, Any]) -> None:
    """Refuse what of a message would be left out of the conversation."""
    role, content = message.get("role"), message.get("content")
    if role in ("tool", "function"):
        raise _unsupported(f"{place}.role", "tool calls are not supported here, nor their results")
    for field, name in _MESSAGE_FIELDS.items():
        if message.get(field):
            raise _unsupported(f"{place}.{field}", f"{name} are not supported here")
    if content is None and role != "assistant":
        problem = "a text or a list of parts is missing; only an assistant's turn may have none"
        raise bad_request(f"{place}.content: {problem}", f"{place}.content")
    for n, part in enumerate(content if isinstance(content, list) else ()):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and kind not in ("text", "image_url"):
            problem = f"parts of type {kind[:MAX_SHOWN_CHARS]!r} are not supported here"
            where = f"{place}.content.{n}.type"
            raise _unsupported(where, f"{problem}: only text, and image_url")


def _unsupported(param: str, problem: str) -> RequestError:
    message = f"{param}: {problem}" if "." in param else problem
    return RequestError(message, status=400, code="unsupported", param=param)


def _describe_invalid(problem: ErrorDetails) -> RequestError:
    param = ".".join(str(step) for step in problem["loc"] if not str(step).startswith(_TAG))
    # The name of a class of ours says nothing outside.
    cause = "Input should be an object" if problem["type"] == "model_type" else problem["msg"]
    return bad_request(f"{param}: {cause}", param)
