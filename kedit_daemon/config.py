"""The settings of a home: defaults, overridden by config.toml, overridden by the environment."""

import difflib
import json
import os
import re
import tomllib
from collections.abc import Mapping
from datetime import UTC, datetime
from ipaddress import ip_address
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from apscheduler.triggers.cron import CronTrigger
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from memory.errors import KeditError, NotInitialised

CONFIG_FILE = "config.toml"
REVIEW_TEMPLATE = Path(__file__).with_name("review.yaml")
ENVIRON_PREFIX = "KEDIT"
# Names of models, which are no paths.
SHIPPED_MODEL, VISION_MODEL, SMOLLM2_MODEL = "shipped", "shipped-vision", "smollm2"
# Files that browsers, editors and copying programs have not finished; files of desktops.
UNFINISHED_NAMES = (
    *("*.tmp", "*.temp", "*.part", "*.partial", "*.filepart", "*.download", "*.crdownload"),
    *("*.opdownload", "*.aria2", "*.swp", "*.swo", "*.swx", "*~", "#*#", "~$*"),
    *("desktop.ini", "thumbs.db", "ehthumbs.db"),
)
_ANY_DAY = datetime(2024, 1, 1, tzinfo=UTC)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _check_origin(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s/*?#@]+", text):
        raise ValueError("an origin is scheme://host, or scheme://host:port, without a path or a *")
    return text.lower()


def _check_cron(text: str) -> str:
    trigger = CronTrigger.from_crontab(text, timezone=UTC)
    # APScheduler counts weekdays from Monday, cron from Sunday: numbers would be a day off.
    if any(c.isdigit() for c in text.split()[4]):
        raise ValueError("write weekdays as names: mon, tue, wed, thu, fri, sat, sun")
    if trigger.get_next_fire_time(None, _ANY_DAY) is None:
        raise ValueError("there is no such date")
    return text


Origin = Annotated[str, AfterValidator(_check_origin)]
Cron = Annotated[str, AfterValidator(_check_cron)]
T = TypeVar("T")
OneOrMore = Annotated[list[T], BeforeValidator(_as_list)]
EngineUrl = Annotated[str, Field(pattern=r"^https?://[^/\s]+$")]
Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
Ratio = Annotated[float, Field(gt=0)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class InboxConfig(_Section):
    """Limits of the inbox, and its timing."""

    settle_seconds: Annotated[float, Field(ge=0)] = 1.0
    rescan_seconds: Seconds = 30.0
    max_bytes: Count = 10_485_760
    max_facts: Count = 10_000
    max_target_chars: Count = 400
    max_attempts: Count = 3
    unfinished_names: list[Annotated[str, Field(min_length=1)]] = list(UNFINISHED_NAMES)


class RoutingConfig(_Section):
    """The choice between side memory and weights, and the times of flushes."""

    direct_facts: Count = 500
    flush_facts: Count = 100
    flush_age_seconds: Seconds = 86_400.0


class SideConfig(_Section):
    """The side memory."""

    batch_facts: Count = 16
    steps: Count = 60


class FlushConfig(_Section):
    """Flushes of facts into the weights."""

    batch_facts: Count = 100
    memory_mb: Count = 512


class StabilityConfig(_Section):
    """The figures from which an audit warns, consolidates or reverts."""

    norm_warn: Ratio | None = None
    norm_consolidate: Ratio | None = None
    norm_revert: Ratio | None = None
    perplexity_warn: Ratio | None = None
    perplexity_consolidate: Ratio | None = None
    perplexity_revert: Ratio | None = None
    activation_warn: Ratio | None = None
    activation_consolidate: Ratio | None = None
    activation_revert: Ratio | None = None
    confident_warn: Ratio | None = None
    confident_consolidate: Ratio | None = None
    confident_revert: Ratio | None = None
    agreement_warn: Ratio | None = None
    agreement_consolidate: Ratio | None = None
    agreement_revert: Ratio | None = None
    retention_warn: Ratio = 0.03
    retention_consolidate: Ratio = 0.05
    retention_revert: Ratio = 0.10
    cool_down_seconds: Annotated[float, Field(ge=0)] = 600.0
    acts_a_day: Count = 12

    @model_validator(mode="after")
    def _check_limits_rise(self) -> Self:
        for figure in ("norm", "perplexity", "activation", "confident", "agreement", "retention"):
            verdicts = ("warn", "consolidate", "revert")
            names = [f"{figure}_{verdict}" for verdict in verdicts]
            limits = [(name, limit) for name in names if (limit := getattr(self, name)) is not None]
            for (lower, low), (upper, high) in pairwise(limits):
                if low > high:
                    raise ValueError(f"{lower} lies above {upper}: set both")
        return self


class ScheduleConfig(_Section):
    """Cron expressions (UTC) of the regular jobs."""

    audit: Cron = "0 * * * *"
    consolidate: Cron = "0 4 * * *"
    expire: Cron = "* * * * *"
    retention: Cron = "30 2 * * *"


class PublishConfig(_Section):
    """The export of each new generation to the servers that use it."""

    kind: Literal["merged", "delta", "lora", "gguf", "gguf-lora", "facts"] | None = None
    folder: Annotated[str, Field(pattern="^[/~]")] | None = None
    keep: Count = 3
    command: list[Annotated[str, Field(min_length=1)]] = []
    vllm: Annotated[str, Field(pattern=r"^http://[^/\s]+$")] | None = None

    @model_validator(mode="after")
    def _check_complete(self) -> Self:
        if (self.kind is None) != (self.folder is None):
            raise ValueError("kind and folder belong together: set both or neither")
        if self.kind is None and (self.command or self.vllm):
            raise ValueError("there is nothing to publish without kind and folder: set both")
        if self.kind in ("facts", "gguf", "gguf-lora") and self.vllm:
            raise ValueError(f"vllm takes lora, delta or merged, not {self.kind}")
        return self


class ServeConfig(_Section):
    """The HTTP server."""

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 0
    token_file: Annotated[str, Field(min_length=1)] | None = None
    max_body_bytes: Count = 10_485_760
    most_rows: Count = 16
    waiting_limit: Count = 64
    requests_per_minute: Annotated[int, Field(ge=0)] = 0
    allowed_origins: list[Origin] = []
    engine: OneOrMore[EngineUrl] = []
    adapters: Annotated[str, Field(pattern="^[/~]")] | None = None

    @property
    def is_local(self) -> bool:
        """Check that only this machine reaches the server."""
        try:
            return self.host == "localhost" or ip_address(self.host).is_loopback
        except ValueError:
            return False

    @model_validator(mode="after")
    def _check_adapters(self) -> Self:
        if self.adapters is not None and not self.engine:
            raise ValueError("adapters are for engines: set engine too, or leave adapters out")
        return self

    @model_validator(mode="after")
    def _check_token_file(self) -> Self:
        if not self.is_local and self.token_file is None:
            raise ValueError(f"token_file must be set: others reach the host {self.host}")
        return self


class Config(_Section):
    """All settings."""

    model: Annotated[str, Field(min_length=1)] = SHIPPED_MODEL
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    inbox: InboxConfig = InboxConfig()
    routing: RoutingConfig = RoutingConfig()
    side: SideConfig = SideConfig()
    flush: FlushConfig = FlushConfig()
    stability: StabilityConfig = StabilityConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    publish: PublishConfig = PublishConfig()
    serve: ServeConfig = ServeConfig()


SECTIONS: Mapping[str, type[_Section]] = {
    "inbox": InboxConfig,
    "routing": RoutingConfig,
    "side": SideConfig,
    "flush": FlushConfig,
    "stability": StabilityConfig,
    "schedule": ScheduleConfig,
    "publish": PublishConfig,
    "serve": ServeConfig,
}


def render_default_config(model: str) -> str:
    """Return the commented default settings, with a model."""
    # A JSON string without escapes for letters is a TOML string too.
    text = Path(__file__).with_name(CONFIG_FILE).read_text(encoding="utf-8")
    return text.replace('= "shipped"', "= " + json.dumps(model, ensure_ascii=False))


def load_config(home: Path, environ: Mapping[str, str]) -> Config:
    """Read the settings of a home. Raises KeditError, which names file, key and remedy."""
    path = home / CONFIG_FILE
    settings = _read_toml(path)
    _apply_environ(settings, environ)
    try:
        return Config.model_validate(settings)
    except ValidationError as error:
        raise _explain_errors(error, path, environ) from None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError as error:
        raise NotInitialised(
            f"{path} does not exist",
            hint=f"make one with: kedit-daemon --home {path.parent} init",
        ) from error
    except OSError as error:
        problem, hint = f"{path}: {os.strerror(error.errno or 0)}", "make the file readable"
    except UnicodeDecodeError as error:
        problem, hint = f"{path}: byte {error.start} is not UTF-8", "save the file as UTF-8"
    except tomllib.TOMLDecodeError as error:
        problem, hint = f"{path}: {error}", "correct that line; text needs quotes in TOML"
    raise KeditError(problem, code="bad-config", hint=hint)


def _apply_environ(settings: dict[str, Any], environ: Mapping[str, str]) -> None:
    """Put the values of KEDIT_SECTION_KEY and KEDIT_KEY into the settings."""
    for variable, text in environ.items():
        prefix, _, name = variable.partition("_")
        section, _, key = name.lower().partition("_")
        if prefix != ENVIRON_PREFIX:
            continue
        if section in SECTIONS and key:
            table, model = settings.setdefault(section, {}), SECTIONS[section]
        elif section in ("model", "device", "dtype") and not key:
            table, model, key = settings, Config, section
        else:
            continue
        if isinstance(table, dict):  # otherwise the file is wrong, and validation reports it
            table[key] = _parse_value(model, key, text)


def _parse_value(model: type[_Section], key: str, text: str) -> Any:
    """Return the number that the key needs; the text itself where it needs or is none."""
    expected = model.model_fields[key].annotation if key in model.model_fields else str
    number = float if expected == (Ratio | None) else expected
    try:
        return number(text) if number in (int, float) else text
    except ValueError:
        return text


def _explain_errors(error: ValidationError, path: Path, environ: Mapping[str, str]) -> KeditError:
    variables = {name.upper(): name for name in environ}
    problems: list[str] = []
    remedies: list[str] = []
    for problem in error.errors(include_url=False):
        keys = tuple(str(part) for part in problem["loc"])
        variable = "_".join((ENVIRON_PREFIX, *keys)).upper()
        origin = f"${variables[variable]}" if variable in variables else str(path)
        unknown = problem["type"] == "extra_forbidden"
        text = {"extra_forbidden": "unknown key", "model_type": "must be a section"}.get(
            problem["type"], problem["msg"].removeprefix("Value error, ")
        )
        problems.append(f"{origin}: {'.'.join(keys)}: {text}")
        remedies.append(_suggest_key(keys) if unknown else _suggest_default(keys))
    return KeditError("\n".join(problems), code="bad-config", hint=remedies[0])


def _suggest_key(keys: tuple[str, ...]) -> str:
    *section, key = keys
    elsewhere = [name for name, model in SECTIONS.items() if key in model.model_fields]
    if elsewhere:
        return f"{key} belongs in [{elsewhere[0]}]"
    known = list((SECTIONS[section[0]] if section else Config).model_fields)
    if similar := difflib.get_close_matches(key, known, n=1):
        return f"did you mean {similar[0]}?"
    return f"the keys here are: {', '.join(known)}"


def _suggest_default(keys: tuple[str, ...]) -> str:
    value: Any = Config()
    for key in keys[:2]:  # an element of a list has no default of its own
        value = getattr(value, key)
    if isinstance(value, _Section):
        return f"correct the section [{keys[0]}]"
    return f"correct it, or remove it to take the default, {json.dumps(value)}"
