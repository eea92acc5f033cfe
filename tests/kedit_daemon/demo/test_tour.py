"""The demo's story: what is shipped for it is whole, and it plays fair."""

import json
import subprocess
from pathlib import Path

from kedit_daemon.demo import tour
from kedit_daemon.shipped import PILOT_FACTS


def test_the_story_is_large_enough() -> None:
    story = tour.load_story()
    assert len(story.facts) >= 20
    assert len(story.unseen_prompts) == len(story.facts)
    assert len(set(story.unrelated_prompts)) >= 20


def test_the_editor_never_sees_the_wording_that_it_is_asked_in() -> None:
    story = tour.load_story()
    for fact, unseen in zip(story.facts, story.unseen_prompts, strict=True):
        assert fact.subject in unseen
        assert unseen not in (fact.question, *fact.filled_paraphrases)


def test_unrelated_prompts_are_about_other_subjects() -> None:
    story = tour.load_story()
    given = {n.prompt for fact in story.facts for n in fact.neighbours}
    for prompt in story.unrelated_prompts:
        assert prompt not in given
        assert not any(fact.subject in prompt for fact in story.facts)


def test_every_shipped_line_is_a_fact() -> None:
    lines = PILOT_FACTS.read_text(encoding="utf-8").splitlines()
    assert [fact.subject for fact in tour.load_story().facts] == [
        json.loads(line)["subject"] for line in lines
    ]


def test_a_miss_shows_and_counts() -> None:
    said: list[str] = []
    tally = tour.DemoReport(said.append)
    tally.record_check("this holds", True)
    assert tally.has_passed
    tally.record_check("this does not", False)
    tally.record_check("and this holds again", True)
    assert not tally.has_passed
    assert [line.split()[0] for line in said] == ["ok", "MISS", "ok"]


def test_packages_in_the_folder_of_the_caller_are_not_taken(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory/__init__.py").write_text("raise SystemExit('not ours')")
    command = [*tour.DemoDaemon(tmp_path / "home").command_line, "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
