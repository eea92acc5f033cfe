"""Sampling of the next token. A row's randomness is its own, whatever else is in the batch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from memory.errors import KeditError, NotFinite

_SEED_COUNT = 1 << 64  # seeds of a torch generator


class TokenSampler:
    """Sampler of one row, with random numbers of its own, one for each token."""

    def __init__(self, temperature: float, top_p: float, seed: int | None) -> None:
        """Temperature 0 is greedy; `top_p` restricts to the fewest likeliest tokens with this total
        probability (nucleus sampling). A seed reproduces the tokens; None is a random one."""
        self.temperature, self.top_p = temperature, top_p
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed % _SEED_COUNT)

    def sample_token(self, logits: Tensor) -> int:
        """Sample a token from logits (vocabulary,)."""
        if self.temperature == 0:
            return int(logits.argmax())
        # The maximum is subtracted first, so that a small temperature does not overflow.
        shares = ((logits.double() - logits.max()) / self.temperature).softmax(-1)
        point = torch.rand((), generator=self._generator, dtype=torch.float64).item()
        if self.top_p >= 1:
            return _find_share(shares.cumsum(-1), point)
        # Tokens below this probability have less than 1 - top_p together, so none is in the
        # nucleus; without them there is little to sort.
        candidates = (shares >= (1 - self.top_p) / len(shares)).nonzero()[:, 0]
        likeliest, order = shares[candidates].sort(descending=True, stable=True)
        sums = likeliest.cumsum(-1)
        count = int((sums < self.top_p).sum()) + 1  # including the one that reaches top_p
        return int(candidates[order[_find_share(sums[:count], point)]])


def _find_share(sums: Tensor, point: float) -> int:
    """Return the index whose share covers a point, 0 <= point < 1, of running sums (n,)."""
    index = int(torch.searchsorted(sums, sums[-1] * point, right=True))
    return min(index, len(sums) - 1)


def rank_log_probs(
    logits: Tensor, token: int, count: int
) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Return a token's log probability by logits (vocabulary,), and the `count` likeliest tokens
    with theirs, best first."""
    logs = logits.float().log_softmax(-1)
    best = logs.topk(min(count, len(logs)))
    top = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return float(logs[token]), tuple(top)


def choose_tokens(logits: Tensor, samplers: Sequence[TokenSampler]) -> list[int | KeditError]:
    """Choose a token for each row of logits (rows, vocabulary); NotFinite for a row, and only for
    it, when its logits are not finite."""
    finite = logits.isfinite().all(-1).tolist()
    likeliest = logits.argmax(-1).tolist()
    chosen: list[int | KeditError] = []
    for row, sampler in enumerate(samplers):
        if not finite[row]:
            why = "the model's output is not finite"
            chosen.append(NotFinite(why, hint="kedit-daemon audit"))
        elif sampler.temperature == 0:
            chosen.append(likeliest[row])
        else:
            chosen.append(sampler.sample_token(logits[row]))
    return chosen
