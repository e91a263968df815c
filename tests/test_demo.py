"""The demo set: what it shows is known, visible, balanced and a function of the index alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.decomposition import PCA

from dbae.data import demo

ROOT = Path(__file__).resolve().parents[1]


def labelled(monkeypatch: pytest.MonkeyPatch, **changes: float | bool) -> np.ndarray:
    """A plain portrait (nothing worn, factors at 0) with some labels changed, at 32 pixels."""
    coins = [bool(changes.get(name, False)) for name in demo.ATTRIBUTES]
    numbers = [float(changes.get(name, 0.0)) for name in demo.FACTORS]
    monkeypatch.setattr(demo, "_labels", lambda index: (coins, numbers))
    return demo.draw(0).astype(np.float32)


def test_a_picture_depends_on_its_index_alone() -> None:
    first = demo.draw(123)
    demo.draw(7, 64)
    assert first.dtype == np.uint8 and first.shape == (32, 32, 3)
    assert np.array_equal(first, demo.draw(123))
    assert not np.array_equal(first, demo.draw(124))
    code = "from dbae.data import demo; print(demo.draw(123).tobytes().hex())"
    other = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert bytes.fromhex(other.stdout) == first.tobytes()


def test_labels_are_the_published_ones() -> None:
    """Another generator or order of names would be another data set: noticed here."""
    shown = {name for name, yes in demo.attributes(0).items() if yes}
    assert shown == {"hat", "mouth_open", "beard", "dark_background", "blush", "earrings"}
    assert demo.factors(0)["head_x"] == pytest.approx(0.7182255864954394)


def test_attributes_and_factors_are_balanced_and_independent() -> None:
    rows = [
        [*demo.attributes(i).values(), *demo.factors(i).values()]  # one row of numbers a picture
        for i in range(4000)
    ]
    table = np.asarray(rows, dtype=np.float64)
    share = table[:, : len(demo.ATTRIBUTES)].mean(axis=0)
    assert ((share > 0.45) & (share < 0.55)).all()
    values = table[:, len(demo.ATTRIBUTES) :]
    assert values.min() >= -1 and values.max() <= 1
    assert np.abs(values.mean(axis=0)).max() < 0.05
    between = np.corrcoef(table.T) - np.eye(table.shape[1])
    assert np.abs(between).max() < 0.08


@pytest.mark.parametrize("name", demo.ATTRIBUTES)
def test_every_attribute_shows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without, with_it = (labelled(monkeypatch, **{name: yes}) for yes in (False, True))
    changed = (np.abs(with_it - without).max(axis=2) > 40).sum()
    assert changed >= 6, f"{name} changes only {changed} pixels of 1024"


@pytest.mark.parametrize("name", demo.FACTORS)
def test_every_factor_shows_and_acts_smoothly(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    low, near, high = (labelled(monkeypatch, **{name: v}) for v in (-0.9, -0.88, 0.9))
    assert np.abs(high - low).max() > 40
    assert np.abs(near - low).mean() < 0.05 * np.abs(high - low).mean() + 0.2


def test_the_head_moves_by_more_than_two_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = (labelled(monkeypatch, head_x=v, long_hair=True) for v in (-1.0, 1.0))
    backdrop = left[0, 0]
    centres = []
    for picture in (left, right):
        figure = (np.abs(picture - backdrop).max(axis=2) > 30)[6:20]
        centres.append(np.nonzero(figure)[1].mean())
    assert 4 < centres[1] - centres[0] < 7


@pytest.mark.parametrize("size", [16, 64, 128])
def test_any_size_shows_the_same_picture(size: int) -> None:
    small, large = sorted((32, size))
    for index in range(5):
        factor = large // small
        fine = demo.draw(index, large).astype(np.float32)
        coarse = fine.reshape(small, factor, small, factor, 3).mean(axis=(1, 3))
        assert np.abs(coarse - demo.draw(index, small)).mean() < 6


def test_a_negative_index_is_refused() -> None:
    with pytest.raises(IndexError, match="starts at 0"):
        demo.draw(-1)


def test_linear_compression_to_32_numbers_leaves_room_for_better() -> None:
    """PCA keeps most, not all: an autoencoder with 32 numbers has something to win."""
    train, test = (
        np.stack([demo.draw(i) for i in indices]).reshape(len(indices), -1) / 255
        for indices in (range(2000), range(50_000, 50_300))
    )
    pca = PCA(32, svd_solver="randomized", random_state=0).fit(train)
    error = ((pca.inverse_transform(pca.transform(test)) - test) ** 2).mean()
    share = error / ((test - train.mean(axis=0)) ** 2).mean()
    assert 0.08 < share < 0.15
