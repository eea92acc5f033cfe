"""Catalog of the studies. Each is imported on use, so that the command line can list them fast."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kedit_daemon.bench.studies.study import Study

STUDIES = {
    "exactness": "exactness:ExactnessStudy",
    "churn": "churn:ChurnStudy",
    "presets": "presets:PresetStudy",
    "capacity": "capacity:CapacityStudy",
    "asking": "asking:AskingStudy",
    "routing": "routing_accuracy:RoutingStudy",
    "index": "index_scaling:IndexStudy",
    "cost": "cost:CostStudy",
    "norms": "norms:NormGrowthStudy",
    "poison": "poison:PoisonStudy",
    "hypernetworks": "hypernetworks:HypernetworkStudy",
    "pictures": "pictures:PictureStudy",
}

DEFAULT_LIMITS = {
    "asking": 50,
    "churn": 200,
    "index": 1000,
    "cost": 1000,
    "norms": 120,
    "poison": 130,
    "hypernetworks": 500,
    "pictures": 200,
}
"""Number of records without --limit, for a study that does not need the whole stream."""

METHOD_STUDIES = ("asking", "pictures")
"""Studies of several methods, which may be asked for one alone."""


def import_study(name: str) -> "Study":
    """Import and create the study behind a name of STUDIES."""
    module, attribute = STUDIES[name].split(":")
    study: Study = getattr(import_module(f"kedit_daemon.bench.studies.{module}"), attribute)()
    return study
