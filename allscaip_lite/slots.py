"""Flat lists and padded tables: where each state stands when attention reads it.

In: the flat list (M, H) of the graph's states, or (N, H) of its atoms. Out: tables with one row an
atom (its edges) or one row a system (its atoms), and back. Bookkeeping only, no physics.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


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


@dataclass(frozen=True)
class Layout:
    """The graph's slots as one attention reads them: source or destination.

    slot (M,): the slot of each state. occupant (N·K,): the state in each slot; an empty slot names
    any. occupied (N, K) bool.
    """

    slot: Tensor
    occupant: Tensor
    occupied: Tensor

    @classmethod
    def make(cls, slot: Tensor, occupied: Tensor) -> Layout:
        occupant = slot.new_zeros(occupied.numel())
        occupant[slot] = torch.arange(len(slot), device=slot.device)
        return cls(slot, occupant, occupied)


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
