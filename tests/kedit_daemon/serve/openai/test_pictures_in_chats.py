"""Pictures in the parts of a chat's messages."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from home_tools import Published
from serving import NAME, Running, server
from side_tools import delta_of, side_of
from tiny_vision_models import draw_picture

from kedit_daemon.editing.tensor_files import pack_keys, save_shard
from memory.facts import Fact, FactState
from memory.model.chat_layout import encode_chat
from memory.picture_files import keep_picture, make_data_url
from memory.picture_marks import join_mark, make_mark
from memory.side.prompt_states import read_states
from memory.side.shards import RetrievalKeys, Shard

QUESTION = "The name of this tower is"
RED, BLUE = draw_picture(), draw_picture((20, 30, 220), size=(30, 14))


@pytest.fixture(scope="module")
def seeing(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], Path]
) -> Iterator[Running]:
    with server(tmp_path_factory.mktemp("seeing"), model_folder("llava")) as running:
        yield running


def ask(running: Running, *urls: str, question: str = QUESTION, **more: Any) -> httpx.Response:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": u}} for u in urls]
    content = [*parts, {"type": "text", "text": question}]
    fields = {"model": NAME, "messages": [{"role": "user", "content": content}]}
    with running.http() as http:
        return http.post(
            "/v1/chat/completions", json={**fields, "max_tokens": 4, "temperature": 0} | more
        )


def learn(published: Published, data: bytes) -> Fact:
    """A fact about a picture goes live, with a shard that changes what is said."""
    side, digest = side_of(published.model, {}), keep_picture(published.home.pictures_folder, data)
    pictures = published.model.pictures
    assert pictures is not None
    pictures.add(data)
    fact = Fact(make_mark(digest), "{} " + QUESTION, "Oslo")
    turn = {"role": "user", "content": fact.question}
    states = read_states(side, encode_chat(published.model, [turn]))
    ends = side.compute_keys(side.layer, states.outputs[None])
    keys = RetrievalKeys(side.pictures.compute_keys(digest), ends)
    shard = Shard(delta_of(published.model, 1), 1e-3)
    sha = save_shard(published.home.side_folder, shard)
    with published.store.db.transaction():
        published.store.receive_fact(fact, "test.jsonl", False)
        published.store.artifacts.add_shard(7, sha, 1, 1e-3)
        published.store.artifacts.put_side_keys(fact.id, 7, pack_keys(keys))
        published.store.change_state(fact.id, FactState.LIVE_SIDE, tier="side")
    return fact


def said(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def test_a_fact_about_a_picture_is_served_and_gone_when_it_is_taken_back(seeing: Running) -> None:
    red, blue = make_data_url(RED), make_data_url(BLUE)
    before = [said(ask(seeing, url)) for url in (red, blue)]
    assert before[0] != before[1]
    fact = learn(seeing.published, RED)
    answer = ask(seeing, red)
    assert [one["id"] for one in answer.json()["kedit"]["facts"]] == [fact.id]
    assert said(answer) != before[0]
    assert said(ask(seeing, blue)) == before[1]
    assert said(ask(seeing, red, model=f"{NAME}@base")) == before[0]
    marked = [{"role": "user", "content": join_mark(str(fact.picture), QUESTION)}]
    assert said(ask(seeing, messages=marked)) == said(answer)

    seeing.published.forget(fact, 7)
    assert [said(ask(seeing, url)) for url in (red, blue)] == before


def test_answers_with_and_without_pictures_run_together(seeing: Running) -> None:
    urls = ([], [make_data_url(RED)], [make_data_url(RED), make_data_url(BLUE)])
    alone = [said(ask(seeing, *some)) for some in urls]
    tokens = [ask(seeing, *some).json()["usage"]["prompt_tokens"] for some in urls]
    assert tokens[0] + 17 == tokens[1] and tokens[1] + 17 == tokens[2]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda some: said(ask(seeing, *some)), [*urls, *urls]))
    assert together == [*alone, *alone]


@pytest.mark.parametrize(
    ("url", "cause"),
    [
        ("data:", "not one of data in base64"),
        ("https://example.org/tower.png", "write data:image/png;base64"),
        ("data:image/png;base64,AAAA", "not a picture"),
        (make_data_url(RED[:60]), "broken"),
    ],
)
def test_a_picture_that_is_none_is_told_with_its_place(
    seeing: Running, url: str, cause: str
) -> None:
    answer = ask(seeing, make_data_url(RED), url)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "bad_request")
    assert error["param"] == "messages.0.content.1.image_url.url"
    assert cause in error["message"] and error["message"].startswith(error["param"])
    assert said(ask(seeing, make_data_url(RED)))
