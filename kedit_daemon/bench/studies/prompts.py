"""What the routing study asks: each group of prompts, with the fact that a prompt is about."""

import lzma
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kedit_daemon.bench.studies.shared import prepend_text, sample_evenly
from kedit_daemon.bench.studies.study import StudyInput
from kedit_daemon.shipped import read_ordinary_lines
from memory.errors import Unreadable
from memory.facts import Fact
from memory.model.editable import EditableModel

MAX_TEXTS = 10_000  # lines of ordinary text, or starts of the shipped ones, at most
WORD_STEP = 3  # by which one start of a line is longer than the one before
LONG_PREFIX_TOKENS = 200  # tokens of ordinary text before a question
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
    """A prompt, the fact that it is about, if it is about one, what was found, and, where nothing
    was, whether the logits have moved."""

    prompt: str
    fact_id: str | None
    found: str | None = None
    score: float = -1.0
    moved: bool = False


def build_groups(given: StudyInput) -> dict[str, list[RoutedPrompt]]:
    """The prompts of each of GROUPS; without those that are too long for the model."""
    model, facts = given.loaded_model.model, [record.fact for record in given.records]
    lines = read_ordinary_lines() if given.texts_path is None else read_lines(given.texts_path)
    groups = {
        "prompts": [RoutedPrompt(fact.question, fact.id) for fact in facts],
        "paraphrases": [RoutedPrompt(p, r.fact.id) for r in given.records for p in r.paraphrases],
        "two facts": _pair_facts(facts, random.Random(given.seed)),
        "chat": [
            RoutedPrompt(_format_chat(form, fact), fact.id)
            for fact in facts
            for form in CHAT_TEMPLATES
        ],
        "long": _build_long_prompts(model, facts, lines),
        "neighbours": [RoutedPrompt(n.prompt, None) for r in given.records for n in r.neighbours],
        "text": [
            RoutedPrompt(text, None)
            for text in _select_texts(model, lines, given.texts_path is None)
        ],
    }
    most = model.max_positions
    return {
        name: [a for a in groups[name] if _count_tokens(model, a) <= most] for name in PROMPT_GROUPS
    }


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, plain or .xz, without empty ones. Raises KeditError."""
    try:
        data = path.read_bytes()
        text = (lzma.decompress(data) if path.suffix == ".xz" else data).decode()
    except (OSError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise Unreadable(f"{path} cannot be read: {error}") from error
    lines = [line.strip() for line in text.splitlines()]
    if not any(lines):
        raise Unreadable(f"{path} has no text", hint="give lines of text")
    return [line for line in lines if line]


def truncate_text(model: EditableModel, text: str) -> str:
    """A text, or as much of its start as the model can read."""
    ids, kept = model.encode(text), model.max_positions
    while len(ids) > model.max_positions:
        text = model.decode(ids[:kept])
        ids, kept = model.encode(text), kept - 1
    return text


def _count_tokens(model: EditableModel, asked: RoutedPrompt) -> int:
    return len(model.encode(asked.prompt))


def _pair_facts(facts: Sequence[Fact], chance: random.Random) -> list[RoutedPrompt]:
    """Each fact's question after another fact, told with its target."""
    order = chance.sample(facts, len(facts))
    pairs = zip(order, [*order[1:], *order[:1]], strict=True) if len(order) > 1 else ()
    return [
        RoutedPrompt(f"{one.question} {one.target}. {two.question}", two.id) for one, two in pairs
    ]


def _format_chat(form: str, fact: Fact) -> str:
    return form.replace("{question}", fact.question).replace("{subject}", fact.subject)


def _build_long_prompts(
    model: EditableModel, facts: Sequence[Fact], lines: Sequence[str]
) -> list[RoutedPrompt]:
    """Each fact's question after much ordinary text, with and without its subject before that."""
    found = list[RoutedPrompt]()
    for number, fact in enumerate(facts):
        text = prepend_text(model, lines, number, LONG_PREFIX_TOKENS, fact.question)
        found += [RoutedPrompt(text, fact.id), RoutedPrompt(f"{fact.subject}. {text}", fact.id)]
    return found


def _select_texts(model: EditableModel, lines: Sequence[str], starts: bool) -> Iterable[str]:
    """Lines as far as the model can read them; or the many starts of few lines."""
    if not starts:
        return [truncate_text(model, line) for line in sample_evenly(lines, MAX_TEXTS)]
    words = [line.split() for line in lines]
    some = (" ".join(w[:n]) for w in words for n in range(WORD_STEP, len(w) + 1, WORD_STEP))
    return sample_evenly(
        [text for text in some if len(model.encode(text)) <= model.max_positions], MAX_TEXTS
    )
