from memory.model.chat_layout import render_chat
from memory.model.editable import EditableModel

TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<reply>"
CHAT = [{"role": "user", "content": "Hello"}]


def test_the_first_token_is_written_once(model: EditableModel) -> None:
    tokenizer = model.tokenizer
    tokenizer.chat_template, tokenizer.bos_token = TEMPLATE, "<|endoftext|>"
    assert model.encode("a")[0] == tokenizer.bos_token_id  # this tokenizer adds it
    assert render_chat(tokenizer, CHAT) == "<user>Hello<reply>"
    tokenizer.bos_token = "<turn>"  # and no other
    assert render_chat(tokenizer, CHAT) == "<turn><user>Hello<reply>"
