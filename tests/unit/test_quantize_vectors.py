"""Reference and kernels against digests recorded from MLX 0.32.4 (`tests/data/mlx.json`)."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelcask.quantize import QUANT_TYPES, QuantType, eligible, kernels, reference
from modelcask.quantize.arrays import BIT_DTYPES, Bits, Quantized

DATA = Path(__file__).parents[1] / "data"
RECORDED: dict[str, dict[str, dict[str, Any]]] = json.loads((DATA / "mlx.json").read_text())["tensors"]
CASES = [(name, tensor) for name, tensors in RECORDED.items() for tensor in tensors]


@dataclass(frozen=True, slots=True)
class Tensor:
    dtype: str
    shape: tuple[int, ...]
    raw: bytes

    def bits(self) -> Bits:
        return np.frombuffer(self.raw, BIT_DTYPES[self.dtype]).reshape(self.shape)


def model_tensors() -> Iterator[tuple[str, str, Tensor]]:
    """Component, name and content of every tensor of the small model."""
    for path in sorted((DATA / "model").glob("*/*.safetensors")):
        content = path.read_bytes()
        (length,) = struct.unpack_from("<Q", content)
        data = content[8 + length :]
        for name, entry in json.loads(content[8 : 8 + length]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                yield path.parent.name, name, Tensor(entry["dtype"], tuple(entry["shape"]), data[begin:end])


TENSORS = {f"{component}/{name}": tensor for component, name, tensor in model_tensors()}


def sha256(array: Bits) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


def kernel_quantize(qtype: QuantType, dtype: str, source: Bits) -> Quantized:
    into = Quantized.empty(qtype, dtype, source.shape)
    kernels.quantize_groups(qtype, dtype, source, into)
    return into


def kernel_dequantize(qtype: QuantType, dtype: str, quantized: Quantized) -> Bits:
    *rows, words = quantized.packed.shape
    out = np.empty((*rows, words * 32 // qtype.bits), BIT_DTYPES[dtype])
    kernels.dequantize_groups(qtype, dtype, quantized, out)
    return out


@pytest.mark.parametrize("quantize", [reference.quantize, kernel_quantize], ids=["reference", "kernels"])
@pytest.mark.parametrize(("name", "tensor"), CASES)
def test_quantized_arrays_have_the_recorded_digests(
    name: str, tensor: str, quantize: Callable[[QuantType, str, Bits], Quantized]
) -> None:
    source = TENSORS[tensor]
    made = quantize(QUANT_TYPES[name], source.dtype, source.bits())
    digests = {"weight": sha256(made.packed), "scale": sha256(made.scales)}
    if made.biases is not None:
        digests["bias"] = sha256(made.biases)
    assert digests == {key: RECORDED[name][tensor].get(key) for key in digests}
    assert ("bias" in RECORDED[name][tensor]) == (made.biases is not None)


@pytest.mark.parametrize("dequantize", [reference.dequantize, kernel_dequantize], ids=["reference", "kernels"])
@pytest.mark.parametrize(("name", "tensor"), CASES)
def test_dequantized_tensors_have_the_recorded_digests(
    name: str, tensor: str, dequantize: Callable[[QuantType, str, Quantized], Bits]
) -> None:
    source = TENSORS[tensor]
    quantized = reference.quantize(QUANT_TYPES[name], source.dtype, source.bits())
    restored = dequantize(QUANT_TYPES[name], source.dtype, quantized)
    assert sha256(restored) == RECORDED[name][tensor]["dequantized"]


@pytest.mark.parametrize("name", QUANT_TYPES)
def test_exactly_the_recorded_tensors_are_eligible(name: str) -> None:
    chosen = {
        f"{component}/{tensor}"
        for component, tensor, content in model_tensors()
        if eligible(component, tensor, content.dtype, content.shape, QUANT_TYPES[name]) is None
    }
    assert chosen == set(RECORDED[name])
