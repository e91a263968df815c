"""Images: sources, conversions, data sets with splits, their order, and the built-in demo set."""

from __future__ import annotations

from .datasets import ImageDataset, Item, open_dataset, user_error_from_worker
from .images import BadImage, decode, image_grid, to_model_range, to_uint8, transform
from .labels import CELEBA_ATTRIBUTES, Labels, binary_labels, real_labels
from .order import BatchOrder, RankBatches
from .sources import Source, identity_groups, open_source

__all__ = [
    "CELEBA_ATTRIBUTES",
    "BadImage",
    "BatchOrder",
    "ImageDataset",
    "Item",
    "Labels",
    "RankBatches",
    "Source",
    "binary_labels",
    "decode",
    "identity_groups",
    "image_grid",
    "open_dataset",
    "open_source",
    "real_labels",
    "to_model_range",
    "to_uint8",
    "transform",
    "user_error_from_worker",
]
