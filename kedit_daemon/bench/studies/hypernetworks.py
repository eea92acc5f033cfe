"""Editors that add update to update, without and with the daemon's guard around them.

The question of the reports on hypernetworks (logits of NaN after a few sequential edits): where a
stream of single edits ends for each editor, where the guard would have stopped it, and what the
daemon makes of the same facts.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kedit_daemon.bench.measure import COLUMNS, BaseAnswers, read_base_answers
from kedit_daemon.bench.methods.daemon_tiers import Auto, build_config
from kedit_daemon.bench.methods.edit_guard import EditGuard, is_whole
from kedit_daemon.bench.methods.method import Method
from kedit_daemon.bench.methods.method_catalog import import_method
from kedit_daemon.bench.methods.stacking import StackingMethod
from kedit_daemon.bench.plot import to_percent
from kedit_daemon.bench.scoring import check_stated
from kedit_daemon.bench.studies.shared import (
    catch_unsolved,
    format_column_cells,
    format_column_heads,
    measure_columns,
)
from kedit_daemon.bench.studies.study import Study, StudyInput
from kedit_daemon.bench.table import align_rows, format_share
from kedit_daemon.editing.audit import make_thresholds
from kedit_daemon.editing.model_loading import CanaryTexts, read_canary_texts
from memory.errors import NotFinite, Rejected
from memory.facts import Fact
from memory.model.canary import Canary
from memory.model.generate import Overlay

EDITORS = ("ft", "rome", "r-rome", "mend", "malmen", "ultraedit")
DAEMON = "daemon"
SLOW_EDITORS = ("ft", "rome", "r-rome")  # each edit takes many passes
ASKED_FACTS = 50  # the first ones of the stream, whose logits are read
CANARY_LINES = 12  # of ordinary text, where an audit of the daemon reads all


@dataclass(frozen=True)
class HypernetworkStudy(Study):
    """Streams of single edits: each editor without and with the guard, and the daemon.

    max_slow_facts: facts of a stream that takes seconds a fact: of slow editors, and with a guard,
    which measures the model after every edit.
    """

    editors: Sequence[str] = EDITORS
    curve_points: int = 10  # of each curve, about
    max_slow_facts: int = 60
    texts: CanaryTexts | None = None  # that the model reads; otherwise the first shipped ones

    def run(self, given: StudyInput) -> dict[str, Any]:
        """Measure each stream's curve, and its columns where it ends."""
        loaded, model = given.loaded_model, given.loaded_model.model
        before = read_base_answers(model, given.records, given.track)
        shipped = read_canary_texts()
        texts = self.texts or replace(shipped, lines=shipped.lines[:CANARY_LINES])
        canary = Canary(model, texts.lines, loaded.layers, texts.statements)
        streams = [(name, guarded) for name in self.editors for guarded in (False, True)]
        rows, ends = list[dict[str, Any]](), list[dict[str, Any]]()
        for name, guarded in [*streams, (DAEMON, True)]:
            is_slow = guarded or name in SLOW_EDITORS
            count = min(len(given.records), self.max_slow_facts if is_slow else 1 << 30)
            part = replace(given, records=given.records[:count])
            stream = _EditStream(part, name, guarded, before[:count], canary)
            end = stream.run(-(-count // self.curve_points))
            rows += stream.rows
            ends.append(end)
            model.set_deltas({})
        return {"ends": ends, "rows": rows}

    def format_lines(self, result: Mapping[str, Any]) -> Iterator[str]:
        rows = [["editor", "edits", "kept", "‖W‖", "perplexity", "logit", "|y|"]]
        rows[0] += ["update", "gradient", "stated"]
        for row in result["rows"]:
            figures = [row[name] for name in FIGURES]
            cells = ["-" if figure is None else f"{figure:.4g}" for figure in figures]
            counts = [str(row["edits"]), str(row["kept"])]
            rows.append([_name_way(row), *counts, *cells, format_share(row["stated_strict"])])
        yield from align_rows(rows)
        yield ""
        ends = [["at the end", "edits", "kept", *format_column_heads(COLUMNS)]]
        for end in result["ends"]:
            cells = format_column_cells(end["columns"]) if end["columns"] else ["-"] * 6
            ends.append([_name_way(end), str(end["edits"]), str(end["kept"]), *cells])
        yield from align_rows(ends)
        yield ""
        yield "‖W‖: the largest, to W0's; update: the largest of an edit, to ‖W0‖"
        yield "|y|: the largest number that an MLP writes; float16 ends at 65,504"
        for end in result["ends"]:
            if end["failed"]:
                yield f"{_name_way(end)}: ended early: {end['failed']}"
            if end["first_reason"]:
                yield f"{_name_way(end)}: edit {end['first_refused']}: {end['first_reason']}"

    def draw_curves(self, result: Mapping[str, Any], left: Any, right: Any) -> None:
        ways = dict.fromkeys((row["editor"], row["guarded"]) for row in result["rows"])
        colors = {name: f"C{n}" for n, name in enumerate(dict.fromkeys(name for name, _ in ways))}
        for name, guarded in ways:
            rows = [r for r in result["rows"] if (r["editor"], r["guarded"]) == (name, guarded)]
            edits = [row["edits"] for row in rows]
            style, label = ("-", name) if guarded else (":", None)
            shares = [to_percent(row["stated_strict"]) for row in rows]
            for axes, values in ((left, [r["perplexity_ratio"] for r in rows]), (right, shares)):
                axes.plot(edits, values, style, marker=".", color=colors[name], label=label)
        left.set(xlabel="edits", title="Perplexity / base's (dotted: no guard)", yscale="log")
        right.set(xlabel="edits", ylabel="%", ylim=(-2, 102), title="Facts stated, of all so far")


FIGURES = (
    "norm_ratio",
    "perplexity_ratio",
    "largest_logit",
    "largest_output",
    "update_ratio",
    "gradient",
)


def _name_way(row: Mapping[str, Any]) -> str:
    name, guarded = row["editor"], row["guarded"]
    return f"{name}, guarded" if guarded and name != DAEMON else str(name)


class _EditStream:
    """One stream of single edits through an editor; `rows` has the points of its curve."""

    def __init__(
        self,
        given: StudyInput,
        name: str,
        guarded: bool,
        before: Sequence[BaseAnswers],
        canary: Canary,
    ) -> None:
        self.given, self.name, self.guarded, self.before = given, name, guarded, before
        self.canary = canary
        self.loaded = given.loaded_model
        self.model = self.loaded.model
        self.facts = [record.fact for record in given.records]
        self.rows: list[dict[str, Any]] = []
        # The largest since the last point; None of what an editor does not tell.
        self.update_ratio: float | None = None
        self.gradient: float | None = None
        self.refused: list[tuple[int, str]] = []  # number of the edit, and the reason

    def run(self, step: int) -> dict[str, Any]:
        """Edit fact by fact, and measure at every `step` edits. Return how the stream ends."""
        method = Auto if self.name == DAEMON else import_method(self.name)
        failed, edited, columns, kept = list[str](), 0, None, 0
        with catch_unsolved(failed), self.given.open_method(method) as editor:
            guard = self._build_guard(editor)
            for fact in self.given.track(self.facts, self._name()):
                edited += 1
                self._edit_fact(editor, guard, fact, edited)
                kept = edited - len(self.refused)
                kept -= editor.not_edited if guard is None else 0
                if edited % step == 0 or edited == len(self.facts):
                    self.rows.append(self._measure_point(editor, edited, kept))
            records = self.given.records
            columns = measure_columns(self.model, records, self.before, editor.overlay)
        number, reason = self.refused[0] if self.refused else (None, None)
        return {
            "editor": self.name,
            "guarded": self.guarded,
            "edits": edited,
            "kept": kept,
            "columns": columns,
            "failed": failed[0] if failed else None,
            "first_refused": number,
            "first_reason": reason,
        }

    def _name(self) -> str:
        return _name_way({"editor": self.name, "guarded": self.guarded})

    def _build_guard(self, editor: Method) -> EditGuard | None:
        if not self.guarded or not isinstance(editor, StackingMethod):
            return None  # the daemon has its own
        thresholds = make_thresholds(build_config(editor.setup), self.loaded.site)
        return EditGuard(editor, thresholds, self.canary)

    def _edit_fact(self, editor: Method, guard: EditGuard | None, fact: Fact, number: int) -> None:
        """Edit one fact. Raise NotFinite if it leaves a number that is not."""
        if not isinstance(editor, StackingMethod):
            editor.edit([fact])
            return
        kept = editor.deltas
        try:
            if guard is None:
                editor.edit([fact])
            elif (reason := guard.edit([fact])) is not None:
                self.refused.append((number, reason))
        except Rejected as error:  # it does not fit the model
            self.refused.append((number, str(error)))
            return
        if guard is None and editor.not_edited:
            raise NotFinite(f"after {number} edits an update is NaN or infinite")
        for layer, delta in editor.deltas.items():
            if not is_whole(delta):
                raise NotFinite(f"after {number} edits a weight is NaN or infinite")
            moved = (delta - kept[layer]).norm() / self.model.base_weight(layer).norm()
            self.update_ratio = max(self.update_ratio or 0.0, float(moved))
        if editor.last_gradient is not None:
            self.gradient = max(self.gradient or 0.0, editor.last_gradient)

    def _measure_point(self, editor: Method, edited: int, kept: int) -> dict[str, Any]:
        """Measure a row. Raise NotFinite if a logit is NaN or infinite."""
        logit, output = self._read_largest(editor.overlay)
        if not math.isfinite(logit):
            raise NotFinite(f"after {edited} edits a logit is NaN or infinite")
        health = self.canary.measure_health(editor.edited_layers)
        stated = check_stated(self.model, self.facts[:edited], editor.overlay)
        row = {
            "editor": self.name,
            "guarded": self.guarded,
            "edits": edited,
            "kept": kept,
            "norm_ratio": max(health.norm_ratio.values()),
            "perplexity_ratio": health.perplexity_ratio,
            "largest_logit": logit,
            "largest_output": output,
            "update_ratio": self.update_ratio,
            "gradient": self.gradient,
            "stated_strict": sum(stated) / edited,
        }
        self.update_ratio = self.gradient = None
        return row

    def _read_largest(self, overlay: Overlay | None) -> tuple[float, float]:
        """Read the largest |logit| where the first facts' prompts end, and the largest number that
        an MLP writes on them: float16 ends at 65,504."""
        logits, outputs = list[Tensor](), list[Tensor]()
        taps = {
            n: lambda _inputs, written: outputs.append(written.abs().amax())
            for n in range(self.model.layer_count)
        }
        with torch.no_grad(), self.model.tap_layers(taps):
            for fact in self.facts[:ASKED_FACTS]:
                ids = torch.tensor([self.model.encode(fact.question)], device=self.model.device)
                with overlay([0]) if overlay else nullcontext():
                    last = self.model.hf_model(input_ids=ids).logits[0, -1]
                logits.append(last.abs().amax())
        return float(torch.stack(logits).amax()), float(torch.stack(outputs).amax())
