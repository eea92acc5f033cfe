"""Where and how strongly this model is edited: measured once per model, kept in its folder.

The published site (the subject's last token) is not a constant of nature: on small models it
cannot be optimised at all. So the site is data, with the evidence beside it (`kedit.json`).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from memory.errors import KeditError
from memory.side.side_memory import RoutingGates

SITE_FILE = "kedit.json"


@dataclass(frozen=True)
class EditSite:
    """Layers, tokens and strengths. Lengths are in units of the layer's median output norm ‖y‖.

    The weights tier edits some layers at the subject's last token, where the fact belongs to the
    subject alone, and some at the tokens that predict the target, where a change always reaches
    the answer, but other subjects with that answer are near. The latter help from a step on, so
    that they do only what the former could not.
    """

    subject_layers: tuple[int, ...]
    end_layers: tuple[int, ...]
    end_from: int  # steps of a target before the end layers join in
    end_rate: float  # Adam's in the end layers, in lengths
    prior: float  # λ: weight of the key covariance C0 in the subject layers
    end_prior: float  # the same in the end layers
    ridge: float  # λ_n: weight of the squared change of the weights, in units of E[k²]
    clamp: float  # longest δ of a target
    essence: float  # weight of the KL on what the subject is; 0 does without
    target_steps: int
    target_rate: float  # Adam's in the subject layers, in lengths
    side_layer: int
    side_rate: float  # Adam's, for the B of a shard's ΔW = B A, in lengths
    key_layer: int  # where subject keys are read
    subject_gate: float  # least cosine of a subject key that may route
    end_gate: float  # least cosine of an end key that may route
    alpha: float  # WISE margins: distance outside a shard's facts, at most
    beta: float  # distance on the shard's facts, at least
    gamma: float  # least gap between the two
    unnamed_gate: float = 0.95  # the subject gate of a fact with a prompt that does not name it
    # ‖W‖/‖W0‖ at which an audit warns, consolidates, reverts. These start values are judged from
    # what large models bear; how many facts a layer holds per unit of norm is the model's own.
    norm_warn: float = 1.15
    norm_consolidate: float = 1.3
    norm_revert: float = 1.6
    activation_warn: float = 0.03  # change of the activation norms, likewise
    activation_consolidate: float = 0.05
    activation_revert: float = 0.10
    agreement_warn: float = 0.02  # share of the canary's statements completed differently
    agreement_consolidate: float = 0.03
    agreement_revert: float = 0.10
    # By layer the mean ‖v‖ of targets on the unedited model, in lengths: targets far beyond are
    # refused. None is where it is not measured. Not hashed, since a mapping cannot be.
    anchors: Mapping[int, float] = field(default_factory=dict, hash=False)

    @property
    def gates(self) -> RoutingGates:
        """Where and from which cosines on the side memory fires."""
        return RoutingGates(
            self.key_layer, self.side_layer, self.subject_gate, self.end_gate, self.unnamed_gate
        )

    @property
    def has_essence(self) -> bool:
        """Whether targets are held to what the subject is. An end layer changes nothing there."""
        return bool(self.essence and self.subject_layers)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that the weights tier edits, in order."""
        return tuple(sorted((*self.subject_layers, *self.end_layers)))


def make_default_site(layers: int) -> EditSite:
    """A start for a model without a measured site: the prompt's end, past the middle."""
    upper = min(layers - 1, max(0, round(layers * 0.6)))
    return EditSite(
        subject_layers=(),
        end_layers=(upper,),
        end_from=0,
        end_rate=0.3,
        prior=0.1,
        end_prior=0.1,
        ridge=0.01,
        clamp=4.0,
        essence=0.0625,
        target_steps=40,
        target_rate=0.3,
        side_layer=upper,
        side_rate=1.0,
        key_layer=max(0, upper // 2),
        subject_gate=0.8,
        end_gate=0.4,
        alpha=0.1,
        beta=1.0,
        gamma=0.5,
    )


@dataclass(frozen=True)
class _PublishedSite:
    """Where MEMIT was published to edit a model: its subject layers of so many, and λ."""

    layers: int
    first: int
    last: int
    prior: float


# By the configuration's model type: GPT-2 XL, GPT-J 6B, Llama 3 8B (and Llama 2 7B, of as many
# layers), Mistral 7B, Qwen 2.5 7B; from the settings of MEMIT, AlphaEdit and EasyEdit.
_PUBLISHED_SITES = {
    "gpt2": _PublishedSite(48, 13, 17, 20_000.0),
    "gptj": _PublishedSite(28, 3, 8, 15_000.0),
    "llama": _PublishedSite(32, 4, 8, 15_000.0),
    "mistral": _PublishedSite(32, 4, 8, 15_000.0),
    "qwen2": _PublishedSite(28, 4, 8, 15_000.0),
}
# On models of a few layers the published site could not be optimised at all.
_MIN_LAYERS = 12


def make_start_site(kind: str, layers: int) -> EditSite:
    """A start for an unmeasured model: at the published relative depth where there is one for
    its type (the configuration's `model_type`), at the subject's last token; else the default.
    """
    start, known = make_default_site(layers), _PUBLISHED_SITES.get(kind)
    if known is None or layers < _MIN_LAYERS:
        return start
    scale = (layers - 1) / (known.layers - 1)
    subject = range(round(known.first * scale), round(known.last * scale) + 1)
    return replace(start, subject_layers=tuple(subject), end_layers=(), prior=known.prior)


def load_site(model_path: Path, layers: int, kind: str = "") -> EditSite:
    """The site measured for the model in this folder, or a start for a model of this kind.

    Raises KeditError when `kedit.json` is there and cannot be used.
    """
    path = model_path / SITE_FILE
    return read_site(path, layers) if path.is_file() else make_start_site(kind, layers)


def read_site(path: Path, layers: int) -> EditSite:
    """The site that a file of `site_text`'s form holds.

    Raises KeditError when it cannot be used for a model of so many layers.
    """
    try:
        raw = json.dumps(json.loads(path.read_text(encoding="utf-8"))["site"])
        site = TypeAdapter(EditSite).validate_json(raw, strict=True)
    except (ValueError, KeyError, TypeError) as error:
        raise KeditError(
            f"{path}: {error}",
            code="config",
            hint="correct the file, or remove it to use the default site",
        ) from error
    if not site.layers:
        raise KeditError(f"{path}: no layer to edit", code="config")
    if len(set(site.layers)) < len(site.layers):
        raise KeditError(
            f"{path}: a layer is named as subject layer and as end layer",
            code="config",
        )
    if not all(0 <= n < layers for n in (*site.layers, site.side_layer, site.key_layer)):
        raise KeditError(f"{path}: a layer is not one of the model's {layers}", code="config")
    return site


def format_site(site: EditSite, evidence: Mapping[str, Any]) -> str:
    """A site and the figures behind it, as `kedit.json` holds them; numbers have to be finite."""
    held = {"evidence": dict(evidence), "site": asdict(site)}
    return json.dumps(held, indent=1, allow_nan=False) + "\n"


def read_weights_hash(path: Path) -> str | None:
    """The sha256 of the weights that the site in a file was measured on, where it says so."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["evidence"]["weights"]
    except (ValueError, KeyError, TypeError):
        return None
    return str(found)
