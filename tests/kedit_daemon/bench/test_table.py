from typing import Any

from kedit_daemon.bench.table import align_rows, format_result


def test_the_table_shows_per_cent_and_a_dash_for_what_was_not_asked() -> None:
    share = {"prob": None, "tokens": 0.987, "strict": 0.5, "generation": 0.0}
    run = {
        **{column: share for column in ("reliability", "generality", "locality")},
        "retention": [{"first": 0, "facts": 100, "strict": 0.25, "generation": 0.75}],
        "perplexity": {"before": 6.0, "after": 6.5},
        "norm_ratio": {"layer.1.down_proj": 1.25},
        "seconds_per_fact": {"median": 1.0, "p95": 2.0, "parts": {"solve": 0.5}},
        "peak_memory_bytes": 2**30,
        "bytes_per_fact": 10.0,
        "model": "a\x1b[2Jmodel",
        "seed": 0,
        "commit": "abc",
        "device": "cpu",
        "method": "ft",
        "batch_size": 10,
        "facts": 100,
        "skipped": 2,
        "not_edited": 7,
    }
    lines = list(format_result(run | {"baseline": run | {"method": "none"}}))
    assert lines[1].split() == ["ft", "reliability", "-", "98.7", "50.0", "0.0"]
    assert lines[4].split()[0] == "none"
    text = "\n".join(lines)
    assert "0-99: 25.0 / 75.0" in text and "not edited        7, records skipped 2" in text
    assert "1024 MiB" in text and "\x1b" not in text


def test_a_sweep_is_a_line_for_each_size_and_the_choice() -> None:
    def row(size: int, seconds: float) -> dict[str, Any]:
        share = {"prob": None, "tokens": 0.9, "strict": 0.5, "generation": 0.25}
        return {
            **{column: share for column in ("reliability", "generality", "locality")},
            "locality": share | {"strict": None},
            "perplexity": {"before": 6.0, "after": 6.5},
            "norm_ratio": {"layer.1.down_proj": 1.25, "layer.2.down_proj": 1.5},
            "seconds_per_fact": {"median": 1.0, "mean": seconds, "p95": 2.0, "parts": {}},
            "model": "a\x1b[2Jmodel",
            "seed": 0,
            "batch_size": size,
        }

    curve = {"per_fact": 0.5, "per_batch": 1.5}
    sweep = {"sweep": [row(1, 2.0), row(5, 0.8)], "curve": curve, "chosen": 5}
    lines = list(format_result(sweep | {"method": "memit-mass", "facts": 7}))
    assert "7 facts" in lines[0] and "\x1b" not in lines[0]
    shares = ["50.0", "25.0", "50.0", "25.0", "-", "25.0"]
    assert lines[2].split() == ["1", "1.000", "2.000", *shares, "6.500", "1.5000"]
    assert lines[3].split()[:3] == ["5", "1.000", "0.800"]
    assert len({len(line) for line in lines[1:4]}) == 1
    assert lines[-2].endswith("0.500 + 1.500 / batch size") and lines[-1].endswith("of 5")


def test_rows_are_aligned_on_their_widest_cells() -> None:
    assert list(align_rows([["name", "n"], ["a", "100"]])) == ["name    n", "a     100"]
