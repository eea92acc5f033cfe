"""What tests of promises say of themselves: faults tried, kills fired, bad ends, bugs caught.

`pytest tests/promises --promises docs/promises.md` writes it into that document; of files that are
not run, it leaves what stands there. A test that asks for `tally` says what it has tried; any other
test of a promise is one fault itself.
"""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from paths import TESTS

FOLDER = TESTS / "promises"
BEGIN, END = "<!-- made by the tests: begin -->", "<!-- made by the tests: end -->"
PROMISES = """\
| promise | faults tried | kills fired | bad end states | seconds | command |
| --- | ---: | ---: | ---: | ---: | --- |"""
BUGS = """\
| bug that was put in | where | seen by | caught |
| --- | --- | --- | --- |"""
ROW = re.compile(r"`pytest tests/promises/(\w+\.py)[^`]*` \|$")  # a row of the first
KEPT = re.compile(r"^\| (.*?) \|")  # and of the second


@dataclass
class Tally:
    """What has been done to one promise, that is, by one file of tests."""

    promise: str  # the first line of the file
    command: str
    faults: int = 0
    kills: int = 0
    bad: int = 0  # ends that should not have been
    seconds: float = 0.0
    own: set[str] = field(default_factory=set)  # tests that count for themselves

    def tried(self, faults: int = 1, *, kills: int = 0, bad: int = 0) -> None:
        """Count what a test has done; it still has to assert that nothing ended badly."""
        self.faults += faults
        self.kills += kills
        self.bad += bad


@dataclass(frozen=True)
class Seed:
    """A bug that was put in, and what saw it."""

    bug: str
    where: str
    caught_by: str
    caught: bool


@dataclass
class Report:
    """All that one run of the tests has to say."""

    whole: bool
    tallies: dict[str, Tally] = field(default_factory=dict)
    seeds: list[Seed] = field(default_factory=list)

    def tally(self, path: Path) -> Tally:
        """The one of a file of tests, made when it is first asked for."""
        if path.name not in self.tallies:
            first = path.read_text("utf-8").split('"""')[1].partition("\n")[0]
            whole = " --whole" if self.whole and "whole" in path.read_text("utf-8") else ""
            command = f"pytest tests/promises/{path.name}{whole}"
            self.tallies[path.name] = Tally(first, command)
        return self.tallies[path.name]

    def promises(self) -> dict[str, str]:
        """A row in Markdown for each file of tests."""
        rows = {}
        for name, t in self.tallies.items():
            figures = f"{t.faults:,} | {t.kills:,} | {t.bad:,} | {t.seconds:.0f}"
            if t.faults:
                rows[name] = f"| {t.promise} | {figures} | `{t.command}` |"
        return rows

    def bugs(self) -> dict[str, str]:
        """A row in Markdown for each bug that was put in."""
        rows = {}
        for s in self.seeds:
            caught = "yes" if s.caught else "**no**"
            rows[s.bug] = f"| {s.bug} | `{s.where}` | `{s.caught_by}` | {caught} |"
        return rows

    def tables(self, before: str) -> str:
        """Both tables; rows of the tables `before` stay where this run has none in their place."""
        text = []
        for head, new in ((PROMISES, self.promises()), (BUGS, self.bugs())):
            _, _, rest = before.partition(head)
            rows = new.copy()
            for row in rest.partition("\n\n")[0].strip().splitlines():
                key = ROW.search(row) or KEPT.search(row)
                rows.setdefault(key[1] if key else row, row)
            text.append(f"{head}\n" + "\n".join(rows[key] for key in sorted(rows)))
        return "\n\n".join(text)


KEY = pytest.StashKey[Report]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Two switches of the tests of promises."""
    group = parser.getgroup("promises")
    group.addoption("--whole", action="store_true", help="every case where else a sample is tried")
    group.addoption("--promises", type=Path, metavar="FILE", help="write the tables into FILE")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--promises") and config.getoption("numprocesses", None):
        raise pytest.UsageError("--promises counts in one process: say -n 0")
    config.addinivalue_line("markers", "whole: tried only with --whole")
    config.stash[KEY] = Report(config.getoption("--whole"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--whole"):
        return
    left = [item for item in items if item.get_closest_marker("whole")]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    """Where a test says what it has tried."""
    found = request.config.stash[KEY].tally(request.path)
    found.own.add(request.node.nodeid)
    return found


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Report:
    """Where bugs that were put in are kept; a test that asks for it is no fault itself."""
    found = request.config.stash[KEY]
    found.tally(request.path).own.add(request.node.nodeid)
    return found


@pytest.fixture
def whole(request: pytest.FixtureRequest) -> bool:
    """Whether every case is to be tried."""
    return bool(request.config.getoption("--whole"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Count a test of a promise that does not count for itself."""
    if item.path.parent != FOLDER:
        return (yield)
    found, began = item.config.stash[KEY].tally(item.path), time.monotonic()
    bad = found.bad
    try:
        result = yield
    except pytest.skip.Exception:
        raise
    except BaseException:
        found.bad = max(found.bad, bad + 1)  # what failed has ended badly, whether it counts or not
        found.faults += item.nodeid not in found.own
        raise
    else:
        found.faults += item.nodeid not in found.own
        return result
    finally:
        found.seconds += time.monotonic() - began


def pytest_sessionfinish(session: pytest.Session) -> None:
    path: Path | None = session.config.getoption("--promises")
    if path is None:
        return
    before, _, rest = path.read_text("utf-8").partition(BEGIN)
    tables, _, after = rest.partition(END)
    tables = session.config.stash[KEY].tables(tables)
    path.write_text(f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}", "utf-8")
