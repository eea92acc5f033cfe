"""The studies by name. They are imported when they are used: the command line only lists them."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kedit_daemon.bench.studies.study import Study

STUDIES = {
    "exactness": "exactness:ExactnessStudy",
    "churn": "churn:ChurnStudy",
    "presets": "preset_comparison:PresetStudy",
    "capacity": "capacity:CapacityStudy",
    "routing": "routing:RoutingStudy",
    "index": "index:IndexStudy",
    "cost": "cost:CostStudy",
    "norms": "norm_growth:NormGrowthStudy",
    "poison": "poison:PoisonStudy",
}

DEFAULT_LIMITS = {"churn": 200, "index": 1000, "cost": 1000, "norms": 120, "poison": 130}
"""Records without --limit, of a study that is not about the whole stream."""


def import_study(name: str) -> "Study":
    """The study of a name of STUDIES."""
    module, attribute = STUDIES[name].split(":")
    found: Study = getattr(import_module(f"kedit_daemon.bench.studies.{module}"), attribute)()
    return found
