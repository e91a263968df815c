"""Training: the loop, one step of it, and what surrounds it (resuming, logging, saving).

Everything random is a function of (seed, global sample position), see `dbae.random`: a run that
was interrupted continues at a number, and the number of processes does not decide which image
meets which flip, time or noise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import inspect
import json
import math
import os
import platform
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from . import checkpoint, files
from .data import image_grid, open_dataset, to_model_range, to_uint8
from .data.loader import Batch, WorkerLost, default_workers, load_batches
from .data.order import BatchOrder, RankBatches
from .distributed import Context
from .ema import Ema
from .errors import Stopped, UserError
from .guard import StepGuard
from .lock import FolderLock
from .model import DBAE
from .optimizer import RAdam
from .precision import choose, require_compiler
from .presets import ModelConfig, TrainConfig
from .random import fold, normal, uniform
from .remote import Mirror
from .resume import find_start
from .runlog import BAD_STEPS, RunLog
from .sampling import FEW, best_with_few
from .stop import StopRequest
from .store import CheckpointStore, require_same_run
from .sums import Sums

_GRID_IMAGES = 8
_LOADER_TRIES = 4  # in a row without a batch between them
# DDP's name for it changed in torch 2.13.
_LOCAL_BUFFERS: dict[str, Any] = (
    {"forward_sync_buffers": False}
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else {"broadcast_buffers": False}
)


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
            file) gives its weights only. Of a run that has checkpoints of its own, see
            `dbae.resume.find_start`.
        command: recorded in config.json.

    Raises:
        UserError: data, configuration, checkpoint or disk do not fit, ranks differ, or another
            process trains in the folder.
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
        self.stop = StopRequest(config.max_minutes)
        self.folder = Path(config.workdir) / experiment_name(config.dataset, model_config)
        with context.together():
            if config.compile:
                require_compiler(self.device)
            source = (config.dataset, config.data_dir, model_config.image_size)
            policy = (config.bad_images, config.fast_decode)
            self.dataset = open_dataset(*source, config.split, *policy)
            self.pictures = self.dataset
            if config.split == "train":
                with contextlib.suppress(UserError):  # a set may have no part that is held out
                    self.pictures = open_dataset(*source, "test", config.bad_images)
            self.describe = self._describe(model_config, command, resume)
        context.require_same(self._common_facts())
        self.workers = config.num_workers
        if self.workers < 0:
            self.workers = default_workers(self.dataset, context.ranks_here())
        self.order = BatchOrder(len(self.dataset), config.seed)
        self.global_batch = config.batch_size * context.world_size

        torch.manual_seed(fold(config.seed, "initial weights"))
        self.model = DBAE(model_config).to(self.device)
        self.model.accelerate(config.precision, config.compile)
        if config.activation_checkpointing:
            self.model.checkpoint_activations()
        self.ema = Ema(self.model, config.ema_rate)
        self.optimizer = RAdam(self.model.parameters(), lr=config.lr)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.model.precision == "fp16")
        self.guard = StepGuard(config.max_bad_steps, config.max_spike)
        self.step = self.position = self.replaced = 0
        self.sums = Sums(model_config.latent_dim, self.device)
        self._resources = contextlib.ExitStack()
        try:
            with context.together():
                if context.is_main:
                    self._open_folder()
            notes = self._resume(resume)
            with context.together():
                if context.is_main:
                    self._open_log(notes)
            self.wrapped = self._wrapped()
        except BaseException:
            self.close()
            raise

    def _wrapped(self) -> Any:
        """The model, or what averages its gradients over the ranks."""
        if self.context.world_size == 1:
            return self.model
        # Batch norm uses each rank's own micro-batch, as in the published training: buffers
        # stay local, and rank 0's are saved. Spectral norm's vectors follow the weights, which
        # are alike on all ranks.
        # oneDNN's gradients of 1×1 convolutions have other, equivalent strides: no news.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view")
        wrapped = DistributedDataParallel(
            self.model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            **_LOCAL_BUFFERS,
            gradient_as_bucket_view=True,
        )
        self._settle_buckets(wrapped)
        return wrapped

    def _settle_buckets(self, wrapped: DistributedDataParallel) -> None:
        """Let DDP regroup the gradients now, which it does after its first backward pass.

        The groups decide in which order three or more ranks add up, so that otherwise a step would
        round differently just after a restart.
        """
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        count, size = min(self.config.microbatch, self.config.batch_size), self.dataset.size
        images = torch.zeros(count, 3, size, size, dtype=torch.uint8, device=self.device)
        terms = wrapped(*self._draw(to_model_range(images), range(count)))
        terms["loss"].sum().backward()
        self.optimizer.zero_grad(set_to_none=True)
        for buffer, before in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(before)

    def close(self) -> None:
        """Let go of the run's folder; `run` does so at its end."""
        self._resources.close()

    # The loop -----------------------------------------------------------------------------

    def run(self) -> Path:
        """Train to max_steps; returns the run's folder.

        Raises:
            Stopped: a signal or --max_minutes ended training early; all is saved.
            UserError: it cannot go on (a full disk, too many bad steps, unreadable data).
        """
        config = self.config
        with self._resources, self.stop:
            for batch in self._batches():
                self._train_step(batch)
                self.step += 1
                self.position += self.global_batch
                if self.context.is_main:
                    self.log.advance()

                last = self.step == config.max_steps
                stopping = self.context.any(self._must_stop()) and not last
                if last or self.step % config.log_interval == 0:
                    self._write_log()
                if config.sample_interval and (last or self.step % config.sample_interval == 0):
                    with self.context.together():
                        if self.context.is_main:
                            self._write_samples()
                if last or stopping or self.step % config.save_interval == 0:
                    self._save(wait=last or stopping)
                if stopping:
                    self._end_early()
            if self.context.is_main:
                self.store.settle()
        return self.folder

    def _train_step(self, batch: Batch) -> None:
        """Forward and backward over micro-batches, then one update, unless the step is bad."""
        config = self.config
        first = self.position + self.context.rank * config.batch_size
        positions = range(first, first + config.batch_size)
        self.replaced += batch.replaced
        images = to_model_range(batch.images.to(self.device, non_blocking=True))
        sums, drawn = Sums(self.model.config.latent_dim, self.device), []
        starts = range(0, config.batch_size, config.microbatch)
        for start in starts:
            part = slice(start, start + config.microbatch)
            x0, t, noise, latent_noise = self._draw(images[part], positions[part])
            torch.manual_seed(fold(config.seed, "dropout", positions[start]))
            with self._gradient_sync(start == starts[-1]):
                terms = self.wrapped(x0, t, noise, latent_noise)
                loss = terms["loss"].sum() / config.batch_size
                # A loss that is not finite spoils the gradients, whose mean tells every rank.
                spoil = torch.where(loss.isfinite(), 1.0, float("nan"))
                self.scaler.scale(loss).backward(spoil)
            sums.add_terms(terms)
            drawn.append(torch.stack([t.float(), terms["loss"].detach().float()]))
        self.scaler.unscale_(self.optimizer)
        norms = torch.stack(
            [_norm(self.model.parameters()), _norm(self.model.encoder.parameters())]
        )
        self._update(norms, torch.cat(drawn, dim=1), sums)
        self.optimizer.zero_grad(set_to_none=True)

    def _update(self, norms: Tensor, drawn: Tensor, sums: Sums) -> None:
        """Apply the gradient, or on all ranks alike leave the step out.

        Args:
            norms: (2,) of the gradient, which is the mean over all ranks, and of its encoder part.
            drawn: (2, batch_size), this rank's t and losses.
            sums: this step's.
        """
        finite = bool(norms[0].isfinite())
        mean_loss = None
        if finite and self.config.max_spike:
            total = self.context.all_reduce_sum(drawn[1].double().sum())
            mean_loss = float(total) / self.global_batch
        if finite and not (mean_loss and self.guard.spikes(mean_loss)):
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.ema.update(self.step)
            self.guard.applied(mean_loss)
            sums.add_gradients(norms)
            self.sums.add(sums)
            return
        suspects = [
            (place, t, loss)
            for place, (t, loss) in enumerate(drawn.T.tolist())
            if not math.isfinite(loss)
        ]
        by_rank = self.context.gather_objects(suspects)
        scale = self.scaler.get_scale()
        if not finite and not any(by_rank) and self.scaler.is_enabled() and scale > 1:
            self.scaler.step(self.optimizer)  # which does nothing, and
            self.scaler.update()  # the scale is lowered
            self.guard.overflows += 1
            self.sums.add(sums)
            return
        self.scaler.update(scale)
        self._skip(by_rank, float(norms[0]), mean_loss)

    def _skip(
        self, by_rank: list[list[tuple[int, float, float]]], norm: float, mean_loss: float | None
    ) -> None:
        """Tell of a bad step, and stop when there were too many in a row."""
        size = self.config.batch_size
        images = self.order.indices(self.position, self.global_batch)
        samples = [
            {
                "rank": rank,
                "position": self.position + rank * size + place,
                "image": self.dataset.image_name(images[rank * size + place]),
                "t": t,
                "loss": str(loss),
            }
            for rank, suspects in enumerate(by_rank)
            for place, t, loss in suspects
        ]
        if samples:
            why = f"loss {samples[0]['loss']} of {len(samples)} of {len(images)} images"
        elif mean_loss is not None:
            why = f"loss {mean_loss:.4g}, a spike"
        else:
            why = f"gradient norm {norm}"
        if self.context.is_main:
            self.log.bad_step(
                {
                    "step": self.step + 1,
                    "why": why,
                    "first_position": self.position,
                    "images": images,
                    "not_finite": samples,
                }
            )
            self.log.say(
                f"step={self.step + 1} skipped: {why}; no weight was changed (see {BAD_STEPS})"
            )
        with self.context.together():
            self.guard.skipped(self.step + 1, why)

    def _must_stop(self) -> bool:
        return self.stop.reason is not None or (self.context.is_main and self.store.failed)

    def _end_early(self) -> None:
        """Raise Stopped, on all ranks with the same reason."""
        reasons = self.context.gather_objects((self.stop.reason, self.stop.code))
        reason, code = next(pair for pair in reasons if pair[0] is not None)
        if self.context.is_main:
            try:
                self.store.settle()
            except UserError as error:  # all is saved here: no reason not to go on
                self.log.say(f"not mirrored: {error}")
        raise Stopped(
            f"{reason}: stopped at step {self.step} of {self.config.max_steps}, all is saved; "
            "the same command goes on from here",
            code,
        )

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
        """This rank's batches from the present step on; a lost worker is replaced."""
        tries = 0
        while self.step < self.config.max_steps:
            try:
                for batch in self._timed(self._load()):
                    tries = 0
                    yield batch
            except WorkerLost as lost:
                tries += 1
                if tries == _LOADER_TRIES:
                    raise
                who = f"rank {self.context.rank}: " if self.context.world_size > 1 else ""
                note = f"{who}{lost}; loading starts anew at step {self.step + 1}"
                print(note, file=sys.stderr, flush=True)
            gc.collect()  # what is left of the lost workers, lest the new ones inherit it

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; the log is told how long each was waited for."""
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            if self.context.is_main:
                self.log.waited(time.perf_counter() - started)
            yield batch

    def _load(self) -> Iterator[Batch]:
        config, context = self.config, self.context
        batches = RankBatches(
            self.order,
            self.position,
            self.position + (config.max_steps - self.step) * self.global_batch,
            config.batch_size,
            context.rank,
            context.world_size,
        )
        # A worker that hangs is found before the other ranks lose patience with this one.
        return load_batches(
            self.dataset, batches, self.workers, self.device.type == "cuda", config.timeout_s / 2
        )

    def _gradient_sync(self, now: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients are averaged over ranks with the last micro-batch only."""
        if now or self.context.world_size == 1:
            return contextlib.nullcontext()
        no_sync: contextlib.AbstractContextManager[None] = self.wrapped.no_sync()
        return no_sync

    # Output -------------------------------------------------------------------------------

    def _write_log(self) -> None:
        row = self.sums.row(self.context)
        self.sums = Sums(self.model.config.latent_dim, self.device)
        replaced = sum(self.context.gather_objects(self.replaced))
        with self.context.together():
            if self.context.is_main:
                every = self.config.save_interval
                upcoming = min(-(-self.step // every) * every, self.config.max_steps)
                counts = {
                    "step": self.step,
                    "images": self.position,
                    "replaced_images": replaced,
                    "bad_steps": self.guard.bad,
                    "overflows": self.guard.overflows,
                }
                self.log.write({**counts, **row}, self.global_batch, upcoming)

    def _write_samples(self) -> None:
        """Originals, endpoints and reconstructions of a few images by the averaged model."""
        self.log.pause()
        count = min(_GRID_IMAGES, len(self.pictures))
        originals = torch.stack([self.pictures[i].image for i in range(count)])
        model = self.ema.shadow
        with torch.no_grad():
            z = model.encode(to_model_range(originals).to(self.device), mean=True)
            x_T = model.endpoint(z)
            sampler = best_with_few(model.bridge)
            made = model.sample(z, x_T, sampler=sampler, steps=FEW).images
            rows = [originals, to_uint8(x_T), to_uint8(made)]
        grid = image_grid(torch.cat([row.cpu() for row in rows]), count)
        path = self.folder / "samples" / f"{self.step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        with files.atomic_file(path) as file:
            grid.save(file, format="PNG")
        self.log.unpause()

    def _save(self, wait: bool) -> None:
        """A checkpoint; `wait`: until it and those before are on the disk. A collective."""
        # What belongs to a rank, so that the next line of the log is the same after a restart.
        ranks = self.context.gather_objects({"sums": self.sums.state(), "replaced": self.replaced})
        with self.context.together():
            if self.context.is_main:
                self.log.pause()
                self.store.save(self.step, self._contents(ranks))
                if wait:
                    self.store.finish()
                self.log.unpause()

    def _contents(self, ranks: list[dict[str, Any]]) -> dict[str, Any]:
        """What a checkpoint consists of: file name → content."""
        for name, value in self.model.state_dict().items():
            if not value.isfinite().all():
                raise UserError(
                    f"the weights are no longer finite at step {self.step} ({name}): training has "
                    f"diverged, no checkpoint is written. Those in {self.folder} are from before; "
                    "try a lower --lr, --precision bf16 or fp32"
                )
        run = {key: self.describe[key] for key in ("train", "data", "environment")}
        paths = (
            checkpoint.model_path(self.folder, self.step),
            checkpoint.ema_path(self.folder, self.config.ema_rate, self.step),
            checkpoint.state_path(self.folder, self.step),
        )
        state = {
            "step": self.step,
            "position": self.position,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "guard": self.guard.state(),
            "ranks": ranks,
            "config": json.dumps(self.describe),
        }
        models = (self.model, self.ema.shadow)
        contents = [*(checkpoint.weights(model, run) for model in models), state]
        return {path.name: content for path, content in zip(paths, contents, strict=True)}

    # Start --------------------------------------------------------------------------------

    def _describe(
        self, model_config: ModelConfig, command: str, resume: str | None
    ) -> dict[str, Any]:
        """What config.json holds."""
        cuda = self.device.type == "cuda"
        return {
            "model": dataclasses.asdict(model_config),
            "train": dataclasses.asdict(self.config),
            "data": self.dataset.describe(),
            "start": resume and os.path.abspath(resume),
            # of the last start; a run may have had several
            "environment": {
                "world_size": self.context.world_size,
                "device": torch.cuda.get_device_name() if cuda else self.device.type,
                "python": platform.python_version(),
                "torch": str(torch.__version__),
                "precision": choose(self.config.precision, self.device),
                "command": command,
            },
        }

    def _common_facts(self) -> dict[str, Any]:
        """What must be alike on all ranks, by names for people."""
        flags = {**self.describe["model"], **self.describe["train"]}
        return {
            **{f"--{name}": value for name, value in flags.items()},
            "the images": self.describe["data"]["fingerprint"],
            "the version of torch": self.describe["environment"]["torch"],
            "the kind of device": self.device.type,
            "what --precision means there": self.describe["environment"]["precision"],
        }

    def _open_folder(self) -> None:
        """Make the run's folder and lock it."""
        files.make_folder(self.folder)
        self.lock = self._resources.enter_context(FolderLock(self.folder))
        for path in self.folder.glob(".*.tmp"):  # half a file that a killed process left
            path.unlink(missing_ok=True)
        self.store = CheckpointStore(
            self.folder,
            self.describe,
            self.config.keep_last,
            self.config.keep_every,
            self.config.async_save,
            lambda text: self.log.say(text),
            Mirror(self.config.mirror, self.folder) if self.config.mirror else None,
        )
        self._resources.callback(self.store.close)

    def _open_log(self, notes: list[str]) -> None:
        """Write config.json and the log's first lines."""
        config = self.config
        files.require_space(self.folder, self._checkpoint_bytes())
        text = json.dumps(self.describe, indent=2) + "\n"
        files.write_text(self.folder / "config.json", text)
        self.store.check_mirror()
        self.log = RunLog(self.folder, self.step, config.max_steps, config.logger, self.describe)
        self._resources.callback(self.log.close)
        if self.lock.stale:
            notes = [f"the lock of {self.lock.stale}, which is gone, was taken over", *notes]
        self._introduce(notes)

    def _checkpoint_bytes(self) -> int:
        """Live and averaged weights and RAdam's two moments, with some room."""
        return int(4.1 * sum(v.nbytes for v in self.model.state_dict().values())) + 2**20

    def _resume(self, resume: str | None) -> list[str]:
        """Load what there is to continue from; rank 0 says in words what that was."""
        start = None
        with self.context.together():
            path = None if resume is None else checkpoint.local(resume)
            if self.context.is_main:
                start = find_start(self.store, self.describe, path)
        (start, *_) = self.context.gather_objects(start)
        assert start is not None
        with self.context.together():
            if start.step is not None:
                self._load_checkpoint(start.folder, start.step)
            elif start.weights is not None:
                for model in (self.model, self.ema.shadow):
                    checkpoint.load_weights(model, start.weights)
        return start.notes

    def _load_checkpoint(self, folder: Path, step: int) -> None:
        averaged = sorted(folder.glob(f"ema_*_{step:06d}.pt"))
        if not averaged:
            raise UserError(f"{folder} has no ema_*_{step:06d}.pt")
        state = checkpoint.load_file(checkpoint.state_path(folder, step))
        if "ranks" not in state:
            raise UserError(
                f"{checkpoint.state_path(folder, step)} is of an earlier version of this package; "
                f"--resume {averaged[0]} from another --workdir starts with its weights"
            )
        if folder == self.folder:
            require_same_run(state["config"], self.describe, checkpoint.state_path(folder, step))
        checkpoint.load_weights(self.model, checkpoint.model_path(folder, step))
        checkpoint.load_weights(self.ema.shadow, averaged[0])
        self.optimizer.load_state_dict(state["optimizer"])
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr
        if state["scaler"] and self.scaler.is_enabled():  # precision may change on the way
            self.scaler.load_state_dict(state["scaler"])
        self.guard.load(state["guard"])
        self.step, self.position = state["step"], state["position"]
        self._load_rank(state["ranks"])

    def _load_rank(self, ranks: list[dict[str, Any]]) -> None:
        """Take over this rank's part of the log's sums; with another world size rank 0 has all."""
        if len(ranks) == self.context.world_size:
            ranks = [ranks[self.context.rank]]
        elif not self.context.is_main:
            return
        self.replaced = sum(rank["replaced"] for rank in ranks)
        for rank in ranks:
            part = Sums(self.model.config.latent_dim, self.device)
            part.load(rank["sums"])
            self.sums.add(part)

    def _introduce(self, notes: list[str]) -> None:
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
            f"micro-batch {min(config.microbatch, config.batch_size)}, {self.model.precision}",
            f"steps   {config.max_steps}, a checkpoint every {config.save_interval}, "
            f"{self._kept()}",
            *notes,
        ]
        for line in [*lines, *data.notes]:
            self.log.say(line)
        if self.step >= config.max_steps:
            self.log.say(f"step {self.step} of {config.max_steps}: done (raise --max_steps)")
        sys.stdout.flush()

    def _kept(self) -> str:
        last, every = self.config.keep_last, self.config.keep_every
        if not last:
            return "all are kept"
        return f"the newest {last} are kept" + (f" and every {every}th step's" if every else "")


def _norm(parameters: Iterable[Tensor]) -> Tensor:
    grads = [p.grad for p in parameters if p.grad is not None]
    return torch.stack(torch._foreach_norm(grads)).norm()
