"""MLX reads a shard of the `mlx/` view and dequantizes it. Run in a client process."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any


def digests(shard: Path, quantization: dict[str, Any], dtypes: dict[str, str]) -> dict[str, dict[str, str]]:
    """sha256 of what `mlx.core.load` gives for each weight that has scales beside it.

    Args:
        quantization: `group_size`, `bits` and `mode`, as the component's config.json has them.
        dtypes: safetensors dtype before quantization, by tensor name.

    Returns:
        by tensor name, digests of the raw bytes: `weight`, `scale`, `bias` where there is one, and
        `dequantized`, which is `mlx.core.dequantize` in float32, rounded once to the dtype.
    """
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    originals = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
    arrays = mx.load(str(shard))
    found = {}
    for name, scales in arrays.items():
        if name.endswith(".scales"):
            stem = name.removesuffix("scales")
            weight, biases = arrays[stem + "weight"], arrays.get(stem + "biases")
            parts = {"weight": weight, "scale": scales}
            if biases is not None:
                parts["bias"] = biases
                scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
            wide = mx.dequantize(weight, scales, biases, dtype=mx.float32, **quantization)
            parts["dequantized"] = wide.astype(originals[dtypes[stem + "weight"]])
            found[stem + "weight"] = {part: _digest(array) for part, array in parts.items()}
    return found


def _digest(array: Any) -> str:
    import mlx.core as mx
    import numpy as np

    return hashlib.sha256(np.array(array.view(mx.uint8)).tobytes()).hexdigest()
