"""Parses a file's bytes into facts, and into problems for the records that state none.

Nothing here raises for the content of a file: each record is read for itself, and each problem has
its line, its reason and its remedy.
"""

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from kedit_daemon.ingest.fault_texts import explain_faults
from kedit_daemon.ingest.field_types import quote_value
from kedit_daemon.ingest.file_text import decode_text
from kedit_daemon.ingest.json_syntax import UnreadableText
from kedit_daemon.ingest.record_splitter import (
    RawRecord,
    split_json_lines,
    split_json_list,
)
from kedit_daemon.ingest.schemas import (
    ClozeRecord,
    FileLimits,
    FlatRecord,
    MquakeRecord,
    NativeRecord,
    QuestionRecord,
    Record,
    RomeRecord,
    WikiBigEditRecord,
    ZsreRecord,
)
from kedit_daemon.ingest.table_rows import extract_heading, is_table, split_table
from memory.errors import KeditError
from memory.facts import Fact

FORMATS = ("native", "csv", "counterfact", "zsre", "knowedit", "mquake", "wikibigedit", "qaedit")


@dataclass(frozen=True)
class RecordProblem:
    """A record that states no fact: its line, the problem, the remedy, its own text."""

    line: int
    problem: str
    remedy: str
    record: str


@dataclass(frozen=True)
class ParsedFile:
    """The facts of a file, each with its line, and the problems."""

    facts: list[tuple[int, Fact]] = field(default_factory=list)
    problems: list[RecordProblem] = field(default_factory=list)


def parse_file(data: bytes, name: str, format: str | None, limits: FileLimits) -> ParsedFile:
    """Parse a file; its name and its keys tell the format unless `format` does."""
    if format is not None and format not in FORMATS:
        near = difflib.get_close_matches(format, FORMATS, 1)
        hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(FORMATS)}"
        raise KeditError(f"unknown format {quote_value(format)}", code="usage", hint=hint)
    try:
        text = decode_text(data)
    except UnreadableText as error:
        return ParsedFile(problems=[RecordProblem(1, error.problem, error.remedy, "")])
    if format == "csv" or (format is None and is_table(text, name)):
        rows = split_table(text, limits.max_line_chars)
        return _collect_records(text, rows, "native", limits)
    return _collect_records(text, _split_json(text, limits), format, limits)


def extract_failed(head: bytes, name: str, problems: Iterable[RecordProblem]) -> bytes:
    """Return the failed records alone, in their file's own form, to be mended and sent again.

    `head` is the beginning of that file: it shows the form, and holds a table's header.
    """
    try:
        text = decode_text(head)
    except UnreadableText:
        return head
    records = [problem.record for problem in problems if problem.record]
    if is_table(text, name):
        records = [extract_heading(text), *records]
    elif text.lstrip().startswith("["):
        return ("[\n" + ",\n".join(records) + "\n]\n").encode("utf-8", "surrogateescape")
    return "".join(f"{record}\n" for record in records).encode("utf-8", "surrogateescape")


def _split_json(text: str, limits: FileLimits) -> Iterator[RawRecord]:
    first = text.lstrip().partition("\n")[0].rstrip()
    opens_more = first.startswith("{") and not first.endswith("}")
    if first.startswith("[") or opens_more:
        return split_json_list(text, limits.max_line_chars)
    return split_json_lines(text, limits.max_line_chars)


def _collect_records(
    text: str, raws: Iterable[RawRecord], format: str | None, limits: FileLimits
) -> ParsedFile:
    parsed = ParsedFile()
    for raw in raws:
        outcome = read_record(raw, format, limits)
        size = 1 if isinstance(outcome, RecordProblem) else len(outcome)
        if len(parsed.facts) + len(parsed.problems) + size > limits.max_facts:
            parsed.problems.append(_describe_surplus(text, raw, limits))
            break
        if isinstance(outcome, RecordProblem):
            parsed.problems.append(outcome)
            continue
        parsed.facts.extend((raw.line, fact) for fact in outcome)
    if not parsed.facts and not parsed.problems:
        parsed.problems.append(RecordProblem(1, "the file holds no record", "write one a line", ""))
    return parsed


def _describe_surplus(text: str, raw: RawRecord, limits: FileLimits) -> RecordProblem:
    """Describe all that is behind the limit, as one problem that keeps its text."""
    rest = text[raw.start :].rstrip()
    if text.lstrip().startswith("["):
        rest = rest.removesuffix("]").rstrip(" \t\r\n,")
    problem = f"more than {limits.max_facts} facts in one file: read up to here"
    return RecordProblem(raw.line, problem, "submit the rest as a file of its own", rest)


def read_record(
    raw: RawRecord, format: str | None, limits: FileLimits
) -> list[Fact] | RecordProblem:
    """Read the facts of one record, or its problem."""
    if raw.problem:
        return RecordProblem(raw.line, raw.problem, raw.remedy, raw.text)
    if not isinstance(raw.value, dict):
        remedy = 'write {"subject": …, "prompt": …, "target": …}'
        return RecordProblem(raw.line, "a record must be an object", remedy, raw.text)
    form = _recognise_form(raw.value) if format is None else _choose_form(raw.value, format)
    try:
        facts = form.model_validate(raw.value).to_facts()
    except ValidationError as error:
        return RecordProblem(raw.line, *explain_faults(error, raw.value), raw.text)
    except PydanticCustomError as error:
        context = error.context or {}
        return RecordProblem(raw.line, error.message(), str(context.get("remedy", "")), raw.text)
    longest = max(len(target) for fact in facts for target in fact.targets)
    if longest > limits.max_target_chars:
        problem = f"the target has {longest} characters, more than {limits.max_target_chars}"
        return RecordProblem(raw.line, problem, "state the fact in fewer words", raw.text)
    return facts


def _recognise_form(record: dict[str, object]) -> type[Record]:
    """Recognise the data set by the keys of a record; our own form by default."""
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


def _choose_form(record: dict[str, object], format: str) -> type[Record]:
    forms: dict[str, type[Record]] = {
        "counterfact": RomeRecord if "requested_rewrite" in record else ClozeRecord,
        "zsre": ZsreRecord,
        "knowedit": FlatRecord,
        "mquake": MquakeRecord,
        "wikibigedit": WikiBigEditRecord if "update" in record else FlatRecord,
        "qaedit": QuestionRecord,
    }
    return forms.get(format, NativeRecord)
