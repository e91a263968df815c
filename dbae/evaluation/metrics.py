"""How far two 8-bit images are apart: MSE, SSIM, LPIPS, one figure per image.

All functions take uint8 tensors of shape (N, 3, H, W) and return (N,). MSE and SSIM work in
float64 on values scaled to [0, 1]; LPIPS in float32 on [-1, 1].
"""

from __future__ import annotations

import math
import pickle
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.images import to_model_range
from ..errors import UserError
from ..files import sha256 as file_sha256

ALEXNET_FILE = "alexnet-owt-7be5be79.pth"
ALEXNET_SHA256 = "7be5be79"  # torchvision's convention: the file's hash starts as its name ends
LPIPS_MISSING = (
    f"LPIPS needs {ALEXNET_FILE} (233 MB, the torchvision AlexNet weights; sha256 starts "
    f"{ALEXNET_SHA256}) in --weights_dir or <torch cache>/hub/checkpoints"
)
_C1, _C2 = 0.01**2, 0.03**2


def mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference over all values of an image, on [0, 1]-scaled 8-bit values.

    a, b: uint8 (N, 3, H, W). Returns float64 (N,), 0 for equal images, at most 1.
    """
    x, y = _unit(a, b)
    return (x - y).square().flatten(1).mean(1)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) as the paper's protocol wants it.

    11×11 Gaussian window of σ 1.5, zero padding, C1 = 0.01², C2 = 0.03², mean over channels and
    pixels, on [0, 1]-scaled 8-bit values.

    a, b: uint8 (N, 3, H, W). Returns float64 (N,) in [-1, 1], 1 for equal images.
    """
    return _ssim_planes(*_unit(a, b))


def reference_mse(a: Tensor, b: Tensor) -> Tensor:
    """MSE as the published script counts it: the squared error of an image, over 128·128·3.

    At 128 pixels this is `mse`; at any other size it is off by the ratio of the areas (at 64
    pixels it is a quarter). a, b: uint8 (N, 3, H, W). Returns float64 (N,).
    """
    x, y = _unit(a, b)
    return (x - y).square().flatten(1).sum(1) / (128 * 128 * 3)


def reference_ssim(a: Tensor, b: Tensor) -> Tensor:
    """SSIM as the published script counts it: NHWC arrays handed to a function for NCHW.

    The rows of the image become "channels", and the 11×11 window runs over (width, colour): zero
    padding included, it sees a W×3 picture whose columns are R, G, B. Everything else is as in
    `ssim`. The figures come out too high and compare with nothing but the published ones. This
    follows a description of the script; the script itself was not run to confirm it.

    a, b: uint8 (N, 3, H, W) as everywhere here. Returns float64 (N,).
    """
    x, y = _unit(a, b)
    return _ssim_planes(x.permute(0, 2, 3, 1), y.permute(0, 2, 3, 1))


def floor_uint8(x: Tensor) -> Tensor:
    """[-1, 1] → uint8 by cutting (x + 1)·127.5 down to an integer, as the published script does.

    The right conversion rounds (`dbae.data.to_uint8`). An 8-bit image taken to [-1, 1] in float32
    and back by this one loses a level at 63 of the 256 values. The published script is said to
    convert the originals as x·255 for x in [0, 1]; we read x as (the network's input + 1)/2, since
    only then do those 63 levels move.

    x: (N, 3, H, W), clamped to [-1, 1] here. Same shape back.
    """
    return ((x.clamp(-1, 1) + 1) * 127.5).floor().to(torch.uint8)


def summary(values: Sequence[float]) -> dict[str, Any]:
    """{"mean", "stderr", "n"} of per-image figures.

    stderr is the sample standard deviation (with n - 1) over √n, None for n = 1. Raises ValueError
    on no values.
    """
    n = len(values)
    if n == 0:
        raise ValueError("no values to summarise")
    mean = math.fsum(values) / n
    stderr = None
    if n > 1:
        stderr = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
    return {"mean": mean, "stderr": stderr, "n": n}


class Lpips:
    """LPIPS, AlexNet, version 0.1 (Zhang et al. 2018), through the `lpips` package.

    Calling it with two uint8 batches (N, 3, H, W) gives float32 (N,) ≥ 0 on the CPU, 0 for equal
    images. `backbone` is torchvision's AlexNet state dict; the linear heads come in the package.
    KeyError or RuntimeError when the backbone has other keys or shapes.
    """

    def __init__(self, backbone: dict[str, Tensor], device: torch.device | str = "cpu") -> None:
        import lpips

        # The random weights drawn here are replaced below: they must not move the caller's RNG.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lpips calls torchvision in its older way
            network = lpips.LPIPS(net="alex", version="0.1", pnet_rand=True, verbose=False)
        # torchvision's features.N is sliceK.N in lpips, N being the same number
        state = {
            name: backbone["features." + name.split(".", 2)[2]]
            for name in network.state_dict()
            if name.startswith("net.slice")
        }
        network.load_state_dict(network.state_dict() | state)
        self.device = torch.device(device)
        self._network = network.eval().requires_grad_(False).to(self.device)

    @torch.no_grad()
    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        x, y = (to_model_range(image.to(self.device)) for image in (a, b))
        distance: Tensor = self._network(x, y)
        return distance.flatten().cpu()


def load_lpips(
    weights_dir: str | Path | None = None, device: torch.device | str = "cpu"
) -> tuple[Lpips | None, str | None]:
    """(the metric, None), or (None, why it cannot be computed). Never downloads anything.

    The backbone's file is looked for in `weights_dir`, then in torch.hub's checkpoints; a file of
    the wrong hash or content is a reason like its absence. UserError: `weights_dir` is no folder.
    """
    path = find_alexnet(weights_dir)
    return _lpips_from_file(path, device) if path else (None, LPIPS_MISSING)


def find_alexnet(weights_dir: str | Path | None = None) -> Path | None:
    """The backbone's file in `weights_dir` or torch.hub's checkpoints, None where it is in neither.

    UserError: `weights_dir` is no folder.
    """
    folders = [Path(torch.hub.get_dir()) / "checkpoints"]
    if weights_dir is not None:
        if not Path(weights_dir).is_dir():
            raise UserError(f"--weights_dir {weights_dir} is not a folder")
        folders.insert(0, Path(weights_dir))
    found = (folder / ALEXNET_FILE for folder in folders)
    return next((path for path in found if path.is_file()), None)


def _lpips_from_file(
    path: Path, device: torch.device | str, sha256: str = ALEXNET_SHA256
) -> tuple[Lpips | None, str | None]:
    """The metric from a backbone file whose hash starts with `sha256`, or the reason against it."""
    try:
        digest = file_sha256(path)
        if not digest.startswith(sha256):
            return None, (
                f"{path} is damaged or another file: its sha256 starts {digest[:8]}, "
                f"expected {sha256}"
            )
        backbone = torch.load(path, map_location="cpu", weights_only=True)
        return Lpips(backbone, device), None
    except ImportError:
        return None, "LPIPS needs the package lpips (pip install lpips)"
    except OSError as error:
        return None, f"{path} cannot be read: {error.strerror or error}"
    except (KeyError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        first = str(error).strip().split("\n")[0]
        return None, f"{path} does not hold torchvision's AlexNet weights: {first}"


def _unit(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two uint8 batches as float64 in [0, 1] (on the CPU where the device has no float64)."""
    if a.shape != b.shape or a.dim() != 4 or a.dtype != torch.uint8 or b.dtype != torch.uint8:
        raise ValueError(
            "expected two uint8 batches (N, 3, H, W) of one shape, got "
            f"{a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}"
        )
    if a.device.type == "mps":
        a, b = a.cpu(), b.cpu()
    return a.double() / 255, b.double() / 255


def _ssim_planes(x: Tensor, y: Tensor) -> Tensor:
    """SSIM of float64 (N, C, H, W) in [0, 1], the mean over C, H, W."""
    axis = torch.arange(-5, 6, dtype=x.dtype, device=x.device)
    window = torch.exp(-(axis**2) / (2 * 1.5**2))
    window = window / window.sum()

    def blur(planes: Tensor) -> Tensor:  # the 11×11 window is a product of two of length 11
        flat = planes.reshape(-1, 1, *planes.shape[2:])
        rows = F.conv2d(flat, window.view(1, 1, 11, 1), padding=(5, 0))
        return F.conv2d(rows, window.view(1, 1, 1, 11), padding=(0, 5)).view(planes.shape)

    mean_x, mean_y = blur(x), blur(y)
    var_x = blur(x * x) - mean_x**2
    var_y = blur(y * y) - mean_y**2
    cov = blur(x * y) - mean_x * mean_y
    similarity = ((2 * mean_x * mean_y + _C1) * (2 * cov + _C2)) / (
        (mean_x**2 + mean_y**2 + _C1) * (var_x + var_y + _C2)
    )
    return similarity.flatten(1).mean(1)
