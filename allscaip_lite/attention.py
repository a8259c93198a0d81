"""Attention, twice: among the edges of one atom, and among all atoms of a system.

In: states (M, H) of the graph's rows, or (N, H) of its atoms. Out: the same shapes, mixed, and the
weights of the mixing. Every formula can be differentiated any number of times; training on forces
needs two. Paper sections 3.2 (neighbourhood attention) and 3.3 (node attention).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from allscaip_lite import encodings
from allscaip_lite.graph import Graph

# --- neighbourhood attention ------------------------------------------------------------------


@dataclass(frozen=True)
class Neighborhoods:
    """What attention among edges reads of a graph: its slots, and the angles between them.

    legendre (degree, N, K, K): P_l(cos θ) between the edges of each row, l = 1 .. degree.
    """

    graph: Graph
    legendre: Tensor

    @classmethod
    def make(cls, graph: Graph, degree: int) -> Neighborhoods:
        return cls(graph, encodings.slot_legendre(graph, degree))


def pair_sums(neighborhoods: Neighborhoods, weights: Tensor, degree: int) -> Tensor:
    """Σ_ef w_e w_f P_l(cos θ) over the pairs of edges of each row, l = 1 .. degree: (N, degree).

    weights (N, K), 0 in empty slots.
    """
    return encodings.pair_sums(neighborhoods.legendre[:degree], weights)


class Heads(NamedTuple):
    """How the H channels are shared: the channels of a head that belong to each degree of the
    angular encoding (see `channel_groups`), the number h of heads, and the share of their weights
    that is dropped.
    """

    groups: list[slice]
    number: int
    dropout: float = 0.0


def channel_groups(channels: tuple[int, ...] | None, head_size: int) -> list[slice]:
    """The channels of a head that belong to each Legendre degree; one group without LAE."""
    groups, start = [], 0
    for size in channels or (head_size,):
        groups.append(slice(start, start + size))
        start += size
    return groups


def angular_logits(q: Tensor, k: Tensor, legendre: Tensor, groups: list[slice]) -> Tensor:
    """(h, N, Q, D), (h, N, K, D) → (h, N, Q, K): Σ_l P_l(cos θ) q_l·k_l, P_0 = 1.

    legendre (l, N, Q, K) starts at l = 1; there may be more degrees than groups. The reference
    repeats every channel 2l+1 times and multiplies by Y_lm on both sides; by the addition theorem
    that is this sum.
    """
    logits = q[..., groups[0]] @ k[..., groups[0]].transpose(-1, -2)
    for group, p in zip(groups[1:], legendre, strict=False):
        logits = logits + p * (q[..., group] @ k[..., group].transpose(-1, -2))
    return logits


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, log_weight: Tensor, legendre: Tensor, heads: Heads
) -> tuple[Tensor, Tensor]:
    """softmax_f(Σ_l P_l(cos θ_ef) q_e·k_f/√D + log w_f) v_f, with Q queries and K keys a row.

    Args:
        q: queries (h, N, Q, D).
        k: keys (h, N, K, D).
        v: values (h, N, K, D).
        log_weight: (N, K), the logarithm of the envelope w_f.
        legendre: P_l(cos θ_ef) from l = 1 on, (l, N, Q, K).
        heads: how the channels are shared.

    Returns:
        What each query gets, (h, N, Q, D), and the weights (h, N, Q, K).
    """
    logits = angular_logits(q, k, legendre, heads.groups) * q.shape[-1] ** -0.5  # (h, N, Q, K)
    weights = (logits + log_weight.unsqueeze(1)).softmax(-1)  # rows sum to one
    return F.dropout(weights, heads.dropout, heads.dropout > 0) @ v, weights


def neighborhood_attention(
    qkv: Tensor, neighborhoods: Neighborhoods, layout: str, heads: Heads
) -> tuple[Tensor, Tensor]:
    """Every edge attends to the edges of its row.

    Args:
        qkv: queries, keys and values of the edges, (M, 3H).
        neighborhoods: the rows.
        layout: "source", where a row holds the edges that leave an atom, or "destination".
        heads: how the channels are shared.

    Returns:
        (M, H), and the weights (h, N, K, K).
    """
    log_weight, slot = neighborhoods.graph.log_weight, neighborhoods.graph.slot(layout)
    n, num_slots = log_weight.shape
    table = qkv.new_zeros(n * num_slots, qkv.shape[1]).index_copy(0, slot, qkv)  # (N·K, 3H)
    table = table.view(n, num_slots, 3, heads.number, -1)
    q, k, v = table.permute(2, 3, 0, 1, 4)  # (h, N, K, D) each
    mixed, weights = softmax_attention(q, k, v, log_weight, neighborhoods.legendre, heads)
    mixed = mixed.permute(1, 2, 0, 3).reshape(n * num_slots, -1)  # (N·K, H)
    return mixed.index_select(0, slot), weights


def self_edge_attention(
    q: Tensor, key_value: Tensor, neighborhoods: Neighborhoods, layout: str, heads: Heads
) -> tuple[Tensor, Tensor]:
    """`neighborhood_attention` for the atoms alone, which stand in slot 0 of their rows.

    Args:
        q: queries of the atoms, (N, H).
        key_value: keys and values of the edges, (M, 2H).
        neighborhoods: as there, and so are the others.
        layout: "source" or "destination".
        heads: how the channels are shared.

    Returns:
        (N, H), and the weights (h, N, 1, K).
    """
    log_weight, slot = neighborhoods.graph.log_weight, neighborhoods.graph.slot(layout)
    n, num_slots = log_weight.shape
    q = q.view(n, 1, heads.number, -1).permute(2, 0, 1, 3)  # (h, N, 1, D)
    table = key_value.new_zeros(n * num_slots, key_value.shape[1]).index_copy(0, slot, key_value)
    k, v = table.view(n, num_slots, 2, heads.number, -1).permute(2, 3, 0, 1, 4)  # (h, N, K, D) each
    legendre = neighborhoods.legendre[:, :, :1]  # (l, N, 1, K)
    mixed, weights = softmax_attention(q, k, v, log_weight, legendre, heads)
    return mixed.permute(1, 2, 0, 3).reshape(n, -1), weights  # (N, H)


# --- node attention ---------------------------------------------------------------------------


@dataclass(frozen=True)
class SystemTable:
    """All atoms of each system as one padded row: B rows of n slots.

    slot (N,): slot of each atom, or None where no padding is needed (all systems of one size).
    real (B, n) bool: slots that hold an atom.
    """

    slot: Tensor | None
    real: Tensor

    @classmethod
    def make(cls, natoms: Tensor) -> SystemTable:
        longest = int(natoms.max())
        inside = torch.arange(longest, device=natoms.device)
        real = inside < natoms.unsqueeze(1)  # (B, n)
        return cls(None if bool(real.all()) else real.flatten().nonzero().squeeze(1), real)

    def mask(self, dtype: torch.dtype) -> Tensor | None:
        """(B, 1, 1, n): -inf at empty slots, 0 elsewhere; None where there are none."""
        if self.slot is None:
            return None
        mask = torch.zeros(self.real.shape, dtype=dtype, device=self.real.device)
        return mask.masked_fill(~self.real, -torch.inf)[:, None, None]

    def spread(self, x: Tensor) -> Tensor:
        """(N, C) → (B·n, C), zeros in empty slots."""
        if self.slot is None:
            return x
        return x.new_zeros(self.real.numel(), x.shape[1]).index_copy(0, self.slot, x)

    def collect(self, x: Tensor) -> Tensor:
        """(B·n, C) → (N, C)."""
        return x if self.slot is None else x.index_select(0, self.slot)

    def to_heads(self, qkv: Tensor, num_heads: int) -> Tensor:
        """(N, 3H) → (3, B, h, n, D): queries, keys and values of each system and head."""
        return self.spread(qkv).view(*self.real.shape, 3, num_heads, -1).permute(2, 0, 3, 1, 4)

    def from_heads(self, mixed: Tensor) -> Tensor:
        """(B, h, n, D) → (N, H)."""
        return self.collect(mixed.transpose(1, 2).reshape(self.real.numel(), -1))


def node_attention(
    qkv: Tensor, bias: Tensor | None, systems: SystemTable, num_heads: int, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """softmax_j(q_i·k_j/√D + bias_ij) v_j over all atoms j of a system.

    Args:
        qkv: queries, keys and values of the atoms, (N, 3H).
        bias: (B, h, n, n), ERoPE's (see `rotary_bias`), -inf at empty keys; None for neither.
        systems: which atoms are one system.
        num_heads: h.
        dropout: share of the weights that are dropped.

    Returns:
        (N, H), and the weights (B, h, n, n).
    """
    q, k, v = systems.to_heads(qkv, num_heads)  # (B, h, n, D) each
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (B, h, n, n)
    weights = (logits if bias is None else logits + bias).softmax(-1)
    mixed = F.dropout(weights, dropout, dropout > 0) @ v  # (B, h, n, D)
    return systems.from_heads(mixed), weights


def rotary_bias(distances: Tensor, weight: Tensor, frequencies: Tensor) -> Tensor:
    """ERoPE as a bias of logits: log(softplus(Σ_f W_f sinc(ω_f d)) + 1e-6), (h, ...).

    distances d (...,) Å, weight W (h, F), frequencies ω (F,) 1/Å.
    """
    features = encodings.sinc_features(distances, frequencies)  # (..., F)
    mixed = torch.tensordot(weight, features, dims=([1], [-1]))  # (h, ...)
    return torch.log(F.softplus(mixed) + 1e-6)


def rotary_biases(
    distances: Tensor,
    weight: Tensor,
    frequencies: Tensor,
    empty: Tensor | None = None,
    bias: Callable[..., Tensor] = rotary_bias,
) -> Sequence[Tensor]:
    """What `node_attention` of each block reads: ERoPE's bias, and -inf at empty keys.

    Args:
        distances: (B, n, n) Å.
        weight: W of all blocks, (L, h, F).
        frequencies: ω, (F,) 1/Å.
        empty: -inf at empty keys, (B, 1, 1, n); None where there are none.
        bias: `rotary_bias`, or a faster form of it.

    Returns:
        L biases (B, h, n, n).
    """
    found = bias(distances, weight.flatten(0, 1), frequencies)  # (L·h, B, n, n)
    found = found.unflatten(0, weight.shape[:2]).transpose(1, 2)  # (L, B, h, n, n)
    return (found if empty is None else found + empty).unbind(0)
