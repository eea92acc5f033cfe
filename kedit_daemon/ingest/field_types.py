"""The types of a record's fields: texts, times and answers, normalised and checked."""

import re
from datetime import UTC, date, datetime
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, StringConstraints
from pydantic_core import PydanticCustomError

from kedit_daemon.ingest.json_syntax import WrittenFloat
from memory.blanks import settle_blanks
from memory.joins import JOIN_WORDS
from memory.timestamps import format_utc

INVALID_CHARS = re.compile("[\0\ud800-\udfff]")
TIME_REMEDY = "write the time in ISO-8601, such as 2026-01-31T12:00:00Z"


def quote_value(value: object) -> str:
    """Quote a foreign value in a message: short, on one line, and always valid UTF-8."""
    text = value if isinstance(value, str) else repr(value)
    text = text if len(text) <= 60 else text[:59] + "…"
    kept = "".join(c if c.isprintable() else c.encode("unicode-escape").decode() for c in text)
    return f'"{kept}"'


def make_fault(problem: str, remedy: str) -> PydanticCustomError:
    """Return a fault of a field, with its remedy."""
    # The text travels in the context because pydantic fills braces in the template.
    return PydanticCustomError("fault", "{problem}", {"problem": problem, "remedy": remedy})


def check_characters(text: str) -> str:
    if found := INVALID_CHARS.search(text):
        what = "a NUL character" if found[0] == "\0" else "half a surrogate pair"
        raise make_fault(f"a value holds {what}", "take that character out")
    return text


def _normalize_time(text: str) -> str:
    """Spell every time in one way, so that they sort as text; without a zone it is UTC."""
    try:
        time = datetime.fromisoformat(text)
        time = time.replace(tzinfo=time.tzinfo or UTC).astimezone(UTC)
    except (ValueError, OverflowError):
        raise make_fault(f"{quote_value(text)} is not a time", TIME_REMEDY) from None
    return format_utc(time, "seconds")


def _read_join(text: str) -> str:
    """Read what stands before a target: "" or " ", or the words that a table has for them."""
    join = JOIN_WORDS.get(text.strip(), text)
    if join not in JOIN_WORDS.values():
        remedy = 'write "" or " ", in a table no-space or space, or leave it out'
        raise make_fault(f"{quote_value(text)} is no join", remedy)
    return join


def _extend_bare_date(text: str) -> str:
    """Let a date without a time mean the end of that day."""
    try:
        return f"{date.fromisoformat(text).isoformat()}T23:59:59Z"
    except ValueError:
        return text


Text = Annotated[
    str, StringConstraints(strip_whitespace=True, min_length=1), AfterValidator(check_characters)
]
Line = Annotated[Text, AfterValidator(settle_blanks)]
"""A text that is matched with what people ask, with its white space in order."""
Join = Annotated[str, AfterValidator(_read_join)]
Timestamp = Annotated[Text, AfterValidator(_normalize_time)]
Deadline = Annotated[Text, AfterValidator(_extend_bare_date), AfterValidator(_normalize_time)]


def _write_answer(value: object) -> object:
    """Write a number or a truth value as JSON has it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, WrittenFloat):
        return value.text
    return str(value) if isinstance(value, int) else value


def _list_answers(value: object) -> tuple[object, ...]:
    """List the answers of a field that holds one or several; ROME has an object about one."""
    if isinstance(value, dict) and "str" in value:
        value = value["str"]
    return tuple(value or [""]) if isinstance(value, list) else (value,)


def _drop_repeated(texts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(texts))


Answers = Annotated[
    tuple[Annotated[Text, BeforeValidator(_write_answer)], ...],
    BeforeValidator(_list_answers),
    AfterValidator(_drop_repeated),
]
"""One right answer or several, of which the first is learned."""


def collect_texts(value: object, depth: int = 3) -> list[str]:
    """Collect the texts of a field that holds a text, a list, nested lists, or nothing.

    ROME's files have objects with a name and a Wikidata id in the place of texts.
    """
    if isinstance(value, dict):
        value = value.get("str")
    if isinstance(value, str):
        return [check_characters(value.strip())] if value.strip() else []
    if isinstance(value, list) and depth:
        return [text for item in value for text in collect_texts(item, depth - 1)]
    return []


def find_first_text(value: object) -> str | None:
    """Return the first text of such a field."""
    return next(iter(collect_texts(value)), None)
