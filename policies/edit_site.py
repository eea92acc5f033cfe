"""The edit site: layers, tokens and strengths, measured once per model and kept in its folder.

The published site (the subject's last token) is not a constant of nature: on small models it
cannot be optimised at all. So the site is data, kept with its evidence (`kedit.json`).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from memory.errors import KeditError
from memory.side.shards import RoutingGates

SITE_FILE = "kedit.json"


@dataclass(frozen=True)
class EditSite:
    """Layers, tokens and strengths. Lengths are in units of the layer's median output norm ‖y‖.

    The weights tier edits some layers at the subject's last token, where the fact belongs to the
    subject alone, and some at the tokens that predict the target, where a change always reaches
    the answer, but other subjects with that answer are near. The latter join in at a later step, so
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
    essence: float  # weight of the KL on "<subject> is a"; 0 omits it
    target_steps: int
    target_rate: float  # Adam's in the subject layers, in lengths
    side_layer: int
    side_rate: float  # Adam's, for the B of a shard's ΔW = B A, in lengths
    key_layer: int  # in which subject keys are read
    subject_gate: float  # least cosine of a subject key that may route
    end_gate: float  # least cosine of an end key that may route
    alpha: float  # WISE margins: largest activation distance outside a shard's facts
    beta: float  # least activation distance on the shard's facts
    gamma: float  # least gap between the two
    # Learned behind a target of the weights; if empty, the token that ends a text. Large models go
    # on behind an answer, and edits that end their texts hardly carry over to other wordings.
    target_ending: str = ""
    unnamed_gate: float = 0.95  # the subject gate of a fact with a prompt that does not name it
    # ‖W‖/‖W0‖ at which an audit warns, consolidates, reverts. These start values are
    # judged from large models; how many facts a layer holds per unit of norm depends on the model.
    norm_warn: float = 1.15
    norm_consolidate: float = 1.3
    norm_revert: float = 1.6
    activation_warn: float = 0.03  # change of the activation norms, likewise
    activation_consolidate: float = 0.05
    activation_revert: float = 0.10
    perplexity_warn: float = 1.05  # of ordinary text, as a ratio, likewise
    perplexity_consolidate: float = 1.10
    perplexity_revert: float = 1.15
    # Share of the statements completed differently, of those that the unedited model completes with
    # confidence, likewise. Real models change that many when they are rounded to 8, 6 and 5 bits.
    confident_warn: float = 0.015
    confident_consolidate: float = 0.025
    confident_revert: float = 0.04
    # The same share of all statements. Older versions wrote it, and it is then judged instead.
    agreement_warn: float | None = None
    agreement_consolidate: float | None = None
    agreement_revert: float | None = None
    # By bits, the KL at the statements' ends after a rounding of the weights: the unit in which
    # edits are reported. Not hashed, since a mapping cannot be.
    rounding_kl: Mapping[int, float] = field(default_factory=dict, hash=False)
    # By measured layer, the mean ‖v‖ of targets on the unedited model in lengths: those far beyond
    # are refused. Not hashed either.
    anchors: Mapping[int, float] = field(default_factory=dict, hash=False)

    @property
    def gates(self) -> RoutingGates:
        """Key layers and the least cosines at which the side memory fires."""
        return RoutingGates(
            self.key_layer, self.side_layer, self.subject_gate, self.end_gate, self.unnamed_gate
        )

    @property
    def has_essence(self) -> bool:
        """Check that targets keep the subject's essence, which no end layer changes."""
        return bool(self.essence and self.subject_layers)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that the weights tier edits, in order."""
        return tuple(sorted((*self.subject_layers, *self.end_layers)))


def make_default_site(layers: int) -> EditSite:
    """Return a start for a model without a measured site: the prompt's end, past the middle."""
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
    """Published MEMIT site of a model: its layer count, first and last subject layer, and λ."""

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
    """Return a start for an unmeasured model: the published relative depth of its type (the
    configuration's `model_type`), at the subject's last token; else the default."""
    start, published = make_default_site(layers), _PUBLISHED_SITES.get(kind)
    if published is None or layers < _MIN_LAYERS:
        return start
    scale = (layers - 1) / (published.layers - 1)
    subject = range(round(published.first * scale), round(published.last * scale) + 1)
    return replace(
        start,
        subject_layers=tuple(subject),
        end_layers=(),
        prior=published.prior,
        target_ending=".",
    )


def load_site(model_path: Path, layers: int, kind: str = "") -> EditSite:
    """Return the site measured for the model in this folder, or a start for a model of this kind;
    raises KeditError for a `kedit.json` that cannot be used."""
    path = model_path / SITE_FILE
    return read_site(path, layers) if path.is_file() else make_start_site(kind, layers)


def read_site(path: Path, layers: int) -> EditSite:
    """Read the site from a file as `format_site` writes it; raises KeditError for a site that does
    not fit a model of this number of layers."""
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
        raise KeditError(f"{path}: a layer is named twice", code="config")
    if not all(0 <= n < layers for n in (*site.layers, site.side_layer, site.key_layer)):
        raise KeditError(f"{path}: a layer is not one of the model's {layers}", code="config")
    return site


def format_site(site: EditSite, evidence: Mapping[str, Any]) -> str:
    """Return a site and its evidence as the text of `kedit.json`; numbers have to be finite."""
    content = {"evidence": dict(evidence), "site": asdict(site)}
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def read_weights_hash(path: Path) -> str | None:
    """Return the sha256 of the weights on which a file's site was measured, if it holds one."""
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["evidence"]["weights"])
    except (ValueError, KeyError, TypeError):
        return None
