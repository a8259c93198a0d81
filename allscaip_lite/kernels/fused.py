"""The fast twins of the attention's formulas, for when one differentiation is enough.

In and out: what the plain functions in `attention` of the same name take and give, and tests hold
the two equal. Each is a `torch.autograd.Function` whose derivative is written by hand, so that
nothing is copied and little is kept. What serves in training on forces as well can be derived
twice or more: `linear`, `gelu`, the norm, `gaussians`, `soft_rank` and `rotary_bias`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from allscaip_lite.machine import processor_name

if TYPE_CHECKING:
    from allscaip_lite.kernels.slots import Layout, Run


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
            d_weight = linear(x.t(), gradient.t(), None).t().contiguous()
        elif need_weight:
            d_weight = linear(gradient.t(), x.t(), None)
        return (
            linear(gradient, weight.t(), None) if need_x else None,
            d_weight,
            gradient.sum(0) if need_bias else None,
        )


_BY_ONEDNN = (
    "AMD" in processor_name()
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(R, a) → (R, b), on an AMD processor in float32 by oneDNN.

    PyTorch's float32 products on CPUs are MKL's, which on AMD processors leave AVX-512 unused:
    oneDNN was 2.5 times as fast there. On an Intel Xeon a step of training takes a fifth longer
    with it, because it compiles a kernel for each new number of edges.
    """
    on_cpu = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if _BY_ONEDNN and on_cpu and x.numel() and weight.numel():
        return _OneDNNLinear.apply(_plain(x), _plain(weight), bias)
    return F.linear(x, weight, bias)


def _plain(x: Tensor) -> Tensor:
    """A matrix that oneDNN can read as it lies, also the transpose of one; others are copied."""
    return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()


class Linear(nn.Linear):
    """`nn.Linear`, by oneDNN on an AMD processor."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


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
    steps."""

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


def gaussians(distances: Tensor, centers: Tensor, per_spacing: float) -> Tensor:
    """(E,), (C,) → (E, C): exp(-½ (d-c)²/(2Δ)²), `per_spacing` being 1/Δ."""
    return _Gaussians.apply(distances, centers, per_spacing)


class FusedNeighborhoodAttention(torch.autograd.Function):
    """The same by hand, forwards and once backwards: no copies, few saved intermediates.

    It takes one run of rows at a time (see `Layout`), all heads together, so that their K × K
    matrices stay in the processor's cache. Queries of empty slots get zero weights, so what stands
    there never reaches a gradient.
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
        table = qkv.index_select(0, layout.occupant).view(len(layout.occupant), 3, num_heads, -1)
        mixed = table.new_empty(len(table), num_heads, table.shape[-1])  # (S, h, D)
        kept = []
        for run in layout.runs:
            q, k, v = _by_head(table, run)  # (h·c, w, D) each
            q *= q.shape[-1] ** -0.5
            logits = _products(q, k, groups[0]).unflatten(0, (num_heads, -1))  # (h, c, w, w)
            for l, group in enumerate(groups[1:]):
                if group.stop > group.start:
                    products = _products(q, k, group).view_as(logits)
                    logits.addcmul_(_angles(legendre, l, run), products)
            logits += log_weight[run.rows, None, : run.width]
            weights = torch.softmax(logits, -1)
            weights *= layout.full[run.slots].view(-1, run.width, 1)
            heads = torch.bmm(weights.flatten(0, 1), v).view(num_heads, -1, v.shape[-1])
            mixed[run.slots] = heads.transpose(0, 1)
            kept += [q, k, v, weights]
        ctx.save_for_backward(legendre, *kept)
        ctx.layout, ctx.groups = layout, groups
        return mixed.flatten(1).index_select(0, layout.packed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        legendre, *kept = ctx.saved_tensors
        layout, groups = ctx.layout, ctx.groups
        num_heads, head_size = kept[3].shape[0], kept[0].shape[-1]
        gradient = gradient.index_select(0, layout.occupant).view(-1, 1, num_heads, head_size)
        d_table = gradient.new_empty(len(gradient), 3, num_heads, head_size)
        d_log_weight = gradient.new_zeros(layout.occupied.shape)
        d_legendre = None
        if legendre is not None and ctx.needs_input_grad[2]:
            d_legendre = torch.zeros_like(legendre)
        for run in layout.runs:
            q, k, v, weights = (kept.pop(0) for _ in range(4))
            (pull,) = _by_head(gradient, run)  # (h·c, w, D)
            d_qkv = pull.new_empty(3, *pull.shape)
            dq, dk, dv = d_qkv
            torch.bmm(weights.flatten(0, 1).transpose(1, 2), pull, out=dv)
            d_weights = torch.bmm(pull, v.transpose(1, 2)).view_as(weights)
            d_logits = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
            d_log_weight[run.rows, : run.width] = d_logits.sum((0, 2))
            for l, group in enumerate(groups):
                if group.stop == group.start:
                    continue
                d_product = d_logits * _angles(legendre, l - 1, run) if l else d_logits
                d_product = d_product.flatten(0, 1)
                dq[..., group] = torch.bmm(d_product, k[..., group])
                dk[..., group] = torch.bmm(d_product.transpose(1, 2), q[..., group])
                if l and d_legendre is not None:
                    products = _products(q, k, group).view_as(d_logits)
                    _angles(d_legendre, l - 1, run).copy_(products.mul_(d_logits).sum(0))
            dq *= head_size**-0.5
            d_table[run.slots] = d_qkv.view(3, num_heads, -1, head_size).permute(2, 0, 1, 3)
        d_qkv = d_table.flatten(1).index_select(0, layout.packed)
        return d_qkv, d_log_weight, d_legendre, None, None, None


def _by_head(table: Tensor, run: Run) -> Tensor:
    """The rows of one run from (S, p, h, D), a batch of matrices for each part: (p, h·c, w, D)."""
    _, parts, num_heads, size = table.shape
    heads = table[run.slots].permute(1, 2, 0, 3)  # (p, h, c·w, D)
    return heads.reshape(parts, -1, run.width, size)


def _products(q: Tensor, k: Tensor, group: slice) -> Tensor:
    """q·k over one group of channels: (b, w, D) twice → (b, w, w)."""
    return torch.bmm(q[..., group], k[..., group].transpose(1, 2))


def _angles(legendre: Tensor, l: int, run: Run) -> Tensor:
    """(c, w, w) of (l, N, K, K), a view."""
    return legendre[l, run.rows, : run.width, : run.width]


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


def pair_sums(directions: Tensor, weights: Tensor, degree: int, runs: list[Run]) -> Tensor:
    """`encodings.pair_sums` from the slots' directions: (N, K, 3), (N, K) → (N, degree)."""
    return FusedPairSums.apply(directions, weights, degree, runs)


class FusedPairSums(torch.autograd.Function):
    """The same by hand, forwards and once backwards.

    A run of rows at a time and a degree after the other, so that of the Legendre matrices no more
    than three are there at once. Slots without direction hold zero vectors.
    """

    @staticmethod
    def forward(
        ctx: Any, directions: Tensor, weights: Tensor, degree: int, runs: list[Run]
    ) -> Tensor:
        ctx.save_for_backward(directions, weights)
        ctx.degree, ctx.runs = degree, runs
        sums = weights.new_empty(len(weights), degree)
        for run in runs:
            _, both, cosine = _pairs(directions, weights, run)
            before, now = torch.ones_like(cosine), cosine
            for l in range(1, degree + 1):
                sums[run.rows, l - 1] = (now * both).sum((1, 2))
                before, now = now, _next_legendre(l, cosine, now, before)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        directions, weights = ctx.saved_tensors
        d_directions, d_weights = torch.zeros_like(directions), torch.zeros_like(weights)
        for run in ctx.runs:
            (u, w), both, cosine = _pairs(directions, weights, run)
            before, now = torch.ones_like(cosine), cosine
            slope_before, slope = torch.zeros_like(cosine), torch.ones_like(cosine)
            value, pull = torch.zeros_like(cosine), torch.zeros_like(cosine)
            for l in range(1, ctx.degree + 1):
                part = gradient[run.rows, l - 1, None, None]
                value.addcmul_(now, part)  # Σ_l g_l P_l
                pull.addcmul_(slope, part)  # Σ_l g_l P_l'
                slope_before, slope = slope, slope_before.add_(now, alpha=2 * l + 1)
                before, now = now, _next_legendre(l, cosine, now, before)
            d_directions[run.rows, : run.width] = 2 * torch.bmm(pull.mul_(both), u)
            d_weights[run.rows, : run.width] = 2 * torch.bmm(value, w.unsqueeze(2)).squeeze(2)
        return d_directions, d_weights * directions.any(2), None, None


def _pairs(
    directions: Tensor, weights: Tensor, run: Run
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """Of one run: directions (c, w, 3), weights (c, w), their products and cosines (c, w, w)."""
    u = directions[run.rows, : run.width]
    w = weights[run.rows, : run.width] * u.any(2)
    return (u, w), w.unsqueeze(2) * w.unsqueeze(1), torch.bmm(u, u.transpose(1, 2))


def _next_legendre(l: int, x: Tensor, now: Tensor, before: Tensor) -> Tensor:
    """P_(l+1) from P_l and P_(l-1), by Bonnet's recursion."""
    return (x * now).mul_((2 * l + 1) / (l + 1)).sub_(before, alpha=l / (l + 1))


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


def _some(distances: Tensor) -> Iterator[slice]:
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
        for some in _some(distances):
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
        for some in _some(distances):
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
        for some in _some(distances):
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
    return _Symmetric.apply(bias.view(-1, len(i)), n).view(-1, batch, n, n)


class _Symmetric(torch.autograd.Function):
    """Values of the pairs i ≤ j into full symmetric matrices: (C, n(n+1)/2) → (C, n, n)."""

    @staticmethod
    def forward(ctx: Any, pairs: Tensor, n: int) -> Tensor:
        upper = torch.triu_indices(n, n, device=pairs.device)
        place = upper.new_empty(n, n)
        place[upper[0], upper[1]] = place[upper[1], upper[0]] = torch.arange(
            upper.shape[1], device=pairs.device
        )
        return pairs.index_select(1, place.flatten()).view(-1, n, n)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Folded.apply(gradient), None


class _Folded(torch.autograd.Function):
    """The transpose of `_Symmetric`: what stands at (i, j) and (j, i) added up."""

    @staticmethod
    def forward(ctx: Any, full: Tensor) -> Tensor:
        ctx.n = n = full.shape[-1]
        i, j = torch.triu_indices(n, n, device=full.device)
        full = full.reshape(-1, n * n)
        folded = full.index_select(1, i * n + j)
        folded += full.index_select(1, j * n + i) * (i != j)
        return folded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Symmetric.apply(gradient, ctx.n)
