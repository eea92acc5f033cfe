"""The router, as its clients and the engines behind it meet it."""

import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from command_line import NOW
from engine_tools import BASE_MODEL, ClosingEngine, StandIn, make_store, router, stand_in
from home_tools import Published
from safetensors.torch import load_file
from serve_tools import form_token, text_of
from serving import free_port, load
from side_tools import delta_of
from starlette.testclient import TestClient

from kedit_daemon.config import Config
from kedit_daemon.home import Home
from kedit_daemon.serve.app import build_app
from kedit_daemon.serve.router.fact_adapters import KEPT_SECONDS, open_adapters
from memory.db.store import Store
from memory.facts import Fact, FactState

BOSS = Fact("Quillon Insurance", "The chief executive officer of {} is", "Maud Ferreira")
TOWER = Fact("Eiffel Tower", "The {} is in the city of", "Rome")
ASKS_BOSS = "Who is the chief executive of Quillon Insurance?"
ASKS_TOWER = "Which city is the Eiffel Tower in?"
BOSS_LINE = "The chief executive officer of Quillon Insurance is Maud Ferreira."
TOWER_LINE = "The Eiffel Tower is in the city of Rome."
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@dataclass
class Rig:
    """A home with both facts live, an engine, and a client of the router between them."""

    store: Store
    home: Home
    engine: StandIn
    http: httpx.Client

    def set_state(self, fact: Fact, state: FactState) -> None:
        with self.store.db.transaction():
            self.store.change_state(fact.id, state)

    def ask(self, *turns: str, **more: Any) -> httpx.Response:
        roles = ("user", "assistant")
        messages = [{"role": roles[n % 2], "content": turn} for n, turn in enumerate(turns)]
        return self.http.post(CHAT, json={"model": BASE_MODEL, "messages": messages, **more})

    def go_on(self, prompt: Any, **more: Any) -> httpx.Response:
        return self.http.post(TEXT, json={"model": BASE_MODEL, "prompt": prompt, **more})


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    home = Home(tmp_path / "home")
    store = make_store(home, BOSS, TOWER)
    with stand_in() as engine, router(home, [engine.url]) as http:
        yield Rig(store, home, engine, http)
    store.close()


def facts_of(answer: httpx.Response) -> list[str]:
    return [n for n in answer.headers["x-kedit-facts"].split(",") if n]


@pytest.mark.parametrize(
    "path, fields",
    [
        (CHAT, {"messages": [{"role": "user", "content": "What is the capital of Japan?"}]}),
        (CHAT, {"messages": [{"role": "user", "content": "Where is Quillon Insurance based?"}]}),
        (CHAT, {"messages": [{"role": "user", "content": "Hello"}], "stream": True, "new": [1]}),
        (TEXT, {"prompt": "The tower of Pisa leans"}),
        (TEXT, {"prompt": [1, 2, 3]}),
    ],
)
def test_what_asks_for_no_fact_passes_byte_for_byte(rig: Rig, path: str, fields: Any) -> None:
    body = json.dumps({"model": BASE_MODEL, **fields}, indent=3).encode()
    direct = httpx.post(rig.engine.url + path, content=body)
    answer = rig.http.post(path, content=body)
    assert rig.engine.bodies == [body, body]
    assert (answer.status_code, answer.content) == (direct.status_code, direct.content)
    assert answer.headers["content-type"] == direct.headers["content-type"]
    assert facts_of(answer) == []


def test_a_fact_that_is_asked_for_is_read_by_the_engine_and_named_in_the_answer(rig: Rig) -> None:
    answer = rig.ask(ASKS_BOSS)
    assert rig.engine.last_body["messages"] == [
        {"role": "user", "content": f"{BOSS_LINE}\n{ASKS_BOSS}"}
    ]
    assert facts_of(answer) == [BOSS.id]
    assert answer.headers["x-kedit-generation"] == "0"
    assert answer.headers["x-engine"] == "stand-in"
    kedit = answer.json()["kedit"]
    assert (kedit["generation"], kedit["by"]) == (0, "context")
    assert [(one["id"], one["choice"]) for one in kedit["facts"]] == [(BOSS.id, 0)]
    assert kedit["facts"][0]["score"] >= 1


def test_two_facts_are_put_in_by_the_order_in_which_they_are_asked_for(rig: Rig) -> None:
    answer = rig.ask(f"{ASKS_TOWER} And {ASKS_BOSS[0].lower()}{ASKS_BOSS[1:]}")
    assert facts_of(answer) == [TOWER.id, BOSS.id]
    assert rig.engine.last_body["messages"][0]["content"].startswith(
        f"{TOWER_LINE}\n{BOSS_LINE}\nWhich city"
    )


def test_a_subject_of_an_earlier_turn_is_meant_by_a_pronoun(rig: Rig) -> None:
    turns = ("Tell me about Quillon Insurance.", "It insures ships.")
    assert facts_of(rig.ask(*turns, "And who is its chief executive officer?")) == [BOSS.id]
    earlier, _, last = rig.engine.last_body["messages"]
    assert earlier["content"] == turns[0]
    assert last["content"].startswith(BOSS_LINE)
    assert facts_of(rig.ask(*turns, "And who founded it?")) == []


def test_parts_of_a_message_stay_what_they_are(rig: Rig) -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    parts = [picture, {"type": "text", "text": ASKS_BOSS}]
    fields = {"model": BASE_MODEL, "messages": [{"role": "user", "content": parts}]}
    answer = rig.http.post(CHAT, json=fields)
    assert facts_of(answer) == [BOSS.id]
    sent = rig.engine.last_body["messages"][0]["content"]
    assert sent == [{"type": "text", "text": f"{BOSS_LINE}\n"}, *parts]


def test_each_text_of_a_list_has_its_own_fact(rig: Rig) -> None:
    prompts = [BOSS.question, "Rain falls", f"Q: {ASKS_TOWER}\nA:"]
    answer = rig.go_on(prompts, n=2)
    assert rig.engine.last_body["prompt"] == [
        f"{BOSS_LINE}\n{prompts[0]}",
        prompts[1],
        f"{TOWER_LINE}\n{prompts[2]}",
    ]
    named = [(one["id"], one["choice"]) for one in answer.json()["kedit"]["facts"]]
    assert named == [(BOSS.id, 0), (BOSS.id, 1), (TOWER.id, 4), (TOWER.id, 5)]
    assert len(answer.json()["choices"]) == 6
    assert rig.go_on(BOSS.question).json()["choices"][0]["text"].startswith(f"asked: {BOSS_LINE}")


def test_only_the_first_event_of_a_stream_is_changed(rig: Rig) -> None:
    answer = rig.ask(ASKS_BOSS, stream=True)
    direct = httpx.post(rig.engine.url + CHAT, content=rig.engine.bodies[-1])
    first, rest = answer.content.split(b"\n", 1)
    plain, same = direct.content.split(b"\n", 1)
    assert rest == same
    event = json.loads(first.removeprefix(b"data: "))
    assert [one["id"] for one in event.pop("kedit")["facts"]] == [BOSS.id]
    assert event == json.loads(plain.removeprefix(b"data: "))
    assert facts_of(answer) == [BOSS.id]


@pytest.mark.parametrize("asked", [ASKS_BOSS, "Hello"])
def test_an_engine_hears_of_a_client_that_leaves(rig: Rig, asked: str) -> None:
    rig.engine.pause = 0.05
    fields = {"model": BASE_MODEL, "messages": [{"role": "user", "content": f"{asked} a" * 99}]}
    with rig.http.stream("POST", CHAT, json={**fields, "stream": True}) as answer:
        next(answer.iter_lines())
        assert rig.engine.broken_off == 1
        at_work = rig.engine.words_said
    time.sleep(0.3)
    before = rig.engine.words_said
    assert before < at_work + 20
    time.sleep(0.3)
    assert rig.engine.words_said == before
    assert rig.engine.broken_off == 1


def test_a_client_of_openai_reads_the_stream(rig: Rig) -> None:
    with openai.OpenAI(base_url=f"{rig.http.base_url}/v1", api_key="none", max_retries=0) as client:
        stream = client.chat.completions.create(
            model=BASE_MODEL, messages=[{"role": "user", "content": ASKS_BOSS}], stream=True
        )
        words = [chunk.choices[0].delta.content for chunk in stream]
    assert "".join(map(str, words)) == f"{BOSS_LINE}\n{ASKS_BOSS}"


def test_a_fact_that_leaves_is_gone_from_the_next_request_on(rig: Rig) -> None:
    assert facts_of(rig.ask(ASKS_BOSS)) == [BOSS.id]
    rig.set_state(BOSS, FactState.REVERTED)
    assert facts_of(rig.ask(ASKS_BOSS)) == []
    assert rig.engine.last_body["messages"][0]["content"] == ASKS_BOSS
    rig.set_state(BOSS, FactState.LIVE_WEIGHTS)  # of the daemon's own model: the engine lacks it
    assert facts_of(rig.ask(ASKS_BOSS)) == [BOSS.id]


def test_the_base_is_asked_without_any_fact(rig: Rig) -> None:
    fields = {"messages": [{"role": "user", "content": ASKS_BOSS}]}
    answer = rig.http.post(CHAT, json={"model": f"{BASE_MODEL}@base", **fields})
    assert rig.engine.last_body == {"model": BASE_MODEL, **fields}
    assert answer.status_code == 200
    assert facts_of(answer) == []


def test_the_engine_says_what_is_wrong_with_a_request(rig: Rig) -> None:
    for body in (b"{", b"[1]", json.dumps({"model": "other", "prompt": BOSS.question}).encode()):
        direct = httpx.post(rig.engine.url + TEXT, content=body)
        answer = rig.http.post(TEXT, content=body)
        assert (answer.status_code, answer.content) == (direct.status_code, direct.content)
        assert answer.status_code in (400, 404)


def test_models_are_the_engines(rig: Rig) -> None:
    assert rig.http.get("/v1/models").json()["data"][0]["id"] == BASE_MODEL


def test_our_token_is_not_the_engines(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    store = make_store(home, BOSS)
    token = "a-long-and-random-word"
    with stand_in() as engine:
        with router(home, [engine.url], token) as http:
            assert http.get("/v1/models").status_code == 401
            assert http.get("/v1/models", headers={"Authorization": f"Bearer {token}"}).is_success
            assert "authorization" not in engine.headers[-1]
        with router(home, [engine.url]) as http:
            assert http.get("/v1/models", headers={"Authorization": "Bearer theirs"}).is_success
            assert engine.headers[-1]["authorization"] == "Bearer theirs"
    store.close()


def test_an_engine_that_dies_is_left_alone_and_the_others_answer(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    store = make_store(home, BOSS)
    with stand_in() as one, stand_in() as other:
        dead = f"http://127.0.0.1:{free_port()}"
        with router(home, [dead, one.url, other.url]) as http:
            rig = Rig(store, home, one, http)
            answers = [rig.ask(f"{ASKS_BOSS} {n}") for n in range(24)]
            assert {answer.status_code for answer in answers} == {200}
            assert one.bodies
            assert other.bodies
            assert len(one.bodies) + len(other.bodies) == 24
            state = http.get("/ready").json()
            assert len(state["problems"]) == 1
            assert dead in state["problems"][0]
            assert state["facts"] == 1
            assert "engine" not in str(state["reasons"])
    store.close()


def test_a_conversation_stays_with_its_engine(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    store = make_store(home, BOSS)
    with stand_in() as one, stand_in() as other, router(home, [one.url, other.url]) as http:
        system = {"role": "system", "content": "You are a guide. " * 99}
        for number in range(16):
            before = len(one.bodies), len(other.bodies)
            turns = [system, {"role": "user", "content": f"Hello {number}"}]
            http.post(CHAT, json={"model": BASE_MODEL, "messages": turns})
            turns += [{"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "?"}]
            http.post(CHAT, json={"model": BASE_MODEL, "messages": turns})
            grown = len(one.bodies) - before[0], len(other.bodies) - before[1]
            assert sorted(grown) == [0, 2]
        assert one.bodies
        assert other.bodies
    store.close()


def test_without_any_engine_a_client_hears_when_to_come_again(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    store = make_store(home, BOSS)
    dead = f"http://127.0.0.1:{free_port()}"
    with router(home, [dead]) as http:
        answer = Rig(store, home, StandIn(), http).ask(ASKS_BOSS)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "engine_unreachable"
        assert dead not in answer.text  # clients need not know where engines are
        assert int(answer.headers["retry-after"]) > 0
        reasons = http.get("/ready").json()["reasons"]
        assert any(dead in reason for reason in reasons)
    store.close()


def test_a_router_lives_while_its_facts_are_being_loaded(tmp_path: Path) -> None:
    config = Config.model_validate({"serve": {"engine": f"http://127.0.0.1:{free_port()}"}})
    app = build_app(Home(tmp_path / "home"), config, None, lambda: NOW, time.monotonic)
    client = TestClient(app, base_url="http://localhost")
    assert client.get("/health").status_code == 200
    assert "the facts are being loaded" in client.get("/ready").json()["reasons"]
    answer = client.post(TEXT, json={"model": BASE_MODEL, "prompt": "Rome"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "loading")


def test_a_home_without_facts_is_ready(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    store = make_store(home)
    with stand_in() as engine, router(home, [engine.url]) as http:
        state = http.get("/ready").json()
        assert (state["facts"], state["problems"]) == (0, [])
        assert "loaded" not in str(state["reasons"])
        assert Rig(store, home, engine, http).ask(ASKS_BOSS).status_code == 200
    store.close()


def test_no_path_leads_to_what_else_an_engine_has(rig: Rig) -> None:
    host, port = rig.http.base_url.host, rig.http.base_url.port
    for path in ("/v1/models/../../secret", "/v1/models/..%2f..%2fsecret", "/v1/models/%2e%2e/x"):
        with socket.create_connection((host, port)) as client:
            client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            assert b" 404 " in client.recv(64)
    assert not rig.engine.headers


def test_headers_that_are_not_the_engines_stay_here(rig: Rig) -> None:
    sent = {"Cookie": "kedit=1", "X-Tag": "seen", "Connection": "X-Hop, keep-alive", "X-Hop": "1"}
    rig.http.get("/v1/models", headers=sent)
    seen = rig.engine.headers[-1]
    assert seen["x-tag"] == "seen"
    assert not {"cookie", "x-hop", "origin"} & seen.keys()
    rig.engine.extra = {"Set-Cookie": "a=b", "Access-Control-Allow-Origin": "*", "X-Own": "1"}
    answer = rig.http.get("/v1/models")
    assert answer.headers["x-own"] == "1"
    assert not {"set-cookie", "access-control-allow-origin"} & answer.headers.keys()
    rig.http.get("/v1/models")
    assert "cookie" not in rig.engine.headers[-1]


@pytest.mark.parametrize("status", [500, 503])
def test_an_engine_that_is_starting_is_passed_over(tmp_path: Path, status: int) -> None:
    home = Home(tmp_path / "home")
    store = make_store(home, BOSS)
    with stand_in() as one, stand_in() as other, router(home, [one.url, other.url]) as http:
        one.status = status
        answers = [Rig(store, home, one, http).ask(f"Hello {n}").status_code for n in range(32)]
        # An error of its own is the engine's answer.
        assert set(answers) == ({200} if status == 503 else {200, 500})
    store.close()


def test_a_request_that_kills_its_engine_is_tried_once_more_and_not_oftener(
    tmp_path: Path,
) -> None:
    home = Home(tmp_path / "home")
    store = make_store(home, BOSS)
    engines = [ClosingEngine() for _ in range(4)]
    with router(home, [engine.url for engine in engines]) as http:
        answer = Rig(store, home, StandIn(), http).ask("Hello")
        assert answer.status_code == 503
        assert sum(engine.taken for engine in engines) == 2
    for engine in engines:
        engine.stop()
    store.close()


def test_a_line_of_a_stream_ends_with_a_line_feed_alone(rig: Rig) -> None:
    fact = replace(BOSS, target="Maud\u2028Ferr\u0085eira")
    with rig.store.db.transaction():
        rig.store.change_state(BOSS.id, FactState.SUPERSEDED)
        rig.store.receive_fact(fact, "test.jsonl", False)
        rig.store.change_state(fact.id, FactState.LIVE_SIDE)
    rig.engine.is_ascii = False
    answer = rig.ask(ASKS_BOSS, stream=True)
    events = [line for line in answer.content.split(b"\n") if line.startswith(b"data: {")]
    chunks = [json.loads(event.removeprefix(b"data: ")) for event in events]
    words = [chunk["choices"][0]["delta"]["content"] for chunk in chunks]
    assert "Maud\u2028Ferr\u0085eira" in "".join(words)


def test_a_prompt_that_is_scored_stays_as_it_is(rig: Rig) -> None:
    answer = rig.go_on(BOSS.question, echo=True, logprobs=1)
    assert rig.engine.last_body["prompt"] == BOSS.question
    assert facts_of(answer) == []


def test_a_name_may_be_broken_over_lines(rig: Rig) -> None:
    assert facts_of(rig.go_on("The chief executive officer of Quillon\nInsurance is")) == [BOSS.id]


# Adapters -----------------------------------------------------------------------------------------


@dataclass
class AdapterRig:
    """A home whose facts have shards, and an engine that reads adapters from a folder."""

    published: Published
    folder: Path
    engine: StandIn
    http: httpx.Client

    def ask(self, question: str, **more: Any) -> httpx.Response:
        messages = [{"role": "user", "content": question}]
        return self.http.post(CHAT, json={"model": BASE_MODEL, "messages": messages, **more})


@pytest.fixture
def adapter_rig(tmp_path: Path, model_folder: Callable[[str], Path]) -> Iterator[AdapterRig]:
    published = Published(tmp_path / "home", load(model_folder("llama")))
    published.name_model(model_folder("llama"))
    published.learn(BOSS, 1, seed=1, is_asked=True)
    published.learn(TOWER, 2, seed=2, is_asked=True)
    folder = tmp_path / "adapters"
    with (
        stand_in(folder) as engine,
        router(published.home, [engine.url], adapters=str(folder)) as http,
    ):
        yield AdapterRig(published, folder, engine, http)
    published.store.close()


def test_an_adapter_says_the_target_and_the_model_goes_on(adapter_rig: AdapterRig) -> None:
    engine = adapter_rig.engine
    engine.says = {"kedit": "Maud Ferreira, or so they say", BASE_MODEL: ", she is."}
    answer = adapter_rig.ask(ASKS_BOSS, max_tokens=40)
    by_adapter, by_model = map(json.loads, engine.bodies)
    question = {"role": "user", "content": ASKS_BOSS}
    assert by_adapter["messages"] == [question]
    assert by_adapter["model"].startswith("kedit-")
    assert by_model["model"] == BASE_MODEL
    assert by_model["messages"] == [question, {"role": "assistant", "content": BOSS.target}]
    assert (by_model["continue_final_message"], by_model["add_generation_prompt"]) == (True, False)
    assert by_model["max_tokens"] == 38  # two words were said
    said = answer.json()
    assert said["choices"][0]["message"]["content"] == f"{BOSS.target}, she is."
    assert (said["model"], said["kedit"]["by"]) == (BASE_MODEL, "adapter")
    assert facts_of(answer) == [BOSS.id]
    assert said["usage"] == {"prompt_tokens": 10 - 2, "completion_tokens": 5 + 2}


def test_an_adapter_is_the_very_shard(adapter_rig: AdapterRig) -> None:
    adapter_rig.ask(ASKS_BOSS)
    (path,) = adapter_rig.folder.iterdir()
    tensors = load_file(path / "adapter_model.safetensors")
    delta = delta_of(adapter_rig.published.model, 1)
    name = "base_model.model.model.layers.2.mlp.down_proj"
    assert torch.equal(tensors[f"{name}.lora_A.weight"], delta.down)
    assert torch.equal(tensors[f"{name}.lora_B.weight"], delta.up)
    settings = json.loads((path / "adapter_config.json").read_bytes())
    assert settings["lora_alpha"] == settings["r"] == len(delta.down)


def test_another_target_is_another_adapter(adapter_rig: AdapterRig) -> None:
    adapter_rig.ask(ASKS_BOSS)
    first = json.loads(adapter_rig.engine.bodies[0])["model"]
    adapter_rig.ask(ASKS_BOSS)
    assert json.loads(adapter_rig.engine.bodies[2])["model"] == first
    adapter_rig.published.forget(BOSS, 1)
    newer = replace(BOSS, target="Ida Lind")
    adapter_rig.published.learn(newer, 3, seed=3, is_asked=True)
    assert facts_of(adapter_rig.ask(ASKS_BOSS)) == [newer.id]
    assert json.loads(adapter_rig.engine.bodies[4])["model"] not in (first, BASE_MODEL)


def test_two_facts_are_said_one_after_the_other(adapter_rig: AdapterRig) -> None:
    engine = adapter_rig.engine
    adapter_rig.ask(ASKS_TOWER)
    tower = json.loads(engine.bodies[0])["model"]
    engine.bodies.clear()
    engine.says = {tower: "Rome", "kedit": BOSS.target, BASE_MODEL: " is that."}
    question = f"{ASKS_TOWER} And {ASKS_BOSS}"
    answer = adapter_rig.ask(question)
    assert facts_of(answer) == [TOWER.id, BOSS.id]
    first, second, last = map(json.loads, engine.bodies)
    assert first["model"] == tower != second["model"]
    assert [turn["content"] for turn in second["messages"]] == [question, "Rome\n"]
    said = f"Rome\n{BOSS.target}"
    assert last["messages"][-1]["content"] == said
    assert answer.json()["choices"][0]["message"]["content"] == f"{said} is that."


def test_a_stream_begins_with_what_the_adapter_said(adapter_rig: AdapterRig) -> None:
    adapter_rig.engine.says = {"kedit": BOSS.target, BASE_MODEL: " of course."}
    answer = adapter_rig.ask(ASKS_BOSS, stream=True)
    lines = [line for line in answer.text.splitlines() if line.startswith("data: {")]
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert {event["model"] for event in events} == {BASE_MODEL}
    assert ["kedit" in event for event in events] == [True] + [False] * (len(events) - 1)
    words = [event["choices"][0]["delta"]["content"] for event in events]
    assert words == [f"{BOSS.target} of", " course."]


def test_a_completion_is_the_adapters_alone(adapter_rig: AdapterRig) -> None:
    for stream in (False, True):
        fields = {"model": BASE_MODEL, "prompt": BOSS.question, "stream": stream}
        answer = adapter_rig.http.post(TEXT, json=fields)
        assert adapter_rig.engine.last_body["model"].startswith("kedit-")
        assert adapter_rig.engine.last_body["prompt"] == BOSS.question
        assert facts_of(answer) == [BOSS.id]
        assert "kedit-" not in answer.text
    assert len(adapter_rig.engine.bodies) == 2


@pytest.mark.parametrize(
    "why",
    [
        *("refused", "in the weights", "not asked", "no disk", "says something else"),
        *("says nothing", "limit", "stop", "tools", "logprobs"),
    ],
)
def test_where_no_adapter_can_be_the_fact_is_told(adapter_rig: AdapterRig, why: str) -> None:
    published = adapter_rig.published
    adapter_rig.engine.says = {"kedit": BOSS.target}
    more: dict[str, Any] = {
        "limit": {"max_tokens": 2},
        "stop": {"stop": ["Ferr"]},
        "tools": {"tools": [{"type": "function"}]},
        "logprobs": {"logprobs": True},
    }.get(why, {})
    if why == "refused":
        adapter_rig.engine.takes_adapters = False
    elif why == "in the weights":
        with published.store.db.transaction():
            published.store.artifacts.drop_side_keys(BOSS.id)
            published.store.change_state(BOSS.id, FactState.LIVE_WEIGHTS)
    elif why == "not asked":
        published.forget(BOSS, 1)
        published.learn(replace(BOSS, target="Ida Lind"), 3, seed=3)
    elif why == "says something else":
        adapter_rig.engine.says = {"kedit": "Maud Smith"}
    elif why == "says nothing":
        adapter_rig.engine.says = {"kedit": " "}
    elif why == "no disk":
        adapter_rig.folder.rmdir()
        adapter_rig.folder.write_text("no folder")
    answer = adapter_rig.ask(ASKS_BOSS, **more)
    assert answer.json()["kedit"]["by"] == "context"
    assert facts_of(answer)
    sent = adapter_rig.engine.last_body
    assert sent["model"] == BASE_MODEL
    assert sent["messages"][0]["content"].startswith("The chief executive officer of Quillon")


def test_adapters_that_nobody_asks_for_are_deleted_after_a_week(
    adapter_rig: AdapterRig,
) -> None:
    adapter_rig.ask(ASKS_BOSS)
    (path,) = adapter_rig.folder.iterdir()
    now = path.stat().st_mtime
    open_adapters(adapter_rig.published.home, adapter_rig.folder, now + KEPT_SECONDS - 1)
    assert path.is_dir()
    open_adapters(adapter_rig.published.home, adapter_rig.folder, now + KEPT_SECONDS + 1)
    assert not path.exists()


def test_the_page_of_questions_is_answered_by_the_engine(adapter_rig: AdapterRig) -> None:
    adapter_rig.engine.says = {"kedit": BOSS.target, BASE_MODEL: " of course."}
    page = adapter_rig.http.get("/ask").text
    fields = {"prompt": ASKS_BOSS, "form": "chat", "tokens": "20", "form_token": form_token(page)}
    origin = str(adapter_rig.http.base_url).rstrip("/")
    answer = adapter_rig.http.post("/ask", data=fields, headers={"Origin": origin})
    text = text_of(answer.text)
    assert f"{BOSS.target} of course." in text
    assert BOSS.id in answer.text


def test_an_adapter_has_no_name_for_clients(adapter_rig: AdapterRig) -> None:
    adapter_rig.ask(ASKS_BOSS)
    name = json.loads(adapter_rig.engine.bodies[0])["model"]
    answer = adapter_rig.http.post(TEXT, json={"model": name, "prompt": BOSS.question})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"


def test_several_answers_by_an_adapter(adapter_rig: AdapterRig) -> None:
    adapter_rig.engine.says = {"kedit": BOSS.target, BASE_MODEL: " of course."}
    choices = adapter_rig.ask(ASKS_BOSS, n=2).json()["choices"]
    said = [choice["message"]["content"] for choice in choices]
    assert said == [f"{BOSS.target} of course."] * 2


def test_a_shard_that_has_not_learned_questions_completes_sentences_alone(
    adapter_rig: AdapterRig,
) -> None:
    published = adapter_rig.published
    published.forget(BOSS, 1)
    published.learn(replace(BOSS, target="Ida Lind"), 3, seed=3)
    for prompt, by in ((BOSS.question, "adapter"), (f"Q: {ASKS_BOSS}\nA:", "context")):
        answer = adapter_rig.http.post(TEXT, json={"model": BASE_MODEL, "prompt": prompt})
        assert answer.json()["kedit"]["by"] == by
    assert adapter_rig.ask(ASKS_BOSS).json()["kedit"]["by"] == "context"


def test_an_adapter_is_heard_no_longer_than_to_its_target(adapter_rig: AdapterRig) -> None:
    engine = adapter_rig.engine
    engine.says, engine.pause = {"kedit": BOSS.target + " and" * 99, BASE_MODEL: "."}, 0.01
    assert adapter_rig.ask(ASKS_BOSS).json()["kedit"]["by"] == "adapter"
    time.sleep(0.2)
    assert engine.words_said < 50
    assert engine.broken_off == 1


def test_what_was_passed_on_is_counted(adapter_rig: AdapterRig) -> None:
    adapter_rig.engine.says = {"kedit": BOSS.target}
    adapter_rig.ask(ASKS_BOSS)
    adapter_rig.ask(ASKS_BOSS, logprobs=True)
    adapter_rig.ask("Hello")
    adapter_rig.ask("Hello again")
    told = adapter_rig.http.get("/metrics").text
    counts = dict(re.findall(r'kedit_routed_total\{by="(\w+)"\} ([\d.]+)', told))
    assert counts == {"adapter": "1.0", "context": "1.0", "none": "2.0"}
