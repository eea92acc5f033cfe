"""Measures what the package ships of a model's inputs: `python -m tools.known_inputs smollm2`."""

import sys
import tempfile
from pathlib import Path

from safetensors.torch import save_file

from kedit_daemon.editing.gguf_cache import GgufCache
from kedit_daemon.editing.known_measurements import INPUTS_FILE, locate_known
from kedit_daemon.editing.measurement_cache import make_key
from kedit_daemon.editing.model_loading import open_model, read_pieces
from kedit_daemon.editing.side_learner import OUTSIDE_LINES


def write_inputs(name: str) -> Path:
    """Measure the side layer's inputs where pieces of ordinary text end; return the file."""
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        opened = open_model(name, "cpu", cache, GgufCache(cache))
        layer = opened.resolve_site().side_layer
        path = locate_known(opened.base_hash) / INPUTS_FILE
        path.unlink(missing_ok=True)
        inputs = opened.resolve_ordinary_inputs(layer, OUTSIDE_LINES)
        ids = [opened.model.encode(piece) for piece in read_pieces(OUTSIDE_LINES)]
        key = make_key(opened.base_hash, layer, ids)
        save_file({key: inputs.cpu().contiguous()}, path)
        return path


if __name__ == "__main__":
    print(write_inputs(sys.argv[1]))
