"""Decodes one JSON value, and names the problem and the remedy where it cannot be decoded."""

import json
import re

# JSON has no comments and no comma before a closing bracket, but many tools write them.
COMMENTS = r"//[^\n]*+|#[^\n]*+|/\*(?:[^*]|\*(?!/)){0,8192}+\*/"
STRING = r'"(?:[^"\\\n]|\\.)*+"?'
COMMENTS_AND_SPACE = re.compile(rf"(?:[\s,]++|{COMMENTS})*+")
COMMENT = re.compile(f"{STRING}|({COMMENTS})")
LAST_COMMA = re.compile(rf"{STRING}|(,(?=\s*+[\]}}]))")
RELAXED_CHARS = 8_192  # of a record with such things
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
        value, end = _decode_relaxed(text)
    except json.JSONDecodeError as error:
        problem = f"broken JSON: {error.msg.lower()} (character {error.pos + 1} of the record)"
        raise UnreadableText(problem, _suggest_syntax(error), error.pos) from None
    except RecursionError:
        raise UnreadableText("nested too deeply", "a record needs few levels") from None
    except UnreadableText:
        raise
    except ValueError:
        raise UnreadableText("a number with thousands of digits", "write fewer digits") from None
    if NOT_UTF8.search(text, 0, end):
        raise UnreadableText("not valid UTF-8", "save the file as UTF-8")
    return value, end


def skip_gap(text: str, position: int) -> int:
    """Return the offset behind white space, commas and comments."""
    match = COMMENTS_AND_SPACE.match(text, position)
    return match.end() if match else position


def blank_comments(text: str) -> str:
    """Replace comments, and commas before a closing bracket, by as many blanks."""
    return LAST_COMMA.sub(_blank_out, COMMENT.sub(_blank_out, text))


def _blank_out(match: re.Match[str]) -> str:
    return match[0] if match[1] is None else re.sub(r"[^\n]", " ", match[0])


def _decode_relaxed(text: str) -> tuple[object, int]:
    try:
        return DECODER.raw_decode(text)
    except json.JSONDecodeError:
        piece = text[:RELAXED_CHARS]
        relaxed = blank_comments(piece)
        if relaxed == piece:
            raise
        try:
            return DECODER.raw_decode(relaxed)
        except json.JSONDecodeError:
            pass
        raise


def _suggest_syntax(error: json.JSONDecodeError) -> str:
    """Suggest what to write at the place where a text stops being JSON."""
    rest = error.doc[error.pos : error.pos + 10].lstrip()
    before = error.doc[: error.pos].rstrip()[-1:]
    if rest[:1] == "'":
        return "put names and texts in double quotes"
    if rest[:1] in ("“", "”", "„"):
        return "write straight quotes in the place of typographic ones"
    if re.match(r"(None|True|False|undefined)\b", rest):
        return "write null, true or false"
    if "control character" in error.msg:
        return r"write a line break inside a text as \n, a tab as \t"
    if "escape" in error.msg:
        return r"double each backslash that is meant: \\"
    if rest[:1] in ("}", "]") and before == ",":
        return "take out the comma before the closing bracket"
    if "property name" in error.msg or rest[:1].isalpha():
        return "put names and texts in double quotes"
    if not rest or "Unterminated" in error.msg:
        return "close every quote and every bracket"
    return "correct the syntax of the record"
