"""The command that measures where, and how strongly, to edit the configured model."""

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from kedit_daemon.cli.context import (
    CliContext,
    add_dry_run_option,
    add_json_option,
    pass_cli_context,
    print_json,
)
from kedit_daemon.system.sanitize import clean_text
from memory.timestamps import format_utc

if TYPE_CHECKING:
    from kedit_daemon.config import Config
    from kedit_daemon.editing.calibration import Calibration

WORK_FOLDER = "calibration"  # in the home's state: the work of a calibration that was cut off
DEFAULT_FACTS = 16  # the number whose targets are computed in one batch
TABLE_COLUMNS = {  # heading and format of each figure
    "prior": ("prior", "g"),
    "end_prior": ("at end", "g"),
    "ridge": ("ridge", "g"),
    "clamp": ("clamp", "g"),
    "facts": ("facts", "d"),
    "loss": ("loss", ".2f"),
    "reached": ("reached", ".2f"),
    "reliability": ("says", ".2f"),
    "generality": ("rephr.", ".2f"),
    "locality": ("keeps", ".2f"),
    "norm_ratio": ("norm", ".3f"),
    "perplexity_ratio": ("perpl.", ".3f"),
    "score": ("score", ".3f"),
}
COLUMN_WIDTH = 8


@click.command()
@click.option(
    "--pilot",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Facts to measure with, in any form that submit takes; by default those shipped.",
)
@click.option(
    "--facts",
    "count",
    type=click.IntRange(1),
    default=DEFAULT_FACTS,
    show_default=True,
    help="Number of facts to edit at once.",
)
@click.option(
    "--false-routes",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.001,
    show_default=True,
    help="Share of unrelated text that may pass as a question about a fact that it names.",
)
@click.option(
    "--minutes",
    type=click.FloatRange(0, min_open=True),
    default=10.0,
    show_default=True,
    help="Time for all of it: the search takes the best of what it has tried by then.",
)
@add_json_option
@add_dry_run_option
@pass_cli_context
def calibrate(
    session: CliContext,
    pilot: Path | None,
    count: int,
    false_routes: float,
    minutes: float,
    as_json: bool,
    dry_run: bool,
) -> None:
    """Measure where the model takes facts, and how strongly to edit it.

    A batch of facts is edited at many layers, without their paraphrases. The site that states
    them best, also in the paraphrases, and changes their neighbours least is written into the home
    with the limits of the audits, the side memory's gate and all figures (state/kedit.json). It
    takes some minutes on a small model. The daemon must not run, or this exits with 75.

    Terms are computed for the edited layers, and kept for good: a home that has ever moved facts
    into the weights is refused; calibrate a new one.

    \b
    Example:
      kedit-daemon calibrate --pilot facts.jsonl
    """
    from kedit_daemon.config import load_config
    from kedit_daemon.maintenance.restore import refuse_unfinished_restore
    from kedit_daemon.system.lock import hold_lock
    from memory.files import write_atomic
    from policies.edit_site import SITE_FILE, format_site

    config = load_config(session.home.root, session.environ)
    refuse_unfinished_restore(session.home)
    session.home.create_folders()
    with hold_lock(session.home.lock_file):
        found = _run_calibration(session, config, pilot, count, false_routes, minutes, dry_run)
        path = session.home.state_folder / SITE_FILE
        if not dry_run:
            write_atomic(path, format_site(found.site, found.evidence).encode())
    if as_json:
        written = None if dry_run else str(path)
        print_json({"site": asdict(found.site), "evidence": found.evidence, "written": written})
        return
    click.echo("\n".join(_render_calibration(found)))
    click.echo("dry run: nothing written" if dry_run else f"written: {clean_text(path)}", err=True)


def _run_calibration(
    session: CliContext,
    config: "Config",
    pilot: Path | None,
    count: int,
    false_routes: float,
    minutes: float,
    dry_run: bool,
) -> "Calibration":
    from kedit_daemon.editing.calibration import calibrate, refuse_if_in_use
    from kedit_daemon.editing.gguf_cache import GgufCache
    from kedit_daemon.editing.model_loading import open_model
    from kedit_daemon.editing.pilot import make_pilot, read_pilot
    from kedit_daemon.ingest.schemas import FileLimits
    from kedit_daemon.shipped import PILOT_FACTS
    from policies.edit_site import SITE_FILE

    refuse_if_in_use(session.home)
    source = pilot or PILOT_FACTS
    facts = read_pilot(source, FileLimits.from_settings(config.inbox))
    with ExitStack() as stack:
        cache = session.home.state_folder
        if dry_run:  # measurements go elsewhere, so that the home stays as it is
            cache = Path(stack.enter_context(TemporaryDirectory(prefix="kedit-calibrate-")))
            if (session.home.state_folder / SITE_FILE).is_file():
                shutil.copy(session.home.state_folder / SITE_FILE, cache)
        converted = GgufCache(session.home.models_folder, partial(click.echo, err=True))
        opened = open_model(config.model, config.device, cache, converted, config.dtype)
        opened.model.widen_layers(range(opened.model.layer_count))  # any may be edited
        chosen = make_pilot(opened.model, facts, count)
        report = stack.enter_context(_show_progress())
        work = cache / WORK_FOLDER
        work.mkdir(exist_ok=True)
        found = calibrate(opened, chosen, false_routes, 60 * minutes, work, report)
    at = format_utc(datetime.now(UTC), "seconds")
    names = {"at": at, "model": config.model, "pilot_file": str(source)}
    return replace(found, evidence=names | found.evidence)


@contextmanager
def _show_progress() -> Iterator[Callable[[str], None]]:
    """Show the step and the time on a terminal's stderr; elsewhere a line for each step."""
    if not sys.stderr.isatty():
        began = time.monotonic()
        yield lambda what: click.echo(f"{time.monotonic() - began:6.0f} s  {what}", err=True)
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("calibrating", total=None)
        yield lambda what: bar.update(task, description=what)


def _render_calibration(found: "Calibration") -> Iterator[str]:
    """Yield the table of all candidates, the chosen one marked, and the limits."""
    chosen, site = found.evidence["chosen"], found.site
    headings = "".join(f"{heading:>{COLUMN_WIDTH}}" for heading, _ in TABLE_COLUMNS.values())
    yield click.style(f"  {'STAGE':12} {'SUBJECT':8} {'END':4}{headings}", bold=True)
    for row in found.evidence["candidates"]:
        yield f"{'*' if row == chosen else ' '} {_render_row(row)}"
    yield f"* chosen, of {len(found.evidence['candidates'])}"
    counted = found.evidence["agreement_counted_on"]
    for figure in ("norm", "activation", "perplexity", counted):
        verdicts = ("warn", "consolidate", "revert")
        limits = (f"{v} {getattr(site, f'{figure}_{v}'):g}" for v in verdicts)
        yield f"{figure} limits: {', '.join(limits)}"
    yield from _render_rounding(found.evidence)
    gate = found.evidence["end_gate"]
    yield (
        f"end gate: {gate['gate']:.3f}, passed by {gate['false_routes']:.2%} of {gate['pairs']}"
        f" pairs of a fact and other text, and by {gate['passed']:.0%} of the paraphrases"
    )


def _render_rounding(evidence: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table of what rounding the weights changes, which the limits come from."""
    share = f"agreement on {evidence['confident_statements']} sure"
    columns = {
        "agreement": ("agreement", ".4f"),
        "confident_agreement": (share, ".4f"),
        "kl": ("KL", ".4f"),
        "perplexity_ratio": ("perplexity", ".4f"),
        "activation_change": ("activation", ".4f"),
    }
    widths = {name: max(COLUMN_WIDTH, len(heading)) + 2 for name, (heading, _) in columns.items()}
    heads = "".join(f"{heading:>{widths[name]}}" for name, (heading, _) in columns.items())
    yield click.style(f"  ROUNDED TO{heads}", bold=True)
    for row in evidence["rounding"]:
        cells = "".join(
            f"{_format_cell(row[name], form):>{widths[name]}}"
            for name, (_, form) in columns.items()
        )
        yield f"  {row['bits']} bits    {cells}"


def _render_row(row: Mapping[str, Any]) -> str:
    subject, end = (
        ",".join(map(str, row[name])) or "-" for name in ("subject_layers", "end_layers")
    )
    cells = "".join(
        f"{_format_cell(row.get(name), form):>{COLUMN_WIDTH}}"
        for name, (_, form) in TABLE_COLUMNS.items()
    )
    return f"{row['stage']:12} {subject:8} {end:4}{cells}"


def _format_cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
