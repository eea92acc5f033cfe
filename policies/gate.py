"""The end gate: how near a prompt's end must be to a fact's own before the fact may fire.

Ends of text that has nothing to do with a fact have cosines of their own with its end keys, and how
these spread is the model's: the gate is set where so few of them lie beyond as the user allows.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from memory.facts import Fact
from memory.side.side_memory import SideMemory
from policies.wise import compute_keys, read_prompt_ends

MIN_WORDS, MAX_WORDS = 3, 12  # words of a piece of text
PROMPTS_PER_PASS = 64
QUANTILES = (0.5, 0.9, 0.99, 0.999)


@dataclass(frozen=True)
class EndGate:
    """The gate, and what it was set by: the scores of `pairs` of a fact and a piece of text, of
    which a share `false_routes` passes. `passed`: the share of prompts in other words that pass to
    the fact that they ask for."""

    gate: float
    false_routes: float
    pairs: int
    scores: dict[float, float]
    passed: float

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def fit_end_gate(
    side: SideMemory,
    facts: Sequence[Fact],
    asked: Sequence[tuple[int, str]],
    text: Sequence[str],
    false_routes: float,
) -> EndGate:
    """The least gate that lets at most a share `false_routes` of the pairs of a fact and a piece of
    ordinary text pass, as if all of it named the facts' subjects. `text`: lines, of which the
    starts are read; `asked`: prompts in other words, each with the place of its fact."""
    keys = compute_keys(side.model, side, facts)
    pieces = [_cut_line_start(line, number) for number, line in enumerate(text)]
    scores = _score_prompts(side, pieces, [keys[f.id].end for f in facts]).flatten().sort().values
    # At most `beyond` scores are allowed above the gate.
    beyond = int(false_routes * len(scores))
    gate = min(float(scores[len(scores) - 1 - beyond].nextafter(torch.tensor(2.0))), 1.0)
    owners, prompts = zip(*asked, strict=True)
    found = _score_prompts(side, prompts, [keys[f.id].end for f in facts])
    passed = found[range(len(prompts)), list(owners)] >= gate
    return EndGate(
        gate,
        beyond / len(scores),
        len(scores),
        {share: float(scores[int(share * (len(scores) - 1))]) for share in QUANTILES},
        float(passed.float().mean()),
    )


def _cut_line_start(line: str, number: int) -> str:
    """A line's first words: another number of them for each line, so that pieces end anyhow."""
    return " ".join(line.split()[: MIN_WORDS + number % (MAX_WORDS - MIN_WORDS + 1)])


def _score_prompts(side: SideMemory, prompts: Sequence[str], keys: Sequence[Tensor]) -> Tensor:
    """Cosines (prompts, facts) of the prompts' ends with the nearest of each fact's end keys."""
    ends = []
    for at in range(0, len(prompts), PROMPTS_PER_PASS):
        _, outputs = read_prompt_ends(side.model, prompts[at : at + PROMPTS_PER_PASS], side.layer)
        ends.append(side.compute_keys(side.layer, outputs).cpu())
    return torch.stack([(torch.cat(ends) @ own.T).amax(1) for own in keys], dim=1)
