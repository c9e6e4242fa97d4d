"""Which tensors of a model are quantized: large matrices, and nothing whose precision the output hangs on.

The rule is upstream's (`ShouldQuantize` of Ollama's `x/create`, a0407d07f) plus what the packing needs.
"""

from __future__ import annotations

from collections.abc import Sequence

from modelcask.quantize.types import SOURCE_DTYPES, QuantType

_KEPT_COMPONENT = "vae"
_KEPT_NAME_PARTS = ("embed", "norm", "ln_", "layernorm")


def eligible(component: str, tensor_name: str, dtype: str, shape: Sequence[int], qtype: QuantType) -> str | None:
    """None if the tensor is to be quantized; else the reason why it is stored as it came, for people.

    Args:
        component: the subfolder of the model that holds the tensor.
        tensor_name: its name inside the component. Compared with case, as upstream does.
        dtype: as safetensors writes it.
        shape: an empty tensor is eligible if its last dimension is: it packs to nothing.
        qtype: the type wanted.
    """
    if component == _KEPT_COMPONENT:
        return f"component {component}"
    if dtype not in SOURCE_DTYPES:
        return f"dtype {dtype}"
    if not tensor_name.endswith(".weight"):
        return "name does not end in '.weight'"
    for part in _KEPT_NAME_PARTS:
        if part in tensor_name:
            return f"name holds '{part}'"
    if len(shape) < 2:
        return "one dimension" if shape else "no dimension"
    if shape[-1] % qtype.group_size:
        return f"last dimension {shape[-1]} does not divide by {qtype.group_size}"
    return None
