"""Linear layers, norm, GELU, radial basis, soft ranks and ERoPE, with derivatives written by hand.

In and out: what the plain functions of the same names in `operations`, `encodings`, `graph` and
`attention` take and give. Each is a `torch.autograd.Function` that keeps little for its derivative
and can be differentiated twice or more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


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
        d_weight = None
        if need_weight and gradient.shape[1] > x.shape[1]:  # oneDNN copies its first matrix
            d_weight = linear_by_onednn(x.t(), gradient.t(), None).t().contiguous()
        elif need_weight:
            d_weight = linear_by_onednn(gradient.t(), x.t(), None)
        return (
            linear_by_onednn(gradient, weight.t(), None) if need_x else None,
            d_weight,
            gradient.sum(0) if need_bias else None,
        )


def has_onednn() -> bool:
    """Whether this build of PyTorch offers oneDNN's linear layer."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear_by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(R, a) → (R, b), in float32 on a CPU by oneDNN, else by PyTorch's default.

    PyTorch's float32 products on CPUs are MKL's, which on AMD processors leave AVX-512 unused:
    oneDNN was 2.5 times as fast there. On an Intel Xeon a step of training takes a fifth longer
    with it, because it compiles a kernel for each new number of edges.
    """
    on_cpu = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if on_cpu and x.numel() and weight.numel():
        return _OneDNNLinear.apply(_readable(x), _readable(weight), bias)
    return F.linear(x, weight, bias)


def linear_of_parts(
    parts: Sequence[tuple[Tensor, Tensor | None]],
    weight: Tensor,
    bias: Tensor | None,
    linear: Callable[..., Tensor],
) -> Tensor:
    """`operations.linear_of_parts`: each row of a table is multiplied once, and taken often."""
    weights = weight.split([x.shape[1] for x, _ in parts], dim=1)
    total = None
    for (x, row), part in zip(parts, weights, strict=True):
        product = linear(x, part, bias if total is None else None)  # (R, b)
        if row is not None:  # gather: its derivative adds up fast and in a fixed order
            product = product.gather(0, row.unsqueeze(1).expand(-1, len(weight)))  # (M, b)
        total = product if total is None else total + product
    assert total is not None
    return total


def _readable(x: Tensor) -> Tensor:
    """A matrix that oneDNN can read as it lies, also the transpose of one; others are copied."""
    return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()


class _RMSNorm(torch.autograd.Function):
    """x / rms(x) · w over the last of two dimensions, twice differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        inverse = inverse.square_().div_(x.shape[1]).add_(eps).rsqrt_()  # (R, 1)
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        asked = ctx.needs_input_grad[1]
        return *RMSNormDerivative.apply(gradient, *ctx.saved_tensors, asked), None


class RMSNormDerivative(torch.autograd.Function):
    """What `_RMSNorm` gives back, itself differentiable, once."""

    @staticmethod
    def forward(
        ctx: Any, gradient: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, asked: bool
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(gradient, x, weight, inverse)
        d_x = gradient * weight
        along = (d_x * x).sum(1, keepdim=True).mul_(inverse**3 / -x.shape[1])  # (R, 1)
        d_x.mul_(inverse).addcmul_(x, along)
        return d_x, (gradient * x * inverse).sum(0) if asked else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor, v: Tensor | None) -> tuple[Tensor | None, ...]:
        # with g the gradient, h = w g, r the inverse and H numbers in a row, what came out is
        # d_x = r h - r³/H (h·x) x and d_w = Σ_rows r g x; u and v are what comes back to them
        g, x, weight, r = ctx.saved_tensors
        h, shrink = g * weight, r**3 / -x.shape[1]  # dr/dx = shrink x
        h_x, u_x, u_h = ((a * b).sum(1, keepdim=True) for a, b in ((h, x), (u, x), (u, h)))
        moved = (r * u).addcmul_(shrink * u_x, x)  # d(u·d_x)/dh
        d_weight = (g * moved).sum(0) if ctx.needs_input_grad[2] else None
        d_x = h.mul_(shrink * u_x).addcmul_(shrink * h_x, u)
        d_x.addcmul_(shrink * u_h + 3 * shrink**2 / r * h_x * u_x, x)
        d_g = moved.mul_(weight)
        if v is not None:
            g_v = g * v
            g_v_x = (g_v * x).sum(1, keepdim=True)
            d_x.addcmul_(g_v, r).addcmul_(shrink * g_v_x, x)
            d_g.addcmul_(x * r, v)
        return d_g, d_x, d_weight, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """(R, a), (a,) → (R, a): `F.rms_norm`, with a backward pass of few steps."""
    return _RMSNorm.apply(x, weight, eps)


def native_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """(R, a), (a,) → (R, a): PyTorch's own kernel, for GPUs."""
    return F.rms_norm(x, weight.shape, weight, eps)


class _GELU(torch.autograd.Function):
    """x Φ(x), Φ the normal distribution; any order of derivatives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.gelu(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _GELUDerivative.apply(gradient, *ctx.saved_tensors)


class _GELUDerivative(torch.autograd.Function):
    """g (Φ + x φ), φ the normal density; PyTorch's own, derived once more, takes thrice as many
    steps.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(gradient, x)
        return torch.ops.aten.gelu_backward(gradient, x)

    @staticmethod
    def backward(ctx: Any, change: Tensor) -> tuple[Tensor, Tensor]:
        gradient, x = ctx.saved_tensors
        squared = x.square()
        bend = (squared * -0.5).exp() * (2 - squared)  # of √(2π) x Φ
        d_x = gradient * change * bend * (2 * math.pi) ** -0.5
        return _GELUDerivative.apply(change, x), d_x


def gelu(x: Tensor) -> Tensor:
    """`F.gelu`, any shape."""
    return _GELU.apply(x)


class _Gaussians(torch.autograd.Function):
    """exp(-o²/8), o the distance from a centre in spacings; any order of derivatives."""

    @staticmethod
    def forward(ctx: Any, distances: Tensor, centers: Tensor, per_spacing: float) -> Tensor:
        ctx.save_for_backward(distances, centers)
        ctx.per_spacing = per_spacing
        offset = (distances.unsqueeze(1) - centers).mul_(per_spacing)
        # beyond exp(-80) stands no information, but subnormal numbers, which are slow
        return offset.square_().div_(-8).clamp_(min=-80).exp_()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        distances, centers = ctx.saved_tensors
        slope = centers - distances.unsqueeze(1)  # times s²/4 of exp(-s²(d-c)²/8) itself
        slope = slope * _Gaussians.apply(distances, centers, ctx.per_spacing)
        return (slope * gradient).sum(1) * (ctx.per_spacing**2 / 4), None, None


class _SoftRank(torch.autograd.Function):
    """Sums of bumps, some rows at a time; any order of derivatives."""

    @staticmethod
    def forward(ctx: Any, distances: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(distances)
        ctx.width = width
        rank = torch.empty_like(distances)
        for rows in _SoftRank.chunks(distances):
            u = _SoftRank.offsets(distances[rows], width).clamp_(-0.999, 0.999)
            torch.sum(u.mul_(4).div_(1 - u * u / 16).sigmoid_(), 2, out=rank[rows])
        return rank

    @staticmethod
    def chunks(distances: Tensor) -> list[slice]:
        """Rows whose (c, C, C) tables fill half a megabyte on a CPU; on a GPU all."""
        n, candidates = distances.shape
        step = max(1, 2**17 // candidates**2) if distances.device.type == "cpu" else max(1, n)
        return [slice(start, start + step) for start in range(0, n, step)]

    @staticmethod
    def offsets(distances: Tensor, width: float) -> Tensor:
        """(c, C) → (c, C, C): what each is farther than each, in units of four widths."""
        return (distances.unsqueeze(2) - distances.unsqueeze(1)) * (0.25 / width)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (distances,) = ctx.saved_tensors
        parts = []
        for rows in _SoftRank.chunks(distances):
            # d bump/dx = b (1-b) (1+u²)/(1-u²)², which is even in x: the table is symmetric
            u = _SoftRank.offsets(distances[rows], ctx.width).clamp(-0.999, 0.999)
            squared = u * u
            step = torch.sigmoid(4 * u / (1 - squared))
            slope = step * (1 - step) * (1 + squared) / (1 - squared) ** 2 / ctx.width
            g = gradient[rows].unsqueeze(2)  # (c, C, 1)
            parts.append(g.squeeze(2) * slope.sum(2) - torch.bmm(slope, g).squeeze(2))
        return torch.cat(parts) if parts else torch.zeros_like(distances), None


def soft_rank(distances: Tensor, width: float) -> Tensor:
    """`graph.soft_rank`, truncated: (N, C) → (N, C); empty candidates are at distance inf."""
    empty = distances.isinf()
    rank = _SoftRank.apply(distances.masked_fill(empty, 1e6), width)
    return rank.masked_fill(empty, torch.inf)


def gaussian_basis(distances: Tensor, centers: Tensor, spacing: float) -> Tensor:
    """(E,), (C,) → (E, C): exp(-½ (d-c)²/(2Δ)²), Δ the spacing."""
    return _Gaussians.apply(distances, centers, 1 / spacing)


def _sinc(distances: Tensor, frequencies: Tensor, order: int) -> list[Tensor]:
    """`encodings.sinc_features` and its derivatives by d up to `order`: (q,), (F,) → (q, F) each.

    sinc(ωd)' = (cos(ωd) - sinc(ωd))/d and sinc(ωd)'' = -ω² sinc(ωd) - 2 sinc(ωd)'/d.
    """
    phase = distances.unsqueeze(1) * frequencies
    found = [torch.sin(phase).div_(phase).nan_to_num_(nan=1.0)]  # 0/0 at d = 0
    if order > 0:
        inverse = distances.clamp(min=1e-6).reciprocal().unsqueeze(1)
        found.append(phase.cos_().sub_(found[0]).mul_(inverse))
    if order > 1:
        bend = (found[0] * -frequencies.square()).sub_(found[1] * inverse, alpha=2)
        found.append(torch.where(distances.unsqueeze(1) == 0, frequencies.square() / -3, bend))
    return found


PAIRS_AT_ONCE = 8192  # on a CPU: so that their features stay in the cache


def _chunks(distances: Tensor) -> Iterator[slice]:
    """All distances, some at a time."""
    step = PAIRS_AT_ONCE if distances.device.type == "cpu" else max(1, len(distances))
    return (slice(start, start + step) for start in range(0, len(distances), step))


class _RotaryMix(torch.autograd.Function):
    """Σ_f W_f sinc(ω_f d) by hand, twice differentiable: (Q,), (h, F), (F,) → (h, Q).

    The F sinc features of a pair, and their slopes, are made where they are used and never kept:
    for 600 atoms they would take 46 MB, several times over.
    """

    @staticmethod
    def forward(ctx: Any, distances: Tensor, weight: Tensor, frequencies: Tensor) -> Tensor:
        ctx.save_for_backward(distances, weight, frequencies)
        mixed = distances.new_empty(weight.shape[0], len(distances))
        for some in _chunks(distances):
            (features,) = _sinc(distances[some], frequencies, 0)
            mixed[:, some] = weight @ features.T
        return mixed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        mixes = ctx.needs_input_grad[1]
        return *_RotaryMixDerivative.apply(gradient, *ctx.saved_tensors, mixes), None


class _RotaryMixDerivative(torch.autograd.Function):
    """What `_RotaryMix` gives back, itself differentiable, once."""

    @staticmethod
    def forward(
        ctx: Any,
        gradient: Tensor,
        distances: Tensor,
        weight: Tensor,
        frequencies: Tensor,
        mixes: bool,  # whether the derivative by the weight is asked for
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(gradient, distances, weight, frequencies)
        d_distances = torch.empty_like(distances)
        d_weight = torch.zeros_like(weight) if mixes else None
        for some in _chunks(distances):
            features, slope = _sinc(distances[some], frequencies, 1)
            if d_weight is not None:
                d_weight += gradient[:, some] @ features
            d_distances[some] = (gradient[:, some].T @ weight).mul_(slope).sum(1)
        return d_distances, d_weight

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, change: Tensor, weight_change: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        gradient, distances, weight, frequencies = ctx.saved_tensors
        weight_change = torch.zeros_like(weight) if weight_change is None else weight_change
        d_gradient, d_distances = torch.empty_like(gradient), torch.empty_like(distances)
        d_weight = torch.zeros_like(weight)
        for some in _chunks(distances):
            features, slope, bend = _sinc(distances[some], frequencies, 2)
            moved = slope * change[some].unsqueeze(1)  # how far the features move
            d_gradient[:, some] = weight @ moved.T + weight_change @ features.T
            pull = bend.mul_(change[some].unsqueeze(1)).mul_(gradient[:, some].T @ weight)
            pull.addcmul_(slope, gradient[:, some].T @ weight_change)
            d_distances[some] = pull.sum(1)
            d_weight += gradient[:, some] @ moved
        return d_gradient, d_distances, d_weight, None, None


def rotary_bias(distances: Tensor, weight: Tensor, frequencies: Tensor) -> Tensor:
    """(B, n, n) Å, (h, F) → (h, B, n, n): `attention.rotary_bias`, each pair of atoms once.

    Twice differentiable, so it serves in training on forces as well.
    """
    batch, n, _ = distances.shape
    i, j = torch.triu_indices(n, n, device=distances.device)
    pairs = distances.flatten(1)[:, i * n + j]  # (B, n(n+1)/2)
    bias = F.softplus(_RotaryMix.apply(pairs.flatten(), weight, frequencies)).add(1e-6).log()
    return _Mirrored.apply(bias.view(-1, len(i)), n, False).view(-1, batch, n, n)


def rotary_bias_and_slope(
    distances: Tensor, weight: Tensor, frequencies: Tensor
) -> tuple[Tensor, Tensor]:
    """(q,) Å, (C, F), (F,) → the bias (C, q), and its derivative by the distance."""
    features, slope = _sinc(distances, frequencies, 1)
    mixed = weight @ features.T
    inside = F.softplus(mixed) + 1e-6
    return inside.log(), torch.sigmoid(mixed) / inside * (weight @ slope.T)


class _Mirrored(torch.autograd.Function):
    """`_symmetric` or `_folded`, of which each is the derivative of the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, n: int, fold: bool) -> Tensor:
        ctx.about = n, not fold
        return _folded(x, n) if fold else _symmetric(x, n)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _Mirrored.apply(gradient, *ctx.about), None, None


def _symmetric(pairs: Tensor, n: int) -> Tensor:
    """Values of the pairs i ≤ j into full symmetric matrices: (C, n(n+1)/2) → (C, n, n)."""
    upper = torch.triu_indices(n, n, device=pairs.device)
    place = upper.new_empty(n, n)
    place[upper[0], upper[1]] = place[upper[1], upper[0]] = torch.arange(
        upper.shape[1], device=pairs.device
    )
    return pairs.index_select(1, place.flatten()).view(-1, n, n)


def _folded(full: Tensor, n: int) -> Tensor:
    """Its transpose: what stands at (i, j) and (j, i) added up."""
    i, j = torch.triu_indices(n, n, device=full.device)
    full = full.reshape(-1, n * n)
    folded = full.index_select(1, i * n + j)
    return folded.add_(full.index_select(1, j * n + i) * (i != j))
