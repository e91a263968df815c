"""What a reconstruction has to beat: the mean image, and PCA with as many numbers as z has.

Both are fitted on training images and map uint8 (N, 3, H, W) to uint8 of the same shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAX_IMAGES = 5000
MAX_VALUES = 2**28  # float32 values that a fit may hold: 1 GiB


def training_positions(length: int, values: int) -> list[int]:
    """Which images of a training set to fit on: up to 5000 places, spread evenly.

    Fewer where images of so many `values` (3·S·S) would fill more than 1 GiB as float32: 1365 at
    256 pixels.
    """
    count = max(1, min(length, MAX_IMAGES, MAX_VALUES // values))
    return [i * length // count for i in range(count)]


class MeanImage:
    """The same picture for every input: the mean of the training images, uint8 (n, 3, H, W)."""

    def __init__(self, images: Tensor) -> None:
        self._mean = images.mean(0, dtype=torch.float64).round().to(torch.uint8)

    def reconstruct(self, batch: Tensor) -> Tensor:
        """The mean image, once per image of the batch."""
        return self._mean.expand_as(batch)


class Pca:
    """Projection onto the first `components` principal directions of the training images.

    Exact for small problems, randomised with a fixed seed (Halko et al. 2011, 7 power iterations)
    for large ones: the same images give the same projection. ValueError where `components` is not
    below the number of images or above the number of values of an image.
    """

    def __init__(self, images: Tensor, components: int) -> None:
        reason = self.impossible(components, images.shape)
        if reason:
            raise ValueError(reason)
        from sklearn.decomposition import PCA

        values = _values(images)
        # The randomised solver pays off when few of many directions are wanted.
        small = min(values.shape) <= 1024 or components > min(values.shape) // 2
        solver = "full" if small else "randomized"
        self._pca: Any = PCA(components, svd_solver=solver, iterated_power=7, random_state=0)
        self._pca.fit(values)

    @staticmethod
    def impossible(components: int, shape: Sequence[int]) -> str | None:
        """Why images of this shape (n, 3, H, W) cannot carry so many components, or None."""
        n, values = shape[0], int(np.prod(shape[1:]))
        if components >= n:
            return f"{components} components need more than {components} training images, have {n}"
        if components > values:
            return f"{components} components are more than the {values} values of an image"
        return None

    def project(self, batch: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) → float32 (N, components)."""
        return torch.from_numpy(self._pca.transform(_values(batch)).astype(np.float32))

    def reconstruct(self, batch: Tensor) -> Tensor:
        """The projection of each image, clamped to [0, 255] and rounded."""
        projected = self._pca.inverse_transform(self._pca.transform(_values(batch)))
        pixels = torch.from_numpy(np.rint(np.clip(projected * 255, 0, 255)).astype(np.uint8))
        return pixels.view(batch.shape)


def _values(images: Tensor) -> np.ndarray[Any, Any]:
    """uint8 (n, 3, H, W) → float32 (n, 3HW) in [0, 1]."""
    return images.flatten(1).numpy().astype(np.float32) / 255
