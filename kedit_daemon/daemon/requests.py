"""Answers to the requests that commands send to a running daemon; the editor does the work."""

import logging
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kedit_daemon.control import ControlRequest
from kedit_daemon.editing.editor import Editor
from kedit_daemon.editing.memory_backoff import guard_memory
from kedit_daemon.system.disk import describe_disk_error, is_database_locked, is_disk_failure
from memory.errors import BadRequest, KeditError, ends_daemon
from memory.picture_files import read_data_url

DEFAULT_MAX_TOKENS = 40
log = logging.getLogger(__name__)


class _ChatTurn(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str


class _RequestArguments(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    prompt: str | None = None
    messages: Annotated[list[_ChatTurn], Field(min_length=1)] | None = None
    pictures: list[str] = []  # as data URLs, that the prompt or the messages have the marks of
    max_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] = DEFAULT_MAX_TOKENS
    base: bool = False
    explain: bool = False
    dry_run: bool = False
    facts: list[str] = []
    generation: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None


def answer_request(
    request: ControlRequest, editor: Editor, refusal: KeditError | None, folder: Path
) -> None:
    """Carry the request out and send the answer, or send the reason why not.

    With a `refusal` all but questions are refused. Raises what is no fault of the request: the
    daemon stops, the disk of `folder` fails, or another process holds the database.
    """
    try:
        if refusal is not None and request.name != "ask":
            raise refusal
        with guard_memory(editor.live_model):
            request.send_answer(execute_command(editor, request.name, request.arguments))
    except KeditError as error:
        request.send_refusal(error)
        if ends_daemon(error):
            raise
    except Exception as error:  # a request must not end the daemon
        known = describe_disk_error(error, folder)
        if known is None:
            log.exception("%s failed", request.name)
            known = KeditError(f"{type(error).__name__}: {error}", code="unexpected")
        request.send_refusal(known)
        if is_disk_failure(error) or is_database_locked(error):
            raise


def execute_command(editor: Editor, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Run a command and return its answer. Raises KeditError when it is refused or invalid."""
    try:
        stated = {key: value for key, value in arguments.items() if value is not None}
        given = _RequestArguments.model_validate(stated)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, fault["loc"]))
        raise _bad_request_error(f"{name}: {where}: {fault['msg']}") from None
    if name == "ask":
        return _answer_question(editor, given)
    if name == "flush":
        return editor.run_flush(given.dry_run)
    if name == "audit":
        return editor.audit(given.dry_run)
    if name == "consolidate":
        return editor.consolidate(given.dry_run)
    if name == "dismiss":
        return editor.dismiss(given.facts, given.dry_run)
    if name == "revert":
        return editor.revert(given.facts, given.generation, given.dry_run)
    raise _bad_request_error(f"no command {name!r}")


def _answer_question(editor: Editor, given: _RequestArguments) -> dict[str, Any]:
    options = given.max_tokens, given.base, given.explain
    for url in given.pictures:
        editor.show_picture(read_data_url(url))
    if given.messages is None:
        if given.prompt is None:
            raise _bad_request_error("ask: prompt is missing")
        return editor.answer_prompt(given.prompt, *options)
    if given.prompt is not None:
        raise _bad_request_error("ask: prompt and messages are both given")
    if given.messages[-1].role != "user":
        raise _bad_request_error("ask: messages: the last one must be the user's")
    return editor.answer_chat([message.model_dump() for message in given.messages], *options)


def _bad_request_error(problem: str) -> KeditError:
    hint = "the command and the daemon may be of different versions: restart the daemon"
    return BadRequest(problem, hint=hint)
