"""Data set as a stream of facts, each with questions that the editor never sees."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kedit_daemon.bench.relation_groups import group_by_relation
from kedit_daemon.ingest.parser import RecordProblem, read_record
from kedit_daemon.ingest.record_splitter import RawRecord, split_json_lines, split_json_list
from kedit_daemon.ingest.schemas import FileLimits
from memory.errors import KeditError, Unreadable
from memory.facts import Fact, Neighbour, fill_subject
from memory.model.editable import EditableModel
from policies.probe import is_right_answer
from policies.prompts import make_rows

PARSER_LIMITS = FileLimits(max_line_chars=1 << 20)
UNSEEN_FIELDS = ("questions", "other_questions")  # of our own form, not for the editor
OLD_ANSWER_FIELDS = ("target_true", "ground_truth", "answers")  # their names in the data sets


@dataclass(frozen=True)
class BenchRecord:
    """Fact as the editor gets it, without paraphrases, neighbours and questions, which stand here.

    true_target: the answer that the fact replaces. questions: how it is asked for in a chat.
    other_questions: asked about its subject, and not for it. relation: a name that it shares with
    the file's records that ask for the same of other subjects.
    """

    fact: Fact
    true_target: str | None
    paraphrases: tuple[str, ...]
    neighbours: tuple[Neighbour, ...]
    questions: tuple[str, ...] = ()
    other_questions: tuple[str, ...] = ()
    relation: str = ""


@dataclass(frozen=True)
class SkippedRecord:
    """Record that is not in the stream: its line in the file (0: not known), and the reason."""

    line: int
    reason: str


@dataclass(frozen=True)
class FactStream:
    """Records in the order in which they are edited, and those left out."""

    records: tuple[BenchRecord, ...]
    skipped: tuple[SkippedRecord, ...]


def read_stream(path: Path, offset: int, limit: int | None, seed: int) -> FactStream:
    """Read `limit` records of a file from record `offset` on; the seed gives only their order.

    Raises KeditError if none is usable.
    """
    items = _name_relations(list(_read_items(path)))
    chosen = items[offset:] if limit is None else items[offset : offset + limit]
    skipped, slots = [], dict[str, BenchRecord]()
    for line, item in chosen:
        if isinstance(item, str):
            skipped.append(SkippedRecord(line, item))
        elif item.fact.slot in slots:
            skipped.append(SkippedRecord(line, "an earlier record asks the same"))
        else:
            slots[item.fact.slot] = item
    records = list(slots.values())
    if not records:
        why = f": {skipped[0].reason}" if skipped else ""
        hint = "give a JSON array or JSON Lines of facts, and a smaller --offset"
        why = f"{path} has no facts in the chosen range{why}"
        raise KeditError(why, code="no-facts", hint=hint)
    random.Random(seed).shuffle(records)
    return FactStream(tuple(records), tuple(skipped))


def _name_relations(
    items: Sequence[tuple[int, BenchRecord | str]],
) -> list[tuple[int, BenchRecord | str]]:
    """Name the relations of all records of a file."""
    records = [item for _, item in items if isinstance(item, BenchRecord)]
    names = iter(group_by_relation([(r.fact, r.questions) for r in records]))
    return [
        (line, item if isinstance(item, str) else replace(item, relation=next(names)))
        for line, item in items
    ]


def _read_items(path: Path) -> Iterator[tuple[int, BenchRecord | str]]:
    """Yield each fact of the file, or the problem with its record, with its line."""
    try:
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise Unreadable(f"{path} cannot be read: {error}") from error
    split = split_json_list if text.lstrip().startswith("[") else split_json_lines
    for raw in split(text, PARSER_LIMITS.max_line_chars):
        for item in _parse_record(raw):
            yield raw.line, item


def _parse_record(raw: RawRecord) -> list[BenchRecord | str]:
    if raw.problem:
        return [raw.problem]
    if not isinstance(raw.value, dict):
        return ["a record must be an object"]
    stated = {key: value for key, value in raw.value.items() if key not in UNSEEN_FIELDS}
    facts = read_record(replace(raw, value=stated), None, PARSER_LIMITS)
    if isinstance(facts, RecordProblem):
        return [facts.problem]
    truths = _find_old_answers(raw.value, len(facts))
    asked = _find_questions(raw.value, len(facts))
    return [_build_record(*parts, raw.value) for parts in zip(facts, truths, asked, strict=True)]


def _build_record(
    fact: Fact, truth: str | None, asked: list[str], record: dict[str, Any]
) -> BenchRecord:
    if truth is not None and is_right_answer(truth, fact):
        truth = None  # the fact does not change the answer, so there is no rival to compare with
    bare = replace(fact, paraphrases=(), neighbours=())
    questions = [
        filled for q in asked if (filled := fill_subject(q, fact.subject)) != fact.question
    ]
    questions = questions or [p for p in fact.filled_paraphrases if p.endswith("?")]
    others = [fill_subject(q, fact.subject) for q in _list_texts(record.get("other_questions"))]
    return BenchRecord(
        bare, truth, fact.filled_paraphrases, fact.neighbours, tuple(questions), tuple(others)
    )


def _find_questions(record: dict[str, Any], count: int) -> list[list[str]]:
    """Find the questions that ask for each of the record's facts."""
    rewrites = record.get("requested_rewrite")
    if isinstance(rewrites, list):
        return [_list_texts(rewrite.get("question")) for rewrite in rewrites]
    asked = _list_texts(record.get("question")) + _list_texts(record.get("questions"))
    return [asked if count == 1 else []] * count


def _list_texts(value: object) -> list[str]:
    """List the texts of a field that holds a text, a list of texts, or nothing."""
    texts = value if isinstance(value, list) else [value]
    return [text.strip() for text in texts if isinstance(text, str) and text.strip()]


def _find_old_answers(record: dict[str, Any], count: int) -> list[str | None]:
    """Find the answers that the record's facts replace."""
    rewrites = record.get("requested_rewrite")
    if rewrites is not None:
        each = rewrites if isinstance(rewrites, list) else [rewrites]
        return [_find_first_text(rewrite.get("target_true")) for rewrite in each]
    texts = (text for key in OLD_ANSWER_FIELDS if (text := _find_first_text(record.get(key))))
    return [next(texts, None)] * count


def _find_first_text(value: object) -> str | None:
    """Find the first text in a field that may hold a text, a list, or ROME's {"str": text}."""
    if isinstance(value, dict):
        value = value.get("str")
    if isinstance(value, list):
        return next((text for item in value if (text := _find_first_text(item))), None)
    return value.strip() or None if isinstance(value, str) else None


def drop_unreadable(model: EditableModel, stream: FactStream) -> FactStream:
    """Skip the records that this model cannot read, whatever the method."""
    readable, skipped = list[BenchRecord](), list(stream.skipped)
    for record in stream.records:
        if why := _explain_misfit(model, record):
            skipped.append(SkippedRecord(0, f"{record.fact.question!r}: {why}"))
        else:
            readable.append(record)
    if not readable:
        raise KeditError(
            f"the model can read none of the {len(stream.records)} facts: {skipped[-1].reason}",
            code="no-facts",
            hint="choose a model with a longer context",
        )
    return FactStream(tuple(readable), tuple(skipped))


def _explain_misfit(model: EditableModel, record: BenchRecord) -> str | None:
    try:
        rows = make_rows(model, record.fact)
    except KeditError as error:
        return str(error)
    prompts = [*record.paraphrases, *(n.prompt for n in record.neighbours)]
    encoded = [model.encode(prompt) for prompt in prompts]
    if not all(encoded):
        return "one of its prompts has no token"
    # In context, the fact precedes the prompt, and the answer needs space.
    longest = 2 * max(len(row.ids) for row in rows) + max(map(len, encoded), default=0)
    old = [record.true_target, *(near.answer for near in record.neighbours)]
    longest += max(len(model.encode(answer)) for answer in old if answer) if any(old) else 0
    limit = model.max_positions
    return f"its prompts and answers need {longest} tokens of {limit}" if longest > limit else None


def split_batches(records: Sequence[BenchRecord], size: int) -> list[list[Fact]]:
    """Split the records' facts into batches."""
    facts = [record.fact for record in records]
    return [facts[start : start + size] for start in range(0, len(facts), size)]
