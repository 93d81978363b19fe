"""LiteVAE as `vae=` in pipelines of diffusers, tiny random ones: text to image, img2img and inpaint.

The denoisers' last layers are zero, so that each pipeline has a closed form: what it draws is computed here by hand,
from one encoding, one noise and one decoding, with the statistics of the latents as that pipeline uses them.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from litevae.autoencoder import LiteVAE

SCALE, SHIFT = 0.6, 0.4
MEAN, STD = [0.3, -0.2, 0.1, 0.5], [1.5, 0.7, 1.2, 0.9]
SIZE = {"height": 64, "width": 64}
QUIET = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "pt"}


def tiny_vae(channels: int = 4, **config: Any) -> LiteVAE:
    torch.manual_seed(0)
    config = {"scaling_factor": SCALE} | config
    vae = LiteVAE("S", channels, block_out_channels=(8, 8, 16, 16), layers_per_block=1, **config).eval()
    with torch.no_grad():  # images that are neither grey nor clipped
        vae.decoder.conv_out.weight *= 0.3 / vae.decode(torch.randn(1, channels, 8, 8)).sample.std()
        vae.decoder.conv_out.bias.zero_()
    return vae


def silent(denoiser: torch.nn.Module, last: str) -> torch.nn.Module:
    """Make a denoiser predict zeros, whatever it sees; it still refuses inputs of another dtype or shape."""
    for parameter in denoiser.get_submodule(last).parameters():
        torch.nn.init.zeros_(parameter)
    return denoiser.eval()


def unet(**more: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, cross_attention_dim=16,
        attention_head_dim=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **more,
    )  # fmt: skip


def ddim() -> DDIMScheduler:
    return DDIMScheduler(beta_end=0.002, clip_sample=False)


def sd_parts() -> dict[str, Any]:
    text = CLIPTextConfig(
        vocab_size=100, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    return {
        "unet": silent(unet(), "conv_out"), "text_encoder": CLIPTextModel(text).eval(), "tokenizer": None,
        "scheduler": ddim(), "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False,
    }  # fmt: skip


def sdxl_parts() -> dict[str, Any]:
    model = unet(
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 16
    )
    nothing = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return nothing | {"unet": silent(model, "conv_out"), "scheduler": ddim()}


def sd3_parts() -> dict[str, Any]:
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=16, out_channels=16, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=16, pooled_projection_dim=16,
    )  # fmt: skip
    nothing = dict.fromkeys(f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3"))
    return nothing | {"transformer": silent(model, "proj_out"), "scheduler": FlowMatchEulerDiscreteScheduler()}


def flux_parts() -> dict[str, Any]:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=1,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    nothing = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return nothing | {"transformer": silent(model, "proj_out"), "scheduler": FlowMatchEulerDiscreteScheduler()}


def plain(latents: Tensor) -> Tensor:
    return latents


def by_channel(values: list[float]) -> Tensor:
    return torch.tensor(values).view(1, -1, 1, 1)


class Family(NamedTuple):
    """Pipelines of one kind, and how they scale latents and bring them back.

    Attributes:
        scaled: from the autoencoder's latents to the denoiser's.
        raw: back.
        config: The autoencoder's.
        inpaint_scaled: `scaled` of the inpaint pipeline, where it differs; likewise `inpaint_raw`.
    """

    text: type
    img2img: type
    inpaint: type
    parts: Callable[[], dict[str, Any]]
    scaled: Callable[[Tensor], Tensor]
    raw: Callable[[Tensor], Tensor]
    config: dict[str, Any]
    channels: int = 4
    inpaint_scaled: Callable[[Tensor], Tensor] | None = None
    inpaint_raw: Callable[[Tensor], Tensor] | None = None


def times(z: Tensor) -> Tensor:
    return z * SCALE


def over(z: Tensor) -> Tensor:
    return z / SCALE


def shifted(z: Tensor) -> Tensor:
    return (z - SHIFT) * SCALE


def unshifted(z: Tensor) -> Tensor:
    return z / SCALE + SHIFT


def normalised(z: Tensor) -> Tensor:
    return (z - by_channel(MEAN)) * SCALE / by_channel(STD)


def denormalised(z: Tensor) -> Tensor:
    return z * by_channel(STD) / SCALE + by_channel(MEAN)


SDXL = (StableDiffusionXLPipeline, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline)
STATISTICS = {"latents_mean": MEAN, "latents_std": STD, "shift_factor": SHIFT}
FAMILIES = {
    "sd": Family(
        StableDiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, sd_parts, times, over,
        STATISTICS,
    ),
    "sdxl": Family(*SDXL, sdxl_parts, times, over, {}),
    # diffusers' inpaint pipeline brings latents back with the channels' statistics, but scales without them.
    "sdxl-statistics": Family(*SDXL, sdxl_parts, normalised, denormalised, STATISTICS, inpaint_scaled=times),
    # diffusers' inpaint pipeline subtracts the shift and does not add it again before it decodes.
    "sd3": Family(
        StableDiffusion3Pipeline, StableDiffusion3Img2ImgPipeline, StableDiffusion3InpaintPipeline, sd3_parts, shifted,
        unshifted, {"shift_factor": SHIFT}, 16, inpaint_raw=over,
    ),
    "flux": Family(
        FluxPipeline, FluxImg2ImgPipeline, FluxInpaintPipeline, flux_parts, shifted, unshifted,
        {"shift_factor": SHIFT}, 16,
    ),
}  # fmt: skip


def built(kind: type, parts: dict[str, Any], vae: LiteVAE, dtype: torch.dtype) -> Any:
    more = {"add_watermarker": False} if "XL" in kind.__name__ and "Inpaint" not in kind.__name__ else {}
    pipeline = kind(**parts, vae=vae, **more).to(dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(pipeline: Any, images: int = 1, **options: Any) -> Tensor:
    """Run a pipeline with random embeddings for prompts, so that no tokenizer is needed."""
    dtype = pipeline.vae.dtype
    words = torch.randn(images, 5, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    pooled = {} if "text_encoder_2" not in pipeline.components else {"pooled_prompt_embeds": words[:, 0]}
    options = QUIET | {"generator": torch.Generator().manual_seed(3)} | options
    return pipeline(prompt_embeds=words, **pooled, **options).images.float()


def picture() -> Tensor:
    rows = torch.linspace(0, 1, 64)
    return torch.stack([rows.expand(64, 64), rows.expand(64, 64).T, torch.full((64, 64), 0.3)])[None]


def right_half() -> Tensor:
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 32:] = 1
    return mask


def latent_noise(family: Family, given: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.randn(1, family.channels, 8, 8, generator=given, dtype=dtype).float()


def decoded(vae: LiteVAE, latents: Tensor) -> Tensor:
    with torch.no_grad():
        return (vae.decode(latents.to(vae.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)


def final_level(scheduler: Any, noise: Tensor, clean: Tensor | None) -> Tensor:
    """Return where latents end that no step changes: x / sqrt(alpha) in DDIM, and x itself in flow matching."""
    begin = 0 if clean is None else 2  # strength 0.5 of 4 steps
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        sigma = scheduler.sigmas[begin]
        return noise if clean is None else sigma * noise + (1 - sigma) * clean
    alpha = scheduler.alphas_cumprod[scheduler.timesteps[begin]]
    return noise / alpha.sqrt() if clean is None else clean + ((1 - alpha) / alpha).sqrt() * noise


def expected(family: Family, call: str, vae: LiteVAE, scheduler: Any, dtype: torch.dtype) -> Tensor:
    """Compute what a pipeline of the family draws."""
    given = torch.Generator().manual_seed(3)
    if call == "text":
        return decoded(vae, family.raw(final_level(scheduler, latent_noise(family, given, dtype), None)))
    with torch.no_grad():
        mean, logvar = vae.encode((picture() * 2 - 1).to(vae.dtype)).latent_dist.parameters.chunk(2, dim=1)
    z = mean + (logvar / 2).exp() * latent_noise(family, given, torch.float32)
    inpaint = call == "inpaint"
    clean = ((inpaint and family.inpaint_scaled) or family.scaled)(z)
    latents = final_level(scheduler, latent_noise(family, given, dtype), clean)
    if inpaint:
        mask = right_half()[..., ::8, ::8]
        latents = (1 - mask) * clean + mask * latents
    return decoded(vae, ((inpaint and family.inpaint_raw) or family.raw)(latents))


def options_of(call: str, family: Family) -> dict[str, Any]:
    if call == "text":
        return SIZE
    given = {"image": picture(), "strength": 0.5}
    if call == "inpaint":
        return given | SIZE | {"mask_image": right_half()}
    return given | SIZE if family.img2img is FluxImg2ImgPipeline else given  # Flux's default is 1024 px


CALLS = ["text", "img2img", "inpaint"]
# The largest difference of a pixel in [0, 1]; bf16 rounds latents and activations to 8 bits, in another order.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.03}


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_pipeline_draws_what_its_formula_says(name, call, dtype):
    family = FAMILIES[name]
    vae = tiny_vae(family.channels, **family.config)
    pipeline = built(getattr(family, call), family.parts(), vae, dtype)
    images = drawn(pipeline, **options_of(call, family))
    wanted = expected(family, call, vae, pipeline.scheduler, dtype)
    assert wanted.std() > 0.05
    assert ((wanted > 0) & (wanted < 1)).float().mean() > 0.5
    torch.testing.assert_close(images, wanted, atol=TOLERANCES[dtype], rtol=0)
    assert vae.dtype == dtype


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("name", "wrong"),
    [("sd", {"scaling_factor": SCALE * 1.1}), ("sdxl", {"scaling_factor": SCALE * 1.1}),
     ("sdxl-statistics", {"latents_mean": [0.32, *MEAN[1:]]}), ("sdxl-statistics", {"latents_std": [1.53, *STD[1:]]}),
     ("sd3", {"scaling_factor": SCALE * 1.1}), ("sd3", {"shift_factor": SHIFT + 0.02}),
     ("flux", {"scaling_factor": SCALE * 1.1}), ("flux", {"shift_factor": SHIFT + 0.02})],
)  # fmt: skip
def test_another_statistic_draws_another_image(name, wrong, call):
    """The comparison above sees a wrong statistic: an error of 10 % in the scale, or 0.02 in the shift or a mean."""
    if call == "img2img" and "latents_mean" in wrong:
        pytest.skip("encoding and decoding undo each other's shift by a mean, whatever it is")
    family = FAMILIES[name]
    vae = tiny_vae(family.channels, **family.config | wrong)
    pipeline = built(getattr(family, call), family.parts(), vae, torch.float32)
    images = drawn(pipeline, **options_of(call, family))
    wanted = expected(family, call, vae, pipeline.scheduler, torch.float32)
    assert (images - wanted).abs().max() > 10 * TOLERANCES[torch.float32]


@pytest.mark.parametrize("conv1x1", [False, True], ids=["plain", "conv1x1"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("call", CALLS)
def test_sdxl_upcasts(call, dtype, conv1x1):
    """With `force_upcast`, SDXL encodes in fp32, and decodes in fp32 what was fp16; then the weights are fp16 again."""
    family = FAMILIES["sdxl"]
    vae = tiny_vae(conv1x1=conv1x1, force_upcast=True).to(dtype)
    exact = copy.deepcopy(vae).float()
    pipeline = built(getattr(family, call), family.parts(), vae, dtype)
    seen = []
    for layer in (vae.encoder, vae.decoder):
        layer.register_forward_pre_hook(lambda module, args: seen.append(next(module.parameters()).dtype))
    images = drawn(pipeline, **options_of(call, family))
    decodes = torch.float32 if dtype == torch.float16 else dtype
    assert seen == [torch.float32] * (len(seen) - 1) + [decodes]
    assert len(seen) == {"text": 1, "img2img": 2, "inpaint": 3}[call]  # inpaint encodes the masked image too
    wanted = expected(family, call, exact, pipeline.scheduler, dtype)
    torch.testing.assert_close(images, wanted, atol=5e-3 if dtype == torch.float16 else 0.03, rtol=0)
    assert vae.dtype == dtype


def test_slicing_through_a_pipeline():
    family, sizes = FAMILIES["sd"], []
    pipeline = built(family.text, family.parts(), tiny_vae(), torch.float32)
    whole = drawn(pipeline, images=3, **SIZE)
    pipeline.vae.enable_slicing()
    pipeline.vae.decoder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    torch.testing.assert_close(drawn(pipeline, images=3, **SIZE), whole, atol=1e-5, rtol=0)
    assert sizes == [1, 1, 1]


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_tiling_through_a_pipeline(name):
    family, sizes = FAMILIES[name], []
    vae = tiny_vae(family.channels, **family.config)
    pipeline = built(family.img2img, family.parts(), vae, torch.float32)
    whole = drawn(pipeline, **options_of("img2img", family))
    pipeline.vae.enable_tiling(tile_sample_min_size=32, tile_overlap_factor=0.5)
    for layer in (vae.encoder, vae.decoder):
        layer.register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape[-2:])))
    images = drawn(pipeline, **options_of("img2img", family))
    assert set(sizes) == {(32, 32), (4, 4)}
    assert images.shape == whole.shape
    wanted = expected(family, "img2img", vae, pipeline.scheduler, torch.float32)
    torch.testing.assert_close(images, wanted, atol=1e-5, rtol=0)
    assert (images - whole).abs().max() > 1e-4  # tiles have their own statistics of group normalisation


HALF_ARE_SLOW = [
    torch.float32,
    *(pytest.param(half, marks=pytest.mark.slow) for half in (torch.bfloat16, torch.float16)),
]


@pytest.mark.parametrize("dtype", HALF_ARE_SLOW, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("script", ["train_text_to_image", "train_text_to_image_sdxl"])
def test_a_training_step_as_in_the_scripts_of_diffusers(tmp_path, script, dtype):
    """What the two scripts ask of `vae`: a subfolder, a frozen model in the weights' dtype, latents for the U-Net."""
    tiny_vae().save_pretrained(tmp_path / "vae")
    vae = LiteVAE.from_pretrained(tmp_path, subfolder="vae", revision=None, variant=None)
    vae.requires_grad_(False)
    vae.to("cpu", dtype=dtype)
    images = torch.cat([picture(), 1 - picture()]) * 2 - 1
    given = torch.Generator().manual_seed(3)
    torch.manual_seed(5)
    if script.endswith("sdxl"):
        with torch.no_grad():  # `compute_vae_encodings`, once for the whole data set
            latents = vae.encode(
                images.to(memory_format=torch.contiguous_format).float().to(dtype)
            ).latent_dist.sample()
        latents = (latents * vae.config.scaling_factor).cpu()
        added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
        model = unet(**added, projection_class_embeddings_input_dim=64)
        conditions = {"text_embeds": torch.zeros(2, 16), "time_ids": torch.zeros(2, 6)}
    else:
        latents = vae.encode(images.to(dtype)).latent_dist.sample() * vae.config.scaling_factor
        model, conditions = unet(), None
    assert latents.dtype == dtype
    with torch.no_grad():
        mean, logvar = vae.encode(images.to(dtype)).latent_dist.parameters.chunk(2, dim=1)
    torch.manual_seed(5)
    wanted = (mean + (logvar / 2).exp() * torch.randn(mean.shape)) * SCALE
    torch.testing.assert_close(latents.float(), wanted, atol=1e-5 if dtype == torch.float32 else 0.02, rtol=0.01)

    scheduler = DDPMScheduler()
    noise = torch.randn(latents.shape, generator=given).to(dtype)
    steps = torch.tensor([100, 900])
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        noisy = scheduler.add_noise(latents, noise, steps)
        predicted = model(noisy, steps, torch.zeros(2, 5, 16), added_cond_kwargs=conditions).sample
    loss = torch.nn.functional.mse_loss(predicted.float(), noise.float())
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad is None for parameter in vae.parameters())
    assert model.conv_in.weight.grad.abs().sum() > 0
