"""The networks and the training step against the plain ones (`plain.py`), same weights, one run.

    python3 benchmarks/networks.py [--quick] [--preset celeba] [--device cuda] [--compile]

Prints milliseconds and the factor over plain eager float32 (on a GPU also over plain fp16 autocast,
images/s, the share of the card's bf16 rate and the peak memory), the share of optimizer and
averaging in a step, what checkpointed activations save and cost, and the sampling loop's overhead.
Weights are random, none of them zero.
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import Figures, interleaved, machine, ratios, show
from benchmarks.plain import plain
from dbae import DBAE, create_model
from dbae.ema import Ema
from dbae.optimizer import RAdam
from dbae.precision import choose

# Dense bf16 rate in TFLOP/s, without sparsity, as the maker states it.
_PEAK = {"H100": 989.0, "H200": 989.0, "A100": 312.0}
_RECIPE_BATCH = 64
_CALLS = 4  # as one piece of work


def models(preset: str, device: torch.device, compile: bool) -> dict[str, DBAE]:
    """The plain model and the fast ones, all with the same weights."""
    torch.manual_seed(0)
    model = create_model(preset).to(device)
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    made = {"plain fp32": plain(model)}
    if device.type == "cuda":
        made["plain fp16"] = plain(model).accelerate("fp16")
    made["fp32"] = model
    fast = choose("auto", device)
    if fast != "fp32":
        made[fast] = copy.deepcopy(model).accelerate(fast)
    if compile:
        made[f"{fast} compiled"] = copy.deepcopy(model).accelerate(fast, compile=True)
    return made


def inference(made: dict[str, DBAE], batch: int, repeats: int, device: torch.device) -> Figures:
    """Denoise, encode, endpoint."""
    config = made["fp32"].config
    size = (3, config.image_size, config.image_size)
    x, x_T = torch.randn(batch, *size, device=device), torch.randn(batch, *size, device=device)
    x0 = torch.rand(4 * batch, *size, device=device) * 2 - 1
    z, t = torch.randn(batch, config.latent_dim, device=device), torch.full((batch,), 0.5)
    kinds: dict[str, Callable[[DBAE], Any]] = {
        f"denoise, {batch} images": lambda m: m.denoise(x, t.to(device), z, x_T),
        f"encode, {4 * batch} images": lambda m: m.encode(x0),
        "endpoint, 1 image": lambda m: m.endpoint(z[:1]),
    }
    figures: Figures = []
    for model in made.values():
        model.eval()
    for what, call in kinds.items():
        work = {name: functools.partial(_several, m, call) for name, m in made.items()}
        found = interleaved(work, repeats, device)
        figures += ratios({name: taken / _CALLS for name, taken in found.items()}, what)
    return figures


@torch.no_grad()
def _several(model: DBAE, call: Callable[[DBAE], Any]) -> None:
    """As a sampler calls: within one context, in which weights are cast once only."""
    with model.autocast():
        for _ in range(_CALLS):
            call(model)


def overhead(repeats: int) -> Figures:
    """A whole sampling run against as many bare calls of the denoiser, on the demo model."""
    torch.manual_seed(0)
    model = create_model("demo").eval()
    z, x_T, t = torch.randn(8, 24), torch.randn(8, 3, 32, 32), torch.full((8,), 0.5)

    @torch.no_grad()
    def bare() -> None:
        for _ in range(20):
            model.denoise(x_T, t, z, x_T)

    work = {"bare": bare, "sampled": lambda: model.sample(z, x_T, sampler="euler", steps=20)}
    found = interleaved(work, repeats)
    share = found["sampled"] / found["bare"] - 1
    return [("Euler-20 beyond 20 bare denoiser calls, demo model, 8 images", f"{share:+.1%}")]


def training(
    made: dict[str, DBAE], batch: int, repeats: int, device: torch.device
) -> tuple[Figures, dict[str, float]]:
    """Forward, backward, optimizer, averaging: the whole step. Seconds of each model's too."""
    size = made["fp32"].config.image_size
    x0 = torch.rand(batch, 3, size, size, device=device) * 2 - 1
    work = {}
    for name, model in made.items():
        plainly = name.startswith("plain")
        optimizer = (torch.optim.RAdam if plainly else RAdam)(model.parameters(), lr=1e-4)
        work[name] = _step(model.train(), optimizer, Ema(model, 0.9999), x0)
    found = interleaved(work, repeats, device)
    figures = ratios(found, f"training step, {batch} images")
    if device.type == "cuda":
        figures += _gpu_figures(made, work, found, x0, device)
    return figures, found


def _step(
    model: DBAE, optimizer: torch.optim.Optimizer, ema: Ema[DBAE], x0: torch.Tensor
) -> Callable[[], None]:
    scaler = torch.amp.GradScaler(x0.device.type, enabled=model.precision == "fp16")

    def step() -> None:
        loss = model.loss(x0)["loss"].mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        ema.update(1000)
        optimizer.zero_grad(set_to_none=True)

    return step


def _gpu_figures(
    made: dict[str, DBAE],
    work: dict[str, Callable[[], None]],
    seconds: dict[str, float],
    x0: torch.Tensor,
    device: torch.device,
) -> Figures:
    counter = FlopCounterMode(display=False)
    with counter:
        made["fp32"].loss(x0[:1])["loss"].sum().backward()
    made["fp32"].zero_grad(set_to_none=True)
    flops = counter.get_total_flops() * len(x0)
    peak = next((v for k, v in _PEAK.items() if k in torch.cuda.get_device_name(device)), None)
    figures = []
    for name, taken in seconds.items():
        torch.cuda.reset_peak_memory_stats(device)
        work[name]()
        memory = torch.cuda.max_memory_allocated(device) / 2**30
        share = f"{flops / taken / peak / 1e12:.1%} of its bf16 rate" if peak else "rate unknown"
        text = f"{len(x0) / taken:.0f} images/s, {share}, peak {memory:.1f} GiB (all models held)"
        figures.append((f"training step, {name}", text))
    return figures


def upkeep(model: DBAE, seconds: float, device: torch.device) -> Figures:
    """Optimizer and averaging, and their share of a step that takes so many seconds."""
    ema, figures = Ema(model, 0.9999), Figures()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    optimizers = {"torch's RAdam": torch.optim.RAdam, "ours": RAdam}
    work: dict[str, Callable[[], Any]] = {
        name: kind(model.parameters(), lr=1e-6).step for name, kind in optimizers.items()
    }
    for update in work.values():
        for _ in range(6):  # the first five are not adaptive yet
            update()
    work["averaging"] = lambda: ema.update(1000)
    found = interleaved(work, 5, device)
    model.zero_grad(set_to_none=True)
    for name, taken in found.items():
        text = f"{taken * 1e3:9.1f} ms   {taken / seconds:.1%} of a step of {_RECIPE_BATCH} images"
        figures.append((f"upkeep, {name}", text))
    return figures


def checkpointing(model: DBAE, batch: int, repeats: int) -> Figures:
    """What a loss keeps for its backward pass, and what recomputing it costs."""
    lean = copy.deepcopy(model)
    lean.checkpoint_activations()
    size = model.config.image_size
    x0 = torch.rand(batch, 3, size, size, device=next(model.parameters()).device) * 2 - 1

    def step(model: DBAE) -> None:
        model.loss(x0)["loss"].mean().backward()
        model.zero_grad(set_to_none=True)

    found = interleaved({"plain": lambda: step(model), "lean": lambda: step(lean)}, repeats)
    kept = [kept_bytes(m, x0) / batch / 2**20 for m in (model, lean)]
    return [
        ("checkpointed activations: kept for an image", f"{kept[0]:.0f} → {kept[1]:.0f} MiB"),
        (
            "checkpointed activations: forward and backward",
            f"{found['lean'] / found['plain']:.2f} × as long",
        ),
    ]


def kept_bytes(model: DBAE, x0: torch.Tensor) -> int:
    """What the graph of a loss keeps for the backward pass, weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        loss = model.loss(x0)["loss"].sum()  # what is kept must live until it is counted
    total = sum(kept.values())
    del loss
    return total


def measure(
    quick: bool, preset: str = "celeba", device: torch.device | None = None, compile: bool = False
) -> Figures:
    """All of it."""
    device = device or torch.device("cpu")
    gpu = device.type == "cuda"
    made = models(preset, device, compile)
    repeats = 3 if quick else 8
    batch = 64 if gpu else 4
    figures = inference(made, batch, repeats, device) + overhead(repeats)
    step_batch = 32 if gpu else 4
    trained, seconds = training(made, step_batch, 2 if quick else 5, device)
    *_, fastest = seconds.values()
    figures += trained + upkeep(made["fp32"], fastest / step_batch * _RECIPE_BATCH, device)
    return figures + checkpointing(made["fp32"], 2, 1 if quick else 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--preset", default="celeba", help="(default: celeba, 64 pixels)")
    parser.add_argument("--device", default="cpu", type=torch.device, help="(default: cpu)")
    parser.add_argument("--compile", action="store_true", help="a compiled model too")
    options = parser.parse_args()
    print(machine(options.device), "seed 0", sep=", ")
    show(
        f"{options.preset}, random weights",
        measure(options.quick, options.preset, options.device, options.compile),
    )


if __name__ == "__main__":
    main()
