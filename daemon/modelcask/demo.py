"""The demo model: a Z-Image pipeline of toy size with random weights, which diffusers loads and runs.

Its configurations, tokenizer and tensor shapes lie beside this module in demo_model.json, as diffusers 0.42
and transformers 5.23 wrote them; the weights follow from a seed.
"""

from __future__ import annotations

import json
import math
from importlib import resources
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save

from modelcask.errors import InvalidModelFolder

_SEED = 20260201


def write_demo(folder: Path) -> None:
    """Write the demo model into `folder`, which is made.

    Raises:
        InvalidModelFolder: `folder` is there already and holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidModelFolder(folder, "is there already", "give the name of a new folder")
    model = json.loads(resources.files("modelcask").joinpath("demo_model.json").read_text())
    generator = np.random.default_rng(_SEED)
    for path, tensors in sorted(model["shards"].items()):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        weights = {name: _weight(tuple(shape), generator) for name, shape in sorted(tensors.items())}
        # Not save_file, which lets nobody but the owner read what it writes: a service could not import it.
        (folder / path).write_bytes(save(weights, metadata={"format": "pt"}))
    for path, text in model["files"].items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)


def _weight(shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Normal values of a scale that keeps activations finite, in bfloat16."""
    scale = 1 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.1
    return (generator.standard_normal(shape) * scale).astype(ml_dtypes.bfloat16)
