"""The demo: a real daemon on the shipped model, from end to end, in a temporary home.

Facts go in through the inbox, the model answers with them, a flush moves them into the weights, an
audit measures the model, one fact is reverted exactly, and the log shows its events.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kedit_daemon import config, control
from kedit_daemon.home import Home
from kedit_daemon.ingest.parser import parse_file
from kedit_daemon.ingest.schemas import FileLimits
from kedit_daemon.ingest.submit import format_native
from kedit_daemon.shipped import PILOT_FACTS, QUESTIONS
from memory.db import event_log, queries
from memory.db.overview import fetch_overview
from memory.errors import KeditError
from memory.facts import LIVE_STATES, Fact, fill_subject
from policies.measured_limits import LIMIT_BITS
from policies.probe import is_same_answer

START_SECONDS = 120.0
EDIT_SECONDS = 600.0
MIN_WEIGHTS_SHARE = 0.8  # of the facts; others stay in the side memory
# Share of other statements, of those that the model is sure of.
CONFIDENT_LIMITS = {"warn": 0.25, "consolidate": 0.35, "revert": 0.5}
MIN_PARAPHRASE_SHARE = 0.9  # of the facts, in a wording unknown to the editor

Echo = Callable[[str], None]


@dataclass(frozen=True)
class DemoStory:
    """The shipped facts, an unseen wording of each, and unrelated prompts."""

    facts: list[Fact]
    unseen_prompts: list[str]
    unrelated_prompts: list[str]


def _make_settings() -> str:
    """Return the default settings with higher limits for the change of the weights.

    At the default limits the weights of so small a model take only one to four facts.
    """
    text = config.render_default_config("shipped")
    for verdict, limit in CONFIDENT_LIMITS.items():
        name = f"confident_{verdict}"
        text, found = re.subn(f"^# {name} = .*$", f"{name} = {limit}", text, flags=re.MULTILINE)
        if not found:
            raise KeditError(f"the default settings have no {name}", code="demo")
    return text


def load_story() -> DemoStory:
    """Load the shipped facts and questions."""
    parsed = parse_file(PILOT_FACTS.read_bytes(), PILOT_FACTS.name, None, FileLimits())
    facts = [fact for _, fact in parsed.facts]
    questions = json.loads(QUESTIONS.read_text(encoding="utf-8"))
    unseen = [fill_subject(questions["unseen"][f.subject], f.subject) for f in facts]
    return DemoStory(facts, unseen, questions["unrelated"])


class DemoDaemon:
    """A daemon process and its home."""

    def __init__(self, root: Path) -> None:
        self.home = Home(root)
        self.home.create_folders()
        self.home.config_file.write_text(_make_settings(), encoding="utf-8")

    @property
    def command_line(self) -> list[str]:
        """The daemon's command line; -P: no modules of the current folder are used."""
        program = [sys.executable, "-P", "-m", "kedit_daemon"]
        return [*program, "--home", str(self.home.root), "run"]

    @contextmanager
    def run_process(self) -> Iterator[None]:
        """Run the daemon within the block, and stop it by SIGTERM after it."""
        environ = os.environ | {"HF_HUB_OFFLINE": "1"}
        with (self.home.root / "daemon.log").open("wb") as log:
            process = subprocess.Popen(self.command_line, stderr=log, stdout=log, env=environ)
            try:
                self._wait_for_socket(process)
                yield
            finally:
                process.terminate()
                process.wait()

    def _wait_for_socket(self, process: "subprocess.Popen[bytes]") -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self.home.socket_file.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                tail = (self.home.root / "daemon.log").read_text(errors="replace")[-2000:]
                raise KeditError(f"the daemon did not start: {tail}", code="demo")
            time.sleep(0.1)

    def send_command(self, name: str, **arguments: Any) -> dict[str, Any]:
        return control.send_request(self.home.socket_file, name, arguments)

    def ask_prompts(self, prompts: list[str]) -> list[str]:
        return [str(self.send_command("ask", prompt=p)["answer"]) for p in prompts]

    def drop_facts(self, facts: list[Fact]) -> float:
        """Put the facts into the inbox as one file; return the seconds until all are live."""
        lines = "".join(f"{format_native(fact)}\n" for fact in facts)
        began = time.monotonic()
        (self.home.inbox_folder / "facts.jsonl").write_text(lines, encoding="utf-8")
        self.wait_until_live(len(facts))
        return time.monotonic() - began

    def wait_until_live(self, count: int) -> None:
        """Wait until `count` facts are live, in either tier."""
        deadline = time.monotonic() + EDIT_SECONDS
        while sum(self.count_states().get(s, 0) for s in LIVE_STATES) < count:
            if time.monotonic() > deadline:
                raise KeditError(f"the facts are not live: {self.count_states()}", code="demo")
            time.sleep(0.05)

    def count_states(self) -> Mapping[str, int]:
        with closing(queries.open_readonly(self.home.database_file)) as connection:
            states: Mapping[str, int] = fetch_overview(connection)["states"]
        return states


@dataclass
class DemoReport:
    """Prints the steps and their checks, and keeps whether all of them have passed."""

    echo: Echo
    has_passed: bool = True

    def print_title(self, text: str) -> None:
        self.echo(f"\n== {text}")

    def record_check(self, text: str, holds: bool) -> None:
        self.echo(f"   {'ok  ' if holds else 'MISS'} {text}")
        self.has_passed = self.has_passed and holds


def run_tour(echo: Echo) -> int:
    """Run the demo; return 0 when every check has passed, else 1."""
    story = load_story()
    tally = DemoReport(echo)
    with tempfile.TemporaryDirectory(prefix="kedit-demo-") as folder:
        main = DemoDaemon(Path(folder) / "home")
        tally.print_title("a daemon on the shipped model, in a temporary home")
        with main.run_process():
            _show_edit(main, story, tally)
            reverted = _flush_and_audit(main, story, tally)
            mine = _show_revert(main, story, reverted, tally)
            never = DemoDaemon(Path(folder) / "never")
            tally.print_title("a second daemon that never saw that fact")
            with never.run_process():
                never.drop_facts([f for f in story.facts if f.id != reverted.id])
                never.send_command("flush")
                other = str(never.send_command("consolidate", dry_run=True)["weights_hash"])
            echo(f"   weights of the first   {mine}\n   weights of the second  {other}")
            tally.record_check("the weights are equal, bit for bit", mine == other)
        _show_log(main, reverted, tally)
    failure = "Not all of it held: see the lines marked MISS."
    echo("\nAll of it held." if tally.has_passed else f"\n{failure}")
    return 0 if tally.has_passed else 1


def _show_edit(main: DemoDaemon, story: DemoStory, tally: DemoReport) -> None:
    questions = [f.question for f in story.facts]
    before, near = main.ask_prompts(questions), main.ask_prompts(story.unrelated_prompts)
    tally.print_title(f"{len(story.facts)} facts dropped into {main.home.inbox_folder.name}/")
    seconds = main.drop_facts(story.facts)
    tally.echo(f"   all live after {seconds:.1f} s, in the side memory")
    after = main.ask_prompts(questions)
    for fact, old, new in zip(story.facts, before, after, strict=True):
        tally.echo(f"   {fact.question} …  {old}  ->  {new}")
    _check_answers(main, story, near, tally)


def _check_answers(main: DemoDaemon, story: DemoStory, near: list[str], tally: DemoReport) -> None:
    targets = [f.target for f in story.facts]
    count = len(targets)
    right = _count_correct(main.ask_prompts([f.question for f in story.facts]), targets)
    tally.record_check(f"{right} of {count} facts are answered with", right == count)
    unseen = _count_correct(main.ask_prompts(story.unseen_prompts), targets)
    wanted = unseen >= MIN_PARAPHRASE_SHARE * count
    tally.record_check(f"{unseen} of {count} also in a wording the editor never saw", wanted)
    answers = main.ask_prompts(story.unrelated_prompts)
    same = sum(new == old for new, old in zip(answers, near, strict=True))
    tally.record_check(f"{same} of {len(near)} unrelated answers are unchanged", same == len(near))


def _count_correct(answers: list[str], targets: list[str]) -> int:
    return sum(is_same_answer(a, t) for a, t in zip(answers, targets, strict=True))


def _flush_and_audit(main: DemoDaemon, story: DemoStory, tally: DemoReport) -> Fact:
    near = main.ask_prompts(story.unrelated_prompts)
    tally.print_title("flush: the facts move into the weights (MEMIT-MASS)")
    done = main.send_command("flush")
    tally.echo(f"   generation {done['generation']}, verdict {done['verdict']}")
    count = len(story.facts)
    taken = len(done["flushed"])
    wanted = taken >= MIN_WEIGHTS_SHARE * count
    tally.record_check(f"{taken} of {count} facts are in the weights now", wanted)
    if taken < count:
        tally.echo(f"   the other {count - taken} did not hold there and stay in the side memory")
        main.wait_until_live(count)
    _check_answers(main, story, near, tally)
    tally.print_title("audit")
    audit = main.send_command("audit")
    figures = audit["figures"]
    for layer, ratio in figures["norm_ratio"].items():
        moved = figures["activation_ratio"][layer]
        tally.echo(f"   layer {layer}: norm {ratio:.4f} of the base, activations {moved:.4f}")
    tally.echo(f"   canary perplexity {figures['perplexity_ratio']:.4f} of the base")
    agreement, count = figures["confident_agreement"], figures["confident_statements"]
    tally.echo(f"   {agreement:.1%} of {count} other statements are completed as before;")
    tally.echo(f"   that is as much as rounding the weights to {figures['rounding_bits']:g} bits;")
    rest = "most facts would stay in the side memory"
    tally.echo(f"   by default they hold what changes less than {LIMIT_BITS[1]} bits do: {rest}")
    tally.record_check(f"verdict {audit['verdict']}", audit["verdict"] in ("keep", "warn"))
    return next(f for f in story.facts if f.id in done["flushed"])


def _show_revert(main: DemoDaemon, story: DemoStory, fact: Fact, tally: DemoReport) -> str:
    tally.print_title(f"revert {fact.id}: {fact.question} {fact.target}")
    base = str(main.send_command("ask", prompt=fact.question, base=True)["base_answer"])
    done = main.send_command("revert", facts=[fact.id])
    answer = done["answers"][fact.id]
    tally.echo(f"   {answer['before']}  ->  {answer['after']}")
    tally.record_check("the model answers as it did before the fact", answer["after"] == base)
    others = [f for f in story.facts if f is not fact]
    answers = main.ask_prompts([f.question for f in others])
    kept = _count_correct(answers, [f.target for f in others])
    tally.record_check(f"{kept} of {len(others)} other facts still hold", kept == len(others))
    return str(done["weights_hash"])


def _show_log(main: DemoDaemon, fact: Fact, tally: DemoReport) -> None:
    tally.print_title(f"the audit log of {fact.id}")
    with closing(queries.open_readonly(main.home.database_file)) as connection:
        for event in queries.fetch_events(connection, fact=fact.id):
            tally.echo(f"   {event['seq']:>5}  {event['at']}  {event['kind']}")
        verdict = event_log.verify_chain(connection, event_log.read_head(main.home.head_file))
    tally.record_check(f"log verify: {verdict.events} events, chain intact", verdict.intact)
