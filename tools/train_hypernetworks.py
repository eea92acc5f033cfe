"""Trains MEND's and MALMEN's networks for a model:
`python -m tools.train_hypernetworks mend|malmen shipped zsre_train_10000.json`.

Each step edits the unedited model with facts of MEND's form and asks for them in another wording
(the edit's loss), and for what must not change (the divergence on `loc`).
"""

import json
import random
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kedit_daemon.bench.methods.gradient_editors import Malmen, Mend
from kedit_daemon.bench.methods.gradient_pairs import (
    GradientPairs,
    choose_last_layers,
    read_gradient_pairs,
)
from kedit_daemon.bench.methods.hypernetwork import Hypernetwork, save_hypernetwork
from kedit_daemon.bench.scoring import compute_target_losses
from kedit_daemon.editing.known_measurements import locate_known
from kedit_daemon.editing.model_loading import open_model
from memory.model.editable import EditableModel, Tap
from policies.prompts import TokenRow, pad_rows

RANK = 48
STEPS, RATE, RATES_RATE = 300, 5e-4, 1e-2  # RATES_RATE: of the layers' own rates and ridges
EDIT_WEIGHT, KEEP_WEIGHT = 1.0, 1.0  # of the edits' loss, of the divergence
MAX_GRADIENT = 1.0
FIT_FACTS = 256  # for means and deviations of the inputs
BATCH_FACTS = 12
START_RATES = {"mend": 1e-3, "malmen": 1e-3}  # of the updates
MAX_TOKENS = 48  # of a row; longer records are left out


@dataclass(frozen=True)
class Lesson:
    """A fact's row, the same in another wording, and a row that must not change."""

    stated: TokenRow
    reworded: TokenRow
    kept: TokenRow

    @property
    def rows(self) -> tuple[TokenRow, TokenRow, TokenRow]:
        return self.stated, self.reworded, self.kept


def read_lessons(model: EditableModel, file: Path) -> list[Lesson]:
    """Read the records of a file in MEND's form that are short enough."""
    lessons = []
    for record in json.loads(file.read_bytes()):
        texts = [(record["src"], record["alt"]), (record["rephrase"], record["alt"])]
        texts.append((record["loc"].removeprefix("nq question: "), record["loc_ans"]))
        rows = [_make_row(model, *text) for text in texts]
        if all(len(row.ids) <= MAX_TOKENS for row in rows):
            lessons.append(Lesson(*rows))
    return lessons


def _make_row(model: EditableModel, prompt: str, target: str) -> TokenRow:
    ids, said = model.encode(prompt), model.encode_target(prompt, target)
    end = [] if model.end_token is None else [model.end_token]
    return TokenRow((*ids, *said, *end), len(ids), len(ids) - 1)


class NetworkTraining:
    """Training of one network on batches of lessons."""

    def __init__(self, model: EditableModel, lessons: Sequence[Lesson], kind: str) -> None:
        self.model, self.kind = model, kind
        self.answers_only = {"mend": Mend, "malmen": Malmen}[kind].answers_only
        layers = choose_last_layers(model)
        size = model.base_weight(layers[0]).shape[1] + model.hidden_size
        self.network = Hypernetwork(layers, size, RANK, START_RATES[kind])
        pairs = self._read_pairs(lessons[:FIT_FACTS])
        for place, n in enumerate(layers):
            self.network.fit_inputs(place, pairs[n].keys, pairs[n].gradients)
        scalars = [self.network.log_rates, self.network.log_ridges]
        blocks = [*self.network.blocks.parameters()]
        groups = [{"params": blocks, "lr": RATE}, {"params": scalars, "lr": RATES_RATE}]
        self.optimiser = torch.optim.Adam(groups)

    def _read_pairs(self, lessons: Sequence[Lesson]) -> dict[int, GradientPairs]:
        rows = [lesson.stated for lesson in lessons]
        layers = self.network.layers
        return read_gradient_pairs(self.model, layers, rows, answers_only=self.answers_only)[0]

    def learn_batch(self, lessons: Sequence[Lesson]) -> tuple[float, float]:
        """Take a step. Return the edits' loss and the divergence before it."""
        pairs = self._read_pairs(lessons)
        rows = [row for lesson in lessons for row in lesson.rows]
        owners = torch.arange(len(lessons)).repeat_interleave(3)  # the lesson of each row
        with torch.no_grad():
            before = self._compute_logits(rows, {})
        taps = {
            n: partial(self._make_shift(place, pairs[n]), owners)
            for place, n in enumerate(self.network.layers)
        }
        after = self._compute_logits(rows, taps)
        kept = range(2, len(rows), 3)
        edited = [n for n in range(len(rows)) if n not in kept]
        loss = compute_target_losses(after[edited], [rows[n] for n in edited]).mean()
        moved = torch.stack([_diverge(before[n], after[n], rows[n]) for n in kept]).mean()
        self.optimiser.zero_grad()
        (EDIT_WEIGHT * loss + KEEP_WEIGHT * moved).backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), MAX_GRADIENT)
        self.optimiser.step()
        return float(loss.detach()), float(moved.detach())

    def _make_shift(self, place: int, pairs: GradientPairs) -> Any:
        """Return the function of owners, inputs and outputs that adds the edits' update."""
        if self.kind == "malmen":  # one for all
            update = self.network.compute_malmen_update(place, pairs.keys, pairs.gradients)
            return lambda _owners, inputs, outputs: outputs + inputs @ update.T
        up, down = self.network.compute_mend_factors(place, pairs.keys, pairs.gradients)

        def add_own(owners: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor:
            is_own = owners[:, None] == pairs.owners  # (rows, tokens of all edits)
            return outputs + (inputs @ down.T * is_own[:, None]) @ up

        return add_own

    def _compute_logits(self, rows: Sequence[TokenRow], taps: dict[int, Tap]) -> Tensor:
        width = max(len(row.ids) for row in rows)
        batch = pad_rows(list(rows), width, self.model.end_token or 0, self.model.device)
        with self.model.tap_layers(taps):
            logits: Tensor = self.model.hf_model(input_ids=batch.ids, use_cache=False).logits
        return logits


def _diverge(before: Tensor, after: Tensor, row: TokenRow) -> Tensor:
    """Return the mean KL(before ‖ after) where a row's target is predicted."""
    places = slice(row.prompt_length - 1, len(row.ids) - 1)
    was, now = before[places].log_softmax(-1), after[places].log_softmax(-1)
    return F.kl_div(now, was, log_target=True, reduction="batchmean")


def draw_batches(lessons: Sequence[Lesson], size: int, steps: int) -> Iterable[list[Lesson]]:
    """Draw random batches, the same for every run."""
    rng = random.Random(0)
    for _ in range(steps):
        yield rng.sample(lessons, size)


def train_network(kind: str, name: str, file: Path) -> Path:
    """Train a network on a data set, and keep it with what is known of the model."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        opened = open_model(name, "cpu", Path(folder))
        model = opened.model
        lessons = read_lessons(model, file)
        training = NetworkTraining(model, lessons, kind)
        for step, batch in enumerate(draw_batches(lessons, BATCH_FACTS, STEPS), 1):
            loss, moved = training.learn_batch(batch)
            if step % 20 == 0:
                print(f"step {step}: loss {loss:.3f}, divergence {moved:.3f}", flush=True)
        path = locate_known(opened.base_hash) / {"mend": Mend, "malmen": Malmen}[kind].network_file
        path.parent.mkdir(exist_ok=True)
        save_hypernetwork(training.network, path)
        return path


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] not in START_RATES:
        sys.exit(__doc__)
    print(train_network(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
