"""The plain model that fast paths are measured against and must agree with.

Attention as two einsum products and a softmax, every weight under spectral norm divided anew,
transposed convolutions as such, NCHW memory, float32, no compiler: what one would write first.
"""

from __future__ import annotations

import copy
import types
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dbae import DBAE
from dbae.layers import Attention, SpectralConv2d, SpectralConvTranspose2d, SpectralNorm


def plain(model: DBAE) -> DBAE:
    """A copy with the same weights that computes the same by the plainest means."""
    made = copy.deepcopy(model).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    for module in made.modules():
        for kind, forward in _PLAIN.items():
            if isinstance(module, kind):
                module.forward = types.MethodType(forward, module)
    return cast(DBAE, made)


def _attention(self: Attention, x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    flat = self.norm(x.flatten(2))
    qkv = F.conv1d(flat, self.qkv.weight.flatten(2), self.qkv.bias)
    q, k, v = qkv.reshape(batch * self.heads, -1, height * width).chunk(3, dim=1)
    logits = torch.einsum("bct,bcs->bts", q, k) * q.shape[1] ** -0.5
    h = torch.einsum("bts,bcs->bct", logits.softmax(-1), v).reshape(batch, channels, -1)
    h = F.conv1d(h, self.proj_out.weight.flatten(2), self.proj_out.bias)
    return x + h.view_as(x)


def _weight(self: SpectralNorm) -> Tensor:
    with torch.autocast(self.weight_orig.device.type, enabled=False):
        return self.weight_orig * self.scale()


def _conv(self: SpectralConv2d, x: Tensor) -> Tensor:
    return F.conv2d(x, _weight(self), padding=self.padding)


def _transposed(self: SpectralConvTranspose2d, x: Tensor) -> Tensor:
    return F.conv_transpose2d(x, _weight(self))


_PLAIN = {Attention: _attention, SpectralConv2d: _conv, SpectralConvTranspose2d: _transposed}
