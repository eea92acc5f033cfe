"""What the commands ask of a running daemon: the arguments checked, then done by the editor."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kedit_daemon.editor import Editor
from memory.errors import KeditError

ANSWER_TOKENS = 40


class _Arguments(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    prompt: str | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=1 << 31)] = ANSWER_TOKENS
    base: bool = False
    explain: bool = False
    dry_run: bool = False
    facts: list[str] = []
    generation: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None


def carry_out(editor: Editor, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Do it; a KeditError where it is refused, or cannot be understood."""
    try:
        given = _Arguments.model_validate({k: v for k, v in arguments.items() if v is not None})
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, fault["loc"]))
        raise _wrong(f"{name}: {where}: {fault['msg']}") from None
    if name == "ask":
        if given.prompt is None:
            raise _wrong("ask: prompt is missing")
        return editor.ask(given.prompt, given.max_tokens, given.base, given.explain)
    if name == "flush":
        return editor.run_flush(given.dry_run)
    if name == "audit":
        return editor.audit(given.dry_run)
    if name == "consolidate":
        return editor.consolidate(given.dry_run)
    if name == "revert":
        return editor.revert(given.facts, given.generation, given.dry_run)
    raise _wrong(f"no command {name!r}")


def _wrong(what: str) -> KeditError:
    hint = "the command and the daemon may be of two versions: restart the daemon"
    return KeditError(what, code="bad-request", hint=hint)
