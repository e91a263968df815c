"""The linear classifier whose weights are directions in z: its file, its scores, its names."""

from __future__ import annotations

import shlex
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checkpoint import load_file, newest_weights
from ..data.labels import CELEBA_ATTRIBUTES
from ..errors import UserError
from ..files import atomic_file
from ..presets import ModelConfig
from .protocol import results_folder

_METADATA_KEY = "dbae"


@dataclass(frozen=True)
class AttributeClassifier:
    """k attributes, each a linear score of z; above 0 the answer is yes.

    Attributes:
        weight: (k, latent_dim) float32.
        bias: (k,) float32.
        names: of the k attributes.
        score_std: (k,) standard deviation of each score over test images, where it is known.
        facts: JSON-able, on the training; stored in the file.
    """

    weight: Tensor
    bias: Tensor
    names: tuple[str, ...]
    score_std: Tensor | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def scores(self, z: Tensor) -> Tensor:
        """z (n, latent_dim) → logits (n, k), with z's device and precision."""
        return F.linear(z, self.weight.to(z), self.bias.to(z))

    def direction(self, k: int) -> Tensor:
        """The unit vector (latent_dim,) along which the score of attribute k grows fastest.

        Raises UserError where the attribute's weights are all zero.
        """
        length = self.weight[k].norm()
        if not length > 0:
            raise UserError(
                f"the classifier's weights of {self.names[k]} are all zero, so they name no "
                "direction; choose another of --attributes"
            )
        return self.weight[k] / length

    def index(self, attribute: str | int) -> int:
        """The row of an attribute given by name, in any case, or by number from 0.

        Raises UserError, with all names, for one that is not there.
        """
        text = str(attribute)
        lower = [name.lower() for name in self.names]
        if text in self.names:
            return self.names.index(text)
        if text.lower() in lower:
            return lower.index(text.lower())
        if text.isascii() and text.isdigit() and int(text) < len(self.names):
            return int(text)
        raise UserError(
            f"attribute {text!r} is unknown; choose a number from 0 to {len(self.names) - 1} or "
            f"one of {', '.join(self.names)}"
        )


def save_classifier(path: Path, classifier: AttributeClassifier) -> None:
    """Write `weight` and `bias` as the state dict of a `torch.nn.Linear`, the rest as metadata."""
    std = classifier.score_std
    state = OrderedDict(weight=classifier.weight.cpu(), bias=classifier.bias.cpu())
    metadata = {
        **classifier.facts,
        "attributes": list(classifier.names),
        "score_std": None if std is None else std.tolist(),
    }
    state._metadata = {"": {"version": 1}, _METADATA_KEY: metadata}  # type: ignore[attr-defined]
    with atomic_file(path) as file:
        torch.save(state, file)


def load_classifier(path: Path, latent_dim: int) -> AttributeClassifier:
    """A classifier of z with `latent_dim` numbers; nothing in the file is executed.

    A file without names has CelebA's when it has 40 rows, else "attribute 0", "attribute 1", ….
    Raises UserError for what is not such a file, and for another size of z.
    """
    if not path.is_file():
        raise UserError(f"classifier {path} does not exist")
    state = load_file(path)
    weight, bias = _tensors(state, path)
    if weight.shape[1] != latent_dim:
        raise UserError(
            f"classifier {path} reads z of {weight.shape[1]} numbers, the model's z has "
            f"{latent_dim}; choose the one that was trained on this model"
        )
    try:
        facts = dict((getattr(state, "_metadata", None) or {}).get(_METADATA_KEY) or {})
        names = list(facts.pop("attributes", None) or _default_names(len(weight)))
        std = facts.pop("score_std", None)
        score_std = None if std is None else torch.tensor(std, dtype=torch.float64)
    except (TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise UserError(f"classifier {path} is damaged: {error}") from error
    if len(names) != len(weight) or (score_std is not None and score_std.shape != bias.shape):
        raise UserError(
            f"classifier {path} is damaged: it has {len(weight)} rows and {len(names)} names"
        )
    return AttributeClassifier(weight, bias, tuple(map(str, names)), score_std, facts)


def _tensors(state: Any, path: Path) -> tuple[Tensor, Tensor]:
    """weight (k, d) and bias (k,) of a state dict, float32."""
    expected = "expected the state dict of a linear layer: weight (k, d) and bias (k)"
    if not isinstance(state, Mapping):
        raise UserError(f"{path} holds a {type(state).__name__}; {expected}")
    found = [state.get("weight"), state.get("bias")]
    weight, bias = (x.float() if isinstance(x, Tensor) else torch.empty(0) for x in found)
    if weight.dim() != 2 or bias.shape != weight.shape[:1] or weight.numel() == 0:
        shapes = [f"{k} {tuple(v.shape)}" for k, v in state.items() if isinstance(v, Tensor)]
        raise UserError(f"{path} holds {', '.join(shapes[:4]) or 'no tensors'}; {expected}")
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise UserError(f"classifier {path} holds numbers that are not finite; train it again")
    return weight, bias


def _default_names(count: int) -> tuple[str, ...]:
    if count == len(CELEBA_ATTRIBUTES):
        return CELEBA_ATTRIBUTES
    return tuple(f"attribute {k}" for k in range(count))


def find_classifier(checkpoint: Path, dataset: str, model: ModelConfig) -> Path:
    """The classifier that infer_class_dbae.sh left beside a checkpoint.

    `sample_{step}/downstream_inference/multitask_ema/best.pt`, else the only `best.pt` in another
    `multitask_…` there; where there is none of the paper's recipe, `logistic.pt` likewise. Raises
    UserError where there is none, with the command that makes one,
    or where there are several.
    """
    folder = results_folder(checkpoint) / "downstream_inference"
    for name in ("best.pt", "logistic.pt"):
        usual = folder / "multitask_ema" / name
        if usual.is_file():
            return usual
        others = sorted(folder.glob(f"multitask_*/{name}"))
        if len(others) == 1:
            return others[0]
        if others:
            raise UserError(
                f"{folder} holds several classifiers ({', '.join(p.parent.name for p in others)}): "
                "name one by --classifier PATH"
            )
    stochastic = "true" if model.stochastic else "false"
    words = shlex.join([dataset, model.schedule, str(newest_weights(checkpoint)), stochastic])
    raise UserError(
        f"no classifier in {folder}: train one by `bash infer_class_dbae.sh {words}`, or name one "
        "by --classifier PATH"
    )
