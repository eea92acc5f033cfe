import pytest

from memory.model.chat_layout import (
    ChatLayout,
    ChatPrompt,
    find_chat_layout,
    render_chat,
)
from memory.model.continuation import encode_behind
from memory.model.editable import EditableModel

PLAIN = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<reply>"
# Ends each turn, and has a system message of its own.
CHATML = (
    "{% if messages[0].role != 'system' %}<s>system\nBe kind.</s>\n{% endif %}"
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
TURNS = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi!"},
    {"role": "user", "content": "Where is Oslo?"},
]


def test_the_first_token_is_written_once(model: EditableModel) -> None:
    tokenizer = model.tokenizer
    tokenizer.chat_template, tokenizer.bos_token = PLAIN, "<|endoftext|>"
    assert model.encode("a")[0] == tokenizer.bos_token_id  # this tokenizer adds it
    assert render_chat(tokenizer, TURNS[:1]) == "<user>Hello<reply>"
    tokenizer.bos_token = "<turn>"  # and no other
    assert render_chat(tokenizer, TURNS[:1]) == "<turn><user>Hello<reply>"


def test_a_reply_has_no_special_token_of_its_own(model: EditableModel) -> None:
    assert model.encode("a") == [model.tokenizer.bos_token_id, *encode_behind(model.tokenizer, "a")]


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_the_last_question_is_found_again(model: EditableModel, system: str | None) -> None:
    tokenizer = model.tokenizer
    tokenizer.chat_template = CHATML
    layout = find_chat_layout(tokenizer)
    assert layout == ChatLayout("</s>\n<s>user\n", "</s>\n<s>assistant\n")
    chat = [{"role": "system", "content": system}, *TURNS] if system else TURNS
    found = layout.split_prompt(render_chat(tokenizer, chat))
    assert found is not None and (found.question, found.reply) == ("Where is Oslo?", "")
    assert "Hello" in found.history and "Hi!" in found.history
    begun = layout.split_prompt(render_chat(tokenizer, chat) + "It is in")
    assert begun == ChatPrompt(found.history, "Where is Oslo?", "It is in")


def test_what_is_not_in_chat_form_has_no_turns(model: EditableModel) -> None:
    model.tokenizer.chat_template = CHATML
    layout = find_chat_layout(model.tokenizer)
    assert layout is not None
    assert layout.split_prompt("Where is Oslo?") is None
    assert layout.split_prompt("</s>\n<s>assistant\nIt is in") is None


@pytest.mark.parametrize("template", [None, "{{ raise('no') }}", "no turns", "{{ messages[0] }}"])
def test_a_template_without_turns_has_no_layout(model: EditableModel, template: str | None) -> None:
    model.tokenizer.chat_template = template
    assert find_chat_layout(model.tokenizer) is None
