"""Tiny pipelines of every supported family: how each is built, saved, loaded and run.

A pipeline is built from configurations and seeded random weights, because nothing can be downloaded where the
tests run, and saved by `save_pretrained`, so the folder is what diffusers itself writes: its file names, its
shards, its indexes. Two loads of equal bytes give equal images. Another sign in any one tensor gives another
image, but for what text-to-image never reads: the autoencoder's encoder, the safety checker, and text encoder
layers above the one whose hidden states are taken (tried once with every tensor; byte comparison covers
those).

torch, diffusers and transformers take five seconds to import. They are imported by the functions that need
them, so that this module's list can be read while tests are collected.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# diffusers has no types to check against: a pipeline is Any, and making one an untyped call.
# mypy: allow-untyped-calls

_SIDE = 32  # Pixels. Every autoencoder here halves the image once, so latents are 16 by 16.
_VARIANT_SEED = 900
_PAIR_SEED = 700  # Text encoder and autoencoder of the two Z-Image pipelines.


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """Further weights in a model folder, loaded with `from_pretrained(variant=…)`.

    Attributes:
        dtype: the torch dtype that the weights are saved and loaded in.
        only: the one component that has the variant, with weights of its own; None if all have it, with the
            default weights cast to `dtype`.
    """

    dtype: str
    only: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyPipeline:
    """One model folder to import.

    Attributes:
        name: the folder's name, and the model's name in the store under the namespace `org`.
        assemble: makes the pipeline in float32; gets an empty folder to write tokenizer sources into.
        dtype: the torch dtype of the default weights, as they are saved and loaded.
        variants: further weights in the same folder, by name.
        max_shard_size: what save_pretrained may put into one file, `1MB` say; None for its default.
        arguments: what `__call__` needs beyond prompt, size and steps.
        strays: files put into the folder besides, as model repositories have them; path to content.
    """

    name: str
    assemble: Callable[[Path], Any]
    dtype: str
    variants: Mapping[str, Variant] = field(default_factory=dict)
    max_shard_size: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    strays: Mapping[str, bytes] = field(default_factory=dict)

    def build(self, folder: Path) -> None:
        """Writes the model into `folder`, the same bytes each time."""
        import torch

        with tempfile.TemporaryDirectory() as scratch:
            pipeline = self.assemble(Path(scratch))
            pipeline.to(dtype=getattr(torch, self.dtype))
            pipeline.save_pretrained(folder, max_shard_size=self.max_shard_size)
            # After the default weights: saving those removes any shard whose name begins like theirs.
            for name, variant in self.variants.items():
                _save_variant(pipeline, folder, name, variant, self.max_shard_size)
            _add_tokenizer_sources(Path(scratch), folder)
        for path, content in {**_REPOSITORY_FILES, **self.strays}.items():
            (folder / path).write_bytes(content)

    def run(self, folder: Path | str, **load: Any) -> torch.Tensor:
        """Loads the pipeline with `from_pretrained(folder, **load)` and returns its image, (1, 3, 32, 32)."""
        import torch
        from diffusers import DiffusionPipeline

        from .tiny_tokenizers import PROMPT

        variant = load.get("variant")
        dtype = self.dtype if variant is None else self.variants[variant].dtype
        pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=getattr(torch, dtype), **load)
        pipeline.set_progress_bar_config(disable=True)
        image: torch.Tensor = pipeline(
            prompt=PROMPT,
            height=_SIDE,
            width=_SIDE,
            num_inference_steps=2,
            output_type="pt",
            generator=torch.Generator().manual_seed(1),
            **self.arguments,
        ).images
        return image


def _stable_diffusion(scratch: Path) -> Any:
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    from . import tiny_models, tiny_tokenizers

    tokenizer = tiny_tokenizers.clip_tokenizer(scratch / "tokenizer")
    return StableDiffusionPipeline(
        vae=tiny_models.vae(101, latent_channels=4, quant_conv=True),
        text_encoder=tiny_models.clip_text(tokenizer, 102, projection=False),
        tokenizer=tokenizer,
        unet=tiny_models.sd15_unet(103),
        scheduler=PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            steps_offset=1,
        ),
        safety_checker=tiny_models.safety_checker(104),
        feature_extractor=tiny_models.image_processor(),
    )


def _stable_diffusion_xl(scratch: Path) -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    from . import tiny_models, tiny_tokenizers

    tokenizer = tiny_tokenizers.clip_tokenizer(scratch / "tokenizer")
    tokenizer_2 = tiny_tokenizers.clip_tokenizer(scratch / "tokenizer_2")
    return StableDiffusionXLPipeline(
        vae=tiny_models.vae(201, latent_channels=4, quant_conv=True),
        text_encoder=tiny_models.clip_text(tokenizer, 202, projection=False),
        text_encoder_2=tiny_models.clip_text(tokenizer_2, 203, projection=True),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=tiny_models.sdxl_unet(204),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
    )


def _stable_diffusion_3(scratch: Path) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    from . import tiny_models, tiny_tokenizers

    tokenizer = tiny_tokenizers.clip_tokenizer(scratch / "tokenizer")
    tokenizer_2 = tiny_tokenizers.clip_tokenizer(scratch / "tokenizer_2")
    tokenizer_3 = tiny_tokenizers.t5_tokenizer(scratch / "tokenizer_3")
    return StableDiffusion3Pipeline(
        transformer=tiny_models.sd3_transformer(301),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_models.vae(302),
        text_encoder=tiny_models.clip_text(tokenizer, 303, projection=True),
        tokenizer=tokenizer,
        text_encoder_2=tiny_models.clip_text(tokenizer_2, 304, projection=True),
        tokenizer_2=tokenizer_2,
        text_encoder_3=tiny_models.t5_encoder(tokenizer_3, 305),
        tokenizer_3=tokenizer_3,
    )


def _flux(scratch: Path) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    from . import tiny_models, tiny_tokenizers

    tokenizer = tiny_tokenizers.clip_tokenizer(scratch / "tokenizer")
    tokenizer_2 = tiny_tokenizers.t5_tokenizer(scratch / "tokenizer_2")
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=tiny_models.vae(401),
        text_encoder=tiny_models.clip_text(tokenizer, 402, projection=False),
        tokenizer=tokenizer,
        text_encoder_2=tiny_models.t5_encoder(tokenizer_2, 403),
        tokenizer_2=tokenizer_2,
        transformer=tiny_models.flux_transformer(404),
    )


_KLEIN_TEXT_LAYERS = (1, 2)


def _flux2_klein(scratch: Path) -> Any:
    import transformers
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline

    from . import tiny_models, tiny_tokenizers

    tokenizer = tiny_tokenizers.qwen_tokenizer(scratch / "tokenizer")
    text_encoder = transformers.Qwen3ForCausalLM(tiny_models.qwen3_config(tokenizer))
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=tiny_models.flux2_vae(501),
        text_encoder=tiny_models.seeded(text_encoder, 502),
        tokenizer=tokenizer,
        transformer=tiny_models.flux2_transformer(503, text_layers=len(_KLEIN_TEXT_LAYERS)),
        is_distilled=True,
    )


def _z_image(scratch: Path, *, transformer_seed: int) -> Any:
    import transformers
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline

    from . import tiny_models, tiny_tokenizers

    tokenizer = tiny_tokenizers.qwen_tokenizer(scratch / "tokenizer")
    text_encoder = transformers.Qwen3Model(tiny_models.qwen3_config(tokenizer))
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_models.vae(_PAIR_SEED),
        text_encoder=tiny_models.seeded(text_encoder, _PAIR_SEED + 1),
        tokenizer=tokenizer,
        transformer=tiny_models.z_image_transformer(transformer_seed),
    )


def _save_variant(pipeline: Any, folder: Path, name: str, variant: Variant, max_shard_size: str | None) -> None:
    import torch

    from .tiny_models import seeded

    dtype = getattr(torch, variant.dtype)
    if variant.only is None:
        pipeline.to(dtype=dtype).save_pretrained(folder, variant=name, max_shard_size=max_shard_size)
    else:
        component = seeded(getattr(pipeline, variant.only), _VARIANT_SEED).to(dtype)
        component.save_pretrained(folder / variant.only, variant=name)


def _add_tokenizer_sources(scratch: Path, folder: Path) -> None:
    """Puts vocab.json, merges.txt, spiece.model beside tokenizer.json, where repositories have them.

    transformers 5 no longer writes them; older readers, and the models already published, have them.
    """
    for source in scratch.glob("tokenizer*/*"):
        (folder / source.relative_to(scratch)).write_bytes(source.read_bytes())


_REPOSITORY_FILES: Mapping[str, bytes] = {
    "README.md": "---\nlibrary_name: diffusers\n---\n# Tiny – a model for tests\n".encode(),
    ".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n",
}

# One tensor, `w`, of four zero bytes, as a root-level single-file checkpoint.
_CHECKPOINT_HEADER = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
_CHECKPOINT = len(_CHECKPOINT_HEADER).to_bytes(8, "little") + _CHECKPOINT_HEADER + bytes(4)

_ALL = (
    TinyPipeline(
        name="stable-diffusion-v1-5",
        assemble=_stable_diffusion,
        dtype="float32",
        variants={"non_ema": Variant(dtype="float32", only="unet")},
        # What the published repository carries besides and an import leaves out. Not one is a real pickle.
        strays={
            "v1-5-pruned.ckpt": b"not opened by anyone",
            "v1-5-pruned-emaonly.safetensors": _CHECKPOINT,
            "text_encoder/pytorch_model.bin": b"not opened by anyone",
        },
    ),
    TinyPipeline(
        name="stable-diffusion-xl",
        assemble=_stable_diffusion_xl,
        dtype="float32",
        variants={"fp16": Variant(dtype="float16")},
        max_shard_size="1MB",
    ),
    TinyPipeline(
        name="stable-diffusion-3",
        assemble=_stable_diffusion_3,
        dtype="float16",
        arguments={"max_sequence_length": 32},
    ),
    TinyPipeline(
        name="flux-1",
        assemble=_flux,
        dtype="bfloat16",
        max_shard_size="300KB",
        arguments={"max_sequence_length": 32},
    ),
    TinyPipeline(
        name="flux-2-klein",
        assemble=_flux2_klein,
        dtype="bfloat16",
        arguments={
            "max_sequence_length": 64,
            "text_encoder_out_layers": _KLEIN_TEXT_LAYERS,
            "guidance_scale": 1.0,
        },
    ),
    TinyPipeline(
        name="z-image",
        assemble=lambda scratch: _z_image(scratch, transformer_seed=601),
        dtype="bfloat16",
        max_shard_size="200KB",
        arguments={"max_sequence_length": 64},
    ),
    # Text encoder and autoencoder are those of `z-image`, tensor for tensor, in other shards.
    TinyPipeline(
        name="z-image-turbo",
        assemble=lambda scratch: _z_image(scratch, transformer_seed=602),
        dtype="bfloat16",
        max_shard_size="120KB",
        arguments={"max_sequence_length": 64},
    ),
)

PIPELINES: Mapping[str, TinyPipeline] = {pipeline.name: pipeline for pipeline in _ALL}
PAIR = (PIPELINES["z-image"], PIPELINES["z-image-turbo"])
