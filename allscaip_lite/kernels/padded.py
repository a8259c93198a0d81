"""The model on tensors whose sizes never change, for GPUs.

In: a batch padded to a `Size`, with a list of pairs of atoms that are near each other, or soon may
be. Out: what `AllScAIP.forward` gives. The model itself asks the device how many edges there are, a
dozen times a step; here nothing is asked, what does not exist is masked, and so a GPU can record a
step once (see `cuda_graphs`) and repeat it without waiting for Python. The graph comes from the
functions of `graph`; only the choice of slots is another one.

The table of slots has N rows of K, and as many states stand in it: the N atoms, the edges, and in
place of edges that do not exist pairs that the envelope lets nobody see.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from allscaip_lite.attention import SystemTable
from allscaip_lite.config import AllScAIPConfig
from allscaip_lite.errors import KernelError
from allscaip_lite.graph import (
    ABSENT,
    EXTRA_CANDIDATES,
    Graph,
    in_slots,
    log_envelope,
    pair_envelopes,
)
from allscaip_lite.model import AllScAIP, Geometry, Prediction
from allscaip_lite.neighbors import TIE, pair_vectors, places_in_rows, reduced_cells, safe_norm
from allscaip_lite.operations import Operations
from allscaip_lite.structures import Structures


@dataclass(frozen=True)
class Size:
    """atoms, systems: of a batch, padding included. longest: atoms of the largest system.

    pairs: of the list of near atoms. slots: edges of an atom, its self-edge included.
    """

    atoms: int
    systems: int
    longest: int
    pairs: int
    slots: int


@dataclass(frozen=True)
class PaddedBatch:
    """A batch of one `Size`: B systems with N atoms, P pairs, padding included.

    first, second (P,) and shift (P, 3): the pairs, as from `candidate_pairs`; present (P,) bool.
    reduced, inverse, operation (B, 3, 3): the Minkowski-reduced cells, their inverses, and what
    makes them of the cells; (0, 3, 3) where nothing is periodic. real_systems (B,) and real_atoms
    (N,) bool: what is no padding.
    """

    structures: Structures
    first: Tensor
    second: Tensor
    shift: Tensor
    present: Tensor
    reduced: Tensor
    inverse: Tensor
    operation: Tensor
    real_systems: Tensor
    real_atoms: Tensor

    def tensors(self) -> list[Tensor]:
        """All of it, in a fixed order; the inverse of `like`."""
        inner = list(self.structures.tensors().values())
        return inner + [getattr(self, field.name) for field in fields(self)[1:]]

    def like(self, tensors: list[Tensor]) -> PaddedBatch:
        """Another batch of the same size, from its tensors."""
        names = list(self.structures.tensors())
        structures = self.structures.replace(**dict(zip(names, tensors, strict=False)))
        return PaddedBatch(structures, *tensors[len(names) :])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> PaddedBatch:
        """On another device, or with another floating-point type."""
        return self.like(
            [
                tensor.to(device, dtype if tensor.is_floating_point() else None, non_blocking=True)
                for tensor in self.tensors()
            ]
        )


def pad(structures: Structures, pairs: tuple[Tensor, Tensor, Tensor], size: Size) -> PaddedBatch:
    """A batch on a CPU brought to a size; `pairs` from `candidate_pairs`.

    Padding atoms are hydrogen, each without neighbours, in systems of their own; what is then left
    of the systems has no atoms. Raises `KernelError` where the batch does not fit or is periodic
    in some directions only.
    """
    n, batch = len(structures.positions), len(structures)
    first, second, shift = pairs
    missing, rows = size.atoms - n, size.systems - batch
    fits = min(missing, rows, size.pairs - len(first)) >= 0
    if not fits or int(structures.natoms.max()) > size.longest:
        raise KernelError(f"{n} atoms in {batch} systems, {len(first)} pairs, exceed {size}")
    if rows * size.longest < missing:
        raise KernelError(f"no systems are left for {missing} padding atoms: {size}")
    natoms = (missing - torch.arange(rows) * size.longest).clamp(0, size.longest)
    apart = torch.arange(missing, dtype=structures.positions.dtype) * 10
    periodic = structures.pbc.all(1)
    if bool((structures.pbc.any(1) != periodic).any()):
        raise KernelError("a structure is periodic in some directions, but not in all")

    def more(tensor: Tensor, count: int, value: float = 0) -> Tensor:
        return torch.cat([tensor, tensor.new_full((count, *tensor.shape[1:]), value)])

    padding = torch.stack([apart, apart * 0, apart * 0], dim=1)
    unused = size.pairs - len(first)
    return PaddedBatch(
        structures=Structures(
            positions=torch.cat([structures.positions, padding]),
            atomic_numbers=more(structures.atomic_numbers, missing, 1),
            cell=more(structures.cell, rows),
            pbc=more(structures.pbc, rows),
            charge=more(structures.charge, rows),
            spin=more(structures.spin, rows),
            natoms=torch.cat([structures.natoms, natoms]),
        ),
        first=more(first, unused),
        second=more(second, unused),
        shift=more(shift, unused),
        present=more(torch.ones_like(first, dtype=torch.bool), unused),
        **{
            name: more(part, rows if len(part) else 0)
            for name, part in lattices(structures).items()
        },
        real_systems=more(torch.ones(batch, dtype=torch.bool), rows),
        real_atoms=more(torch.ones(n, dtype=torch.bool), missing),
    )


def lattices(structures: Structures) -> dict[str, Tensor]:
    """`reduced`, `inverse` and `operation` of `PaddedBatch`, in the structures' number type."""
    parts = reduced_cells(structures)
    if not bool(structures.pbc.any()):
        parts = parts[0][:0], parts[1][:0], parts[2][:0]
    return dict(
        zip(
            ("reduced", "inverse", "operation"), (x.to(structures.cell) for x in parts), strict=True
        )
    )


def padded_graph(
    batch: PaddedBatch, config: AllScAIPConfig, slots: int, operations: Operations
) -> tuple[Graph, Tensor]:
    """What `build_graph` gives, with N·K states, and how many edges found no slot, a tensor.

    Where an edge found none the results are wrong: take more slots.
    """
    n, first, second, shift = (
        len(batch.structures.positions),
        batch.first,
        batch.second,
        batch.shift,
    )
    vectors = pair_vectors(batch.structures, first, second, shift)  # (P, 3)
    upwards = torch.eye(3, dtype=vectors.dtype, device=vectors.device)[1]
    vectors = torch.where(batch.present.unsqueeze(1), vectors, upwards)
    distances = safe_norm(vectors)
    near = batch.present & (distances < config.reach)
    width = min(config.k + EXTRA_CANDIDATES, len(first) + 1)
    envelope, alive = pair_envelopes(
        first, second, distances, near, n, config, operations.soft_rank, width
    )
    envelope = torch.where(alive, envelope, 0.5)

    # who keeps a place in the table of slots
    order = torch.where(alive, envelope.detach(), ABSENT)
    position = places_in_rows(torch.cat([first, second]), order, n).view(2, -1)
    overflow = alive.sum()
    alive = alive & (position < slots).all(0)
    overflow = overflow - alive.sum()
    count = min(len(first), n * (slots - 1) // 2)
    chosen = (~alive).to(torch.int8).argsort(stable=True)[:count]  # the edges that are there first
    alive, position, shift = alive[chosen], position[:, chosen], shift[chosen]
    first, second = first[chosen], second[chosen]
    vectors = torch.where(alive.unsqueeze(1), vectors[chosen], upwards)
    distances = safe_norm(vectors)
    directions = torch.where(alive.unsqueeze(1), vectors, 0.0) / distances.unsqueeze(1)
    pair_weight = torch.where(alive, log_envelope(envelope[chosen]), -torch.inf)

    # the others take the empty slots, two each
    edge_slot = torch.stack([first, second]) * slots + position  # (2, P')
    self_slot = torch.arange(n, device=first.device) * slots
    spare = n * slots  # an entry for what goes nowhere
    occupied = torch.zeros(spare + 1, dtype=torch.int8, device=first.device)
    occupied = occupied.scatter(0, torch.where(alive, edge_slot, spare).flatten(), 1)
    occupied = occupied.scatter(0, self_slot, 1)[:-1]
    empty = occupied.argsort(stable=True)
    rest = (torch.arange(count, device=first.device) - alive.sum()).clamp(min=0) * 2
    rest = torch.stack([rest, rest + 1]).clamp(max=spare - 1)
    edge_slot = torch.where(alive, edge_slot, empty[rest])

    pairs = (first, second, shift, distances, directions, pair_weight)
    graph = in_slots(pairs, edge_slot.flatten(), n, slots)
    return replace(graph, counts=torch.full_like(graph.counts, slots)), overflow


def padded_distances(batch: PaddedBatch, positions: Tensor) -> Tensor:
    """(B, n, 3) padded positions → (B, n, n) Å between nearest images: `system_distances`.

    At most eight images are equally near.
    """
    vectors = positions.unsqueeze(1) - positions.unsqueeze(2)  # (B, n, n, 3)
    if not batch.structures.periodic:
        return safe_norm(vectors)
    with torch.no_grad():
        periodic = batch.structures.pbc.all(1)[:, None, None, None]
        shift = -torch.einsum("bijx,bxs->bijs", vectors, batch.inverse).round()
        wrapped = vectors + torch.einsum("bijs,bsx->bijx", shift, batch.reduced)
        one = torch.arange(-1, 2, device=vectors.device, dtype=vectors.dtype)
        steps = torch.cartesian_prod(one, one, one)  # (27, 3)
        images = torch.einsum("qs,bsx->qbx", steps, batch.reduced)  # (27, B, 3)
        images = wrapped.unsqueeze(0) + images[:, :, None, None]  # (27, B, n, n, 3)
        near, index = images.square().sum(-1).sqrt().topk(8, dim=0, largest=False)
        tied = near < near[0] + TIE  # (8, B, n, n)
        shift = (shift + steps[index]) * periodic  # (8, B, n, n, 3)
        shift = torch.einsum("qbijs,bst->qbijt", shift, batch.operation)
    vectors = vectors + torch.einsum("qbijs,bsx->qbijx", shift, batch.structures.cell)
    return (safe_norm(vectors) * tied).sum(0) / tied.sum(0)


def padded_geometry(
    model: AllScAIP, batch: PaddedBatch, size: Size, operations: Operations
) -> tuple[Geometry, Tensor]:
    """What the blocks read, and how many edges found no slot."""
    structures, n = batch.structures, size.atoms
    graph, overflow = padded_graph(batch, model.config, size.slots, operations)
    device = graph.distances.device
    inside = torch.arange(size.longest, device=device)
    # of a system without atoms one empty slot is shown, or its attention would be 0/0
    real = inside < structures.natoms.clamp(min=1).unsqueeze(1)  # (B, longest)
    starts = structures.natoms.cumsum(0) - structures.natoms
    place = torch.arange(n, device=device) + (
        torch.arange(size.systems, device=device) * size.longest - starts
    ).gather(0, structures.system)
    systems = SystemTable(None if size.systems * size.longest == n else place, real)
    distances = None
    if model.config.rotary:
        spread = systems.spread(structures.positions).view(size.systems, size.longest, 3)
        distances = padded_distances(batch, spread)
    return model.geometry_of(graph, systems, distances, operations), overflow


def can_pad(config: AllScAIPConfig) -> bool:
    """Whether a model ranks neighbours in the way for which there is a padded form."""
    return config.soft_rank and config.truncated_rank and not config.max_neighbors


def padded_prediction(
    model: AllScAIP, batch: PaddedBatch, size: Size, create_graph: bool = False
) -> tuple[Prediction, Tensor]:
    """What `AllScAIP.forward` gives, padding included, and how many edges found no slot.

    Raises `KernelError` for a model that ranks neighbours by other than truncated soft ranks.
    """
    if not can_pad(model.config):
        raise KernelError(
            "the padded form is for soft_rank=True, truncated_rank=True and max_neighbors=None, "
            "and this model has others"
        )
    found = []

    def geometry(structures: Structures, operations: Operations) -> Geometry:
        moved = replace(batch, structures=structures)
        made, overflow = padded_geometry(model, moved, size, operations)
        found.append(overflow)
        return made

    return model(batch.structures, create_graph, geometry), *found
