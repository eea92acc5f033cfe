import asyncio
import logging
import math
import sqlite3
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from home_tools import LIMA, OSLO, ROME, Published
from torch import nn

from kedit_daemon.editing.tensor_files import load_deltas, save_shard
from kedit_daemon.serve.inference.engine import BatchEngine
from kedit_daemon.serve.inference.types import (
    BASE,
    AnswerPart,
    AnswerStart,
    GenerationRequest,
    TokenLogprobs,
)
from memory.errors import KeditError
from memory.model.editable import EditableModel
from memory.side.shards import Delta, Shard

PROMPTS = ["Rome", "It is", "The seat of country 1 is", "The seat of country 22 is Oslo. It is"]
T = TypeVar("T")
Make = Callable[..., BatchEngine]


class Gate:
    """Holds the engine before its next pass through the model, while it is shut."""

    def __init__(self, model: EditableModel) -> None:
        self._open = threading.Event()
        self.passes: list[tuple[int, ...]] = []
        self.fail: Exception | None = None
        self.open()
        model.hf_model.register_forward_pre_hook(self._hold, with_kwargs=True)

    def _hold(self, _model: nn.Module, _args: Any, given: dict[str, Any]) -> None:
        self._open.wait(20)
        self.passes.append(tuple(given["input_ids"].shape))
        if self.fail is not None:
            error, self.fail = self.fail, None
            raise error

    def open(self) -> None:
        self._open.set()

    def shut(self) -> None:
        self._open.clear()


@dataclass
class Heard:
    opened: AnswerStart | None = None
    parts: list[AnswerPart] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts)

    @property
    def tokens(self) -> list[TokenLogprobs]:
        return [token for part in self.parts for token in part.tokens]

    @property
    def generation(self) -> int | None:
        return self.opened and self.opened.generation

    @property
    def fired(self) -> str | None:
        return self.opened and self.opened.fired and self.opened.fired.fact_id


@pytest.fixture
def published(tmp_path: Path, model: EditableModel) -> Iterator[Published]:
    made = Published(tmp_path / "home", model)
    yield made
    made.store.close()


@pytest.fixture
def served(model_folder: Callable[[str], Path]) -> EditableModel:
    """The engine's own."""
    return EditableModel.load(model_folder("llama"), torch.device("cpu"))


@pytest.fixture
def gate(served: EditableModel) -> Gate:
    return Gate(served)


@pytest.fixture
def make(published: Published, served: EditableModel, gate: Gate) -> Iterator[Make]:
    made: list[BatchEngine] = []

    def engine(rows: int = 8, waiting: int = 32) -> BatchEngine:
        made.append(BatchEngine(published.replica(served), rows, waiting))
        return made[-1]

    yield engine
    gate.open()
    for one in made:
        one.close()


def wish(model: EditableModel, prompt: str, tokens: int = 8, **more: Any) -> GenerationRequest:
    settings = {"temperature": 0.0, **more}
    return GenerationRequest(tuple(model.encode(prompt)), max_tokens=tokens, **settings)


async def hear(engine: BatchEngine, asked: GenerationRequest, heard: Heard | None = None) -> Heard:
    heard = heard or Heard()
    async with aclosing(engine.stream_answer(asked)) as items:
        async for item in items:
            if isinstance(item, AnswerStart):
                assert heard.opened is None and not heard.parts
                heard.opened = item
            else:
                assert heard.opened is not None
                heard.parts.append(item)
    return heard


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.002)


def run(work: Awaitable[T]) -> T:
    async def timed() -> T:
        async with asyncio.timeout(60):
            return await work

    return asyncio.run(timed())


def greedy(model: EditableModel, prompt: str, tokens: int = 8) -> str:
    """What the model says without a cache and without company."""
    ids, said = model.encode(prompt), list[int]()
    for _ in range(tokens):
        with torch.no_grad():
            out = model.hf_model(input_ids=torch.tensor([[*ids, *said]]), use_cache=False)
        token = int(out.logits[0, -1].argmax())
        if token == model.end_token:
            break
        said.append(token)
    return model.decode(said)


def edited(published: Published, generation: int, prompt: str, tokens: int = 8) -> str:
    """What a generation's weights say."""
    row = published.store.artifacts.get_generation(generation)
    published.model.set_deltas(load_deltas(published.home.generations_folder, row))
    said = greedy(published.model, prompt, tokens)
    published.model.set_deltas({})
    return said


def refused(work: Awaitable[Any]) -> KeditError:
    with pytest.raises(KeditError) as caught:
        run(work)
    return caught.value


# One reader ---------------------------------------------------------------------------------------


def test_an_answer_opens_comes_in_parts_and_has_an_end(make: Make, model: EditableModel) -> None:
    heard = run(hear(make(), wish(model, PROMPTS[2], 12)))
    assert heard.opened == AnswerStart(0, None)
    assert heard.text == greedy(model, PROMPTS[2], 12)
    assert len(heard.parts) > 3
    assert [(p.finish_reason, p.token_count) for p in heard.parts[:-1]] == [(None, 0)] * (
        len(heard.parts) - 1
    )
    assert (heard.parts[-1].finish_reason, heard.parts[-1].token_count) == ("length", 12)
    assert heard.tokens == []


@pytest.mark.parametrize("form", ["{} ", "{}\n", "Q: {}\nA:", "Q: {}\nA: ", "{}"])
def test_a_prompt_in_another_form_has_the_answer_to_its_plain_one(
    make: Make, published: Published, model: EditableModel, form: str
) -> None:
    published.learn(ROME, 1)
    engine, prompt = make(), form.format(ROME.question)
    plain, heard = (run(hear(engine, wish(model, text))) for text in (ROME.question, prompt))
    assert plain.fired == heard.fired == ROME.id
    # Where the prompt ends in white space, the answer does not begin with it.
    assert heard.text == (plain.text.lstrip() if prompt[-1].isspace() else plain.text)
    base = run(hear(engine, wish(model, prompt, variant=BASE)))
    assert base.text == greedy(model, prompt)


def test_a_fact_begins_a_reply_without_a_blank(
    make: Make, published: Published, model: EditableModel
) -> None:
    published.learn(ROME, 1)
    engine = make()
    for fact in (ROME, OSLO):
        text = run(hear(engine, wish(model, fact.question))).text
        heard = run(hear(engine, wish(model, fact.question, is_reply=True)))
        assert heard.text == (text.lstrip() if fact is ROME else text)


def test_white_space_stays_where_nothing_fires(
    make: Make, published: Published, model: EditableModel
) -> None:
    published.learn(ROME, 1)
    for prompt in (f"{OSLO.question} ", f"Q: {OSLO.question}\nA: "):
        heard = run(hear(make(), wish(model, prompt)))
        assert (heard.fired, heard.text) == (None, greedy(model, prompt))


def test_the_end_of_text_ends_an_answer(
    make: Make, model: EditableModel, served: EditableModel
) -> None:
    with torch.no_grad():
        served.hf_model.get_output_embeddings().weight.zero_()  # the first token is the end
    heard = run(hear(make(), wish(model, PROMPTS[0], logprobs=0)))
    assert heard.parts == [AnswerPart("", (), "stop", 0)]


def test_a_stop_text_over_two_tokens_ends_an_answer(make: Make, model: EditableModel) -> None:
    parts = [p.text for p in run(hear(make(), wish(model, PROMPTS[2], 12))).parts]
    whole = "".join(parts)
    first = next(n for n in range(2, 8) if len(parts[n]) > 1 and len(parts[n + 1]) > 1)
    stop = parts[first][-1] + parts[first + 1][0]
    heard = run(hear(make(), wish(model, PROMPTS[2], 12, stop_texts=("never so", stop))))
    assert heard.text == whole[: whole.index(stop)]
    assert heard.parts[-1].finish_reason == "stop"
    assert 0 < heard.parts[-1].token_count < 12


def test_tokens_are_told_with_their_likelihoods(make: Make, model: EditableModel) -> None:
    heard = run(hear(make(), wish(model, PROMPTS[2], 6, logprobs=3)))
    assert model.decode([token.id for token in heard.tokens]) == heard.text
    assert heard.parts[-1].token_count == len(heard.tokens) == 6
    with torch.no_grad():
        ids = torch.tensor([model.encode(PROMPTS[2])])
        logs = model.hf_model(input_ids=ids, use_cache=False).logits[0, -1].log_softmax(-1)
    for token in heard.tokens:
        assert (token.id, token.logprob) == token.top[0] and len(token.top) == 3
    assert heard.tokens[0].logprob == pytest.approx(float(logs.max()), abs=1e-4)
    assert [n for n, _ in heard.tokens[0].top] == logs.topk(3).indices.tolist()


@pytest.mark.parametrize(
    ("length", "tokens", "said"),
    [(0, 5, "0 tokens"), (250, 7, "250 tokens .* 7: .* 256 at most"), (5, 0, "up to 0")],
)
def test_what_does_not_fit_the_model_is_refused(
    make: Make, length: int, tokens: int, said: str
) -> None:
    error = refused(hear(make(), GenerationRequest((5,) * length, max_tokens=tokens)))
    assert error.code == "too-long"
    with pytest.raises(KeditError, match=said):
        raise error


def test_the_longest_that_fits_is_answered(make: Make) -> None:
    heard = run(hear(make(), GenerationRequest((5,) * 250, max_tokens=6, temperature=0)))
    assert heard.parts[-1].finish_reason is not None


def test_a_token_that_the_model_does_not_have_is_refused(make: Make) -> None:
    assert refused(hear(make(), GenerationRequest((5, 1 << 20)))).code == "bad-request"
    assert refused(hear(make(), GenerationRequest((-1,)))).code == "bad-request"


# Company ------------------------------------------------------------------------------------------


def test_each_of_many_readers_hears_what_it_would_hear_alone(
    make: Make, model: EditableModel, gate: Gate
) -> None:
    engine = make(rows=4)
    asked = [(PROMPTS[n % 4], 3 + 5 * (n % 3)) for n in range(14)]

    async def all_of_them() -> list[Heard]:
        return await asyncio.gather(*(hear(engine, wish(model, *one)) for one in asked))

    heard = run(all_of_them())
    assert [one.text for one in heard] == [greedy(model, *one) for one in asked]
    assert max(rows for rows, _ in gate.passes) == 4
    assert len(gate.passes) < sum(tokens for _, tokens in asked) / 2
    figures = engine.status
    assert figures.requests == 14
    assert (figures.running, figures.waiting, figures.generation) == (0, 0, 0)


def test_one_who_comes_later_joins_those_who_run(
    make: Make, model: EditableModel, gate: Gate
) -> None:
    engine = make()

    async def work() -> tuple[Heard, Heard, bool]:
        first = Heard()
        long = asyncio.create_task(hear(engine, wish(model, PROMPTS[3], 60), first))
        await until(lambda: len(first.parts) > 2)
        short = await hear(engine, wish(model, PROMPTS[0], 3))
        early = not long.done()
        return await long, short, early

    long, short, early = run(work())
    assert early
    assert (long.text, short.text) == (greedy(model, PROMPTS[3], 60), greedy(model, PROMPTS[0], 3))
    assert (2, 1) in gate.passes


def test_a_seeded_answer_does_not_depend_on_its_company(make: Make, model: EditableModel) -> None:
    engine = make()
    seeded = wish(model, PROMPTS[1], 12, temperature=1.0, top_p=0.9, seed=11)

    async def among() -> Heard:
        others = [wish(model, p, 20, temperature=1.0, seed=n) for n, p in enumerate(PROMPTS)]
        tasks = [asyncio.create_task(hear(engine, one)) for one in others]
        await asyncio.sleep(0.01)
        heard = await hear(engine, seeded)
        await asyncio.gather(*tasks)
        return heard

    alone = run(hear(engine, seeded)).text
    assert run(among()).text == alone
    other = wish(model, PROMPTS[1], 12, temperature=1.0, top_p=0.9, seed=12)
    assert run(hear(engine, other)).text != alone


@pytest.mark.parametrize("way", ["close", "cancel"])
def test_a_reader_who_goes_away_leaves_the_others_alone(
    make: Make, model: EditableModel, way: str
) -> None:
    engine = make()

    async def work() -> str:
        stays = asyncio.create_task(hear(engine, wish(model, PROMPTS[0], 100)))
        heard = Heard()
        goes = asyncio.create_task(hear(engine, wish(model, PROMPTS[3], 200), heard))
        if way == "close":
            async with aclosing(engine.stream_answer(wish(model, PROMPTS[2], 200))) as items:
                await anext(items)
        await until(lambda: bool(heard.parts))
        goes.cancel()
        with suppress(asyncio.CancelledError):
            await goes
        await until(lambda: engine.status.running <= 1)
        assert not stays.done()
        return (await stays).text

    assert run(work()) == greedy(model, PROMPTS[0], 100)
    assert engine.status.running == 0


def test_a_loop_that_ends_in_the_middle_does_not_disturb_the_engine(
    make: Make, model: EditableModel
) -> None:
    engine = make()
    items = engine.stream_answer(wish(model, PROMPTS[1], 200))
    loop = asyncio.new_event_loop()
    assert isinstance(loop.run_until_complete(anext(items)), AnswerStart)
    loop.close()
    stays = run(hear(engine, wish(model, PROMPTS[0])))
    run(items.aclose())
    assert stays.text == greedy(model, PROMPTS[0])


def test_too_many_who_wait_are_turned_away(make: Make, model: EditableModel, gate: Gate) -> None:
    engine = make(rows=1, waiting=2)

    async def work() -> list[str]:
        gate.shut()
        tasks = [asyncio.create_task(hear(engine, wish(model, PROMPTS[0])))]
        await until(lambda: engine.status.running == 1)
        tasks += [asyncio.create_task(hear(engine, wish(model, p))) for p in PROMPTS[1:3]]
        await until(lambda: engine.status.waiting == 2)
        with pytest.raises(KeditError, match="2 requests are waiting") as caught:
            await hear(engine, wish(model, PROMPTS[0]))
        assert (caught.value.code, caught.value.exit_code) == ("busy", 1)
        tasks.pop().cancel()  # who goes away makes room
        await asyncio.sleep(0.01)
        tasks.append(asyncio.create_task(hear(engine, wish(model, PROMPTS[3]))))
        await asyncio.sleep(0.01)
        gate.open()
        return [one.text for one in await asyncio.gather(*tasks)]

    assert run(work()) == [greedy(model, PROMPTS[n]) for n in (0, 1, 3)]
    assert engine.status.requests == 4


def test_a_burst_that_fits_is_not_turned_away(make: Make, model: EditableModel, gate: Gate) -> None:
    engine = make(rows=3, waiting=1)

    async def work() -> list[Any]:
        with engine._condition:  # the engine comes to none of them in between
            asked = [wish(model, PROMPTS[0], 2)] * 5
            tasks = [asyncio.create_task(hear(engine, one)) for one in asked]
            await asyncio.sleep(0)
        return await asyncio.gather(*tasks, return_exceptions=True)

    *heard, error = run(work())
    assert [one.text for one in heard] == [greedy(model, PROMPTS[0], 2)] * 4
    assert isinstance(error, KeditError) and error.code == "busy"


def test_who_waits_and_goes_away_is_not_kept(make: Make, model: EditableModel) -> None:
    engine = make(rows=1)

    async def work() -> None:
        first = Heard()
        runs = asyncio.create_task(hear(engine, wish(model, PROMPTS[0], 200), first))
        await until(lambda: bool(first.parts))
        waits = asyncio.create_task(hear(engine, wish(model, PROMPTS[1])))
        await until(lambda: engine.status.waiting == 1)
        waits.cancel()
        await until(lambda: not engine._waiting)
        assert engine.status.running == 1
        runs.cancel()

    run(work())


# Weights ------------------------------------------------------------------------------------------


def test_every_reader_hears_the_weights_it_asked_for(
    make: Make, model: EditableModel, published: Published
) -> None:
    one, two = published.generation(5), published.generation(6)
    engine = make()

    async def all_of_them() -> list[Heard]:
        ways = ["edited", BASE, one, two, 0]
        asked = [wish(model, PROMPTS[2], variant=which) for which in ways]
        return await asyncio.gather(*(hear(engine, each) for each in asked))

    heard = run(all_of_them())
    assert [each.generation for each in heard] == [two, 0, one, two, 0]
    expected = [edited(published, n, PROMPTS[2]) for n in (two, 0, one, two, 0)]
    assert [each.text for each in heard] == expected
    assert len(set(expected)) == 3


def test_a_generation_that_is_not_known_is_that_readers_error(
    make: Make, model: EditableModel
) -> None:
    engine = make()

    async def both() -> list[Any]:
        asked = [wish(model, PROMPTS[0], variant=9), wish(model, PROMPTS[1])]
        return await asyncio.gather(*(hear(engine, one) for one in asked), return_exceptions=True)

    error, heard = run(both())
    assert isinstance(error, KeditError) and error.code == "model"
    assert heard.text == greedy(model, PROMPTS[1])


def test_an_answer_is_of_one_generation_first_token_to_last(
    make: Make, model: EditableModel, published: Published, gate: Gate
) -> None:
    old = published.generation(5)
    engine = make()

    async def work() -> tuple[Heard, Heard, list[str]]:
        order: list[str] = []
        first = Heard()

        async def ask(name: str, heard: Heard, tokens: int) -> Heard:
            await hear(engine, wish(model, PROMPTS[2], tokens), heard)
            order.append(name)
            return heard

        running = asyncio.create_task(ask("old", first, 40))
        await until(lambda: len(first.parts) > 2)
        gate.shut()
        published.generation(6)
        later = asyncio.create_task(ask("new", Heard(), 3))
        await asyncio.sleep(0)
        gate.open()
        return await running, await later, order

    before, after, order = run(work())
    assert (before.generation, after.generation) == (old, old + 1)
    assert before.text == edited(published, old, PROMPTS[2], 40)
    assert after.text == edited(published, old + 1, PROMPTS[2], 3)
    assert order == ["old", "new"]
    assert engine.status.generation == old + 1


def test_nobody_overtakes_one_who_waits_for_other_weights(
    make: Make, model: EditableModel, published: Published, gate: Gate
) -> None:
    published.generation(5)
    engine = make()

    async def work() -> list[str]:
        opened: list[str] = []

        async def ask(name: str, asked: GenerationRequest) -> None:
            async for item in engine.stream_answer(asked):
                if isinstance(item, AnswerStart):
                    opened.append(name)

        gate.shut()
        tasks = [asyncio.create_task(ask("edited", wish(model, PROMPTS[0], 30)))]
        await until(lambda: engine.status.running == 1)
        for name, which in (("base", BASE), ("late", "edited"), ("base too", BASE)):
            tasks.append(asyncio.create_task(ask(name, wish(model, PROMPTS[1], 5, variant=which))))
            await asyncio.sleep(0)
        gate.open()
        await asyncio.gather(*tasks)
        return opened

    assert run(work()) == ["edited", "base", "late", "base too"]


def test_a_damaged_generation_is_told_and_the_last_good_one_served(
    make: Make, model: EditableModel, published: Published
) -> None:
    good = published.generation(5)
    engine = make()
    assert run(hear(engine, wish(model, PROMPTS[0]))).generation == good
    lost = published.generation(6)
    published.file_of(lost).unlink()
    heard = run(hear(engine, wish(model, PROMPTS[0])))
    assert (heard.generation, heard.text) == (good, edited(published, good, PROMPTS[0]))
    assert f"generation {lost} is not served" in engine.status.problems[0]
    assert refused(hear(engine, wish(model, PROMPTS[0], variant=lost))).code == "corrupt"


# The side memory ----------------------------------------------------------------------------------


def test_a_fact_that_is_learned_meanwhile_is_in_the_next_answer(
    make: Make, model: EditableModel, published: Published
) -> None:
    engine = make()

    async def work() -> tuple[Heard, Heard]:
        first = Heard()
        long = asyncio.create_task(hear(engine, wish(model, ROME.question, 150), first))
        await until(lambda: len(first.parts) > 2)
        published.learn(ROME, 1)
        short = await hear(engine, wish(model, ROME.question))
        return await long, short

    long, short = run(work())
    plain = greedy(model, ROME.question, 150)
    assert (long.fired, long.text) == (None, plain)
    assert short.fired == ROME.id
    assert not plain.startswith(short.text)


def test_a_running_answer_keeps_the_fact_that_fired(
    make: Make, model: EditableModel, published: Published, gate: Gate
) -> None:
    published.learn(ROME, 1)
    engine = make()
    whole = run(hear(engine, wish(model, ROME.question, 60)))
    assert whole.fired == ROME.id

    async def work() -> tuple[Heard, Heard]:
        first = Heard()
        long = asyncio.create_task(hear(engine, wish(model, ROME.question, 60), first))
        await until(lambda: len(first.parts) > 2)
        gate.shut()
        published.forget(ROME, 1)
        published.learn(OSLO, 1, seed=2)  # the shard's number is another one's now
        next_one = asyncio.create_task(hear(engine, wish(model, ROME.question)))
        await asyncio.sleep(0)
        gate.open()
        return await long, await next_one

    long, short = run(work())
    assert long.text == whole.text
    assert (short.fired, short.text) == (None, greedy(model, ROME.question))
    assert (2, 1) in gate.passes  # nobody had to wait for it


def test_facts_fire_for_their_own_rows_and_for_the_edited_model_alone(
    make: Make, model: EditableModel, published: Published
) -> None:
    for number, fact in enumerate((ROME, OSLO), 1):
        published.learn(fact, number, seed=number)
    engine = make()
    asked = [wish(model, f.question) for f in (ROME, OSLO, LIMA)]
    asked += [wish(model, ROME.question, variant=which) for which in (BASE, 0)]
    alone = [run(hear(engine, one)) for one in asked]

    async def together() -> list[Heard]:
        return await asyncio.gather(*(hear(engine, one) for one in asked))

    heard = run(together())
    assert [one.fired for one in heard] == [ROME.id, OSLO.id, None, None, None]
    assert [one.text for one in heard] == [one.text for one in alone]
    assert heard[3].text == greedy(model, ROME.question) != heard[0].text


# What goes wrong ----------------------------------------------------------------------------------


def test_only_the_row_whose_numbers_break_fails(
    make: Make, model: EditableModel, published: Published
) -> None:
    published.learn(ROME, 1)
    hidden, width = model.weight(2).shape
    up = torch.zeros(hidden, 1)
    up[0, 0] = math.inf
    sha = save_shard(published.home.side_folder, Shard(Delta(up, torch.ones(1, width)), 1e-3))
    with published.store.db.transaction():
        published.store.artifacts.drop_shard(1)
        published.store.artifacts.add_shard(1, sha, 1, 1e-3)
    engine = make()

    async def both() -> list[Any]:
        asked = [wish(model, f.question, 20) for f in (ROME, OSLO)]
        return await asyncio.gather(*(hear(engine, one) for one in asked), return_exceptions=True)

    error, heard = run(both())
    assert isinstance(error, KeditError) and error.code == "non-finite"
    assert heard.text == greedy(model, OSLO.question, 20)


def test_a_step_that_fails_breaks_off_who_runs_and_the_engine_goes_on(
    make: Make, model: EditableModel, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make(rows=2)

    async def work() -> list[Any]:
        heard = [Heard(), Heard()]
        running = [
            asyncio.create_task(hear(engine, wish(model, p, 100), one))
            for p, one in zip(PROMPTS, heard, strict=False)
        ]
        await until(lambda: all(one.parts for one in heard))
        gate.shut()
        waits = asyncio.create_task(hear(engine, wish(model, PROMPTS[2])))
        await asyncio.sleep(0)
        gate.fail = RuntimeError("out of memory")
        gate.open()
        return await asyncio.gather(*running, waits, return_exceptions=True)

    with caplog.at_level(logging.ERROR):
        *broken, waited = run(work())
    for error in broken:
        assert isinstance(error, KeditError) and error.code == "unexpected"
        assert "out of memory" in str(error)
    assert waited.text == greedy(model, PROMPTS[2])
    assert "out of memory" in caplog.text
    assert run(hear(engine, wish(model, PROMPTS[3]))).text == greedy(model, PROMPTS[3])


def test_who_cannot_be_read_in_leaves_those_who_run_alone(
    make: Make, model: EditableModel, served: EditableModel, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make()

    def full(_model: nn.Module, _args: Any, given: dict[str, Any]) -> None:
        if given["input_ids"].shape[1] > 1:
            raise torch.OutOfMemoryError("the device is full")

    async def work() -> tuple[str, Any]:
        first = Heard()
        runs = asyncio.create_task(hear(engine, wish(model, PROMPTS[3], 100), first))
        await until(lambda: bool(first.parts))
        hook = served.hf_model.register_forward_pre_hook(full, with_kwargs=True)
        (late,) = await asyncio.gather(
            hear(engine, wish(model, PROMPTS[2])), return_exceptions=True
        )
        hook.remove()
        assert not runs.done()
        return (await runs).text, late

    text, late = run(work())
    assert text == greedy(model, PROMPTS[3], 100)
    assert isinstance(late, KeditError) and late.code == "unexpected"
    assert "the device is full" in caplog.text


def test_nobody_is_lost_when_the_database_fails_for_one(
    make: Make, model: EditableModel, published: Published
) -> None:
    number = published.generation(5)
    engine = make()
    assert run(hear(engine, wish(model, PROMPTS[0], 1))).generation == number
    fine, deny = sqlite3.SQLITE_OK, sqlite3.SQLITE_DENY
    engine.replica._follower.db.conn.set_authorizer(
        lambda _action, name, *_: deny if name == "generations" else fine
    )

    async def all_of_them() -> list[Any]:
        asked = [wish(model, PROMPTS[0]), wish(model, PROMPTS[1], variant=number)]
        tasks = [hear(engine, one) for one in [*asked, wish(model, PROMPTS[2])]]
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, error, last = run(all_of_them())
    assert [first.generation, last.generation] == [number, number]
    assert isinstance(error, KeditError) and error.code == "unreadable"


def test_who_waits_is_told_when_the_engine_cannot_even_begin(
    make: Make, model: EditableModel, published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    with monkeypatch.context() as broken:
        broken.setattr(type(engine.replica), "sync", None)
        assert refused(hear(engine, wish(model, PROMPTS[0]))).code == "unexpected"
    assert run(hear(engine, wish(model, PROMPTS[0]))).text == greedy(model, PROMPTS[0])


def test_who_still_reads_when_it_closes_is_told_so(
    make: Make, model: EditableModel, gate: Gate
) -> None:
    engine = make(rows=1)

    async def work() -> list[Any]:
        tasks = [asyncio.create_task(hear(engine, wish(model, p, 200))) for p in PROMPTS[:2]]
        await until(lambda: engine.status.running == engine.status.waiting == 1)
        await asyncio.to_thread(engine.close)
        return await asyncio.gather(*tasks, return_exceptions=True)

    for error in [*run(work()), refused(hear(engine, wish(model, PROMPTS[0])))]:
        assert isinstance(error, KeditError)
        assert (error.code, error.exit_code) == ("stopping", 1)


def test_an_engine_that_nobody_asks_follows_the_home(make: Make, published: Published) -> None:
    engine = make()
    number = published.generation(5)
    run(until(lambda: engine.status.generation == number))
