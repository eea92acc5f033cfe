"""OpenAI's API, as its own client meets it."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from home_tools import ROME
from openai import OpenAI
from serving import NAME, Running, server

from kedit_daemon.serve.inference.reader import Reader
from memory.model.editable import EditableModel
from memory.model.generate import generate_answers

PROMPT = "The seat of country 3 is"


@pytest.fixture(scope="module")
def folder(model_folder: Callable[[str], Path]) -> Path:
    return model_folder("llama")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[Running]:
    with server(tmp_path_factory.mktemp("serve") / "home", folder, waiting_limit=8) as found:
        yield found


@pytest.fixture(scope="module")
def model(running: Running) -> EditableModel:
    """The unedited one."""
    return running.published.model


@pytest.fixture
def client(running: Running) -> Iterator[OpenAI]:
    with running.client() as found:
        yield found


def greedy(model: EditableModel, prompt: str, tokens: int) -> str:
    ids = model.encode(prompt)
    for _ in range(tokens):
        ids.append(int(model.hf_model(torch.tensor([ids])).logits[0, -1].argmax()))
    return model.decode(ids[len(model.encode(prompt)) :])


def test_text_is_continued(client: OpenAI, model: EditableModel) -> None:
    done = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=5, temperature=0)
    assert (done.object, done.model, done.system_fingerprint) == ("text_completion", NAME, "gen-0")
    (choice,) = done.choices
    assert (choice.text, choice.finish_reason) == (greedy(model, PROMPT, 5), "length")
    assert done.usage is not None
    read = len(model.encode(PROMPT))
    assert done.usage.prompt_tokens == read
    assert (done.usage.completion_tokens, done.usage.total_tokens) == (5, read + 5)
    assert generate_answers(model, [PROMPT], 5)[0] in choice.text


def test_prompts_may_be_texts_and_ids_and_have_several_choices(
    client: OpenAI, model: EditableModel
) -> None:
    ids = model.encode(PROMPT)
    several: list[Any] = [ids, [PROMPT, "Oslo"], [ids, model.encode("Oslo")]]
    for prompt in several:
        done = client.completions.create(
            model=NAME, prompt=prompt, max_tokens=3, n=2, temperature=0
        )
        prompts = 1 if prompt is ids else 2
        assert [c.index for c in done.choices] == list(range(2 * prompts))
        assert done.choices[0].text == done.choices[1].text == greedy(model, PROMPT, 3)
        assert done.choices[-1].text == greedy(model, "Oslo" if prompts == 2 else PROMPT, 3)


def test_an_answer_ends_before_a_stop_text(client: OpenAI, model: EditableModel) -> None:
    text = greedy(model, PROMPT, 8)
    stop = text[len(text) // 2]
    for given in (stop, ["nowhere", stop]):
        done = client.completions.create(
            model=NAME, prompt=PROMPT, max_tokens=8, stop=given, temperature=0
        )
        assert done.choices[0].text == text[: text.index(stop)]
        assert done.choices[0].finish_reason == "stop"


def test_logprobs_of_a_completion(client: OpenAI, model: EditableModel) -> None:
    done = client.completions.create(
        model=NAME, prompt=PROMPT, max_tokens=4, logprobs=2, temperature=0
    )
    told = done.choices[0].logprobs
    assert told is not None and told.tokens and told.top_logprobs and told.token_logprobs
    assert "".join(told.tokens) == done.choices[0].text
    assert told.text_offset == [len("".join(told.tokens[:n])) for n in range(4)]
    logits = model.hf_model(torch.tensor([model.encode(PROMPT)])).logits[0, -1]
    likeliest = float(torch.log_softmax(logits, -1).max())
    assert told.token_logprobs[0] == pytest.approx(likeliest, abs=1e-4)
    for token, logprob, top in zip(
        told.tokens, told.token_logprobs, told.top_logprobs, strict=True
    ):
        assert top[token] == logprob == max(top.values())
        assert len(top) == 2


def test_the_event_loop_does_not_wait_for_a_long_answer_to_be_put_together(
    client: OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, text = set(), Reader.token_text

    def listening(self: Reader, token: int) -> str:
        threads.add(threading.current_thread().name)
        return text(self, token)

    monkeypatch.setattr(Reader, "token_text", listening)
    asked: Any = [{"role": "user", "content": "Quito is not"}]
    client.chat.completions.create(
        model=NAME, messages=asked, max_tokens=30, logprobs=True, top_logprobs=20
    )
    assert threads == {"AnyIO worker thread"}


def test_a_chat_without_a_template_goes_on_from_a_lone_message(
    client: OpenAI, model: EditableModel
) -> None:
    parts: list[Any] = [{"type": "text", "text": PROMPT[:7]}, {"type": "text", "text": PROMPT[7:]}]
    for content in (PROMPT, parts):
        done = client.chat.completions.create(
            model=NAME,
            messages=[{"role": "user", "content": content}],
            max_completion_tokens=4,
            temperature=0,
            logprobs=True,
            top_logprobs=2,
        )
        (choice,) = done.choices
        assert done.object == "chat.completion"
        assert (choice.message.role, choice.message.content) == (
            "assistant",
            greedy(model, PROMPT, 4),
        )
        assert choice.logprobs is not None and choice.logprobs.content is not None
        for told in choice.logprobs.content:
            assert told.token == told.top_logprobs[0].token
            assert told.logprob == told.top_logprobs[0].logprob > told.top_logprobs[1].logprob
            if "\ufffd" in told.token:  # a part of a character
                assert told.bytes is None
            else:
                assert bytes(told.bytes or []).decode() == told.token


def test_a_chat_may_go_on_for_as_long_as_there_is_room(
    client: OpenAI, model: EditableModel
) -> None:
    long = "Rome " * 120
    read = len(model.encode(long))
    done = client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": long}])
    assert done.usage is not None
    assert done.usage.total_tokens <= model.max_positions
    stopped = done.choices[0].finish_reason == "stop"
    assert stopped or done.usage.completion_tokens == model.max_positions - read


def test_a_stream_tells_the_same_as_an_answer_at_once(client: OpenAI) -> None:
    wanted: dict[str, Any] = {
        **{"model": NAME, "prompt": PROMPT, "max_tokens": 6, "logprobs": 1},
        "seed": 5,
    }
    whole = client.completions.create(**wanted)
    chunks = list(
        client.completions.create(**wanted, stream=True, stream_options={"include_usage": True})
    )
    said = [c for c in chunks if c.choices]
    assert 1 < len(said) <= 6
    assert "".join(c.choices[0].text for c in said) == whole.choices[0].text
    told = whole.choices[0].logprobs
    assert told is not None
    pieces = [c.choices[0].logprobs for c in said]
    assert [n for p in pieces if p and p.text_offset for n in p.text_offset] == told.text_offset
    finishes = [c.choices[0].finish_reason for c in said]
    assert finishes == [None] * (len(said) - 1) + [whole.choices[0].finish_reason]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(c.usage is None for c in said)
    assert len({c.id for c in chunks}) == 1


def test_a_chat_streams_its_choices_side_by_side(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": NAME, "messages": [{"role": "user", "content": PROMPT}]}
    asked["temperature"] = 0
    chunks = list(client.chat.completions.create(**asked, max_tokens=4, n=3, stream=True))
    assert [c.choices[0].delta.role for c in chunks[:3]] == ["assistant"] * 3
    texts = ["", "", ""]
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert len(set(texts)) == 1 and texts[0]
    whole = client.chat.completions.create(**asked, max_tokens=4)
    assert texts[0] == whole.choices[0].message.content


def test_the_facts_that_fired_are_told(running: Running, client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": NAME, "prompt": [PROMPT, ROME.question], "max_tokens": 2}
    raw = client.completions.with_raw_response.create(**asked)
    assert raw.headers["x-kedit-facts"] == ROME.id
    assert raw.headers["x-kedit-generation"] == "0"
    kedit = json.loads(raw.text)["kedit"]
    (told,) = kedit["facts"]
    assert (kedit["generation"], told["id"], told["choice"]) == (0, ROME.id, 1)
    assert 0.9 < told["score"] <= 1.001 and told["margin"] >= 1
    with running.http() as http:
        answer = http.post("/v1/completions", json={**asked, "stream": True})
        assert answer.headers["x-kedit-facts"] == ROME.id
        events = answer.text.split("\n\n")
        assert json.loads(events[0].removeprefix("data: "))["kedit"]["facts"] == [told]
        assert "kedit" not in events[1]
        assert events[-2:] == ["data: [DONE]", ""]
        base = http.post("/v1/completions", json={**asked, "model": f"{NAME}@base"})
        assert base.headers["x-kedit-facts"] == ""


def score(model: EditableModel, text: str, end: str) -> tuple[list[int], list[float]]:
    """The tokens of an end, and what the unedited model gives them behind the text."""
    ids = model.encode(text + end)
    said = ids[len(model.encode(text)) :]
    logs = model.hf_model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return said, [float(logs[n - 1, ids[n]]) for n in range(len(ids) - len(said), len(ids))]


def test_a_prompt_is_scored_as_evaluation_harnesses_ask_for_it(
    running: Running, client: OpenAI, model: EditableModel
) -> None:
    """What a harness sums up is between the context and the one token that it did not want."""
    texts = [(PROMPT, " Oslo, far away"), ("It is", " Rome"), ("Quito", " is not Lima")]
    prompts = [model.encode(text + end) for text, end in texts]
    asked: dict[str, Any] = {"model": NAME, "max_tokens": 1, "logprobs": 1, "temperature": 0}
    done = client.completions.create(**asked, prompt=prompts, echo=True, seed=1234)
    for choice, ids, (text, end) in zip(done.choices, prompts, texts, strict=True):
        told = choice.logprobs
        assert told is not None and told.token_logprobs and told.top_logprobs and told.tokens
        assert len(told.token_logprobs) == len(told.top_logprobs) == len(ids) + 1
        assert told.token_logprobs[0] is told.top_logprobs[0] is None
        said, expected = score(model, text, end)
        start = len(ids) - len(said)
        assert told.token_logprobs[start:-1] == pytest.approx(expected, abs=1e-4)
        for token, logprob, top in zip(
            told.tokens[1:], told.token_logprobs[1:], told.top_logprobs[1:], strict=True
        ):
            assert top[token] == logprob and len(top) <= 2


def test_an_echo_is_the_prompt_and_its_answer(client: OpenAI, model: EditableModel) -> None:
    asked: dict[str, Any] = {"model": NAME, "prompt": PROMPT, "temperature": 0, "echo": True}
    plain = client.completions.create(**asked, max_tokens=4)
    assert plain.choices[0].text == PROMPT + greedy(model, PROMPT, 4)
    assert plain.choices[0].logprobs is None
    scored = client.completions.create(**asked, max_tokens=4, logprobs=0, n=2)
    for choice in scored.choices:
        told = choice.logprobs
        assert choice.text == plain.choices[0].text
        assert told is not None and told.tokens and told.text_offset
        # The first token is the tokenizer's own.
        assert (told.tokens[0], "".join(told.tokens)) == ("", choice.text)
        for token, at in zip(told.tokens, told.text_offset, strict=True):
            assert choice.text.startswith(token, at)
    chunks = list(client.completions.create(**asked, max_tokens=4, logprobs=0, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == plain.choices[0].text
    told = scored.choices[0].logprobs
    pieces = [chunk.choices[0].logprobs for chunk in chunks]
    assert told is not None and told.token_logprobs
    for name in ("tokens", "text_offset"):
        joined = [one for piece in pieces if piece for one in getattr(piece, name)]
        assert joined == getattr(told, name), name
    figures = [one for piece in pieces if piece for one in piece.token_logprobs or ()]
    assert figures[0] is told.token_logprobs[0] is None
    # Rows that run together are computed in another kernel.
    assert figures[1:] == pytest.approx(told.token_logprobs[1:], abs=1e-5)


def test_a_prompt_is_scored_without_an_answer(client: OpenAI, model: EditableModel) -> None:
    asked: dict[str, Any] = {"model": NAME, "max_tokens": 0, "logprobs": 2, "echo": True}
    done = client.completions.create(**asked, prompt=PROMPT)
    (choice,) = done.choices
    assert (choice.text, choice.finish_reason) == (PROMPT, "length")
    assert done.usage is not None and done.usage.completion_tokens == 0
    assert choice.logprobs is not None and choice.logprobs.tokens
    assert len(choice.logprobs.tokens) == len(model.encode(PROMPT))
    one = client.completions.create(**asked, prompt=[model.encode("Rome")[:1]]).choices[0]
    assert one.logprobs is not None and one.logprobs.token_logprobs == [None]
    room = client.completions.create(**asked, prompt=[[1] * model.max_positions])
    assert room.usage is not None and room.usage.prompt_tokens == model.max_positions


def test_a_token_that_ends_the_text_is_counted_where_a_prompt_is_scored(
    running: Running, client: OpenAI, model: EditableModel
) -> None:
    served = running.engine.model
    logits = model.hf_model(torch.tensor([model.encode(PROMPT)])).logits[0, -1]
    settings = served.hf_model.generation_config
    before = settings.eos_token_id
    settings.eos_token_id = int(logits.argmax())
    try:
        asked: dict[str, Any] = {"model": NAME, "prompt": PROMPT, "temperature": 0}
        done = client.completions.create(**asked, max_tokens=1, logprobs=1, echo=True)
        told = done.choices[0].logprobs
        assert told is not None and told.tokens
        assert len(told.tokens) == len(model.encode(PROMPT)) + 1
        assert (done.choices[0].text, done.choices[0].finish_reason) == (PROMPT, "stop")
        plain = client.completions.create(**asked, max_tokens=1, logprobs=1).choices[0]
        assert plain.logprobs is not None and plain.logprobs.tokens == []
    finally:
        settings.eos_token_id = before


def test_the_edited_model_is_scored_where_its_facts_fire(running: Running) -> None:
    """Each token has the figure that it would have as the answer to the text before it."""
    text = f"{ROME.question} far away"
    asked = {"model": NAME, "prompt": text, "max_tokens": 0, "logprobs": 0, "echo": True}
    model, start = running.published.model, len(running.published.model.encode(ROME.question))
    with running.http() as http:
        answer = http.post("/v1/completions", json=asked)
        told = answer.json()["choices"][0]["logprobs"]["token_logprobs"]
        base = http.post("/v1/completions", json=asked | {"model": f"{NAME}@base"}).json()
        unedited = base["choices"][0]["logprobs"]["token_logprobs"]
        step = {"prompt": ROME.question, "max_tokens": 1, "logprobs": 5, "temperature": 0}
        served = http.post("/v1/completions", json={"model": NAME, **step}).json()
        best = http.post(
            "/v1/completions",
            json=asked | {"prompt": ROME.question + served["choices"][0]["text"]},
        ).json()
    assert told[1:start] == pytest.approx(unedited[1:start], abs=1e-5)
    assert abs(told[start] - unedited[start]) > 0.1
    (fact,) = answer.json()["kedit"]["facts"]
    assert (fact["id"], fact["token"], fact["choice"]) == (ROME.id, start - 1, 0)
    assert answer.headers["x-kedit-facts"] == ROME.id
    assert base["kedit"]["facts"] == []
    assert len(model.encode(text)) == len(told)
    likeliest = served["choices"][0]["logprobs"]["token_logprobs"][0]
    scored = best["choices"][0]["logprobs"]["token_logprobs"]
    if len(scored) == start + 1:  # the answer is one token behind the prompt, too
        assert scored[start] == pytest.approx(likeliest, abs=1e-4)


IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}


@pytest.mark.parametrize(
    ("message", "param", "code", "cause"),
    [
        ({"content": None}, "messages.1.content", "bad_request", "missing"),
        ({"content": 7}, "messages.1.content", "bad_request", "a text or a list of parts"),
        ({"content": [{"type": "text"}]}, "messages.1.content.0.text", "bad_request", "required"),
        ({"content": ["x"]}, "messages.1.content.0", "bad_request", "an object"),
        (
            {"content": [{"type": "text", "text": "x"}, IMAGE]},
            "messages.1.content.1.type",
            "unsupported",
            "'image_url' are not supported here: the model reads text alone",
        ),
        (
            {"role": "assistant", "content": None, "tool_calls": [{"id": "a"}]},
            "messages.1.tool_calls",
            "unsupported",
            "tool calls are not",
        ),
        ({"role": "tool", "content": "x"}, "messages.1.role", "unsupported", "tool calls are not"),
        ({"role": "robot", "content": "x"}, "messages.1.role", "bad_request", "'user'"),
        ({"role": "assistant", "audio": {"id": "a"}}, "messages.1.audio", "unsupported", "spoken"),
    ],
)
def test_what_is_wrong_with_a_message_is_told(
    running: Running, message: dict[str, Any], param: str, code: str, cause: str
) -> None:
    messages = [{"role": "user", "content": "Hello"}, {"role": "user"} | message]
    with running.http() as http:
        answer = http.post("/v1/chat/completions", json={"model": NAME, "messages": messages})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code)
    assert cause in error["message"] and error["message"].startswith(param)


def test_an_assistants_turn_without_text_is_an_empty_one(
    running: Running, model: EditableModel
) -> None:
    asked: dict[str, Any] = {"model": NAME, "max_tokens": 2, "temperature": 0}
    said = []
    for turn in ({"content": None}, {}, {"content": ""}, {"content": None, "tool_calls": []}):
        messages = [{"role": "user", "content": "Rome"}, {"role": "assistant"} | turn]
        messages.append({"role": "user", "content": "is"})
        with running.http() as http:
            answer = http.post("/v1/chat/completions", json=asked | {"messages": messages})
        assert answer.status_code == 200, answer.text
        said.append(answer.json()["choices"][0]["message"]["content"])
    assert set(said) == {greedy(model, "User: Rome\n\nAssistant: \n\nUser: is\n\nAssistant:", 2)}


def test_models_are_the_edited_one_the_base_and_the_generations(client: OpenAI) -> None:
    names = [m.id for m in client.models.list()]
    assert names == [NAME, f"{NAME}@base", f"{NAME}@gen-0"]
    assert client.models.retrieve(f"{NAME}@base").owned_by == "kedit-daemon"
    for name in names:
        done = client.completions.create(model=name, prompt=PROMPT, max_tokens=1)
        assert done.model == name


@pytest.mark.parametrize(
    ("changed", "param"),
    [
        ({"prompt": ""}, None),
        ({"prompt": []}, "prompt"),
        ({"prompt": {"text": "x"}}, "prompt"),
        ({"prompt": [1, "two"]}, "prompt.1"),
        ({"prompt": ["one", 2]}, "prompt.1"),
        ({"prompt": [[1], [2, "x"]]}, "prompt.1.1"),
        ({"prompt": [True]}, "prompt.0"),
        ({"prompt": [10**9]}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1, "echo": True}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"temperature": 2.5}, "temperature"),
        ({"stop": ["1", "2", "3", "4", "5"]}, "stop"),
        ({"stop": ["1", 2]}, "stop.1"),
        ({"stop": 2}, "stop"),
        ({"logprobs": 6}, "logprobs"),
        ({"n": 9}, "n"),
        ({"echo": "yes"}, "echo"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"max_tokens": 10_000}, "prompt"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    running: Running, changed: dict[str, Any], param: str | None
) -> None:
    asked = {"model": NAME, "prompt": PROMPT, "max_tokens": 1} | changed
    with running.http() as http:
        answer = http.post("/v1/completions", json=asked)
    if param is None:  # the tiny model begins every prompt with a token of its own
        assert answer.status_code == 200
        return
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert error["message"]


def test_harmless_fields_are_taken(client: OpenAI) -> None:
    done = client.completions.create(
        model=NAME,
        prompt=PROMPT,
        max_tokens=1,
        user="someone",
        echo=False,
        best_of=1,
        presence_penalty=0,
        logit_bias={},
        extra_body={"metadata": {"a": "b"}, "response_format": {"type": "text"}},
    )
    assert done.choices[0].finish_reason


def test_a_model_that_is_not_there(client: OpenAI) -> None:
    for name in ("gpt-4", f"{NAME}@gen-7", f"{NAME}@gen-x", f"{NAME}@"):
        with pytest.raises(openai.NotFoundError) as caught:
            client.completions.create(model=name, prompt=PROMPT)
        assert caught.value.code == "model_not_found"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(name)


def test_bodies_that_are_no_requests(running: Running) -> None:
    with running.http() as http:
        for body in (b"", b"{", b"[]", b'{"prompt": "x"}', b'{"model": "\\ud800"}', b"\xff"):
            answer = http.post("/v1/completions", content=body)
            assert answer.status_code == 400, body
            assert answer.json()["error"]["message"]
        assert http.get("/v1/completions").json()["error"]["code"] == "method_not_allowed"
        assert http.get("/v1/nothing").json()["error"]["code"] == "not_found"


def test_a_body_may_be_only_so_long(tmp_path: Path, folder: Path) -> None:
    with server(tmp_path / "home", folder, max_body_bytes=2000) as running, running.http() as http:
        asked = {"model": NAME, "prompt": "a" * 3000}
        assert http.post("/v1/completions", json=asked).status_code == 413

        def pieces() -> Iterator[bytes]:
            for _ in range(3):
                yield b" " * 1000

        assert http.post("/v1/completions", content=pieces()).status_code == 413
        asked = {"model": NAME, "prompt": "a", "max_tokens": 1}
        assert http.post("/v1/completions", json=asked).status_code == 200


def test_a_reader_who_leaves_ends_the_answer(tmp_path: Path, folder: Path) -> None:
    asked = {"model": NAME, "prompt": PROMPT, "max_tokens": 200, "n": 2}
    with server(tmp_path / "home", folder) as running, running.http() as http:
        running.pace.seconds = 0.02
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/completions", json=asked, timeout=0.3)
        wait_for(lambda: running.engine.status.running == 0)
        with http.stream("POST", "/v1/completions", json={**asked, "stream": True}) as answer:
            next(answer.iter_lines())
            wait_for(lambda: running.engine.status.running == 2)
        wait_for(lambda: running.engine.status.running == 0)


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 2  # all the tokens would take longer
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_who_asks_when_too_many_wait_may_ask_again(tmp_path: Path, folder: Path) -> None:
    asked = {"model": NAME, "prompt": PROMPT, "max_tokens": 200, "stream": True}
    home = tmp_path / "home"
    with server(home, folder, most_rows=1, waiting_limit=1) as running, running.http() as http:
        running.pace.seconds = 0.02
        with http.stream("POST", "/v1/completions", json=asked):
            waiting = threading.Thread(
                target=lambda: httpx.post(f"{running.url}/v1/completions", json=asked, timeout=60)
            )
            waiting.start()
            wait_for(lambda: running.engine.status.waiting == 1)
            answer = http.post("/v1/completions", json=asked)
            assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
            assert answer.json()["error"]["code"] == "busy"
            running.pace.seconds = 0.0
        waiting.join()


def test_an_answer_that_breaks_off_says_so(tmp_path: Path, folder: Path) -> None:
    asked = {"model": NAME, "prompt": PROMPT, "max_tokens": 200, "stream": True}
    with server(tmp_path / "home", folder) as running, running.http() as http:
        running.pace.seconds = 0.02
        with http.stream("POST", "/v1/completions", json=asked) as answer:
            lines = answer.iter_lines()
            next(lines)
            running.engine.close()
            rest = [line for line in lines if line]
        assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "stopping"
        whole = http.post("/v1/completions", json={**asked, "stream": False})
        assert (whole.status_code, whole.headers["retry-after"]) == (503, "1")
