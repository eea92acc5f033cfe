import math

import pytest

from policies.norm_anchor import anchor, too_long


def test_the_longest_are_left_out_of_an_anchor() -> None:
    assert anchor([2.0] * 19 + [100.0]) == 2.0
    assert anchor([1.0, 3.0]) == 2.0  # too few to leave one out
    with pytest.raises(ValueError, match="no lengths"):
        anchor([])


def test_a_target_beyond_two_anchors_is_refused_with_the_numbers() -> None:
    anchors = {1: 2.0, 2: 3.0}
    assert too_long({1: 4.0, 2: 6.0}, anchors) is None
    why = too_long({1: 4.0, 2: 6.5}, anchors)
    assert why == "the target in layer 2 is 6.50 long, more than 2 times the norm anchor 3.00"
    assert too_long({1: math.nan}, anchors) is not None


def test_without_an_anchor_nothing_is_refused() -> None:
    assert too_long({1: 1e9}, {}) is None
    assert too_long({1: 1e9}, {2: 1.0}) is None
