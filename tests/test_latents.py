"""The cache of z: encoded once, used again while it fits, made anew when it does not."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from test_data import plain, write_folder

import dbae
from dbae.checkpoint import save_weights
from dbae.data import ImageDataset, open_dataset, to_model_range
from dbae.data.labels import binary_labels
from dbae.distributed import Context
from dbae.errors import UserError
from dbae.evaluation import latents
from dbae.evaluation.latents import Latents, latents_of

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model() -> dbae.DBAE:
    torch.manual_seed(0)
    return dbae.create_model("demo", latent_dim=4, stochastic=True).eval()


@pytest.fixture
def checkpoint(model: dbae.DBAE, tmp_path: Path) -> Path:
    path = tmp_path / "ema_0.9999_000012.pt"
    save_weights(path, model)
    return path


@pytest.fixture(scope="module")
def demo() -> ImageDataset:
    return open_dataset("demo", None, 32, "test")


def encode(
    model: dbae.DBAE, demo: ImageDataset, checkpoint: Path, count: int = 5, flip: bool = False
) -> Latents:
    found = latents_of(model, demo, Context(), checkpoint, count=count, flip=flip, batch_size=2)
    assert found is not None
    return found


def test_the_cache_holds_what_the_encoder_says_of_images_and_mirrored_images(
    model: dbae.DBAE, demo: ImageDataset, checkpoint: Path
) -> None:
    found = encode(model, demo, checkpoint, flip=True)
    x0 = to_model_range(torch.stack([demo[i].image for i in range(5)]))
    with torch.no_grad():
        for x, mean, log_sigma in (
            (x0, found.mean, found.log_sigma),
            (x0.flip(3), found.flipped_mean, found.flipped_log_sigma),
        ):
            expected = model.encode_stats(x)
            assert mean is not None and log_sigma is not None
            torch.testing.assert_close(mean, expected[0])
            torch.testing.assert_close(log_sigma, expected[1])
    assert found.index.tolist() == [demo.source_index(i) for i in range(5)]


def test_z_is_the_mean_or_a_draw_that_depends_on_seed_draw_and_row(
    model: dbae.DBAE, demo: ImageDataset, checkpoint: Path
) -> None:
    found = encode(model, demo, checkpoint, flip=True)
    assert torch.equal(found.z("mean"), found.mean)
    draw = found.z("sample", seed=1, draw=2)
    assert torch.equal(draw, found.z("sample", seed=1, draw=2))
    for other in (found.z("sample", seed=1, draw=3), found.z("sample", seed=2, draw=2)):
        assert not torch.equal(draw, other)
    mirrored = torch.tensor([True, False, False, True, False])
    mixed = found.z("mean", flip=mirrored)
    assert found.flipped_mean is not None
    assert torch.equal(mixed[mirrored], found.flipped_mean[mirrored])
    assert torch.equal(mixed[~mirrored], found.mean[~mirrored])


def test_the_sample_has_the_encoders_spread() -> None:
    n = 4000
    log_sigma = torch.full((n, 1), -1.0)
    given = Latents(torch.full((n, 1), 3.0), log_sigma, None, None, torch.arange(n), {})
    z = given.z("sample").double()
    sigma = np.exp(-1.0) + 0.01
    assert abs(z.mean() - 3) < 4 * sigma / n**0.5
    assert abs(z.std() - sigma) < 4 * sigma / (2 * n) ** 0.5


def test_an_image_is_encoded_once(
    model: dbae.DBAE, demo: ImageDataset, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = encode(model, demo, checkpoint, flip=True)
    calls = []
    hook = model.encoder.register_forward_hook(lambda *_: calls.append(1))
    try:
        again = encode(model, demo, checkpoint)  # neither flips nor all images are needed now
        fewer = encode(model, demo, checkpoint, count=3)
    finally:
        hook.remove()
    assert not calls
    assert "5 read from" in capsys.readouterr().out
    assert torch.equal(first.mean, again.mean) and torch.equal(first.mean[:3], fewer.mean)


def test_a_cache_of_the_whole_serves_its_parts(
    model: dbae.DBAE, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_folder(tmp_path / "faces", {f"{i:02d}.png": plain(3 * i) for i in range(40)})
    train = open_dataset("folder", str(path), 32, "train")
    whole = encode(model, train.in_split("all"), checkpoint, count=0)
    capsys.readouterr()
    part = encode(model, train, checkpoint, count=0)
    assert "latents/faces_all" in capsys.readouterr().out
    assert torch.equal(
        part.mean, whole.mean[torch.tensor([train.source_index(i) for i in range(len(train))])]
    )
    encode(model, train, checkpoint, count=0, flip=True)  # which the whole's cache does not have
    assert "encoded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("weights", "of another checkpoint"),
        ("images", "of other images"),
        ("more", "of 5 images only"),
        ("flip", "without mirrored images"),
        ("damage", "damaged"),
    ],
)
def test_a_stale_cache_is_told_and_made_anew(
    model: dbae.DBAE,
    demo: ImageDataset,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    change: str,
    reason: str,
) -> None:
    encode(model, demo, checkpoint)
    folder = latents.cache_folder(checkpoint, demo)
    data, count = demo, 5
    if change == "weights":
        torch.manual_seed(1)
        model = dbae.create_model("demo", latent_dim=4, stochastic=True).eval()
        save_weights(checkpoint, model)
    elif change == "images":
        data = demo.subset([9, 8, 7, 6, 5])
    elif change == "more":
        count = 6
    elif change == "damage":
        file = folder / latents.NPZ
        file.write_bytes(file.read_bytes()[:-100])
    capsys.readouterr()
    found = encode(model, data, checkpoint, count, flip=change == "flip")
    assert f"are {reason}: encoding again" in capsys.readouterr().out
    x0 = to_model_range(torch.stack([data[i].image for i in range(count)]))
    with torch.no_grad():
        torch.testing.assert_close(found.mean, model.encode(x0, mean=True))
    encode(model, data, checkpoint, count)
    assert "read from" in capsys.readouterr().out


def test_both_files_hold_the_same_with_indices_labels_and_provenance(
    model: dbae.DBAE, demo: ImageDataset, checkpoint: Path
) -> None:
    folder = checkpoint.parent / "z here"
    labels = binary_labels(demo)
    latents_of(model, demo, Context(), checkpoint, count=4, labels=labels, folder=folder)
    with (
        np.load(folder / "latents.npz") as archive,
        safe_open(folder / "latents.safetensors", "numpy") as tensors,
    ):
        names = set(archive.files) - {"provenance"}
        assert names == set(tensors.keys())
        assert {"mean", "log_sigma", "index", "labels", "label_positions"} == names
        for name in names:
            np.testing.assert_array_equal(archive[name], tensors.get_tensor(name))
        provenance = json.loads(str(archive["provenance"]))
        assert provenance == json.loads(tensors.metadata()["provenance"])
        np.testing.assert_array_equal(archive["labels"], labels.values[:4])
    assert provenance["checkpoint"] == checkpoint.name and provenance["n"] == 4
    assert provenance["label_names"] == list(labels.names)
    assert provenance["dataset"]["split"] == "test"
    found = json.loads((folder / "latents.json").read_text())
    assert found["kind"] == "latents" and len(found["z"]["spectrum"]) == 4
    assert (folder / found["neighbours"]["file"]).exists()
    # Other labels for the same images: stored without encoding again, and nothing is lost.
    fewer = labels.choose(["hat"])
    latents_of(model, demo, Context(), checkpoint, count=2, labels=fewer, folder=folder)
    with np.load(folder / "latents.npz") as archive:
        assert archive["labels"].shape == (4, 1) and archive["mean"].shape == (4, 4)


def test_what_is_no_latents_file_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no latents\.npz; scripts/dbae_encode\.py"):
        latents.read(tmp_path)
    (tmp_path / "latents.npz").write_bytes(b"PK no")
    with pytest.raises(UserError, match="is not a whole latents file"):
        latents.read(tmp_path)


def test_two_ranks_encode_what_one_does(
    model: dbae.DBAE, demo: ImageDataset, checkpoint: Path
) -> None:
    alone = encode(model, demo, checkpoint, count=7, flip=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, str(ROOT / "scripts/dbae_encode.py"), "--checkpoint", str(checkpoint),
        "--dataset", "demo", "--split", "test", "--num_samples", "7", "--flip", "--batch_size", "2",
        "--output_dir", str(checkpoint.parent / "both"), "--store_labels", "real",
    ]  # fmt: skip
    ranks = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE, text=True,
            env={
                **os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            },
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=120)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0]
    assert "z of 7 images: 4 dimensions" in outputs[0] and outputs[1] == ""
    both = latents.read(checkpoint.parent / "both")
    torch.testing.assert_close(both.mean, alone.mean)
    assert alone.flipped_mean is not None and both.flipped_mean is not None
    torch.testing.assert_close(both.flipped_mean, alone.flipped_mean)
    assert torch.equal(both.index, alone.index)
    assert not list((checkpoint.parent / "both").glob(".part*"))


def test_statistics_of_a_known_z() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(20_000, 3, generator=generator) * torch.tensor([2.0, 1.0, 0.0]) + 5
    found = latents.statistics(z)
    np.testing.assert_allclose(found["mean"], 5, atol=0.06)
    np.testing.assert_allclose(found["std"], [2, 1, 0], atol=0.03)
    np.testing.assert_allclose(found["spectrum"], [4, 1, 0], atol=0.15)
    assert found["dead"] == [2]
    share = np.array([0.8, 0.2])
    assert found["effective_rank"] == pytest.approx(np.exp(-(share * np.log(share)).sum()), 0.01)


def test_neighbours_are_the_nearest_in_standardised_z() -> None:
    z = torch.tensor([[0.0, 0.0], [0.0, 100.0], [1.0, 0.0], [5.0, 0.0]])
    # The second dimension's large unit does not drown the first one.
    assert latents.neighbours(z, [0], 2) == [[2, 1]]
    assert latents.neighbours(z, [3], 3)[0][0] == 2
