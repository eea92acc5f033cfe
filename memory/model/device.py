"""Choice of the device, and its support for bfloat16."""

import torch


def resolve_device(name: str) -> torch.device:
    """Convert a name to a device: `auto` is the GPU if there is one, others are torch's."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Check that the device has instructions for bfloat16 products, which make them faster."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    features = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))
