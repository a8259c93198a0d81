"""What is done to each state on its own: activations, the norm, the feed-forward network.

In and out: states of any number of rows. `compiled` on a module says whether its form in C may
serve, on a CPU; `AllScAIP.compiled` sets it on all.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allscaip_lite.config import AllScAIPConfig
from allscaip_lite.kernels import compiled, fused
from allscaip_lite.kernels.fused import Linear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": fused.gelu,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "squared_relu": lambda x: F.relu(x).square(),
    "star_relu": lambda x: 0.8944 * F.relu(x).square() - 0.4472,  # of mean 0 and variance 1
    "smelu": lambda x: torch.where(x.abs() <= 2, (x + 2).square() / 8, F.relu(x)),
}


class Activation(nn.Module):
    """One of `ACTIVATIONS`, any shape."""

    compiled = False

    def __init__(self, config: AllScAIPConfig) -> None:
        super().__init__()
        self.name = config.activation

    def forward(self, x: Tensor) -> Tensor:
        if self.compiled and self.name == "gelu" and x.device.type == "cpu":
            return compiled.gelu(x)
        return ACTIVATIONS[self.name](x)


class RMSNorm(nn.RMSNorm):
    """x / rms(x) · w, (R, H) → (R, H)."""

    compiled = False

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        form = compiled if self.compiled else fused
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return form.rms_norm(x, self.weight, eps)


def make_norm(config: AllScAIPConfig, size: int) -> nn.Module:
    if config.normalization == "rms":
        return RMSNorm(size)
    return nn.LayerNorm(size) if config.normalization == "layer" else nn.Identity()


class FeedForward(nn.Module):
    """norm ▸ Lin(H→2H) ▸ act ▸ Lin(2H→out); dropout after both in the blocks."""

    def __init__(self, config: AllScAIPConfig, out: int, dropout: float = 0.0) -> None:
        super().__init__()
        size = config.hidden_size
        self.activation = Activation(config)
        self.dropout = dropout
        self.norm = make_norm(config, size)
        self.expand = Linear(size, config.ffn_ratio * size)
        self.contract = Linear(config.ffn_ratio * size, out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.expand(self.norm(x)))  # (R, 2H)
        x = self.contract(F.dropout(x, self.dropout, self.training))  # (R, out)
        return F.dropout(x, self.dropout, self.training)
