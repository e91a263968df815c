"""DBAE: encoder, endpoint decoder and denoising UNet around one diffusion bridge."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn

from .bridge import Bridge
from .encoder import Encoder, reparameterise, split_stats
from .endpoint import EndpointDecoder
from .errors import UserError
from .layers import Stage
from .precision import autocast, choose, require_compiler
from .presets import ModelConfig, get_preset
from .sampling import FEW, Samples, best_with_few, sample
from .unet import UNet


class DBAE(nn.Module):
    """A diffusion bridge autoencoder (Kim et al., ICLR 2025, arXiv 2405.17111).

    Images are float tensors (N, 3, S, S) in [−1, 1], with S = config.image_size. Submodules:
    `encoder`, `endpoint` (z → x_T) and `unet`; `bridge` holds the mathematics between them.
    `precision`, set by `accelerate`, is that of the methods; a network called by itself has none.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # What the weights' file says of its images (`ImageDataset.describe`); set when loaded.
        self.trained_on: dict[str, Any] | None = None
        self.precision = "fp32"
        self.bridge = Bridge(
            schedule=config.schedule,
            sigma_data=config.sigma_data,
            sigma_data_end=config.end_data,
            cov_xy=config.cov_xy,
            weight_schedule=config.weight_schedule,
        )
        size, latent, blocks = config.image_size, config.latent_dim, config.num_res_blocks
        self.unet = UNet(
            size, config.num_channels, latent, blocks, config.attention_resolutions, config.dropout
        )
        out_dim = 2 * latent if config.stochastic else latent
        self.encoder = Encoder(size, config.num_channels, out_dim, blocks)
        self.endpoint = EndpointDecoder(size, latent, config.endpoint_width)
        # The order in memory that convolutions and attention are fastest in; files have the usual.
        for network in (self.unet, self.encoder):
            network.to(memory_format=torch.channels_last)

    def accelerate(self, precision: str = "auto", compile: bool = False) -> DBAE:
        """Choose how this model computes, where it is now; returns it.

        Args:
            precision: "fp32", "bf16", "fp16" (by autocast; weights stay float32), or "auto", the
                fastest that is safe on the device (`dbae.precision.choose`).
            compile: compile the three networks in place (`torch.compile`), at their first call for
                each shape, which takes minutes on a CPU. Copies of the model are not compiled.

        Raises UserError for a precision that the device lacks, and where nothing can be compiled.
        """
        device = next(self.parameters()).device
        self.precision = choose(precision, device)
        if compile:
            require_compiler(device)
            for network in (self.unet, self.encoder, self.endpoint):
                network.compile()
        return self

    def checkpoint_activations(self) -> None:
        """Keep only what enters each stage of UNet and encoder; compute the rest again backwards.

        Training then needs much less memory, for about a third more time (Chen et al. 2016, arXiv
        1604.06174). Gradients are the same.
        """
        for module in self.modules():
            if isinstance(module, Stage):
                module.recompute = True

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which this model computes.

        Within one context weights are cast once only, so that it should span many calls.
        """
        return autocast(self.precision, next(self.parameters()).device)

    # Image → z → x_T ----------------------------------------------------------------------

    def encode_stats(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        """(μ, log σ) of a stochastic encoder, each (N, latent_dim) in (−5, 5).

        z = μ + (exp(log σ) + 0.01) ε. Raises UserError for a deterministic model.
        """
        if not self.config.stochastic:
            raise UserError("encode_stats: this model's encoder is deterministic; use encode")
        return split_stats(self._encoded(x0))

    def encode(
        self,
        x0: Tensor,
        *,
        mean: bool = False,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Images → z (N, latent_dim).

        A deterministic encoder's output; of a stochastic one a sample, drawn with `generator`
        or from the given ε in `noise` (N, latent_dim), or the mean μ if `mean`.
        """
        if not self.config.stochastic:
            return self._encoded(x0)
        mu, log_sigma = self.encode_stats(x0)
        if mean:
            return mu
        if noise is None:
            noise = torch.randn(mu.shape, generator=generator, device=mu.device, dtype=mu.dtype)
        return reparameterise(mu, log_sigma, noise)

    def _encoded(self, x0: Tensor) -> Tensor:
        with self.autocast():
            return cast(Tensor, self.encoder(self._check_images(x0)).to(x0.dtype))

    # The bridge ---------------------------------------------------------------------------

    def denoise(self, x_t: Tensor, t: Tensor, z: Tensor, x_T: Tensor) -> Tensor:
        """D(x_t, t, z, x_T), the estimate of x_0, unclamped (DDBM eq. 11).

        x_t, x_T: (N, 3, S, S); t: (N,) in [t_min, T]; z: (N, latent_dim).
        """
        c_skip, c_out, c_in = (
            c.to(x_t.device, x_t.dtype)[:, None, None, None] for c in self.bridge.preconditioning(t)
        )
        label = self.bridge.noise_label(t).to(x_t.device, torch.float32)
        with self.autocast():
            raw = self.unet(c_in * x_t, label, z, x_T)
        return c_skip * x_t + c_out * raw.to(x_t.dtype)

    def loss(
        self,
        x0: Tensor,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        latent_noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """The training objective of each image.

        Args:
            x0: images (N, 3, S, S) in [−1, 1].
            t: times (N,) in [t_min, T]; uniform when absent.
            noise: ε of the bridge, like x0; drawn when absent.
            latent_noise: ε of a stochastic encoder (N, latent_dim); drawn when absent.
            generator: for what is drawn.

        Returns:
            "loss": weight(t) · mean (D − x_0)², and "xs_mse": the same unweighted, both (N,);
            "z": the latents without their noise, detached (N, latent_dim).
        """
        n, device = len(x0), x0.device
        if t is None:
            t = self.bridge.sample_times(torch.rand(n, generator=generator, device=device))
        if noise is None:
            noise = torch.randn(x0.shape, generator=generator, device=device, dtype=x0.dtype)
        if self.config.stochastic:
            z_mean, log_sigma = self.encode_stats(x0)
            if latent_noise is None:
                latent_noise = torch.randn(z_mean.shape, generator=generator, device=device)
            z = reparameterise(z_mean, log_sigma, latent_noise.to(z_mean.dtype))
        else:
            z = z_mean = self.encode(x0)
        with self.autocast():
            x_T = self.endpoint(z).to(x0.dtype)
        a, b, c = (k.to(device, x0.dtype)[:, None, None, None] for k in self.bridge.coefficients(t))
        denoised = self.denoise(a * x_T + b * x0 + c * noise, t, z, x_T)
        xs_mse = (denoised - x0).square().mean(dim=(1, 2, 3))
        weight = self.bridge.weight(t).to(device, xs_mse.dtype)
        return {"loss": weight * xs_mse, "xs_mse": xs_mse.detach(), "z": z_mean.detach().float()}

    def forward(
        self, x0: Tensor, t: Tensor, noise: Tensor, latent_noise: Tensor | None
    ) -> dict[str, Tensor]:
        """The loss, as distributed training and compilation wrappers want it."""
        return self.loss(x0, t, noise, latent_noise)

    # x_T → image --------------------------------------------------------------------------

    def sample(self, z: Tensor, x_T: Tensor | None = None, **options: Any) -> Samples:
        """Run a sampler from x_T (Dec(z) when absent) to images; options as `dbae.sample`."""
        if x_T is None:
            x_T = self.endpoint(z).float()
        with self.autocast():
            return sample(lambda x, t: self.denoise(x, t, z, x_T), x_T, self.bridge, **options)

    @torch.no_grad()
    def reconstruct(
        self,
        x0: Tensor,
        sampler: str | None = None,
        steps: int = FEW,
        *,
        mean: bool = True,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Tensor:
        """Encode, decode the endpoint and sample: (N, 3, S, S) → the same, in [−1, 1].

        Done in eval mode, whatever the model's mode. The default sampler is the best one with few
        steps (`sampling.best_with_few`). A stochastic encoder's mean is used unless `mean` is
        false. Other options as `dbae.sample`; no sampler needs another training.
        """
        training = self.training
        try:
            self.eval()
            z = self.encode(x0, mean=mean, generator=generator)
            sampler = sampler or best_with_few(self.bridge)
            out = self.sample(z, sampler=sampler, steps=steps, generator=generator, **options)
        finally:
            self.train(training)
        return out.images

    def _check_images(self, x0: Tensor) -> Tensor:
        size = self.config.image_size
        if x0.dim() != 4 or tuple(x0.shape[1:]) != (3, size, size):
            raise UserError(
                f"images have shape {tuple(x0.shape)}; this model takes (N, 3, {size}, {size})"
            )
        return x0


def create_model(preset: str = "demo", **overrides: Any) -> DBAE:
    """A freshly initialised model, in training mode, by preset name ("ffhq", "demo", …).

    Overrides are fields of `ModelConfig`, e.g. create_model("celeba", schedule="ve",
    stochastic=False). An unknown preset, field or value raises UserError.
    """
    config = get_preset(preset).model
    known = [field.name for field in dataclasses.fields(ModelConfig)]
    for name in overrides:
        if name not in known:
            raise UserError(f"model option {name!r} is unknown; choose from {', '.join(known)}")
    return DBAE(dataclasses.replace(config, **overrides))
