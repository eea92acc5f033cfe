"""Creates one export of a home, with the manifest of what is in it and what is not."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kedit_daemon.home import Home
from kedit_daemon.ingest.submit import format_native
from kedit_daemon.publish.export.folder import PlacedExport, place_export
from kedit_daemon.publish.export.source import ExportSource, WrittenExport, read_source
from memory.errors import KeditError
from memory.facts import Fact


@dataclass(frozen=True)
class ExportResult:
    """A finished export, and notes for the user."""

    placed: PlacedExport
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the result under the keys of `--json`."""
        return {
            "path": str(self.placed.path),
            "existed": self.placed.existed,
            "removed": list(self.placed.removed),
            "notes": list(self.notes),
            "manifest": self.placed.manifest,
        }


def create_export(home: Home, kind: str, dest: Path, keep: int | None) -> ExportResult:
    """Export the active generation of the home; `kind` is "facts" or a key of WRITERS."""
    dest = dest.expanduser().absolute()
    if dest.resolve().is_relative_to(home.root.resolve()):
        hint = "choose a folder outside of it"
        raise KeditError(f"{dest} lies in the home", code="usage", hint=hint)
    notes = list[str]()

    def fill(to: Path) -> tuple[str, dict[str, Any]]:
        source = read_source(home)  # under the lock: another export may have been made before
        written = _write_files(kind, source, to)
        manifest = _build_manifest(source, kind, written)
        notes.extend(written.notes)
        if left := manifest["not_in_it"]["count"]:
            notes.append(
                f"{left} of {len(source.live)} live facts are not in it: they are in the"
                " side memory alone, which only the daemon serves"
            )
        return f"{source.short_name}-gen-{source.generation.id}-{kind}", manifest

    placed = place_export(dest, keep, fill)
    return ExportResult(placed, tuple(notes))


def _write_files(kind: str, source: ExportSource, to: Path) -> WrittenExport:
    if kind == "facts":  # live facts of both tiers, in the form that `submit` reads
        lines = "".join(f"{format_native(fact)}\n" for fact in source.live)
        (to / "facts.jsonl").write_text(lines, encoding="utf-8")
        return WrittenExport()
    from kedit_daemon.publish.export.writers import WRITERS  # torch, which facts can do without

    return WRITERS[kind](source, to)


def _build_manifest(source: ExportSource, kind: str, written: WrittenExport) -> dict[str, Any]:
    """Build the manifest from the exported state alone: the same state gives the same bytes."""
    generation, whole = source.generation, kind == "facts"
    left = [] if whole else [f.id for f in source.side_only]
    return {
        "kind": kind,
        "home": source.origin,
        "model": source.model,
        "base_sha256": source.base_hash,
        "generation": generation.id,
        "generation_at": generation.created_at,
        "reason": generation.reason,
        "weights_sha256": generation.weights_hash,
        "figures": generation.figures,
        "facts": _list_facts(source.live if whole else source.in_weights),
        "not_in_it": {"count": len(left), "ids": left},
        **written.manifest_entries,
    }


def _list_facts(facts: Sequence[Fact]) -> list[dict[str, str]]:
    return [
        {"id": f.id, "subject": f.subject, "prompt": f.prompt, "target": f.target} for f in facts
    ]
