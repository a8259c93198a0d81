"""The same model on tensors whose sizes never change, for GPUs.

In: a batch brought to a `Size`, with a list of pairs of atoms that are near each other, or soon may
be. Out: what `AllScAIP.forward` gives. Its own way asks the device how many edges there are, a
dozen times a step; here nothing is asked, what does not exist is masked, and so a GPU can record
a step once (see `recorded`) and repeat it without waiting for Python. Tests hold the two equal.

The table of slots has N rows of K, and as many states stand in it: the N atoms, the edges, and in
place of edges that do not exist pairs that the envelope lets nobody see.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from ase.geometry import minkowski_reduce
from torch import Tensor

from allscaip_lite import encodings
from allscaip_lite.config import AllScAIPConfig
from allscaip_lite.graph import (
    EXTRA_CANDIDATES,
    Graph,
    in_slots,
    log_envelope,
    soft_maximum,
)
from allscaip_lite.kernels import fused
from allscaip_lite.kernels.slots import Layout, Run, SystemTable
from allscaip_lite.model import AllScAIP, Geometry, Prediction
from allscaip_lite.neighbors import pair_vectors, places_in_rows, safe_norm
from allscaip_lite.structures import Structures

ABSENT = 1.9  # stands behind every value of what is there, in `places_in_rows`


class FixedSizeError(ValueError):
    """A model or batch that has no form of fixed size; the message says why."""


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
class Fixed:
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

    @property
    def periodic(self) -> bool:
        """Whether anything in it is."""
        return len(self.reduced) > 0

    def tensors(self) -> list[Tensor]:
        """All of it, in a fixed order; the inverse of `like`."""
        inner = [getattr(self.structures, field.name) for field in fields(Structures)]
        return inner + [getattr(self, field.name) for field in fields(self)[1:]]

    def like(self, tensors: list[Tensor]) -> Fixed:
        """Another batch of the same size, from its tensors."""
        names = [field.name for field in fields(Structures)]
        structures = Structures(*tensors[: len(names)])
        return Fixed(structures, *tensors[len(names) :])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Fixed:
        """On another device, or with another floating-point type."""
        return self.like(
            [
                tensor.to(device, dtype if tensor.is_floating_point() else None, non_blocking=True)
                for tensor in self.tensors()
            ]
        )


def padded(structures: Structures, pairs: tuple[Tensor, Tensor, Tensor], size: Size) -> Fixed:
    """A batch on a CPU brought to a size; `pairs` from `candidate_pairs`.

    Padding atoms are hydrogen, each without neighbours, in systems of their own; what is then left
    of the systems has no atoms. Raises `FixedSizeError` where the batch does not fit or is periodic
    in some directions only.
    """
    n, batch = len(structures.positions), len(structures)
    first, second, shift = pairs
    missing, rows = size.atoms - n, size.systems - batch
    fits = min(missing, rows, size.pairs - len(first)) >= 0
    if not fits or int(structures.natoms.max()) > size.longest:
        raise FixedSizeError(f"{n} atoms in {batch} systems, {len(first)} pairs, exceed {size}")
    if rows * size.longest < missing:
        raise FixedSizeError(f"no systems are left for {missing} padding atoms: {size}")
    natoms = (missing - torch.arange(rows) * size.longest).clamp(0, size.longest)
    apart = torch.arange(missing, dtype=structures.positions.dtype) * 10
    periodic = structures.pbc.all(1)
    if bool((structures.pbc.any(1) != periodic).any()):
        raise FixedSizeError("a structure is periodic in some directions, but not in all")
    lattices = reduced_cells(structures)

    def more(tensor: Tensor, count: int, value: float = 0) -> Tensor:
        return torch.cat([tensor, tensor.new_full((count, *tensor.shape[1:]), value)])

    padding = torch.stack([apart, apart * 0, apart * 0], dim=1)
    unused = size.pairs - len(first)
    return Fixed(
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
        **{name: more(part, rows if len(part) else 0) for name, part in lattices.items()},
        real_systems=more(torch.ones(batch, dtype=torch.bool), rows),
        real_atoms=more(torch.ones(n, dtype=torch.bool), missing),
    )


def reduced_cells(structures: Structures) -> dict[str, Tensor]:
    """`reduced`, `inverse` and `operation` of `Fixed`; of molecules beside crystals, unit cells."""
    if not bool(structures.pbc.any()):
        nothing = structures.cell.new_zeros(0, 3, 3)
        return {"reduced": nothing, "inverse": nothing, "operation": nothing}
    reduced = np.tile(np.eye(3), (len(structures), 1, 1))
    operation = reduced.copy()
    cells = structures.cell.detach().double().cpu().numpy()
    for index in structures.pbc.any(1).nonzero().flatten().tolist():
        reduced[index], operation[index] = minkowski_reduce(cells[index])
    parts = {"reduced": reduced, "inverse": np.linalg.inv(reduced), "operation": operation}
    return {name: torch.as_tensor(part).to(structures.cell) for name, part in parts.items()}


def fixed_graph(fixed: Fixed, config: AllScAIPConfig, slots: int) -> tuple[Graph, Tensor]:
    """What `build_graph` gives, with N·K states, and how many edges found no slot, a tensor.

    Where an edge is lost the results are wrong: take more slots.
    """
    n, pairs = len(fixed.structures.positions), (fixed.first, fixed.second, fixed.shift)
    first, second, shift = pairs
    vectors = pair_vectors(fixed.structures, *pairs, fixed.periodic)  # (P, 3)
    upwards = torch.eye(3, dtype=vectors.dtype, device=vectors.device)[1]
    vectors = torch.where(fixed.present.unsqueeze(1), vectors, upwards)
    distances = safe_norm(vectors)
    near = fixed.present & (distances < config.reach)

    # the table of candidates, its last entry for those that are none
    width = config.k + EXTRA_CANDIDATES
    rows = torch.cat([first, second])  # (2P,)
    position = places_in_rows(rows, torch.where(near, distances.double() / config.reach, ABSENT), n)
    kept = (position < width) & near.repeat(2)
    listed = kept.view(2, -1).all(0)
    entry = torch.where(kept, rows * width + position, n * width)
    table = distances.new_full((n * width + 1,), torch.inf)
    value = torch.where(kept, distances.repeat(2), torch.inf)
    table = table.scatter(0, torch.arange(n, device=rows.device) * width, 0.0)
    table = table.scatter(0, entry, value)[:-1].view(n, width)
    rank = fused.soft_rank(table, config.rank_width).flatten()
    ranks = rank.gather(0, torch.where(listed.repeat(2), entry, 0)).view(2, -1)
    limits = torch.cat([ranks / config.k, distances.unsqueeze(0) / config.cutoff])
    envelope = soft_maximum(limits, config.envelope_temperature)
    alive = listed & (envelope < 1)
    envelope = torch.where(alive, envelope, 0.5)

    # who keeps a place in the table of slots
    order = torch.where(alive, envelope.detach(), ABSENT)
    position = places_in_rows(rows, order, n).view(2, -1)
    lost = alive.sum()
    alive = alive & (position < slots).all(0)
    lost = lost - alive.sum()
    count = min(len(first), n * (slots - 1) // 2)
    chosen = (~alive).to(torch.int8).argsort(stable=True)[:count]  # the living ones first
    alive, position, shift = alive[chosen], position[:, chosen], shift[chosen]
    first, second = first[chosen], second[chosen]
    vectors = torch.where(alive.unsqueeze(1), vectors[chosen], upwards)
    distances = safe_norm(vectors)
    directions = torch.where(alive.unsqueeze(1), vectors, 0.0) / distances.unsqueeze(1)
    pair_weight = torch.where(alive, log_envelope(envelope[chosen]), -torch.inf)

    # the others take the empty slots, two each
    edge_slot = torch.stack([first, second]) * slots + position  # (2, P')
    self_slot = torch.arange(n, device=rows.device) * slots
    spare = n * slots  # an entry for what goes nowhere
    occupied = torch.zeros(spare + 1, dtype=torch.int8, device=rows.device)
    occupied = occupied.scatter(0, torch.where(alive, edge_slot, spare).flatten(), 1)
    occupied = occupied.scatter(0, self_slot, 1)[:-1]
    empty = occupied.argsort(stable=True)
    rest = (torch.arange(count, device=rows.device) - alive.sum()).clamp(min=0) * 2
    rest = torch.stack([rest, rest + 1]).clamp(max=spare - 1)
    edge_slot = torch.where(alive, edge_slot, empty[rest])

    pairs = (first, second, shift, distances, directions, pair_weight)
    return in_slots(pairs, edge_slot.flatten(), n, slots), lost


def fixed_distances(fixed: Fixed, positions: Tensor) -> Tensor:
    """(B, n, 3) padded positions → (B, n, n) Å between nearest images: `system_distances`."""
    vectors = positions.unsqueeze(1) - positions.unsqueeze(2)  # (B, n, n, 3)
    if fixed.periodic:
        with torch.no_grad():
            periodic = fixed.structures.pbc.all(1)
            shift = -torch.einsum("bijx,bxs->bijs", vectors, fixed.inverse).round()
            wrapped = vectors + torch.einsum("bijs,bsx->bijx", shift, fixed.reduced)
            one = torch.arange(-1, 2, device=vectors.device, dtype=vectors.dtype)
            steps = torch.cartesian_prod(one, one, one)  # (27, 3)
            images = torch.einsum("qs,bsx->qbx", steps, fixed.reduced)  # (27, B, 3)
            images = wrapped.unsqueeze(0) + images[:, :, None, None]  # (27, B, n, n, 3)
            shift = shift + steps[images.square().sum(-1).argmin(0)]
            shift = torch.einsum("bijs,bst->bijt", shift, fixed.operation)
            shift = shift * periodic[:, None, None, None]
        vectors = vectors + torch.einsum("bijs,bsx->bijx", shift, fixed.structures.cell)
    return safe_norm(vectors)


def fixed_geometry(
    model: AllScAIP, fixed: Fixed, size: Size, once: bool
) -> tuple[Geometry, Tensor]:
    """What the blocks read, and how many edges found no slot; `once`: by the fused forms."""
    structures, config, n = fixed.structures, model.config, size.atoms
    graph, lost = fixed_graph(fixed, config, size.slots)
    occupied = graph.log_weight.isfinite()
    runs = [Run(slice(0, n), slice(0, n * size.slots), size.slots)]
    state = torch.arange(len(graph.source_slot), device=graph.source_slot.device)

    def layout(slot: Tensor) -> Layout:
        occupant = torch.zeros(n * size.slots, dtype=slot.dtype, device=slot.device)
        occupant = occupant.scatter(0, slot, state)
        full = occupied.flatten().to(graph.distances.dtype)
        return Layout(slot, occupied, slot, occupant, full, runs)

    inside = torch.arange(size.longest, device=state.device)
    # of a system without atoms one empty slot is shown, or its attention would be 0/0
    real = inside < structures.natoms.clamp(min=1).unsqueeze(1)  # (B, longest)
    starts = structures.natoms.cumsum(0) - structures.natoms
    place = torch.arange(n, device=state.device) + (
        torch.arange(size.systems, device=state.device) * size.longest - starts
    ).gather(0, structures.system)
    systems = SystemTable(None if size.systems * size.longest == n else place, real)
    distances = None
    if config.rotary:
        spread = systems.spread(structures.positions).view(size.systems, size.longest, 3)
        distances = fixed_distances(fixed, spread)
    lae = len(config.angular_channels or (0,)) - 1
    geometry = Geometry(
        graph=graph,
        legendre=encodings.slot_legendre(graph, lae) if lae else None,
        source=layout(graph.source_slot),
        destination=layout(graph.destination_slot),
        systems=systems,
        biases=model.biases(structures, systems, distances),
        fused=once,
        rows=None,
    )
    return geometry, lost


def has_fixed_size(config: AllScAIPConfig) -> bool:
    """Whether a model ranks neighbours in the way for which there is a form of fixed size."""
    return config.soft_rank and config.truncated_rank and not config.max_neighbors


def fixed_prediction(
    model: AllScAIP, fixed: Fixed, size: Size, create_graph: bool = False
) -> tuple[Prediction, Tensor]:
    """What `AllScAIP.forward` gives, padding included, and how many edges found no slot.

    Raises `FixedSizeError` for a model that ranks neighbours by other than truncated soft ranks.
    """
    if not has_fixed_size(model.config):
        raise FixedSizeError(
            "the form of fixed size is for soft_rank=True, truncated_rank=True and max_neighbors="
            "None, and this model has others"
        )
    found = []

    def features(structures: Structures, fused: bool) -> Tensor:
        moved = replace(fixed, structures=structures)
        geometry, lost = fixed_geometry(model, moved, size, once=fused)
        found.append(lost)
        return model.states(structures, geometry)

    prediction = model(fixed.structures, create_graph, features, fixed.periodic)
    return prediction, *found
