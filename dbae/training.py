"""Training: the loop, one step of it, and what surrounds it (resuming, logging, saving).

Everything random is a function of (seed, global sample position), see `dbae.random`: a run that
was interrupted continues at a number, and the number of processes does not decide which image
meets which flip, time or noise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import platform
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from . import checkpoint, files
from .data import image_grid, open_dataset, to_model_range, to_uint8
from .data.loader import Batch, default_workers, load_batches
from .data.order import BatchOrder, RankBatches
from .distributed import Context
from .ema import Ema
from .encoder import DEAD_STD
from .errors import UserError
from .model import DBAE
from .presets import ModelConfig, TrainConfig
from .random import fold, normal, uniform
from .runlog import RunLog

_GRID_IMAGES = 8
# DDP's name for it changed in torch 2.13.
_LOCAL_BUFFERS: dict[str, Any] = (
    {"forward_sync_buffers": False}
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else {"broadcast_buffers": False}
)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def experiment_name(dataset: str, model: ModelConfig) -> str:
    """A run's folder name, `{dataset}{size}_{C}_{latent}d_{STO}_{schedule}`."""
    return (
        f"{dataset}{model.image_size}_{model.num_channels}_{model.latent_dim}d_"
        f"{str(model.stochastic).lower()}_{model.schedule}"
    )


class Trainer:
    """Trains one DBAE in WORKDIR/EXP; the same call again resumes.

    Args:
        model_config, config: what to train, and how.
        context: this process among the others.
        resume: a checkpoint to start from. One without a training state beside it (a released
            file) gives its weights only. When the run's folder already has checkpoints, one from
            elsewhere was that run's start, and the run goes on from its own newest.
        command: recorded in config.json.

    Raises:
        UserError: data, configuration, checkpoint or disk do not fit.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        config: TrainConfig,
        context: Context,
        resume: str | None = None,
        command: str = "",
    ) -> None:
        self.config, self.context, self.device = config, context, context.device
        if config.precision == "fp16" and self.device.type != "cuda":
            raise UserError("--precision fp16 needs a CUDA GPU; use bf16 or fp32 here")
        size = model_config.image_size
        source = (config.dataset, config.data_dir, size)
        self.dataset = open_dataset(*source, config.split, config.bad_images)
        self.pictures = self.dataset
        if config.split == "train":
            with contextlib.suppress(UserError):  # a set may have no part that is held out
                self.pictures = open_dataset(*source, "test", config.bad_images)
        self.folder = Path(config.workdir) / experiment_name(config.dataset, model_config)

        torch.manual_seed(fold(config.seed, "initial weights"))
        self.model = DBAE(model_config).to(self.device)
        self.ema = Ema(self.model, config.ema_rate)
        self.optimizer = torch.optim.RAdam(self.model.parameters(), lr=config.lr)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.step = self.position = self.replaced = 0
        self.global_batch = config.batch_size * context.world_size
        self.describe = {
            "model": dataclasses.asdict(model_config),
            "train": dataclasses.asdict(config),
            "data": self.dataset.describe(),
            # of the last start; a run may have had several
            "environment": {
                "world_size": context.world_size,
                "device": torch.cuda.get_device_name()
                if self.device.type == "cuda"
                else self.device.type,
                "python": platform.python_version(),
                "torch": str(torch.__version__),
                "command": command,
            },
        }
        resumed = self._resume(resume)
        if context.is_main:
            self._open_folder()
            self.log = RunLog(
                self.folder, self.step, config.max_steps, config.logger, self.describe
            )
            self._introduce(resumed)
        self.wrapped: Any = self.model
        if context.world_size > 1:
            # Batch norm uses each rank's own micro-batch, as in the published training: buffers
            # stay local, and rank 0's are saved. Spectral norm's vectors follow the weights, which
            # are alike on all ranks.
            # oneDNN's gradients of 1×1 convolutions have other, equivalent strides: no news.
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view")
            self.wrapped = DistributedDataParallel(
                self.model,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                **_LOCAL_BUFFERS,
                gradient_as_bucket_view=True,
            )

    # The loop -----------------------------------------------------------------------------

    def run(self) -> Path:
        """Train to max_steps; returns the run's folder."""
        config = self.config
        sums = Sums(self.model.config.latent_dim, self.device)
        for batch in self._batches():
            self._train_step(batch, sums)
            self.ema.update(self.step)
            self.step += 1
            self.position += self.global_batch

            last = self.step == config.max_steps
            saving = last or self.step % config.save_interval == 0
            if self.context.is_main:
                self.log.advance()
            # Also before saving, so that no half-filled interval has to be kept for resuming.
            if saving or self.step % config.log_interval == 0:
                self._write_log(sums)
                sums = Sums(self.model.config.latent_dim, self.device)
            if config.sample_interval and (last or self.step % config.sample_interval == 0):
                self._write_samples()
            if saving:
                self._save()
        if self.context.is_main:
            self.log.close()
        self.context.barrier()
        return self.folder

    def _train_step(self, batch: Batch, sums: Sums) -> None:
        """Forward and backward over micro-batches, then one update."""
        config = self.config
        first = self.position + self.context.rank * config.batch_size
        positions = range(first, first + config.batch_size)
        self.replaced += batch.replaced
        images = to_model_range(batch.images.to(self.device, non_blocking=True))
        starts = range(0, config.batch_size, config.microbatch)
        for start in starts:
            part = slice(start, start + config.microbatch)
            x0, t, noise, latent_noise = self._draw(images[part], positions[part])
            torch.manual_seed(fold(config.seed, "dropout", positions[start]))
            with self._gradient_sync(start == starts[-1]):
                with self._autocast():
                    terms = self.wrapped(x0, t, noise, latent_noise)
                loss = terms["loss"].sum() / config.batch_size
                self.scaler.scale(loss).backward()
            sums.add_terms(terms)
        self.scaler.unscale_(self.optimizer)
        sums.add_gradients(self.model)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def _draw(self, images: Tensor, positions: range) -> tuple[Tensor, Tensor, Tensor, Any]:
        """This part's images, flipped or not, with their times and noises."""
        seed, device, bridge = self.config.seed, self.device, self.model.bridge
        if self.config.flip:
            flipped = uniform(seed, "flip", positions, device) < 0.5
            images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
        if self.config.time_sampling == "lognormal":
            t = bridge.sample_times_lognormal(normal(seed, "t", positions, (), device))
        else:
            t = bridge.sample_times(uniform(seed, "t", positions, device))
        noise = normal(seed, "noise", positions, tuple(images.shape[1:]), device)
        latent_noise = None
        if self.model.config.stochastic:
            shape = (self.model.config.latent_dim,)
            latent_noise = normal(seed, "latent noise", positions, shape, device)
        return images, t, noise, latent_noise

    def _batches(self) -> Iterator[Batch]:
        config, context = self.config, self.context
        remaining = max(config.max_steps - self.step, 0)
        batches = RankBatches(
            BatchOrder(len(self.dataset), config.seed),
            self.position,
            self.position + remaining * self.global_batch,
            config.batch_size,
            context.rank,
            context.world_size,
        )
        workers = config.num_workers
        if workers < 0:
            workers = default_workers(self.dataset, context.ranks_here())
        return load_batches(self.dataset, batches, workers, self.device.type == "cuda")

    def _autocast(self) -> torch.autocast:
        dtype = _DTYPES[self.config.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def _gradient_sync(self, now: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients are averaged over ranks with the last micro-batch only."""
        if now or self.context.world_size == 1:
            return contextlib.nullcontext()
        no_sync: contextlib.AbstractContextManager[None] = self.wrapped.no_sync()
        return no_sync

    # Output -------------------------------------------------------------------------------

    def _write_log(self, sums: Sums) -> None:
        row = sums.row(self.context)
        replaced = sum(self.context.gather_objects(self.replaced))
        if not row["loss"] < float("inf"):
            raise UserError(
                f"the loss is {row['loss']} at step {self.step}; checkpoints in {self.folder} "
                "are from before. Try a lower --lr, --precision bf16 or fp32"
            )
        if self.context.is_main:
            every = self.config.save_interval
            upcoming = min((self.step // every + 1) * every, self.config.max_steps)
            if self.step % every == 0 or self.step == self.config.max_steps:
                upcoming = self.step
            progress = {"step": self.step, "images": self.position, "replaced_images": replaced}
            self.log.write({**progress, **row}, self.global_batch, upcoming)

    def _write_samples(self) -> None:
        """Originals, endpoints and reconstructions of a few images by the averaged model."""
        if not self.context.is_main:
            return
        self.log.pause()
        count = min(_GRID_IMAGES, len(self.pictures))
        originals = torch.stack([self.pictures[i].image for i in range(count)])
        model = self.ema.shadow
        with torch.no_grad():
            z = model.encode(to_model_range(originals).to(self.device), mean=True)
            x_T = model.endpoint(z)
            rows = [originals, to_uint8(x_T), to_uint8(model.sample(z, x_T, steps=10).images)]
        grid = image_grid(torch.cat([row.cpu() for row in rows]), count)
        path = self.folder / "samples" / f"{self.step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        with files.atomic_file(path) as file:
            grid.save(file, format="PNG")
        self.log.unpause()

    def _save(self) -> None:
        if not self.context.is_main:
            return
        self.log.pause()
        files.require_space(self.folder, self._checkpoint_bytes())
        run = {key: self.describe[key] for key in ("train", "data", "environment")}
        checkpoint.save_weights(checkpoint.model_path(self.folder, self.step), self.model, run)
        averaged = checkpoint.ema_path(self.folder, self.config.ema_rate, self.step)
        checkpoint.save_weights(averaged, self.ema.shadow, run)
        state = {
            "step": self.step,
            "position": self.position,
            "replaced": self.replaced,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "config": json.dumps(self.describe),
        }
        checkpoint.save_state(checkpoint.state_path(self.folder, self.step), state)
        self.log.say(f"saved {averaged}")
        self.log.unpause()

    def _checkpoint_bytes(self) -> int:
        """Live and averaged weights and RAdam's two moments, with some room."""
        return int(4.1 * sum(v.nbytes for v in self.model.state_dict().values())) + 2**20

    # Start --------------------------------------------------------------------------------

    def _resume(self, resume: str | None) -> str:
        """Load what there is to continue from; says in words what that was."""
        own = checkpoint.resumable_steps(self.folder)
        if own:
            self._require_same_run()
        path = checkpoint.newest_weights(Path(resume)) if resume is not None else None
        if path is not None and not path.is_file():
            raise UserError(f"checkpoint {path} does not exist")
        if path is not None and (not own or path.parent.resolve() == self.folder.resolve()):
            if checkpoint.state_path(path.parent, checkpoint.step_of(path)).is_file():
                return self._load(path.parent, checkpoint.step_of(path))
            for model in (self.model, self.ema.shadow):
                checkpoint.load_weights(model, path)
            return f"starting from the weights of {path} (no training state beside it)"
        problems: list[str] = []
        if path is not None:
            problems.append(f"{self.folder} has checkpoints of its own, {path} is left alone;")
        for step in own:
            try:
                return " ".join([*problems, self._load(self.folder, step)])
            except UserError as error:
                problems.append(f"passing over the checkpoint of step {step}: {error};")
        if own:
            raise UserError(f"no checkpoint in {self.folder} can be resumed: {' '.join(problems)}")
        return "starting from new weights"

    def _require_same_run(self) -> None:
        """Refuse to go on with a run of another model, seed or data, as config.json tells."""
        path = self.folder / "config.json"
        try:
            stored = json.loads(path.read_text())
            earlier = {**stored["model"], "seed": stored["train"]["seed"]}
            same_data = stored["data"]["fingerprint"] == self.describe["data"]["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}, which tells how to resume, is unreadable ({error})"
            ) from error
        ours = json.loads(json.dumps({**self.describe["model"], "seed": self.config.seed}))
        changed = [f"{k} {earlier.get(k)} → {v}" for k, v in ours.items() if earlier.get(k) != v]
        if not same_data:
            changed.append(f"{stored['data']['n']} other images → {len(self.dataset)}")
        if changed:
            raise UserError(
                f"{self.folder} holds another run ({'; '.join(changed)}); "
                "use the same flags and data, or another --workdir (--resume this one to go on)"
            )

    def _load(self, folder: Path, step: int) -> str:
        averaged = sorted(folder.glob(f"ema_*_{step:06d}.pt"))
        if not averaged:
            raise UserError(f"{folder} has no ema_*_{step:06d}.pt")
        state = checkpoint.load_file(checkpoint.state_path(folder, step))
        checkpoint.load_weights(self.model, checkpoint.model_path(folder, step))
        checkpoint.load_weights(self.ema.shadow, averaged[0])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr
        if state["scaler"] and self.scaler.is_enabled():  # precision may change on the way
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.position = state["step"], state["position"]
        self.replaced = state["replaced"] if self.context.is_main else 0
        return f"resuming from step {step} in {folder}"

    def _open_folder(self) -> None:
        """Make the run's folder and write its config.json."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make {self.folder}: {error.strerror}") from error
        files.require_space(self.folder, self._checkpoint_bytes())
        files.write_text(self.folder / "config.json", json.dumps(self.describe, indent=2) + "\n")

    def _introduce(self, resumed: str) -> None:
        config, data = self.config, self.dataset
        parameters = sum(p.numel() for p in self.model.parameters())
        lines = [
            f"run     {self.folder}",
            f"data    {config.dataset}, split {config.split}: {len(data)} images at "
            f"{data.size}×{data.size}",
            f"model   {parameters / 1e6:.1f} M parameters, z of {self.model.config.latent_dim}, "
            f"{'stochastic' if self.model.config.stochastic else 'deterministic'} encoder, "
            f"{self.model.config.schedule} bridge",
            f"batch   {self.global_batch} images a step = {config.batch_size} × "
            f"{self.context.world_size} process(es) on {self.device.type}, "
            f"micro-batch {min(config.microbatch, config.batch_size)}, {config.precision}",
            f"steps   {config.max_steps}, a checkpoint every {config.save_interval}",
            resumed,
        ]
        for line in [*lines, *data.notes]:
            self.log.say(line)
        if self.step >= config.max_steps:
            self.log.say(f"step {self.step} of {config.max_steps}: done (raise --max_steps)")
        sys.stdout.flush()


class Sums:
    """Running sums over one log interval, kept on the device so that no step waits for them."""

    def __init__(self, latent_dim: int, device: torch.device) -> None:
        # float64 where there is one (MPS has none): z's variance is a difference of sums.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        zeros: Any = lambda n: torch.zeros(n, dtype=dtype, device=device)  # noqa: E731
        self.terms = zeros(4)  # loss, xs_mse, ‖z‖, count of images
        self.z, self.z_squared = zeros(latent_dim), zeros(latent_dim)
        self.gradients = zeros(3)  # ‖g‖, ‖g of the encoder‖, count of finite steps

    @torch.no_grad()
    def add_terms(self, terms: dict[str, Tensor]) -> None:
        """Add the terms of one micro-batch."""
        z = terms["z"].to(self.z.dtype)
        values = [terms["loss"].sum(), terms["xs_mse"].sum(), z.norm(dim=1).sum()]
        count = torch.full((), float(len(z)), device=z.device)
        self.terms += torch.stack([v.detach().to(self.z.dtype) for v in [*values, count]])
        self.z += z.sum(0)
        self.z_squared += z.square().sum(0)

    @torch.no_grad()
    def add_gradients(self, model: DBAE) -> None:
        """Add the norms of this step's gradients (an fp16 overflow is left out)."""
        norms = torch.stack([_norm(model.parameters()), _norm(model.encoder.parameters())])
        row = torch.cat([norms, torch.ones_like(norms[:1])]).to(self.gradients.dtype)
        self.gradients += torch.where(torch.isfinite(norms[0]), row, torch.zeros_like(row))

    def row(self, context: Context) -> dict[str, float]:
        """Means over the interval and all ranks."""
        sums = torch.cat([self.terms, self.z, self.z_squared])
        sums = context.all_reduce_sum(sums)
        loss, xs_mse, z_norm, count = sums[:4].tolist()
        mean, mean_square = (sums[4:] / count).chunk(2)
        std = (mean_square - mean.square()).clamp(min=0).sqrt()
        grad, grad_encoder, finite = self.gradients.tolist()
        return {
            "loss": loss / count,
            "xs_mse": xs_mse / count,
            "grad_norm": grad / max(finite, 1),
            "grad_norm_encoder": grad_encoder / max(finite, 1),
            "z_norm": z_norm / count,
            "z_std": float(std.mean()),
            "z_dead": float((std < DEAD_STD).double().mean()),
        }


def _norm(parameters: Iterable[Tensor]) -> Tensor:
    grads = [p.grad for p in parameters if p.grad is not None]
    return torch.stack(torch._foreach_norm(grads)).norm()
