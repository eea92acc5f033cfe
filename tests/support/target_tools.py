"""What the tests of targets share: facts of one shape, sites of every kind, residuals by hand."""

from collections.abc import Callable
from typing import Any

import torch
from editing_home import seat
from tiny_models import CITIES
from torch import Tensor

from memory.facts import Fact
from memory.model.editable import EditableModel
from policies.edit_site import EditSite
from policies.edit_terms import EditTerms
from policies.prompts import TokenRow, make_rows
from policies.targets import compute_terms

NORMS = {n: 1.0 for n in range(4)}
FACT = seat(11, "Oslo")
OTHERS = [seat(n, CITIES[n % len(CITIES)]) for n in range(12, 52)]  # of one shape with FACT


KINDS: dict[str, dict[str, Any]] = {
    "subject": {"subject_layers": (1, 2), "end_layers": ()},
    "end": {"subject_layers": (), "end_layers": (1, 2)},
    "both": {"subject_layers": (1,), "end_layers": (2,), "end_from": 3},
}
STRONG: dict[str, Any] = {"target_rate": 0.5, "end_rate": 0.5, "clamp": 40.0}


def terms_of(
    model: EditableModel, site: EditSite, facts: list[Fact], fact: Fact = FACT
) -> EditTerms:
    found = compute_terms(model, site, NORMS, facts)[fact.id]
    assert isinstance(found, EditTerms)
    return found


def sites_of(site: EditSite, row: TokenRow, layer: int) -> list[int]:
    """The subject's last token, or every token that predicts one of the target."""
    if layer in site.subject_layers:
        return [row.subject_index]
    return list(range(row.prompt_length - 1, len(row.ids) - 1))


def logits_with(
    model: EditableModel, site: EditSite, found: EditTerms, number: int, fact: Fact = FACT
) -> Tensor:
    """Logits where a row of the fact predicts its target, the residuals put in by hand.

    A layer's keys are read with the residuals of the layers below it in place.
    """
    row = make_rows(model, fact)[number]

    def add(layer: int) -> Callable[[Tensor, Tensor], Tensor]:
        at = sites_of(site, row, layer)

        def tap(inputs: Tensor, outputs: Tensor) -> Tensor:
            assert torch.allclose(inputs[0, at], found.keys[layer][number], atol=1e-4)
            moved = outputs.clone()
            moved[0, at] += found.residuals[layer]
            return moved

        return tap

    with torch.no_grad(), model.tap_layers({n: add(n) for n in found.keys}):
        said: Tensor = model.hf_model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0]
    return said[row.prompt_length - 1 : -1]
