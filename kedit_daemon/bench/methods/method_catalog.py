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
    "ft": "fine_tuning:FineTuning",
    "ft-l2": "fine_tuning:AnchoredTuning",
    "ft-distil": "fine_tuning:DistilledTuning",
    "ft-replay": "fine_tuning:ReplayedTuning",
    "ft-wide": "fine_tuning:WideTuning",
    "pretrain": "fine_tuning:Pretraining",
    "lora": "fine_tuning:Lora",
    "memit": "published_methods:Memit",
    "encore": "published_methods:Encore",
    "alphaedit": "published_methods:AlphaEdit",
    "emmet": "published_methods:Emmet",
    "reference": "reference_memit:ReferenceMemit",
    "reference-wise": "reference_wise:ReferenceWise",
    "rome": "rome:Rome",
    "r-rome": "rome:RevisedRome",
    "mend": "gradient_editors:Mend",
    "malmen": "gradient_editors:Malmen",
    "ultraedit": "gradient_editors:UltraEdit",
}


def import_method(name: str) -> "type[Method]":
    """Import the class behind a name of METHODS."""
    module, attribute = METHODS[name].split(":")
    method: type[Method] = getattr(import_module(f"kedit_daemon.bench.methods.{module}"), attribute)
    return method
