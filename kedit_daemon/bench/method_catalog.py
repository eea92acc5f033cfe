"""The methods by name. They are imported when they are used: the command line only lists them."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kedit_daemon.bench.method import Method

METHODS = {
    "none": "simple_methods:Unedited",
    "memit-mass": "tiers:MemitMass",
    "wise": "tiers:Wise",
    "auto": "tiers:Auto",
    "in-context": "simple_methods:InContext",
    "ft": "simple_methods:FineTuning",
    "lora": "simple_methods:Lora",
    "memit": "published_methods:Memit",
    "encore": "published_methods:Encore",
    "alphaedit": "published_methods:AlphaEdit",
    "emmet": "published_methods:Emmet",
    "reference": "reference_memit:ReferenceMemit",
    "reference-wise": "reference_wise:ReferenceWise",
}


def import_method(name: str) -> "type[Method]":
    """The class behind a name of METHODS."""
    module, attribute = METHODS[name].split(":")
    found: type[Method] = getattr(import_module(f"kedit_daemon.bench.{module}"), attribute)
    return found
