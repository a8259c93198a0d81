"""Attention, twice: among the edges of one atom, and among all atoms of a system.

In: states (M, H) of the graph's rows, or (N, H) of its atoms. Out: the same shapes, mixed. Each
attention stands here as the plain formula, which can be differentiated any number of times
(training on forces needs two); its twin of the same name in `fused` serves where one is enough,
`rotary_bias`'s everywhere. Paper sections 3.2 (neighbourhood) and 3.3 (node attention).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allscaip_lite.encodings import sinc_features
from allscaip_lite.kernels.fused import Linear, linear
from allscaip_lite.kernels.slots import Collect, Layout, Spread, SystemTable

# --- neighbourhood attention ------------------------------------------------------------------


def channel_groups(channels: tuple[int, ...] | None, head_size: int) -> list[slice]:
    """The channels of a head that belong to each Legendre degree; one group without LAE."""
    groups, start = [], 0
    for size in channels or (head_size,):
        groups.append(slice(start, start + size))
        start += size
    return groups


def angular_logits(q: Tensor, k: Tensor, legendre: Tensor | None, groups: list[slice]) -> Tensor:
    """(h, N, K, D), (h, N, K, D) → (h, N, K, K): Σ_l P_l(cos θ) q_l·k_l, P_0 = 1.

    legendre (l, N, K, K) starts at l = 1. The reference repeats every channel 2l+1 times and
    multiplies by Y_lm on both sides; by the addition theorem that is this sum.
    """
    sizes = [group.stop - group.start for group in groups]  # split: slices' derivatives are large
    first, *others = zip(q.split(sizes, -1), k.split(sizes, -1), strict=True)
    logits = first[0] @ first[1].transpose(-1, -2)
    for (q_l, k_l), p in zip(others, () if legendre is None else legendre, strict=True):
        if q_l.shape[-1]:
            logits = logits + p * (q_l @ k_l.transpose(-1, -2))
    return logits


def neighborhood_attention(
    qkv: Tensor,
    log_weight: Tensor,
    legendre: Tensor | None,
    layout: Layout,
    groups: list[slice],
    num_heads: int,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The formula. (M, 3H) → (M, H), and the weights (h, N, K, K), whose rows sum to one.

    softmax_f(Σ_l P_l(cos θ_ef) q_e·k_f/√D + log w_f) v_f inside each row of the layout.
    """
    n, num_slots = log_weight.shape
    table = Spread.apply(qkv, layout.slot, n * num_slots)  # (N·K, 3H)
    q, k, v = table.view(n, num_slots, 3, num_heads, -1).permute(2, 3, 0, 1, 4)  # (h, N, K, D) each
    logits = angular_logits(q, k, legendre, groups) * q.shape[-1] ** -0.5  # (h, N, K, K)
    weights = (logits + log_weight.unsqueeze(1)).softmax(-1)
    mixed = F.dropout(weights, dropout, dropout > 0) @ v  # (h, N, K, D)
    mixed = mixed.permute(1, 2, 0, 3).reshape(n * num_slots, -1)  # (N·K, H)
    return Collect.apply(mixed, layout.slot), weights


def self_edge_attention(
    q: Tensor,
    key_value: Tensor,
    log_weight: Tensor,
    layout: Layout,
    group: slice,
    dropout: float = 0.0,
) -> Tensor:
    """Neighbourhood attention asked by the self-edges: q (N, h, D), k and v (M, 2H) → (N, H).

    The last block needs no more, for the heads read only atoms. A self-edge has no direction, so
    of the angular encoding the first group (l = 0) is left.
    """
    n, num_slots = log_weight.shape
    row = layout.slot // num_slots  # (M,)
    k, v = key_value.unflatten(1, (2, *q.shape[1:])).unbind(1)  # (M, h, D) each
    logits = (q[..., group].index_select(0, row) * k[..., group]).sum(-1) * q.shape[-1] ** -0.5
    table = Spread.apply(logits, layout.slot, n * num_slots)  # (M, h) → (N·K, h)
    weights = (table.view(n, num_slots, -1) + log_weight.unsqueeze(2)).softmax(1)
    weights = F.dropout(Collect.apply(weights.flatten(0, 1), layout.slot), dropout, dropout > 0)
    return torch.zeros_like(q).index_add(0, row, weights.unsqueeze(2) * v).flatten(1)  # (N, H)


class SelfAttention(nn.Module):
    """The four projections of one attention; the mixing in between is passed in by the block."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.query = Linear(size, size)
        self.key = Linear(size, size)
        self.value = Linear(size, size)
        self.output = Linear(size, size)

    def project(self, x: Tensor, names: Sequence[str] = ("query", "key", "value")) -> Tensor:
        """(R, H) → (R, 3H): queries, keys and values side by side, in one product."""
        parts = [getattr(self, name) for name in names]
        weight = torch.cat([part.weight for part in parts])
        return linear(x, weight, torch.cat([part.bias for part in parts]))


# --- node attention ---------------------------------------------------------------------------


def node_attention(
    qkv: Tensor,
    bias: Tensor | None,
    table: SystemTable,
    num_heads: int,
    dropout: float = 0.0,
    fused: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(N, 3H) → (N, H) among all atoms of a system, and the weights (B, h, n, n).

    bias (B, h, n, n): ERoPE's, or -inf at empty keys, or None. The fused form is PyTorch's
    `scaled_dot_product_attention` (flash where the device and the bias allow it); it gives no
    weights.
    """
    batch, longest = table.real.shape
    qkv = table.spread(qkv).view(batch, longest, 3, num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, h, n, D) each
    if fused:
        mixed, weights = F.scaled_dot_product_attention(q, k, v, attn_mask=bias), None
    else:
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # (B, h, n, n)
        weights = (logits if bias is None else logits + bias).softmax(-1)
        mixed = F.dropout(weights, dropout, dropout > 0) @ v
    mixed = mixed.transpose(1, 2).reshape(batch * longest, -1)  # (B·n, H)
    return table.collect(mixed), weights


# --- ERoPE ------------------------------------------------------------------------------------


def rotary_bias(distances: Tensor, weight: Tensor, frequencies: Tensor) -> Tensor:
    """The formula. (...,) Å, (h, F) → (h, ...): log(softplus(Σ_f W_f sinc(ω_f d)) + 1e-6)."""
    mixed = torch.tensordot(weight, sinc_features(distances, frequencies), dims=([1], [-1]))
    return torch.log(F.softplus(mixed) + 1e-6)
