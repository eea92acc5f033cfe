"""Catalog of the methods. Each is imported on use, so that the command line can list them fast."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kedit_daemon.bench.methods.method import Method

METHODS = {
    "none": "baselines:Unedited",
    "memit-mass": "daemon_tiers:MemitMass",
    "wise": "daemon_tiers:Wise",
    "auto": "daemon_tiers:Auto",
    "in-context": "baselines:InContext",
    "ft": "baselines:FineTuning",
    "lora": "baselines:Lora",
    "memit": "published_methods:Memit",
    "encore": "published_methods:Encore",
    "alphaedit": "published_methods:AlphaEdit",
    "emmet": "published_methods:Emmet",
    "reference": "reference_memit:ReferenceMemit",
    "reference-wise": "reference_wise:ReferenceWise",
}


def import_method(name: str) -> "type[Method]":
    """Import the class behind a name of METHODS."""
    module, attribute = METHODS[name].split(":")
    method: type[Method] = getattr(import_module(f"kedit_daemon.bench.methods.{module}"), attribute)
    return method
