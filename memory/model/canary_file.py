"""Canary readings as a file, so that a model is not measured again at every start."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save

from memory.model.canary import CanaryReadings

READINGS_FORMAT = 2  # version of the form that `pack_readings` writes, and of what is measured


def pack_readings(readings: CanaryReadings) -> bytes:
    """Write readings as safetensors bytes. Python's numbers are kept in float64, all is exact."""
    norms = readings.activation_norms
    return save(
        {
            "activation_norms": torch.tensor(
                [norms[n] for n in range(len(norms))], dtype=torch.float64
            ),
            "perplexity": torch.tensor(readings.perplexity, dtype=torch.float64),
            "next_tokens": torch.tensor(readings.next_tokens, dtype=torch.int64),
            "top_probabilities": torch.tensor(readings.top_probabilities, dtype=torch.float64),
            "kl": torch.tensor(readings.kl, dtype=torch.float64),
            "end_activations": torch.stack(readings.end_activations).cpu(),
            "end_states": readings.end_states.cpu().contiguous(),
        }
    )


def load_readings(path: Path, device: torch.device) -> CanaryReadings:
    """Read what `pack_readings` wrote; on the CPU the tensors stay in the file until they are used.
    The file must be whole."""
    found = load_file(path, device=str(device))
    return CanaryReadings(
        activation_norms=dict(enumerate(found["activation_norms"].tolist())),
        perplexity=float(found["perplexity"]),
        next_tokens=tuple(found["next_tokens"].tolist()),
        top_probabilities=tuple(found["top_probabilities"].tolist()),
        kl=float(found["kl"]),
        end_activations=tuple(found["end_activations"]),
        end_states=found["end_states"],
    )
