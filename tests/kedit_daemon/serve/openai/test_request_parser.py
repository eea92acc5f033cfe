"""What of a request is refused before it costs anything."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from home_tools import Published
from serving import NAME, load

from kedit_daemon.serve.errors import RequestError
from kedit_daemon.serve.inference.engine import BatchEngine
from kedit_daemon.serve.inference.reader import Reader
from kedit_daemon.serve.openai.request_parser import (
    ParsedRequest,
    RequestParser,
    parse_chat,
    parse_completion,
)

MOST = 8


@pytest.fixture
def reader(tmp_path: Path, model_folder: Callable[[str], Path]) -> Iterator[Reader]:
    published = Published(tmp_path / "home", load(model_folder("llama")))
    engine = BatchEngine(published.replica(published.model), 1, 1)
    yield Reader(NAME, engine.model, engine)
    engine.close()
    published.store.close()


@pytest.fixture
def encoded(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that were made into tokens."""
    texts: list[str] = []
    whole = type(reader.model.tokenizer).__call__

    def listening(self: Any, text: str, **more: Any) -> Any:
        texts.append(text)
        return whole(self, text, **more)

    monkeypatch.setattr(type(reader.model.tokenizer), "__call__", listening)
    return texts


def read(how: RequestParser, reader: Reader, **given: Any) -> ParsedRequest:
    return how(json.dumps({"model": NAME} | given).encode(), reader, MOST)


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    ("how", "given"),
    [
        (parse_completion, {"prompt": ["a"] * 9}),
        (parse_completion, {"prompt": ["a", "b", "c"], "n": 3}),
        (parse_chat, {"messages": said("a"), "n": 9}),
    ],
)
def test_too_many_answers_are_refused_before_a_text_is_read(
    reader: Reader, encoded: list[str], how: RequestParser, given: dict[str, Any]
) -> None:
    with pytest.raises(RequestError, match="more than 8 answers") as caught:
        read(how, reader, **given)
    assert (caught.value.status, caught.value.param, encoded) == (400, "n", [])


@pytest.mark.parametrize(("how", "field"), [(parse_completion, "prompt"), (parse_chat, "messages")])
def test_a_text_that_cannot_fit_is_refused_before_it_is_read(
    reader: Reader, encoded: list[str], how: RequestParser, field: str
) -> None:
    most = reader.positions * max(len(token) for token in reader.model.tokenizer.get_vocab())
    for length, times in ((most + 1, 0), (most, 1)):
        text = "a" * length
        with pytest.raises(RequestError) as caught:
            read(how, reader, **{field: said(text) if how is parse_chat else text})
        refused = (caught.value.status, caught.value.code, caught.value.param)
        assert refused == (400, "context_length_exceeded", field)
        assert len(encoded) == times


def test_the_first_prompt_that_does_not_fit_is_the_last_that_is_read(
    reader: Reader, encoded: list[str]
) -> None:
    with pytest.raises(RequestError, match="both together"):
        read(parse_completion, reader, prompt=["a", "a" * 300, "a"], max_tokens=1)
    assert len(encoded) == 2


def test_a_prompt_and_its_answer_may_fill_the_context(reader: Reader) -> None:
    ids, room = [1] * 200, reader.positions - 200
    assert (
        read(parse_completion, reader, prompt=ids, max_tokens=room)
        .generation_requests[0]
        .max_tokens
        == room
    )
    with pytest.raises(RequestError, match="both together"):
        read(parse_completion, reader, prompt=ids, max_tokens=room + 1)


def test_the_choices_of_a_prompt_share_its_ids(reader: Reader) -> None:
    wishes = read(parse_completion, reader, prompt=["one", "two"], n=3).generation_requests
    assert [len({id(w.prompt_ids) for w in wishes[k : k + 3]}) for k in (0, 3)] == [1, 1]


def test_a_developer_speaks_as_the_system(reader: Reader) -> None:
    talk = [[{"role": role, "content": "Be brief."}] for role in ("developer", "system")]
    for template in (None, "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"):
        reader.model.tokenizer.chat_template = template
        first, second = (
            read(parse_chat, reader, messages=messages).generation_requests for messages in talk
        )
        assert first == second


def test_an_answer_in_a_chat_is_as_long_as_there_is_room(reader: Reader) -> None:
    wish = read(parse_chat, reader, messages=said("Rome")).generation_requests[0]
    assert len(wish.prompt_ids) + wish.max_tokens == reader.positions
    reader.model.max_positions = 1 << 20
    assert read(parse_chat, reader, messages=said("Rome")).generation_requests[0].max_tokens == 4096
