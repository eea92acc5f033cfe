import math

import pytest
from tiny_models import SENTENCES

from memory.model.canary import Canary
from memory.model.editable import EditableModel
from policies.rounding import WIDTHS, find_equal_rounding, measure_rounding

TABLE = {8: 0.0016, 7: 0.0071, 6: 0.0297, 5: 0.104, 4: 0.481}


def test_each_row_of_the_table_is_as_much_as_itself() -> None:
    assert [find_equal_rounding(kl, TABLE) for kl in TABLE.values()] == [8.0, 7.0, 6.0, 5.0, 4.0]


def test_between_two_rows_the_bits_are_interpolated_in_the_logarithm() -> None:
    assert find_equal_rounding(math.sqrt(TABLE[6] * TABLE[7]), TABLE) == 6.5
    assert find_equal_rounding(0.05, TABLE) == pytest.approx(5.6, abs=0.05)


def test_beyond_the_table_a_bit_is_a_factor_of_four() -> None:
    assert find_equal_rounding(TABLE[8] / 16, TABLE) == 10.0
    assert find_equal_rounding(TABLE[4] * 4, TABLE) == 3.0
    assert find_equal_rounding(1e-30, TABLE) == 16.0
    assert find_equal_rounding(1e30, TABLE) == 1.0


def test_a_table_that_does_not_fall_everywhere_is_read_from_the_fewest_bits_on() -> None:
    assert find_equal_rounding(0.02, {8: 0.01, 7: 0.04, 6: 0.04, 5: 0.02, 4: 0.2}) == 5.0


@pytest.mark.parametrize("kl", [0.0, math.nan, math.inf])
def test_no_change_and_no_number_are_as_much_as_no_rounding(kl: float) -> None:
    assert find_equal_rounding(kl, TABLE) is None


def test_without_a_table_nothing_is_said() -> None:
    assert find_equal_rounding(0.01, {}) is None
    assert find_equal_rounding(0.01, dict.fromkeys(WIDTHS, 0.0)) is None


def test_fewer_bits_change_more_and_leave_no_trace(model: EditableModel) -> None:
    statements = [" ".join(line.split()[:4]) for line in SENTENCES[:60]]
    canary = Canary(model, SENTENCES[:8], [1], statements)
    before = model.weights_hash(range(model.layer_count))
    effects = measure_rounding(canary)
    assert [effect.bits for effect in effects] == list(WIDTHS)
    kls = [effect.kl for effect in effects]
    assert 0 < kls[0] < min(kls[1:])
    assert kls[-1] > 16 * kls[0]
    assert effects[-1].perplexity_ratio != 1
    assert effects[-1].activation_change > 0
    assert model.weights_hash(range(model.layer_count)) == before
    assert canary.measure_health().kl == 0
