"""A settled home that is copied for each fault, and the check that nothing damaged is served."""

import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from editing_home import LOOSE, Bench, Clock, seat
from tiny_models import CITIES

from kedit_daemon.config import Config
from kedit_daemon.editing.editor import Editor
from kedit_daemon.editing.live_model import LiveModel
from kedit_daemon.editing.model_loading import LoadedModel, load_model
from kedit_daemon.home import Home
from kedit_daemon.system.disk import translate_disk_errors
from memory.db.event_log import read_newest_event, write_head
from memory.db.store import Store
from memory.errors import KeditError
from memory.facts import FactState

CONFIG = Config.model_validate(LOOSE | {"side": {"steps": 300}, "routing": {"flush_facts": 50}})
BATCHES = ([seat(n, CITIES[n]) for n in range(3)], [seat(n, CITIES[n]) for n in range(3, 6)])
BESIDE = [seat(n, CITIES[n - 6]) for n in range(6, 8)]
FACTS = [*BATCHES[0], *BATCHES[1], *BESIDE]
PROMPTS = [f.question for f in FACTS] + [f"The seat of country {n} is" for n in (20,)]
KINDS = ("generations", "side", "index")


@dataclass(frozen=True)
class End:
    """The answers, states and weights of an open home."""

    weights: str
    answers: tuple[tuple[str, str | None], ...]  # and the fact that fired
    states: tuple[tuple[str, str, str | None], ...]


@dataclass(frozen=True)
class Made:
    """A settled home that is copied for each fault, and the model it is served by."""

    root: Path
    loaded: LoadedModel
    end: End

    def file(self, kind: str, which: int = -1) -> Path:
        """One of the files of a kind: of generations and shards the newest."""
        with closing(sqlite3.connect(self.root / "state/kedit.db")) as conn:
            asked = {
                "generations": "SELECT sha256 FROM generations WHERE id > 0 ORDER BY id",
                "side": "SELECT sha256 FROM shards ORDER BY id",
                "index": "SELECT value FROM meta WHERE key = 'index_sha256'",
            }
            names = [row[0] for row in conn.execute(asked[kind])]
        return self.root / "state" / kind / f"{names[which]}.safetensors"


KEPT = pytest.StashKey[Made]()


def end_of(at: LiveModel) -> End:
    said = at.answer_prompts(PROMPTS, 4)
    answers = tuple((a.text, a.fired_match and a.fired_match.fact_id) for a in said)
    states = tuple((f.id, f.state, f.tier) for f in at.store.list_facts())
    return End(at.model.weights_hash(at.loaded_model.layers), answers, states)


@pytest.fixture(scope="module")
def made(
    request: pytest.FixtureRequest,
    model_folder: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Made]:
    stash = request.config.stash
    if KEPT not in stash:  # two files of tests use it
        stash[KEPT] = build(model_folder("llama"), tmp_path_factory)
    yield stash[KEPT]
    stash[KEPT].loaded.model.set_deltas({})


def build(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("corruption")
    loaded = load_model(str(model), "cpu", folder, iter)
    at = Bench(folder / "home", loaded, Clock(), CONFIG)
    for batch in BATCHES:
        at.receive(*batch, direct=True)
        at.settle()
        at.editor.run_flush(dry_run=False)
    at.receive(*BESIDE)
    at.settle()
    newest = read_newest_event(at.store.db.conn)
    assert newest is not None
    write_head(at.home.head_file, newest)
    end = end_of(at.served)
    assert [s for _, s, _ in end.states] == [FactState.LIVE_WEIGHTS] * 6 + [FactState.LIVE_SIDE] * 2
    assert {fired for _, fired in end.answers} >= {f.id for f in BESIDE}
    made = at.store.db.conn.execute("SELECT count(*) FROM generations").fetchone()
    assert made == (3,)
    at.store.close()
    return Made(at.home.root, loaded, end)


@contextmanager
def opened(root: Path, loaded: LoadedModel) -> Iterator[LiveModel]:
    """The home as a start of the daemon opens it, and with the errors that it would tell."""
    with translate_disk_errors(root), closing(Store(root / "state/kedit.db", Clock())) as store:
        served = LiveModel(loaded, store, Home(root))
        served.restore()
        yield served


def wrong(made: Made, root: Path, damage: Callable[[Path], object], refusals: list[str]) -> str:
    """Return the faults of a damaged copy of the home; an empty text if there are none.
    Where it is refused, why goes to `refusals`."""
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(made.root, root)
    damage(root)
    try:
        with opened(root, made.loaded) as served:
            if served.store.list_facts((FactState.RECEIVED,)):
                settle(Editor(served, CONFIG, lambda: None))
            found = end_of(served)
    except KeditError as error:
        refusals.append(str(error))
        told = str(root) in str(error) or "database" in str(error)
        return "" if told and error.hint and error.exit_code == 78 else f"{error!r} {error.hint}"
    return "" if found == made.end else f"{found} instead of {made.end}"


def settle(editor: Editor) -> None:
    assert any(not editor.step() for _ in range(50))
