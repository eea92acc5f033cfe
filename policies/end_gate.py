"""The end gate: the least cosine of a prompt's end with a fact's end keys at which it may fire.

Ends of unrelated text have cosines of their own with the end keys, whose distribution depends on
the model: the gate is the quantile beyond which the share of them is the one that the user allows.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from memory.facts import Fact
from memory.side.side_memory import SideMemory
from policies.wise import compute_keys, read_prompt_ends

MIN_WORDS, MAX_WORDS = 3, 12  # of a piece of text
PROMPTS_PER_PASS = 64
QUANTILES = (0.5, 0.9, 0.99, 0.999)


@dataclass(frozen=True)
class EndGate:
    """The gate and its evidence: quantiles of the scores of pairs of a fact and a piece of text.

    false_routes: the share of these pairs that pass. passed: the share of paraphrases that pass to
    the fact that they ask for.
    """

    gate: float
    false_routes: float
    pairs: int
    scores: dict[float, float]
    passed: float

    def as_dict(self) -> dict[str, Any]:
        """Return the gate and its evidence as JSON-ready values."""
        return asdict(self)


def fit_end_gate(
    side: SideMemory,
    facts: Sequence[Fact],
    asked: Sequence[tuple[int, str]],
    text: Sequence[str],
    false_routes: float,
) -> EndGate:
    """Return the least gate that at most a share `false_routes` of the pairs of a fact and a piece
    of ordinary text pass, as if all text named the facts' subjects.

    asked: paraphrases, each with the index of its fact. text: lines, whose starts are read.
    """
    keys = compute_keys(side.model, side, facts)
    end_keys = [keys[fact.id].end for fact in facts]
    pieces = [_cut_line_start(line, number) for number, line in enumerate(text)]
    scores = _score_prompts(side, pieces, end_keys).flatten().sort().values
    beyond = int(false_routes * len(scores))  # scores that may lie above the gate
    gate = min(float(scores[len(scores) - 1 - beyond].nextafter(torch.tensor(2.0))), 1.0)
    owners, prompts = zip(*asked, strict=True)
    own_scores = _score_prompts(side, prompts, end_keys)[range(len(prompts)), list(owners)]
    return EndGate(
        gate,
        beyond / len(scores),
        len(scores),
        {share: float(scores[int(share * (len(scores) - 1))]) for share in QUANTILES},
        float((own_scores >= gate).float().mean()),
    )


def _cut_line_start(line: str, number: int) -> str:
    """Return a line's first words, their number varying by line, so that pieces end anywhere."""
    return " ".join(line.split()[: MIN_WORDS + number % (MAX_WORDS - MIN_WORDS + 1)])


def _score_prompts(side: SideMemory, prompts: Sequence[str], keys: Sequence[Tensor]) -> Tensor:
    """Return cosines (prompts, facts) of the prompts' ends with each fact's nearest end key."""
    ends = []
    for first in range(0, len(prompts), PROMPTS_PER_PASS):
        part = prompts[first : first + PROMPTS_PER_PASS]
        _, outputs = read_prompt_ends(side.model, part, side.layer)
        ends.append(side.compute_keys(side.layer, outputs).cpu())
    return torch.stack([(torch.cat(ends) @ own.T).amax(1) for own in keys], dim=1)
