"""The command that submits facts."""

import os
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kedit_daemon.cli.context import CliContext, add_dry_run_option, pass_cli_context
from kedit_daemon.system.sanitize import clean_text
from memory.errors import KeditError
from memory.timestamps import format_utc

if TYPE_CHECKING:
    from kedit_daemon.config import Config
    from kedit_daemon.ingest.parser import RecordProblem
    from kedit_daemon.ingest.submit import PredictedOutcome, Submission

MAX_PROBLEMS_SHOWN = 20
MAX_NOTICES_SHOWN = 20


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
    from kedit_daemon.ingest.record_pictures import read_from_folder
    from kedit_daemon.ingest.schemas import FileLimits
    from kedit_daemon.ingest.submit import prepare_submission

    if waiting and dry_run:
        raise click.UsageError("--dry-run submits nothing, so there is nothing to --wait for.")
    config = load_config(session.home.root, session.environ)
    limits = FileLimits.from_settings(config.inbox)
    data, name = _read_input(file, config.inbox.max_bytes)
    beside = partial(read_from_folder, Path(".") if file == "-" else Path(file).parent)
    submission = prepare_submission(data, name, format, limits, beside)
    _print_problems(submission.name, submission.parsed.problems)
    if dry_run:
        _preview_submission(session, submission, config.routing.direct_facts)
    elif submission.facts:
        _submit_facts(ctx, session, submission, waiting, config)
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

    from kedit_daemon.ingest.submit import predict_outcomes
    from kedit_daemon.report.render import format_statement

    for forecast in predict_outcomes(submission.facts, session.home, _now(), direct_facts):
        fact, detail = forecast.fact, clean_text(forecast.detail)
        statement = format_statement(asdict(fact))
        click.echo(f"{fact.id}  {forecast.outcome:<10}  {statement}  ({detail})")
    broken = len(submission.parsed.problems)
    more = f", {broken} broken" if broken else ""
    facts = "1 fact" if len(submission.facts) == 1 else f"{len(submission.facts)} facts"
    click.echo(f"dry run: {facts}{more}; nothing handed in", err=True)


def _now() -> str:
    return format_utc(datetime.now(UTC), "seconds")


def _submit_facts(
    ctx: click.Context,
    session: CliContext,
    submission: "Submission",
    waiting: bool,
    config: "Config",
) -> None:
    from kedit_daemon.ingest.submit import foresee_submission, submit_to_inbox
    from kedit_daemon.system.lock import find_lock_holder

    facts, names = submission.facts, config.inbox.unfinished_names
    forecasts, shared = foresee_submission(facts, session.home, _now(), config.routing.direct_facts)
    name = submit_to_inbox(session.home.inbox_folder, submission, unfinished_names=names)
    for forecast in forecasts:
        click.echo(forecast.fact.id)
    _print_notices(forecasts, shared)
    if broken := len(submission.parsed.problems):
        records = "1 record states" if broken == 1 else f"{broken} records state"
        click.echo(f"{records} no fact; the rest is handed in", err=True)
    if waiting:
        _wait_for_facts(ctx, session, name, [forecast.fact.id for forecast in forecasts])
    elif find_lock_holder(session.home.lock_file) is None:
        start = f"{session.program} run"
        click.echo(clean_text(f"the daemon is not running, so the file waits: {start}"), err=True)


def _print_notices(forecasts: Sequence["PredictedOutcome"], shared: Mapping[str, int]) -> None:
    """Tell what else becomes of facts than that they are learned."""
    notices = [
        f"{one.fact.id} {one.outcome}: {one.detail}"
        for one in forecasts
        if one.outcome in ("amended", "scheduled")
    ]
    notices += [
        f"{count} facts have the id {name}: show and revert mean all of them"
        for name, count in shared.items()
    ]
    for notice in notices[:MAX_NOTICES_SHOWN]:
        click.echo(clean_text(notice), err=True)
    if len(notices) > MAX_NOTICES_SHOWN:
        click.echo(f"and {len(notices) - MAX_NOTICES_SHOWN} more: see --dry-run", err=True)


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
