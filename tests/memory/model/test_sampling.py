import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from memory.errors import KeditError
from memory.model.sampling import TokenSampler, choose_tokens, rank_log_probs

SHARES = [0.5, 0.3, 0.15, 0.05]


def logits_of(*shares: float) -> Tensor:
    return torch.tensor(shares).log()


def drawn(chance: TokenSampler, logits: Tensor, times: int) -> list[int]:
    return [chance.sample_token(logits) for _ in range(times)]


def test_without_temperature_the_likeliest_is_taken() -> None:
    assert drawn(TokenSampler(0, 1.0, None), logits_of(0.3, 0.4, 0.3), 5) == [1] * 5


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (1.0, 1.0, SHARES),
        (0.5, 1.0, [0.25, 0.09, 0.0225, 0.0025]),
        (2.0, 1.0, [math.sqrt(s) for s in SHARES]),
        (1.0, 0.7, [0.5, 0.3]),
        (1.0, 0.81, [0.5, 0.3, 0.15]),
        (1.0, 0.0, [0.5]),
        (1e-9, 1.0, [0.5]),
    ],
)
def test_tokens_are_drawn_by_their_share(
    temperature: float, top_p: float, expected: list[float]
) -> None:
    order = [2, 0, 3, 1]  # not the order of the shares
    logits = torch.empty(4)
    logits[order] = logits_of(*SHARES)
    times = 2000
    counts = Counter(drawn(TokenSampler(temperature, top_p, 1), logits, times))
    assert counts.keys() == set(order[: len(expected)])
    for token, share in zip(order, expected, strict=False):
        assert counts[token] / times == pytest.approx(share / sum(expected), abs=0.04)


def test_the_share_is_reached_by_as_few_tokens_as_can_be() -> None:
    assert set(drawn(TokenSampler(1.0, 0.5, 1), torch.zeros(4), 100)) == {0, 1}


def test_a_seed_draws_the_same_again_and_another_one_does_not() -> None:
    logits = torch.zeros(1000)
    first = drawn(TokenSampler(1.0, 1.0, 7), logits, 10)
    assert drawn(TokenSampler(1.0, 1.0, 7), logits, 10) == first
    assert drawn(TokenSampler(1.0, 1.0, 8), logits, 10) != first
    assert drawn(TokenSampler(1.0, 1.0, None), logits, 10) != drawn(
        TokenSampler(1.0, 1.0, None), logits, 10
    )


@pytest.mark.parametrize("seed", [-1, 1 << 63, 1 << 80])
def test_any_whole_number_is_a_seed(seed: int) -> None:
    assert 0 <= TokenSampler(1.0, 1.0, seed).sample_token(torch.zeros(9)) < 9


def test_company_does_not_move_a_rows_chance() -> None:
    logits = torch.zeros(3, 1000)
    alone = [
        choose_tokens(logits[:1], [mine]) for mine in [TokenSampler(1.0, 0.9, 7)] for _ in range(5)
    ]
    mine, others = TokenSampler(1.0, 0.9, 7), [TokenSampler(1.0, 1.0, 1), TokenSampler(0, 1.0, 2)]
    among = [choose_tokens(logits, [others[0], mine, others[1]])[1] for _ in range(5)]
    assert [token for (token,) in alone] == among


def test_only_the_row_that_is_not_finite_fails() -> None:
    logits = logits_of(0.1, 0.9).repeat(4, 1)
    logits[1, 0], logits[2, 0] = math.nan, math.inf
    chances = [
        TokenSampler(0, 1.0, None),
        TokenSampler(0, 1.0, None),
        TokenSampler(1.0, 1.0, 1),
        TokenSampler(0, 1.0, 1),
    ]
    found = choose_tokens(logits, chances)
    assert [found[0], found[3]] == [1, 1]
    for error in found[1:3]:
        assert isinstance(error, KeditError) and error.code == "non-finite"


def test_a_tokens_likelihood_is_told_with_the_likeliest_ones() -> None:
    told, top = rank_log_probs(logits_of(*SHARES) + 5, 2, 2)
    assert told == pytest.approx(math.log(0.15))
    assert [token for token, _ in top] == [0, 1]
    assert [share for _, share in top] == pytest.approx([math.log(0.5), math.log(0.3)])
    assert rank_log_probs(logits_of(*SHARES), 0, 0)[1] == ()
    assert len(rank_log_probs(logits_of(*SHARES), 0, 20)[1]) == 4
