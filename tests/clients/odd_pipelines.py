"""Tiny pipelines that no family's published model looks like as a whole, each with something that one has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .pipelines import PIPELINES, TinyPipeline

# mypy: allow-untyped-calls


@dataclass(frozen=True, slots=True, kw_only=True)
class _HeadlessZImage(TinyPipeline):
    """Z-Image whose text encoder was saved with a language model's head and is loaded without, as the published one.

    transformers loads `model.layers.0…` into a module named `layers.0…` then.
    """

    def build(self, folder: Path) -> None:
        # Not super(): a dataclass with slots is another class than the one this method was written in.
        TinyPipeline.build(self, folder)
        index = folder / "model_index.json"
        fields = json.loads(index.read_text())
        assert fields["text_encoder"] == ["transformers", "Qwen3ForCausalLM"]
        fields["text_encoder"] = ["transformers", "Qwen3Model"]
        index.write_text(json.dumps(fields, indent=2))


def _z_image_with_odd_text_encoder(scratch: Path) -> Any:
    import transformers

    from . import tiny_models

    pipeline = PIPELINES["z-image"].assemble(scratch)
    config = pipeline.text_encoder.config
    # Like the 3420 columns of Qwen2.5-VL: they divide by no group size, so a matrix of each layer stays as it came.
    config.intermediate_size = 136
    text_encoder = tiny_models.seeded(transformers.Qwen3ForCausalLM(config), 801)
    pipeline.register_modules(text_encoder=text_encoder)
    return pipeline


ODD_PIPELINES: Mapping[str, TinyPipeline] = {
    "z-image-odd": _HeadlessZImage(
        name="z-image-odd",
        assemble=_z_image_with_odd_text_encoder,
        dtype="bfloat16",
        max_shard_size="200KB",
        arguments={"max_sequence_length": 64},
    ),
}
