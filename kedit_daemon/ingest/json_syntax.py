"""Decodes one JSON value, and names the problem and the remedy where it cannot be decoded."""

import json
import re

NOT_UTF8 = re.compile("[\udc80-\udcff]")


class UnreadableText(ValueError):
    """A text that cannot be parsed, and the offset of the problem in it."""

    def __init__(self, problem: str, remedy: str, offset: int = 0) -> None:
        super().__init__(problem)
        self.problem = problem
        self.remedy = remedy
        self.offset = offset


class WrittenFloat(float):
    """A number with a fraction or an exponent, and its text: 3.50 is not 3.5 to a reader."""

    def __init__(self, text: str) -> None:
        self.text = text


def _refuse_constant(name: str) -> object:
    raise UnreadableText(f"{name} is not JSON", "put it in quotes, or write null for no value")


def _build_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise UnreadableText("a key occurs twice", "keep one of the two")
    return found


DECODER = json.JSONDecoder(
    parse_constant=_refuse_constant, parse_float=WrittenFloat, object_pairs_hook=_build_object
)


def decode_value(text: str) -> tuple[object, int]:
    """Decode the value at the beginning of a text, and return its length too."""
    try:
        value, end = DECODER.raw_decode(text)
    except json.JSONDecodeError as error:
        problem = f"broken JSON: {error.msg.lower()} (character {error.pos + 1} of the record)"
        raise UnreadableText(problem, "correct the syntax of the record", error.pos) from None
    except RecursionError:
        raise UnreadableText("nested too deeply", "a record needs few levels") from None
    except UnreadableText:
        raise
    except ValueError:
        raise UnreadableText("a number with thousands of digits", "write fewer digits") from None
    if NOT_UTF8.search(text, 0, end):
        raise UnreadableText("not valid UTF-8", "save the file as UTF-8")
    return value, end
