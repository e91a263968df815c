"""Weights on disk: the released format, own checkpoints, atomic writing, resuming.

A weight file (`ema_*.pt`, `model_*.pt`) is a flat state dict with the released key names, as
others' readers of that format expect. Our own files carry their configuration as state-dict
metadata, which such readers pass over. Key names in memory differ only by prefix; `_PREFIXES` is
the one translation.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor, nn

from .errors import UserError
from .files import atomic_file, sha256
from .model import DBAE
from .presets import ModelConfig
from .remote import fetch, is_remote
from .unet import UNET_MULTIPLIERS

# In memory → on disk. The UNet's keys stand at the top level of the file.
_PREFIXES = (("encoder.", "encoder."), ("endpoint.", "decoder."), ("unet.", ""))
# Parts of released files that no forward pass uses: accepted when loading, never created.
_UNUSED_PREFIX = "decoder.feat_256."
_METADATA_KEY = "dbae"
# What a file's own configuration may be overridden with: it changes no weight's shape or meaning.
_FREE_FIELDS = ("end_data", "sigma_data", "cov_xy", "weight_schedule", "dropout")
# No model that is known exceeds these; of one that does, the file is asked whether it holds as much
# before memory is taken for it.
_USUAL = {"num_channels": 256, "endpoint_channels": 256, "latent_dim": 4096, "num_res_blocks": 8}

StateDict = Mapping[str, Tensor]


# Names ------------------------------------------------------------------------------------


def to_released(state: StateDict) -> OrderedDict[str, Tensor]:
    """Rename a DBAE's state dict to the released key names."""
    return _rename(state, _PREFIXES)


def from_released(state: StateDict) -> OrderedDict[str, Tensor]:
    """Rename released keys to those of a DBAE in memory (the inverse of `to_released`)."""
    return _rename(state, [(theirs, ours) for ours, theirs in _PREFIXES])


def _rename(state: StateDict, prefixes: Sequence[tuple[str, str]]) -> OrderedDict[str, Tensor]:
    renamed: OrderedDict[str, Tensor] = OrderedDict()
    for key, value in state.items():
        old, new = next(pair for pair in prefixes if key.startswith(pair[0]))
        renamed[new + key[len(old) :]] = value
    return renamed


# Reading ----------------------------------------------------------------------------------


def load_weights(model: nn.Module, source: str | os.PathLike[str] | StateDict) -> None:
    """Load released-format weights into a DBAE, strictly.

    Keys that the format marks as unused are accepted. Any other missing or unexpected key, or
    shape that differs, raises UserError that names the first of them; nothing is loaded then.
    """
    name = "the state dict" if isinstance(source, Mapping) else str(source)
    state = source if isinstance(source, Mapping) else read_weights(source)[0]
    model.load_state_dict(from_released(_fitting(model, state, name)))


def _fitting(model: nn.Module, state: StateDict, name: str) -> StateDict:
    """The tensors that the model has; UserError where these are not all, or of other shapes."""
    expected = to_released(model.state_dict())
    found = {
        key: value
        for key, value in state.items()
        if key in expected or not key.startswith(_UNUSED_PREFIX)
    }
    problems = [f"lacks {key}" for key in expected if key not in found]
    problems += [f"has the unknown key {key}" for key in found if key not in expected]
    problems += [
        f"{key} has shape {tuple(found[key].shape)}, the model {tuple(value.shape)}"
        for key, value in expected.items()
        if key in found and found[key].shape != value.shape
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise UserError(
            f"{name} does not fit this architecture: {'; '.join(problems[:3])}{more}. "
            "Use the checkpoint's own --image_size, --num_channels, --latent_dim and STO"
        )
    return found


def load_model(
    path: str | os.PathLike[str], device: str | torch.device = "cpu", **overrides: Any
) -> DBAE:
    """A model in eval mode from a weight file, own or released, or from a run's folder.

    The architecture comes from the file's own configuration, from `config.json` beside it, or,
    for a released file, from its shapes. Of a released file the schedule is not recorded: it
    is the last part of its folder's name (`…_vp`), or "vp", unless given.

    Args:
        path: a `.pt` file, here or elsewhere (`gs://…`), or a folder here, of which the newest
            `ema_*.pt` is taken.
        device: where the model goes.
        overrides: fields of ModelConfig. end_data, sigma_data, cov_xy, weight_schedule and
            dropout replace what is stored; any other must agree with it.

    Raises:
        UserError: no such file, not a checkpoint, or it contradicts the overrides.
    """
    path = newest_weights(local(path))
    state, stored = read_weights(path)
    config = _stored_config(stored, path) if stored else _infer_config(state, path, overrides)
    for name, value in overrides.items():
        if name not in {field.name for field in dataclasses.fields(ModelConfig)}:
            raise UserError(f"load_model: {name!r} is not a model option")
        if name not in _FREE_FIELDS and getattr(config, name) != value:
            raise UserError(
                f"{path} was trained with {name}={_word(getattr(config, name))}, "
                f"but {_word(value)} was asked for; ask for the former or choose another checkpoint"
            )
    config = dataclasses.replace(config, **overrides)
    if any(getattr(config, name) > most for name, most in _USUAL.items()):
        _require_as_large(config, state, path)
    model = DBAE(config)
    load_weights(model, state)
    model.trained_on = (stored or {}).get("data")
    return model.to(device).eval()


def read_weights(path: str | os.PathLike[str]) -> tuple[StateDict, dict[str, Any] | None]:
    """A weight file's tensors and the run's configuration stored in or beside it, if any.

    Prefixes that wrappers leave (`module.`, `_orig_mod.`) are taken off. Nothing in the file is
    executed. Raises UserError where it is absent or is not a state dict.
    """
    path = Path(path)
    state = load_file(path)
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and _is_plain(value) for key, value in state.items()
    ):
        raise UserError(f"{path} is not a checkpoint: expected a dict of tensors by name")
    metadata = getattr(state, "_metadata", None)
    config = metadata.get(_METADATA_KEY) if isinstance(metadata, dict) else None
    config = config or _config_beside(path)
    state = {re.sub(r"^(module\.|_orig_mod\.)+", "", key): v for key, v in state.items()}
    return state, config


def _is_plain(value: Any) -> bool:
    """Whether this is a tensor of real numbers, each of which is in the file."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not (value.is_complex() or value.is_quantized)
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def load_file(path: Path) -> Any:
    """torch.load on the CPU that executes nothing from the file; UserError where it fails."""
    if not os.path.isfile(path):
        raise UserError(f"checkpoint {path} does not exist")
    if damage := damaged(path):
        raise UserError(f"{damage}; use another checkpoint")
    try:
        _require_intact(path, verified=_recorded_hash(path) is not None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the very files that are refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # foreign bytes make an unpickler raise anything
        raise UserError(
            f"{path} is not a readable PyTorch checkpoint of plain tensors "
            f"({path.stat().st_size} bytes; {type(error).__name__})"
        ) from error


def _require_intact(path: Path, verified: bool) -> None:
    """Raise zipfile.BadZipFile where an archive that torch.save wrote was changed since.

    torch does not compare the check sums in it, and would unpack a small file to any size.
    `verified`: the whole file has been compared with its recorded hash, which says more than these.
    """
    if not zipfile.is_zipfile(path):  # the form before PyTorch 1.6, or no checkpoint at all
        return
    with zipfile.ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
            raise zipfile.BadZipFile("it unpacks to more than its size")
        if not verified and (changed := archive.testzip()):
            raise zipfile.BadZipFile(changed)


def local(path: str | os.PathLike[str]) -> Path:
    """The path; of a remote file a copy of it here (see `dbae.remote.fetch`)."""
    return fetch(str(path)) if is_remote(str(path)) else Path(path)


def newest_weights(path: Path) -> Path:
    """`path` itself if it is a file; of a folder the `ema_*.pt` with the highest step."""
    if not os.path.isdir(path):
        return path
    found = sorted(path.glob("ema_*_*.pt"), key=step_of)
    if not found:
        raise UserError(f"folder {path} holds no ema_*.pt checkpoint")
    return found[-1]


def step_of(path: Path) -> int:
    """The step in a checkpoint's name (`ema_0.9999_010000.pt` → 10000), −1 if there is none."""
    match = re.search(r"_(\d+)$", path.stem)
    return int(match.group(1)) if match else -1


def ema_path(folder: Path, rate: float, step: int) -> Path:
    """`ema_{rate}_{step:06d}.pt`, the released name of averaged weights."""
    return folder / f"ema_{rate}_{step:06d}.pt"


def model_path(folder: Path, step: int) -> Path:
    """`model_{step:06d}.pt`, the released name of the live weights."""
    return folder / f"model_{step:06d}.pt"


def state_path(folder: Path, step: int) -> Path:
    """`state_{step:06d}.pt`: optimizer, scaler, position; what resuming needs besides weights."""
    return folder / f"state_{step:06d}.pt"


def checksums_path(folder: Path, step: int) -> Path:
    """`checkpoint_{step:06d}.sha256`: hashes of the step's files, for `sha256sum --check`."""
    return folder / f"checkpoint_{step:06d}.sha256"


def damaged(path: Path, hash_of: Callable[[Path], str] = sha256) -> str | None:
    """How a file differs from what was written, in words; None if it does not or nobody knows."""
    recorded = _recorded_hash(path)
    if recorded is None or hash_of(path) == recorded:
        return None
    return (
        f"{path} is damaged ({path.stat().st_size} bytes, not the SHA-256 that was recorded when "
        "it was written)"
    )


def _recorded_hash(path: Path) -> str | None:
    return read_checksums(checksums_path(path.parent, step_of(path))).get(path.name)


def read_checksums(path: Path) -> dict[str, str]:
    """File name → SHA-256, as `sha256sum` writes them; nothing where there is no such file."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return {}
    pairs = (line.split(maxsplit=1) for line in lines)
    return {pair[1]: pair[0] for pair in pairs if len(pair) == 2}


def _config_beside(path: Path) -> dict[str, Any] | None:
    beside = path.parent / "config.json"
    if not beside.is_file():
        return None
    try:
        config = dict(json.loads(beside.read_text()))
        config["model"]
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        raise UserError(f"{beside} is not a run's config.json ({error!r})") from error
    return config


def _stored_config(stored: Any, path: Path) -> ModelConfig:
    """The architecture in the configuration that was stored in or beside a file."""
    try:
        config = ModelConfig.from_dict(dict(stored["model"]))
        for field in dataclasses.fields(config):
            value, usual = getattr(config, field.name), type(field.default)
            if not isinstance(value, (int, float) if usual is float else usual):
                raise TypeError(f"{field.name} is {value!r}")
        if not isinstance(stored.get("data"), dict | None):
            raise TypeError(f"data is {stored['data']!r}")
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise UserError(f"{path}: the configuration stored with it is damaged ({error})") from error
    return config


def _require_as_large(config: ModelConfig, state: StateDict, path: Path) -> None:
    """Raise UserError where a file does not hold the model that it says; takes no memory for it."""
    blocks = config.num_res_blocks
    try:
        if blocks > len(state):
            raise ValueError(f"{blocks} residual blocks in {len(state)} tensors")
        with torch.device("meta"):
            model = DBAE(config)
    except (RuntimeError, ValueError, OverflowError, TypeError) as error:
        raise UserError(f"{path}: no model is as large as it says ({error})") from error
    _fitting(model, state, str(path))


def _infer_config(state: StateDict, path: Path, overrides: dict[str, Any]) -> ModelConfig:
    """The configuration of a released file, from its keys and shapes."""
    try:
        latent_dim = state["label_emb.weight"].shape[1]
        size = next(
            int(match.group(1))
            for match in (re.match(r"decoder\.to_(\d+)\.weight_orig", key) for key in state)
            if match
        )
        blocks = {int(key.split(".")[1]) for key in state if key.startswith("input_blocks.")}
        levels = len(UNET_MULTIPLIERS[size])
        num_res_blocks = len(blocks) // levels - 1
        attention = tuple(
            size >> level
            for level in range(levels)
            if f"input_blocks.{1 + level * (num_res_blocks + 1)}.1.qkv.weight" in state
        )
        stochastic = state["encoder.out.3.weight"].shape[0] == 2 * latent_dim
        num_channels = state["input_blocks.0.0.weight"].shape[0]
        endpoint_channels = state["decoder.init.init.1.weight"].shape[0] // 32
    except (KeyError, StopIteration, IndexError, ValueError) as error:
        raise UserError(
            f"{path} is not a DBAE checkpoint: it lacks the keys of one "
            "(label_emb.weight, decoder.to_*.weight_orig, encoder.out.3.weight, …)"
        ) from error
    suffix = re.search(r"_((?:vp|ve)(?:_simple)?)$", path.resolve().parent.name)
    schedule = overrides.get("schedule") or (suffix.group(1) if suffix else "vp")
    return ModelConfig(
        image_size=size,
        num_channels=num_channels,
        latent_dim=latent_dim,
        endpoint_channels=0 if endpoint_channels == min(64, num_channels) else endpoint_channels,
        stochastic=stochastic,
        num_res_blocks=num_res_blocks,
        attention_resolutions=attention,
        schedule=schedule,
    )


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


# Writing ----------------------------------------------------------------------------------


def save_weights(path: Path, model: DBAE, run: Mapping[str, Any] | None = None) -> None:
    """Write a model's weights in the released format, with its configuration as metadata.

    `run`: more of the run's configuration to store (JSON-able values).
    """
    write(path, weights(model, run))


def weights(model: DBAE, run: Mapping[str, Any] | None = None) -> StateDict:
    """What `save_weights` writes."""
    state = OrderedDict((k, v.detach()) for k, v in to_released(model.state_dict()).items())
    metadata = {**(run or {}), "model": dataclasses.asdict(model.config)}
    state._metadata = {"": {"version": 1}, _METADATA_KEY: metadata}  # type: ignore[attr-defined]
    return state


def write(path: Path, content: Any) -> str:
    """Write tensors, or nested dicts and lists of tensors, numbers and text; returns the SHA-256.

    The hash is of what was meant to be written: to read the file again would not tell a disk that
    lies.
    """
    with atomic_file(path) as file:
        hashing = _Hashing(file)
        torch.save(to_cpu(content), cast(IO[bytes], hashing))
    return hashing.digest.hexdigest()


def to_cpu(content: Any, copy: bool = False) -> Any:
    """Nested dicts and lists with their tensors on the CPU, in the usual order in memory.

    `copy`: also those that are there.
    """
    if isinstance(content, Tensor):
        return content.detach().to("cpu", copy=copy).contiguous()
    if isinstance(content, dict):
        moved: Any = type(content)((key, to_cpu(value, copy)) for key, value in content.items())
        if hasattr(content, "_metadata"):  # of a state dict
            moved._metadata = content._metadata
        return moved
    if isinstance(content, (list, tuple)):
        return type(content)(to_cpu(value, copy) for value in content)
    return content


class _Hashing:
    """A file to write to, whose content is hashed on the way."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()
