"""Who is near whom, and how far: pairs of atoms, periodic images, distances.

In: `Structures`. Out: the pairs that may become edges (found without gradient), and differentiable
vectors and distances. Small molecules try all pairs at once; everything else goes through vesin's
cell list, which is O(N).
"""

from __future__ import annotations

import numpy as np
import torch
import vesin
from ase.geometry import complete_cell, minkowski_reduce
from ase.symbols import Symbols
from torch import Tensor

from allscaip_lite.errors import COINCIDENT, StructureError
from allscaip_lite.structures import Structures

DENSE_SEARCH_ATOMS = 400  # below this, all pairs of a molecule are tried at once
MAX_PAIRS = 3e7  # of a system; some 10 GB
MAX_CELLS = 1e5  # of the cell list, which divides by zero in long boxes of more
SKEWED = 0.1  # distance of two faces over the length of the lattice vector between them
TIE = 1e-5  # Å; distances that differ by less count as equal


@torch.no_grad()
def candidate_pairs(structures: Structures, reach: float) -> tuple[Tensor, Tensor, Tensor]:
    """Every pair of atoms, each once, whose distance is below `reach` Å.

    Returns first (P,), second (P,) and shift (P, 3), the image of the second atom in units of
    the lattice vectors. Atoms of different systems never pair. Raises `StructureError` where two
    atoms coincide.
    """
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    offset = 0
    device = structures.positions.device
    structures = structures.to("cpu")  # a GPU would wait for the next order most of the time
    periodic = structures.pbc.any(1).tolist()
    for index, natoms in enumerate(structures.natoms.tolist()):
        positions = structures.positions[offset : offset + natoms]
        try:
            if periodic[index] or natoms > DENSE_SEARCH_ATOMS:
                cell, pbc = structures.cell[index], structures.pbc[index]
                first, second, shift = _search_cells(positions, cell, pbc, reach)
            else:
                first, second, shift = _search_all(positions, reach)
        except StructureError as error:
            if len(periodic) == 1:
                raise
            numbers = structures.atomic_numbers[offset : offset + natoms].cpu().numpy()
            formula = Symbols(numbers).get_chemical_formula()
            raise StructureError(f"system {index} of a batch ({formula}): {error}") from error
        found.append((first + offset, second + offset, shift))
        offset += natoms
    first, second, shift = (torch.cat(parts).to(device) for parts in zip(*found, strict=True))
    return first, second, shift


def _search_all(positions: Tensor, reach: float) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of a molecule within `reach`, out of all pairs."""
    first, second = torch.triu_indices(len(positions), len(positions), 1)
    squared = (positions[second] - positions[first]).square().sum(1)
    near = squared < reach * reach
    first, second, squared = first[near], second[near], squared[near]
    if len(squared) and bool(squared.min() < COINCIDENT**2):
        _raise_coincident(first, second, int(squared.argmin()))
    return first, second, first.new_zeros(len(first), 3)


def _search_cells(
    positions: Tensor, cell: Tensor, pbc: Tensor, reach: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs within `reach` by vesin's cell list: O(N), any cell, images beyond the first too.

    Between faces that are near each other it would look at very many images; a skewed lattice is
    reduced to one of shorter vectors.
    """
    whole = complete_cell((cell.double() * pbc.unsqueeze(1)).numpy())
    heights = 1 / np.linalg.norm(np.linalg.inv(whole), axis=0)  # between the faces
    if (heights < SKEWED * np.linalg.norm(whole, axis=1)).any():
        reduced, operation = minkowski_reduce(whole, pbc.numpy())
        first, second, shift = _search_cells(positions, torch.as_tensor(reduced), pbc, reach)
        return first, second, shift @ torch.as_tensor(operation).long()
    positions, cells, lattice, lengths = _without_gaps(positions, cell, pbc, 2 * reach)
    volume = float(lattice.det().abs() * torch.where(pbc, 1.0, lengths + 1).prod())
    if len(positions) ** 2 / volume * 2 * reach**3 > MAX_PAIRS:  # in half a sphere of 4π/3 R³
        raise StructureError(
            f"{len(positions)} atoms in a cell of {volume:.3g} Å³ have more neighbours within "
            f"{reach:.3g} Å than fit into memory: check the cell and its unit"
        )
    size = reach
    while float((lengths / size).floor().clamp(min=1).prod()) > MAX_CELLS:
        size *= 1.2
    first, second, shift, distance = vesin.NeighborList(cutoff=size, full_list=False).compute(
        points=positions.numpy(), box=lattice.numpy(), periodic=pbc.numpy(), quantities="ijSd"
    )
    near = distance < reach
    first, second, shift, distance = first[near], second[near], shift[near], distance[near]
    if len(distance) and distance.min() < COINCIDENT:
        _raise_coincident(first, second, int(distance.argmin()))
    first, second, shift = (
        torch.as_tensor(np.asarray(part).astype(np.int64)) for part in (first, second, shift)
    )
    return first, second, shift + cells[first] - cells[second]


def _without_gaps(
    positions: Tensor, cell: Tensor, pbc: Tensor, limit: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The structure in the cell, with gaps between its atoms of at most `limit` Å along each axis.

    Atoms nearer than `limit` stay as they are to each other. A cell list reaches over all space
    between the atoms, however empty it is.

    Returns:
        Positions (N, 3) Å; whole lattice vectors (N, 3) that were taken off them; the lattice
        (3, 3) Å; and lengths (3,) Å of the box along the normals of its faces.
    """
    lattice = torch.as_tensor(complete_cell((cell.double() * pbc.unsqueeze(1)).numpy()))
    inverse = lattice.inverse()
    heights = 1 / inverse.norm(dim=0)  # between the planes of the lattice
    place = positions.double() @ inverse
    cells = place.floor() * pbc
    ordered, order = ((place - cells) * heights).sort(dim=0)  # Å
    through = heights - (ordered[-1] - ordered[0])  # the gap through the faces of the cell
    excess = (ordered.diff(dim=0) - limit).clamp(min=0).cumsum(0)  # (N - 1, 3)
    ordered[1:] -= excess
    ordered = ordered - ordered[0]
    place = torch.empty_like(place).scatter(0, order, ordered)
    lengths = ordered[-1] + torch.where(pbc, through.clamp(max=limit), 0.0)
    scaled = lattice * torch.where(pbc, lengths / heights, 1.0).unsqueeze(1)
    return (place / heights) @ lattice, cells.long(), scaled, lengths


def _raise_coincident(first: Tensor, second: Tensor, index: int) -> None:
    raise StructureError(
        f"atoms {int(first[index])} and {int(second[index])} stand on one spot: "
        "move one of them, or remove the duplicate"
    )


def reduced_cell(cell: Tensor, pbc: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The Minkowski-reduced lattice (3, 3) Å of a cell, and the whole numbers that make it of that.

    Lattice vectors that are not periodic give way to normals of the others, or a tilted one would
    lead to the wrong image.
    """
    whole = complete_cell((cell.detach().double() * pbc.unsqueeze(1)).cpu().numpy())
    reduced, operation = minkowski_reduce(whole, pbc.cpu().numpy())
    return np.asarray(reduced), operation


def reduced_cells(structures: Structures) -> tuple[Tensor, Tensor, Tensor]:
    """`reduced_cell` of each system, its inverse, and the whole numbers, (B, 3, 3) in float64 on
    the CPU; unit matrices of systems that are not periodic.
    """
    lattice, operation = np.tile(np.eye(3), (2, len(structures), 1, 1))
    for index in structures.pbc.any(1).nonzero().flatten().tolist():
        cell, pbc = structures.cell[index], structures.pbc[index]
        lattice[index], operation[index] = reduced_cell(cell, pbc)
    inverse = np.linalg.inv(lattice)
    return torch.from_numpy(lattice), torch.from_numpy(inverse), torch.from_numpy(operation)


@torch.no_grad()
def nearest_images(
    positions: Tensor, cell: Tensor, pbc: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Which image of atom j is nearest to atom i, and which others are equally near.

    Exact for any cell: in the Minkowski-reduced cell the nearest image of a wrapped difference
    is among the 27 around it, and it is the difference itself where the lattice is orthogonal or
    the difference shorter than half of every lattice vector.

    Args:
        positions: (N, 3) Å.
        cell: (3, 3) Å, rows are lattice vectors.
        pbc: (3,) bool.

    Returns:
        Shifts (N, N, 3) in whole lattice vectors; and i (T,), j (T,), shift (T, 3) of the further
        images whose distance is the same within `TIE`.
    """
    parts = reduced_cell(cell, pbc)
    reduced, operation = (torch.as_tensor(part, device=cell.device).double() for part in parts)
    difference = positions.double().unsqueeze(0) - positions.double().unsqueeze(1)  # (N, N, 3)
    place = difference @ torch.linalg.inv(reduced)
    shift = -place.round() * pbc  # (N, N, 3)
    products = reduced @ reduced.T
    lengths = products.diagonal()  # squared
    if bool((products - lengths.diag()).abs().max() > 1e-12 * lengths.max()):
        wrapped = difference + shift @ reduced
        far = wrapped.square().sum(-1).sqrt() > lengths[pbc].min().sqrt() / 2 - TIE
    else:
        margin = (0.5 - (place + shift).abs()) * lengths.sqrt()  # Å
        far = ((margin < TIE) & pbc).any(-1)
    rows, columns = far.nonzero(as_tuple=True)  # (Q,)
    along = [torch.arange(-1, 2) if flag else torch.arange(1) for flag in pbc.tolist()]
    steps = torch.cartesian_prod(*along).to(reduced)  # (27, 3)
    images = (difference[far] + shift[far] @ reduced) + (steps @ reduced).unsqueeze(1)  # (27, Q, 3)
    distances = images.square().sum(-1).sqrt()  # (27, Q)
    nearest = distances.argmin(0)
    tied = distances < distances.gather(0, nearest.unsqueeze(0)) + TIE
    tied[nearest, torch.arange(len(nearest), device=tied.device)] = False
    step, pair = tied.nonzero(as_tuple=True)  # (T,)
    others = (shift[far][pair] + steps[step]) @ operation
    shift[far] += steps[nearest]
    return shift @ operation, (rows[pair], columns[pair], others)


def pair_vectors(structures: Structures, first: Tensor, second: Tensor, shift: Tensor) -> Tensor:
    """(P, 3) Å from atom `first` to the image `shift` of atom `second`; differentiable."""
    positions = structures.positions
    # gather rather than indexing: its backward adds up fast and in a fixed order
    vectors = positions.gather(0, second.unsqueeze(1).expand(-1, 3)) - positions.gather(
        0, first.unsqueeze(1).expand(-1, 3)
    )
    if structures.periodic:
        cell = structures.cell.index_select(0, structures.system.gather(0, first))  # (P, 3, 3)
        vectors = vectors + (shift.to(cell.dtype).unsqueeze(2) * cell).sum(1)
    return vectors


def safe_norm(vectors: Tensor) -> Tensor:
    """Length over the last dimension; a zero vector has length 0 and gradient 0."""
    squared = (vectors * vectors).sum(-1)
    zero = squared == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, squared).sqrt())


def system_distances(structures: Structures, positions: Tensor) -> Tensor:
    """(B, n, 3) padded positions → (B, n, n) Å between nearest images; differentiable.

    Where several images are equally near, as in a perfect crystal, the distance is their mean: the
    value is the same, and the force does not pull to one side.
    """
    vectors = positions.unsqueeze(1) - positions.unsqueeze(2)  # (B, n, n, 3)
    if not structures.periodic:
        return safe_norm(vectors)
    shift, ties = torch.zeros_like(vectors), []
    for index in structures.pbc.any(1).nonzero().flatten().tolist():
        size = int(structures.natoms[index])
        shift[index, :size, :size], (i, j, others) = nearest_images(
            positions[index, :size].detach(), structures.cell[index].detach(), structures.pbc[index]
        )
        ties.append((torch.full_like(i, index), i, j, others.to(vectors.dtype)))
    moved = torch.einsum("bijs,bsx->bijx", shift, structures.cell)
    distances = safe_norm(vectors + moved)
    system, i, j, others = (torch.cat(parts) for parts in zip(*ties, strict=True))
    if not len(system):
        return distances
    moved = torch.einsum("ts,tsx->tx", others, structures.cell[system])
    equally_near = safe_norm(vectors[system, i, j] + moved)  # (T,)
    place, ones = (system, i, j), torch.ones_like(equally_near)
    counts = torch.ones_like(distances).index_put(place, ones, accumulate=True)
    return distances.index_put(place, equally_near, accumulate=True) / counts


def places_in_rows(rows: Tensor, value: Tensor, n: int) -> Tensor:
    """(2P,) place of each entry within its row, from 1, in the order of the value of its pair.

    value (P,): below 2; envelopes, or distances over the longest.
    """
    order = (rows + value.detach().double().repeat(2) / 2).argsort(stable=True)
    ones = torch.ones_like(rows)
    counts = rows.new_zeros(n).index_add(0, rows, ones)  # bincount would ask a GPU for its size
    starts = counts.cumsum(0) - counts
    return torch.empty_like(rows).scatter(0, order, ones.cumsum(0) - starts[rows[order]])
