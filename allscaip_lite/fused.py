"""The fast twins of the attention's formulas, for when one differentiation is enough.

In and out: what the plain functions in `attention` of the same name take and give, and tests hold
the two equal. Each is a `torch.autograd.Function` whose derivative is written by hand, so that
nothing is copied and little is kept. `linear` is the exception: it serves everywhere, at any order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from allscaip_lite.encodings import rotary_frequencies, sinc_features
from allscaip_lite.slots import Layout


class _OneDNNLinear(torch.autograd.Function):
    """x Wᵀ + b by oneDNN; its derivatives are products of the same kind, so any order works."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            linear(gradient, weight.t(), None) if need_x else None,
            linear(gradient.t(), x.t(), None) if need_weight else None,
            gradient.sum(0) if need_bias else None,
        )


_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, "_linear_pointwise"
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(R, a) → (R, b), on a CPU in float32 by oneDNN.

    PyTorch's float32 products on CPUs are MKL's, which on AMD processors leave AVX-512 unused:
    oneDNN was 2.5 times as fast there, and as fast elsewhere.
    """
    on_cpu = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if _HAS_ONEDNN and on_cpu and x.numel() and weight.numel():
        return _OneDNNLinear.apply(x.contiguous(), weight.contiguous(), bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """`nn.Linear`, by oneDNN on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class FusedNeighborhoodAttention(torch.autograd.Function):
    """The same by hand, forwards and once backwards: no copies, few saved intermediates.

    Atoms are taken a few at a time, so that their K × K matrices stay in the processor's cache.
    Queries of empty slots get zero weights, so what stands there never reaches a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        log_weight: Tensor,
        legendre: Tensor | None,
        layout: Layout,
        groups: list[slice],
        num_heads: int,
    ) -> Tensor:
        n, num_slots = log_weight.shape
        head_size = qkv.shape[1] // (3 * num_heads)
        q, k, v = (
            qkv.view(-1, head_size)
            .index_select(0, layout.qkv_to_slots)
            .view(3, n, num_heads, num_slots, head_size)
        )
        q.mul_(head_size**-0.5)
        weights = torch.empty(n, num_heads, num_slots, num_slots, dtype=q.dtype, device=q.device)
        mixed = torch.empty_like(q)
        for rows in _chunks(weights):
            qc, kc, vc = (x[rows].flatten(0, 1) for x in (q, k, v))  # (c·h, K, D)
            logits = _products(qc, kc, groups[0], num_heads)  # (c, h, K, K)
            for l, group in enumerate(groups[1:]):
                if group.stop > group.start:
                    logits.addcmul_(
                        legendre[l, rows].unsqueeze(1), _products(qc, kc, group, num_heads)
                    )
            logits += log_weight[rows, None, None]
            chunk = torch.softmax(logits, -1, out=weights[rows])
            chunk *= layout.occupied[rows, None, :, None]
            torch.bmm(chunk.flatten(0, 1), vc, out=mixed[rows].flatten(0, 1))
        ctx.save_for_backward(q, k, v, weights, legendre)
        ctx.layout, ctx.groups = layout, groups
        rows = mixed.view(-1, head_size).index_select(0, layout.slots_to_rows)
        return rows.view(-1, num_heads * head_size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights, legendre = ctx.saved_tensors
        layout, groups = ctx.layout, ctx.groups
        n, num_heads, num_slots, head_size = q.shape
        gradient = gradient.reshape(-1, head_size).index_select(0, layout.rows_to_slots).view_as(q)
        d_qkv = torch.empty(3, *q.shape, dtype=q.dtype, device=q.device)
        d_log_weight = torch.empty(n, num_slots, dtype=q.dtype, device=q.device)
        d_legendre = None
        if legendre is not None and ctx.needs_input_grad[2]:
            d_legendre = torch.zeros_like(legendre)
        for rows in _chunks(weights):
            qc, kc, vc, gc = (x[rows].flatten(0, 1) for x in (q, k, v, gradient))  # (c·h, K, D)
            dq, dk, dv = (x[rows].flatten(0, 1) for x in d_qkv)
            chunk = weights[rows]  # (c, h, K, K)
            torch.bmm(chunk.flatten(0, 1).transpose(1, 2), gc, out=dv)
            d_weights = torch.bmm(gc, vc.transpose(1, 2)).view_as(chunk)
            d_logits = torch._softmax_backward_data(d_weights, chunk, -1, chunk.dtype)
            torch.sum(d_logits, (1, 2), out=d_log_weight[rows])
            for l, group in enumerate(groups):
                if group.stop == group.start:
                    continue
                d_product = d_logits if l == 0 else d_logits * legendre[l - 1, rows].unsqueeze(1)
                d_product = d_product.flatten(0, 1)
                dq[..., group] = torch.bmm(d_product, kc[..., group])
                dk[..., group] = torch.bmm(d_product.transpose(1, 2), qc[..., group])
                if l and d_legendre is not None:
                    product = _products(qc, kc, group, num_heads)
                    torch.sum(product.mul_(d_logits), 1, out=d_legendre[l - 1, rows])
        d_qkv[0].mul_(head_size**-0.5)
        rows = d_qkv.view(-1, head_size).index_select(0, layout.slots_to_qkv)
        rows = rows.view(-1, 3 * num_heads * head_size)
        return rows, d_log_weight, d_legendre, None, None, None


def _products(q: Tensor, k: Tensor, group: slice, num_heads: int) -> Tensor:
    """q·k over one group of channels: (c·h, K, D) twice → (c, h, K, K)."""
    product = torch.bmm(q[..., group], k[..., group].transpose(1, 2))
    return product.view(-1, num_heads, *product.shape[1:])


def _chunks(weights: Tensor) -> list[slice]:
    """Atoms in runs whose attention weights (c, h, K, K) fill about half a megabyte on a CPU."""
    n = weights.shape[0]
    if weights.device.type != "cpu" or torch.compiler.is_compiling():
        return [slice(0, n)]
    size = max(1, 2**17 // weights[0].numel())
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


class FusedRotaryBias(torch.autograd.Function):
    """The same by hand, forwards and once backwards, a few thousand distances at a time.

    The F sinc features of a pair, and their slopes, are made where they are used and never kept:
    for 600 atoms they would take 46 MB, several times over.
    """

    CHUNK = 8192

    @staticmethod
    def forward(ctx: Any, distances: Tensor, weight: Tensor) -> Tensor:
        frequencies = rotary_frequencies(weight.shape[1], distances)
        mixed = distances.new_empty(weight.shape[0], len(distances))
        step = FusedRotaryBias._step(distances)
        for start in range(0, len(distances), step):
            chunk = distances[start : start + step]
            mixed[:, start : start + step] = weight @ sinc_features(chunk, frequencies).T
        ctx.save_for_backward(distances, weight, mixed)
        return F.softplus(mixed).add_(1e-6).log_()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        distances, weight, mixed = ctx.saved_tensors
        frequencies = rotary_frequencies(weight.shape[1], distances)
        d_mixed = gradient * torch.sigmoid(mixed) / (F.softplus(mixed) + 1e-6)  # (h, Q)
        d_distances = torch.empty_like(distances)
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        step = FusedRotaryBias._step(distances)
        for start in range(0, len(distances), step):
            rows = slice(start, start + step)
            features = sinc_features(distances[rows], frequencies)  # (q, F)
            if d_weight is not None:
                d_weight += d_mixed[:, rows] @ features
            # d sinc(ωd)/dd = (cos(ωd) - sinc(ωd))/d, and 0 at d = 0
            slope = torch.cos(distances[rows].unsqueeze(1) * frequencies).sub_(features)
            slope *= d_mixed[:, rows].T @ weight
            d_distances[rows] = slope.sum(1) / distances[rows].clamp(min=1e-6)
        return d_distances, d_weight

    @staticmethod
    def _step(distances: Tensor) -> int:
        return FusedRotaryBias.CHUNK if distances.device.type == "cpu" else max(1, len(distances))


class Symmetrize(torch.autograd.Function):
    """Values of the pairs i ≤ j into full symmetric matrices: (C, n(n+1)/2) → (C, n, n)."""

    @staticmethod
    def forward(ctx: Any, pairs: Tensor, n: int) -> Tensor:
        upper = torch.triu_indices(n, n, device=pairs.device)
        place = upper.new_empty(n, n)
        place[upper[0], upper[1]] = place[upper[1], upper[0]] = torch.arange(
            upper.shape[1], device=pairs.device
        )
        ctx.n = n
        return pairs.index_select(1, place.flatten()).view(-1, n, n)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        n = ctx.n
        i, j = torch.triu_indices(n, n, device=gradient.device)
        gradient = gradient.reshape(-1, n * n)
        folded = gradient.index_select(1, i * n + j)
        folded += gradient.index_select(1, j * n + i) * (i != j)
        return folded, None
