"""Parses a file's bytes into facts, and into problems for the records that state none.

Nothing here raises for the content of a file: each record is read for itself, and each problem has
its line, its reason and its remedy.
"""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from kedit_daemon.ingest.fault_texts import explain_faults
from kedit_daemon.ingest.field_types import quote_value
from kedit_daemon.ingest.file_text import decode_text
from kedit_daemon.ingest.json_syntax import UnreadableText, blank_comments, skip_gap
from kedit_daemon.ingest.packed_files import ZIP, find_packing, pack_files, unpack_files
from kedit_daemon.ingest.parquet_rows import PARQUET_MARK, read_parquet
from kedit_daemon.ingest.record_pictures import ReadPicture, RecordPictures, state_picture
from kedit_daemon.ingest.record_splitter import (
    RawRecord,
    split_json_lines,
    split_json_list,
)
from kedit_daemon.ingest.schemas import (
    MAX_FILE_BYTES,
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
from kedit_daemon.ingest.wrapped_records import is_wrapped, split_wrapped, unwrap_row
from memory.errors import KeditError
from memory.facts import Fact

FORMATS = ("native", "csv", "counterfact", "zsre", "knowedit", "mquake", "wikibigedit", "qaedit")


RECORD_REMEDY = 'write {"subject": …, "prompt": …, "target": …}, or a list of such objects'
KNOWN_KEYS = {
    "subject",
    "image",
    "prompt",
    "target",
    "requested_rewrite",
    "target_new",
    "src",
    "update",
}


@dataclass(frozen=True)
class RecordProblem:
    """A record that states no fact: its line, the problem, the remedy, its own text.

    member: the file in an archive that holds it.
    """

    line: int
    problem: str
    remedy: str
    record: str
    member: str = ""

    def as_dict(self, max_chars: int) -> dict[str, object]:
        """Return the problem as a report has it, with so much of the record."""
        record = self.record[:max_chars]
        return {
            "line": self.line,
            "problem": self.problem,
            "remedy": self.remedy,
            "record": record,
        }


@dataclass(frozen=True)
class ParsedFile:
    """The facts of a file, each with its line, the problems, and the pictures by their digests."""

    facts: list[tuple[int, Fact]] = field(default_factory=list)
    problems: list[RecordProblem] = field(default_factory=list)
    pictures: dict[str, bytes] = field(default_factory=dict, repr=False)


def parse_file(
    data: bytes,
    name: str,
    format: str | None,
    limits: FileLimits,
    read_picture: ReadPicture | None = None,
) -> ParsedFile:
    """Parse a file, packed or not; its name and its keys tell the format unless `format` does.
    read_picture: reads a picture that a record names; None where there is no place for them."""
    if format is not None and format not in FORMATS:
        near = difflib.get_close_matches(format, FORMATS, 1)
        hint = f"did you mean {near[0]}?" if near else f"one of {', '.join(FORMATS)}"
        raise KeditError(f"unknown format {quote_value(format)}", code="usage", hint=hint)
    pictures = RecordPictures(read_picture)
    parsed = ParsedFile(pictures=pictures.found)
    is_archive = find_packing(data) == ZIP
    for member, content in unpack_files(data, name, limits.max_bytes):
        first = len(parsed.problems)
        try:
            if isinstance(content, UnreadableText):
                raise content
            _parse_content(content, member, format, limits, parsed, pictures)
        except UnreadableText as error:
            parsed.problems.append(RecordProblem(1, error.problem, error.remedy, ""))
        if is_archive and member:
            told = parsed.problems[first:]
            parsed.problems[first:] = [
                replace(p, problem=f"{quote_value(member)}: {p.problem}", member=member)
                for p in told
            ]
    return _tell_if_empty(parsed)


def _tell_if_empty(parsed: ParsedFile) -> ParsedFile:
    if not parsed.facts and not parsed.problems:
        parsed.problems.append(RecordProblem(1, "the file holds no record", "write one a line", ""))
    return parsed


def _parse_content(
    data: bytes,
    name: str,
    format: str | None,
    limits: FileLimits,
    parsed: ParsedFile,
    pictures: RecordPictures,
) -> None:
    """Add the facts and problems of one file that is not packed. Raises UnreadableText."""
    if data.startswith(PARQUET_MARK):
        data, name = read_parquet(data, limits.max_facts, limits.max_bytes), "table.jsonl"
    text, max_chars = decode_text(data), limits.max_line_chars
    if format == "csv" or (format is None and is_table(text, name)):
        raws = split_table(text, max_chars)
        _collect_records(text, raws, "native", limits, parsed, pictures)
    elif is_wrapped(text, max_chars):
        raws = split_wrapped(text, max_chars)
        _collect_records(text, raws, format, limits, parsed, pictures, is_wrapping=True)
    else:
        raws = _split_json(text, limits)
        _collect_records(text, raws, format, limits, parsed, pictures)


def extract_failed(
    data: bytes, name: str, problems: Sequence[RecordProblem], max_bytes: int = MAX_FILE_BYTES
) -> bytes:
    """Return the failed records alone, in their file's own form, to be mended and sent again.

    `data` shows the form, and holds a table's header.
    """
    packing = find_packing(data)
    files = {
        member: _extract_text(content, member, [p for p in problems if p.member in ("", member)])
        for member, content in unpack_files(data, name, max_bytes)
        if isinstance(content, bytes)
    }
    if packing is None:
        return files.get(name, data)
    failed = {member: content for member, content in files.items() if content}
    return pack_files(packing, failed) if failed else data


def _extract_text(data: bytes, name: str, problems: Iterable[RecordProblem]) -> bytes:
    records = [problem.record for problem in problems if problem.record]
    if not records:
        return b""
    try:
        text = "" if data.startswith(PARQUET_MARK) else decode_text(data)
    except UnreadableText:
        return data
    if is_table(text, name):
        records = [extract_heading(text), *records]
    elif text.lstrip().startswith("[") or any("\n" in record for record in records):
        return ("[\n" + ",\n".join(records) + "\n]\n").encode("utf-8", "surrogateescape")
    return "".join(f"{record}\n" for record in records).encode("utf-8", "surrogateescape")


def _split_json(text: str, limits: FileLimits) -> Iterator[RawRecord]:
    first = text[skip_gap(text, 0) :].partition("\n")[0].rstrip(" \t\r,")
    opens_more = first.startswith("{") and not blank_comments(first).rstrip(" \t,").endswith("}")
    if first.startswith("[") or opens_more:
        return split_json_list(text, limits.max_line_chars)
    return split_json_lines(text, limits.max_line_chars)


def _collect_records(
    text: str,
    raws: Iterator[RawRecord],
    format: str | None,
    limits: FileLimits,
    parsed: ParsedFile,
    pictures: RecordPictures,
    is_wrapping: bool = False,
) -> None:
    for raw in raws:
        outcome = read_record(raw, format, limits, pictures)
        size = 1 if isinstance(outcome, RecordProblem) else len(outcome)
        if len(parsed.facts) + len(parsed.problems) + size > limits.max_facts:
            rest = [raw.text, *(r.text for r in raws)] if is_wrapping else [_cut_rest(text, raw)]
            problem = f"more than {limits.max_facts} facts in one file: read up to here"
            remedy = "submit the rest as a file of its own"
            parsed.problems.append(RecordProblem(raw.line, problem, remedy, ",\n".join(rest)))
            break
        if isinstance(outcome, RecordProblem):
            parsed.problems.append(outcome)
            continue
        parsed.facts.extend((raw.line, fact) for fact in outcome)


def _cut_rest(text: str, raw: RawRecord) -> str:
    """Return all that is behind the limit."""
    rest = text[raw.start :].rstrip()
    is_list = text[skip_gap(text, 0) :][:1] == "["
    return rest.removesuffix("]").rstrip(" \t\r\n,") if is_list else rest


def read_record(
    raw: RawRecord,
    format: str | None,
    limits: FileLimits,
    pictures: RecordPictures | None = None,
) -> list[Fact] | RecordProblem:
    """Read the facts of one record, or its problem. pictures: where they are looked for."""
    if raw.problem:
        return RecordProblem(raw.line, raw.problem, raw.remedy, raw.text)
    if not isinstance(raw.value, dict):
        return RecordProblem(raw.line, "a record must be an object", RECORD_REMEDY, raw.text)
    record = unwrap_row(raw.value)
    nests = any(isinstance(value, dict | list) for value in record.values())
    if nests and not record.keys() & KNOWN_KEYS:
        problem = f"none of its keys is one of a record: {quote_value(', '.join(record))}"
        return RecordProblem(raw.line, problem, RECORD_REMEDY, raw.text)
    form = _recognise_form(record) if format is None else _choose_form(record, format)
    try:
        if form is NativeRecord and "image" in record and "subject" not in record:
            digest = (pictures or RecordPictures(None)).take(record["image"])
            record = state_picture(record, digest)
        facts = form.model_validate(record).to_facts()
    except ValidationError as error:
        return RecordProblem(raw.line, *explain_faults(error, record), raw.text)
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
        is_cloze = counterfact or isinstance(record.get("target_new"), dict)  # ROME's request
        form = ClozeRecord if is_cloze and not knowedit else FlatRecord
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
