"""The operations of the model, behind one object, so that faster forms can take their place.

In and out: tensors. The model calls each of its formulas through an `Operations`. `PLAIN` holds the
plain formulas of `graph`, `encodings` and `attention` and is the default. The sets in
`allscaip_lite.kernels` have the same names, signatures and results, and are faster:

    model.operations = kernels.choose("auto", model.device, model.dtype)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from allscaip_lite import attention, encodings, graph, neighbors


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """(R, H), (H,) → (R, H): x / √(mean(x²) + eps) · w."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def linear_of_parts(
    parts: Sequence[tuple[Tensor, Tensor | None]], weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Lin([x₁ ; x₂ ; …]) of vectors put together from rows of several tables, → (M, b).

    parts: tables (R, a) with the row (M,) that each result takes of it, None where it is its own;
    the a of all parts together are the columns of weight (b, Σa).
    """
    rows = [x if row is None else x.index_select(0, row) for x, row in parts]
    return F.linear(torch.cat(rows, dim=1), weight, bias)


def call_block(block: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """What a block makes of its arguments; all that its derivative needs is kept."""
    return block(*arguments)


@dataclass(frozen=True)
class Operations:
    """One function for each formula. M states, N atoms with K slots, h heads, l degrees.

    linear: x (R, a), weight (b, a), bias (b,) or None → (R, b).
    linear_of_parts: tables of rows, weight, bias → (M, b).
    rms_norm: x (R, H), weight (H,), eps → (R, H).
    gelu: any shape.
    gaussian_basis: distances (E,), centers (C,), spacing → (E, C).
    soft_rank: distances (N, C), width → (N, C).
    neighborhoods: graph, degree → what the next three read: the graph with angles up to P_degree.
    pair_sums: neighborhoods, weights (N, K), degree → (N, degree).
    neighborhood_attention: qkv (M, 3H), neighborhoods, layout, heads → (M, H).
    self_edge_attention: q (N, H), key_value (M, 2H) and the same → (N, H).
    node_attention: qkv (N, 3H), bias (B, h, n, n), systems, h, dropout → (N, H).
    system_distances: structures, positions (B, n, 3) → (B, n, n) Å between nearest images.
    rotary_biases: distances (B, n, n), weight (L, h, F), frequencies (F,), empty (B, 1, 1, n) or
    None → for each of L blocks what its node_attention takes as bias.

    The three attentions also return their weights, or None where these are never written down.
    call_block: block, states (M, H), geometry, index, record → (M, H): how a block is called.
    threads: a context for the work on so many atoms, in which PyTorch uses as many threads as pay.
    second_order: the set to use where forces are differentiated once more, as in training; None
    where this set can be differentiated twice.
    """

    linear: Callable[..., Tensor] = F.linear
    linear_of_parts: Callable[..., Tensor] = linear_of_parts
    rms_norm: Callable[..., Tensor] = rms_norm
    gelu: Callable[[Tensor], Tensor] = F.gelu
    gaussian_basis: Callable[..., Tensor] = encodings.gaussian_basis
    soft_rank: Callable[..., Tensor] = graph.soft_rank
    neighborhoods: Callable[..., Any] = attention.Neighborhoods.make
    pair_sums: Callable[..., Tensor] = attention.pair_sums
    neighborhood_attention: Callable[..., tuple[Tensor, Tensor | None]] = (
        attention.neighborhood_attention
    )
    self_edge_attention: Callable[..., tuple[Tensor, Tensor | None]] = attention.self_edge_attention
    node_attention: Callable[..., tuple[Tensor, Tensor | None]] = attention.node_attention
    system_distances: Callable[..., Tensor] = neighbors.system_distances
    rotary_biases: Callable[..., Sequence[Any]] = attention.rotary_biases
    call_block: Callable[..., Tensor] = call_block
    threads: Callable[[int], AbstractContextManager[object]] = nullcontext
    second_order: Operations | None = None

    @property
    def twice_differentiable(self) -> Operations:
        """This set, or the one that stands in for it where second derivatives are taken."""
        return self.second_order or self


PLAIN = Operations()
