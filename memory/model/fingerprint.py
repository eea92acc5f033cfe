"""Fingerprint of a model where it runs: two with the same one measure the same, bit for bit."""

import hashlib
import json

import torch
import transformers

from memory.model.editable import EditableModel

TEXT = "It rained for most of the afternoon, and the river that runs past the old mill rose."


def compute_fingerprint(model: EditableModel) -> str:
    """Compute a sha256 over the logits of a short text by the unedited model, and over what decides
    their last bits: libraries, device, threads.

    All weights act on the logits, also those that no edit changes and no other hash covers.
    """
    ids = torch.tensor([model.encode(TEXT)], device=model.device)
    with torch.no_grad(), model.at_base():
        logits = model.hf_model(input_ids=ids, use_cache=False).logits
    made_by = [torch.__version__, transformers.__version__, torch.get_num_threads()]
    made_by += [str(model.device), torch.backends.cpu.get_cpu_capability()]
    digest = hashlib.sha256(json.dumps(made_by).encode())
    digest.update(logits.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
