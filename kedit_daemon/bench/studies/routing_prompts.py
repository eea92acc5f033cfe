"""Prompts of the routing study by group, each with the fact that it is about."""

import lzma
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kedit_daemon.bench.studies.shared import prepend_text, sample_evenly
from kedit_daemon.bench.studies.study import StudyInput
from kedit_daemon.shipped import read_ordinary_lines
from memory.errors import Unreadable
from memory.facts import Fact
from memory.model.editable import EditableModel

WORD_STEP = 3  # words between two starts of a line
FACT_GROUPS = ("prompts", "paraphrases", "two facts", "chat", "long")
PROMPT_GROUPS = (*FACT_GROUPS, "neighbours", "text")  # the last two are about no fact
CHAT_TEMPLATES = (
    "User: I read about {subject} today.\nAssistant: What would you like to know?\n"
    "User: {question}",
    "User: Have you heard of {subject}?\nAssistant: Yes. How can I help?\n"
    "User: Please complete this sentence. {question}",
    "User: Hello! Can we talk about {subject}?\nAssistant: Of course.\n"
    "User: It is for a quiz.\nAssistant: Then ask me.\nUser: {question}",
)


@dataclass(frozen=True)
class RoutedPrompt:
    """Prompt and its routing.

    fact_id: the fact that it is about. found: the fact that it was routed to. moved: whether the
    logits of an unrouted prompt changed.
    """

    prompt: str
    fact_id: str | None
    found: str | None = None
    score: float = -1.0
    moved: bool = False


def build_groups(
    given: StudyInput, max_texts: int = 10_000, prefix_tokens: int = 200
) -> dict[str, list[RoutedPrompt]]:
    """Build the prompts of PROMPT_GROUPS, without those that are too long for the model.

    max_texts: lines of ordinary text, or starts of the shipped ones. prefix_tokens: tokens of
    ordinary text before a question of the group "long".
    """
    model, facts = given.loaded_model.model, [record.fact for record in given.records]
    lines = read_ordinary_lines() if given.texts_path is None else read_lines(given.texts_path)
    groups = {
        "prompts": [RoutedPrompt(fact.question, fact.id) for fact in facts],
        "paraphrases": [RoutedPrompt(p, r.fact.id) for r in given.records for p in r.paraphrases],
        "two facts": _pair_facts(facts, random.Random(given.seed)),
        "chat": [RoutedPrompt(_format_chat(t, f), f.id) for f in facts for t in CHAT_TEMPLATES],
        "long": _build_long_prompts(model, facts, lines, prefix_tokens),
        "neighbours": [RoutedPrompt(n.prompt, None) for r in given.records for n in r.neighbours],
        "text": [RoutedPrompt(t, None) for t in _select_texts(given, lines, max_texts)],
    }
    limit = model.max_positions
    return {
        name: [asked for asked in groups[name] if len(model.encode(asked.prompt)) <= limit]
        for name in PROMPT_GROUPS
    }


def read_lines(path: Path) -> list[str]:
    """Read the lines of a text file, plain or .xz, without empty ones. Raise Unreadable."""
    try:
        data = path.read_bytes()
        text = (lzma.decompress(data) if path.suffix == ".xz" else data).decode()
    except (OSError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise Unreadable(f"{path} cannot be read: {error}") from error
    lines = [stripped for line in text.splitlines() if (stripped := line.strip())]
    if not lines:
        raise Unreadable(f"{path} has no text", hint="give lines of text")
    return lines


def truncate_text(model: EditableModel, text: str) -> str:
    """Cut a text to as much of its start as the model can read."""
    ids, kept = model.encode(text), model.max_positions
    while len(ids) > model.max_positions:
        text = model.decode(ids[:kept])
        ids, kept = model.encode(text), kept - 1
    return text


def _pair_facts(facts: Sequence[Fact], rng: random.Random) -> list[RoutedPrompt]:
    """Ask each fact's question after the statement of another fact."""
    order = rng.sample(facts, len(facts))
    pairs = zip(order, [*order[1:], *order[:1]], strict=True) if len(order) > 1 else ()
    return [RoutedPrompt(f"{a.statement}. {b.question}", b.id) for a, b in pairs]


def _format_chat(template: str, fact: Fact) -> str:
    return template.replace("{question}", fact.question).replace("{subject}", fact.subject)


def _build_long_prompts(
    model: EditableModel, facts: Sequence[Fact], lines: Sequence[str], prefix_tokens: int
) -> list[RoutedPrompt]:
    """Ask each fact's question after much ordinary text, without and with its subject before it."""
    prompts = list[RoutedPrompt]()
    for number, fact in enumerate(facts):
        text = prepend_text(model, lines, number, prefix_tokens, fact.question)
        prompts += [RoutedPrompt(text, fact.id), RoutedPrompt(f"{fact.subject}. {text}", fact.id)]
    return prompts


def _select_texts(given: StudyInput, lines: Sequence[str], max_texts: int) -> list[str]:
    """Select the given lines, cut to the model's context, or many starts of the shipped lines."""
    model = given.loaded_model.model
    if given.texts_path is not None:
        return [truncate_text(model, line) for line in sample_evenly(lines, max_texts)]
    words = [line.split() for line in lines]
    starts = (" ".join(w[:n]) for w in words for n in range(WORD_STEP, len(w) + 1, WORD_STEP))
    readable = [text for text in starts if len(model.encode(text)) <= model.max_positions]
    return sample_evenly(readable, max_texts)
