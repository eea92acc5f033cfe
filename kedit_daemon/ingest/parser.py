"""A file's bytes turned into facts, and into problems for the records that state none.

Nothing here raises for what a file holds: each record stands or falls alone, and every fall says
on which line, why, and what to do about it.
"""

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from pydantic import ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from kedit_daemon.ingest.record_splitter import Raw, csv_rows, json_lines, json_list
from kedit_daemon.ingest.schemas import (
    ClozeRecord,
    FlatRecord,
    Limits,
    MquakeRecord,
    NativeRecord,
    NeighbourRecord,
    QuestionRecord,
    Record,
    RomeRecord,
    WikiBigEditRecord,
    ZsreRecord,
    shown,
)
from memory.errors import KeditError
from memory.facts import Fact

FORMATS = ("native", "csv", "counterfact", "zsre", "knowedit", "mquake", "wikibigedit", "qaedit")
FAULTS_SHOWN = 3
REQUIRED_COLUMNS = ("subject", "prompt", "target")
LISTS = ("paraphrases", "tags")
COLUMNS = (*REQUIRED_COLUMNS, *LISTS, "id", "source", "valid_from", "valid_until")
KINDS = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
}


@dataclass(frozen=True)
class Problem:
    """A record that states no fact: where it stands, what is wrong, what to do, its own text."""

    line: int
    problem: str
    remedy: str
    record: str


@dataclass(frozen=True)
class Parsed:
    """What a file holds, each fact with its line."""

    facts: list[tuple[int, Fact]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def parse(data: bytes, name: str, format: str | None, limits: Limits) -> Parsed:
    """The facts and the problems of a file; `format` overrides what the keys say."""
    if format is not None and format not in FORMATS:
        near = difflib.get_close_matches(format, FORMATS, 1)
        hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(FORMATS)}"
        raise KeditError(f"unknown format {shown(format)}", code="usage", hint=hint, exit_code=2)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return Parsed(problems=[Problem(1, "the file is UTF-16", "save it as UTF-8", "")])
    text = _text(data)
    if _is_table(text, name, format):
        return _table(text, limits)
    return _gather(text, _json(text, limits), format, limits)


def only_failed(head: bytes, name: str, problems: Iterable[Problem]) -> bytes:
    """The failed records alone, in their file's own form: ready to be mended and sent again.

    `head` is the beginning of that file: it shows the form, and holds a table's header.
    """
    text = _text(head)
    records = [problem.record for problem in problems if problem.record]
    if _is_table(text, name, None):
        records = [text.strip().partition("\n")[0].rstrip("\r"), *records]
    elif text.lstrip().startswith("["):
        return ("[\n" + ",\n".join(records) + "\n]\n").encode("utf-8", "surrogateescape")
    return "".join(f"{record}\n" for record in records).encode("utf-8", "surrogateescape")


def _text(data: bytes) -> str:
    # Bytes that are no UTF-8 become lone surrogates: only the record they stand in is lost.
    return data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")


def _is_table(text: str, name: str, format: str | None) -> bool:
    if format is not None:
        return format == "csv"
    start = text.lstrip()[:1_000].partition("\n")[0]
    heading = [cell.strip(' "\r').lower() for cell in start.split(",")]
    named = name.lower().endswith(".csv") or {"subject", "target"} <= set(heading)
    return named and not start.startswith(("{", "["))


def _json(text: str, limits: Limits) -> Iterator[Raw]:
    first = text.lstrip().partition("\n")[0].rstrip()
    opens_more = first.startswith("{") and not first.endswith("}")
    if first.startswith("[") or opens_more:
        return json_list(text, limits.max_line_chars)
    return json_lines(text, limits.max_line_chars)


def _gather(text: str, raws: Iterable[Raw], format: str | None, limits: Limits) -> Parsed:
    parsed = Parsed()
    for raw in raws:
        outcome = _outcome(raw, format, limits)
        size = 1 if isinstance(outcome, Problem) else len(outcome)
        if len(parsed.facts) + len(parsed.problems) + size > limits.max_facts:
            parsed.problems.append(_surplus(text, raw, limits))
            break
        if isinstance(outcome, Problem):
            parsed.problems.append(outcome)
            continue
        parsed.facts.extend((raw.line, fact) for fact in outcome)
    if not parsed.facts and not parsed.problems:
        parsed.problems.append(Problem(1, "the file holds no record", "write one a line", ""))
    return parsed


def _surplus(text: str, raw: Raw, limits: Limits) -> Problem:
    """All that stands behind the limit, as one problem that keeps its text."""
    rest = text[raw.start :].rstrip()
    if text.lstrip().startswith("["):
        rest = rest.removesuffix("]").rstrip(" \t\r\n,")
    problem = f"more than {limits.max_facts} facts in one file: read up to here"
    return Problem(raw.line, problem, "hand the rest in as a file of its own", rest)


def _outcome(raw: Raw, format: str | None, limits: Limits) -> list[Fact] | Problem:
    if raw.problem:
        return Problem(raw.line, raw.problem, raw.remedy, raw.text)
    if not isinstance(raw.value, dict):
        remedy = 'write {"subject": …, "prompt": …, "target": …}'
        return Problem(raw.line, "a record has to be an object", remedy, raw.text)
    form = _recognised(raw.value) if format is None else _chosen(raw.value, format)
    try:
        stated = form.model_validate(raw.value).facts()
    except ValidationError as error:
        return Problem(raw.line, *_explained(error), raw.text)
    except PydanticCustomError as error:
        context = error.context or {}
        return Problem(raw.line, error.message(), str(context.get("remedy", "")), raw.text)
    longest = max(len(fact.target) for fact in stated)
    if longest > limits.max_target_chars:
        problem = f"the target has {longest} characters, more than {limits.max_target_chars}"
        return Problem(raw.line, problem, "state the fact in fewer words", raw.text)
    return stated


def _recognised(record: dict[str, object]) -> type[Record]:
    """The form whose keys the record has; our own where it has nobody's."""
    keys = record.keys()
    form: type[Record] = NativeRecord
    if "requested_rewrite" in keys:
        form = MquakeRecord if isinstance(record["requested_rewrite"], list) else RomeRecord
    elif keys >= {"src", "alt"}:
        form = ZsreRecord
    elif keys >= {"update", "ans"}:
        form = WikiBigEditRecord
    elif "target_new" in keys or "neighborhood_prompts" in keys:
        knowedit = "portability" in keys or isinstance(record.get("locality"), dict)
        counterfact = keys & {"ground_truth", "target_true", "neighborhood_prompts"}
        form = ClozeRecord if counterfact and not knowedit else FlatRecord
    elif "target" in keys and keys & {"rephrase", "locality"}:
        form = QuestionRecord
    return form


def _chosen(record: dict[str, object], format: str) -> type[Record]:
    forms: dict[str, type[Record]] = {
        "counterfact": RomeRecord if "requested_rewrite" in record else ClozeRecord,
        "zsre": ZsreRecord,
        "knowedit": FlatRecord,
        "mquake": MquakeRecord,
        "wikibigedit": WikiBigEditRecord if "update" in record else FlatRecord,
        "qaedit": QuestionRecord,
    }
    return forms.get(format, NativeRecord)


def _explained(error: ValidationError) -> tuple[str, str]:
    """The first few faults in one sentence each, and their remedies."""
    pairs = [_explain(fault) for fault in error.errors(include_url=False)[:FAULTS_SHOWN]]
    problems, remedies = zip(*pairs, strict=True)
    # One remedy may serve several faults.
    return "; ".join(problems), "; ".join(dict.fromkeys(remedies))


def _explain(fault: ErrorDetails) -> tuple[str, str]:
    where = shown(".".join(str(step) for step in fault["loc"])) if fault["loc"] else "the record"
    kind = KINDS.get(type(fault["input"]), "null" if fault["input"] is None else "a text")
    match fault["type"]:
        case "missing":
            return f"{where} is missing", f"add {where}"
        case "extra_forbidden":
            return f"unknown key {where}", _meant(str(fault["loc"][-1]), len(fault["loc"]) > 1)
        case "string_too_short" | "too_short":
            return f"{where} is empty", "fill it in, or leave the record out"
        case "string_unicode":
            return f"{where} holds half a surrogate pair", "take that character out"
        case "string_type":
            return f"{where} has to be a text, not {kind}", "put the value in quotes"
        case "list_type":
            return f"{where} has to be a list, not {kind}", "put the value in [ ]"
        case "model_type" | "dict_type":
            return f"{where} has to be an object, not {kind}", "put the value in { }"
    context = fault.get("ctx", {})
    problem = str(context.get("problem", fault["msg"]))
    return f"{where}: {problem}" if fault["loc"] else problem, str(context.get("remedy", ""))


def _meant(key: str, nested: bool) -> str:
    known = list((NeighbourRecord if nested else NativeRecord).model_fields)
    near = difflib.get_close_matches(key, known, 1)
    return f'did you mean "{near[0]}"?' if near else f"the keys are {', '.join(known)}"


def _table(text: str, limits: Limits) -> Parsed:
    rows = csv_rows(text, limits.max_line_chars)
    head = next(rows, None)
    if head is None or not isinstance(head.value, list):
        problem = head.problem if head else "the file holds no record"
        return Parsed(problems=[Problem(1, problem, "begin with a line of column names", "")])
    columns = [str(cell).strip().lower() for cell in head.value]
    if fault := _heading_fault(columns):
        return Parsed(problems=[Problem(head.line, *fault, "")])
    return _gather(text, (_row(raw, columns) for raw in rows), "native", limits)


def _heading_fault(columns: list[str]) -> tuple[str, str] | None:
    for column in columns:
        if column not in COLUMNS:
            near = difflib.get_close_matches(column, COLUMNS, 1)
            hint = f'did you mean "{near[0]}"?' if near else f"columns: {', '.join(COLUMNS)}"
            return f"unknown column {shown(column)}", hint
        if columns.count(column) > 1:
            return f"column {shown(column)} stands there twice", "keep one of the two"
    missing = [column for column in REQUIRED_COLUMNS if column not in columns]
    return (f"no column {shown(missing[0])}", "add it to the first line") if missing else None


def _row(raw: Raw, columns: list[str]) -> Raw:
    if not isinstance(raw.value, list):
        return raw
    if len(raw.value) != len(columns):
        problem = f"{len(raw.value)} values under {len(columns)} columns"
        return replace(raw, problem=problem, remedy="quote each value that holds a comma")
    filled = {
        column: [part for part in cell.split("|") if part.strip()] if column in LISTS else cell
        for column, cell in zip(columns, raw.value, strict=True)
        if cell.strip() or column in REQUIRED_COLUMNS
    }
    return replace(raw, value=filled)
