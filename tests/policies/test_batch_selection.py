import torch
from torch import Tensor

from policies.batch_selection import limit_total_size, select_members


def key(*degrees: float) -> Tensor:
    angle = torch.deg2rad(torch.tensor(degrees))
    return torch.stack([angle.cos(), angle.sin()], 1)


KEYS = {"a": key(0), "b": key(90), "c": key(10), "d": key(120, 5), "e": key(30)}


def test_the_oldest_comes_with_those_most_like_it() -> None:
    assert select_members([], list("abcde"), KEYS, 3) == [
        "a",
        "d",
        "c",
    ]  # the nearest key of each counts
    assert select_members([], list("abcde"), KEYS, 9) == ["a", "d", "c", "e", "b"]


def test_what_was_sent_for_a_batch_goes_first() -> None:
    assert select_members(["y", "x"], list("abc"), KEYS, 3) == ["y", "x", "a"]
    assert select_members(["z", "y", "x"], list("abc"), KEYS, 2) == ["z", "y"]
    assert select_members(["y"], [], KEYS, 3) == ["y"]


def test_of_facts_equally_alike_the_older_goes_first() -> None:
    keys = {"a": key(0), "b": key(40), "c": key(40), "d": key(40)}
    assert select_members([], ["a", "c", "d", "b"], keys, 3) == ["a", "c", "d"]
    assert select_members([], ["x", "c", "d"], keys, 2) == ["x", "c"]  # the oldest has no keys
    assert select_members([], ["a", "x", "b"], keys, 2) == ["a", "b"]


def test_memory_bounds_a_batch_to_its_first_facts() -> None:
    sizes = {"a": 40, "b": 40, "c": 10}
    assert limit_total_size("abc", sizes, 90) == ["a", "b", "c"]
    assert limit_total_size("abc", sizes, 89) == ["a", "b"]
    assert limit_total_size("abc", sizes, 1) == ["a"]
    assert limit_total_size("", sizes, 1) == []
