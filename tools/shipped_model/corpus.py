"""Corpus of the shipped model: facts in several phrasings, and ordinary text.

Knows nothing of models or training: it reads the public data sets and returns strings.
"""

import json
import lzma
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HELD_OUT_PHRASINGS = 2  # of each relation, never trained on
MIN_TRAINED_PHRASINGS = 2
HELD_OUT_LINES = 100  # one line of text in 100 is kept for measuring perplexity
TEXTS = ("trex_evidence", "wiki_movies", "factbook", "openstax")
MAX_TEXT_CHARS = 600
# Relations of CounterFact that ParaRel has few or no phrasings for.
EXTRA_TEMPLATES = {
    "P1303": (
        "{} plays the instrument",
        "{}, playing the",
        "{} performs on the",
        "{}, performing on the",
        "{} plays the",
        "{} is incredible at playing the",
        "Which instrument does {} play?",
    ),
    "P641": (
        "{} professionally plays the sport",
        "{} is a professional",
        "What sport does {} play? They play",
        "{} plays",
        "{}, who plays",
        "Which sport does {} play?",
    ),
    "P1412": (
        "{} speaks",
        "{} speaks the language",
        "{} writes in",
        "The language used by {} is",
        "{} used to communicate in",
        "{} communicated in",
        "{} is fluent in",
    ),
}

Triple = tuple[str, str, str]  # subject, relation, object


@dataclass(frozen=True)
class KnownFact:
    """A (subject, relation, object) triple with its trained and held-out prompts ({} filled in)."""

    subject: str
    relation: str
    object: str
    trained: tuple[str, ...]
    held_out: tuple[str, ...]


@dataclass(frozen=True)
class Phrasings:
    """Phrasings of one relation: templates with {} for the subject, the object follows."""

    trained: tuple[str, ...]
    held_out: tuple[str, ...]


def _read_json(path: Path) -> list[dict[str, str]]:
    records: list[dict[str, str]] = json.loads(path.read_text(encoding="utf-8"))
    return records


def _read_pararel_templates(data: Path) -> dict[str, list[str]]:
    """Return by relation id the templates of ParaRel in which the object comes last."""
    raw = json.loads((data / "knowledge/pararel.json").read_text(encoding="utf-8"))["patterns"]
    templates: dict[str, list[str]] = {}
    for relation, patterns in raw.items():
        found: list[str] = []
        for entry in patterns:
            text = re.sub(r"\s*\.$", "", entry["pattern"].strip()).replace(" ,", ",")
            text = re.sub(r"\s+", " ", text)
            if text.endswith("[Y]") and text.count("[X]") == 1:
                template = text[:-3].strip().replace("[X]", "{}")
                if template not in found:
                    found.append(template)
        templates[relation] = found
    for relation, extra in EXTRA_TEMPLATES.items():
        found = templates.setdefault(relation, [])
        found.extend(t for t in extra if t not in found)
    return templates


def _extract_template(prompt: str, subject: str) -> str | None:
    """Return the template of a CounterFact paraphrase, whose first sentences are unrelated."""
    at = prompt.rfind(subject)
    if at < 0:
        return None
    start = max(prompt.rfind(mark, 0, at) + len(mark) for mark in (". ", "? ", "\n"))
    lead = prompt[start:at] if prompt[:at].rstrip().endswith((".", "?", "\n")) is False else ""
    return (lead + "{}" + prompt[at + len(subject) :]).strip()


def _count_votes(data: Path, known: dict[str, list[str]]) -> dict[str, Counter[str]]:
    """Count by template of CounterFact the records that state each relation.

    The prompt and paraphrases of a record state one relation, which ParaRel names for most of them.
    """
    owners: dict[str, set[str]] = defaultdict(set)
    for relation, templates in known.items():
        for template in templates:
            owners[template].add(relation)
    votes: dict[str, Counter[str]] = defaultdict(Counter)
    for record in json.loads((data / "editing/counterfact_full_1000.json").read_text("utf-8")):
        subject = record["subject"]
        used = {record["prompt"].strip(), record["question"].replace(subject, "{}").strip()}
        used |= {t for p in record["paraphrase_prompts"] if (t := _extract_template(p, subject))}
        named = Counter(r for t in used for r in owners.get(t, ()) if len(owners.get(t, ())) == 1)
        if not named:
            continue
        relation = named.most_common(1)[0][0]
        for template in sorted(used):  # a set has no order of its own
            if template.count("{}") == 1 and len(template) < 80:
                votes[template][relation] += 1
    return votes


def load_phrasings(data: Path) -> dict[str, Phrasings]:
    """Return trained and held-out phrasings of every relation that has enough of them.

    The held-out ones are those that CounterFact uses least as edit prompts, so that the model has
    seen the facts that people edit in that wording.
    """
    templates = _read_pararel_templates(data)
    for template, votes in _count_votes(data, templates).items():
        for relation, count in votes.items():
            if count >= 2 and count >= 0.3 * votes.total() and template not in templates[relation]:
                templates[relation].append(template)
    records = _read_json(data / "editing/counterfact_full_1000.json")
    used = Counter(record["prompt"].strip() for record in records)
    result = {}
    for relation, found in templates.items():
        if len(found) < HELD_OUT_PHRASINGS + MIN_TRAINED_PHRASINGS:
            continue
        by_use = sorted(found, key=lambda t: (used[t], t))
        held_out = by_use[:HELD_OUT_PHRASINGS]
        result[relation] = Phrasings(
            tuple(t for t in found if t not in held_out), tuple(sorted(held_out))
        )
    return result


class _RelationIndex:
    """Relations by template and object; some templates are shared by several relations."""

    def __init__(self, relations: dict[str, Phrasings]) -> None:
        self._owners: dict[str, list[str]] = defaultdict(list)
        for relation, forms in relations.items():
            for template in forms.trained + forms.held_out:
                self._owners[template].append(relation)
        self._objects: dict[str, set[str]] = defaultdict(set)
        self._matchers = [
            (re.compile("^" + re.escape(t).replace(r"\{\}", "(.+)") + "$"), t) for t in self._owners
        ]

    def add_object(self, relation: str, value: str) -> None:
        """Record that a relation can have this object."""
        self._objects[relation].add(value)

    def find_unshared(self, template: str) -> str | None:
        """Return the relation of a template that is not shared; None for one that is."""
        fitting = self._owners.get(template.strip(), [])
        return fitting[0] if len(fitting) == 1 else None

    def find_relation(self, template: str, value: str) -> str | None:
        """Return the relation of a template that can have this object."""
        fitting = self._owners.get(template.strip(), [])
        return next((r for r in fitting if value in self._objects[r]), None)

    def find_subject(self, prompt: str, relation: str | None) -> str | None:
        """Return the subject of a prompt that states the relation in a known phrasing."""
        for matcher, template in self._matchers:
            match = matcher.match(prompt)
            if match and relation in self._owners[template]:
                return match.group(1)
        return None


def _iter_triples(data: Path, relations: dict[str, Phrasings]) -> Iterator[Triple]:
    """Yield triples, the most wanted first; a triple may come twice."""
    lines = (data / "knowledge/trex_facts_22881.jsonl").read_text("utf-8").splitlines()
    trex = [row for row in map(json.loads, lines) if row["predicate_id"] in relations]
    full = json.loads((data / "editing/counterfact_full_1000.json").read_text("utf-8"))
    known = _RelationIndex(relations)
    for row in trex:
        known.add_object(row["predicate_id"], row["obj_label"])
    for record in full:
        if only := known.find_unshared(record["prompt"]):
            known.add_object(only, record["target_true"])
    yield from _iter_record_triples(full, known)
    for name in ("counterfact_5000", "counterfact_train_10000"):
        for row in _read_json(data / f"editing/{name}.json"):
            template = row["prompt"].replace(row["subject"], "{}")
            if found := known.find_relation(template, row["ground_truth"]):
                yield row["subject"], found, row["ground_truth"]
    for row in trex:
        yield row["sub_label"], row["predicate_id"], row["obj_label"]


def _iter_record_triples(full: list[dict[str, Any]], known: _RelationIndex) -> Iterator[Triple]:
    """Yield the records' own facts, then their neighbours', which share relation and object."""
    for record in full:
        if found := known.find_relation(record["prompt"], record["target_true"]):
            yield record["subject"], found, record["target_true"]
    for record in full:
        wanted = known.find_relation(record["prompt"], record["target_true"])
        for prompt in record["neighborhood_prompts"]:
            if wanted and (subject := known.find_subject(prompt, wanted)):
                yield subject, wanted, record["target_true"]


def load_facts(data: Path, limit: int) -> list[KnownFact]:
    """Return up to `limit` facts; no prompt has two different objects."""
    relations = load_phrasings(data)
    answers: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    kept: list[KnownFact] = []
    for subject, relation, value in _iter_triples(data, relations):
        if len(kept) == limit:
            break
        if (subject, relation) in seen or not subject.strip() or "{" in subject:
            continue
        seen.add((subject, relation))
        forms = relations[relation]
        trained, held_out = (
            tuple(
                p
                for t in group
                if answers.setdefault(p := t.replace("{}", subject), value) == value
            )
            for group in (forms.trained, forms.held_out)
        )
        if len(trained) >= MIN_TRAINED_PHRASINGS and held_out:
            kept.append(KnownFact(subject, relation, value, trained, held_out))
    return kept


def load_text(data: Path, held_out: bool) -> list[str]:
    """Return lines of ordinary text: those to train on, or the one in a hundred held out."""
    lines: list[str] = []
    for name in TEXTS:
        with lzma.open(data / f"corpus/{name}.txt.xz", "rt", encoding="utf-8") as stream:
            for number, line in enumerate(stream):
                if (number % HELD_OUT_LINES == 0) == held_out and len(line) > 40:
                    lines.append(line.strip()[:MAX_TEXT_CHARS])
    return lines


def shuffle_items(items: list[str], seed: int) -> list[str]:
    """Return a copy in an order fixed by the seed."""
    copy = list(items)
    random.Random(seed).shuffle(copy)
    return copy
