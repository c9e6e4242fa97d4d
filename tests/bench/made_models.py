"""Model folders of a chosen size for benchmarks: the shapes of a real pipeline, random or sparse weights."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_SHARD_BYTES = 1_000_000_000
_RANDOM = 32 << 20


def write_model(folder: Path, *, total_bytes: int, sparse: bool = False, seed: int = 0) -> None:
    """Write a bf16 diffusers folder of about `total_bytes`: a transformer, a text encoder and a VAE.

    The tensors are those of a transformer of width 2560: most are 13 to 50 MB, every tenth tensor is small, the
    text encoder begins with an embedding of 780 MB (if there is room for it).

    Args:
        sparse: write only eight bytes of each tensor, so that they differ, and leave holes for the rest.
    """
    folder.mkdir(parents=True)
    index = {
        "_class_name": "ZImagePipeline",
        "_diffusers_version": "0.36.0",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3Model"],
        "transformer": ["diffusers", "ZImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    shares = {"text_encoder": 0.35, "transformer": 0.6, "vae": 0.05}
    generator = np.random.default_rng(seed)
    for component, share in shares.items():
        (folder / component).mkdir()
        (folder / component / "config.json").write_text('{"torch_dtype": "bfloat16"}')
        shapes = list(_shapes(int(total_bytes * share), embedding=component == "text_encoder"))
        _write_component(folder / component, component, shapes, generator, sparse=sparse)


def _shapes(total_bytes: int, *, embedding: bool) -> Iterator[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = [(2560, 2560), (9728, 2560), (2560,), (2560, 9728), (2560,), (4096, 2560), (128,)]
    if embedding and total_bytes > 900_000_000:
        yield (151_936, 2560)
        total_bytes -= 151_936 * 2560 * 2
    number = 0
    while total_bytes > 0:
        shape = shapes[number % len(shapes)]
        yield shape
        total_bytes -= 2 * int(np.prod(shape))
        number += 1


def _write_component(
    folder: Path, component: str, shapes: list[tuple[int, ...]], generator: np.random.Generator, *, sparse: bool
) -> None:
    stem = "model" if component == "text_encoder" else "diffusion_pytorch_model"
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for number, shape in enumerate(shapes):
        nbytes = 2 * int(np.prod(shape))
        if size and size + nbytes > _SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append((f"layers.{number}.weight", shape))
        size += nbytes
    names = [
        f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    for name, tensors in zip(names, shards, strict=True):
        _write_shard(folder / name, tensors, generator, sparse=sparse)
    if len(shards) > 1:
        weight_map = {tensor: name for name, tensors in zip(names, shards, strict=True) for tensor, _ in tensors}
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def _write_shard(
    path: Path, tensors: list[tuple[str, tuple[int, ...]]], generator: np.random.Generator, *, sparse: bool
) -> None:
    header, offset = {}, 0
    for name, shape in tensors:
        nbytes = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for fields in header.values():
            begin, end = fields["data_offsets"]
            if sparse:
                file.seek(8 + len(text) + begin)
                file.write(generator.bytes(8))
                continue
            for start in range(begin, end, _RANDOM):
                file.write(_bf16(min(_RANDOM, end - start), generator))
        file.truncate(8 + len(text) + offset)


def _bf16(nbytes: int, generator: np.random.Generator) -> bytes:
    """Normally distributed weights of a real model's scale, truncated to bfloat16."""
    weights = generator.standard_normal(nbytes // 2, dtype=np.float32) * np.float32(0.02)
    return (weights.view(np.uint32) >> 16).astype(np.uint16).tobytes()
