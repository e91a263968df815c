"""Networks: the released format, golden figures, sizes, gradients, compilation."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import golden
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dbae import DBAE, UserError, create_model, load_weights
from dbae.checkpoint import to_released
from dbae.layers import SpectralConv2d


def _close(ours: Tensor, golden_figure: Any, max_abs: float = 2e-3, rel: float = 2e-4) -> None:
    theirs = torch.as_tensor(golden_figure)
    assert ours.shape == theirs.shape
    difference = ours - theirs
    assert difference.abs().max() <= max_abs
    assert difference.norm() <= rel * theirs.norm()


def _golden_model(name: str) -> tuple[DBAE, Any]:
    figures = golden.arrays(f"model_celeba_{name}_vp")
    model = create_model("celeba", stochastic=name == "sto").eval()
    load_weights(model, golden.rule_weights(f"celeba_{name}", figures))
    return model, figures


@pytest.mark.parametrize("preset", ["celeba", "ffhq"])
@pytest.mark.parametrize("kind", ["det", "sto"])
def test_the_released_format_has_exactly_our_keys(preset: str, kind: str) -> None:
    with torch.device("meta"):
        model = create_model(preset, stochastic=kind == "sto")
    parameters = {name for name, _ in to_released(dict(model.named_parameters())).items()}
    ours = {
        key: [list(value.shape), str(value.dtype).removeprefix("torch."), key in parameters]
        for key, value in to_released(model.state_dict()).items()
    }
    theirs = {
        key: [shape, dtype, role == "parameter"]
        for key, shape, dtype, role, used in golden.manifest(f"{preset}_{kind}")
        if used
    }
    assert ours == theirs


@pytest.mark.parametrize("preset", ["celeba_det", "ffhq_sto"])
def test_released_weights_load_strictly_but_for_the_unused_keys(preset: str) -> None:
    name, kind = preset.split("_")
    model = create_model(name, stochastic=kind == "sto")
    weights = golden.rule_weights(preset, {})
    load_weights(model, weights)
    assert torch.equal(model.unet.label_emb.weight, weights["label_emb.weight"])
    loaded = model.endpoint.state_dict()["feat_8.1.weight_orig"]
    assert torch.equal(loaded, weights["decoder.feat_8.1.weight_orig"])
    with pytest.raises(UserError, match=r"has the unknown key decoder\.extra"):
        load_weights(model, {**weights, "decoder.extra": torch.zeros(1)})
    weights.pop("out.0.weight")
    weights["encoder.out.3.bias"] = torch.zeros(7)
    with pytest.raises(
        UserError, match=r"lacks out\.0\.weight; encoder\.out\.3\.bias has shape \(7,\)"
    ):
        load_weights(model, weights)


def test_the_deterministic_model_reproduces_the_golden_figures() -> None:
    model, figures = _golden_model("det")
    x0, x_t = torch.from_numpy(figures["x0"]), torch.from_numpy(figures["x_t"])
    z, x_T = torch.from_numpy(figures["z"]), torch.from_numpy(figures["x_T"])
    with torch.no_grad():
        _close(model.encode(x0), figures["z"])
        _close(model.endpoint(z), figures["x_T"])
        for i, time in enumerate(figures["t"]):
            t = torch.full((2,), float(time), dtype=torch.float64)
            c_in = model.bridge.preconditioning(t).c_in.float()[:, None, None, None]
            label = model.bridge.noise_label(t).float()
            _close(model.unet(c_in * x_t, label, z, x_T), figures["unet"][i])
            _close(model.denoise(x_t, t, z, x_T), figures["denoised"][i])
        noise = torch.from_numpy(figures["loss_noise"])
        terms = model.loss(x0, torch.from_numpy(figures["loss_t"]), noise)
    for name in ("loss", "xs_mse"):
        _close(terms[name], figures[name])


def test_the_stochastic_model_reproduces_the_golden_figures() -> None:
    model, figures = _golden_model("sto")
    x0, x_t = torch.from_numpy(figures["x0"]), torch.from_numpy(figures["x_t"])
    z, x_T = torch.from_numpy(figures["z"]), torch.from_numpy(figures["x_T"])
    with torch.no_grad():
        mu, log_sigma = model.encode_stats(x0)
        _close(mu, figures["mu"])
        _close(log_sigma, figures["log_sigma"])
        _close(model.encode(x0, mean=True), figures["mu"])
        noise = torch.randn(2, 512)
        _close(model.encode(x0, noise=noise), mu + (log_sigma.exp() + 0.01) * noise)
        _close(model.endpoint(z), figures["x_T"])
        for i, time in enumerate(figures["t"]):
            _close(
                model.denoise(x_t, torch.full((2,), float(time)), z, x_T), figures["denoised"][i]
            )


def test_images_sampled_through_the_networks_equal_the_golden_ones() -> None:
    model, _ = _golden_model("det")
    figures = golden.arrays("sample_celeba_det_vp")
    z, x_T = torch.from_numpy(figures["z"]), torch.from_numpy(figures["x_T"])
    runs = 0
    for name in figures:
        match = re.fullmatch(r"(\w+)_(\d+)_churn([\d.]+)_rho([\d.]+)", name)
        if match is None:
            continue
        sampler, steps, churn, rho = match.groups()
        generator = np.random.Generator(np.random.PCG64(int(figures["noise_seed"])))
        out = model.sample(
            z, x_T, sampler=sampler, steps=int(steps), churn=float(churn), rho=float(rho),
            noise=lambda x, g=generator: torch.from_numpy(g.standard_normal(x.shape).astype("f")),
        )  # fmt: skip
        _close(out.images, figures[name], max_abs=4e-3, rel=1e-3)
        assert out.nfe == figures[f"{name}_nfe"]
        runs += 1
    assert runs == 3


@pytest.mark.parametrize("size", [32, 64, 128, 256])
@pytest.mark.parametrize("stochastic", [False, True])
def test_every_size_trains_and_samples_with_any_latent(size: int, stochastic: bool) -> None:
    model = create_model(
        "demo", image_size=size, latent_dim=7, endpoint_channels=8, stochastic=stochastic
    )
    x0 = torch.rand(2, 3, size, size) * 2 - 1
    model.loss(x0)["loss"].mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    # All parameters take part, as distributed training without find_unused_parameters demands.
    assert not [name for name, gradient in gradients.items() if gradient is None]
    model.eval()
    assert model.reconstruct(x0, "euler", 2).shape == x0.shape
    assert model.encode(x0).shape == (2, 7)


def test_the_default_reconstruction_takes_five_calls_whatever_the_bridge() -> None:
    x0 = torch.rand(1, 3, 32, 32) * 2 - 1
    for options, sampler in (({}, "exp"), ({"end_data": 0.0}, "euler")):
        model = create_model("demo", **options).eval()
        calls: list[int] = []
        found = model.reconstruct(x0, callback=lambda step, to=calls: to.append(step.nfe))
        assert calls == [1, 2, 3, 4, 5]
        assert torch.equal(found, model.reconstruct(x0, sampler, 5))


def test_gradients_reach_encoder_and_endpoint_through_x_T_and_z() -> None:
    model = create_model("demo")
    x0 = torch.rand(4, 3, 32, 32) * 2 - 1
    nn.init.normal_(model.unet.out[2].weight, std=0.1)  # zero at first: nothing would get through
    model.loss(x0)["loss"].mean().backward()
    for part in (model.encoder, model.endpoint, model.unet):
        total = sum(float(p.grad.abs().sum()) for p in part.parameters() if p.grad is not None)
        assert total > 0


def test_spectral_norm_bounds_the_weight_and_holds_still_in_eval_mode() -> None:
    torch.manual_seed(0)
    conv = SpectralConv2d(8, 16, 3)
    for _ in range(50):
        conv.power_iteration()
    conv.eval()
    before = conv.weight_u.clone()
    with torch.no_grad():
        largest = torch.linalg.matrix_norm((conv.weight_orig * conv.scale()).flatten(1), 2)
    assert float(largest) == pytest.approx(1, abs=1e-3)
    assert torch.equal(conv.weight_u, before)
    conv.weight_u.copy_(nn.functional.normalize(torch.randn(16), dim=0))
    conv.train().scale()
    assert not torch.equal(conv.weight_u, before)


def test_spectral_norm_equals_torchs_older_form() -> None:
    torch.manual_seed(0)
    theirs = torch.nn.utils.spectral_norm(nn.Conv2d(4, 6, 3, bias=False))
    ours = SpectralConv2d(4, 6, 3)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 4, 5, 5)
    for _ in range(3):  # training mode: each pass moves u and v
        a, b = ours(x), theirs(x)
        torch.testing.assert_close(a, b)
        a.square().sum().backward()
        b.square().sum().backward()
    torch.testing.assert_close(ours.weight_orig.grad, theirs.weight_orig.grad)
    torch.testing.assert_close(ours.weight_u, theirs.weight_u)


def test_networks_and_loss_trace_into_one_graph() -> None:
    """No Python branch on a tensor, no numpy: torch.compile takes each forward pass whole."""
    model = create_model("demo", stochastic=True)
    x0 = torch.rand(2, 3, 32, 32) * 2 - 1
    t, noise = torch.tensor([0.2, 0.7]).double(), torch.randn_like(x0)
    z = model.encode(x0, mean=True).detach()
    latent_noise = torch.randn_like(z)
    for function in (
        lambda x: model.endpoint(z),
        lambda x: model.denoise(x, t, z, x),
        lambda x: model(x, t, noise, latent_noise)["loss"],
    ):
        plain = copy.deepcopy(model.state_dict())
        expected = function(x0)
        model.load_state_dict(plain)  # training mode moves batch norm and spectral norm
        found = torch.compile(function, backend="eager", fullgraph=True)(x0)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 96}, "--image_size 96 has no architecture; choose one of 32, 64, 128, 256"),
        ({"num_channels": 40}, "--num_channels 40 must be a positive multiple of 32"),
        ({"latent_dim": 0}, "--latent_dim 0 must be at least 1"),
        ({"schedule": "xx"}, "--schedule 'xx' is unknown"),
        ({"colour": 1}, "'colour' is unknown"),
    ],
)
def test_impossible_models_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_model("demo", **change)


def test_wrong_image_shapes_are_named() -> None:
    model = create_model("demo")
    with pytest.raises(UserError, match=r"shape \(1, 3, 64, 64\).*takes \(N, 3, 32, 32\)"):
        model.encode(torch.zeros(1, 3, 64, 64))
    with pytest.raises(UserError, match="deterministic"):
        model.encode_stats(torch.zeros(1, 3, 32, 32))


def test_importing_the_package_does_nothing(tmp_path: Path) -> None:
    """No output, no files, no random state touched, no heavy optional imports."""
    import subprocess
    import sys

    code = (
        "import torch, sys; torch.manual_seed(3); a = torch.get_rng_state(); import dbae; "
        "assert torch.equal(a, torch.get_rng_state()); "
        "print([m for m in ('mpi4py', 'lpips', 'lmdb', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
    assert not list(tmp_path.iterdir())
