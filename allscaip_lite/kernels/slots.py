"""Flat lists and padded tables: where each state stands when attention reads it.

In: the flat list (M, H) of the graph's states, or (N, H) of its atoms. Out: tables with one row an
atom (its edges) or one row a system (its atoms), and back. Bookkeeping only, no physics.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from allscaip_lite.graph import SLOT_STEP, Graph
from allscaip_lite.structures import Structures


class Spread(torch.autograd.Function):
    """Rows of a flat list into the slots of a table, zeros elsewhere: (M, C) → (S, C).

    Its derivative is `Collect`, and the other way round, so both can be differentiated at will.
    Slots must differ from each other.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, slots: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(slots)
        return rows.new_zeros(size, rows.shape[1]).index_copy_(0, slots, rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (slots,) = ctx.saved_tensors
        return Collect.apply(gradient, slots), None, None


class Collect(torch.autograd.Function):
    """Chosen slots of a table as a flat list: (S, C) → (M, C). See `Spread`."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.size = table.shape[0]
        return table.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (slots,) = ctx.saved_tensors
        return Spread.apply(gradient.contiguous(), slots, ctx.size), None


class Run(NamedTuple):
    """Neighbouring rows that a kernel takes together: c rows of `width` slots each.

    rows: which of the N; slots: which of the packed slots, c·width of them.
    """

    rows: slice
    slots: slice
    width: int


@dataclass(frozen=True)
class Layout:
    """The graph's slots as one attention reads them: source or destination.

    slot (M,): the slot of each state among N·K. occupied (N, K) bool.

    The fused kernel leaves out most of the empty slots at the ends of the rows: it reads S packed
    slots, in runs. packed (M,): the packed slot of each state. occupant (S,): the state in each
    packed slot; an empty one names any. full (S,): 1 for occupied slots, 0 for empty ones.
    """

    slot: Tensor
    occupied: Tensor
    packed: Tensor
    occupant: Tensor
    full: Tensor
    runs: list[Run]

    @classmethod
    def make(cls, slot: Tensor, occupied: Tensor) -> Layout:
        n, num_slots = occupied.shape
        runs = make_runs(occupied.sum(1), num_slots)
        first = torch.cat(
            [
                torch.arange(run.slots.start, run.slots.stop, run.width, device=slot.device)
                for run in runs
            ]
        )  # (N,) the first packed slot of each row
        packed = first[slot // num_slots] + slot % num_slots
        occupant = slot.new_zeros(runs[-1].slots.stop)
        occupant[packed] = torch.arange(len(slot), device=slot.device)
        full = torch.zeros(len(occupant), device=slot.device)
        full[packed] = 1
        return cls(slot, occupied, packed, occupant, full, runs)


def by_count(structures: Structures, graph: Graph) -> tuple[Structures, Graph, Tensor]:
    """Atoms of each system renumbered, those with most edges first; and the old number of each.

    Rows of one length then stand together, so that `make_runs` leaves out more empty slots. A graph
    made of the renumbered structures would be this graph.
    """
    n, num_slots = graph.log_weight.shape
    order = (structures.system * (num_slots + 1) - graph.counts).argsort(stable=True)  # (N,)
    new = torch.empty_like(order)
    new[order] = torch.arange(n, device=order.device)

    def renumber(slot: Tensor) -> Tensor:
        moved = new[slot // num_slots] * num_slots + slot % num_slots
        return torch.cat([moved[order], moved[n:]])  # the self-edges stand in the atoms' order

    renumbered = replace(
        graph,
        source=new[graph.source],
        target=new[graph.target],
        log_weight=graph.log_weight[order],
        slot_directions=graph.slot_directions[order],
        source_slot=renumber(graph.source_slot),
        destination_slot=renumber(graph.destination_slot),
        counts=graph.counts[order],
    )
    structures = structures.replace(
        positions=structures.positions[order], atomic_numbers=structures.atomic_numbers[order]
    )
    return structures, renumbered, order


RUN_ENTRIES = 2**15  # c·width² of a run on a CPU: with four heads, 512 kB of cache for each matrix
FEWEST_ROWS = 12  # shorter runs cost more in calls than they save in empty slots


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
        return x if self.slot is None else Spread.apply(x, self.slot, self.real.numel())

    def collect(self, x: Tensor) -> Tensor:
        """(B·n, C) → (N, C)."""
        return x if self.slot is None else Collect.apply(x, self.slot)


@dataclass
class AttentionRecord:
    """Where a forward pass leaves its attention weights, a list entry a block, on request.

    source, destination (h, N, K, K); node (B, h, n, n). Only the plain formulas record.
    """

    source: list[Tensor] = field(default_factory=list)
    destination: list[Tensor] = field(default_factory=list)
    node: list[Tensor] = field(default_factory=list)
    geometry: Any = None  # the `Geometry` whose slots the weights belong to
