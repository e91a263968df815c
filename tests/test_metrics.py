"""The figures of a reconstruction: what they are, and what they need."""

from __future__ import annotations

import hashlib
import warnings

import numpy as np
import pytest
import torch

from dbae.data import to_model_range, to_uint8
from dbae.errors import UserError
from dbae.evaluation import metrics
from dbae.evaluation.baselines import MeanImage, Pca, training_positions
from dbae.evaluation.metrics import (
    floor_uint8,
    load_lpips,
    mse,
    reference_mse,
    reference_ssim,
    ssim,
    summary,
)


def images(n: int, height: int = 20, width: int = 16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, height, width), generator=generator, dtype=torch.uint8)


def naive_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """SSIM of two (C, H, W) arrays in [0, 1] by its definition: a window around each pixel."""
    axis = np.arange(-5, 6)
    window = np.exp(-(axis[:, None] ** 2 + axis[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for a, b in zip(x, y, strict=True):
        a, b = np.pad(a, 5), np.pad(b, 5)
        for i in range(x.shape[1]):
            for j in range(x.shape[2]):
                p, q = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq = (window * p * p).sum() - mp**2, (window * q * q).sum() - mq**2
                cov = (window * p * q).sum() - mp * mq
                luminance = (2 * mp * mq + 0.01**2) / (mp**2 + mq**2 + 0.01**2)
                values.append(luminance * (2 * cov + 0.03**2) / (vp + vq + 0.03**2))
    return float(np.mean(values))


def test_equal_images_score_zero_and_one() -> None:
    x = images(3)
    assert mse(x, x).tolist() == [0, 0, 0]
    assert torch.allclose(ssim(x, x), torch.ones(3, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(reference_ssim(x, x), torch.ones(3, dtype=torch.float64), atol=1e-12)


def test_mse_is_the_mean_over_values_scaled_to_one() -> None:
    black = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    assert mse(black, black + 255).item() == 1
    assert mse(black, black + 51).item() == pytest.approx(0.04, abs=1e-15)
    one_pixel = black.clone()
    one_pixel[0, 0, 0, 0] = 255
    assert mse(black, one_pixel).item() == pytest.approx(1 / 192, abs=1e-15)


def test_ssim_agrees_with_the_definition() -> None:
    x, y = images(2), images(2, seed=1)
    y = ((x.int() * 3 + y.int()) // 4).to(torch.uint8)
    expected = [naive_ssim(a, b) for a, b in zip(x.numpy() / 255, y.numpy() / 255, strict=True)]
    assert ssim(x, y).tolist() == pytest.approx(expected, abs=1e-12)


def test_ssim_of_flat_images_has_a_closed_form_away_from_the_border() -> None:
    dark = torch.full((1, 3, 401, 401), 51, dtype=torch.uint8)
    light = torch.full((1, 3, 401, 401), 102, dtype=torch.uint8)
    inside = (2 * 0.2 * 0.4 + 1e-4) / (0.2**2 + 0.4**2 + 1e-4)
    assert ssim(dark, light).item() == pytest.approx(inside, abs=0.01)  # a zero-padded rim


def test_ssim_with_zero_padding_sees_the_border() -> None:
    flat = torch.full((1, 3, 11, 11), 128, dtype=torch.uint8)
    assert ssim(flat, flat + 20).item() == pytest.approx(
        naive_ssim(flat[0].numpy() / 255, (flat + 20)[0].numpy() / 255), abs=1e-12
    )


def test_reference_ssim_is_ssim_of_nhwc_read_as_nchw() -> None:
    x, y = images(2), images(2, seed=1)
    as_if = [
        naive_ssim(a.transpose(1, 2, 0), b.transpose(1, 2, 0))
        for a, b in zip(x.numpy() / 255, y.numpy() / 255, strict=True)
    ]
    assert reference_ssim(x, y).tolist() == pytest.approx(as_if, abs=1e-12)


def test_reference_mse_divides_by_the_area_of_128_pixels() -> None:
    x, y = images(2, 64, 64), images(2, 64, 64, seed=1)
    assert torch.allclose(reference_mse(x, y) * 4, mse(x, y))


def test_flooring_moves_63_levels_and_rounding_none() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    floored = floor_uint8(to_model_range(levels))
    assert (levels.int() - floored.int()).unique().tolist() == [0, 1]
    assert (levels != floored).sum() == 63
    assert torch.equal(to_uint8(to_model_range(levels)), levels)


def test_figures_refuse_floats_and_different_shapes() -> None:
    x = images(1)
    for other in (x.float(), x[..., 1:]):
        with pytest.raises(ValueError, match="uint8"):
            mse(x, other)


def test_summary_has_the_standard_error_of_the_mean() -> None:
    assert summary([1.0, 2.0, 3.0, 4.0]) == {
        "mean": 2.5,
        "stderr": pytest.approx(np.std([1, 2, 3, 4], ddof=1) / 2),
        "n": 4,
    }
    assert summary([5.0]) == {"mean": 5.0, "stderr": None, "n": 1}


# LPIPS --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory):
    """A random AlexNet in torchvision's file format: the folder and the state dict."""
    from torchvision.models import alexnet

    folder = tmp_path_factory.mktemp("weights")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        state = {k: v for k, v in alexnet(weights=None).state_dict().items() if "features" in k}
    state["classifier.1.weight"] = torch.zeros(2, 2)  # the file also has the classifier
    torch.save(state, folder / metrics.ALEXNET_FILE)
    return folder, state


def test_lpips_from_a_file_is_the_package_with_that_backbone(backbone) -> None:
    import lpips

    folder, state = backbone
    path = folder / metrics.ALEXNET_FILE
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    before = torch.random.get_rng_state()
    ours, reason = metrics._lpips_from_file(path, "cpu", sha256=digest[:8])
    assert ours is not None and reason is None
    assert torch.equal(before, torch.random.get_rng_state())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    for name, layer in package.net.named_modules():
        if isinstance(layer, torch.nn.Conv2d):
            number = name.split(".")[-1]
            layer.weight.data = state[f"features.{number}.weight"]
            layer.bias.data = state[f"features.{number}.bias"]
    x, y = images(3, 32, 32), images(3, 32, 32, seed=1)
    expected = package(x.float() / 127.5 - 1, y.float() / 127.5 - 1).flatten()
    assert torch.allclose(ours(x, y), expected, atol=1e-6)
    assert expected.min() > 0 and ours(x, x).abs().max() == 0


def test_lpips_without_its_file_says_which_file_to_put_where(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    found, reason = load_lpips(tmp_path)
    assert found is None and reason is not None
    assert "alexnet-owt-7be5be79.pth" in reason and "--weights_dir" in reason
    with pytest.raises(UserError, match=r"--weights_dir .* is not a folder"):
        load_lpips(tmp_path / "absent")


def test_lpips_with_a_wrong_file_says_what_is_wrong(backbone, tmp_path) -> None:
    found, reason = load_lpips(backbone[0])  # the right format under the wrong hash
    assert found is None and "sha256" in str(reason)
    path = tmp_path / metrics.ALEXNET_FILE
    for content in ({"weight": torch.zeros(1)}, [1, 2], {"features.0.weight": torch.zeros(1)}):
        torch.save(content, path)
        found, reason = metrics._lpips_from_file(path, "cpu", sha256="")
        assert found is None and "does not hold torchvision's AlexNet weights" in str(reason)
    path.write_bytes(b"not a checkpoint")
    assert "AlexNet" in str(metrics._lpips_from_file(path, "cpu", sha256="")[1])


# Baselines ----------------------------------------------------------------------------------


def test_pca_reconstructs_what_lies_in_its_span_and_beats_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(3, 3, 8, 8, generator=generator)
    weights = torch.randn(40, 3, generator=generator).clamp(-2, 2)
    x = (128 + 12 * torch.einsum("nk,kchw->nchw", weights, directions)).clamp(0, 255)
    x = x.round().to(torch.uint8)
    mean, pca = MeanImage(x), Pca(x, 3)
    assert mean.reconstruct(x[:2]).shape == pca.reconstruct(x[:2]).shape == (2, 3, 8, 8)
    assert torch.equal(mean.reconstruct(x)[0], x.double().mean(0).round().to(torch.uint8))
    assert mse(x, pca.reconstruct(x)).mean() < 0.05 * mse(x, mean.reconstruct(x)).mean()
    assert torch.equal(pca.reconstruct(x), Pca(x, 3).reconstruct(x))


def test_pca_needs_more_images_than_components() -> None:
    assert "have 5" in str(Pca.impossible(5, (5, 3, 8, 8)))
    assert Pca.impossible(4, (5, 3, 8, 8)) is None
    assert "192 values" in str(Pca.impossible(200, (500, 3, 8, 8)))
    with pytest.raises(ValueError, match="components"):
        Pca(images(5), 5)


def test_a_fit_uses_a_bounded_number_of_images_spread_over_the_set() -> None:
    assert training_positions(3, 100) == [0, 1, 2]
    chosen = training_positions(50_000, 3 * 32 * 32)
    assert len(chosen) == 5000 and chosen[:2] == [0, 10] and chosen[-1] == 49_990
    assert len(training_positions(50_000, 3 * 256 * 256)) == 1365
