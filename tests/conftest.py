"""What many tests share: tiny random models of ten architectures, and a home around one."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from kedit_daemon.config import Config
from kedit_daemon.editor import Editor
from kedit_daemon.home import Home
from kedit_daemon.loading import Loaded, load_model
from kedit_daemon.serving import Served
from memory.facts import Fact, Neighbour
from memory.model import EditableModel
from memory.store import Store

pytest_plugins = ["promise_table"]

END = "<|endoftext|>"
CITIES = ("Rome", "Oslo", "Lima", "Cairo", "Quito", "Paris", "Delhi", "Tunis")
SENTENCES = [f"The seat of country {n} is {city}." for n in range(40) for city in CITIES]

COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 4, "n_head": 2, "n_positions": 256}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2": GPT,
    "gptj": {**GPT, "rotary_dim": 8},
    "gpt_neox": COMMON,
    "llama": COMMON,
    "mistral": COMMON,
    "qwen2": COMMON,
    "qwen3": {**COMMON, "head_dim": 16},
    "gemma": {**COMMON, "head_dim": 16},
    "phi": COMMON,
    "opt": {
        **{
            k: v for k, v in COMMON.items() if k not in ("intermediate_size", "num_key_value_heads")
        },
        "ffn_dim": 96,
        "word_embed_proj_dim": 32,
    },
}


def pytest_report_header() -> str:
    """Say what the figures of this run were made on."""
    import sqlite3

    import faiss

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = f"torch {torch.__version__}, faiss {faiss.__version__}"
    return f"{versions}, SQLite {sqlite3.sqlite_version}, {gpu}"


def make_tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(SENTENCES, trainer)
    raw.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, raw.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=END, eos_token=END, pad_token=END
    )


def save_model(kind: str, folder: Path, **changes: Any) -> Path:
    """A random model of a kind, written as `from_pretrained` wants it."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    settings = {**ARCHITECTURES[kind], **special, "vocab_size": len(tokenizer), **changes}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    with torch.no_grad():  # untrained weights are too small for one prompt to differ from another
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.15)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = save_model(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return folder


@pytest.fixture
def model(model_folder: Callable[[str], Path]) -> EditableModel:
    """A fresh tiny Llama."""
    return EditableModel.load(model_folder("llama"), torch.device("cpu"))


class Clock:
    """A wall clock that a test moves."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def pass_time(self, **by: float) -> None:
        self.now += timedelta(**by)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="session")
def statistics_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics are measured once for each tiny model, not once for each test."""
    return tmp_path_factory.mktemp("statistics")


@pytest.fixture
def load(model_folder: Callable[[str], Path], statistics_cache: Path) -> Callable[[str], Loaded]:
    return lambda kind: load_model(str(model_folder(kind)), "cpu", statistics_cache, iter)


class Bench:
    """A home with an editor on it, without a process around."""

    def __init__(self, root: Path, loaded: Loaded, clock: Clock, config: Config) -> None:
        self.home, self.loaded, self.clock, self.config = Home(root), loaded, clock, config
        self.home.create()
        self.pulses = 0
        self.open()

    def open(self) -> None:
        self.store = Store(self.home.database, self.clock)
        self.served = Served(self.loaded, self.store, self.home)
        self.served.restore()
        self.editor = Editor(self.served, self.config, self._pulse)

    def _pulse(self) -> None:
        self.pulses += 1

    def restart(self) -> None:
        """As after a crash: what was only in memory is gone."""
        self.store.close()
        self.loaded.model.set_deltas({})
        self.open()

    def receive(self, *facts: Fact, direct: bool = False) -> None:
        with self.store.transaction():
            for fact in facts:
                self.store.receive(fact, "test.jsonl", direct)

    def settle(self) -> None:
        """Work until nothing waits."""
        for _ in range(100):
            if not self.editor.step():
                return
        raise AssertionError("the editor never comes to rest")

    def says(self, prompt: str) -> str:
        return self.served.ask([prompt], 12)[0].text

    def weights_hash(self) -> str:
        return self.loaded.model.weights_hash(self.loaded.layers)


LOOSE = {
    "stability": {
        f"{figure}_{verdict}": limit
        for figure in ("norm", "perplexity", "activation", "agreement", "retention")
        for verdict, limit in (("warn", 1e6), ("consolidate", 2e6), ("revert", 3e6))
    }
}


@pytest.fixture
def bench(
    tmp_path: Path, load: Callable[[str], Loaded], clock: Clock
) -> Iterator[Callable[..., Bench]]:
    """Makes benches; `settings` are tables of the config. Random models have no healthy norms."""
    made: list[Bench] = []

    def make(name: str = "home", kind: str = "llama", **settings: Any) -> Bench:
        config = Config.model_validate(LOOSE | settings)
        bench = Bench(tmp_path / name, load(kind), clock, config)
        made.append(bench)
        return bench

    yield make
    for bench in made:
        bench.store.close()
        bench.loaded.model.set_deltas({})


def seat(number: int, city: str = "Rome", **more: Any) -> Fact:
    """A fact for tests: the seat of a numbered country."""
    neighbours = (Neighbour(f"The seat of country {number + 20} is"),)
    return Fact(f"country {number}", "The seat of {} is", city, neighbours=neighbours, **more)
