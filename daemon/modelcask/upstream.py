"""What upstream's importer writes for a pipeline besides its tensors, byte for byte.

Source: Ollama's x/create/imagegen.go at a0407d07f (February 2026; image generation was removed upstream in
July 2026). Its manifests carry a fixed config blob, nine JSON files where they exist, and model_index.json
in a normalized form.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modelcask import gojson
from modelcask.manifests import MODEL_INDEX
from modelcask.safetensors_layout import strict_json

# In the order of the layers.
JSON_PATHS = (
    MODEL_INDEX,
    "text_encoder/config.json",
    "text_encoder/generation_config.json",
    "transformer/config.json",
    "vae/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
)


def config_blob(model_index: Mapping[str, Any]) -> bytes:
    """The bytes of the manifest's config."""
    sees = model_index.get("_class_name") == "Flux2KleinPipeline"
    return gojson.compact(
        {
            "model_format": "safetensors",
            "model_family": "",
            "model_families": None,
            "model_type": "",
            "file_type": "",
            "requires": "0.14.0",
            "capabilities": ["image", "vision"] if sees else ["image"],
            "architecture": "",
            "os": "",
            "rootfs": {"type": "", "diff_ids": None},
        }
    )


def normalized_model_index(model_index: Mapping[str, Any], *, parameter_count: int, quantization: str) -> bytes:
    """model_index.json as upstream stores it.

    Raises:
        ValueError: a number in it that Go could not hold.
    """
    fields = dict(model_index)
    if "_class_name" in fields:
        fields["architecture"] = fields.pop("_class_name")
    fields.pop("_diffusers_version", None)
    fields["parameter_count"] = gojson.GoInt(parameter_count)
    fields["quantization"] = quantization
    return gojson.indented(fields)


def source_dtype(text_encoder_config: bytes) -> str:
    """What `quantization` says of a model that is not quantized: the text encoder's dtype, or nothing."""
    try:
        fields = strict_json(text_encoder_config)
    except ValueError:
        return ""  # upstream, too, takes a config it cannot read as one that says nothing
    for key in ("torch_dtype", "dtype"):
        if isinstance(fields.get(key), str) and fields[key]:
            return str(fields[key])
    return ""
