"""Atoms in, tensors out: a batch of structures as the model reads it.

In: `ase.Atoms`. Out: `Structures`, plain tensors, checked before any number is computed.
Charge and spin multiplicity come from `atoms.info["charge"]` and `atoms.info["spin"]`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols
from torch import Tensor

from allscaip_lite.errors import InputError

MAX_CHARGE = 100  # the charge table has rows for -100 .. 100
MAX_MULTIPLICITY = 100
# Names in `atoms.info` under which programs write the total charge and the multiplicity 2S + 1.
CHARGE_NAMES = ("charge", "total_charge", "Charge")
SPIN_NAMES = ("spin", "multiplicity", "spin_multiplicity", "mult")

_warned_defaults = False


class StructureError(InputError):
    """A structure the model cannot answer for; the message says what to change."""


@dataclass(frozen=True)
class Structures:
    """A batch of B systems with N atoms in all, one after the other.

    positions (N, 3) Å; atomic_numbers (N,); cell (B, 3, 3) Å, rows are lattice vectors;
    pbc (B, 3) bool; charge (B,) in e; spin (B,) multiplicity, 0 where not given; natoms (B,).
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

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the batch, by name."""
        names = [field.name for field in fields(self) if field.name != "periodic"]
        return {name: getattr(self, name) for name in names}


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
        _say_defaults_once(system, charge, spin)
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


def stated_charge_and_spin(
    atoms: Atoms, where: object = "the structure"
) -> tuple[int | None, int | None]:
    """Total charge in e and multiplicity 2S + 1 that `atoms.info` states, None where it does not.

    The names are `CHARGE_NAMES` and `SPIN_NAMES`; the first that occurs counts. Raises
    `StructureError`, which calls the structure `where`, for what is not a whole number.
    """
    found: list[int | None] = []
    for names in (CHARGE_NAMES, SPIN_NAMES):
        name = next((name for name in names if name in atoms.info), None)
        found.append(None if name is None else _whole_number(atoms.info[name], name, where))
    return found[0], found[1]


def lowest_multiplicity(atoms: Atoms, charge: int) -> int:
    """1 for an even number of electrons, 2 for an odd one."""
    return 1 + (int(atoms.numbers.sum()) - charge) % 2


def charge_and_spin(
    atoms: Atoms,
    where: object = "the structure",
    charge: int | None = None,
    spin: int | None = None,
) -> tuple[int, int]:
    """Total charge in e and spin multiplicity 2S + 1 of a structure.

    Args:
        atoms: states them in its `info`, see `stated_charge_and_spin`.
        where: what messages call the structure.
        charge: of a structure that states none; without it, 0.
        spin: of a structure that states none; without it, the lowest its electrons allow.

    Returns:
        The two numbers; a multiplicity that is stated as 0, "not known", stays 0.

    Raises:
        StructureError: for what is not a whole number, and for a charge or multiplicity that the
            number of electrons forbids.
    """
    stated = stated_charge_and_spin(atoms, where)
    charge = stated[0] if stated[0] is not None else charge or 0
    electrons = int(atoms.numbers.sum()) - charge
    lowest = lowest_multiplicity(atoms, charge)
    spin = stated[1] if stated[1] is not None else spin or lowest
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


def _say_defaults_once(atoms: Atoms, charge: int, spin: int) -> None:
    """Warn, for the first structure of a process that does not state its charge and spin."""
    global _warned_defaults
    if not _warned_defaults and None in stated_charge_and_spin(atoms):
        _warned_defaults = True
        warnings.warn(
            'no atoms.info["charge"] or no atoms.info["spin"]: taking charge 0 and the lowest '
            f"multiplicity (here charge {charge:+d}, multiplicity {spin}). Said once.",
            stacklevel=3,
        )


def _whole_number(value: object, name: str, where: object) -> int:
    """A charge or a multiplicity, which some programs write as -0.9999."""
    try:
        number = float(value)  # type: ignore[arg-type]
        if abs(number - round(number)) < 0.01:
            return round(number)
    except (OverflowError, TypeError, ValueError):  # infinite, no number at all, or nan
        pass
    shown = value.item() if isinstance(value, np.generic) else value
    raise StructureError(f'{where}: atoms.info["{name}"] = {shown!r} is not a whole number')


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
