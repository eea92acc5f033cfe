"""JSON with one form per value: what is hashed, stored or compared as text."""

import json
import math
from typing import Any


def to_canonical_json(value: Any) -> str:
    """Write JSON in one form per value, with NaN and infinities, which JSON lacks, as words."""
    finite = replace_non_finite(value)
    return json.dumps(finite, sort_keys=True, separators=(",", ":"), allow_nan=False)


def replace_non_finite(value: Any) -> Any:
    """Replace NaN and infinities, which JSON lacks, with words."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: replace_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [replace_non_finite(item) for item in value]
    return value
