import torch
from torch import Tensor

from policies.batch_selection import members, within


def key(*degrees: float) -> Tensor:
    angle = torch.deg2rad(torch.tensor(degrees))
    return torch.stack([angle.cos(), angle.sin()], 1)


KEYS = {"a": key(0), "b": key(90), "c": key(10), "d": key(120, 5), "e": key(30)}


def test_the_oldest_comes_with_those_most_like_it() -> None:
    assert members([], list("abcde"), KEYS, 3) == ["a", "d", "c"]  # the nearest key of each counts
    assert members([], list("abcde"), KEYS, 9) == ["a", "d", "c", "e", "b"]


def test_what_was_sent_for_a_batch_goes_first() -> None:
    assert members(["y", "x"], list("abc"), KEYS, 3) == ["y", "x", "a"]
    assert members(["z", "y", "x"], list("abc"), KEYS, 2) == ["z", "y"]
    assert members(["y"], [], KEYS, 3) == ["y"]


def test_of_facts_equally_alike_the_older_goes_first() -> None:
    keys = {"a": key(0), "b": key(40), "c": key(40), "d": key(40)}
    assert members([], ["a", "c", "d", "b"], keys, 3) == ["a", "c", "d"]
    assert members([], ["x", "c", "d"], keys, 2) == ["x", "c"]  # the oldest has no keys
    assert members([], ["a", "x", "b"], keys, 2) == ["a", "b"]


def test_memory_bounds_a_batch_to_its_first_facts() -> None:
    sizes = {"a": 40, "b": 40, "c": 10}
    assert within("abc", sizes, 90) == ["a", "b", "c"]
    assert within("abc", sizes, 89) == ["a", "b"]
    assert within("abc", sizes, 1) == ["a"]
    assert within("", sizes, 1) == []
