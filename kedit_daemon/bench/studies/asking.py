"""Facts as people ask for them, in a chat: what each method answers, and what else it changes.

A reply counts if its first tokens say the target. What is asked beside the facts counts as changed
if the reply begins differently from that of the unedited model.
"""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp
from statistics import fmean
from typing import Any

from kedit_daemon.bench.dataset import split_batches
from kedit_daemon.bench.methods.daemon_tiers import Wise
from kedit_daemon.bench.methods.method import Method
from kedit_daemon.bench.methods.method_catalog import import_method
from kedit_daemon.bench.plot import to_percent
from kedit_daemon.bench.scoring import continue_greedily
from kedit_daemon.bench.studies.asking_prompts import (
    FACT_FORMS,
    OTHER_FORMS,
    PromptWriter,
    StudyPrompt,
)
from kedit_daemon.bench.studies.study import Study, StudyInput
from kedit_daemon.bench.table import align_rows, format_share
from memory.errors import KeditError
from memory.model.chat_layout import find_chat_layout
from memory.model.editable import EditableModel
from memory.model.generate import Overlay
from memory.model.scoring import PromptAnswer, score_answers
from memory.side.side_memory import SideMemory
from policies.probe import says_answers

METHODS = ("wise", "memit-mass", "in-context", "ft", "reference-wise")
REPLY_TOKENS = {"tell me": 80, "other relations": 12, "neighbours": 12}  # of other forms 40
COMPARED_FORMS = ("tell me", *OTHER_FORMS)  # with the unedited model's replies
GATES = tuple(n / 2 for n in range(-8, 13))  # least scores of a question's words
Replies = dict[tuple[str, str, str], tuple[int, ...]]
"""First tokens of replies, by a prompt's form, fact and question."""


@dataclass(frozen=True)
class AskingStudy(Study):
    """Each form's share of said targets, by method; and recall over false fires by the words."""

    methods: Sequence[str] = METHODS

    def run(self, given: StudyInput) -> dict[str, Any]:
        """Measure every method on the same facts, the side memory's words also over the gate."""
        model = given.loaded_model.model
        if find_chat_layout(model.tokenizer) is None:
            why = "the model has no chat template, so nobody can ask it in a chat"
            raise KeditError(
                why, code="unsupported", hint="give --model one that has, such as smollm2"
            )
        writer = PromptWriter(model, given.records, given.seed)
        plain = writer.write_prompts(lambda _fact, prompt: prompt)
        compared = [prompt for prompt in plain if prompt.form in COMPARED_FORMS]
        before = read_replies(given, "before", compared)
        methods, curve = dict[str, Any](), list[dict[str, float]]()
        for name in [given.method] if given.method else self.methods:
            with given.open_method(import_method(name)) as method:
                seconds = _edit_all(given, name, method)
                prompts = writer.write_prompts(method.frame_prompt)
                after = read_replies(given, name, prompts, method.overlay)
                if isinstance(method, Wise):
                    curve = measure_gates(method.live_model.side, prompts)
                shares = {f: score_form(model, f, prompts, after) for f in FACT_FORMS}
                missed = method.not_edited
            model.set_deltas({})
            methods[name] = {
                **shares,
                **{form: _count_changed(form, before, after) for form in OTHER_FORMS},
                **compare_texts(model, compared, before, after),
                "seconds_per_fact": seconds,
                "not_edited": missed,
            }
        return {"asked": Counter(p.form for p in plain), "methods": methods, "rows": curve}

    def format_lines(self, result: Mapping[str, Any]) -> Iterator[str]:
        methods = result["methods"]
        rows = [["said", "asked", *methods]]
        for form in FACT_FORMS:
            shares = [format_share(of[form]) for of in methods.values()]
            rows.append([form, str(result["asked"].get(form, 0)), *shares])
        rows.append(["changed", "", *("" for _ in methods)])
        for form in OTHER_FORMS:
            shares = [format_share(of[form]) for of in methods.values()]
            rows.append([form, str(result["asked"].get(form, 0)), *shares])
        for name in ("length", "perplexity", "seconds_per_fact"):
            rows.append([name, "", *(f"{of[name]:.2f}" for of in methods.values())])
        rows.append(["not_edited", "", *(str(of["not_edited"]) for of in methods.values())])
        yield from align_rows(rows)
        yield ""
        yield "length and perplexity: of the replies to tell me, over the unedited model's"
        if result["rows"]:
            yield ""
            gates = [["gate", "fires", "others fire"]]
            for row in result["rows"]:
                cells = (format_share(row[name]) for name in ("recall", "false"))
                gates.append([f"{row['gate']:.1f}", *cells])
            yield from align_rows(gates)

    def draw_curves(self, result: Mapping[str, Any], left: Any, right: Any) -> None:
        rows = result["rows"]
        recalls = [to_percent(row["recall"]) for row in rows]
        left.plot([to_percent(row["false"]) for row in rows], recalls, marker=".")
        left.set(xlabel="others fire, %", ylabel="fires, %", title="Questions, by their words")
        for name, of in result["methods"].items():
            right.plot(
                range(len(FACT_FORMS)),
                [to_percent(of[form]) for form in FACT_FORMS],
                marker=".",
                label=name,
            )
        right.set(ylabel="% said", title="Asked in several forms")
        right.set_xticks(range(len(FACT_FORMS)), FACT_FORMS, rotation=45, ha="right")


def read_replies(
    given: StudyInput, name: str, prompts: Sequence[StudyPrompt], overlay: Overlay | None = None
) -> Replies:
    """Read the first tokens of the replies to some prompts."""
    model, replies = given.loaded_model.model, Replies()
    forms = sorted({prompt.form for prompt in prompts})
    for form in given.track(forms, name):
        asked = [prompt for prompt in prompts if prompt.form == form]

        def is_enough(
            place: int, answer: Sequence[int], asked: Sequence[StudyPrompt] = asked
        ) -> bool:
            if asked[place].form in COMPARED_FORMS:
                return False
            return says_answers(
                model.decode(answer[:-1]), asked[place].wanted
            )  # its word may go on

        most = REPLY_TOKENS.get(form, 40)
        said = continue_greedily(model, [p.ids for p in asked], most, overlay, is_enough)
        replies |= {_name(prompt): tokens for prompt, tokens in zip(asked, said, strict=True)}
    return replies


def score_form(
    model: EditableModel, form: str, prompts: Sequence[StudyPrompt], replies: Replies
) -> float | None:
    """Return the share of a form's prompts whose replies say all that is wanted."""
    asked = [prompt for prompt in prompts if prompt.form == form]
    said = [says_answers(model.decode(replies[_name(p)]), p.wanted) for p in asked]
    return fmean(said) if said else None


def compare_texts(
    model: EditableModel, prompts: Sequence[StudyPrompt], before: Replies, after: Replies
) -> dict[str, float]:
    """Return the length and the perplexity, under the unedited model, of the longer texts of an
    edited one over those of the unedited one."""
    asked = [p for p in prompts if p.form == "tell me" and _name(p) in after]
    losses = list[list[float]]()
    lengths = list[int]()
    for replies in (before, after):
        rows = [PromptAnswer(p.ids, replies[_name(p)]) for p in asked]
        losses.append([score.loss for score in score_answers(model, rows, rows_per_pass=8)])
        lengths.append(sum(len(row.answer) for row in rows))
    perplexity = exp(fmean(losses[1]) - fmean(losses[0])) if asked else 1.0
    return {"length": lengths[1] / max(lengths[0], 1), "perplexity": perplexity}


def measure_gates(side: SideMemory, prompts: Sequence[StudyPrompt]) -> list[dict[str, float]]:
    """Return the shares of questions that fire their fact, and of others that fire any, by words
    alone, over the gate."""
    gates = side.gates
    side.gates = replace(gates, min_words_score=-float("inf"))
    try:
        readings = [(prompt, side.read_prompt(prompt.ids).asked) for prompt in prompts]
    finally:
        side.gates = gates
    scores = [(p, {n: found.score for n, found in asked.items()}) for p, asked in readings]
    own = [asked for prompt, asked in scores if prompt.form == "chat"]
    facts = [prompt.fact_id for prompt, _ in scores if prompt.form == "chat"]
    best = [
        asked[fact] if fact == max(asked, key=lambda n: asked[n], default="") else -float("inf")
        for fact, asked in zip(facts, own, strict=True)
    ]
    others = [
        max(asked.values(), default=-float("inf"))
        for prompt, asked in scores
        if prompt.form == "other relations"
    ]
    return [
        {
            "gate": gate,
            "recall": fmean(score >= gate for score in best) if best else 0.0,
            "false": fmean(score >= gate for score in others) if others else 0.0,
        }
        for gate in sorted((*GATES, gates.min_words_score))
    ]


def _edit_all(given: StudyInput, name: str, method: Method) -> float:
    """Edit the stream, and return the seconds a fact."""
    began = time.perf_counter()
    size = 1 if method.needs_single_facts else given.batch_size
    for batch in given.track(split_batches(given.records, size), f"editing ({name})"):
        method.edit(batch)
    return (time.perf_counter() - began) / len(given.records)


def _count_changed(form: str, before: Replies, after: Replies) -> float | None:
    """Return the share of a form's replies that begin differently."""
    asked = [name for name in after if name[0] == form]
    return fmean(before[name] != after[name] for name in asked) if asked else None


def _name(prompt: StudyPrompt) -> tuple[str, str, str]:
    return prompt.form, prompt.fact_id, prompt.question
