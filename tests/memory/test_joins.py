"""Joins of prompts and targets."""

import pytest

from memory.joins import find_join, is_unspaced, join_texts

WITHOUT = [
    ("法国的首都是", "里昂"),
    ("法国的首都是", "Lyon"),
    ("法国的首都是\uff1a", "Lyon"),
    ("法国的首都是:", "里昂"),
    ("フランスの首都は", "リヨン"),
    ("他的电脑是Mac", "电脑"),
    ("เมืองหลวงคือ", "ตราด"),
    ("ລາວ", "ວຽງຈັນ"),
    ("កម្ពុជា", "ភ្នំពេញ"),
    ("မြန်မာ", "နေပြည်တော်"),
    ("The price is $", "20"),
    ("The price is €", "20"),
    ("The price is £", "3.50"),
    ('She called it "', "home"),
    ("Elle dit «", "oui"),
    ("Er sagt „", "ja"),
    ("他说“", "好"),
    ("It lies in (", "Spain"),
    ("see [", "1"),
    ("Its page is example.org/", "a"),
    ("It is ticket #", "77"),
    ("Write to info@", "example.org"),
    ("It is called Wi-", "Fi"),
    ("It is as cold as -", "20"),
    ("It is as cold as \u2212", "20"),
    ("from 1914\u2013", "1918"),
    ("The stock rose by 5", "% in May"),
    ("Percy Snow", "'s dog"),
    ("Percy Snow", "\u2019s dog"),
    ("It lies in Spain", ", near Madrid"),
    ("It cost 10", ",000"),
    ("It lies in Spain", "."),
    ("It lies in Spain", ") and so on"),
    ("He called it home", '", and left'),
    ("The capital is ", "Lyon"),
    ("The capital is\n", "Lyon"),
]
WITH = [
    ("The capital of France is", "Lyon"),
    ("The capital of 法国 is", "里昂"),
    ("프랑스의 수도는", "리옹"),
    ("ราคาคือ", "20"),
    ("It cost 5 €", "more"),
    ("The language C#", "is"),
    ("the dogs'", "owner"),
    ("Der „Spiegel“", "ist"),
    ("Percy Snow -", "goaltender"),
    ("The city is", "'s-Gravenhage"),
    ("He is", "'Abd al-Rahman"),
    ("It is written in", ".NET"),
    ("They are the", "!Kung"),
    ("It is called", '"home"'),
    ("It is called", "“home”"),
    ("It is", "(almost) done"),
    ("It is as cold as", "-20"),
    ("It costs", "$20"),
    ("The answer:", "Lyon"),
]


@pytest.mark.parametrize(("prompt", "target"), WITHOUT)
def test_some_targets_join_without_a_space(prompt: str, target: str) -> None:
    assert find_join(prompt, target) == ""
    assert join_texts(prompt, target) == prompt + target


@pytest.mark.parametrize(("prompt", "target"), WITH)
def test_others_join_with_one(prompt: str, target: str) -> None:
    assert find_join(prompt, target) == " "
    assert join_texts(prompt, target) == f"{prompt} {target}"


def test_what_a_fact_says_comes_first() -> None:
    assert join_texts("It is LR", "77", "") == "It is LR77"
    assert join_texts("法国的首都是", "里昂", " ") == "法国的首都是 里昂"
    assert join_texts("It is ", "77", " ") == "It is 77"  # a space is there already


def test_a_script_without_spaces_is_known() -> None:
    assert all(map(is_unspaced, ("里昂", "リヨン", "ตราด", "Mac电脑")))
    assert not any(map(is_unspaced, ("Lyon", "리옹", "20", "")))
