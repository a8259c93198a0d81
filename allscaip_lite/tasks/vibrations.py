"""Harmonic frequencies: `allscaip-lite vibrations`.

In: files that ASE reads, or SMILES. Out: the frequencies of each structure after it was relaxed,
and its zero-point energy. The Hessian comes from differences of forces, of all displaced structures
in few batches, in float64.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from ase import Atoms, units
from ase.vibrations.data import VibrationsData
from tqdm import tqdm

from allscaip_lite.calculator import AllScAIPCalculator, check_calculator
from allscaip_lite.data.batches import fill_batches
from allscaip_lite.errors import InputError
from allscaip_lite.structures import check_masses
from allscaip_lite.tasks.predict import MAX_ATOMS, add_common_arguments, calculator_of, inputs
from allscaip_lite.tasks.relax import relax

LOW = 50.0  # cm⁻¹: below it a frequency says little, of a model whose energy turning changes


def vibrations(
    atoms: Atoms, calculator: AllScAIPCalculator, displacement: float = 0.01, progress: bool = False
) -> VibrationsData:
    """The Hessian of a structure, by central differences of forces, and all that follows from it.

    Args:
        atoms: at rest, see `relax`; those that a constraint holds do not vibrate.
        calculator: whose model gives the forces; its number type is best float64.
        displacement: of an atom along an axis, Å.
        progress: whether to show a progress bar.

    Raises InputError for a displacement or masses that are not above 0.
    """
    check_calculator(calculator)
    check_masses(atoms)
    if not displacement > 0:
        raise InputError(f"displacement {displacement} Å: give a length above 0")
    size = 3 * len(atoms)
    forces = np.zeros((2, size, size))
    moved = []
    for sign in (1, -1):
        for index in range(size):
            other = atoms.copy()
            other.positions[divmod(index, 3)] += sign * displacement
            moved.append(other)
    with tqdm(total=2 * size, unit="displacements", disable=not progress) as bar:
        for members in fill_batches([len(atoms)] * len(moved), MAX_ATOMS):
            results = calculator.model.predict(
                [moved[index] for index in members], outside_training=calculator.outside_training
            )
            for index, result in zip(members, results, strict=True):
                forces[divmod(index, size)] = result.forces.ravel()
            bar.update(len(members))
    hessian = (forces[1] - forces[0]) / (2 * displacement)
    hessian = (hessian + hessian.T) / 2
    hessian = hessian.reshape(len(atoms), 3, len(atoms), 3)
    free = VibrationsData.indices_from_constraints(atoms)
    return VibrationsData(atoms, hessian[free][:, :, free])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `allscaip-lite vibrations`."""
    parser.description = (
        "Relax structures and print their harmonic frequencies (cm⁻¹; imaginary ones with i) and "
        "zero-point energies."
    )
    add_common_arguments(parser)
    parser.add_argument("--no-relax", action="store_true", help="take the structures as they are")
    parser.add_argument("--fmax", type=float, default=0.005, help="of the relaxation, eV/Å")
    parser.add_argument("--displacement", type=float, default=0.01, help="of an atom, Å")


def run(args: argparse.Namespace) -> int:
    """`allscaip-lite vibrations`: the exit status is 2 where a structure did not come to rest."""
    calculator = calculator_of(args, torch.float64)
    restless = 0
    for name, atoms in inputs(args):
        still = atoms
        if not args.no_relax:
            still, converged = relax(atoms, calculator, args.fmax, 1000, progress=True)
            restless += not converged
            if not converged:
                print(f"{name}: forces above {args.fmax} eV/Å after 1000 steps")
        found = vibrations(still, calculator, args.displacement, progress=True)
        energies = found.get_energies()
        print(f"{name}: zero-point energy {float(found.get_zero_point_energy()):.4f} eV")
        waves = sorted(energies / units.invcm, key=lambda wave: wave.real - wave.imag)
        print(f"  {' '.join(map(_shown, waves))}")
    print(f"Six of them (five of a linear molecule) would be 0; below {LOW:g} cm⁻¹ trust none.")
    return 2 if restless else 0


def _shown(wave: complex) -> str:
    return f"{wave.imag:.0f}i" if abs(wave.imag) > abs(wave.real) else f"{wave.real:.0f}"
