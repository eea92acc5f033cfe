"""How the retrieval index bears many facts: the facts' real keys among more and more made up."""

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from memory.side.index import KeyIndex, SearchHit  # before faiss: it knows what must come first

import faiss  # isort: skip

from kedit_daemon.bench.dataset import BenchRecord
from kedit_daemon.bench.studies.shared import make_no_facts_error, sample_evenly, to_percent
from kedit_daemon.bench.studies.study import Study, StudyInput
from kedit_daemon.bench.table import align_rows, format_share
from kedit_daemon.editing.model_loading import LoadedModel
from memory.side.side_memory import VECTORS_PER_TOKEN
from policies.prompts import TokenRow, find_subject_end, make_rows, pad_rows

T = TypeVar("T")
INDEX_SIZES = (10_000, 100_000, 1_000_000)  # keys in the index
MAX_QUERIES = 500  # at most
COMPARED_QUERIES = 20  # queries that are also timed against every key
REPLACED_FACTS = 50  # facts that are taken out and put back, to time it
CHUNK_ROWS = 64  # prompts read at once
MIN_SPREAD, MAX_SPREAD = (
    0.3,
    1.0,
)  # how far a made-up fact lies from a real one, in spreads of the real ones
TIE_TOLERANCE = 1e-6  # keys whose cosines differ by less are equally near


class IndexStudy(Study):
    """Speed, recall, size and restart of the index, on one thread of the CPU."""

    def run(self, given: StudyInput) -> dict[str, Any]:
        """A row for each size."""
        with torch.no_grad():
            real = _read_fact_keys(given)
            asked, queries = _read_queries(given)
        facts, per, width = real.shape
        if facts < 2 or not len(queries):
            raise make_no_facts_error(
                "the stream has no two facts and a paraphrase that names a subject"
            )
        generator = torch.Generator().manual_seed(given.seed)
        sizes = sorted({max(size // per, facts) for size in INDEX_SIZES})
        keys = torch.cat([real, synthesize_keys(real, sizes[-1] - facts, generator)])
        with use_one_faiss_thread():
            rows = [_measure_index(keys[:many], queries) for many in given.track(sizes, "sizes")]
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
        """A row for each size, then what was asked."""
        heads = ["keys", "lists", "p50, ms", "p95, ms", "all keys, ms", "recall@1"]
        heads += [f"recall@{VECTORS_PER_TOKEN}", "build, s", "replace, ms", "file, MB", "held, MB"]
        rows = [[*heads, "save, s", "load, s"]]
        for row in result["rows"]:
            spent, seconds = row["search_ms"], row["seconds"]
            times = [f"{spent[name]:.3f}" for name in ("p50", "p95", "all_keys")]
            sizes = ["-" if n is None else f"{n / 1e6:.1f}" for n in (row["bytes"], row["growth"])]
            rows.append(
                [
                    *(str(row["keys"]), str(row["lists"] or "-"), *times),
                    *(format_share(row["recall_1"]), format_share(row["recall_more"])),
                    *(f"{seconds['build']:.2f}", f"{row['replace_ms']:.3f}", *sizes),
                    *(f"{seconds['save']:.2f}", f"{seconds['load']:.2f}"),
                ]
            )
        yield from align_rows(rows)
        yield ""
        own = result["own_cosine"]
        yield (
            f"{result['queries']} paraphrases of real facts, cosine with the own key p5"
            f" {own['p5']:.2f}, median {own['median']:.2f}; width {result['width']},"
            f" {result['keys_of_a_fact']} keys a fact; one thread, no GPU"
        )

    def draw_curves(self, result: Mapping[str, Any], left: Any, right: Any) -> None:
        """Search time, and recall, against keys."""
        rows = result["rows"]
        across = [row["keys"] for row in rows]
        for name in ("p50", "p95", "all_keys"):
            spent = [row["search_ms"][name] for row in rows]
            left.plot(across, spent, marker="o", label=name.replace("_", " "))
        for name, label in (
            ("recall_1", "recall@1"),
            ("recall_more", f"recall@{VECTORS_PER_TOKEN}"),
        ):
            right.plot(across, [to_percent(row[name]) for row in rows], marker="o", label=label)
        left.set(ylabel="ms for one query", yscale="log", title="Search")
        right.set(ylabel="%", ylim=(90, 100.5), title="Recall against all keys")
        for axes in (left, right):
            axes.set(xlabel="keys", xscale="log")


def synthesize_keys(real: Tensor, many: int, generator: torch.Generator) -> Tensor:
    """Keys (many, per, width) of facts that do not exist: each around one of the real ones (n,
    per, width), off by noise that is spread as they are, with that one's differences within."""
    middle = normalize(real.mean(1), dim=-1)
    width = real.shape[-1]
    root = torch.linalg.cholesky(torch.cov(middle.T) + 1e-6 * torch.eye(width))
    like = real[torch.randint(len(real), (many,), generator=generator)]
    far = MIN_SPREAD + (MAX_SPREAD - MIN_SPREAD) * torch.rand(many, 1, generator=generator)
    noise = far * (torch.randn(many, width, generator=generator) @ root.T)
    return normalize(like.add_(noise[:, None]), dim=-1)


@contextmanager
def use_one_faiss_thread() -> Iterator[None]:
    """FAISS works on one thread within the block."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)


def _read_fact_keys(given: StudyInput) -> Tensor:
    """The facts' retrieval keys (facts, per, width), as the side memory has them."""
    rows = [make_rows(given.loaded_model.model, record.fact) for record in given.records]
    flat = [
        TokenRow(row.prompt, row.prompt_length, row.subject_index)
        for of_one in rows
        for row in of_one
    ]
    found = _read_keys(given.loaded_model, flat, given)
    return found.view(len(rows), -1, found.shape[-1])


def _read_queries(given: StudyInput) -> tuple[list[int], Tensor]:
    """Keys (n, width) of facts read at a prompt they were not learned at, and whose they are."""
    pairs = [(n, row) for n, r in enumerate(given.records) if (row := _find_paraphrase(given, r))]
    pairs = sample_evenly(pairs, MAX_QUERIES)
    return [n for n, _ in pairs], _read_keys(given.loaded_model, [row for _, row in pairs], given)


def _find_paraphrase(given: StudyInput, record: BenchRecord) -> TokenRow | None:
    for text in record.paraphrases:
        at = find_subject_end(given.loaded_model.model, text, record.fact.subject)
        if at is not None:
            ids = tuple(given.loaded_model.model.encode(text))
            return TokenRow(ids, len(ids), min(at, len(ids) - 1))
    return None


def _read_keys(loaded: LoadedModel, rows: Sequence[TokenRow], given: StudyInput) -> Tensor:
    """Retrieval keys (rows, width) where the rows' subjects end."""
    model, layer = loaded.model, loaded.site.key_layer
    found = [torch.empty(0, model.hidden_size)]

    def catch_keys(_inputs: Tensor, outputs: Tensor) -> None:
        at = torch.arange(len(batch.subject_index), device=outputs.device)
        found.append(outputs[at, batch.subject_index].float().cpu())

    for start in given.track(range(0, len(rows), CHUNK_ROWS), "keys"):
        part = list(rows[start : start + CHUNK_ROWS])
        batch = pad_rows(
            part, max(len(row.ids) for row in part), model.end_token or 0, model.device
        )
        with model.tap_layers({layer: catch_keys}):
            model.hf_model(input_ids=batch.ids, use_cache=False)
    return normalize(torch.cat(found) - loaded.statistics[layer].output_mean.cpu(), dim=-1)


def _measure_index(keys: Tensor, queries: Tensor) -> dict[str, Any]:
    """The figures of an index of keys (facts, per, width), asked queries (n, width)."""
    facts, per, width = keys.shape
    wanted = dict(enumerate(keys))
    before = _read_resident_bytes()
    index = KeyIndex(width)
    build = _time_call(lambda: index.sync_keys(wanted))
    growth = None if before is None else (_read_resident_bytes() or 0) - before
    found = list[list[SearchHit]]()
    spent = _time_each(
        lambda query: found.extend(index.search(query[None], VECTORS_PER_TOKEN)), queries
    )
    first, more = compute_recall(keys.view(-1, width), per, queries, found)
    size, save, load = _measure_file(index)
    p50, p95 = torch.tensor(spent).quantile(torch.tensor([0.5, 0.95])).tolist()
    return {
        "keys": facts * per,
        "lists": index.list_count,
        "search_ms": {
            "p50": 1e3 * p50,
            "p95": 1e3 * p95,
            "all_keys": 1e3 * _time_full_search(keys, queries),
        },
        "recall_1": first,
        "recall_more": more,
        "replace_ms": 1e3 * _time_replacement(index, wanted),
        "bytes": size,
        "growth": growth,
        "seconds": {"build": build, "save": save, "load": load},
    }


def compute_recall(
    keys: Tensor, per: int, queries: Tensor, found: Sequence[Sequence[SearchHit]]
) -> tuple[float, float]:
    """Of all keys (n, width), `per` of them for each fact: the share of queries whose first hit is
    a fact as near as any, and the mean share of the facts among the nearest that were hit."""
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
    """Median seconds of one query against every key."""
    base, metric = keys.view(-1, keys.shape[-1]).numpy(), faiss.METRIC_INNER_PRODUCT
    spent = _time_each(
        lambda query: faiss.knn(query[None].numpy(), base, VECTORS_PER_TOKEN, metric=metric),
        queries[:COMPARED_QUERIES],
    )
    return float(torch.tensor(spent).median())


def _time_replacement(index: KeyIndex, wanted: Mapping[int, Tensor]) -> float:
    """Median seconds to take a fact out and to put it back."""
    spent = _time_each(
        lambda n: index.add(n, wanted[n]), sample_evenly(list(wanted), REPLACED_FACTS)
    )
    return float(torch.tensor(spent).median())


def _measure_file(index: KeyIndex) -> tuple[int, float, float]:
    """Bytes of the index file, and the seconds to write and to read it."""
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
    """Seconds of the work on each item."""
    return [_time_call(partial(work, item)) for item in items]


def _read_resident_bytes() -> int | None:
    """Bytes of memory that the process holds now; None where the system does not tell."""
    path = Path("/proc/self/status")
    lines = path.read_text(encoding="ascii").splitlines() if path.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line[:6] == "VmRSS:"), None)
