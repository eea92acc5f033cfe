"""A data set as a stream of facts, each with the questions that its editor never sees."""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kedit_daemon.ingest.parser import parse_file
from kedit_daemon.ingest.record_splitter import RawRecord, split_json_lines, split_json_list
from kedit_daemon.ingest.schemas import FileLimits
from memory.errors import KeditError, Unreadable
from memory.facts import Fact, Neighbour
from memory.model.editable import EditableModel
from policies.probe import is_same_answer
from policies.prompts import make_rows

PARSER_LIMITS = FileLimits(max_line_chars=1 << 20)
OLD_ANSWER_FIELDS = (
    "target_true",
    "ground_truth",
    "answers",
)  # where the data sets keep the old answer


@dataclass(frozen=True)
class BenchRecord:
    """A fact as the editor gets it, and what is held back from the editor.

    `fact` has neither paraphrases nor neighbours. `true_target` is the answer that it replaces.
    """

    fact: Fact
    true_target: str | None
    paraphrases: tuple[str, ...]
    neighbours: tuple[Neighbour, ...]


@dataclass(frozen=True)
class SkippedRecord:
    """A record that is not in the stream: its line in the file, and why."""

    line: int
    reason: str


@dataclass(frozen=True)
class FactStream:
    """The records in the order in which they are edited, and those that were left out."""

    records: tuple[BenchRecord, ...]
    skipped: tuple[SkippedRecord, ...]


def read_stream(path: Path, offset: int, limit: int | None, seed: int) -> FactStream:
    """`limit` records of a file from record `offset` on, in an order that follows from the seed.

    Which records they are does not depend on the seed. Raises KeditError when none is usable.
    """
    items = list(_read_items(path))
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
        raise KeditError(
            f"{path} gives no facts in the chosen range{why}",
            code="no-facts",
            hint="give a JSON array or JSON Lines of facts, and a smaller --offset",
        )
    random.Random(seed).shuffle(records)
    return FactStream(tuple(records), tuple(skipped))


def _read_items(path: Path) -> Iterator[tuple[int, BenchRecord | str]]:
    """Each fact of the file, or what is wrong with its record, with its line."""
    try:
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise Unreadable(f"{path} cannot be read: {error}") from error
    cut = split_json_list if text.lstrip().startswith("[") else split_json_lines
    for raw in cut(text, PARSER_LIMITS.max_line_chars):
        for item in _parse_record(raw):
            yield raw.line, item


def _parse_record(raw: RawRecord) -> list[BenchRecord | str]:
    if raw.problem:
        return [raw.problem]
    if not isinstance(raw.value, dict):
        return ["a record has to be an object"]
    parsed = parse_file(json.dumps(raw.value).encode(), "record.jsonl", None, PARSER_LIMITS)
    if parsed.problems:
        return [parsed.problems[0].problem]
    facts = [fact for _, fact in parsed.facts]
    truths = _find_old_answers(raw.value, len(facts))
    return [_build_record(fact, truth) for fact, truth in zip(facts, truths, strict=True)]


def _build_record(fact: Fact, truth: str | None) -> BenchRecord:
    if truth is not None and is_same_answer(truth, fact.target):
        truth = None  # the record does not change the answer, so there is nothing to compare
    bare = replace(fact, paraphrases=(), neighbours=())
    return BenchRecord(bare, truth, fact.filled_paraphrases, fact.neighbours)


def _find_old_answers(record: dict[str, Any], count: int) -> list[str | None]:
    """The answers that the record's facts replace."""
    rewrites = record.get("requested_rewrite")
    if rewrites is not None:
        each = rewrites if isinstance(rewrites, list) else [rewrites]
        return [_find_first_text(rewrite.get("target_true")) for rewrite in each]
    found = (text for key in OLD_ANSWER_FIELDS if (text := _find_first_text(record.get(key))))
    return [next(found, None)] * count


def _find_first_text(value: object) -> str | None:
    """The first text in a field that may hold a text, a list, or ROME's {"str": text}."""
    if isinstance(value, dict):
        value = value.get("str")
    if isinstance(value, list):
        return next((text for item in value if (text := _find_first_text(item))), None)
    return value.strip() or None if isinstance(value, str) else None


def drop_unreadable(model: EditableModel, stream: FactStream) -> FactStream:
    """The stream without what this model cannot read, whatever the method."""
    kept, skipped = list[BenchRecord](), list(stream.skipped)
    for record in stream.records:
        if why := _explain_misfit(model, record):
            skipped.append(SkippedRecord(0, f"{record.fact.question!r}: {why}"))
        else:
            kept.append(record)
    if not kept:
        raise KeditError(
            f"the model can read none of the {len(stream.records)} facts: {skipped[-1].reason}",
            code="no-facts",
            hint="choose a model that takes longer prompts",
        )
    return FactStream(tuple(kept), tuple(skipped))


def _explain_misfit(model: EditableModel, record: BenchRecord) -> str | None:
    try:
        rows = make_rows(model, record.fact)
    except KeditError as error:
        return str(error)
    asked = [*record.paraphrases, *(n.prompt for n in record.neighbours)]
    encoded = [model.encode(prompt) for prompt in asked]
    if not all(encoded):
        return "one of its prompts has no token"
    # In context the fact stands before the prompt, and room is needed for an answer.
    longest = 2 * max(len(row.ids) for row in rows) + max(map(len, encoded), default=0)
    old = [record.true_target, *(near.answer for near in record.neighbours)]
    longest += max(len(model.encode(answer)) for answer in old if answer) if any(old) else 0
    most = model.max_positions
    return f"its prompts and answers need {longest} tokens of {most}" if longest > most else None


def split_batches(records: Sequence[BenchRecord], size: int) -> list[list[Fact]]:
    """The stream's facts as the editor gets them."""
    facts = [record.fact for record in records]
    return [facts[start : start + size] for start in range(0, len(facts), size)]
