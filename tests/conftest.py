"""Fixtures that many tests share: tiny models, a clock, homes with an editor on them."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from editing_home import LOOSE, OUTSIDE_LINES, Bench, Clock
from tiny_models import save_model
from tiny_vision_models import VISION_KINDS, save_vision_model

from kedit_daemon.config import Config
from kedit_daemon.editing.model_loading import (
    CanaryTexts,
    LoadedModel,
    load_model,
    read_canary_texts,
)
from memory.model.editable import EditableModel

pytest_plugins = ["promise_table"]


def pytest_configure() -> None:
    """Take SIGINT as usual: a shell's background jobs ignore it, and so would all children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header() -> str:
    """Say what the figures of this run were made on."""
    import sqlite3

    import faiss

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = f"torch {torch.__version__}, faiss {faiss.__version__}"
    return f"{versions}, SQLite {sqlite3.sqlite_version}, {gpu}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run first what takes long, so that at the end no worker waits for another."""
    long = ("test_docs.py", "promises/")
    items.sort(key=lambda item: not any(part in item.nodeid for part in long))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            save = save_vision_model if kind in VISION_KINDS else save_model
            made[kind] = save(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return folder


@pytest.fixture
def model(model_folder: Callable[[str], Path]) -> EditableModel:
    """A fresh tiny Llama."""
    return EditableModel.load(model_folder("llama"), torch.device("cpu"))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="session")
def statistics_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics are measured once for each tiny model, not once for each test."""
    return tmp_path_factory.mktemp("statistics")


@pytest.fixture
def load(
    model_folder: Callable[[str], Path], statistics_cache: Path
) -> Callable[[str], LoadedModel]:
    texts = read_canary_texts()
    few = CanaryTexts(texts.lines[:6], texts.statements[:24])
    return lambda kind: load_model(str(model_folder(kind)), "cpu", statistics_cache, iter, few)


@pytest.fixture
def bench(
    tmp_path: Path, load: Callable[[str], LoadedModel], clock: Clock
) -> Iterator[Callable[..., Bench]]:
    """Makes benches; `settings` are tables of the config. Random models have no healthy norms."""
    made: list[Bench] = []

    def make(
        name: str = "home",
        kind: str = "llama",
        outside_lines: int = OUTSIDE_LINES,
        **settings: Any,
    ) -> Bench:
        config = Config.model_validate(LOOSE | settings)
        bench = Bench(tmp_path / name, load(kind), clock, config, outside_lines)
        made.append(bench)
        return bench

    yield make
    for bench in made:
        bench.store.close()
        bench.loaded.model.set_deltas({})
