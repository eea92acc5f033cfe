"""Reads a cell of a table that holds several texts: `a|b`, or a list of JSON or Python."""

import re

from kedit_daemon.ingest.json_syntax import UnreadableText

LIST_REMEDY = 'write several values as a|b, or as ["a", "b"]'
# NumPy writes no commas, so a gap is enough between two texts.
LIST_ITEM = re.compile(r"""\s*+(?:'((?:[^'\\]|\\.)*+)'|"((?:[^"\\]|\\.)*+)")\s*+,?""", re.DOTALL)
BRACKETS = {"[": "]", "(": ")", "{": "}"}
ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)
ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"} | {c: c for c in "\\'\"/\n"}
SURROGATE_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")


def split_cell(cell: str) -> list[str]:
    """Split a cell into its texts. Raises UnreadableText for a list that cannot be read."""
    text = cell.strip()
    if (items := read_list(text)) is not None:
        return items
    if text.startswith("[") and (text.endswith("]") or text[1:].lstrip()[:1] in ("'", '"')):
        raise UnreadableText("a list that is neither JSON's nor Python's", LIST_REMEDY)
    return [part for part in cell.split("|") if part.strip()]


def read_list(text: str) -> list[str] | None:
    """Read a whole list of quoted texts, in any brackets; None if the text is none."""
    closing = BRACKETS.get(text[:1])
    if closing is None or len(text) < 2 or text[-1] != closing:
        return None
    items, position, end = list[str](), 1, len(text) - 1
    while match := LIST_ITEM.match(text, position, end):
        single, double = match.groups()
        item = _unescape(double if single is None else single)
        if item is None:
            return None
        items.append(item)
        position = match.end()
    empty = closing == "]" or items  # as a text, () and {} may be what they look like
    return items if empty and not text[position:end].strip() else None


def _unescape(text: str) -> str | None:
    """Replace the escapes that JSON and Python share; None if there is another one."""
    known = True

    def replace(match: re.Match[str]) -> str:
        nonlocal known
        code = match[1] or match[2] or match[3]
        known &= int(code, 16) <= 0x10FFFF if code else match[4] in ESCAPED
        if not known:
            return ""
        return chr(int(code, 16)) if code else ESCAPED[match[4]]

    found = ESCAPE.sub(replace, text)
    return SURROGATE_PAIR.sub(_join_pair, found) if known else None


def _join_pair(pair: re.Match[str]) -> str:
    return pair[0].encode("utf-16-le", "surrogatepass").decode("utf-16-le")
