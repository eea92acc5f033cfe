"""A daemon that is killed, however often, comes to the same end as one that is left in peace."""

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from editing_home import Bench
from process_tools import FACTS, at_rest, drop, finish, make_home, outcome, started, wait
from promise_table import Tally
from tiny_models import save_model

from memory.db import queries
from memory.db.event_log import read_head, verify_chain
from memory.facts import FactState

KILLS = 8


class CrashError(BaseException):
    """The process is gone."""


@pytest.mark.parametrize("direct", [True, False])
def test_a_crash_at_every_step_of_an_edit_changes_nothing_of_the_end(
    direct: bool, bench: Callable[..., Bench]
) -> None:
    settings = {"side": {"steps": 300}, "routing": {"flush_facts": 3}}
    calm, hard = bench("calm", **settings), bench("hard", **settings)
    for at in (calm, hard):
        at.receive(*FACTS[: 10 if direct else 3], direct=direct)
    calm.settle()

    def crash() -> None:
        raise CrashError

    hard.editor.flush.pulse = crash  # after every batch of targets that has been kept
    hard.editor.side_learner.pulse = crash
    with pytest.raises(CrashError):
        hard.settle()
    hard.restart()
    if not direct:
        hard.editor.step()
        hard.restart()
    hard.settle()
    assert [(f.id, f.state) for f in hard.store.list_facts()] == [
        (f.id, f.state) for f in calm.store.list_facts()
    ]
    assert {f.state for f in hard.store.list_facts()} == {FactState.LIVE_WEIGHTS}
    assert hard.weights_hash() == calm.weights_hash()


@pytest.mark.whole
@pytest.mark.timeout(600)
def test_kills_at_random_moments_change_nothing_of_the_end(tmp_path: Path, tally: Tally) -> None:
    model = save_model("llama", tmp_path / "model")
    calm, hard = make_home(tmp_path / "calm", model), make_home(tmp_path / "hard", model)
    drop(calm)
    process = started(calm)
    began = time.monotonic()
    wait(lambda: at_rest(calm), calm)
    length = time.monotonic() - began
    finish(calm, process)
    assert {row[1] for row in outcome(calm)[0]} == {"live-weights"}

    moments = random.Random(20260101)
    drop(hard)
    tally.tried(KILLS, kills=KILLS)
    for _ in range(KILLS):
        process = started(hard)
        time.sleep(moments.uniform(0, length / 2))
        process.kill()
        process.wait(60)
    finish(hard, started(hard))

    assert outcome(hard) == outcome(calm)
    assert [path.name for path in (hard.inbox_folder / "done").iterdir()] == ["facts.jsonl"]
    assert list((hard.inbox_folder / "work").iterdir()) == []
    connection = queries.open_readonly(hard.database_file)
    try:
        found = verify_chain(connection, read_head(hard.head_file))
    finally:
        connection.close()
    assert found.intact, found.problem
