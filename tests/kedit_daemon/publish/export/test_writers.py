"""Each kind of export, loaded by what it is made for, says what the daemon says."""

import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from editing_home import Bench, Clock
from export_tools import FACTS, filled, loaded, logits, served, still, written
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_gguf import write_gguf
from tiny_models import save_model
from transformers import AutoTokenizer

from kedit_daemon.home import Home
from kedit_daemon.publish.export import writers
from memory.db.store import Store
from memory.errors import KeditError
from memory.files import hash_file

Edited = Callable[[str], Bench]


@pytest.fixture(scope="module")
def edited(
    model_folder: Callable[[str], Path],
    statistics_cache: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Edited]:
    """Homes that no test may change."""
    made: dict[str, Bench] = {}

    def home(kind: str) -> Bench:
        if kind not in made:
            root = tmp_path_factory.mktemp(kind) / "home"
            made[kind] = filled(root, model_folder(kind), statistics_cache)
        return made[kind]

    yield home
    for bench in made.values():
        bench.store.close()


@pytest.fixture(params=["llama", "gpt2"])
def at(edited: Edited, request: pytest.FixtureRequest) -> Bench:
    return edited(request.param)


@pytest.fixture
def own(edited: Edited, tmp_path: Path) -> Iterator[Callable[..., Home]]:
    """Copies of such a home, each changed by one function of its store."""

    def copy(change: Callable[[Store], None], kind: str = "llama") -> Home:
        home = Home(tmp_path / "own")
        with closing(sqlite3.connect(edited(kind).home.database_file)) as conn:
            shutil.copytree(edited(kind).home.root, home.root)
            home.database_file.unlink()
            conn.execute("VACUUM INTO ?", (str(home.database_file),))
        store = Store(home.database_file, Clock())
        with store.db.transaction():
            change(store)
        store.close()
        return home

    yield copy


def test_merged_answers_as_the_weights_do(at: Bench, tmp_path: Path) -> None:
    found = written(at.home, "merged", tmp_path / "merged")
    assert found.notes == ()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    merged = logits(loaded(tmp_path / "merged"), tokenizer)
    assert (merged - served(at)).abs().max() <= 1e-5
    with at.loaded.model.at_base():
        assert (merged - served(at)).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's
def test_lora_answers_as_the_weights_do(at: Bench, tmp_path: Path) -> None:
    written(at.home, "lora", tmp_path / "lora")
    settings = json.loads((tmp_path / "lora/adapter_config.json").read_bytes())
    base = settings["base_model_name_or_path"]
    adapted = PeftModel.from_pretrained(loaded(base), str(tmp_path / "lora"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert (logits(adapted, tokenizer) - served(at)).abs().max() <= 1e-4


def test_a_gguf_file_is_exported_as_the_model_it_was_converted_to(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    file = write_gguf(model_folder("llama"), tmp_path / "tiny.gguf")
    (tmp_path / "cache").mkdir()
    at = filled(tmp_path / "home", file, tmp_path / "cache")
    with closing(at.store):
        written(at.home, "merged", tmp_path / "merged")
        written(at.home, "lora", tmp_path / "lora")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
        merged = logits(loaded(tmp_path / "merged"), tokenizer)
        assert (merged - served(at)).abs().max() <= 1e-5
    settings = json.loads((tmp_path / "lora/adapter_config.json").read_bytes())
    base = Path(settings["base_model_name_or_path"])
    assert base == at.home.models_folder / hash_file(file)
    assert (base / "model.safetensors").is_file()


def test_delta_over_the_base_is_merged(at: Bench, tmp_path: Path) -> None:
    for kind in ("merged", "delta"):
        written(at.home, kind, tmp_path / kind)
    merged = load_file(tmp_path / "merged/model.safetensors")
    base = load_file(Path(at.loaded.name) / "model.safetensors")
    delta = load_file(tmp_path / "delta/model.safetensors")
    assert len(delta) == len(at.loaded.layers)
    assert not any(torch.equal(base[name], delta[name]) for name in delta)
    over = base | delta
    assert over.keys() == merged.keys()
    assert all(torch.equal(over[name], merged[name]) for name in merged)
    assert {p.name for p in (tmp_path / "delta").iterdir()} == {"config.json", "model.safetensors"}


def test_a_delta_without_facts_brings_a_server_back_to_the_base(
    own: Callable[..., Home], edited: Edited, tmp_path: Path
) -> None:
    at = edited("llama")
    with at.loaded.model.at_base():
        base_hash = at.weights_hash()

    def empty(store: Store) -> None:
        store.artifacts.activate_generation(
            store.artifacts.add_generation(None, base_hash, 1, "all reverted", [], {})
        )

    home = own(empty)
    written(home, "delta", tmp_path / "delta")
    base = load_file(Path(at.loaded.name) / "model.safetensors")
    delta = load_file(tmp_path / "delta/model.safetensors")
    assert len(delta) == len(at.loaded.layers)
    assert all(torch.equal(base[name], delta[name]) for name in delta)
    with pytest.raises(KeditError, match="no fact is in the weights"):
        written(home, "lora", tmp_path / "lora")


def test_of_a_model_of_16_bits_only_what_is_edited_is_wider_and_the_loss_is_told(
    tmp_path: Path, statistics_cache: Path
) -> None:
    folder = save_model("llama", tmp_path / "narrow")
    loaded(folder).to(torch.bfloat16).save_pretrained(folder)
    at = filled(tmp_path / "home", folder, statistics_cache, FACTS[:1])
    found = written(at.home, "merged", tmp_path / "merged")
    before = load_file(folder / "model.safetensors")
    tensors = load_file(tmp_path / "merged/model.safetensors")
    edited = dict(zip(found.manifest_entries["rounding"], at.loaded.layers, strict=True))
    assert {n: t.dtype for n, t in tensors.items() if n in edited} == dict.fromkeys(
        edited, torch.float32
    )
    assert all(torch.equal(tensors[n], t) for n, t in before.items() if n not in edited)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (logits(loaded(tmp_path / "merged"), tokenizer) - served(at)).abs().max() <= 1e-5
    for name, lost in found.manifest_entries["rounding"].items():
        off = (tensors[name].bfloat16().float() - tensors[name]).norm()
        delta = at.served.active_deltas[edited[name]].norm()
        assert lost == pytest.approx(float(off / delta), rel=1e-3)
        assert 0 < lost < 0.1
    assert "loaded as bfloat16" in found.notes[0]
    with at.store.db.transaction():
        first = still(at, at.home, at.store)
    found = written(at.home, "delta", tmp_path / "still")
    assert first not in {edited[name] for name in found.manifest_entries["rounding"]}
    assert len(found.manifest_entries["rounding"]) == len(edited) - 1
    at.store.close()


def of_model(folder: Path) -> Callable[[Store], None]:
    return lambda store: store.db.set_meta("model", str(folder))


def test_a_model_in_parts_stays_in_parts(
    own: Callable[..., Home], edited: Edited, tmp_path: Path
) -> None:
    at, parts = edited("llama"), tmp_path / "parts"
    loaded(at.loaded.name).save_pretrained(parts, max_shard_size="100KB")
    AutoTokenizer.from_pretrained(at.loaded.name).save_pretrained(parts)
    assert len(list(parts.glob("*.safetensors"))) > 2
    written(own(of_model(parts)), "merged", tmp_path / "merged")
    assert (tmp_path / "merged/model.safetensors.index.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert (logits(loaded(tmp_path / "merged"), tokenizer) - served(at)).abs().max() <= 1e-5


def test_a_checkpoint_that_leaves_out_the_bodys_name(
    own: Callable[..., Home], edited: Edited, tmp_path: Path
) -> None:
    at, short = edited("gpt2"), tmp_path / "short"
    shutil.copytree(at.loaded.name, short)
    tensors = load_file(short / "model.safetensors")
    named = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    save_file(named, short / "model.safetensors", metadata={"format": "pt"})
    written(own(of_model(short), "gpt2"), "delta", tmp_path / "delta")
    names = load_file(tmp_path / "delta/model.safetensors").keys()
    assert names == {f"h.{n}.mlp.c_proj.weight" for n in at.loaded.layers}


def test_another_model_in_the_place_is_refused(
    own: Callable[..., Home], edited: Edited, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(edited("llama").loaded.name, other)
    tensors = load_file(other / "model.safetensors")
    changed = {n: t + 0.01 if "down_proj" in n else t for n, t in tensors.items()}
    save_file(changed, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(KeditError, match="not the model that this home was made for"):
        written(own(of_model(other)), "merged", tmp_path / "merged")


def test_a_model_that_is_gone_is_told(own: Callable[..., Home], tmp_path: Path) -> None:
    home = own(of_model(tmp_path / "gone"))
    with pytest.raises(KeditError, match="there is no "):
        written(home, "merged", tmp_path / "merged")


def test_weights_that_are_not_the_ledgers_are_refused(
    own: Callable[..., Home], tmp_path: Path
) -> None:
    def forge(store: Store) -> None:
        row = store.artifacts.get_generation(store.artifacts.active_generation())
        facts = row.fact_ids
        store.artifacts.activate_generation(
            store.artifacts.add_generation(row.sha256, "0" * 64, row.id, "odd", facts, {})
        )

    home = own(forge)
    with pytest.raises(KeditError, match="not those of the ledger"):
        written(home, "merged", tmp_path / "merged")
    for path in home.generations_folder.iterdir():
        path.unlink()
    with pytest.raises(KeditError, match="is missing"):
        written(home, "delta", tmp_path / "delta")


def test_terms_that_give_other_weights_are_refused(
    own: Callable[..., Home], tmp_path: Path
) -> None:
    home = own(
        lambda store: store.artifacts.put_terms(
            FACTS[0].id, store.artifacts.read_terms(FACTS[1].id)
        )
    )
    with pytest.raises(KeditError, match="other weights than generation 1") as caught:
        written(home, "lora", tmp_path / "lora")
    assert "consolidate" in caught.value.hint
    written(home, "merged", tmp_path / "merged")


def test_a_layer_that_bears_nothing_is_no_damage(
    own: Callable[..., Home], edited: Edited, tmp_path: Path
) -> None:
    place = Home(tmp_path / "own")
    home = own(lambda store: still(edited("llama"), place, store) and None)
    written(home, "lora", tmp_path / "lora")
    tensors = load_file(tmp_path / "lora/adapter_model.safetensors")
    assert all(t.isfinite().all() for t in tensors.values())


def test_a_rank_that_no_server_takes_is_refused(
    at: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = written(at.home, "lora", tmp_path / "lora").manifest_entries["rank"]
    tensors = load_file(tmp_path / "lora/adapter_model.safetensors")
    assert {min(t.shape) for t in tensors.values()} == {rank}  # the same in all matrices
    monkeypatch.setattr(writers, "MAX_RANK", rank - 1)
    with pytest.raises(KeditError, match=f"rank {rank}") as caught:
        written(at.home, "lora", tmp_path / "other")
    assert "export merged or delta" in caught.value.hint
