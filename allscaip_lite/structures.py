"""Atoms in, tensors out: a batch of structures as the model reads it.

In: `ase.Atoms`. Out: `Structures`, plain tensors, checked before any number is computed.
Charge and spin multiplicity come from `atoms.info["charge"]` and `atoms.info["spin"]`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols
from torch import Tensor

MAX_CHARGE = 100  # the charge table has rows for -100 .. 100
MAX_MULTIPLICITY = 100

_warned_defaults = False


class StructureError(ValueError):
    """A structure the model cannot answer for; the message says what to change."""


@dataclass(frozen=True)
class Structures:
    """A batch of B systems with N atoms in all, one after the other.

    positions (N, 3) Å; atomic_numbers (N,); cell (B, 3, 3) Å, rows are lattice vectors;
    pbc (B, 3) bool; charge (B,) in e; spin (B,) multiplicity, 0 where not given; natoms (B,).
    """

    positions: Tensor
    atomic_numbers: Tensor
    cell: Tensor
    pbc: Tensor
    charge: Tensor
    spin: Tensor
    natoms: Tensor

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

    def replace(self, **changes: Tensor) -> Structures:
        return replace(self, **changes)

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
        moved = {}
        for field in fields(self):
            value = getattr(self, field.name)
            moved[field.name] = value.to(device, dtype if value.is_floating_point() else None)
        return Structures(**moved)


def structures_from_atoms(
    atoms: Atoms | Sequence[Atoms],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    max_num_elements: int = 100,
) -> Structures:
    """Check structures and turn them into one batch.

    Positions and cell keep ASE's float64 until they are cast to `dtype`; atoms are centred on
    their mean first where no direction is periodic, so that float32 loses nothing far from the
    origin. Raises `StructureError` for what the model cannot answer for.
    """
    batch = [atoms] if isinstance(atoms, Atoms) else list(atoms)
    if not batch:
        raise StructureError("no structures: give one ase.Atoms or a non-empty list of them")
    positions, cells, charges, spins = [], [], [], []
    for index, system in enumerate(batch):
        if not isinstance(system, Atoms):
            raise TypeError(f"structure {index} is a {type(system).__name__}, not an ase.Atoms")
        where = _Place(index, system)
        _check_geometry(system, where, max_num_elements)
        charge, spin = charge_and_spin(system, where)
        charges.append(charge)
        spins.append(spin)
        cells.append(system.cell.complete().array if system.pbc.any() else system.cell.array)
        center = 0.0 if system.pbc.any() else system.positions.mean(0)
        positions.append(system.positions - center)
    return Structures(
        positions=torch.as_tensor(np.concatenate(positions), dtype=dtype),
        atomic_numbers=torch.as_tensor(np.concatenate([a.numbers for a in batch])).long(),
        cell=torch.as_tensor(np.stack(cells), dtype=dtype),
        pbc=torch.as_tensor(np.stack([a.pbc for a in batch])),
        charge=torch.tensor(charges),
        spin=torch.tensor(spins),
        natoms=torch.tensor([len(a) for a in batch]),
    ).to(device)


@dataclass(frozen=True)
class _Place:
    """What messages call a structure; put into words only where there is one, thousands are not."""

    index: int
    system: Atoms

    def __str__(self) -> str:
        return f"structure {self.index} ({self.system.get_chemical_formula()})"


def charge_and_spin(atoms: Atoms, where: object = "the structure") -> tuple[int, int]:
    """Total charge in e and spin multiplicity 2S + 1 of a structure.

    From `atoms.info["charge"]` and `atoms.info["spin"]`. Where they are absent the structure is
    taken as neutral, in the lowest multiplicity its electrons allow; a warning says so once.
    Raises `StructureError` for a multiplicity that the number of electrons forbids.
    """
    global _warned_defaults
    charge = _whole_number(atoms.info.get("charge", 0), "charge", where)
    electrons = int(atoms.numbers.sum()) - charge
    lowest = 1 + electrons % 2
    spin = _whole_number(atoms.info.get("spin", lowest), "spin", where)
    if not _warned_defaults and not {"charge", "spin"} <= atoms.info.keys():
        _warned_defaults = True
        warnings.warn(
            'no atoms.info["charge"] or no atoms.info["spin"]: taking charge 0 and the lowest '
            f"multiplicity (here charge {charge:+d}, multiplicity {spin}). Said once.",
            stacklevel=3,
        )
    if abs(charge) > MAX_CHARGE:
        raise StructureError(f"{where}: charge {charge:+d} is outside ±{MAX_CHARGE}")
    if electrons < 0:
        raise StructureError(f"{where}: charge {charge:+d} leaves fewer than no electrons")
    if not 0 <= spin <= MAX_MULTIPLICITY:
        raise StructureError(f"{where}: multiplicity {spin} is outside 1 .. {MAX_MULTIPLICITY}")
    if spin and (spin % 2 == electrons % 2 or spin > electrons + 1):
        raise StructureError(
            f'{where}: atoms.info["spin"] = {spin} is the multiplicity 2S + 1, and {electrons} '
            f"electrons (charge {charge:+d}) do not allow it; the lowest they allow is {lowest}"
        )
    return charge, spin


def _whole_number(value: object, name: str, where: object) -> int:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = float("nan")
    if not number.is_integer():
        raise StructureError(f'{where}: atoms.info["{name}"] = {value!r} is not a whole number')
    return int(number)


def _check_geometry(atoms: Atoms, where: object, max_num_elements: int) -> None:
    if len(atoms) == 0:
        raise StructureError(f"{where} has no atoms")
    outside = sorted({int(z) for z in atoms.numbers if not 0 < z < max_num_elements})
    if outside:
        known = len(chemical_symbols)
        names = ", ".join(chemical_symbols[z] if 0 < z < known else str(z) for z in outside)
        raise StructureError(
            f"{where}: {names} is outside this model's table of elements, "
            f"H to {chemical_symbols[max_num_elements - 1]}"
        )
    if not np.isfinite(atoms.positions).all():
        bad = np.flatnonzero(~np.isfinite(atoms.positions).all(1))
        raise StructureError(f"{where}: positions of atoms {bad[:5].tolist()} are not finite")
    if atoms.pbc.any():
        if not np.isfinite(atoms.cell.array).all():
            raise StructureError(f"{where}: the cell is not finite")
        if (atoms.cell.lengths()[atoms.pbc] < 1e-6).any() or atoms.cell.complete().volume < 1e-6:
            raise StructureError(f"{where} is periodic along a lattice vector that is zero or flat")
