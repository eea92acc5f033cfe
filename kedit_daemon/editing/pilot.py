"""Pilots of a calibration: facts to edit, prompts that no edit has seen, and an edit's quality."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from torch import Tensor

from kedit_daemon.editing.model_loading import read_canary_lines
from kedit_daemon.ingest.parser import parse_file
from kedit_daemon.ingest.schemas import FileLimits
from kedit_daemon.shipped import read_ordinary_lines
from memory.errors import KeditError
from memory.facts import Fact
from memory.model.chat_layout import render_chat
from memory.model.editable import EditableModel
from memory.model.scoring import PromptAnswer, score_answers
from policies.calibration import EditQuality
from policies.probe import MAX_NEIGHBOURS
from policies.prompts import MAX_PARAPHRASES, make_rows

MAX_PROMPT_TOKENS = 200  # tokens of a wording or near prompt; longer ones are left out
ROWS_PER_PASS = 8  # whose logits are all held at once
TEXT_TOKENS = 32  # of a line of ordinary text; as many lines as facts tell of the perplexity
MAX_LOSS = 99.0  # nats; the exponential of more is no number to work with
CHAT_REQUEST = "Tell me about {}."  # the user's turn, behind which a fact is stated in chat form


@dataclass(frozen=True)
class Pilot:
    """Facts to edit, and prompts to ask then, which no edit has seen."""

    facts: tuple[Fact, ...]
    held_out: tuple[tuple[int, str, str], ...]  # place of the fact, prompt and target
    near: tuple[str, ...]  # prompts whose answers must stay


def read_pilot(path: Path, limits: FileLimits) -> list[Fact]:
    """Read the facts of a file in any accepted form, one for each question; skip broken records."""
    parsed = parse_file(path.read_bytes(), path.name, None, limits)
    if not parsed.facts:
        first = parsed.problems[0]
        raise KeditError(f"{path}:{first.line}: {first.problem}", code="pilot", hint=first.remedy)
    return list({fact.slot: fact for _, fact in parsed.facts}.values())


def make_pilot(model: EditableModel, facts: Sequence[Fact], count: int) -> Pilot:
    """Make a pilot of at most `count` facts. Without paraphrases, the question after other words is
    held out; without neighbours, the questions of facts that are not edited are near."""
    usable = [fact for fact in facts if _is_readable(model, fact)]
    edited, others = usable[:count], usable[count : 2 * count]
    if not any(fact.neighbours for fact in edited) and not others:
        kept = len(edited) - len(edited) // 3
        edited, others = edited[:kept], edited[kept:]
    near = [n.prompt for fact in edited for n in fact.neighbours[:MAX_NEIGHBOURS]]
    near = list(dict.fromkeys(near)) or [fact.question for fact in others]
    asked = {fact.question for fact in edited}
    near = [p for p in near if p not in asked and len(model.encode(p)) <= MAX_PROMPT_TOKENS]
    held_out = _select_held_out(model, edited) + _make_chat_prompts(model, edited)
    if not near or not held_out:
        raise KeditError(
            "the pilot has too few facts that this model can read",
            code="pilot",
            hint="give at least three, or facts with neighbours, with --pilot",
        )
    facts_only = tuple(replace(fact, paraphrases=()) for fact in edited)
    return Pilot(facts_only, tuple(held_out), tuple(near))


def _select_held_out(model: EditableModel, facts: Sequence[Fact]) -> list[tuple[int, str, str]]:
    placed = list(enumerate(facts))
    held_out = [
        (n, p, fact.target) for n, fact in placed for p in fact.filled_paraphrases[:MAX_PARAPHRASES]
    ]
    if not held_out:
        lines = [" ".join(line.split()[:8]).rstrip(".") for line in read_ordinary_lines()]
        pairs = zip(lines, placed, strict=False)
        held_out = [(n, f"{line}. {fact.question}", fact.target) for line, (n, fact) in pairs]
    return [one for one in held_out if len(model.encode(one[1])) <= MAX_PROMPT_TOKENS]


def _make_chat_prompts(model: EditableModel, facts: Sequence[Fact]) -> list[tuple[int, str, str]]:
    """Return the facts' questions as the beginning of an assistant's reply, where the model has a
    chat template."""
    if not model.tokenizer.chat_template:
        return []
    found = []
    for n, fact in enumerate(facts):
        chat = [{"role": "user", "content": CHAT_REQUEST.format(fact.subject)}]
        prompt = render_chat(model.tokenizer, chat) + fact.question
        if len(model.encode(prompt)) <= MAX_PROMPT_TOKENS:
            found.append((n, prompt, fact.target))
    return found


def _is_readable(model: EditableModel, fact: Fact) -> bool:
    try:
        make_rows(model, replace(fact, paraphrases=()))
    except KeditError:
        return False
    return True


class PilotExaminer:
    """Scores an edit on the pilot. An answer is right if every token of the target is the
    likeliest; a near prompt is unchanged if its likeliest next token is that of the base."""

    def __init__(self, model: EditableModel, pilot: Pilot) -> None:
        self.model, self.pilot = model, pilot
        self._fact_rows = [self._encode_row(fact.question, fact.target) for fact in pilot.facts]
        self._held_out_rows = [
            (place, self._encode_row(prompt, end)) for place, prompt, end in pilot.held_out
        ]
        self._near_rows = [PromptAnswer(tuple(model.encode(prompt)), (0,)) for prompt in pilot.near]
        lines = [model.encode(line)[:TEXT_TOKENS] for line in read_canary_lines()]
        self._text_rows = [PromptAnswer((ids[0],), tuple(ids[1:])) for ids in lines if ids[1:]]
        self._text_rows = self._text_rows[: len(pilot.facts)]
        self._near_before = self._predict_next(self._near_rows)
        self._losses_before = self._measure_text_losses(len(self._text_rows))

    def __call__(self, deltas: Mapping[int, Tensor], facts: int) -> EditQuality:
        """Measure the quality of the unedited weights plus ΔW of the first `facts` facts; the model
        ends unedited."""
        model = self.model
        held_out = [row for place, row in self._held_out_rows if place < facts]
        near = math.ceil(len(self._near_rows) * facts / len(self.pilot.facts))
        model.set_deltas(dict(deltas))
        try:
            now = self._predict_next(self._near_rows[:near])
            same = [one == other for one, other in zip(now, self._near_before, strict=False)]
            ratios = [float(model.weight(n).norm() / model.base_weight(n).norm()) for n in deltas]
            return EditQuality(
                reliability=self._score_rows(self._fact_rows[:facts]),
                generality=self._score_rows(held_out),
                locality=sum(same) / len(same),
                norm_ratio=max(ratios, default=1.0),
                perplexity_ratio=self._measure_perplexity_ratio(facts),
            )
        finally:
            model.set_deltas({})

    def _encode_row(self, prompt: str, target: str) -> PromptAnswer:
        answer = self.model.encode_target(prompt, target)
        return PromptAnswer(tuple(self.model.encode(prompt)), tuple(answer))

    def _score_rows(self, rows: Sequence[PromptAnswer]) -> float:
        scores = score_answers(self.model, rows, rows_per_pass=ROWS_PER_PASS)
        return sum(all(score.token_hits) for score in scores) / len(rows) if rows else 0.0

    def _measure_perplexity_ratio(self, lines: int) -> float:
        pairs = list(zip(self._measure_text_losses(lines), self._losses_before, strict=False))
        grown = fmean(now - before for now, before in pairs)
        return math.exp(min(grown, MAX_LOSS))

    def _measure_text_losses(self, lines: int) -> list[float]:
        """Return the mean loss of the tokens of each line of ordinary text, in nats."""
        rows = self._text_rows[:lines]
        return [s.loss for s in score_answers(self.model, rows, rows_per_pass=ROWS_PER_PASS)]

    def _predict_next(self, rows: Sequence[PromptAnswer]) -> list[tuple[int, ...]]:
        """Return the likeliest next token of each prompt."""
        scores = score_answers(self.model, rows, rows_per_pass=ROWS_PER_PASS)
        return [score.tokens for score in scores]
