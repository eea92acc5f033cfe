"""The demo's story: what is shipped for it is whole, and it plays fair."""

import subprocess
from pathlib import Path

from kedit_daemon.demo import tour
from kedit_daemon.ingest.parser import parse
from kedit_daemon.ingest.schemas import Limits


def test_the_story_is_large_enough() -> None:
    story = tour.load_story()
    assert len(story.facts) >= 20
    assert len(story.unseen) == len(story.facts)
    assert len(set(story.unrelated)) >= 20


def test_the_editor_never_sees_the_wording_that_it_is_asked_in() -> None:
    story = tour.load_story()
    for fact, unseen in zip(story.facts, story.unseen, strict=True):
        assert fact.subject in unseen
        assert unseen not in (fact.question, *fact.rephrased)


def test_unrelated_prompts_are_about_other_subjects() -> None:
    story = tour.load_story()
    given = {n.prompt for fact in story.facts for n in fact.neighbours}
    for prompt in story.unrelated:
        assert prompt not in given
        assert not any(fact.subject in prompt for fact in story.facts)


def test_the_facts_are_what_the_inbox_takes() -> None:
    data = (tour.FOLDER / "facts.jsonl").read_bytes()
    parsed = parse(data, "facts.jsonl", None, Limits())
    assert not parsed.problems
    assert [fact.id for _, fact in parsed.facts] == [fact.id for fact in tour.load_story().facts]


def test_a_miss_shows_and_counts() -> None:
    said: list[str] = []
    tally = tour.Tally(said.append)
    tally.check("this holds", True)
    assert tally.well
    tally.check("this does not", False)
    tally.check("and this holds again", True)
    assert not tally.well
    assert [line.split()[0] for line in said] == ["ok", "MISS", "ok"]


def test_packages_in_the_folder_of_the_caller_are_not_taken(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory/__init__.py").write_text("raise SystemExit('not ours')")
    command = [*tour.Running(tmp_path / "home").command, "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
