"""Structures at rest: `allscaip-lite relax`.

In: files that ASE reads, or SMILES. Out: the same structures where no force is above a limit, in a
file of their own. ASE's LBFGS moves the atoms and, if asked, the cell.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixConstraint
from ase.filters import FrechetCellFilter
from ase.optimize import LBFGS
from tqdm import tqdm

from allscaip_lite.calculator import check_calculator
from allscaip_lite.data.reading import file_and_index, is_there
from allscaip_lite.errors import InputError
from allscaip_lite.tasks.predict import (
    add_common_arguments,
    calculator_of,
    check_format,
    inputs,
    write,
)


class NoTorque(FixConstraint):
    """Forces without the part that turns a molecule as a whole, for `atoms.set_constraint`.

    The true energy does not change when a molecule turns; that of a model that learned this from
    data changes by some meV, and an optimiser would follow it for hundreds of steps.
    """

    def get_removed_dof(self, atoms: Atoms) -> int:
        return self._turns(atoms).shape[1]

    def adjust_positions(self, atoms: Atoms, new: np.ndarray) -> None:
        """Steps follow the forces, which turn nothing."""

    def adjust_forces(self, atoms: Atoms, forces: np.ndarray) -> None:
        turns = self._turns(atoms)
        forces -= (turns @ (turns.T @ forces.ravel())).reshape(-1, 3)

    @staticmethod
    def _turns(atoms: Atoms) -> np.ndarray:
        """(3N, 3) orthonormal displacements of turning it; (3N, 2) of a linear molecule."""
        arms = atoms.positions - atoms.positions.mean(0)  # (N, 3)
        turns = np.stack([np.cross(axis, arms).ravel() for axis in np.eye(3)], axis=1)
        directions, sizes, _ = np.linalg.svd(turns, full_matrices=False)
        return directions[:, sizes > 1e-6 * max(1.0, sizes.max())]

    def todict(self) -> dict[str, Any]:
        return {"name": "NoTorque", "kwargs": {}}


def relax(
    atoms: Atoms,
    calculator: Calculator,
    fmax: float = 0.02,
    steps: int = 500,
    cell: bool = False,
    progress: bool = False,
) -> tuple[Atoms, bool]:
    """A structure at rest.

    Args:
        atoms: the start; it stays as it is. A molecule without constraints does not turn.
        calculator: gives energy and forces, and the stress if the cell moves.
        fmax: eV/Å, the largest force at the end.
        steps: at most so many.
        cell: whether the cell moves too.
        progress: whether to show a progress bar.

    Returns:
        The structure with its energy and forces, and whether the forces got below `fmax`.

    Raises:
        InputError: for a limit that is none, and for a cell that cannot be relaxed.
    """
    check_calculator(calculator)
    if not fmax > 0 or steps < 0:
        raise InputError(
            f"fmax {fmax} eV/Å, steps {steps}: give a force above 0, and 0 steps or more"
        )
    moving = atoms.copy()
    moving.calc = calculator
    if not atoms.constraints and not atoms.pbc.any():
        moving.set_constraint(NoTorque())
    if cell and not (moving.pbc.all() and moving.cell.rank == 3):
        raise InputError(f"{atoms.symbols} has no cell that is periodic in all directions to relax")
    with tqdm(total=steps, unit="steps", desc=str(atoms.symbols), disable=not progress) as bar:
        body: Any = FrechetCellFilter(moving) if cell else moving
        optimizer = LBFGS(body, logfile=os.devnull)
        converged = False
        for at_rest in optimizer.irun(fmax=fmax, steps=steps):
            converged = bool(at_rest)
            largest = float(np.linalg.norm(moving.get_forces(), axis=1).max())
            bar.set_postfix_str(f"largest force {largest:.3f} eV/Å", refresh=False)
            bar.update(optimizer.nsteps - bar.n)
    results = {name: moving.calc.results[name] for name in ("energy", "forces")}
    still = moving.copy()
    still.set_constraint(atoms.constraints)
    still.calc = SinglePointCalculator(still, **results)
    return still, converged


def file_beside(words: Sequence[str], ending: str) -> Path:
    """A name in this folder for the results of structures: water.xyz → water-relaxed.extxyz."""
    first = Path(file_and_index(words[0])[0])
    stem = first.stem if is_there(first) else re.sub(r"[^\w.+-]+", "_", words[0])[:40]
    return Path(f"{stem}-{ending}.extxyz")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `allscaip-lite relax`."""
    parser.description = "Move the atoms of structures to where no force is above a limit (LBFGS)."
    add_common_arguments(parser)
    parser.add_argument("--out", type=Path, help="default: NAME-relaxed.extxyz in this folder")
    parser.add_argument("--fmax", type=float, default=0.02, help="largest force at the end, eV/Å")
    parser.add_argument("--steps", type=int, default=500, help="at most so many")
    parser.add_argument("--cell", action="store_true", help="relax the cell too")


def run(args: argparse.Namespace) -> int:
    """`allscaip-lite relax`: the exit status is 2 where a structure did not come to rest."""
    out = args.out or file_beside(args.structures, "relaxed")
    found = list(inputs(args))
    keeps = check_format(out, len(found))
    calculator = calculator_of(args)
    done, restless = [], []
    for name, atoms in found:
        still, converged = relax(atoms, calculator, args.fmax, args.steps, args.cell, True)
        moved = np.linalg.norm(still.positions - atoms.positions, axis=1).max()
        print(f"{still.get_potential_energy():.4f} eV, atoms moved by up to {moved:.2f} Å  {name}")
        done.append(still)
        restless += [] if converged else [name]
    write(out, done)
    note = "" if keeps else " (energies, forces, charges and spins are kept by .extxyz and .traj)"
    print(f"written: {out}{note}")
    for name in restless:
        print(f"forces above {args.fmax} eV/Å after {args.steps} steps: {name}")
    return 2 if restless else 0
