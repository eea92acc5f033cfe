"""Memory that runs out, once or for good, ends no daemon and loses no fact: the work gets smaller.

Torch says that there is none at some moment of the work, whichever it is, or whenever a pass has
more rows than some. Only these errors are made here; the last test takes the memory away for real.
"""

import json
import os
import random
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from editing_home import Bench, Clock, seat
from promise_table import Tally
from serving import NAME, server
from tiny_models import CITIES

from kedit_daemon.control import ControlRequest
from kedit_daemon.daemon.job_runner import run_due_jobs
from kedit_daemon.daemon.loop import Daemon
from kedit_daemon.editing.memory_backoff import BACKOFF_TIME
from kedit_daemon.system.sd_notify import SystemdNotifier
from memory.errors import KeditError, OutOfMemory
from memory.facts import Fact, FactState
from memory.model.editable import EditableModel
from memory.oom import as_out_of_memory, is_out_of_memory

pytestmark = pytest.mark.timeout(250)

FACTS = [seat(n, CITIES[n]) for n in range(3)]
SETTINGS = {"side": {"steps": 30}, "routing": {"flush_facts": 50}}


class Device:
    """Counts what the model's parts begin; from one time on, it has no memory while it lacks it."""

    def __init__(self, first: int, lacks: Callable[[int], bool]) -> None:
        """`lacks`: told how often it had none, whether it has none again."""
        self.first, self.lacks, self.done, self.told = first, lacks, 0, 0

    def _begin(self, *_: object) -> None:
        self.done += 1
        if self.done >= self.first and self.lacks(self.told):
            self.told += 1
            raise torch.OutOfMemoryError("the device is out of memory")

    @contextmanager
    def of(self, model: EditableModel) -> Iterator[None]:
        handles = [m.register_forward_pre_hook(self._begin) for m in model.hf_model.modules()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def settle(at: Bench) -> None:
    """Work, and rest, until nothing waits."""
    for _ in range(20):
        at.settle()
        if not at.store.list_facts((FactState.RECEIVED,)):
            return
        at.clock.pass_time(seconds=BACKOFF_TIME.total_seconds())
    raise AssertionError("facts wait for ever")


def work(at: Bench, direct: bool, device: Device) -> list[FactState]:
    at.receive(*FACTS, direct=direct)
    with device.of(at.loaded.model):
        settle(at)
    return [f.state for f in at.store.list_facts()]


def for_minutes(clock: Clock, minutes: float) -> Callable[[int], bool]:
    until = clock.now + timedelta(minutes=minutes)
    return lambda _told: clock.now < until


@pytest.mark.parametrize("direct", [True, False], ids=["flush", "side"])
def test_memory_that_runs_out_at_any_moment(
    direct: bool, bench: Callable[..., Bench], tally: Tally, whole: bool
) -> None:
    calm = Device(0, lambda _told: False)
    at = bench("calm", **SETTINGS)
    assert set(work(at, direct, calm)) == {
        FactState.LIVE_WEIGHTS if direct else FactState.LIVE_SIDE
    }
    said = [at.says(fact.question) for fact in FACTS]
    at.loaded.model.set_deltas({})
    moments = random.Random(int(direct))
    for number in range(10 if whole else 2):
        first, minutes = moments.randrange(1, calm.done + 1), number % 2 * 8  # 0: once alone
        hard = bench(f"hard{number}", **SETTINGS)
        lacks = for_minutes(hard.clock, minutes) if minutes else lambda told: not told
        found = work(hard, direct, Device(first, lacks))
        # What finds no memory in one tier may go to the other.
        well = set(found) <= {FactState.LIVE_WEIGHTS, FactState.LIVE_SIDE}
        well = well and [hard.says(fact.question) for fact in FACTS] == said
        row = hard.store.artifacts.get_generation(hard.store.artifacts.active_generation())
        well = well and (not row.id or row.weights_hash == hard.weights_hash())
        tally.tried(bad=not well)
        assert well, (first, found)
        hard.loaded.model.set_deltas({})


@contextmanager
def room_for(
    at: Bench, rows: int, tokens: int = 1000, learning_only: bool = True
) -> Iterator[list[int]]:
    """A model with room for so many rows of so many tokens; the rows of each pass that had it."""
    passes: list[int] = []

    def hook(_model: object, _args: object, given: dict[str, Any]) -> None:
        many, long = given["input_ids"].shape
        if learning_only and not torch.is_grad_enabled():  # what keeps no graph takes far less
            return
        if many > rows or long > tokens:
            raise torch.OutOfMemoryError("the device is out of memory")
        passes.append(many)

    handle = at.loaded.model.hf_model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield passes
    finally:
        handle.remove()


@pytest.mark.parametrize("direct", [True, False], ids=["flush", "side"])
def test_where_there_is_room_for_a_few_rows_work_is_done_in_parts(
    direct: bool, bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture
) -> None:
    # A shard that few lines keep quiet answers for its neighbours here.
    at, rows = bench(outside_lines=200, **SETTINGS), 6
    facts = [seat(n, CITIES[n % 8]) for n in range(7)]
    at.receive(*facts, direct=direct)
    with room_for(at, rows) as passes:
        at.settle()
    assert 1 <= max(passes) <= rows
    state = FactState.LIVE_WEIGHTS if direct else FactState.LIVE_SIDE
    assert [f.state for f in at.store.list_facts()] == [state] * 7
    assert [at.says(f.question) for f in facts] == [f.target for f in facts]
    assert {"policies.targets"} == {r.name for r in caplog.records} or not direct  # told
    assert not at.store.db.conn.execute("SELECT 1 FROM events WHERE kind LIKE '%failed'").fetchall()


@contextmanager
def no_room_for(keys: int, times: int) -> Iterator[None]:
    """No memory to lay so many facts' keys side by side, as a solve does, the first few times."""
    left, real = [times], torch.cat

    def cat(tensors: Any, *args: Any, **more: Any) -> torch.Tensor:
        are_rows = tensors[0].dtype is torch.float64 and tensors[0].ndim == 2  # of a solve alone
        if are_rows and len(tensors) >= keys and left[0]:
            left[0] -= 1
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you …")
        return real(tensors, *args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "cat", cat)
        yield


def test_the_halves_of_a_flush_are_all_of_it(bench: Callable[..., Bench]) -> None:
    at = bench(**SETTINGS)
    facts = [seat(n, CITIES[n]) for n in range(6)]
    at.receive(*facts, direct=True)
    with no_room_for(6, 1):
        told = at.editor.run_flush(False)
    assert sorted(told["flushed"]) == sorted(f.id for f in facts)
    assert (told["failed"], told["generation"]) == ([], 2)
    assert [len(at.store.artifacts.get_generation(n).fact_ids) for n in range(3)] == [0, 3, 6]
    assert {f.state for f in at.store.list_facts()} == {FactState.LIVE_WEIGHTS}
    assert at.store.artifacts.get_generation(2).weights_hash == at.weights_hash()


def test_what_the_weights_have_no_memory_for_waits_and_is_live_beside_them(
    bench: Callable[..., Bench],
) -> None:
    at = bench(**SETTINGS)
    at.receive(*FACTS[:2], direct=True)
    with no_room_for(1, 10_000):
        settle(at)
        assert {f.state for f in at.store.list_facts()} == {FactState.LIVE_SIDE}
        with pytest.raises(KeditError, match="no memory left") as caught:
            at.editor.run_flush(False)
        assert isinstance(caught.value, OutOfMemory) and caught.value.hint
    assert at.store.artifacts.active_generation() == 0
    at.editor.run_flush(False)  # there is memory again
    assert {f.state for f in at.store.list_facts()} == {FactState.LIVE_WEIGHTS}


def test_a_fact_too_large_for_the_device_is_given_up_in_words(bench: Callable[..., Bench]) -> None:
    at = bench(**SETTINGS)
    large = seat(9, " ".join(CITIES * 2))
    at.receive(large, *FACTS[:2], direct=True)
    with room_for(at, 24, tokens=12):
        for number in range(3, 8):  # as long as no other fact finds memory, it waits
            at.settle()
            at.clock.pass_time(seconds=BACKOFF_TIME.total_seconds())
            at.settle()
            at.clock.pass_time(seconds=BACKOFF_TIME.total_seconds())
            if at.store.find_fact(large.id).state is FactState.FAILED:
                break
            at.receive(seat(number, CITIES[number]), direct=True)
    first, *others = at.store.list_facts()
    assert (first.fact.id, first.state, first.attempts) == (large.id, FactState.FAILED, 3)
    assert "no memory left" in (first.reason or "")
    assert [f.state for f in others] == [FactState.LIVE_WEIGHTS] * len(others)


@pytest.mark.parametrize("direct", [True, False], ids=["flush", "side"])
def test_a_shortage_of_some_minutes_is_no_attempt_at_a_fact(
    direct: bool, bench: Callable[..., Bench]
) -> None:
    at = bench(outside_lines=200, **SETTINGS)
    at.receive(*FACTS, direct=direct)
    with Device(0, for_minutes(at.clock, 8)).of(at.loaded.model):
        settle(at)
    assert {f.state for f in at.store.list_facts()} <= {FactState.LIVE_WEIGHTS, FactState.LIVE_SIDE}
    assert {f.attempts for f in at.store.list_facts()} == {0}
    assert at.store.db.conn.execute("SELECT 1 FROM events WHERE kind = 'edit_failed'").fetchone()


def test_where_there_is_no_memory_at_all_a_flush_is_soon_over(
    bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture
) -> None:
    at = bench(**SETTINGS)
    at.receive(*(seat(n, CITIES[n % 8]) for n in range(16)), direct=True)
    with Device(0, lambda _told: True).of(at.loaded.model):
        assert at.editor.step()
        tries = at.pulses
        assert not at.editor.step()  # it rests
    assert sum("splitting the flush" in said for said in caplog.messages) == 4
    # 16, 8, 4, 2, 1: who asks, or ends the daemon, is heard before each, and once in each.
    assert tries == 10


def test_a_flush_that_is_done_in_part_says_what_was_done(bench: Callable[..., Bench]) -> None:
    at = bench(**SETTINGS)
    facts = [seat(n, CITIES[n]) for n in range(6)]
    at.receive(*facts, direct=True)
    with no_room_for(4, 10_000):
        told = at.editor.run_flush(False)
    done = [f.id for f in at.store.list_facts((FactState.LIVE_WEIGHTS,))]
    assert len(done) == 3 and sorted(told["flushed"]) == sorted(done)
    assert sorted(told["failed"]) == sorted(f.id for f in facts if f.id not in done)
    assert told["generation"] == at.store.artifacts.active_generation() == 1
    assert "no memory left" in told["reasons"][-1]


# Who asks, and what is planned ------------------------------------------------------------------


@pytest.fixture
def daemon(bench: Callable[..., Bench]) -> Daemon:
    at = bench(**SETTINGS)
    made = Daemon(at.home, at.config, at.store, SystemdNotifier({}), at.clock, lambda: 1000.0)
    made.editor = at.editor
    at.receive(*FACTS)
    at.settle()
    return made


def answered(daemon: Daemon, name: str, **arguments: object) -> tuple[int, dict[str, Any]]:
    request = ControlRequest(name, arguments)
    daemon._answer_request(request)
    status, body = request.reply_queue.get_nowait()
    return status, json.loads(body)


@pytest.mark.parametrize("name", ["ask", "flush", "audit", "consolidate"])
def test_a_request_is_refused_in_words_and_the_next_is_answered(name: str, daemon: Daemon) -> None:
    given = {"prompt": FACTS[0].question} if name == "ask" else {}
    with Device(0, lambda _told: True).of(daemon.editor.live_model.model):
        status, told = answered(daemon, name, **given)
    assert (status, told["code"]) == (409, "out-of-memory")
    assert "no memory left" in told["error"] and told["hint"]
    status, told = answered(daemon, "ask", prompt=FACTS[0].question)
    assert (status, told["answer"]) == (200, FACTS[0].target)
    assert answered(daemon, name, **given)[0] == 200


def test_a_job_fails_in_words_and_the_next_one_runs(daemon: Daemon) -> None:
    for job in ("audit", "consolidate"):
        daemon.job_schedule.due_jobs.put((job, "2026-01-01T00:00:00Z"))
    with Device(0, lambda told: not told).of(daemon.editor.live_model.model):
        run_due_jobs(daemon.job_schedule, daemon.store, daemon.editor)
    rows = daemon.store.db.conn.execute("SELECT name, outcome, detail FROM job_run ORDER BY 1")
    (first, outcome, why), (second, well, _) = (tuple(row) for row in rows)
    assert (first, outcome, second, well) == ("audit", "failed", "consolidate", "ok")
    assert "no memory left" in why


def test_the_server_tells_one_reader_and_answers_the_next(
    tmp_path: Path, model_folder: Callable[[str], Path]
) -> None:
    with server(tmp_path, model_folder("llama")) as running, running.http() as http:
        asked = {"model": NAME, "prompt": FACTS[1].question, "max_tokens": 3}

        def full(*_: object) -> None:
            raise torch.OutOfMemoryError("the device is out of memory")

        for _ in range(3):
            handle = running.engine.model.hf_model.register_forward_pre_hook(full)
            answer = http.post("/v1/completions", json=asked)
            handle.remove()
            assert answer.status_code == 500 and "out of memory" in answer.text
            assert http.post("/v1/completions", json=asked).is_success
        assert http.get("/health").is_success


# What is known of it ----------------------------------------------------------------------------


@pytest.mark.parametrize("there", [True, False])
def test_a_device_is_asked_to_give_back_only_where_there_is_one(
    there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_back: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append(1))
    with pytest.raises(KeditError, match="CUDA out of memory"), as_out_of_memory():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
    assert given_back == [1] * there


@pytest.mark.parametrize("error", [RuntimeError("shape [2] is invalid"), ValueError("x")])
def test_no_other_error_is_taken_for_it(error: Exception) -> None:
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)), as_out_of_memory():
        raise error


def limited(at: Bench, facts: Sequence[Fact]) -> list[str]:
    """What a child of this process comes to that has little more memory than it has now, and needs
    much for each row that learns."""
    kept: list[torch.Tensor] = []

    def take(_model: object, _args: object, given: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            kept[:] = [torch.empty(len(given["input_ids"]) << 24, dtype=torch.uint8)]  # 16 MB each

    told, tell = os.pipe()
    child = os.fork()
    if not child:
        try:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            most = used + (160 << 20)  # of 384 that all seats would take
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            at.loaded.model.hf_model.register_forward_pre_hook(take, with_kwargs=True)
            at.receive(*facts, direct=True)
            settle(at)
            os.write(tell, json.dumps([f.state for f in at.store.list_facts()]).encode())
        finally:
            os._exit(0)
    os.close(tell)
    with open(told, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    result: list[str] = json.loads(said or b"[]")
    return result


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells what is used")
def test_an_address_space_that_ends(bench: Callable[..., Bench]) -> None:
    at = bench(**SETTINGS)
    assert limited(at, FACTS) == [FactState.LIVE_WEIGHTS] * 3
