"""The norm anchor: how long a target may be, compared with those that the unedited model takes.

Targets far longer than usual go with edits that grow the weights and damage what is near. The
anchor of a layer is the mean ‖v‖ of a pilot's targets there, without the longest; a fact whose
targets are beyond `MAX_ANCHORS` anchors is better left out of the weights.
"""

from collections.abc import Mapping, Sequence

MAX_ANCHORS = 2.0
TRIMMED_SHARE = 0.05  # of the pilot, the longest


def compute_anchor(lengths: Sequence[float]) -> float:
    """Return the mean of the lengths without the longest 5 %; raises ValueError for no lengths."""
    if not lengths:
        raise ValueError("no lengths to take an anchor from")
    kept = sorted(lengths)[: len(lengths) - int(TRIMMED_SHARE * len(lengths))]
    return sum(kept) / len(kept)


def check_target_length(lengths: Mapping[int, float], anchors: Mapping[int, float]) -> str | None:
    """Return why targets of these lengths by layer are refused, or None.

    A layer without an anchor refuses nothing. Lengths and anchors share one unit.
    """
    for layer, length in lengths.items():
        if layer in anchors and not length <= MAX_ANCHORS * anchors[layer]:
            return (
                f"the target in layer {layer} is {length:.2f} long, more than {MAX_ANCHORS:g} times"
                f" the norm anchor {anchors[layer]:.2f}"
            )
    return None
