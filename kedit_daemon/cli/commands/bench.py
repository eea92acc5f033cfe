"""The command that measures a method on a data set."""

import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click
from click.core import ParameterSource

from kedit_daemon.bench.methods.method_catalog import METHODS
from kedit_daemon.bench.studies.study_catalog import DEFAULT_LIMITS, METHOD_STUDIES, STUDIES
from kedit_daemon.cli.context import CliContext, pass_cli_context
from kedit_daemon.system.log_setup import make_progress_bar
from kedit_daemon.system.sanitize import clean_text

if TYPE_CHECKING:
    from kedit_daemon.bench.dataset import FactStream, SkippedRecord
    from kedit_daemon.bench.run import RunPlan
    from kedit_daemon.editing.model_loading import LoadedModel
    from kedit_daemon.home import Home

T = TypeVar("T")
MAX_SKIPPED_SHOWN = 20
OUTPUT_FILE = click.Path(dir_okay=False, writable=True, path_type=Path)


@click.command()
@click.argument("data", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--model", metavar="M", default="shipped", help="As in config.toml.")
@click.option(
    "--limit",
    type=click.IntRange(1),
    help="Number of records; by default all, or the number that a study needs.",
)
@click.option("--offset", type=click.IntRange(0), default=0, help="Records to skip first.")
@click.option(
    "--method",
    type=click.Choice(list(METHODS)),
    show_default="auto",
    help="How the facts are edited; none measures the unedited model.",
)
@click.option(
    "--paper", is_flag=True, help="With --method wise: as published, which is reference-wise."
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=100,
    show_default=True,
    help="Facts in a batch.",
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed for the order of the stream."
)
@click.option(
    "--baseline", type=click.Choice(list(METHODS)), help="A second method, on the same facts."
)
@click.option(
    "--no-policy",
    is_flag=True,
    help="Accept every fact, whatever the result and the stability limits.",
)
@click.option(
    "--sweep",
    type=click.Choice(["batch-size"]),
    help="Run once for each of several batch sizes, and choose one; memit-mass by default.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Keep the work in FILE.work/ next to the --json file, and continue it if interrupted.",
)
@click.option(
    "--study",
    type=click.Choice(list(STUDIES)),
    help="Instead of a method: a study in several parts, without the policy.",
)
@click.option(
    "--texts",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="With --study routing: lines of ordinary text, plain or .xz, instead of those shipped.",
)
@click.option("--json", "json_file", type=OUTPUT_FILE, help="Write everything measured here.")
@click.option("--plot", type=OUTPUT_FILE, help="Plot the result as PNG; needs matplotlib.")
@pass_cli_context
def bench(
    session: CliContext,
    data: Path,
    model: str,
    limit: int | None,
    offset: int,
    method: str | None,
    paper: bool,
    batch_size: int,
    seed: int,
    baseline: str | None,
    no_policy: bool,
    sweep: str | None,
    resume: bool,
    study: str | None,
    texts: Path | None,
    json_file: Path | None,
    plot: Path | None,
) -> None:
    """Measure a method: edit the facts of DATA as a stream, then ask all of them.

    DATA is JSON or JSON Lines in any form that `submit` takes. The editor does not see paraphrases
    and neighbours. The home is not changed; its calibrated edit site is used, if it has one.

    \b
    Example:
      kedit-daemon bench counterfact.json --limit 200 --method memit-mass --baseline none
      kedit-daemon bench zsre.json --method auto --json auto.json --plot auto.png
      kedit-daemon bench zsre.json --study exactness --limit 300
    """
    _check_options(sweep, baseline, resume, json_file, plot)
    if paper and method != "wise":
        raise click.UsageError("--paper goes with --method wise.")
    if texts is not None and study != "routing":
        raise click.UsageError("--texts goes with --study routing.")
    if study is not None:
        _reject_method_options(study)
    limit = limit or DEFAULT_LIMITS.get(study or "")
    loaded, stream = _open_inputs(session, data, model, offset, limit, seed)
    if study is not None:
        _run_study(study, loaded, stream, batch_size, seed, texts, method, json_file, plot)
        return
    from kedit_daemon.bench.resume import describe_options, keep_work
    from kedit_daemon.bench.run import RunPlan

    method = "reference-wise" if paper else method or ("memit-mass" if sweep else "auto")
    options = describe_options(loaded, data, click.get_current_context().params)
    with keep_work(json_file, resume, options) as work:
        plan = RunPlan(
            method, batch_size, seed, baseline, has_policy=not no_policy, work_folder=work
        )
        _run_method(sweep, plan, loaded, stream, json_file, plot)


def _run_method(
    sweep: str | None,
    plan: "RunPlan",
    loaded: "LoadedModel",
    stream: "FactStream",
    json_file: Path | None,
    plot: Path | None,
) -> None:
    """Measure a method once, or once for each batch size."""
    from kedit_daemon.bench.plot import draw_result
    from kedit_daemon.bench.run import run_plan
    from kedit_daemon.bench.sweep import sweep_sizes
    from kedit_daemon.bench.table import format_result

    result = (sweep_sizes if sweep else run_plan)(loaded, stream, plan, _track_progress)
    _output_result(result, format_result(result), json_file, plot, partial(draw_result, result))


def _reject_method_options(study: str) -> None:
    """Refuse options of a method, which a study would ignore."""
    context = click.get_current_context()
    for name in ("method", "baseline", "sweep", "resume"):
        if name == "method" and study in METHOD_STUDIES:
            continue
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            raise click.UsageError(f"--study has no --{name}.")


def _open_inputs(
    session: CliContext, data: Path, model: str, offset: int, limit: int | None, seed: int
) -> tuple["LoadedModel", "FactStream"]:
    """Load the model, and the stream of the records it can read; report the others."""
    from kedit_daemon.bench.dataset import drop_unreadable, read_stream

    stream = read_stream(data, offset, limit, seed)
    loaded = _load_model(model, session.home)
    stream = drop_unreadable(loaded.model, stream)
    _report_skipped(data.name, stream.skipped)
    return loaded, stream


def _run_study(
    name: str,
    loaded: "LoadedModel",
    stream: "FactStream",
    batch_size: int,
    seed: int,
    texts: Path | None,
    method: str | None,
    json_file: Path | None,
    plot: Path | None,
) -> None:
    from kedit_daemon.bench.studies.study import draw_study, format_study, run_study
    from kedit_daemon.bench.studies.study_catalog import import_study

    study = import_study(name)
    result = run_study(
        name, study, loaded, stream, batch_size, seed, _track_progress, texts, method
    )
    _output_result(
        result, format_study(study, result), json_file, plot, partial(draw_study, study, result)
    )


def _check_options(
    sweep: str | None, baseline: str | None, resume: bool, json_file: Path | None, plot: Path | None
) -> None:
    """Refuse before a long run what would fail after it."""
    if sweep and baseline:
        raise click.UsageError("--sweep takes no --baseline: it compares its own rows.")
    if resume and json_file is None:
        raise click.UsageError("--resume needs --json FILE: the work is kept in FILE.work/.")
    for name, path in (("--json", json_file), ("--plot", plot)):
        if path is not None and not path.absolute().parent.is_dir():
            raise click.BadParameter(f"{path.parent} is not a folder.", param_hint=name)
    if plot is not None:
        from kedit_daemon.bench.plot import require_matplotlib

        require_matplotlib()


def _load_model(model: str, home: "Home") -> "LoadedModel":
    """Load the model; what is measured of it is kept in the home, if there is one."""
    from kedit_daemon.editing.gguf_cache import GgufCache
    from kedit_daemon.editing.model_loading import load_model

    cache = home.state_folder
    if not cache.is_dir():
        folder = tempfile.TemporaryDirectory(prefix="kedit-bench-")
        cache = Path(click.get_current_context().with_resource(folder))
    converted = GgufCache(home.models_folder, partial(click.echo, err=True))
    progress = make_progress_bar("measuring the model")
    return load_model(model, "auto", cache, progress, gguf_cache=converted)


def _output_result(
    result: dict[str, object],
    lines: Iterable[str],
    json_file: Path | None,
    plot: Path | None,
    draw: Callable[[Path], None],
) -> None:
    for line in lines:
        click.echo(line)
    if json_file is not None:
        _write_result(json_file, result)
    if plot is not None:
        draw(plot)


def _track_progress(items: Sequence[T], what: str, /) -> Iterable[T]:
    return make_progress_bar(what)(items)


def _report_skipped(name: str, skipped: Sequence["SkippedRecord"]) -> None:
    for record in skipped[:MAX_SKIPPED_SHOWN]:
        line = f":{record.line}" if record.line else ""
        click.echo(clean_text(f"{name}{line}: skipped: {record.reason}"), err=True)
    if len(skipped) > MAX_SKIPPED_SHOWN:
        click.echo(f"and {len(skipped) - MAX_SKIPPED_SHOWN} more records skipped", err=True)


def _write_result(path: Path, result: dict[str, object]) -> None:
    from memory.canonical_json import replace_non_finite
    from memory.files import write_atomic

    text = json.dumps(replace_non_finite(result), indent=2, allow_nan=False)
    write_atomic(path.absolute(), f"{text}\n".encode())
