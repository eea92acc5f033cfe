from policies.prompts import TokenRow
from policies.row_group import MAX_PADS, PASS_TOKENS, ROWS_PER_PASS, group_by_target, split_passes


def target(tokens: int) -> TokenRow:
    return TokenRow((5,) * (3 + tokens), 3, 2)


def count_lengths(rows: list[TokenRow]) -> list[dict[int, int]]:
    """Return, by group, the number of rows by the length of their targets."""
    groups = group_by_target([(0, row) for row in rows])
    lengths = [[len(row.target) for _, row in group] for group in groups]
    return [{n: group.count(n) for n in group} for group in lengths]


def test_rows_of_few_pads_share_a_pass_over_the_weights() -> None:
    assert count_lengths([target(2), target(1), target(3), target(1)]) == [{1: 2, 2: 1, 3: 1}]


def test_rows_whose_pads_cost_more_than_a_pass_run_apart() -> None:
    short = [target(1)] * (PASS_TOKENS // 4)
    assert count_lengths([*short, target(5)]) == [{1: len(short)}, {5: 1}]
    assert count_lengths([*short[1:], target(5)]) == [{1: len(short) - 1, 5: 1}]


def test_pads_count_to_the_longest_of_all_that_would_join() -> None:
    short = [target(1)] * (PASS_TOKENS // 2)
    assert count_lengths([*short, target(2), target(3)]) == [{1: len(short), 2: 1}, {3: 1}]


def test_long_prompts_begin_a_pass_of_their_own() -> None:
    lengths = [5, 6, 5 + MAX_PADS, 6 + MAX_PADS, 90]
    assert split_passes(lengths) == [slice(0, 3), slice(3, 4), slice(4, 5)]


def test_a_pass_has_few_rows() -> None:
    lengths = [7] * (ROWS_PER_PASS + 1)
    assert split_passes(lengths) == [slice(0, ROWS_PER_PASS), slice(ROWS_PER_PASS, len(lengths))]
