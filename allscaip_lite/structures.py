"""Atoms in, tensors out: a batch of structures as the model reads it.

In: `ase.Atoms`. Out: `Structures`, plain tensors, checked before any number is computed.
Charge and spin multiplicity are what `electrons` reads from `atoms.info`.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols
from torch import Tensor

from allscaip_lite.electrons import Assumptions, charge_and_spin, say_assumptions
from allscaip_lite.errors import StructureError, StructureWarning

LARGEST_SPREAD = 3e4  # Å; float32 rounds a position there by 0.001 Å
LONG = 100.0  # Å; up to there float32 rounds a position by less than 1e-5 Å
THINNEST = 0.02  # Å, of a cell
CONTACT = 2.0  # sums of covalent radii, between atoms that touch; an H bond has 1.9
TIGHT = 1.0  # Å³ an atom; no matter is denser
FARTHEST = 1e9  # Å from the origin; beyond, float64 itself rounds a position by 1e-7 Å and more


P = ParamSpec("P")
Answer = TypeVar("Answer")


def in_own_numbers(compute: Callable[P, Answer]) -> Callable[P, Answer]:
    """Let a function see neither the caller's autocast nor the caller's default device.

    In autocast's 8 bits of precision a total energy is off by 0.1 eV and more; structures are read
    and neighbours found on the CPU, wherever the model computes.
    """

    @functools.wraps(compute)
    def computed(*args: P.args, **named: P.kwargs) -> Answer:
        with ExitStack() as modes:
            if torch.get_default_device().type != "cpu":
                modes.enter_context(torch.device("cpu"))
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    modes.enter_context(torch.autocast(kind, enabled=False))
            return compute(*args, **named)

    return computed


@dataclass(frozen=True)
class Structures:
    """A batch of B systems with N atoms in all, one after the other.

    positions (N, 3) Å; atomic_numbers (N,); cell (B, 3, 3) Å, rows are lattice vectors;
    pbc (B, 3) bool; charge (B,) in e; spin (B,) multiplicity 2S + 1; natoms (B,).
    periodic: whether anything in the batch is; read off `pbc` where it is not given, and kept, so
    that nobody has to ask a GPU for it.
    """

    positions: Tensor
    atomic_numbers: Tensor
    cell: Tensor
    pbc: Tensor
    charge: Tensor
    spin: Tensor
    natoms: Tensor
    periodic: bool | None = None

    def __post_init__(self) -> None:
        if self.periodic is None:
            object.__setattr__(self, "periodic", bool(self.pbc.any()))

    def __len__(self) -> int:
        return len(self.natoms)

    @property
    def system(self) -> Tensor:
        """(N,) which system each atom belongs to."""
        systems = torch.arange(len(self), device=self.natoms.device)
        # the size is said, or a GPU would have to be asked for it
        return systems.repeat_interleave(self.natoms, output_size=len(self.atomic_numbers))

    @property
    def volume(self) -> Tensor:
        """(B,) Å³; 0 where there is no cell."""
        first, second, third = self.cell.unbind(1)
        return (torch.linalg.cross(first, second) * third).sum(1).abs()

    def replace(self, **changes: Any) -> Structures:
        """The same batch with some tensors changed."""
        return replace(self, **changes)

    def centered(self) -> Structures:
        """The same systems near the origin, where float32 rounds least.

        Along a direction that is not periodic the mean moves to 0. Along a periodic one an atom
        that is more than a cell away from the cell moves by whole lattice vectors; one that just
        left the cell stays, so that a list of near pairs keeps its images. In cells above `LONG`
        atoms stay together beside the widest gap, and their mean moves to 0.
        """
        periodic = self.pbc.any(1)
        unit = torch.eye(3, dtype=self.cell.dtype, device=self.cell.device)
        lattice = torch.where(periodic[:, None, None], self.cell, unit)  # (B, 3, 3)
        system, inverse = self.system, torch.linalg.inv_ex(lattice).inverse
        place = (self.positions.unsqueeze(1) @ inverse[system]).squeeze(1)  # (N, 3)
        total = place.new_zeros(len(self), 3).index_add(0, system, place)
        mean = (total / self.natoms.unsqueeze(1))[system]
        cells = torch.where((place - 0.5).abs() > 1.5, place.floor(), 0.0)
        long = self.pbc & (torch.linalg.vector_norm(lattice, dim=2) > LONG)
        for index, axis in long.nonzero().tolist():
            there = place[system == index, axis]
            ordered = (there - there.floor()).sort().values
            gaps = torch.cat([ordered, ordered[:1] + 1]).diff()
            widest = int(gaps.argmax())
            whole = (there - ordered[widest] - gaps[widest] / 2).floor()
            cells[system == index, axis] = whole + (there - whole).mean()
        moved = torch.where(self.pbc[system], cells, mean).unsqueeze(1) @ lattice[system]
        return self.replace(positions=self.positions - moved.squeeze(1))

    def strained(self, strain: Tensor) -> Structures:
        """Positions and cells under the symmetric part of a strain (B, 3, 3); differentiable."""
        symmetric = (strain + strain.transpose(1, 2)) / 2
        moved = self.positions.unsqueeze(1) @ symmetric[self.system]  # (N, 1, 3)
        return self.replace(
            positions=self.positions + moved.squeeze(1), cell=self.cell + self.cell @ symmetric
        )

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Structures:
        """On another device, or with another floating-point type for positions and cell."""
        moved = {
            name: value.to(device, dtype if value.is_floating_point() else None)
            for name, value in self.tensors().items()
        }
        return self.replace(**moved)

    def select(self, systems: Sequence[int]) -> Structures:
        """Some of the systems, by their indices, in that order."""
        rows = torch.as_tensor(systems, device=self.natoms.device)
        parts = torch.arange(len(self.atomic_numbers), device=rows.device).split(
            self.natoms.tolist()
        )
        atoms = torch.cat([parts[system] for system in systems])
        per_atom = {"positions", "atomic_numbers"}
        chosen = {
            name: value[atoms if name in per_atom else rows]
            for name, value in self.tensors().items()
        }
        return self.replace(periodic=None, **chosen)

    def each(self) -> Iterator[Structures]:
        """The systems one by one, without gradients, in float64 and on the CPU."""
        sizes, per_atom = self.natoms.tolist(), {"positions", "atomic_numbers"}
        parts = [
            value.detach().split(sizes if name in per_atom else 1)
            for name, value in self.to("cpu", torch.float64).tensors().items()
        ]
        yield from itertools.starmap(Structures, zip(*parts, strict=True))

    def clone(self) -> Structures:
        """The same batch in tensors of its own."""
        return self.replace(**{name: value.clone() for name, value in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the batch, by name."""
        names = [field.name for field in fields(self) if field.name != "periodic"]
        return {name: getattr(self, name) for name in names}


@in_own_numbers
def structures_from_atoms(
    atoms: Atoms | Sequence[Atoms],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    max_num_elements: int = 100,
    assumed: Assumptions | None = None,
) -> Structures:
    """Check structures and turn them into one batch.

    Positions and cell keep ASE's float64 until they are cast to `dtype`, after `centered`.

    Args:
        atoms: one structure, or several.
        dtype: of positions and cell.
        device: of all tensors.
        max_num_elements: atomic numbers below this are in the model's table.
        assumed: where a charge or multiplicity that had to be assumed is noted; by default a
            warning says so.

    Raises:
        StructureError: for what the model cannot answer for.
        TypeError: for what is no `ase.Atoms`.
    """
    batch = listed(atoms)
    cells, charges, spins = [], [], []
    noted: Assumptions = {} if assumed is None else assumed
    for index, system in enumerate(batch):
        where = _Place(index, system)
        charge, spin = check_structure(system, where, max_num_elements, noted)
        charges.append(charge)
        spins.append(spin)
        cells.append(system.cell.complete().array if system.pbc.any() else system.cell.array)
    if assumed is None:
        say_assumptions(noted)
    structures = Structures(
        positions=torch.as_tensor(
            np.concatenate([a.positions for a in batch]), dtype=torch.float64
        ),
        atomic_numbers=torch.as_tensor(np.concatenate([a.numbers for a in batch]).astype(np.int64)),
        cell=torch.as_tensor(np.stack(cells), dtype=torch.float64),
        pbc=torch.as_tensor(np.stack([a.pbc for a in batch])),
        charge=torch.tensor(charges),
        spin=torch.tensor(spins),
        natoms=torch.tensor([len(a) for a in batch]),
    )
    return structures.centered().to(device, dtype)


def say_cells_not_used(batch: Sequence[Atoms], said: set[str]) -> None:
    """Warn of structures that are not periodic and have a cell that they fill, once a formula.

    Molecules often have a cell with vacuum in it; a crystal or a liquid whose `pbc` was forgotten
    touches its own images there. Formulas in `said` are left out; new ones are added to it.
    """
    for atoms in batch:
        volume = 0.0 if atoms.pbc.any() or atoms.cell.rank < 3 else atoms.cell.volume
        case = f"{atoms.get_chemical_formula()}: its cell" if volume > len(atoms) * TIGHT else None
        if case is None or case in said:
            continue
        said.add(case)
        from ase.neighborlist import natural_cutoffs, neighbor_list  # loads SciPy, for few

        filled = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=True)
        if neighbor_list("S", filled, natural_cutoffs(filled, mult=CONTACT)).any():
            warnings.warn(
                f"{case} is so full that it would touch its own images, but it is not periodic, "
                "and is taken as a molecule alone: for a crystal or a liquid set atoms.pbc = True",
                StructureWarning,
                stacklevel=3,
            )


def listed(atoms: Atoms | Iterable[Atoms]) -> list[Atoms]:
    """One structure, or several, as a list.

    Raises TypeError for what is no `ase.Atoms`, `StructureError` for an empty list.
    """
    if isinstance(atoms, Atoms):
        return [atoms]
    if isinstance(atoms, (str, Path)) or not isinstance(atoms, Iterable):
        raise TypeError(
            f"give an ase.Atoms or a list of them, such as ase.io.read(file), not {atoms!r:.80}"
        )
    batch = list(atoms)
    for index, system in enumerate(batch):
        if not isinstance(system, Atoms):
            raise TypeError(f"structure {index} is a {type(system).__name__}, not an ase.Atoms")
    if not batch:
        raise StructureError("no structures: give one ase.Atoms or a non-empty list of them")
    return batch


@dataclass(frozen=True)
class _Place:
    """What messages call a structure; put into words only where there is one, thousands are not."""

    index: int
    system: Atoms

    def __str__(self) -> str:
        numbers = self.system.numbers
        known = np.isin(numbers, range(len(chemical_symbols))).all()
        formula = f" ({self.system.get_chemical_formula()})" if known else ""
        return f"structure {self.index}{formula}"


def check_masses(atoms: Atoms) -> None:
    """Raise `StructureError` for masses of which no atom can move."""
    masses = atoms.get_masses()
    if (bad := np.flatnonzero(~((masses > 0) & np.isfinite(masses)))).size:
        raise StructureError(
            f"{atoms.symbols}: masses of atoms {bad[:5].tolist()} are {masses[bad[:5]].tolist()}: "
            "give numbers above 0, or atoms.set_masses('defaults')"
        )


def check_structure(
    atoms: Atoms, where: object, max_num_elements: int = 100, assumed: Assumptions | None = None
) -> tuple[int, int]:
    """Charge and multiplicity of a structure; `StructureError`, which calls it `where`, for what
    `structures_from_atoms` refuses.
    """
    if len(atoms) == 0:
        raise StructureError(f"{where} has no atoms")
    outside = sorted({z for z in atoms.numbers.tolist() if not 0 < z < max_num_elements or z % 1})
    if outside:
        known = range(len(chemical_symbols))
        names = ", ".join(chemical_symbols[int(z)] if z in known else str(z) for z in outside)
        raise StructureError(
            f"{where}: {names} is outside this model's table of elements, "
            f"H to {chemical_symbols[max_num_elements - 1]}"
        )
    if not np.isfinite(atoms.positions).all():
        bad = np.flatnonzero(~np.isfinite(atoms.positions).all(1))
        raise StructureError(f"{where}: positions of atoms {bad[:5].tolist()} are not finite")
    if np.abs(atoms.positions).max() > FARTHEST:
        raise StructureError(
            f"{where} is {np.abs(atoms.positions).max():.3g} Å from the origin, where numbers no "
            "longer tell its atoms apart: move it, or check the unit"
        )
    if atoms.pbc.any():
        if not np.isfinite(atoms.cell.array).all():
            raise StructureError(f"{where}: the cell is not finite")
        lengths, whole = atoms.cell.lengths(), atoms.cell.complete()
        heights = np.zeros(3)  # between opposite faces
        if whole.volume > 1e-9:
            heights = np.minimum(lengths, 1 / np.linalg.norm(np.linalg.inv(whole.array), axis=0))
        if heights[atoms.pbc].min() < THINNEST:
            raise StructureError(
                f"{where} is periodic along a lattice vector that is zero or flat: its cell is "
                f"{heights[atoms.pbc].min():.2g} Å thin"
            )
        spread = lengths[atoms.pbc].max()
    else:
        spread = np.ptp(atoms.positions, axis=0).max()
    if spread > LARGEST_SPREAD:
        raise StructureError(
            f"{where} is {spread:.3g} Å long, and the model's numbers tell positions apart up to "
            f"{LARGEST_SPREAD:g} Å: check the unit, or compute parts that are apart one by one"
        )
    return charge_and_spin(atoms, where, assumed=assumed)
