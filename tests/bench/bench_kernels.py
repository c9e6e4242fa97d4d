"""Speed of the quantization kernels against MLX's on the CPU: `python tests/bench/bench_kernels.py [--help]`.

Both sides start from the same array in memory and make the same bytes, which is checked. A round runs each
side once, in alternating order; medians over the rounds are printed, and their ratio. Ours uses all cores by
threads over one tensor, as the importer does; MLX's CPU back end runs these operations on one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "daemon"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from report import print_machine

from modelcask.quantize import QUANT_TYPES, SOURCE_DTYPES, QuantType, kernels
from modelcask.quantize.arrays import BIT_DTYPES, Bits, Quantized

TARGETS = {"int4": 4.0, "int8": 4.0, "mxfp8": 8.0, "nvfp4": 40.0}
DEQUANTIZE_TARGET = 1.0
OUTPUT_TARGET = 1.5  # GB/s of dequantized bytes from one core


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4096, help="of 4096 columns (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="default %(default)s")
    parser.add_argument("--dtype", choices=SOURCE_DTYPES, default="BF16")
    parser.add_argument("--types", nargs="+", choices=QUANT_TYPES, default=list(QUANT_TYPES))
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    options = parser.parse_args()
    try:
        import mlx.core as mx
    except ImportError:
        sys.exit("bench_kernels compares with MLX: install mlx[cpu] first")
    mx.set_default_device(mx.cpu)

    shape = (options.rows, 4096)
    print_machine("all arrays in memory and touched before, kernels compiled before")
    print(
        f"input:   {options.dtype} {shape[0]}×{shape[1]}, normal, deviation 0.02; {options.threads} threads; "
        f"medians of {options.rounds} rounds, sides alternating"
    )
    rng = np.random.default_rng(0)
    values = rng.standard_normal(shape, np.float32) * np.float32(0.02)
    float_dtype = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[options.dtype]
    source = values.astype(float_dtype).view(BIT_DTYPES[options.dtype])
    print()
    print("type   direction     ours, ms   MLX, ms   ratio  target    ours, 1 thread      without errors")
    with ThreadPoolExecutor(options.threads) as executor:
        for name in options.types:
            _compare(QUANT_TYPES[name], options.dtype, source, executor, options.rounds)


def _compare(qtype: QuantType, dtype: str, source: Bits, executor: Executor, rounds: int) -> None:
    import mlx.core as mx

    mlx_dtype = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}[dtype]
    settings: dict[str, Any] = {"group_size": qtype.group_size, "bits": qtype.bits, "mode": qtype.mode}
    ours = Quantized.empty(qtype, dtype, source.shape)
    restored = np.zeros_like(source)
    weights = mx.array(source).view(mlx_dtype)
    mx.eval(weights)

    def mlx_quantize() -> None:
        mx.eval(mx.quantize(weights, **settings))

    packed, scales, *biases = mx.quantize(weights, **settings)
    wide: Any = [each.astype(mx.float32) for each in (scales, *biases)] if biases else [scales]
    mx.eval(packed, wide)

    dequantize: Any = mx.dequantize

    def mlx_dequantize() -> None:
        mx.eval(dequantize(packed, *wide, **settings, dtype=mx.float32).astype(mlx_dtype))

    def quantize(measure: bool) -> None:
        kernels.quantize_parallel(executor, qtype, dtype, source, ours, measure=measure)

    quantize(measure=True)
    if not np.array_equal(ours.packed, np.array(packed)):
        sys.exit(f"{qtype.name}: not the words that MLX makes")
    kernels.dequantize_groups(qtype, dtype, ours, restored)

    times = _alternate(
        rounds,
        [
            lambda: quantize(measure=True),
            mlx_quantize,
            lambda: kernels.quantize_groups(qtype, dtype, source, ours),
            lambda: quantize(measure=False),
        ],
    )
    gigabytes = source.nbytes / 1e9
    print(
        f"{qtype.name:6} quantize    {times[0] * 1e3:9.1f} {times[1] * 1e3:9.1f} {times[1] / times[0]:6.1f}× "
        f"≥ {TARGETS[qtype.name]:3.0f}×   {gigabytes / times[2]:6.2f} GB/s in    "
        f"{times[3] * 1e3:9.1f} ms {times[1] / times[3]:6.1f}×"
    )
    times = _alternate(
        rounds,
        [
            lambda: kernels.dequantize_parallel(executor, qtype, dtype, ours, restored),
            mlx_dequantize,
            lambda: kernels.dequantize_groups(qtype, dtype, ours, restored),
        ],
    )
    print(
        f"{qtype.name:6} dequantize  {times[0] * 1e3:9.1f} {times[1] * 1e3:9.1f} {times[1] / times[0]:6.1f}× "
        f"≥ {DEQUANTIZE_TARGET:3.0f}×   {gigabytes / times[2]:6.2f} GB/s out, target {OUTPUT_TARGET}",
        flush=True,
    )


def _alternate(rounds: int, sides: list[Callable[[], object]]) -> list[float]:
    """Median seconds of each side, after one run that is not counted."""
    for side in sides:
        side()
    seconds: list[list[float]] = [[] for _ in sides]
    for number in range(rounds):
        order = range(len(sides)) if number % 2 == 0 else reversed(range(len(sides)))
        for index in order:
            begin = time.perf_counter()
            sides[index]()
            seconds[index].append(time.perf_counter() - begin)
    return [statistics.median(each) for each in seconds]


if __name__ == "__main__":
    main()
