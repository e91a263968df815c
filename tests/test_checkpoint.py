"""Checkpoints: configuration inside, released files without one, foreign and broken files."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import OrderedDict, namedtuple
from pathlib import Path
from typing import Any

import golden
import pytest
import torch

import dbae
from dbae import DBAE, UserError, create_model, load_model, load_weights
from dbae.checkpoint import save_weights, to_released
from dbae.files import atomic_file, require_space


@pytest.fixture(scope="module")
def model() -> DBAE:
    return create_model("demo", latent_dim=5, stochastic=True, end_data=0.4, schedule="ve")


def test_a_lone_file_rebuilds_its_model(model: DBAE, tmp_path: Path) -> None:
    path = tmp_path / "somewhere else.pt"
    save_weights(path, model, {"train": {"lr": 1.0}})
    loaded = load_model(path)
    assert loaded.config == model.config and not loaded.training
    assert all(map(torch.equal, loaded.state_dict().values(), model.state_dict().values()))
    assert loaded.bridge.sigma_data_end == 0.4


def test_our_file_is_a_plain_state_dict_to_other_readers(model: DBAE, tmp_path: Path) -> None:
    path = tmp_path / "ema_0.9999_000001.pt"
    save_weights(path, model)
    state = torch.load(path, weights_only=True)
    assert list(state) == list(to_released(model.state_dict()))
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert not [key for key in state if key.startswith(("unet.", "endpoint."))]


@pytest.mark.parametrize(
    "options",
    [
        {"latent_dim": 5},
        {"stochastic": True, "image_size": 64, "attention_resolutions": (32, 16, 8)},
        {"num_res_blocks": 2, "endpoint_channels": 0, "num_channels": 64, "image_size": 128},
        {"image_size": 256, "endpoint_channels": 8, "attention_resolutions": ()},
    ],
)
def test_the_architecture_of_a_released_file_is_read_off_its_shapes(
    options: dict[str, Any], tmp_path: Path
) -> None:
    model = create_model("demo", **options)
    path = tmp_path / "ema_0.9999_000001.pt"
    torch.save(dict(to_released(model.state_dict())), path)
    assert load_model(path, dropout=model.config.dropout).config == model.config


def test_a_released_files_schedule_comes_from_its_folder_or_the_caller(tmp_path: Path) -> None:
    state = dict(to_released(create_model("demo").state_dict()))
    for folder, options, schedule in (
        ("celeba64_64_512d_true_ve", {}, "ve"),
        ("x_vp_simple", {}, "vp_simple"),
        ("downloads", {}, "vp"),
        ("celeba64_64_512d_true_ve", {"schedule": "vp"}, "vp"),
    ):
        path = tmp_path / folder / "ema_0.9999_000001.pt"
        path.parent.mkdir(exist_ok=True)
        torch.save(state, path)
        loaded = load_model(path, **options)
        assert loaded.config.schedule == schedule
        assert loaded.bridge.sigma_data_end == 0.5


def test_a_golden_released_checkpoint_loads_by_its_path_alone(tmp_path: Path) -> None:
    path = tmp_path / "ema_0.9999_980000.pt"
    torch.save(golden.rule_weights("celeba_sto", {}), path)
    loaded = load_model(path, schedule="vp", stochastic=True)
    expected = create_model("celeba", stochastic=True).config
    assert loaded.config == expected


def test_overrides_change_statistics_but_contradict_no_checkpoint(
    model: DBAE, tmp_path: Path
) -> None:
    path = tmp_path / "a.pt"
    save_weights(path, model)
    assert load_model(path, end_data=0.0).bridge.sigma_data_end == 0.0
    with pytest.raises(UserError, match="trained with stochastic=true, but false was asked for"):
        load_model(path, stochastic=False)
    with pytest.raises(UserError, match="trained with schedule=ve, but vp was asked for"):
        load_model(path, schedule="vp")
    with pytest.raises(UserError, match="'colour' is not a model option"):
        load_model(path, colour=1)


def test_wrapper_prefixes_are_understood(model: DBAE, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    state = to_released(model.state_dict())
    torch.save({f"module._orig_mod.{k}": v for k, v in state.items()}, path)
    assert load_model(path, schedule="ve").config.latent_dim == 5


def test_a_folder_means_its_newest_averaged_weights(model: DBAE, tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):  # text order would put the first last
        save_weights(tmp_path / f"ema_0.9999_{step:06d}.pt", model)
    (tmp_path / "empty").mkdir()
    (tmp_path / "ema_0.9999_999999.pt").write_bytes(b"broken")
    assert load_model(tmp_path).config == model.config
    with pytest.raises(UserError, match=r"holds no ema_\*\.pt"):
        load_model(tmp_path / "empty")


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch executed",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "not a readable PyTorch checkpoint"),
        (b"PK\x03\x04 truncated", "not a readable PyTorch checkpoint"),
        (b"some notes", "not a readable PyTorch checkpoint"),
        (b"this is a file", "not a readable PyTorch checkpoint"),
        ([1, 2], "expected a dict of tensors by name"),
        ({"a": 1}, "expected a dict of tensors by name"),
        ({"a": torch.zeros(1)}, "not a DBAE checkpoint: it lacks the keys of one"),
        (_Evil(), "not a readable PyTorch checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_refused_and_never_executed(
    content: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=message) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_a_truncated_checkpoint_is_named(model: DBAE, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    save_weights(path, model)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"a\.pt is not a readable"):
        load_model(path)


def test_another_architecture_is_told_by_its_first_keys(model: DBAE) -> None:
    other = create_model("demo", latent_dim=6)
    with pytest.raises(
        UserError, match=r"label_emb\.weight has shape \(128, 6\), the model \(128, 5\)"
    ):
        load_weights(model, to_released(other.state_dict()))


def test_config_json_beside_a_file_serves_where_the_file_has_none(
    model: DBAE, tmp_path: Path
) -> None:
    import dataclasses

    path = tmp_path / "model.pt"
    torch.save(dict(to_released(model.state_dict())), path)
    stored = {"model": dataclasses.asdict(model.config)}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert load_model(path).config == model.config
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not a run's config\.json"):
        load_model(path)


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(b"old")
    no_space = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with (
        pytest.raises(UserError, match=r"cannot write .*a\.pt: No space left"),
        atomic_file(path) as file,
    ):
        file.write(b"half")
        raise no_space
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_too_little_disk_is_told_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**30, 2**30 - 2**20, 2**20))
    with pytest.raises(UserError, match=r"has 1 MiB free, 3 MiB are needed"):
        require_space(tmp_path, 3 * 2**20)
    require_space(tmp_path, 2**20)


def test_half_precision_files_load_into_float32_models(model: DBAE, tmp_path: Path) -> None:
    state = OrderedDict(
        (k, v.half() if v.is_floating_point() else v)
        for k, v in to_released(model.state_dict()).items()
    )
    loaded = create_model("demo", latent_dim=5, stochastic=True)
    dbae.load_weights(loaded, state)
    assert loaded.unet.label_emb.weight.dtype == torch.float32


def test_files_hold_tensors_in_the_usual_order_whatever_is_in_memory(
    model: DBAE, tmp_path: Path
) -> None:
    assert not model.unet.input_blocks[1][0].in_layers[2].weight.is_contiguous()
    save_weights(tmp_path / "ema_0.9999_000001.pt", model)
    stored = torch.load(tmp_path / "ema_0.9999_000001.pt", weights_only=True)
    assert stored and all(value.is_contiguous() for value in stored.values())
