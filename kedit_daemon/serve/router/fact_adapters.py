"""Adapters of live facts for the engines behind a router: each fact's shard as a LoRA of the side
layer, made when a prompt first asks for it.

A shard acts where its fact fires, and an adapter on every token of a request. That needs no other
training: a shard learns to be quiet on other text, and the prompt that asks for it is the rest.
"""

import hashlib
import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

import torch

from kedit_daemon.editing.known_measurements import find_site
from kedit_daemon.editing.tensor_files import load_shard
from kedit_daemon.home import Home
from kedit_daemon.publish.export.edited_checkpoint import find_base_folder
from kedit_daemon.publish.export.peft_adapter import AdapterFactors, write_adapter
from kedit_daemon.publish.export.source import read_source
from kedit_daemon.serve.router.routed_facts import RoutedFact
from kedit_daemon.serve.router.routed_request import ADAPTER_PREFIX
from memory.errors import KeditError
from memory.model.checkpoint import Checkpoint, WeightLocation

STAGED_PREFIX = ".kedit-adapter-"
KEPT_SECONDS = 7 * 86_400.0  # since an adapter was last asked for


class FactAdapters:
    """The folder of adapters, which engines read. A name tells the content, so that nothing that an
    engine keeps of an adapter is ever stale."""

    def __init__(self, folder: Path, shards_folder: Path, location: WeightLocation) -> None:
        """location: of the side layer's down projection."""
        self.folder, self._shards_folder, self._location = folder, shards_folder, location

    def make_adapter(self, fact: RoutedFact, base: str) -> str | None:
        """Return the name of a fact's adapter, which is in the folder then; None where there can be
        none: the fact is in the weights, or has not learned to be asked in a question. base: the
        model, as the engine has loaded it. Raises OSError and KeditError (code "corrupt")."""
        if fact.shard_sha is None:
            return None
        shard = load_shard(self._shards_folder, fact.shard_sha, 0.0, torch.device("cpu"))
        if fact.is_question and not shard.is_asked:
            return None
        content = "\n".join((base, self._location.module_name, fact.shard_sha))
        name = f"{ADAPTER_PREFIX}{hashlib.sha256(content.encode()).hexdigest()[:16]}"
        if (self.folder / name).is_dir():
            os.utime(self.folder / name)
            return name
        delta = shard.delta
        self._place_adapter(name, base, AdapterFactors(self._location, delta.up, delta.down))
        return name

    def prune(self, now: float) -> None:
        """Delete the adapters that nobody has asked for in a week, and what a crash has left then.
        now: in seconds since 1970."""
        for prefix in (ADAPTER_PREFIX, STAGED_PREFIX):
            for path in self.folder.glob(f"{prefix}*"):
                with suppress(FileNotFoundError):  # another router is at work here
                    if now - path.stat().st_mtime > KEPT_SECONDS:
                        shutil.rmtree(path, ignore_errors=True)

    def _place_adapter(self, name: str, base: str, factors: AdapterFactors) -> None:
        """Write an adapter, whole or not at all."""
        staged = self.folder / f"{STAGED_PREFIX}{secrets.token_hex(8)}"
        staged.mkdir(parents=True)
        try:
            write_adapter(staged, base, [factors])
            for path in staged.iterdir():
                path.chmod(0o644)  # safetensors lets only the owner read, and engines are others
            staged.chmod(0o755)
            staged.rename(self.folder / name)
        except OSError:
            if not (self.folder / name).is_dir():  # another router may have been quicker
                raise
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def open_adapters(home: Home, folder: Path, now: float) -> FactAdapters:
    """Open a folder of adapters for a home's facts. Raises KeditError: the home has no daemon yet,
    its model is not on this machine, or it is not one whose layers an adapter can name."""
    source = read_source(home)
    checkpoint = Checkpoint(find_base_folder(source))
    at = checkpoint.folder, home.state_folder, source.base_hash
    site = find_site(*at, checkpoint.layer_count, checkpoint.model_type)
    location = checkpoint.locations[site.side_layer]
    if location.transposed:
        raise KeditError(
            f"the layers of {source.model} are of a form that engines take no adapters for",
            code="bad-config",
            hint="leave `adapters` out: facts are then told as lines of context",
        )
    folder.mkdir(parents=True, exist_ok=True)
    adapters = FactAdapters(folder, home.side_folder, location)
    adapters.prune(now)
    return adapters
