import math

import pytest

from policies.norm_anchor import check_target_length, compute_anchor


def test_the_longest_are_left_out_of_an_anchor() -> None:
    assert compute_anchor([2.0] * 19 + [100.0]) == 2.0
    assert compute_anchor([1.0, 3.0]) == 2.0  # too few to leave one out
    with pytest.raises(ValueError, match="no lengths"):
        compute_anchor([])


def test_a_target_beyond_two_anchors_is_refused_with_the_numbers() -> None:
    anchors = {1: 2.0, 2: 3.0}
    assert check_target_length({1: 4.0, 2: 6.0}, anchors) is None
    why = check_target_length({1: 4.0, 2: 6.5}, anchors)
    assert why == "the target in layer 2 is 6.50 long, more than 2 times the norm anchor 3.00"
    assert check_target_length({1: math.nan}, anchors) is not None


def test_without_an_anchor_nothing_is_refused() -> None:
    assert check_target_length({1: 1e9}, {}) is None
    assert check_target_length({1: 1e9}, {2: 1.0}) is None
