"""A stream of facts about pictures and about names, on a vision-language model, by method: what is
said of them afterwards, and what else has changed.

What is about pictures is asked in a chat, names in their prompts. What is asked beside the facts
counts as changed if the reply is not the unedited model's.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from kedit_daemon.bench.dataset import BenchRecord
from kedit_daemon.bench.methods.daemon_tiers import Wise
from kedit_daemon.bench.methods.method import Method
from kedit_daemon.bench.methods.method_catalog import import_method
from kedit_daemon.bench.plot import to_percent
from kedit_daemon.bench.studies.picture_facts import (
    MAX_FACTS,
    Asked,
    list_asked,
    make_picture_facts,
)
from kedit_daemon.bench.studies.shared import catch_unsolved
from kedit_daemon.bench.studies.study import Study, StudyInput
from kedit_daemon.bench.table import align_rows, format_share
from memory.errors import HINT_VISION, KeditError
from memory.facts import LIVE_STATES, Fact
from memory.model.chat_layout import find_chat_layout, render_chat
from memory.model.editable import EditableModel
from memory.model.generate import Overlay, generate_answers
from memory.picture_marks import find_digest
from policies.probe import says_answers

METHODS = ("wise", "ft", "ultraedit")
SAID = ("picture", "picture, other wordings", "other drawing", "name", "name, other wordings")
KEPT = (
    "same picture, other questions",
    "other picture, same question",
    "text alone",
    "other names",
)
REPLY_TOKENS = 12
CHAT_FORMS = (*SAID[:3], *KEPT[:3])  # texts are asked as they are


@dataclass(frozen=True)
class PictureStudy(Study):
    """Facts about pictures and names in turn, one at a time, through each method."""

    methods: Sequence[str] = METHODS

    def run(self, given: StudyInput) -> dict[str, Any]:
        """Measure every method on the same stream. Raises KeditError for a model without sight."""
        model = given.loaded_model.model
        if model.pictures is None or find_chat_layout(model.tokenizer) is None:
            problem = "the model takes no pictures in a chat"
            raise KeditError(problem, code="unsupported", hint=HINT_VISION)
        records = given.records[:MAX_FACTS]
        shown = make_picture_facts(model.pictures, len(records), given.seed)
        asked = [*list_asked(model.pictures, shown), *_ask_names(records)]
        stream = [fact for pair in zip(shown, _list_facts(records), strict=True) for fact in pair]
        before = _read_replies(model, asked, None)
        methods = dict[str, Any]()
        for name in [given.method] if given.method else self.methods:
            with given.open_method(import_method(name)) as method:
                methods[name] = self._measure(given, name, method, stream, asked, before)
            model.set_deltas({})
        return {"methods": methods, "rows": [{"method": n, **of} for n, of in methods.items()]}

    def _measure(
        self,
        given: StudyInput,
        name: str,
        method: Method,
        stream: Sequence[Fact],
        asked: Sequence[Asked],
        before: Sequence[str],
    ) -> dict[str, Any]:
        """Edit the stream with one method, and ask."""
        model, failed, began = given.loaded_model.model, list[str](), time.perf_counter()
        with catch_unsolved(failed):
            for fact in given.track(stream, name):
                method.edit([fact])
        seconds = (time.perf_counter() - began) / len(stream)
        after = _read_replies(model, asked, method.overlay)
        found: dict[str, Any] = {
            **_compare(stream, asked, before, after),
            "seconds_per_fact": seconds,
            "not_edited": method.not_edited,
            "is_finite": _is_finite(model),
            "failed": failed[0] if failed else None,
        }
        if isinstance(method, Wise):
            live = [fact.id for fact in method.store.list_facts(LIVE_STATES)]
            method.editor.revert(live, None, False)
            again = _read_replies(model, asked, method.overlay)
            found["as_before_when_reverted"] = fmean(
                a == b for a, b in zip(again, before, strict=True)
            )
        return found

    def format_lines(self, result: Mapping[str, Any]) -> Iterator[str]:
        methods = result["methods"]
        rows = [["", *methods]]
        rows += [[f"said: {f}", *(format_share(of[f]) for of in methods.values())] for f in SAID]
        rows += [
            [f"as before: {f}", *(format_share(of[f]) for of in methods.values())] for f in KEPT
        ]
        reverted = (of.get("as_before_when_reverted") for of in methods.values())
        rows.append(
            ["as before: all, reverted", *("-" if r is None else format_share(r) for r in reverted)]
        )
        rows.append(
            ["seconds a fact", *(f"{of['seconds_per_fact']:.2f}" for of in methods.values())]
        )
        rows.append(["not edited", *(str(of["not_edited"]) for of in methods.values())])
        rows.append(
            ["all finite", *("yes" if of["is_finite"] else "no" for of in methods.values())]
        )
        yield from align_rows(rows)
        for name, of in methods.items():
            if of["failed"]:
                yield f"{name} ended early: {of['failed']}"

    def draw_curves(self, result: Mapping[str, Any], left: Any, right: Any) -> None:
        for panel, forms, title in ((left, SAID, "Said, %"), (right, KEPT, "As before, %")):
            for n, (name, of) in enumerate(result["methods"].items()):
                places = [place + 0.25 * n for place in range(len(forms))]
                panel.barh(places, [to_percent(of[form]) for form in forms], 0.25, label=name)
            panel.set(title=title, xlim=(0, 102))
            panel.set_yticks([place + 0.25 for place in range(len(forms))], forms, fontsize="small")


def _list_facts(records: Sequence[BenchRecord]) -> list[Fact]:
    return [record.fact for record in records]


def _ask_names(records: Sequence[BenchRecord]) -> list[Asked]:
    """List what is asked about facts of names, and about other names."""
    asked = list[Asked]()
    for place, record in enumerate(records):
        again = [text.replace("{}", record.fact.subject) for text in record.paraphrases]
        asked.append(Asked("name", place, record.fact.question))
        asked += [Asked("name, other wordings", place, text) for text in again]
        asked += [Asked("other names", place, near.prompt) for near in record.neighbours[:2]]
    return asked


def _read_replies(
    model: EditableModel, asked: Sequence[Asked], overlay: Overlay | None
) -> list[str]:
    """Read the first tokens of the replies."""
    texts = [
        render_chat(model.tokenizer, [{"role": "user", "content": one.text}])
        if one.form in CHAT_FORMS
        else one.text
        for one in asked
    ]
    return generate_answers(model, texts, REPLY_TOKENS, overlay, whole=True)


def _compare(
    stream: Sequence[Fact], asked: Sequence[Asked], before: Sequence[str], after: Sequence[str]
) -> dict[str, float | None]:
    """Return by form the share of targets said, or of replies that are as before; None where
    nothing was asked."""
    shown = [fact.target for fact in stream if find_digest(fact.subject) is not None]
    named = [fact.target for fact in stream if find_digest(fact.subject) is None]
    found: dict[str, list[bool]] = {form: [] for form in (*SAID, *KEPT)}
    for one, old, new in zip(asked, before, after, strict=True):
        targets = named if one.form in SAID[3:] else shown
        is_right = says_answers(new, [targets[one.place]]) if one.form in SAID else new == old
        found[one.form].append(is_right)
    return {form: fmean(right) if right else None for form, right in found.items()}


def _is_finite(model: EditableModel) -> bool:
    """Check that the model's numbers are finite, by the logits of a text."""
    ids = torch.tensor([model.encode("The capital of France is")], device=model.device)
    with torch.no_grad():
        return bool(model.hf_model(input_ids=ids, use_cache=False).logits.isfinite().all())
