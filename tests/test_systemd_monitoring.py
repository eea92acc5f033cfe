"""The alert rules and the Grafana dashboard: well formed, and about metrics that exist."""

import ast
import inspect
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from paths import ROOT

from kedit_daemon.cli.main import COMMAND_PATHS
from kedit_daemon.report.event_kinds import EVENT_KINDS

UNITS = ROOT / "systemd"
GROUPS: list[dict[str, Any]] = yaml.safe_load((UNITS / "alerts.yml").read_text())["groups"]
RULES: list[dict[str, Any]] = [rule for group in GROUPS for rule in group["rules"]]
BOARD: dict[str, Any] = json.loads((UNITS / "grafana.json").read_text())
PANELS: list[dict[str, Any]] = BOARD["panels"]
DURATION = re.compile(r"(\d+[smhdwy])+")
# Suffixes that the classes of prometheus_client add to the name of a metric.
ENDINGS = {
    "Counter": ("_total",),
    "CounterMetricFamily": ("_total",),
    "Histogram": ("_bucket", "_sum", "_count"),
    "GaugeMetricFamily": ("",),
}
PROMETHEUS_LABELS = {"job", "instance", "le"}


def expressions() -> Iterator[str]:
    yield from (rule["expr"] for rule in RULES)
    yield from (target["expr"] for panel in PANELS for target in panel["targets"])
    yield from (entry["expr"] for entry in BOARD["annotations"]["list"])
    yield from (v["definition"] for v in BOARD["templating"]["list"] if "definition" in v)


def exported_series(source: str) -> dict[str, set[str]]:
    """Return the labels of each time series that a module's source exports."""
    found: dict[str, set[str]] = {}
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            continue
        if call.func.id in ENDINGS:
            name, *rest = (*call.args, *(k.value for k in call.keywords if k.arg == "labels"))
            assert isinstance(name, ast.Constant)
            labels = {e.value for a in rest if isinstance(a, ast.List) for e in a.elts}
            found |= {name.value + ending: labels for ending in ENDINGS[call.func.id]}
    return found


def queried_series(expression: str) -> Iterator[tuple[str, set[str]]]:
    """Yield each series in an expression, with the labels it is filtered by."""
    for name, chosen in re.findall(r"\b(kedit_\w+)(\{[^}]*\})?", expression):
        yield name, set(re.findall(r"(\w+)\s*[=!]", chosen))


@pytest.mark.parametrize("expression", list(expressions()))
def test_every_metric_exists(expression: str) -> None:
    module = pytest.importorskip("kedit_daemon.serve.metrics")
    known = exported_series(inspect.getsource(module))
    assert "kedit_http_requests_total" in known  # the search works
    grouped = {w for by in re.findall(r"by \(([^)]*)\)", expression) for w in by.split(", ")}
    asked = list(queried_series(expression))
    assert asked or "up{" in expression
    for name, labels in asked:
        assert name in known, f"{name} is none of {sorted(known)}"
        assert labels | grouped <= known[name] | PROMETHEUS_LABELS, name


@pytest.mark.parametrize("expression", list(expressions()))
def test_brackets_and_quotes_are_balanced(expression: str) -> None:
    bare = re.sub(r'"[^"]*"', "", expression)
    assert '"' not in bare
    for opening, closing in ("()", "[]", "{}"):
        assert bare.count(opening) == bare.count(closing)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_a_rule_is_well_formed(rule: dict[str, Any]) -> None:
    assert rule.keys() - {"for"} == {"alert", "expr", "labels", "annotations"}
    assert re.fullmatch(r"Kedit[A-Z]\w+", rule["alert"])
    assert DURATION.fullmatch(rule.get("for", "1m"))
    assert rule["labels"].keys() == {"severity"}
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"].keys() == {"summary", "runbook"}
    for template in re.findall(r"\{\{(.*?)\}\}", rule["annotations"]["summary"]):
        assert re.fullmatch(r" \$(labels\.instance|value( \| humanize\w*)?) ", template)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_a_runbook_names_existing_commands(rule: dict[str, Any]) -> None:
    runbook = rule["annotations"]["runbook"]
    commands = re.findall(r"(?<!-u )kedit-daemon ([\w-]+)", runbook)
    assert commands
    assert set(commands) <= set(COMMAND_PATHS)
    assert set(re.findall(r"--kind (\w+)", runbook)) <= set(EVENT_KINDS)


def test_names_of_alerts_are_unique() -> None:
    assert [group.keys() for group in GROUPS] == [{"name", "rules"}]
    names = [rule["alert"] for rule in RULES]
    assert len(set(names)) == len(names) >= 6


def test_panels_fill_the_board_without_overlapping() -> None:
    cells: set[tuple[int, int]] = set()
    for panel in PANELS:
        at = panel["gridPos"]
        mine = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not mine & cells, panel["title"]
        assert max(x for x, _ in mine) < 24
        cells |= mine
    assert len(cells) == 24 * (1 + max(y for _, y in cells))


def test_panels_are_well_formed() -> None:
    ids = [panel["id"] for panel in PANELS]
    assert len(set(ids)) == len(ids)
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    variables = {variable["name"] for variable in BOARD["templating"]["list"]}
    for panel in PANELS:
        assert panel["type"] in ("stat", "timeseries")
        assert panel["title"]
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs) >= 1
        assert {t["datasource"]["uid"] for t in [panel, *panel["targets"]]} == {chosen["uid"]}
        for target in panel["targets"]:
            used = set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval"}
            assert used <= variables
