"""Which token comes next. A row's chance is its own: company in the batch does not move it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from memory.errors import KeditError, NotFinite

_SEED_COUNT = 1 << 64  # what a generator takes


class TokenSampler:
    """How one row's tokens are drawn, with the row's own random numbers, one for each token."""

    def __init__(self, temperature: float, top_p: float, seed: int | None) -> None:
        """temperature 0: always the likeliest token; top_p: only the fewest likeliest tokens that
        have this share together. The same seed draws the same; None: never twice the same."""
        self.temperature, self.top_p = temperature, top_p
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed % _SEED_COUNT)

    def sample_token(self, logits: Tensor) -> int:
        """A token for logits (vocabulary,)."""
        if self.temperature == 0:
            return int(logits.argmax())
        # The likeliest becomes 0 first: a small temperature makes nothing too large.
        shares = ((logits.double() - logits.max()) / self.temperature).softmax(-1)
        at = torch.rand((), generator=self._generator, dtype=torch.float64).item()
        if self.top_p >= 1:
            return _find_share(shares.cumsum(-1), at)
        # Tokens below this share are too few, all together, to be among those that reach top_p;
        # without them there is little to sort.
        able = (shares >= (1 - self.top_p) / len(shares)).nonzero()[:, 0]
        likeliest, order = shares[able].sort(descending=True, stable=True)
        sums = likeliest.cumsum(-1)
        fewest = int((sums < self.top_p).sum()) + 1  # the one that reaches top_p is among them
        return int(able[order[_find_share(sums[:fewest], at)]])


def _find_share(sums: Tensor, at: float) -> int:
    """The place whose share covers a point of the whole: running sums (n,), 0 <= at < 1."""
    found = int(torch.searchsorted(sums, sums[-1] * at, right=True))
    return min(found, len(sums) - 1)


def rank_log_probs(
    logits: Tensor, token: int, most: int
) -> tuple[float, tuple[tuple[int, float], ...]]:
    """The logarithm of a token's probability by logits (vocabulary,), and the likeliest `most`
    tokens with theirs, best first."""
    logs = logits.float().log_softmax(-1)
    best = logs.topk(min(most, len(logs)))
    top = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return float(logs[token]), tuple(top)


def choose_tokens(logits: Tensor, chances: Sequence[TokenSampler]) -> list[int | KeditError]:
    """A token for each row of logits (rows, vocabulary), or why there is none: an error of the
    code "non-finite" is that row's alone."""
    finite = logits.isfinite().all(-1).tolist()
    likeliest = logits.argmax(-1).tolist()
    found: list[int | KeditError] = []
    for row, chance in enumerate(chances):
        if not finite[row]:
            why = "the model's output is not finite"
            found.append(NotFinite(why, hint="kedit-daemon audit"))
        elif chance.temperature == 0:
            found.append(likeliest[row])
        else:
            found.append(chance.sample_token(logits[row]))
    return found
