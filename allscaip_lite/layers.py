"""What is done to each state on its own: linear layers, activations, norms, feed-forward network.

In and out: states of any number of rows. The modules hold weights; what is done with them is asked
of an `Operations`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allscaip_lite.config import AllScAIPConfig
from allscaip_lite.operations import PLAIN, Operations

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "squared_relu": lambda x: F.relu(x).square(),
    "star_relu": lambda x: 0.8944 * F.relu(x).square() - 0.4472,  # of mean 0 and variance 1
    "smelu": lambda x: torch.where(x.abs() <= 2, (x + 2).square() / 8, F.relu(x)),
}


class Activation(nn.Module):
    """One of `ACTIVATIONS`, any shape; GELU, the paper's, is one of the operations."""

    def __init__(self, config: AllScAIPConfig) -> None:
        super().__init__()
        self.name = config.activation

    def forward(self, x: Tensor, operations: Operations = PLAIN) -> Tensor:
        return operations.gelu(x) if self.name == "gelu" else ACTIVATIONS[self.name](x)


class Linear(nn.Linear):
    """x Wᵀ + b, (R, a) → (R, b)."""

    def forward(self, x: Tensor, operations: Operations = PLAIN) -> Tensor:
        return operations.linear(x, self.weight, self.bias)


class RMSNorm(nn.RMSNorm):
    """x / rms(x) · w, (R, H) → (R, H)."""

    def forward(self, x: Tensor, operations: Operations = PLAIN) -> Tensor:
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return operations.rms_norm(x, self.weight, eps)


class LayerNorm(nn.LayerNorm):
    """(x - mean(x)) / std(x) · w + b, (R, H) → (R, H)."""

    def forward(self, x: Tensor, operations: Operations = PLAIN) -> Tensor:
        return super().forward(x)


class NoNorm(nn.Identity):
    """x."""

    def forward(self, x: Tensor, operations: Operations = PLAIN) -> Tensor:
        return x


def make_norm(config: AllScAIPConfig, size: int) -> nn.Module:
    """The norm that a configuration asks for."""
    return {"rms": RMSNorm, "layer": LayerNorm, "none": NoNorm}[config.normalization](size)


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

    def forward(self, x: Tensor, operations: Operations = PLAIN) -> Tensor:
        x = self.contract(self.hidden(x, operations), operations)  # (R, out)
        return F.dropout(x, self.dropout, self.training)

    def hidden(self, x: Tensor, operations: Operations = PLAIN) -> Tensor:
        """(R, H) → (R, 2H): what the last layer reads."""
        x = self.expand(self.norm(x, operations), operations)
        return F.dropout(self.activation(x, operations), self.dropout, self.training)


class SelfAttention(nn.Module):
    """The four projections of one attention; the mixing in between is one of `Operations`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.query = Linear(size, size)
        self.key = Linear(size, size)
        self.value = Linear(size, size)
        self.output = Linear(size, size)

    def project(
        self,
        x: Tensor,
        operations: Operations = PLAIN,
        names: Sequence[str] = ("query", "key", "value"),
    ) -> Tensor:
        """(R, H) → (R, 3H): queries, keys and values side by side, in one product."""
        parts = [getattr(self, name) for name in names]
        weight = torch.cat([part.weight for part in parts])
        return operations.linear(x, weight, torch.cat([part.bias for part in parts]))
