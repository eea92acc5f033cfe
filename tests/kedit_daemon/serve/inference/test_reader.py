"""Text that becomes tokens, and conversations that become text."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from home_tools import Published
from serving import NAME, load

from kedit_daemon.serve.errors import RequestError
from kedit_daemon.serve.inference.engine import BatchEngine
from kedit_daemon.serve.inference.reader import Reader, format_plain_chat

TALK = [("system", "Be brief."), ("user", "Hello")]


@pytest.fixture
def reader(tmp_path: Path, model_folder: Callable[[str], Path]) -> Iterator[Reader]:
    published = Published(tmp_path / "home", load(model_folder("llama")))
    engine = BatchEngine(published.replica(published.model), 1, 1)
    yield Reader(NAME, engine.model, engine)
    engine.close()
    published.store.close()


def test_a_conversation_without_a_template_is_plain_text(reader: Reader) -> None:
    assert format_plain_chat([("user", "Rome is in")]) == "Rome is in"
    assert format_plain_chat(TALK) == "System: Be brief.\n\nUser: Hello\n\nAssistant:"
    assert format_plain_chat([("system", "Rome is in")]) == "System: Rome is in\n\nAssistant:"
    assert reader.encode_messages(TALK) == reader.encode(format_plain_chat(TALK))


def test_the_template_of_a_model_is_taken_and_its_special_tokens_stand_once(
    reader: Reader,
) -> None:
    reader.model.tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    ids = reader.encode_messages(TALK)
    assert ids == reader.encode("[system] Be brief.\n[user] Hello\n[assistant]")
    assert ids.count(reader.model.end_token or 0) == 1


def test_what_a_template_refuses_is_refused(reader: Reader) -> None:
    reader.model.tokenizer.chat_template = "{{ raise_exception('no system message, please') }}"
    with pytest.raises(RequestError, match="no system message") as caught:
        reader.encode_messages(TALK)
    assert (caught.value.status, caught.value.param) == (400, "messages")


def test_the_texts_of_tokens_make_the_text(reader: Reader) -> None:
    text = "The seat of country 3 is Rome."
    ids = reader.encode(text)[1:]
    assert "".join(reader.token_text(token) for token in ids) == text


def test_a_tokenizer_that_drops_a_first_space_keeps_it_in_a_token(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = reader.model.tokenizer.decode
    monkeypatch.setattr(
        reader.model.tokenizer, "decode", lambda ids, **more: whole(ids, **more).lstrip()
    )
    token = reader.encode("The seat of")[-1]
    assert reader.token_text(token) == " of"


def test_a_tokens_text_is_made_once(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = reader.encode("The seat of country 3 is Rome.")[1:]
    told = [reader.token_text(token) for token in ids]

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the tokenizer is asked again")

    for name in ("decode", "__call__"):
        monkeypatch.setattr(type(reader.model.tokenizer), name, never)
    assert [reader.token_text(token) for token in ids] == told
