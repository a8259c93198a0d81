"""Atoms in, tensors out: a batch of structures as the model reads it.

In: `ase.Atoms`. Out: `Structures`, plain tensors, checked before any number is computed.
Charge and spin multiplicity come from `atoms.info["charge"]` and `atoms.info["spin"]`, or from
other names that programs use; everything in the package reads them with `charge_and_spin`.
"""

from __future__ import annotations

import math
import reprlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols
from torch import Tensor

from allscaip_lite.errors import InputError, StructureWarning

MAX_CHARGE = 100  # the charge table has rows for -100 .. 100
MAX_MULTIPLICITY = 100
# Names in `atoms.info` under which programs write the total charge and the multiplicity 2S + 1;
# capitals do not matter, and a space or a hyphen is as good as an underscore.
CHARGE_NAMES = (
    "charge",
    "total_charge",
    "net_charge",
    "system_charge",
    "molecular_charge",
    "formal_charge",
    "tot_charge",
)
SPIN_NAMES = (
    "spin",
    "multiplicity",
    "spin_multiplicity",
    "molecular_multiplicity",
    "total_multiplicity",
    "mult",
    "spin_mult",
)
NOT_GIVEN = ("", "none", "nan", "null")  # as text


# By what is not given and the charge and multiplicity taken for it: formulas, in order.
Assumptions = dict[tuple[str, int, int], dict[str, None]]


class StructureError(InputError):
    """A structure the model cannot answer for; the message says what to change."""


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
        left the cell stays, so that a list of near pairs keeps its images.
        """
        periodic = self.pbc.any(1)
        unit = torch.eye(3, dtype=self.cell.dtype, device=self.cell.device)
        lattice = torch.where(periodic[:, None, None], self.cell, unit)  # (B, 3, 3)
        system, inverse = self.system, torch.linalg.inv_ex(lattice).inverse
        place = (self.positions.unsqueeze(1) @ inverse[system]).squeeze(1)  # (N, 3)
        total = place.new_zeros(len(self), 3).index_add(0, system, place)
        mean = (total / self.natoms.unsqueeze(1))[system]
        cells = torch.where((place - 0.5).abs() > 1.5, place.floor(), 0.0)
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

    def clone(self) -> Structures:
        """The same batch in tensors of its own."""
        return self.replace(**{name: value.clone() for name, value in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the batch, by name."""
        names = [field.name for field in fields(self) if field.name != "periodic"]
        return {name: getattr(self, name) for name in names}


def structures_from_atoms(
    atoms: Atoms | Sequence[Atoms],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    max_num_elements: int = 100,
    assumed: Assumptions | None = None,
) -> Structures:
    """Check structures and turn them into one batch.

    Positions and cell keep ASE's float64 until they are cast to `dtype`, after `centered`. Where a
    charge or multiplicity is assumed, it is noted in `assumed`, or a warning says so. Raises
    `StructureError` for what the model cannot answer for.
    """
    batch = [atoms] if isinstance(atoms, Atoms) else list(atoms)
    if not batch:
        raise StructureError("no structures: give one ase.Atoms or a non-empty list of them")
    cells, charges, spins = [], [], []
    noted: Assumptions = {} if assumed is None else assumed
    for index, system in enumerate(batch):
        if not isinstance(system, Atoms):
            raise TypeError(f"structure {index} is a {type(system).__name__}, not an ase.Atoms")
        where = _Place(index, system)
        _check_geometry(system, where, max_num_elements)
        charge, spin = charge_and_spin(system, where, assumed=noted)
        charges.append(charge)
        spins.append(spin)
        cells.append(system.cell.complete().array if system.pbc.any() else system.cell.array)
    if assumed is None:
        say_assumptions(noted)
    structures = Structures(
        positions=torch.as_tensor(
            np.concatenate([a.positions for a in batch]), dtype=torch.float64
        ),
        atomic_numbers=torch.as_tensor(np.concatenate([a.numbers for a in batch])).long(),
        cell=torch.as_tensor(np.stack(cells), dtype=torch.float64),
        pbc=torch.as_tensor(np.stack([a.pbc for a in batch])),
        charge=torch.tensor(charges),
        spin=torch.tensor(spins),
        natoms=torch.tensor([len(a) for a in batch]),
    )
    return structures.centered().to(device, dtype)


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

    The names are `CHARGE_NAMES` and `SPIN_NAMES`. Values are numbers, numbers as text, or arrays of
    one of these; None, not a number, and a multiplicity of 0 state nothing.

    Args:
        atoms: the structure.
        where: what messages call it.

    Raises:
        StructureError: for what is not a whole number, and for two names that contradict.
    """
    info: Mapping[object, object] = atoms.info
    found: list[int | None] = []
    for names in (CHARGE_NAMES, SPIN_NAMES):
        stated: dict[str, int] = {}
        for name, value in info.items():
            if isinstance(name, str) and _spelt(name) in names:
                number = _whole_number(value, name, where)
                if number is not None and not (number == 0 and names is SPIN_NAMES):
                    stated[name] = number
        if len(set(stated.values())) > 1:
            listed = " and ".join(f'atoms.info["{n}"] = {value}' for n, value in stated.items())
            raise StructureError(f"{where}: {listed} contradict each other; keep the right one")
        found.append(next(iter(stated.values()), None))
    return found[0], found[1]


def states_charge_or_spin(name: object) -> bool:
    """Whether a name in `info` is one of `CHARGE_NAMES` or `SPIN_NAMES`."""
    return isinstance(name, str) and _spelt(name) in CHARGE_NAMES + SPIN_NAMES


def _spelt(name: str) -> str:
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def lowest_multiplicity(atoms: Atoms, charge: int) -> int:
    """1 for an even number of electrons, 2 for an odd one."""
    return 1 + (int(atoms.numbers.sum()) - charge) % 2


def charge_and_spin(
    atoms: Atoms,
    where: object = "the structure",
    charge: int | None = None,
    spin: int | None = None,
    assumed: Assumptions | None = None,
) -> tuple[int, int]:
    """Total charge in e and spin multiplicity 2S + 1 of a structure.

    Args:
        atoms: states them in its `info`, see `stated_charge_and_spin`.
        where: what messages call the structure.
        charge: of a structure that states none; without it, 0.
        spin: of a structure that states none; without it, the lowest its electrons allow.
        assumed: where the structure is noted if one of them had to be assumed.

    Returns:
        The two numbers.

    Raises:
        StructureError: for what is not a whole number, for two names that contradict, and for a
            charge or multiplicity that the number of electrons forbids.
    """
    stated = stated_charge_and_spin(atoms, where)
    charge = stated[0] if stated[0] is not None else charge
    spin = stated[1] if stated[1] is not None else spin
    missing = [
        name for name, value in (("charge", charge), ("multiplicity", spin)) if value is None
    ]
    charge = charge or 0
    electrons = int(atoms.numbers.sum()) - charge
    lowest = lowest_multiplicity(atoms, charge)
    spin = lowest if spin is None else spin
    if abs(charge) > MAX_CHARGE:
        raise StructureError(f"{where}: charge {charge:+d} is outside ±{MAX_CHARGE}")
    if electrons < 0:
        raise StructureError(f"{where}: charge {charge:+d} leaves fewer than no electrons")
    if not 0 < spin <= MAX_MULTIPLICITY:
        raise StructureError(f"{where}: multiplicity {spin} is outside 1 .. {MAX_MULTIPLICITY}")
    if spin % 2 == electrons % 2 or spin > electrons + 1:
        raise StructureError(
            f'{where}: atoms.info["spin"] = {spin} is the multiplicity 2S + 1, and {electrons} '
            f"electrons (charge {charge:+d}) do not allow it; the lowest they allow is {lowest}"
        )
    if missing and assumed is not None:
        hint = _contradicted(atoms, charge, spin, missing)
        case = (f"no {' and no '.join(missing)}", charge, spin)
        assumed.setdefault(case, {})[f"{atoms.get_chemical_formula()}{hint}"] = None
    return charge, spin


def _contradicted(atoms: Atoms, charge: int, spin: int, missing: list[str]) -> str:
    """What initial charges and magnetic moments say, if it contradicts what is assumed."""
    told = []
    if "charge" in missing and atoms.has("initial_charges"):
        total = float(atoms.get_initial_charges().sum())
        if abs(total - charge) > 0.5:
            told.append(f"initial charges add up to {total:+.3g}")
    if "multiplicity" in missing and atoms.has("initial_magmoms"):
        moments = atoms.get_initial_magnetic_moments()
        total = float(np.linalg.norm(moments.sum(0)))  # of vectors too
        if np.any(moments) and abs(total + 1 - spin) > 0.5:
            told.append(f"initial magnetic moments say multiplicity {total + 1:.3g}")
    return f" (whose {' and whose '.join(told)})" if told else ""


def say_assumptions(assumed: Assumptions, said: set[str] | None = None) -> None:
    """Warn of charges and multiplicities that were assumed, one warning a distinct case.

    Args:
        assumed: as `charge_and_spin` left it.
        said: formulas and cases that were mentioned before, which are left out; new ones are added.
    """
    for (missing, charge, spin), formulas in assumed.items():
        taken = f"{missing} in atoms.info: charge {charge:+d}, multiplicity {spin} are assumed"
        new = [name for name in formulas if said is None or f"{name}: {taken}" not in said]
        if not new:
            continue
        if said is not None:
            said |= {f"{name}: {taken}" for name in new}
        more = f" and {len(new) - 5} more" if len(new) > 5 else ""
        warnings.warn(
            f"{', '.join(new[:5])}{more}: {taken} (neutral and the lowest where nothing is said). "
            'Set atoms.info["charge"] and atoms.info["spin"], the multiplicity 2S + 1',
            StructureWarning,
            stacklevel=3,
        )


def _whole_number(value: object, name: str, where: object) -> int | None:
    """A charge or a multiplicity, which some programs write as -0.9999; None if none is given."""
    single = _single(value)
    if single is None or (isinstance(single, str) and single.strip().lower() in NOT_GIVEN):
        return None
    if isinstance(single, (int, float, str)) and not isinstance(single, bool):
        try:
            number = float(single)
            if math.isnan(number):
                return None
            if abs(number - round(number)) < 0.01:
                return round(number)
        except (OverflowError, ValueError):  # infinite, or no number at all
            pass
    raise StructureError(
        f'{where}: atoms.info["{name}"] = {reprlib.repr(single)} is not a whole number'
    )


def _single(value: object) -> object:
    """The value itself, or the only one of an array or a list."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    if isinstance(value, (np.ndarray, np.generic, list, tuple)):
        array = np.asarray(value, dtype=object)
        value = array.item() if array.size == 1 else value
    return value.item() if isinstance(value, np.generic) else value


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
