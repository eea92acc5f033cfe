"""The demo: a real daemon from end to end, in a temporary home.

Facts go in through the inbox, the model answers with them, a flush moves them into the weights, an
audit measures the model, one fact is reverted exactly, and the log shows its events.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from kedit_daemon.demo.demo_daemon import DemoDaemon
from kedit_daemon.demo.report import DemoReport, Echo
from kedit_daemon.demo.story import DemoStory
from memory.db import event_log, queries
from memory.errors import KeditError
from memory.facts import Fact
from policies.probe import is_same_answer
from policies.rounding import WIDTHS

SHOWN_UNRELATED = 6  # answers at the start, so that a reader sees what model it is


@dataclass(frozen=True)
class Answers:
    """Answers to a story's prompts, in their order."""

    questions: list[str]
    unseen: list[str]
    unrelated: list[str]
    neighbours: list[str]


@dataclass(frozen=True)
class AskedShares:
    """The shares of answers that are asked for; None: the figure is shown, and not judged."""

    unseen: float
    unrelated: float
    neighbours: float | None


def run_tour(story: DemoStory, echo: Echo, monotonic: Callable[[], float] = time.monotonic) -> int:
    """Run the demo; return 0 when every check has passed, else 1."""
    began, tally = monotonic(), DemoReport(echo)
    with tempfile.TemporaryDirectory(prefix="kedit-demo-") as folder:
        first = DemoDaemon(Path(folder) / "home", story.model, story.settings)
        tally.print_title(f"a daemon on the model {story.model}, in a temporary home")
        with first.run_process():
            echo(f"   ready after {monotonic() - began:.1f} s")
            base = _show_edit(first, story, tally)
            moved = _show_flush(first, story, base, tally)
            _show_audit(first, story, tally)
            reverted = moved[0]
            first_hash = _show_revert(first, story, reverted, tally)
        tally.print_title("a second daemon that never saw that fact")
        direct = {"direct_facts": 1}  # into the weights at once
        second = DemoDaemon(Path(folder) / "never", story.model, {**story.settings, **direct})
        second.take_measurements(first)
        with second.run_process():
            second.drop_facts(moved[1:])
            second_hash = second.read_weights_hash()
        echo(f"   weights of the first   {first_hash}\n   weights of the second  {second_hash}")
        tally.record_check("the weights are equal, bit for bit", first_hash == second_hash)
        _show_log(first, reverted, tally)
    minutes, seconds = divmod(round(monotonic() - began), 60)
    failure = "Not all of it held: see the lines marked MISS."
    held = f"All of it held, in {minutes} min {seconds:02} s."
    echo(f"\n{held if tally.has_passed else failure}")
    return 0 if tally.has_passed else 1


def _ask_story(daemon: DemoDaemon, story: DemoStory) -> Answers:
    return Answers(
        questions=daemon.ask_prompts(story.questions),
        unseen=daemon.ask_prompts(story.unseen_prompts),
        unrelated=daemon.ask_prompts(story.unrelated_prompts),
        neighbours=daemon.ask_prompts(story.neighbour_prompts),
    )


def _show_edit(first: DemoDaemon, story: DemoStory, tally: DemoReport) -> Answers:
    """Drop the facts and show that they are answered with; return the unedited model's answers."""
    base = _ask_story(first, story)
    shown = list(zip(story.unrelated_prompts, base.unrelated, strict=True))[:SHOWN_UNRELATED]
    for prompt, answer in shown:
        tally.echo(f"   {prompt} …  {answer}")
    tally.print_title(f"{len(story.facts)} facts dropped into {first.home.inbox_folder.name}/")
    tally.echo(f"   {story.about}")
    seconds = first.drop_facts(story.facts)
    tally.echo(f"   all live after {seconds:.1f} s, in the side memory")
    answers = _ask_story(first, story)
    tally.print_changes(story.questions, base.questions, answers.questions)
    _judge_answers(story, base, answers, AskedShares(story.minimum.unseen_side, 1.0, 1.0), tally)
    return base


def _judge_answers(
    story: DemoStory, base: Answers, now: Answers, asked: AskedShares, tally: DemoReport
) -> None:
    """Count the answers that are as they should be, and show those that are not."""
    right = _find_right(now.questions, story.targets)
    tally.record_share("facts are answered with", right, 1.0)
    tally.print_misses(right, story.questions, base.questions, now.questions)
    right = _find_right(now.unseen, story.targets)
    tally.record_share("also in a wording the editor never saw", right, asked.unseen)
    tally.print_misses(right, story.unseen_prompts, base.unseen, now.unseen)
    same = _find_same(now.unrelated, base.unrelated)
    tally.record_share("unrelated answers are unchanged", same, asked.unrelated)
    tally.print_misses(same, story.unrelated_prompts, base.unrelated, now.unrelated)
    if story.neighbour_prompts:
        same = _find_same(now.neighbours, base.neighbours)
        text = "answers to such questions about other things are unchanged"
        tally.record_share(text, same, asked.neighbours)
        tally.print_misses(same, story.neighbour_prompts, base.neighbours, now.neighbours)


def _find_right(answers: Sequence[str], targets: Sequence[str]) -> list[bool]:
    return [is_same_answer(a, t) for a, t in zip(answers, targets, strict=True)]


def _find_same(answers: Sequence[str], base: Sequence[str]) -> list[bool]:
    return [a == b for a, b in zip(answers, base, strict=True)]


def _show_flush(
    first: DemoDaemon, story: DemoStory, base: Answers, tally: DemoReport
) -> list[Fact]:
    """Move the facts into the weights; return those that are there now."""
    tally.print_title("flush: the facts move into the weights (MEMIT-MASS)")
    done = first.send_command("flush")
    tally.echo(f"   generation {done['generation']}, verdict {done['verdict']}")
    is_moved = [fact.id in done["flushed"] for fact in story.facts]
    tally.record_share("facts are in the weights now", is_moved, story.minimum.weights)
    count, moved = len(story.facts), [f for f in story.facts if f.id in done["flushed"]]
    if not moved:
        raise KeditError(f"no fact went into the weights: {done['reasons']}", code="demo")
    if len(moved) < count:
        tally.echo(f"   the other {count - len(moved)} stay in the side memory")
        first.wait_until_live(count)
    asked = AskedShares(story.minimum.unseen_weights, story.minimum.unrelated_weights, None)
    _judge_answers(story, base, _ask_story(first, story), asked, tally)
    return moved


def _show_audit(first: DemoDaemon, story: DemoStory, tally: DemoReport) -> None:
    tally.print_title("audit")
    audit = first.send_command("audit")
    figures = audit["figures"]
    for layer, ratio in figures["norm_ratio"].items():
        moved = figures["activation_ratio"][layer]
        tally.echo(f"   layer {layer}: norm {ratio:.4f} of the base, activations {moved:.4f}")
    tally.echo(f"   canary perplexity {figures['perplexity_ratio']:.4f} of the base")
    agreement, count = figures["confident_agreement"], figures["confident_statements"]
    tally.echo(f"   {agreement:.1%} of {count} other statements are completed as before")
    if (bits := figures.get("rounding_bits")) is not None:
        tally.echo(f"   that is as much as rounding the weights to {bits:g} bits")
    if story.settings:
        rest = "most facts would stay in the side memory"
        tally.echo(f"   by default they hold what changes less than {WIDTHS[1]} bits do: {rest}")
    for reason in audit["reasons"]:
        tally.echo(f"   {reason}")
    tally.record_check(f"verdict {audit['verdict']}", audit["verdict"] in ("keep", "warn"))


def _show_revert(first: DemoDaemon, story: DemoStory, fact: Fact, tally: DemoReport) -> str:
    """Revert a fact; return the sha256 of the weights."""
    tally.print_title(f"revert {fact.id}: {fact.statement}")
    base = str(first.send_command("ask", prompt=fact.question, base=True)["base_answer"])
    done = first.send_command("revert", facts=[fact.id])
    answer = done["answers"][fact.id]
    tally.echo(f"   {answer['before']}  ->  {answer['after']}")
    tally.record_check("the model answers as it did before the fact", answer["after"] == base)
    others = [f for f in story.facts if f is not fact]
    answers = first.ask_prompts([f.question for f in others])
    right = _find_right(answers, [f.target for f in others])
    tally.record_share("other facts still hold", right, 1.0)
    return str(done["weights_hash"])


def _show_log(first: DemoDaemon, fact: Fact, tally: DemoReport) -> None:
    tally.print_title(f"the audit log of {fact.id}")
    with closing(queries.open_readonly(first.home.database_file)) as connection:
        for event in queries.fetch_events(connection, fact=fact.id):
            tally.echo(f"   {event['seq']:>5}  {event['at']}  {event['kind']}")
        verdict = event_log.verify_chain(connection, event_log.read_head(first.home.head_file))
    tally.record_check(f"log verify: {verdict.events} events, chain intact", verdict.intact)
