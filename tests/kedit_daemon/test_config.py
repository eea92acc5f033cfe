"""What a home's settings become, and what is said about wrong ones."""

import re
import tomllib
from dataclasses import asdict
from pathlib import Path

import pytest
from pydantic import ValidationError

from kedit_daemon.config import Config, StabilityConfig, load_config, render_default_config
from memory.errors import KeditError
from policies.edit_site import make_default_site
from policies.health_limits import ALL_STATEMENTS_LIMITS, Limits


def read(folder: Path, text: str | bytes, environ: dict[str, str] | None = None) -> Config:
    data = text.encode() if isinstance(text, str) else text
    (folder / "config.toml").write_bytes(data)
    return load_config(folder, environ or {})


def refusal(folder: Path, text: str | bytes, environ: dict[str, str] | None = None) -> KeditError:
    with pytest.raises(KeditError) as caught:
        read(folder, text, environ)
    assert caught.value.exit_code == 78
    return caught.value


def test_the_default_text_says_every_default(tmp_path: Path) -> None:
    assert read(tmp_path, render_default_config("shipped")) == Config()
    assert tomllib.loads(render_default_config("shipped")) == Config().model_dump(exclude_none=True)


def test_the_default_text_shows_the_thresholds_that_a_model_without_its_own_has() -> None:
    section = render_default_config("shipped").split("[stability]")[1].split("[schedule]")[0]
    shown = tomllib.loads(re.sub(r"^# (?=\w+ = )", "", section, flags=re.MULTILINE))
    assert shown.keys() == StabilityConfig.model_fields.keys()
    site = asdict(make_default_site(4))
    agreement = [shown.pop(f"agreement_{verdict}") for verdict in vars(ALL_STATEMENTS_LIMITS)]
    assert Limits(*agreement) == ALL_STATEMENTS_LIMITS
    own = {k: v for k, v in shown.items() if k in site}
    assert len(own) == 12
    others = {k: v for k, v in shown.items() if k not in site}
    assert others == {k: getattr(StabilityConfig(), k) for k in others}
    assert own == {name: site[name] for name in own}


def test_a_threshold_that_is_given_is_taken_and_the_others_are_left_to_the_model(
    tmp_path: Path,
) -> None:
    stability = read(tmp_path, "[stability]\nnorm_revert = 3\nactivation_warn = 0.2\n").stability
    of_model = [k for k, v in StabilityConfig() if v is None]
    given = {k: v for k, v in stability if v is not None and k in of_model}
    assert given == {"norm_revert": 3.0, "activation_warn": 0.2}


def test_what_the_file_leaves_out_keeps_its_default(tmp_path: Path) -> None:
    config = read(tmp_path, 'device = "cuda:1"\n[inbox]\nsettle_seconds = 2\n')
    assert config == Config(
        device="cuda:1", inbox=Config().inbox.model_copy(update={"settle_seconds": 2.0})
    )


@pytest.mark.parametrize("model", ["shipped", "/models/a b", 'odd "name"\\', "modèle"])
def test_the_default_text_takes_any_model(tmp_path: Path, model: str) -> None:
    assert read(tmp_path, render_default_config(model)) == Config(model=model)


def test_a_byte_order_mark_is_tolerated(tmp_path: Path) -> None:
    assert read(tmp_path, b'\xef\xbb\xbfdevice = "cpu"\n').device == "cpu"


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValidationError):
        Config().inbox.max_bytes = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "key", "hint"),
    [
        ("[inbox]\nsetle_seconds = 1.0", "inbox.setle_seconds", "did you mean settle_seconds?"),
        ('[sceduling]\naudit = "x"', "sceduling", "did you mean schedule?"),
        ("[side]\nmax_bytes = 5", "side.max_bytes", "max_bytes belongs in [inbox]"),
        ("[flush]\nzzz = 5", "flush.zzz", "the keys here are: batch_facts"),
        ('[inbox]\nmax_bytes = "5"', "inbox.max_bytes", "10485760"),
        ("[inbox]\nmax_bytes = 0", "inbox.max_bytes", "10485760"),
        ("[inbox]\nmax_bytes = true", "inbox.max_bytes", "10485760"),
        ("[routing]\nflush_age_seconds = inf", "routing.flush_age_seconds", "86400.0"),
        ("[routing]\nflush_age_seconds = nan", "routing.flush_age_seconds", "86400.0"),
        ('model = ""', "model", '"shipped"'),
        ('device = "gpu"', "device", '"auto"'),
        ("inbox = 3", "inbox: must be a section", "[inbox]"),
        (
            "[stability]\nnorm_warn = 1.5\nnorm_consolidate = 1.3",
            "norm_warn lies above norm_consolidate",
            "[stability]",
        ),
        (
            "[stability]\nnorm_warn = 1.5\nnorm_revert = 1.3",
            "norm_warn lies above norm_revert",
            "[stability]",
        ),
        (
            "[stability]\nretention_warn = 0.5",
            "retention_warn lies above retention_consolidate",
            "[stability]",
        ),
        ("[stability]\nactivation_warn = 0", "stability.activation_warn", ""),
        ('[schedule]\naudit = "hourly"', "schedule.audit", "0 * * * *"),
        ('[serve]\nallowed_origins = "http://a.b"', "serve.allowed_origins", "[]"),
        ('[serve]\nallowed_origins = ["*"]', "scheme://host:port", "[]"),
        ('[serve]\nallowed_origins = ["http://a.b/"]', "serve.allowed_origins.0", "[]"),
        ('[serve]\nallowed_origins = ["a.b", "http://*"]', "serve.allowed_origins.1", "[]"),
        ('[serve]\nallowed_origins = ["null"]', "without a path", "[]"),
        ('[serve]\nengine = "127.0.0.1:8000"', "serve.engine.0", "[]"),
        ('[serve]\nengine = ["http://a/v1"]', "serve.engine.0", "[]"),
        ("[serve]\nengine = 8000", "serve.engine", "[]"),
        ('[serve]\nadapters = "/srv/x"', "adapters are for engines", "[serve]"),
        ('[serve]\nengine = "http://a"\nadapters = "x"', "serve.adapters", "null"),
        ('[schedule]\naudit = "60 * * * *"', "schedule.audit", "0 * * * *"),
        ('[schedule]\naudit = "0 4 * * 0"', "weekdays as names", "0 * * * *"),
        ('[schedule]\naudit = "0 4 31 2 *"', "no such date", "0 * * * *"),
    ],
)
def test_an_error_names_file_key_and_remedy(tmp_path: Path, text: str, key: str, hint: str) -> None:
    error = refusal(tmp_path, text)
    assert str(error).startswith(f"{tmp_path / 'config.toml'}: ")
    assert key in str(error)
    assert hint in error.hint


def test_every_wrong_key_is_reported_at_once(tmp_path: Path) -> None:
    error = refusal(tmp_path, "[inbox]\nmax_bytes = 0\nmax_facts = -1\n")
    assert [line.split(": ")[1] for line in str(error).splitlines()] == [
        "inbox.max_bytes",
        "inbox.max_facts",
    ]


def test_weekdays_by_name_are_taken(tmp_path: Path) -> None:
    config = read(tmp_path, '[schedule]\nconsolidate = "30 4 * * mon-fri"\n')
    assert config.schedule.consolidate == "30 4 * * mon-fri"


@pytest.mark.parametrize(
    ("data", "what"), [(b"inbox = \n", "line 1"), (b"model = '\xff'\n", "UTF-8")]
)
def test_a_file_that_is_not_toml(tmp_path: Path, data: bytes, what: str) -> None:
    error = refusal(tmp_path, data)
    assert what in str(error)
    assert error.hint


def test_a_missing_file_and_an_unreadable_one(tmp_path: Path) -> None:
    with pytest.raises(KeditError, match="does not exist") as caught:
        load_config(tmp_path, {})
    assert (caught.value.code, caught.value.exit_code) == ("no-home", 78)
    assert caught.value.hint.endswith(f"--home {tmp_path} init")
    (tmp_path / "config.toml").mkdir()
    with pytest.raises(KeditError, match="directory") as caught:
        load_config(tmp_path, {})
    assert caught.value.exit_code == 78


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    environ = {
        "KEDIT_MODEL": "17",
        "KEDIT_INBOX_MAX_BYTES": "2048",
        "KEDIT_ROUTING_FLUSH_AGE_SECONDS": "90",
        "KEDIT_SCHEDULE_AUDIT": "5 * * * *",
        "KEDIT_HOME": "/elsewhere",
        "OTHER": "x",
    }
    config = read(tmp_path, 'model = "a"\n[inbox]\nmax_bytes = 5\nmax_facts = 7\n', environ)
    assert config.model == "17"
    assert (config.inbox.max_bytes, config.inbox.max_facts) == (2048, 7)
    assert config.routing.flush_age_seconds == 90.0
    assert config.schedule.audit == "5 * * * *"


@pytest.mark.parametrize(
    ("variable", "value", "hint"),
    [
        ("KEDIT_INBOX_MAX_BYTES", "many", "10485760"),
        ("KEDIT_INBOX_MAX_BYTES", "1.5", "10485760"),
        ("KEDIT_INBOX_MAX_BITES", "5", "did you mean max_bytes?"),
    ],
)
def test_a_wrong_variable_is_named(tmp_path: Path, variable: str, value: str, hint: str) -> None:
    error = refusal(tmp_path, "", {variable: value})
    assert f"${variable}" in str(error)
    assert hint in error.hint


def test_a_variable_does_not_hide_a_file_that_is_wrong(tmp_path: Path) -> None:
    error = refusal(tmp_path, "inbox = 3\n", {"KEDIT_INBOX_MAX_BYTES": "5"})
    assert "inbox: must be a section" in str(error)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('kind = "lora"', "belong together"),
        ('folder = "/srv/x"', "belong together"),
        ('command = ["a"]', "nothing to publish"),
        ('kind = "facts"\nfolder = "/srv/x"\nvllm = "http://127.0.0.1:8000"', "not facts"),
        ('kind = "gguf"\nfolder = "/srv/x"\nvllm = "http://127.0.0.1:8000"', "not gguf"),
        ('kind = "lora"\nfolder = "srv/x"', "publish.folder"),
        ('kind = "all"\nfolder = "/srv/x"', "publish.kind"),
        ('kind = "lora"\nfolder = "/x"\nvllm = "127.0.0.1:8000"', "publish.vllm"),
        ('kind = "lora"\nfolder = "/x"\ncommand = [1]', "publish.command.0"),
        ('kind = "lora"\nfolder = "/x"\ncommand = "a b"', "publish.command"),
    ],
)
def test_a_publish_section_that_cannot_work(tmp_path: Path, text: str, problem: str) -> None:
    assert problem in str(refusal(tmp_path, f"[publish]\n{text}\n"))


def test_the_publish_section_as_shown_in_the_default_text_works(tmp_path: Path) -> None:
    section = render_default_config("shipped").split("[publish]")[1].split("[serve]")[0]
    shown = re.sub(r"^# (?=\w+ = )", "", section, flags=re.MULTILINE)
    publish = read(tmp_path, f"[publish]\n{shown}").publish
    assert (publish.kind, publish.keep, publish.vllm) == ("lora", 3, "http://127.0.0.1:8000")


def test_one_engine_is_a_list_of_one(tmp_path: Path) -> None:
    assert read(tmp_path, '[serve]\nengine = "http://a:1"').serve.engine == ["http://a:1"]
    assert read(tmp_path, '[serve]\nengine = ["http://a:1", "https://b"]').serve.engine == [
        "http://a:1",
        "https://b",
    ]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_a_server_for_this_machine_alone_needs_no_token(tmp_path: Path, host: str) -> None:
    serve = read(tmp_path, f'[serve]\nport = 8000\nhost = "{host}"').serve
    assert (serve.host, serve.port, serve.token_file) == (host, 8000, None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "kedit.example"])
def test_a_server_that_others_reach_needs_a_token(tmp_path: Path, host: str) -> None:
    error = refusal(tmp_path, f'[serve]\nhost = "{host}"')
    assert "serve: token_file must be set" in str(error) and host in str(error)
    text = f'[serve]\nhost = "{host}"\ntoken_file = "token"'
    assert read(tmp_path, text, {"KEDIT_SERVE_PORT": "80"}).serve.port == 80
