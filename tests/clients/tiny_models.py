"""Components of the supported pipelines, a few hundred kilobytes each, with seeded weights.

Widths are multiples of 64, so that each weight matrix could also be quantized with every group size of the
store. The topology follows the released models (which encoder, which blocks, which buffers); only the sizes
are small.
"""

import math
from typing import Any

import torch
import transformers
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

WIDTH = 64
T5_WIDTH = 128  # SD3 pads the two concatenated CLIP embeddings (2 * WIDTH) up to T5's width, never down.
LATENT_CHANNELS = 16

# diffusers has no types to check against: its classes are Any, or untyped calls.
# mypy: allow-untyped-calls


def seeded(model: Any, seed: int) -> Any:
    """Gives every parameter of `model` its own seeded values, and returns the model in eval mode.

    diffusers leaves some parameters uninitialised (Z-Image's pad tokens are `torch.empty`), sets others to
    zero (so that whole blocks would have no effect on the output), and gives equal values to all norms. Here
    a parameter that is missing, swapped or damaged changes the output.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                values /= math.sqrt(parameter[0].numel())
            else:
                values = 0.1 * values + (0.0 if name.endswith("bias") else 1.0)
            parameter.copy_(values)
    return model.eval()


def clip_text(tokenizer: Any, seed: int, *, projection: bool) -> Any:
    """A CLIP text encoder; with `projection`, the class that has a `text_projection`."""
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return seeded(kind(config), seed)


def t5_encoder(tokenizer: Any, seed: int) -> Any:
    config = transformers.T5Config(
        vocab_size=len(tokenizer),
        d_model=T5_WIDTH,
        d_ff=2 * T5_WIDTH,
        d_kv=64,
        num_heads=2,
        num_layers=2,
        feed_forward_proj="gated-gelu",
    )
    return seeded(transformers.T5EncoderModel(config), seed)


def qwen3_config(tokenizer: Any) -> transformers.Qwen3Config:
    return transformers.Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )


def safety_checker(seed: int) -> Any:
    """A safety checker that looks at every image and passes all of them.

    A concept counts as seen when its cosine similarity exceeds its weight; a weight above one is never
    exceeded. A flagged image would be black, and black images are all alike.
    """
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "projection_dim": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 16,
    }
    config = transformers.CLIPConfig(vision_config=vision, projection_dim=WIDTH)
    model = seeded(StableDiffusionSafetyChecker(config), seed)
    with torch.no_grad():
        model.concept_embeds_weights.fill_(1.5)
        model.special_care_embeds_weights.fill_(1.5)
    return model


def image_processor() -> Any:
    # The PIL one by name: the plain name resolves to it without torchvision, with a warning.
    return transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def vae(seed: int, *, latent_channels: int = LATENT_CHANNELS, quant_conv: bool = False) -> Any:
    """An autoencoder that halves the image size once."""
    model = AutoencoderKL(
        **_autoencoder(latent_channels, quant_conv),
        scaling_factor=0.3611,
        shift_factor=None if quant_conv else 0.1159,
    )
    return seeded(model, seed)


def flux2_vae(seed: int) -> Any:
    """FLUX.2's autoencoder: its batch norm adds buffers, one of them a 64-bit integer without dimensions."""
    model = seeded(AutoencoderKLFlux2(**_autoencoder(LATENT_CHANNELS, True)), seed)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        mean, variance = model.bn.running_mean, model.bn.running_var
        assert mean is not None
        assert variance is not None
        mean.copy_(0.1 * torch.randn(mean.shape, generator=generator))
        variance.copy_(1 + 0.1 * torch.rand(variance.shape, generator=generator))
    return model


def sd15_unet(seed: int) -> Any:
    model = UNet2DConditionModel(
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, WIDTH),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
    )
    return seeded(model, seed)


def sdxl_unet(seed: int) -> Any:
    """SDXL's: linear projections, and size conditioning (six numbers) beside the pooled text embedding."""
    time_ids_width = 8
    model = UNet2DConditionModel(
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, WIDTH),
        layers_per_block=1,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=time_ids_width,
        projection_class_embeddings_input_dim=6 * time_ids_width + WIDTH,
        cross_attention_dim=2 * WIDTH,
    )
    return seeded(model, seed)


def sd3_transformer(seed: int) -> Any:
    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    return seeded(model, seed)


def flux_transformer(seed: int) -> Any:
    model = FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    return seeded(model, seed)


def flux2_transformer(seed: int, *, text_layers: int) -> Any:
    """Klein's transformer reads `text_layers` hidden states of the text encoder, side by side."""
    model = Flux2Transformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=text_layers * WIDTH,
        timestep_guidance_channels=WIDTH,
        axes_dims_rope=(8, 8, 8, 8),
        guidance_embeds=False,
    )
    return seeded(model, seed)


def z_image_transformer(seed: int) -> Any:
    model = ZImageTransformer2DModel(
        in_channels=LATENT_CHANNELS,
        dim=WIDTH,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[8, 12, 12],
        axes_lens=[512, 32, 32],
    )
    return seeded(model, seed)


def _autoencoder(latent_channels: int, quant_conv: bool) -> dict[str, Any]:
    return {
        "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
        "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
        "block_out_channels": (32, WIDTH),
        "layers_per_block": 1,
        "latent_channels": latent_channels,
        "sample_size": 32,
        "use_quant_conv": quant_conv,
        "use_post_quant_conv": quant_conv,
    }
