"""Does one dimension of z stand for one attribute? Total AUROC Difference, without any training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from .probes import Array, as_array

PREDICTABLE = 0.2  # share of an attribute's entropy that another one may take away
CAPTURED = 0.75  # AUROC of the best dimension

DEFINITION = (
    "Total AUROC Difference: the sum, over the attributes whose best dimension of z has an AUROC "
    f"of at least {CAPTURED}, of the best minus the second best AUROC of a single dimension "
    "(either direction); attributes that lose at least "
    f"{PREDICTABLE:.0%} of their entropy when another single attribute is known are not considered."
)


def tad(z: Tensor, attributes: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """Total AUROC Difference (Yeats et al. 2022, "NashAE", arXiv 2209.10677).

    1. An attribute a is not considered where some other attribute b has
       (H(a) - H(a|b)) / H(a) ≥ 0.2: its dimension could stand for b as well. (Of a pair that is
       one and the same, neither is considered.)
    2. Each dimension of z is a detector of each attribute that is: its score is
       max(AUROC, 1 - AUROC), ties counting half.
    3. An attribute is captured where its best dimension scores at least 0.75.
    4. TAD is the sum over captured attributes of the best minus the second best score. It rises
       with the number of captured attributes, and compares only on the same attributes.

    Written from a description of the measure, not from its authors' code.

    z: (n, d), d ≥ 2; attributes: (n, k) of 0 and 1; names: k. Returns {"tad", "captured": int,
    "considered": int, "attributes": [{"name", "best", "second", "dimension"}] (those considered, in
    their order), "definition"}. Raises ValueError on an attribute of one value only, naming it, on
    numbers that are not finite, other labels and shapes that do not fit.
    """
    a, latent = as_array(attributes), as_array(z)
    _check(latent, a, names)
    considered = np.flatnonzero(_largest_entropy_reduction(a) < PREDICTABLE)
    auroc = _auroc(latent, a[:, considered])
    score = np.maximum(auroc, 1 - auroc)
    second, best = np.sort(score, axis=0)[-2:]
    captured = best >= CAPTURED
    rows = [
        {
            "name": names[attribute],
            "best": float(best[i]),
            "second": float(second[i]),
            "dimension": int(score[:, i].argmax()),
        }
        for i, attribute in enumerate(considered.tolist())
    ]
    return {
        "tad": float((best - second)[captured].sum()),
        "captured": int(captured.sum()),
        "considered": len(considered),
        "attributes": rows,
        "definition": DEFINITION,
    }


def _largest_entropy_reduction(a: Array) -> Array:
    """(k,): the largest share of each attribute's entropy that another single attribute explains.

    0 for an attribute without others. a: (n, k) of 0 and 1, no column constant.
    """
    n = len(a)
    both, ones = a.T @ a / n, a.mean(0)
    joint = [  # P(a_i, a_j) for the four pairs of values, each (k, k)
        both,
        ones[:, None] - both,
        ones[None, :] - both,
        1 - ones[:, None] - ones[None, :] + both,
    ]
    entropy = _surprise(ones) + _surprise(1 - ones)
    information = entropy[:, None] + entropy[None, :] - sum(map(_surprise, joint))
    reduction = information / entropy[:, None]
    np.fill_diagonal(reduction, 0)
    return reduction.max(1)


def _surprise(p: Array) -> Array:
    """-p log p, 0 at p = 0 (and at what rounding leaves below)."""
    return -p * np.log(np.where(p > 0, p, 1))


def _auroc(scores: Array, labels: Array) -> Array:
    """(d, k): AUROC of each column of scores (n, d) for each column of labels (n, k) of 0 and 1."""
    from scipy.stats import rankdata

    positives = labels.sum(0)
    ranks = np.stack([rankdata(column) for column in scores.T])  # ties share their mean rank
    wins = ranks @ labels - positives * (positives + 1) / 2
    return wins / (positives * (len(labels) - positives))


def _check(z: Array, a: Array, names: Sequence[str]) -> None:
    if z.ndim != 2 or z.shape[1] < 2 or a.ndim != 2 or len(z) != len(a) or not a.size:
        raise ValueError(f"expected z (n, d ≥ 2) and attributes (n, k), got {z.shape}, {a.shape}")
    if len(names) != a.shape[1]:
        raise ValueError(f"{len(names)} names for {a.shape[1]} attributes")
    if not np.isfinite(z).all():
        raise ValueError("z holds NaN or infinite numbers")
    if not np.isin(a, (0, 1)).all():
        raise ValueError("attributes must be 0 or 1")
    for name, constant in zip(names, np.ptp(a, axis=0) == 0, strict=True):
        if constant:
            raise ValueError(f"attribute {name} has one value only: it has no AUROC")
