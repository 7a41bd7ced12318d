"""Class-conditional latent diffusion, which diffusers has no pipeline for: a class is a token that the UNet
attends to.
"""

import inspect
from typing import Any

import diffusers
import torch
from diffusers import (
    ConfigMixin,
    DDIMScheduler,
    DiffusionPipeline,
    ImagePipelineOutput,
    ModelMixin,
    UNet2DConditionModel,
    VQModel,
)
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn


class ClassEmbedder(ModelMixin, ConfigMixin):
    """Embeds class labels; the last class stands for none."""

    @register_to_config
    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes, width)

    def forward(self, labels: Tensor) -> Tensor:
        """Return one token `[N, 1, width]` for each label `[N]`."""
        return self.embedding(labels)[:, None]


class LatentClassPipeline(DiffusionPipeline):
    """Draws images of classes with latent diffusion (Rombach et al., 2022).

    Args:
        vqvae: the first stage, quantizing or not.
        unet: predicts the noise in latents, attending to the class.
        scheduler: any of diffusers'.
        class_embedder: gives the token of a class.
    """

    def __init__(
        self,
        vqvae: VQModel,
        unet: UNet2DConditionModel,
        scheduler: DDIMScheduler,
        class_embedder: ClassEmbedder,
    ) -> None:
        super().__init__()
        self.register_modules(vqvae=vqvae, unet=unet, scheduler=scheduler, class_embedder=class_embedder)

    @property
    def num_classes(self) -> int:
        """The number of classes, without the last, which stands for none."""
        return int(self.class_embedder.config.num_classes) - 1

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int],
        guidance_scale: float = 3.0,
        eta: float = 0.0,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Draw one image for each class label, with classifier-free guidance where `guidance_scale` is not 1;
        diffusers' signature.
        """
        labels = torch.tensor(class_labels, device=self.device)
        guided = guidance_scale != 1.0
        tokens = self.class_embedder(
            torch.cat([torch.full_like(labels, self.num_classes), labels]) if guided else labels
        )
        size, channels = self.unet.config.sample_size, self.unet.config.in_channels
        latents = randn_tensor(
            (len(labels), channels, size, size), generator=generator, device=self.device, dtype=tokens.dtype
        )
        self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        latents = latents * self.scheduler.init_noise_sigma
        accepted = inspect.signature(self.scheduler.step).parameters
        options = {
            name: value for name, value in (("eta", eta), ("generator", generator)) if name in accepted
        }
        for timestep in self.progress_bar(self.scheduler.timesteps):
            scaled = self.scheduler.scale_model_input(
                torch.cat([latents, latents]) if guided else latents, timestep
            )
            noise = self.unet(scaled, timestep, encoder_hidden_states=tokens).sample
            if guided:
                without, towards = noise.chunk(2)
                noise = without + guidance_scale * (towards - without)
            latents = self.scheduler.step(noise, timestep, latents, **options).prev_sample
        images = self.vqvae.decode(latents / self.vqvae.config.scaling_factor).sample
        array = (images / 2 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).float().numpy()
        drawn = self.numpy_to_pil(array) if output_type == "pil" else array
        return ImagePipelineOutput(images=drawn) if return_dict else (drawn,)


# A pipeline directory names its class, which diffusers looks up in itself.
diffusers.LatentClassPipeline = LatentClassPipeline
