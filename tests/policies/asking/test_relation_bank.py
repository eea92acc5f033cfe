import re
from collections import Counter

import pytest

from kedit_daemon.shipped import RELATIONS
from policies.asking.relation_bank import (
    mask_prompt,
    mask_spans,
    mask_statement,
    mask_subject,
    read_bank,
)


def test_the_shipped_bank_has_what_is_needed_to_tell_relations_apart() -> None:
    bank = read_bank(RELATIONS)
    assert len(bank) >= 300
    assert len({relation.relation for relation in bank}) == len(bank)
    for relation in bank:
        assert len(relation.questions) >= 3 and len(relation.statements) >= 2, relation
        assert all(q.count("{subject}") == 1 for q in relation.questions), relation
        for statement in relation.statements:
            assert statement.count("{subject}") == 1, relation
            assert re.fullmatch(r"[^{]*\{subject\}[^{]*\{target\}[.!]?", statement), statement
    asked = Counter(q.casefold() for relation in bank for q in relation.questions)
    assert [q for q, count in asked.items() if count > 1] == []


def test_a_pronoun_stands_for_the_subject() -> None:
    assert mask_subject("Who owns {subject}?") == "Who owns it?"
    assert mask_subject("What is {subject}'s motto?") == "What is its motto?"
    assert mask_statement("{subject}'s capital is {target}.") == "its capital is"


@pytest.mark.parametrize(
    ("prompt", "masked"),
    [
        ("The capital of {} is", "The capital of it is"),
        ("{}, developed by", "it, developed by"),
        ("Who founded Oslo?", "Who founded it?"),
        ("{}'s owner", "its owner"),
    ],
)
def test_a_prompt_names_its_subject_by_a_placeholder_or_itself(prompt: str, masked: str) -> None:
    assert mask_prompt(prompt, "Oslo") == masked


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Where is Oslo?", "Where is it?"),
        ("What is Oslo's motto?", "What is its motto?"),
        ("What is Oslo\u2019s motto?", "What is its motto?"),
        ("Is Oslo older than Oslo?", "Is it older than it?"),
    ],
)
def test_spans_are_masked_with_their_possessive(text: str, masked: str) -> None:
    spans = [match.span() for match in re.finditer("Oslo", text)]
    assert mask_spans(text, spans) == masked
