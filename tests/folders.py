"""Small model folders for tests, written byte by byte so that they can also be wrong."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "I64": 8, "U8": 1, "BOOL": 1, "F8_E4M3": 1}


@dataclass(frozen=True)
class Tensor:
    """A tensor whose data follows from `seed`."""

    dtype: str
    shape: tuple[int, ...]
    seed: str

    @property
    def data(self) -> bytes:
        length = math.prod(self.shape) * _BYTES[self.dtype]
        return hashlib.shake_128(self.seed.encode()).digest(length)


def tensor(seed: str, *shape: int, dtype: str = "BF16") -> Tensor:
    return Tensor(dtype, shape, seed)


def shard_bytes(tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file as the reference implementation writes it."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    data = b""
    for name, each in tensors.items():
        header[name] = {
            "dtype": each.dtype,
            "shape": list(each.shape),
            "data_offsets": [len(data), len(data) + len(each.data)],
        }
        data += each.data
    return raw_shard(json.dumps(header).encode(), data)


def raw_shard(header: bytes, data: bytes = b"") -> bytes:
    """A file with any header, padded as usual."""
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + data


def write_component(folder: Path, shards: Sequence[Mapping[str, Tensor]], *, stem: str, variant: str = "") -> None:
    """A component's weights in one shard or more, with the index that goes with more."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16"}))
    suffix = f".{variant}" if variant else ""
    if len(shards) == 1:
        (folder / f"{stem}{suffix}.safetensors").write_bytes(shard_bytes(shards[0], metadata={"format": "pt"}))
        return
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        name = f"{stem}{suffix}-{number:05}-of-{len(shards):05}.safetensors"
        (folder / name).write_bytes(shard_bytes(tensors, metadata={"format": "pt"}))
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index{suffix}.json").write_text(json.dumps(index))


ENCODER = {
    "embed.weight": tensor("embed", 32, 16),
    "layer.weight": tensor("layer", 16, 16),
    "norm.weight": tensor("norm", 16),
}
VAE = {"decoder.weight": tensor("decoder", 8, 4, 3, 3, dtype="F32"), "decoder.bias": tensor("bias", 8, dtype="F32")}


def write_model(
    folder: Path,
    *,
    transformer: str = "transformer",
    shards: int = 1,
    encoder_shards: int = 1,
    variants: Sequence[str] = (),
) -> Path:
    """A complete folder: text encoder, tokenizer, transformer, VAE, scheduler.

    Args:
        transformer: seeds the transformer's weights; all else is the same in every folder.
        shards: of the transformer.
        variants: of the transformer, besides the default weights.
    """
    folder.mkdir(parents=True)
    index = {
        "_class_name": "ZImagePipeline",
        "_diffusers_version": "0.36.0",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3Model"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "ZImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    (folder / "README.md").write_text("# a model\n")
    for name, files in {
        "scheduler": {"scheduler_config.json": "{}"},
        "tokenizer": {
            "tokenizer.json": '{"version": "1.0"}',
            "merges.txt": "#version: 0.2\n",
            "tokenizer_config.json": "{}",
        },
    }.items():
        (folder / name).mkdir()
        for file, text in files.items():
            (folder / name / file).write_text(text)
    write_component(folder / "text_encoder", _split(ENCODER, encoder_shards), stem="model")
    write_component(folder / "vae", [VAE], stem="diffusion_pytorch_model")
    for variant in ("", *variants):
        weights = {f"blocks.{n}.weight": tensor(f"{transformer}{variant}{n}", 16, 32) for n in range(6)}
        write_component(
            folder / "transformer", _split(weights, shards), stem="diffusion_pytorch_model", variant=variant
        )
    return folder


def _split(tensors: Mapping[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    items = list(tensors.items())
    size = -(-len(items) // count)
    return [dict(items[begin : begin + size]) for begin in range(0, len(items), size)]


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` by its path, symlinks followed."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
