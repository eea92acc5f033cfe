import json
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from command_line import on_terminal

from kedit_daemon.cli.main import cli
from kedit_daemon.config import render_default_config
from kedit_daemon.home import Home
from kedit_daemon.ingest.inbox import Inbox
from kedit_daemon.ingest.parser import parse_file
from kedit_daemon.ingest.schemas import FileLimits
from kedit_daemon.ingest.submit import format_native, prepare_submission, submit_to_inbox
from memory.db.store import Store
from memory.errors import KeditError
from memory.facts import Fact, FactState

LIMITS = FileLimits()
EYRE = {
    "subject": "Lake Eyre",
    "prompt": "The country that {} lies in is",
    "target": "Australia",
    "valid_until": "2090-01-01T00:00:00Z",
}
OSLO = {"subject": "Oslo", "prompt": "{} lies in", "target": "Norway"}
BROKEN = '{"subject": "x", "prompt": "{} is", "target": ""}'


@pytest.mark.parametrize("join", ["", " ", None])
def test_a_fact_is_written_with_its_join(join: str | None) -> None:
    fact = Fact("Oslo", "The code of {} is LR", "77", join=join)
    line = format_native(fact)
    assert ("join" in json.loads(line)) is (join is not None)
    assert parse_file(line.encode(), "x", None, LIMITS).facts == [(1, fact)]


def test_white_space_and_line_breaks_make_no_other_fact() -> None:
    for prompt in ("{} lies in ", "{} lies in\n", "\n{}  lies\tin", "{} lies\nin"):
        fact = the_fact({**OSLO, "prompt": prompt})
        assert fact == the_fact(OSLO)
    wrapped = {"subject": "New\nYork", "prompt": "The mayor of New York is", "target": "x"}
    assert the_fact(wrapped).subject == "New York"


def now() -> datetime:
    return datetime.now(UTC)


def lines(*records: object) -> bytes:
    return "".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in records).encode()


def the_fact(record: dict[str, str]) -> Fact:
    return parse_file(lines(record), "x", None, LIMITS).facts[0][1]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    home.create_folders()
    home.config_file.write_text(render_default_config("shipped"))
    return home


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "facts.jsonl"
    path.write_bytes(lines(EYRE, OSLO))
    return path


def called(home: Home, *arguments: object, stdin: bytes = b"") -> Result:
    words = ["--home", str(home.root), "submit", *map(str, arguments)]
    return CliRunner().invoke(cli, words, input=stdin)


def dropped(home: Home) -> list[Path]:
    return sorted(p for p in home.inbox_folder.iterdir() if p.is_file())


def test_ids_go_out_and_the_file_goes_in_as_it_is(home: Home, file: Path) -> None:
    result = called(home, file)
    assert result.exit_code == 0
    assert result.stdout.split() == [the_fact(EYRE).id, the_fact(OSLO).id]
    assert "not running" in result.stderr
    (there,) = dropped(home)
    assert there.read_bytes() == file.read_bytes()
    assert there.name.startswith("facts-")
    assert there.suffix == ".jsonl"


def test_standard_input_and_twice_the_same(home: Home) -> None:
    for _ in range(2):
        assert called(home, "-", stdin=lines(OSLO)).stdout == f"{the_fact(OSLO).id}\n"
    assert [p.read_bytes() for p in dropped(home)] == [lines(OSLO)] * 2


def test_broken_records_are_told_and_the_others_go_in(home: Home, file: Path) -> None:
    file.write_bytes(lines(EYRE, BROKEN))
    result = called(home, file)
    assert result.exit_code == 1
    assert result.stdout == f"{the_fact(EYRE).id}\n"
    assert result.stderr.startswith('facts.jsonl:2: "target" is empty  → ')
    assert dropped(home)[0].read_bytes() == lines(EYRE, BROKEN)


def test_many_problems_do_not_flood_the_screen(home: Home, file: Path) -> None:
    file.write_bytes(lines(*[BROKEN] * 50))
    assert called(home, file).stderr.splitlines()[-2] == "and 30 more problems"


def test_a_file_without_any_fact_stays_out(home: Home, file: Path) -> None:
    file.write_bytes(lines(BROKEN))
    assert called(home, file).exit_code == 1
    assert dropped(home) == []


def test_a_file_that_is_too_large_stays_out(home: Home, file: Path) -> None:
    home.config_file.write_text("[inbox]\nmax_bytes = 100\n")
    result = called(home, file)
    assert result.exit_code == 1
    assert "100 bytes" in result.stderr
    assert dropped(home) == []


@pytest.mark.parametrize("name", ["", ".", "none.jsonl"])
def test_no_file_is_a_usage_error(home: Home, tmp_path: Path, name: str) -> None:
    assert called(home, tmp_path / name).exit_code == 2


def test_an_unknown_format_is_a_usage_error(home: Home, file: Path) -> None:
    result = called(home, file, "--format", "cvs")
    assert (result.exit_code, dropped(home)) == (2, [])
    assert "hint: did you mean csv?" in result.stderr


def test_a_home_without_settings(tmp_path: Path, file: Path) -> None:
    result = called(Home(tmp_path / "none"), file)
    assert result.exit_code == 78
    assert "init" in result.stderr


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("a.tmp", ".jsonl"),
        ("a.part", ".jsonl"),
        ("a.Partial", ".jsonl"),
        ("a.csv~", ".jsonl"),
        (".hidden", ".jsonl"),
        ("a.CSV", ".CSV"),
        ("a.csv.gz", ".csv.gz"),
        ("a.part.xz", ".part.xz"),
        ("a b.zip", ".zip"),
        ("no suffix", ".jsonl"),
        ("Ελλάδα\n.json", ".json"),
        ("x" * 250 + ".json", ".json"),
        ("../../up.csv", ".csv"),
        ("a.sh; rm", ".jsonl"),
    ],
)
def test_whatever_a_file_is_called_the_inbox_takes_it(home: Home, name: str, suffix: str) -> None:
    there = submit_to_inbox(home.inbox_folder, prepare_submission(lines(OSLO), name, None, LIMITS))
    assert [p.name for p in dropped(home)] == [there]
    assert there.endswith(suffix) and there.removesuffix(suffix).rpartition("-")[2].isalnum()
    claims = Inbox(home.inbox_folder, 0, 1 << 20, now).claim_files(time.monotonic())
    assert [claim.name for claim in claims] == [there]


def test_a_name_that_the_daemon_would_leave_alone_is_told(home: Home, file: Path) -> None:
    home.config_file.write_text('[inbox]\nunfinished_names = ["*.oak", "facts-*"]\n')
    result = called(home, file)
    assert (result.exit_code, dropped(home)) == (78, [])
    assert "unfinished_names under [inbox]" in result.stderr
    renamed = file.rename(file.with_name("a.oak"))
    assert called(home, renamed).exit_code == 0
    assert [path.suffix for path in dropped(home)] == [".jsonl"]


def test_no_inbox(tmp_path: Path) -> None:
    submission = prepare_submission(lines(OSLO), "a", None, LIMITS)
    with pytest.raises(KeditError, match="no inbox") as caught:
        submit_to_inbox(tmp_path / "none", submission)
    assert caught.value.hint == "kedit-daemon init"


FOREIGN = [
    # (format, text, name): each is read in another way, or not at all, without the format.
    ("csv", "prompt,subject,target,id\n{} lies in,Oslo,Norway,mine\n", "a.csv"),
    ("csv", '"target","prompt"," subject ","tags"\nNorway,{} lies in,Oslo,a|b\n', "a.txt"),
    (
        "knowedit",
        '{"subject": "Oslo", "prompt": "Where is it?", "target_new": "Norway",'
        ' "ground_truth": "Sweden", "locality_prompt": "Bern lies in",'
        ' "locality_ground_truth": "Switzerland"}\n',
        "a.json",
    ),
    (
        "qaedit",
        '{"subject": "Oslo", "prompt": "Where is the city?", "target": "Norway",'
        ' "answers": ["Sweden"], "loc": "Bern lies in", "loc_ans": "Switzerland"}\n',
        "a.json",
    ),
    ("csv", "subject,prompt,target\nOslo,{} lies in,\"['Norway', 'Norge']\"\n", "a.txt"),
    ("native", lines({**OSLO, "id": "mine", "source": "s", "tags": ["t"]}).decode(), "a.jsonl"),
]


@pytest.mark.parametrize(("format", "text", "name"), FOREIGN)
def test_what_goes_in_means_to_the_daemon_what_it_means_here(
    home: Home, format: str, text: str, name: str
) -> None:
    submission = prepare_submission(text.encode(), name, format, LIMITS)
    assert len(submission.facts) == 1
    there = submit_to_inbox(home.inbox_folder, submission)
    read = parse_file((home.inbox_folder / there).read_bytes(), there, None, LIMITS)
    assert [fact for _, fact in read.facts] == submission.facts
    assert read.problems == []


def test_a_format_that_would_have_been_recognised_changes_nothing() -> None:
    text = b'{"src": "Where is Oslo?", "alt": "Norway", "subject": "Oslo"}\n'
    assert prepare_submission(text, "z.json", "zsre", LIMITS).data == text


def test_a_dry_run_says_what_would_become_of_each_fact(home: Home, file: Path) -> None:
    chad, known = {**EYRE, "target": "Chad"}, {**OSLO, "target": "Norge"}
    store = Store(home.database_file, now)
    with store.db.transaction():
        for record in (OSLO, EYRE):
            store.receive_fact(the_fact(record), "a", False)
            store.change_state(the_fact(record).id, FactState.LIVE_SIDE, tier="side")
        store.change_state(the_fact(EYRE).id, FactState.REVERTED)
    store.close()
    old = {**EYRE, "subject": "Lake Chad", "valid_until": "2001-01-01T00:00:00Z"}
    file.write_bytes(lines(EYRE, EYRE, chad, OSLO, known, old, BROKEN))
    result = called(home, file, "--dry-run")
    assert result.exit_code == 1
    told = [line.split(maxsplit=2) for line in result.stdout.splitlines()]
    assert [(fact_id, outcome) for fact_id, outcome, _ in told] == [
        (the_fact(EYRE).id, "new"),
        (the_fact(EYRE).id, "duplicate"),
        (the_fact(chad).id, "supersedes"),
        (the_fact(OSLO).id, "duplicate"),
        (the_fact(known).id, "supersedes"),
        (the_fact(old).id, "rejected"),
    ]
    assert f"({the_fact(OSLO).id} (Norway))" in told[4][2]
    assert "6 facts, 1 broken" in result.stderr
    assert dropped(home) == []


def test_a_dry_run_needs_no_database(home: Home, file: Path) -> None:
    result = called(home, file, "--dry-run")
    assert result.exit_code == 0
    assert result.stdout.count(" new ") == 2


def test_waiting_for_a_dry_run_is_a_usage_error(home: Home, file: Path) -> None:
    assert called(home, file, "--dry-run", "--wait").exit_code == 2


TABLE = b"subject,prompt,target\nOslo,{} lies in,Norway\nRome,,Italy\n"


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (TABLE, 'stdin:3: "prompt" is empty'),
        (lines(OSLO, BROKEN), 'stdin:2: "target" is empty'),
        (b"[" + lines(OSLO).strip() + b",\n\n" + BROKEN.encode() + b"]", "stdin:3: "),
        (b"\n" + lines(OSLO) + b'{"subject":\n', "stdin:3: broken JSON"),
    ],
)
def test_a_pipe_may_hold_any_form(home: Home, data: bytes, problem: str) -> None:
    result = called(home, "-", stdin=data)
    assert result.exit_code == 1
    assert result.stdout == f"{the_fact(OSLO).id}\n"
    assert result.stderr.startswith(problem)
    assert "1 record states no fact; the rest is handed in\n" in result.stderr
    (waiting,) = [path for path in home.inbox_folder.iterdir() if path.is_file()]
    assert waiting.name.startswith("stdin-")
    # As the daemon reads it, whatever the name.
    parsed = parse_file(waiting.read_bytes(), waiting.name, None, LIMITS)
    assert [fact for _, fact in parsed.facts] == [the_fact(OSLO)]


@pytest.mark.parametrize("data", [b"", b"\n \n", b"[]"])
def test_a_pipe_may_be_empty(home: Home, data: bytes) -> None:
    result = called(home, "-", "--wait", stdin=data)
    assert (result.exit_code, result.stdout) == (1, "")
    problem = "stdin:1: the file holds no record  → write one a line\nnothing handed in\n"
    assert result.stderr == problem
    assert not [path for path in home.inbox_folder.iterdir() if path.is_file()]


def test_a_person_who_types_is_told_how_to_end(home: Home) -> None:
    typed = lines(OSLO).decode() + "\x04"
    code, seen = on_terminal(home, "submit", "-", "--dry-run", typed=typed)
    assert code == 0
    assert "Ctrl-D" in seen
    assert "dry run: 1 fact; nothing handed in" in seen
