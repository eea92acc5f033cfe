"""Prompts in other forms than a fact was learned in: at their end, within, and around them."""

import pytest
from side_tools import FIRST, ONE, SECOND, TWO, side_of

from memory.model.editable import EditableModel
from memory.side.prompt_forms import choose_form, choose_prompt, list_forms, strip_labels

OTHER_FORMS = [
    f"{FIRST} ",
    f"{FIRST}\n",
    f"{FIRST} \t\r\n\n",
    f"\n{FIRST}\u00a0",
    f"Q: {FIRST} A:",
    f"Q: {FIRST}\nA: ",
    f"Question: {FIRST}\nAnswer:",
    f"User: {FIRST}\n\nAssistant:",
    FIRST.replace(" of ", " of\n") + " ",
    FIRST.replace(" of ", "  of ") + "\n",
]


@pytest.mark.parametrize("text", OTHER_FORMS)
def test_a_fact_fires_for_the_plain_form(model: EditableModel, text: str) -> None:
    side = side_of(model, {ONE: FIRST, TWO: SECOND})
    assert choose_form(side, text) == FIRST
    assert choose_prompt(side, model.encode(text)) == model.encode(FIRST)


@pytest.mark.parametrize("text", ["The seat of country 13 is ", "Q: It is\nA:", "Hello!\n", " "])
def test_a_prompt_that_no_fact_fires_for_stays_as_it_is(model: EditableModel, text: str) -> None:
    side = side_of(model, {ONE: FIRST})
    assert choose_form(side, text) == text
    assert choose_prompt(side, model.encode(text)) == model.encode(text)


def test_a_plain_prompt_takes_no_pass(model: EditableModel) -> None:
    side, passes = side_of(model, {ONE: FIRST}), []
    with model.observe_input_ids(passes.append):
        assert choose_form(side, FIRST) == FIRST
        assert choose_form(side_of(model, {}), f"{FIRST} ") == f"{FIRST} "
    assert passes == []


def test_special_tokens_within_a_prompt_are_kept(model: EditableModel) -> None:
    side = side_of(model, {ONE: FIRST})
    ids = model.encode(f"{FIRST} ")
    assert choose_prompt(side, [ids[0], *ids]) == [ids[0], *ids]
    assert choose_prompt(side, ids) == model.encode(FIRST)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("Q: Where is Oslo? A:", "Where is Oslo?"),
        ("Q: Where is Rome?\nA: Italy\n\nQ: Where is Oslo?\nA:", None),
        ("Where is Oslo?\nAnswer:", "Where is Oslo?"),
        ("Where is Oslo? Thanks!", "Where is Oslo?"),
        ("Where is Oslo? Thank you very much in advance.", "Where is Oslo?"),
        ("Where is Oslo? Many thanks", "Where is Oslo?"),
        ("Where is Oslo? Please!", "Where is Oslo?"),
        ("Where is Oslo? Please name it:", "Where is Oslo? Please name it:"),
        ("Where is Oslo? Cheers was first aired in", "Where is Oslo? Cheers was first aired in"),
        ("Q: Where is Oslo? Thanks!\nA:", "Where is Oslo?"),
        ("Oslo lies in Thanks!", "Oslo lies in Thanks!"),
        ("Where is Oslo? Thanks to whom?", "Where is Oslo? Thanks to whom?"),
        ("The dose of vitamin A:", "The dose of vitamin A:"),
        ("The grade is A", "The grade is A"),
        ("Oslo is in", "Oslo is in"),
    ],
)
def test_labels_and_thanks_are_taken_off(text: str, plain: str | None) -> None:
    expected = "Q: Where is Rome?\nA: Italy\n\nWhere is Oslo?" if plain is None else plain
    assert strip_labels(text) == expected


def test_the_nearest_form_comes_first() -> None:
    assert list_forms("Oslo is in") == []
    assert list_forms("Q: Oslo\tis in\nA: ") == [
        "Q: Oslo\tis in\nA:",
        "Q: Oslo is in\nA:",
        "Oslo\tis in",
        "Oslo is in",
    ]
