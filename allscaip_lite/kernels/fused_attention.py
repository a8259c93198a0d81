"""Neighbourhood attention and sums over pairs of edges in PyTorch, with derivatives by hand.

In and out: what the plain functions of the same names in `attention` take and give. Nothing is
copied that need not be, little is kept for the derivative, and most of the empty slots at the ends
of rows are left out. They can be differentiated once; training on forces takes the plain formulas.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from allscaip_lite import attention
from allscaip_lite.attention import Heads, Neighborhoods, SystemTable
from allscaip_lite.encodings import slot_legendre
from allscaip_lite.graph import SLOT_STEP, Graph

RUN_ENTRIES = 2**15  # c·width² of a run on a CPU: with four heads, 512 kB of cache for each matrix
FEWEST_ROWS = 12  # shorter runs cost more in calls than they save in empty slots


class Run(NamedTuple):
    """Neighbouring rows that a kernel takes together: c rows of `width` slots each.

    rows: which of the N; slots: which of the packed slots, c·width of them.
    """

    rows: slice
    slots: slice
    width: int


@dataclass(frozen=True)
class Packing:
    """Where the states of one layout stand in the S packed slots.

    packed (M,): the packed slot of each state. occupant (S,): the state in each packed slot; an
    empty one names any.
    """

    packed: Tensor
    occupant: Tensor


@dataclass(frozen=True)
class PackedNeighborhoods:
    """A graph whose rows are sorted by their number of edges and cut into runs of like length.

    order (N,): the atom of each sorted row. log_weight (N, K), directions (N, K, 3): sorted.
    full (S,): 1 for packed slots that hold an edge, 0 for the others.
    """

    graph: Graph
    degree: int
    order: Tensor
    log_weight: Tensor
    directions: Tensor
    full: Tensor
    source: Packing
    destination: Packing
    runs: list[Run]

    @classmethod
    def make(cls, graph: Graph, degree: int) -> PackedNeighborhoods:
        n, num_slots = graph.log_weight.shape
        device = graph.log_weight.device
        order = graph.counts.argsort(descending=True, stable=True)  # (N,)
        row = torch.empty_like(order).scatter(0, order, torch.arange(n, device=device))
        runs = make_runs(graph.counts[order], num_slots)
        starts = [
            torch.arange(run.slots.start, run.slots.stop, run.width, device=device) for run in runs
        ]
        start = torch.cat(starts)[row]  # (N,) the first packed slot of each atom's row
        size = runs[-1].slots.stop

        def pack(slot: Tensor) -> Packing:
            packed = start[slot // num_slots] + slot % num_slots
            states = torch.arange(len(slot), device=device)
            return Packing(packed, slot.new_zeros(size).scatter(0, packed, states))

        source = pack(graph.source_slot)
        occupied = graph.log_weight.isfinite().flatten()[graph.source_slot]  # (M,)
        full = graph.log_weight.detach().new_zeros(size)
        return cls(
            graph=graph,
            degree=degree,
            order=order,
            log_weight=graph.log_weight.index_select(0, order),
            directions=graph.slot_directions.index_select(0, order),
            full=full.scatter(0, source.packed, occupied.to(full.dtype)),
            source=source,
            destination=pack(graph.destination_slot),
            runs=runs,
        )

    @cached_property
    def plain(self) -> Neighborhoods:
        """What the plain formulas read."""
        return Neighborhoods.make(self.graph, self.degree)

    def legendre(self, degree: int) -> Tensor:
        """(degree, N, K, K): P_l(cos θ) between the edges of each sorted row."""
        if degree not in self._legendre:
            rows = {"log_weight": self.log_weight, "slot_directions": self.directions}
            self._legendre[degree] = slot_legendre(replace(self.graph, **rows), degree)
        return self._legendre[degree]

    @cached_property
    def _legendre(self) -> dict[int, Tensor]:
        return {}


def make_runs(counts: Tensor, num_slots: int) -> list[Run]:
    """Runs that cover rows of `counts` (N,) occupied slots in order; on a GPU a single one."""
    n = len(counts)
    if counts.device.type != "cpu":
        return [Run(slice(0, n), slice(0, n * num_slots), num_slots)]
    widths = [min(-(-count // SLOT_STEP) * SLOT_STEP, num_slots) for count in counts.tolist()]
    runs, start, offset = [], 0, 0
    while start < n:
        width, stop = widths[start], start + 1
        while stop < n:
            wider = max(width, widths[stop])
            long_enough = stop - start >= FEWEST_ROWS and n - stop >= FEWEST_ROWS
            narrower = long_enough and widths[stop] < width
            if narrower or (stop + 1 - start) * wider**2 > RUN_ENTRIES:
                break
            width, stop = wider, stop + 1
        end = offset + (stop - start) * width
        runs.append(Run(slice(start, stop), slice(offset, end), width))
        start, offset = stop, end
    return runs


def neighborhood_attention(
    qkv: Tensor, neighborhoods: PackedNeighborhoods, layout: str, heads: Heads
) -> tuple[Tensor, Tensor | None]:
    """`attention.neighborhood_attention`: (M, 3H) → (M, H); weights only with dropout."""
    if heads.dropout:
        return attention.neighborhood_attention(qkv, neighborhoods.plain, layout, heads)
    legendre = neighborhoods.legendre(len(heads.groups) - 1)
    packing = getattr(neighborhoods, layout)
    options = (packing, neighborhoods.full, neighborhoods.runs, heads.groups, heads.number)
    return _Attention.apply(qkv, neighborhoods.log_weight, legendre, *options), None


def self_edge_attention(
    q: Tensor, key_value: Tensor, neighborhoods: Any, layout: str, heads: Heads
) -> tuple[Tensor, Tensor | None]:
    """`attention.self_edge_attention`: q (N, H), k and v (M, 2H) → (N, H); any derivatives.

    A self-edge has no direction, so of the angular encoding the first group (l = 0) is left, and no
    table of slots is needed. `neighborhoods` of any kind that knows its graph.
    """
    if heads.dropout:
        plain = getattr(neighborhoods, "plain", neighborhoods)
        return attention.self_edge_attention(q, key_value, plain, layout, heads)
    log_weight, slot = neighborhoods.graph.log_weight, neighborhoods.graph.slot(layout)
    n, num_slots = log_weight.shape
    row = slot // num_slots  # (M,)
    q = q.unflatten(1, (heads.number, -1))  # (N, h, D)
    k, v = key_value.unflatten(1, (2, *q.shape[1:])).unbind(1)  # (M, h, D) each
    group = heads.groups[0]
    logits = (q[..., group].index_select(0, row) * k[..., group]).sum(-1) * q.shape[-1] ** -0.5
    table = logits.new_zeros(n * num_slots, heads.number).index_copy(0, slot, logits)  # (N·K, h)
    weights = (table.view(n, num_slots, -1) + log_weight.unsqueeze(2)).softmax(1)
    weights = weights.flatten(0, 1).index_select(0, slot)  # (M, h)
    mixed = torch.zeros_like(q).index_add(0, row, weights.unsqueeze(2) * v)  # (N, h, D)
    return mixed.flatten(1), None


def node_attention(
    qkv: Tensor, bias: Tensor | None, systems: SystemTable, num_heads: int, dropout: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """`attention.node_attention` by PyTorch's `scaled_dot_product_attention`, once differentiable.

    It takes a flash kernel where the device and the bias allow one, and gives no weights.
    """
    if dropout:
        return attention.node_attention(qkv, bias, systems, num_heads, dropout)
    q, k, v = systems.to_heads(qkv, num_heads)  # (B, h, n, D) each
    return systems.from_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=bias)), None


class _Attention(torch.autograd.Function):
    """One run of rows at a time, all heads together, so that their K × K matrices stay in the
    processor's cache. Queries of empty slots get zero weights, so what stands there never reaches a
    gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        log_weight: Tensor,
        legendre: Tensor,
        packing: Packing,
        full: Tensor,
        runs: list[Run],
        groups: list[slice],
        num_heads: int,
    ) -> Tensor:
        table = qkv.index_select(0, packing.occupant).view(len(packing.occupant), 3, num_heads, -1)
        mixed = table.new_empty(len(table), num_heads, table.shape[-1])  # (S, h, D)
        kept = []
        for run in runs:
            q, k, v = _by_head(table, run)  # (h·c, w, D) each
            q *= q.shape[-1] ** -0.5
            logits = _products(q, k, groups[0]).unflatten(0, (num_heads, -1))  # (h, c, w, w)
            for l, group in enumerate(groups[1:]):
                if group.stop > group.start:
                    products = _products(q, k, group).view_as(logits)
                    logits.addcmul_(_angles(legendre, l, run), products)
            logits += log_weight[run.rows, None, : run.width]
            weights = torch.softmax(logits, -1)
            weights *= full[run.slots].view(-1, run.width, 1)
            heads = torch.bmm(weights.flatten(0, 1), v).view(num_heads, -1, v.shape[-1])
            mixed[run.slots] = heads.transpose(0, 1)
            kept += [q, k, v, weights]
        ctx.save_for_backward(legendre, *kept)
        ctx.shape = log_weight.shape
        ctx.packing, ctx.runs, ctx.groups = packing, runs, groups
        return mixed.flatten(1).index_select(0, packing.packed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        legendre, *kept = ctx.saved_tensors
        packing, groups = ctx.packing, ctx.groups
        num_heads, head_size = kept[3].shape[0], kept[0].shape[-1]
        gradient = gradient.index_select(0, packing.occupant).view(-1, 1, num_heads, head_size)
        d_table = gradient.new_empty(len(gradient), 3, num_heads, head_size)
        d_log_weight = gradient.new_zeros(ctx.shape)
        d_legendre = torch.zeros_like(legendre) if ctx.needs_input_grad[2] else None
        for run in ctx.runs:
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
        d_qkv = d_table.flatten(1).index_select(0, packing.packed)
        return d_qkv, d_log_weight, d_legendre, None, None, None, None, None


def _by_head(table: Tensor, run: Run) -> Tensor:
    """The rows of one run from (S, p, h, D), a batch of matrices for each part: (p, h·c, w, D)."""
    _, parts, _, size = table.shape
    heads = table[run.slots].permute(1, 2, 0, 3)  # (p, h, c·w, D)
    return heads.reshape(parts, -1, run.width, size)


def _products(q: Tensor, k: Tensor, group: slice) -> Tensor:
    """q·k over one group of channels: (b, w, D) twice → (b, w, w)."""
    return torch.bmm(q[..., group], k[..., group].transpose(1, 2))


def _angles(legendre: Tensor, l: int, run: Run) -> Tensor:
    """(c, w, w) of (l, N, K, K), a view."""
    return legendre[l, run.rows, : run.width, : run.width]


def pair_sums(neighborhoods: PackedNeighborhoods, weights: Tensor, degree: int) -> Tensor:
    """`attention.pair_sums`: (N, K) → (N, degree)."""
    order, weights = neighborhoods.order, weights.index_select(0, neighborhoods.order)
    sums = _PairSums.apply(neighborhoods.directions, weights, degree, neighborhoods.runs)
    return torch.empty_like(sums).index_copy(0, order, sums)


class _PairSums(torch.autograd.Function):
    """A run of rows at a time and a degree after the other, for memory: three Legendre matrices.

    Slots without direction hold zero vectors.
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
