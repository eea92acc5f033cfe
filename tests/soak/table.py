"""The soak's figures for people: a table in Markdown, into a document where one is given."""

from pathlib import Path
from typing import Any

BEGIN, END = "<!-- made by the soak: begin -->", "<!-- made by the soak: end -->"


def write(figures: dict[str, Any], document: Path | None) -> str:
    """The table; with a document, put between its markers."""
    text = "\n".join(lines(figures))
    if document is not None:
        before, _, rest = document.read_text("utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        document.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", "utf-8")
    return text


def lines(f: dict[str, Any]) -> list[str]:
    reading, kills = f["reading"], f["kills"]
    longest = max(reading["outage_seconds"], default=0.0)
    rows = [
        ("minutes, of these without kills", f"{f['minutes']:g}, {f['minutes_without_kills']:g}"),
        ("kill -9 of the daemon, of its server", f"{kills['daemon']}, {kills['server']}"),
        ("facts handed in", f"{f['handed_in']:,}"),
        ("facts lost", f"{f['lost']:,}"),
        ("facts learned a minute", f"{f['facts_a_minute']:g}"),
        ("at the end live, refused", f"{f['live']}, {f['refused']}"),
        ("live and not stated", str(f["not_stated"])),
        ("differences from the model of what must be", str(len(f["wrong"]))),
        ("reverts, audits", f"{f['reverts']}, {f['audits']}"),
        ("events in the log, its chain intact", f"{f['events']:,}"),
        ("answers", f"{reading['answers']:,}"),
        ("answers that failed while nothing was killed", str(reading["failed"])),
        ("seconds to an answer, median and p99",
         f"{_n(reading['seconds_p50'], 3)}, {_n(reading['seconds_p99'], 3)}"),
        ("longest time without answers after a kill", f"{longest:g} s"),
    ]  # fmt: skip
    for who, m in f["memory"].items():
        rows += [
            (f"{who}: most memory", f"{m['highest_mb']:.0f} MB"),
            (f"{who}: memory without kills", _n(m["without_kills"], 2, " MB a minute")),
            (f"{who}: within lives of a minute", _n(m["within_lives"], 2, " MB a minute")),
            (f"{who}: from life to life at one age", _n(m["across_lives"], 2, " MB a minute")),
            (f"{who}: file descriptors, most and growth",
             f"{m['fds_highest']}, {_n(m['fds_growth'], 0)}"),
        ]  # fmt: skip
    table = [f"| {name} | {value} |" for name, value in rows]
    wrong = ["", *(f"- {one}" for one in [*f["wrong"], *reading["failures"]])]
    return [f"| on the model `{f['model']}` | |", "| --- | ---: |", *table, *wrong]


def _n(value: float | None, places: int, unit: str = "") -> str:
    return "too short to say" if value is None else f"{value:.{places}f}{unit}"
