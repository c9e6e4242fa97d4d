"""The table of quantization types and the rule that says which tensors they apply to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from modelcask.quantize import QUANT_TYPES, eligible


def test_the_package_root_imports_neither_numpy_nor_numba() -> None:
    program = "import sys, modelcask.quantize; print(*{'numpy', 'numba', 'ml_dtypes'} & set(sys.modules))"
    daemon = Path(__file__).parents[2] / "daemon"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=daemon, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(
    ("name", "packed", "scales", "size"),
    [
        ("int4", (3, 16), (3, 4), 3 * 16 * 4 + 2 * 3 * 4 * 2),
        ("int8", (3, 32), (3, 2), 3 * 32 * 4 + 2 * 3 * 2 * 2),
        ("nvfp4", (3, 16), (3, 8), 3 * 16 * 4 + 3 * 8),
        ("mxfp8", (3, 32), (3, 4), 3 * 32 * 4 + 3 * 4),
    ],
)
def test_shapes_and_sizes_of_a_3_by_128_bf16_tensor(
    name: str, packed: tuple[int, int], scales: tuple[int, int], size: int
) -> None:
    qtype = QUANT_TYPES[name]
    assert qtype.packed_shape((3, 128)) == packed
    assert qtype.scale_shape((3, 128)) == scales
    assert qtype.quantized_size((3, 128), "BF16") == size


def test_scales_have_the_source_dtype_or_eight_bits() -> None:
    dtypes = {name: qtype.scale_dtype("F16") for name, qtype in QUANT_TYPES.items()}
    assert dtypes == {"int4": "F16", "int8": "F16", "nvfp4": "U8", "mxfp8": "U8"}


@pytest.mark.parametrize(
    ("component", "tensor", "dtype", "shape", "reason"),
    [
        ("transformer", "blocks.0.to_q.weight", "BF16", (64, 64), None),
        ("text_encoder_2", "mlp.down_proj.weight", "F32", (64, 64), None),
        ("unet", "conv.weight", "F16", (4, 2, 64), None),
        ("transformer", "none.weight", "F16", (0, 64), None),
        ("vae", "mid.to_q.weight", "BF16", (64, 64), "component vae"),
        ("transformer", "ids.weight", "I64", (64, 64), "dtype I64"),
        ("transformer", "packed.weight", "F8_E4M3", (64, 64), "dtype F8_E4M3"),
        ("transformer", "to_q.bias", "BF16", (64, 64), "name does not end in '.weight'"),
        ("transformer", "table", "BF16", (64, 64), "name does not end in '.weight'"),
        ("transformer", "x_embedder.weight", "BF16", (64, 64), "name holds 'embed'"),
        ("transformer", "norm_out.linear.weight", "BF16", (64, 64), "name holds 'norm'"),
        ("text_encoder", "ln_1.weight", "BF16", (64, 64), "name holds 'ln_'"),
        ("text_encoder", "final_layernorm.weight", "BF16", (64, 64), "name holds 'norm'"),
        ("transformer", "gain.weight", "BF16", (64,), "one dimension"),
        ("transformer", "gain.weight", "BF16", (), "no dimension"),
        ("transformer", "odd.weight", "BF16", (64, 40), "last dimension 40 does not divide by 32"),
    ],
)
def test_the_reason_why_a_tensor_is_not_quantized(
    component: str, tensor: str, dtype: str, shape: tuple[int, ...], reason: str | None
) -> None:
    assert eligible(component, tensor, dtype, shape, QUANT_TYPES["int4"]) == reason


def test_what_divides_depends_on_the_type() -> None:
    answers = {name: eligible("transformer", "g.weight", "F32", (8, 48), q) for name, q in QUANT_TYPES.items()}
    assert answers == {
        "int4": "last dimension 48 does not divide by 32",
        "int8": "last dimension 48 does not divide by 64",
        "nvfp4": None,
        "mxfp8": "last dimension 48 does not divide by 32",
    }
