"""Scaling of the retrieval index: the facts' real keys among more and more synthetic ones."""

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from memory.side.index import KeyIndex, SearchHit  # before faiss: it imports what must come first

import faiss  # isort: skip

from kedit_daemon.bench.dataset import BenchRecord
from kedit_daemon.bench.plot import to_percent
from kedit_daemon.bench.studies.shared import make_no_facts_error, sample_evenly
from kedit_daemon.bench.studies.study import Study, StudyInput
from kedit_daemon.bench.table import align_rows, format_share
from memory.side.side_memory import VECTORS_PER_TOKEN
from policies.prompts import TokenRow, find_subject_end, make_rows, pad_rows

T = TypeVar("T")
MAX_QUERIES = 500
COMPARED_QUERIES = 20  # queries that are also timed against every key
REPLACED_FACTS = 50  # facts that are removed and added again, to time it
CHUNK_ROWS = 64  # prompts read at once
MIN_SPREAD, MAX_SPREAD = 0.3, 1.0  # distance of synthetic from real facts, in spreads of those
TIE_TOLERANCE = 1e-6  # keys whose cosines differ by less are equally near


@dataclass(frozen=True)
class IndexStudy(Study):
    """Speed, recall, size and restart of the index, on one thread of the CPU."""

    sizes: Sequence[int] = (10_000, 100_000, 1_000_000)  # keys in the index

    def run(self, given: StudyInput) -> dict[str, Any]:
        """Measure a row for each size."""
        with torch.no_grad():
            real = _read_fact_keys(given)
            asked, queries = _read_queries(given)
        facts, per, width = real.shape
        if facts < 2 or not len(queries):
            why = "the stream has no two facts and a paraphrase that names a subject"
            raise make_no_facts_error(why)
        generator = torch.Generator().manual_seed(given.seed)
        sizes = sorted({max(size // per, facts) for size in self.sizes})
        keys = torch.cat([real, synthesize_keys(real, sizes[-1] - facts, generator)])
        with use_one_faiss_thread():
            rows = [_measure_index(keys[:size], queries) for size in given.track(sizes, "sizes")]
        own = (real[asked] @ queries[:, :, None]).squeeze(2).amax(1)
        quantiles = own.quantile(torch.tensor([0.05, 0.5])).tolist()
        return {
            "width": width,
            "keys_of_a_fact": per,
            "queries": len(queries),
            "own_cosine": dict(zip(("p5", "median"), quantiles, strict=True)),
            "rows": rows,
        }

    def format_lines(self, result: Mapping[str, Any]) -> Iterator[str]:
        heads = ["keys", "lists", "p50, ms", "p95, ms", "all keys, ms", "recall@1"]
        heads += [f"recall@{VECTORS_PER_TOKEN}", "build, s", "replace, ms", "file, MB", "held, MB"]
        rows = [[*heads, "save, s", "load, s"]]
        for row in result["rows"]:
            build, save, load = (f"{seconds:.2f}" for seconds in row["seconds"].values())
            cells = [str(row["keys"]), str(row["lists"] or "-")]
            cells += [f"{row['search_ms'][name]:.3f}" for name in ("p50", "p95", "all_keys")]
            cells += [format_share(row["recall_1"]), format_share(row["recall_more"]), build]
            sizes = ["-" if n is None else f"{n / 1e6:.1f}" for n in (row["bytes"], row["growth"])]
            rows.append([*cells, f"{row['replace_ms']:.3f}", *sizes, save, load])
        yield from align_rows(rows)
        yield ""
        own = result["own_cosine"]
        yield (
            f"{result['queries']} paraphrases of real facts, cosine with the own key p5"
            f" {own['p5']:.2f}, median {own['median']:.2f}; width {result['width']},"
            f" {result['keys_of_a_fact']} keys a fact; one thread, no GPU"
        )

    def draw_curves(self, result: Mapping[str, Any], left: Any, right: Any) -> None:
        rows = result["rows"]
        across = [row["keys"] for row in rows]
        for name in ("p50", "p95", "all_keys"):
            times = [row["search_ms"][name] for row in rows]
            left.plot(across, times, marker="o", label=name.replace("_", " "))
        for name, count in (("recall_1", 1), ("recall_more", VECTORS_PER_TOKEN)):
            shares = [to_percent(row[name]) for row in rows]
            right.plot(across, shares, marker="o", label=f"recall@{count}")
        left.set(ylabel="ms for one query", yscale="log", title="Search")
        right.set(ylabel="%", ylim=(90, 100.5), title="Recall against all keys")
        for axes in (left, right):
            axes.set(xlabel="keys", xscale="log")


def synthesize_keys(real: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Synthesize keys (count, per, width) of facts, each around a real one of (n, per, width).

    All keys of a fact are shifted by the same noise, which has the real facts' covariance.
    """
    middle = normalize(real.mean(1), dim=-1)
    width = real.shape[-1]
    root = torch.linalg.cholesky(torch.cov(middle.T) + 1e-6 * torch.eye(width))
    keys = real[torch.randint(len(real), (count,), generator=generator)]
    spread = MIN_SPREAD + (MAX_SPREAD - MIN_SPREAD) * torch.rand(count, 1, generator=generator)
    noise = spread * (torch.randn(count, width, generator=generator) @ root.T)
    return normalize(keys.add_(noise[:, None]), dim=-1)


@contextmanager
def use_one_faiss_thread() -> Iterator[None]:
    """Run FAISS on one thread within the block."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)


def _read_fact_keys(given: StudyInput) -> Tensor:
    """Read the facts' retrieval keys (facts, per, width), as in the side memory."""
    rows = [row for r in given.records for row in make_rows(given.loaded_model.model, r.fact)]
    prompts = [TokenRow(row.prompt, row.prompt_length, row.subject_index) for row in rows]
    keys = _read_keys(given, prompts)
    return keys.view(len(given.records), -1, keys.shape[-1])


def _read_queries(given: StudyInput) -> tuple[list[int], Tensor]:
    """Read keys (n, width) of facts at a prompt other than their own, with the facts' indices."""
    pairs = [(n, row) for n, r in enumerate(given.records) if (row := _find_paraphrase(given, r))]
    pairs = sample_evenly(pairs, MAX_QUERIES)
    return [n for n, _ in pairs], _read_keys(given, [row for _, row in pairs])


def _find_paraphrase(given: StudyInput, record: BenchRecord) -> TokenRow | None:
    model = given.loaded_model.model
    for text in record.paraphrases:
        end = find_subject_end(model, text, record.fact.subject)
        if end is not None:
            ids = tuple(model.encode(text))
            return TokenRow(ids, len(ids), min(end, len(ids) - 1))
    return None


def _read_keys(given: StudyInput, rows: Sequence[TokenRow]) -> Tensor:
    """Read retrieval keys (rows, width) where the rows' subjects end."""
    loaded, model = given.loaded_model, given.loaded_model.model
    layer, caught = loaded.site.key_layer, [torch.empty(0, model.hidden_size)]

    def catch_keys(_inputs: Tensor, outputs: Tensor) -> None:
        row_numbers = torch.arange(len(batch.subject_index), device=outputs.device)
        caught.append(outputs[row_numbers, batch.subject_index].float().cpu())

    for start in given.track(range(0, len(rows), CHUNK_ROWS), "keys"):
        chunk = list(rows[start : start + CHUNK_ROWS])
        width = max(len(row.ids) for row in chunk)
        batch = pad_rows(chunk, width, model.end_token or 0, model.device)
        with model.tap_layers({layer: catch_keys}):
            model.hf_model(input_ids=batch.ids, use_cache=False)
    return normalize(torch.cat(caught) - loaded.statistics[layer].output_mean.cpu(), dim=-1)


def _measure_index(keys: Tensor, queries: Tensor) -> dict[str, Any]:
    """Measure an index of keys (facts, per, width) by queries (n, width)."""
    facts, per, width = keys.shape
    keys_by_fact = dict(enumerate(keys))
    before = _read_resident_bytes()
    index = KeyIndex(width)
    build = _time_call(lambda: index.sync_keys(keys_by_fact))
    growth = None if before is None else (_read_resident_bytes() or 0) - before
    hits = list[list[SearchHit]]()
    seconds = _time_each(
        lambda query: hits.extend(index.search(query[None], VECTORS_PER_TOKEN)), queries
    )
    first, more = compute_recall(keys.view(-1, width), per, queries, hits)
    size, save, load = _measure_file(index)
    p50, p95 = torch.tensor(seconds).quantile(torch.tensor([0.5, 0.95])).tolist()
    all_keys = 1e3 * _time_full_search(keys, queries)
    return {
        "keys": facts * per,
        "lists": index.list_count,
        "search_ms": {"p50": 1e3 * p50, "p95": 1e3 * p95, "all_keys": all_keys},
        "recall_1": first,
        "recall_more": more,
        "replace_ms": 1e3 * _time_replacement(index, keys_by_fact),
        "bytes": size,
        "growth": growth,
        "seconds": {"build": build, "save": save, "load": load},
    }


def compute_recall(
    keys: Tensor, per: int, queries: Tensor, found: Sequence[Sequence[SearchHit]]
) -> tuple[float, float]:
    """Compute recall against all keys (n, width), of which each fact has `per`.

    Returns the share of queries whose first hit is a nearest fact, and the mean share of the facts
    among the nearest keys that were hit.
    """
    metric = faiss.METRIC_INNER_PRODUCT
    nearest, places = faiss.knn(queries.numpy(), keys.numpy(), VECTORS_PER_TOKEN, metric=metric)
    first, more = list[float](), list[float]()
    for query, best, exact, hits in zip(queries, nearest, places // per, found, strict=True):
        own = hits[0].fact_number * per
        cosine = float((keys[own : own + per] @ query).max())
        first.append(cosine >= best[0] - TIE_TOLERANCE)
        facts = set(exact.tolist())
        more.append(len(facts & {hit.fact_number for hit in hits}) / len(facts))
    return fmean(first), fmean(more)


def _time_full_search(keys: Tensor, queries: Tensor) -> float:
    """Time one query against every key: median seconds."""
    base, metric = keys.view(-1, keys.shape[-1]).numpy(), faiss.METRIC_INNER_PRODUCT
    seconds = _time_each(
        lambda query: faiss.knn(query[None].numpy(), base, VECTORS_PER_TOKEN, metric=metric),
        queries[:COMPARED_QUERIES],
    )
    return float(torch.tensor(seconds).median())


def _time_replacement(index: KeyIndex, keys_by_fact: Mapping[int, Tensor]) -> float:
    """Time removing and adding a fact: median seconds."""
    facts = sample_evenly(list(keys_by_fact), REPLACED_FACTS)
    seconds = _time_each(lambda n: index.add(n, keys_by_fact[n]), facts)
    return float(torch.tensor(seconds).median())


def _measure_file(index: KeyIndex) -> tuple[int, float, float]:
    """Return the bytes of the index file, and the seconds to write and to read it."""
    with tempfile.TemporaryDirectory(prefix="kedit-bench-") as name:
        folder, shas = Path(name), list[str]()
        save = _time_call(lambda: shas.append(index.save(folder)))
        size = sum(path.stat().st_size for path in folder.iterdir())
        return size, save, _time_call(lambda: KeyIndex.load(folder, shas[0]))


def _time_call(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _time_each(work: Callable[[T], object], items: Iterable[T]) -> list[float]:
    """Return the seconds of the work on each item."""
    return [_time_call(partial(work, item)) for item in items]


def _read_resident_bytes() -> int | None:
    """Return the resident memory of the process in bytes; None if the system does not tell."""
    path = Path("/proc/self/status")
    lines = path.read_text(encoding="ascii").splitlines() if path.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line[:6] == "VmRSS:"), None)
