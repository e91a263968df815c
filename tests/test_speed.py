"""Fast paths: each computes what the plain one does."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from training_runs import RUN, assert_same_run, train

from benchmarks.networks import kept_bytes
from benchmarks.plain import plain
from dbae import DBAE, UserError, create_model, load_model
from dbae.data import open_dataset, to_model_range
from dbae.ema import Ema
from dbae.layers import SpectralNorm
from dbae.optimizer import RAdam
from dbae.precision import choose, require_compiler

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def _model(**overrides: object) -> DBAE:
    """Small, with attention in all places, and without weights that are zero."""
    torch.manual_seed(0)
    options = {"attention_resolutions": (16, 8), "latent_dim": 6, "endpoint_channels": 8}
    model = create_model("demo", **options | overrides)
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return model


def _batch(count: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x0 = torch.rand(count, 3, 32, 32, generator=generator) * 2 - 1
    return x0, torch.rand(count, generator=generator), torch.randn(x0.shape, generator=generator)


def _gradients(model: DBAE) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses and gradients of one batch; dropout and spectral norm draw and move alike."""
    torch.manual_seed(2)
    loss = model.loss(*_batch())["loss"]
    loss.sum().backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _assert_same_gradients(ours: DBAE, theirs: DBAE, rtol: float) -> None:
    (our_loss, our_gradients), (their_loss, their_gradients) = map(_gradients, (ours, theirs))
    torch.testing.assert_close(our_loss, their_loss, rtol=rtol, atol=0)
    assert our_gradients.keys() == their_gradients.keys()
    largest = max(float(gradient.norm()) for gradient in their_gradients.values())
    for name, gradient in our_gradients.items():
        expected = their_gradients[name]
        assert (gradient - expected).norm() <= rtol * expected.norm() + 1e-6 * largest, name


# Networks -----------------------------------------------------------------------------------


def test_the_fast_networks_equal_the_plain_ones() -> None:
    model = _model().eval()
    reference = plain(model)
    x0, t, x_t = _batch()
    with torch.no_grad():
        z, x_T = reference.encode(x0), reference.endpoint(reference.encode(x0))
        torch.testing.assert_close(model.encode(x0), z, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.endpoint(z), x_T, rtol=1e-5, atol=1e-5)
        expected = reference.denoise(x_t, t, z, x_T)
        assert expected.std() > 0.1
        torch.testing.assert_close(model.denoise(x_t, t, z, x_T), expected, rtol=1e-5, atol=1e-5)


def test_the_fast_training_step_has_the_plain_ones_gradients() -> None:
    model = _model()  # dropout draws in the order of memory, which differs
    _assert_same_gradients(model, plain(model), rtol=1e-4)


def test_the_norm_of_a_weight_follows_every_change_of_it() -> None:
    model = _model().eval()
    z = torch.randn(2, 6)
    with torch.no_grad():
        before = model.endpoint(z)
        for parameter in model.endpoint.parameters():
            parameter.data.mul_(1.5)  # a change that autograd does not see
        after = model.endpoint(z)
        torch.testing.assert_close(after, plain(model).endpoint(z), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, after)


def test_the_averaged_models_norms_follow_its_updates() -> None:
    model = _model()
    ema = Ema(model, 0.5)
    z = torch.randn(2, 6)
    with torch.no_grad():
        before = ema.shadow.endpoint(z)
        for parameter in model.endpoint.parameters():
            parameter.mul_(1.5).add_(0.01)
        ema.update(100)
        after = ema.shadow.endpoint(z)
        torch.testing.assert_close(after, plain(ema.shadow).endpoint(z), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, after)
    assert any(isinstance(module, SpectralNorm) for module in model.modules())


# Training -----------------------------------------------------------------------------------


def test_checkpointed_activations_save_memory_and_change_no_gradient() -> None:
    model = _model(dropout=0.1)
    lean = copy.deepcopy(model)
    lean.checkpoint_activations()
    _assert_same_gradients(lean, model, rtol=1e-6)
    x0 = _batch()[0]
    assert kept_bytes(lean, x0) < 0.5 * kept_bytes(model, x0)


def _weights() -> list[nn.Parameter]:
    torch.manual_seed(3)
    image_like = torch.randn(6, 4, 3, 3)
    return [
        nn.Parameter(image_like.to(memory_format=torch.channels_last)),
        nn.Parameter(torch.randn(7)),
        nn.Parameter(torch.randn(5, 8, 1, 1)),
    ]


def _drive(
    optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range
) -> Iterator[list[Tensor]]:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in params:  # in whichever order of memory
            p.grad = torch.randn(p.shape, generator=generator) * 10 ** (step % 3 - 1)
        optimizer.step()
        yield [p.detach().clone() for p in params]


def test_the_fused_optimizer_equals_torchs() -> None:
    ours, theirs = _weights(), _weights()
    runs = [
        list(_drive(kind(params, lr=0.1), params, range(40)))
        for kind, params in ((RAdam, ours), (torch.optim.RAdam, theirs))
    ]
    for found, expected in zip(*runs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    moved = [float((a - b).abs().max()) for a, b in zip(runs[1][0], runs[1][-1], strict=True)]
    assert min(moved) > 0.1


def test_the_fused_optimizer_takes_a_weight_whose_gradient_comes_late() -> None:
    runs = []
    for kind in (RAdam, torch.optim.RAdam):
        params = _weights()
        optimizer = kind(params, lr=0.1)
        list(_drive(optimizer, params[:2], range(8)))
        *_, last = _drive(optimizer, params, range(8, 12))
        runs.append(last)
    torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-6)


def test_the_fused_optimizer_takes_over_torchs_state_whatever_its_memory_order() -> None:
    params, theirs = _weights(), _weights()
    before = torch.optim.RAdam(theirs, lr=0.1)
    list(_drive(before, theirs, range(10)))
    stored = copy.deepcopy(before.state_dict())
    for state in stored["state"].values():  # as a run of an earlier version has it
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = state[name].contiguous()
    optimizer = RAdam(params, lr=0.1)
    optimizer.load_state_dict(stored)
    with torch.no_grad():
        for p, value in zip(params, theirs, strict=True):
            p.copy_(value)
    *_, found = _drive(optimizer, params, range(10, 20))
    *_, expected = _drive(before, theirs, range(10, 20))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# Precision and compilation ------------------------------------------------------------------


def test_bf16_changes_the_error_of_the_shipped_model_by_less_than_a_hundredth() -> None:
    images = open_dataset("demo", None, 32, "test", "error")
    x0 = to_model_range(torch.stack([images[i].image for i in range(48)]))
    errors = []
    for precision in ("fp32", "bf16"):
        model = load_model(ROOT / "assets" / "demo_model.pt").accelerate(precision)
        found = model.reconstruct(x0, "euler", 5)
        errors.append(float((found - x0).square().mean()))
    assert errors[1] != errors[0]
    assert errors[1] == pytest.approx(errors[0], rel=0.01)


def test_auto_is_what_the_device_is_made_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, expected in (({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"),
                            ({"avx512_f": True}, "fp32")):  # fmt: skip
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found)
        assert choose("auto", CPU) == expected
    assert choose("auto", torch.device("mps")) == "fp32"
    assert choose("bf16", CPU) == "bf16"  # asked for: on any device
    with pytest.raises(UserError, match="--precision fp16 needs a CUDA GPU"):
        choose("fp16", CPU)
    with pytest.raises(UserError, match="--precision 'half' is unknown; choose one of auto, fp32"):
        create_model("demo").accelerate("half")


def test_a_compiled_model_computes_the_same() -> None:
    model = _model().eval()
    compiled = copy.deepcopy(model).accelerate("fp32", compile=True)
    assert compiled.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():  # the endpoint: compiling a UNet takes minutes where nothing is cached
        z = model.encode(_batch()[0])
        torch.testing.assert_close(compiled.endpoint(z), model.endpoint(z), rtol=1e-4, atol=1e-5)
    for network in (compiled.unet, compiled.encoder, compiled.endpoint):
        assert network._compiled_call_impl is not None


def test_without_a_compiler_the_flag_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/nowhere/g++",))
    torch._dynamo.reset()
    with pytest.raises(UserError, match=r"--compile needs a C\+\+ compiler \(g\+\+\), and torch"):
        require_compiler(CPU)


def test_all_of_it_trains_together_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    flags = ["--precision=bf16", "--activation_checkpointing=true", "--save_interval=2"]
    train(tmp_path / "whole", "--max_steps=4", *flags)
    train(tmp_path / "parts", "--max_steps=2", *flags)
    train(tmp_path / "parts", "--max_steps=4", *flags)
    assert_same_run(tmp_path / "parts" / RUN, tmp_path / "whole" / RUN, 4)
