"""The list of kinds against the code that writes events."""

import ast
from collections.abc import Iterator

from paths import ROOT

from kedit_daemon.editing import quarantine
from kedit_daemon.report.event_kinds import EVENT_KINDS
from memory.facts import FactState

WRITERS = {"write_event": 0, "send_to_side": 1}  # method -> place of the kind in its arguments


def written() -> Iterator[str]:
    """The kinds that stand as words in calls that write events."""
    for path in [*ROOT.glob("kedit_daemon/**/*.py"), *ROOT.glob("memory/**/*.py")]:
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            place = WRITERS.get(call.func.attr)
            if place is None or len(call.args) <= place:
                continue
            kind = call.args[place]
            for part in (kind.body, kind.orelse) if isinstance(kind, ast.IfExp) else (kind,):
                if isinstance(part, ast.Constant) and " " not in part.value:
                    yield part.value


def test_every_kind_that_is_written_is_known() -> None:
    found = set(written())
    assert {"audit", "weights_full", "paused", "resumed"} <= found  # the search finds them
    moves = {f"fact_{state}" for state in FactState}
    assert found | moves | {quarantine.QUARANTINED} == set(EVENT_KINDS)
    assert all(EVENT_KINDS.values())
