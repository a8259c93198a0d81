"""The fast twins of the attention's formulas, for when one differentiation is enough.

In and out: what the plain functions in `attention` of the same name take and give, and tests hold
the two equal. Each is a `torch.autograd.Function` whose derivative is written by hand, so that
nothing is copied and little is kept. `linear` is the exception: it serves everywhere, at any order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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

    It takes one head and a few atoms at a time, so that their K × K matrices stay in the
    processor's cache. Queries of empty slots get zero weights, so what stands there never reaches
    a gradient.
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
        table = qkv.index_select(0, layout.occupant).view(n, num_slots, 3, num_heads, -1)
        weights = table.new_empty(num_heads, n, num_slots, num_slots)
        mixed = table.new_empty(n, num_slots, num_heads, table.shape[-1])
        for head, rows in _chunks(weights):
            q, k, v = table[rows, :, :, head].unbind(2)  # (c, K, D) each
            q = q * table.shape[-1] ** -0.5
            logits = _products(q, k, groups[0])  # (c, K, K)
            for l, group in enumerate(groups[1:]):
                if group.stop > group.start:
                    logits.addcmul_(legendre[l, rows], _products(q, k, group))
            logits += log_weight[rows, None]
            chunk = torch.softmax(logits, -1, out=weights[head, rows])
            chunk *= layout.occupied[rows, :, None]
            mixed[rows, :, head] = torch.bmm(chunk, v)
        ctx.save_for_backward(table, weights, legendre)
        ctx.layout, ctx.groups = layout, groups
        return mixed.view(n * num_slots, -1).index_select(0, layout.slot)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        table, weights, legendre = ctx.saved_tensors
        layout, groups = ctx.layout, ctx.groups
        n, num_slots, _, num_heads, head_size = table.shape
        gradient = gradient.index_select(0, layout.occupant).view(n, num_slots, num_heads, -1)
        d_table = torch.empty_like(table)
        d_log_weight = table.new_zeros(n, num_slots)
        d_legendre = None
        if legendre is not None and ctx.needs_input_grad[2]:
            d_legendre = torch.zeros_like(legendre)
        for head, rows in _chunks(weights):
            q, k, v = table[rows, :, :, head].unbind(2)  # (c, K, D) each
            q = q * head_size**-0.5
            dq, dk, dv = d_table[rows, :, :, head].unbind(2)
            chunk, g = weights[head, rows], gradient[rows, :, head]  # (c, K, K), (c, K, D)
            dv.copy_(torch.bmm(chunk.transpose(1, 2), g))
            d_weights = torch.bmm(g, v.transpose(1, 2))
            d_logits = torch._softmax_backward_data(d_weights, chunk, -1, chunk.dtype)
            d_log_weight[rows] += d_logits.sum(1)
            for l, group in enumerate(groups):
                if group.stop == group.start:
                    continue
                d_product = d_logits if l == 0 else d_logits * legendre[l - 1, rows]
                dq[..., group] = torch.bmm(d_product, k[..., group])
                dk[..., group] = torch.bmm(d_product.transpose(1, 2), q[..., group])
                if l and d_legendre is not None:
                    d_legendre[l - 1, rows].addcmul_(_products(q, k, group), d_logits)
            dq.mul_(head_size**-0.5)
        d_qkv = d_table.view(n * num_slots, -1).index_select(0, layout.slot)
        return d_qkv, d_log_weight, d_legendre, None, None, None


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within it the weights of `module` ask for no gradients, which nobody would read."""
    asking = [weight for weight in module.parameters() if weight.requires_grad]
    try:
        for weight in asking:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in asking:
            weight.requires_grad_(True)


def _products(q: Tensor, k: Tensor, group: slice) -> Tensor:
    """q·k over one group of channels: (c, K, D) twice → (c, K, K)."""
    return torch.bmm(q[..., group], k[..., group].transpose(1, 2))


def _chunks(weights: Tensor) -> list[tuple[int, slice]]:
    """Heads and runs of atoms whose weights (c, K, K) fill 256 kB on a CPU."""
    num_heads, n, num_slots, _ = weights.shape
    size = max(1, 2**16 // num_slots**2) if weights.device.type == "cpu" else n
    runs = [slice(start, min(start + size, n)) for start in range(0, n, size)]
    return [(head, rows) for head in range(num_heads) for rows in runs]


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
