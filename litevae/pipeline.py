"""A diffusers pipeline for the latent diffusion models of this project; it needs no pipeline class of diffusers."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, UNet2DModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from litevae.dit import DiT
from litevae.errors import UserError
from litevae.sampling import Seed, sampler_of


class LatentDiffusionPipeline(DiffusionPipeline):
    """Draw images from a latent diffusion model, unconditional or by class, with a UNet or a DiT.

    `LatentDiffusionPipeline.from_pretrained(folder)` reads every folder that `save_ldm` wrote. With equal noise, it
    draws the same images as `LDM.sample`.

    Args:
        scheduler: The noise levels of the objective that the network was trained with.
        unet: The denoising network, if it is a UNet or the model has no classes.
        transformer: The denoising network of a model with classes.
        vae: The autoencoder, which decodes normalised latents.
        vqvae: The same autoencoder, by the name that folders of models without classes use.
    """

    model_cpu_offload_seq = "unet->transformer->vae->vqvae"
    _optional_components: ClassVar[list[str]] = ["unet", "transformer", "vae", "vqvae"]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]

    def __init__(
        self,
        scheduler: Any,
        unet: UNet2DModel | DiT | None = None,
        transformer: UNet2DModel | DiT | None = None,
        vae: ModelMixin | None = None,
        vqvae: ModelMixin | None = None,
    ):
        super().__init__()
        if (unet is None) == (transformer is None) or (vae is None) == (vqvae is None):
            raise UserError("LatentDiffusionPipeline needs either unet or transformer, and either vae or vqvae")
        self.register_modules(scheduler=scheduler, unet=unet, transformer=transformer, vae=vae, vqvae=vqvae)
        self.image_processor = VaeImageProcessor(do_convert_rgb=False)

    @property
    def network(self) -> UNet2DModel | DiT:
        """The denoising network."""
        return self.transformer if self.unet is None else self.unet

    @property
    def autoencoder(self) -> ModelMixin:
        """The autoencoder."""
        return self.vqvae if self.vae is None else self.vae

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int] | int | None = None,
        batch_size: int = 1,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        seeds: Sequence[Seed] | None = None,
        latents: Tensor | None = None,
        sampler: str = "",
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw images.

        Args:
            class_labels: A class per image, for a model with classes; one number stands for all images of the batch.
                None draws without a class.
            batch_size: Number of images, if neither labels, seeds nor latents tell it.
            num_inference_steps: Number of steps.
            guidance_scale: Scale of classifier-free guidance; 1 is none.
            generator: Random generator of the first noise, or one per image.
            seeds: A seed per image, as `LDM.sample` takes them: an image does not depend on the others of its batch.
            latents: The first noise, (N, C, h, w), instead of a generator or seeds.
            sampler: Name of the sampler, see `litevae.sampling.sampler_of`; empty takes the model's default.
            output_type: "pil", "np", "pt" (images in [0, 1]), or "latent" (normalised latents).
            return_dict: Whether to return an `ImagePipelineOutput` instead of a tuple.
            callback_on_step_end: Called as f(pipeline, step, timestep, {"latents": x}); "latents" in what it returns
                replaces x.

        Returns:
            The images.

        Raises:
            UserError: if the arguments contradict each other or do not fit the model.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise UserError(f"output_type={output_type} does not exist; choose pil, np, pt or latent")
        network, device = self.network, self._execution_device
        counts = {len(each) for each in (seeds, latents) if each is not None}
        if class_labels is not None and not isinstance(class_labels, int):
            counts.add(len(class_labels))
        if len(counts) > 1:
            raise UserError(f"labels, seeds and latents are for {' and '.join(map(str, sorted(counts)))} images")
        count = counts.pop() if counts else batch_size
        labels = self._labels(class_labels, count, guidance_scale)
        config = network.config
        shape = (count, config.in_channels, config.sample_size, config.sample_size)
        if latents is not None:
            x = latents.to(device, torch.float32)
        elif seeds is not None:
            drawn = [np.random.default_rng(seed).standard_normal(shape[1:], np.float32) for seed in seeds]
            x = torch.from_numpy(np.stack(drawn)).to(device)
        else:
            x = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if x.shape != shape:
            raise UserError(f"latents are {tuple(x.shape)}, but the model's are {shape}")

        stepper = sampler_of(self.scheduler, sampler, num_inference_steps)
        # The network takes times on the scale of the training; diffusers' samplers of flow use other units.
        flow = self.scheduler.config.prediction_type == "flow_prediction"
        times = stepper.sigmas[:-1] * self.scheduler.config.num_train_timesteps if flow else stepper.timesteps
        with self.progress_bar(total=len(times)) as bar:
            for number, (time, step) in enumerate(zip(times, stepper.timesteps, strict=True)):
                x = stepper.step(self._predict(x, time, labels, guidance_scale), step, x).prev_sample
                if callback_on_step_end is not None:
                    x = (callback_on_step_end(self, number, step, {"latents": x}) or {}).get("latents", x)
                bar.update()
        images: Any = x
        if output_type != "latent":
            vae = self.autoencoder
            decoded = vae.decode((x / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0].float()
            images = self.image_processor.postprocess(decoded, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _labels(self, labels: Sequence[int] | int | None, count: int, guidance: float) -> Tensor | None:
        """Return the labels (N,) for the network, of "no class" where none are given; None without classes."""
        embedded = self.network.config.num_class_embeds
        if not embedded:
            if labels is not None or guidance != 1:
                raise UserError("the model is unconditional: neither classes nor guidance can be given")
            return None
        if labels is None and guidance != 1:
            raise UserError(f"guidance_scale={guidance:g} needs class_labels")
        given = [embedded - 1 if labels is None else labels] * count if not isinstance(labels, Sequence) else [*labels]
        if wrong := [label for label in given if not 0 <= label < embedded]:
            raise UserError(f"class {wrong[0]} does not exist: the network knows 0 to {embedded - 1}")
        return torch.tensor(given, device=self._execution_device)

    def _predict(self, x: Tensor, time: Tensor, labels: Tensor | None, guidance: float) -> Tensor:
        """Return the network's prediction in fp32, with guidance."""
        network = self.network
        own = x.to(network.dtype)
        if labels is None:
            return network(own, time).sample.float()
        if guidance == 1:
            return network(own, time, class_labels=labels).sample.float()
        both = torch.cat([labels, torch.full_like(labels, network.config.num_class_embeds - 1)])
        given, free = network(torch.cat([own, own]), time, class_labels=both).sample.float().chunk(2)
        return free + guidance * (given - free)
