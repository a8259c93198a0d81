"""Make the structures of the notebooks, labelled by the teacher, GFN2-xTB.

Run `python notebooks/molecules/make.py` with the `labels-xtb` extra; it writes beside itself

- caffeine.xyz: the relaxed molecule, and one snapshot of it at 300 K;
- acrolein.xyz: the relaxed molecule, rotated about its C-C single bond, one frame for each angle;
- methyldiazirine.xyz: the relaxed molecule, which is in none of the data sets.

Energies are in eV, forces in eV/Å. Caffeine and acrolein are in the test split of the data.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from ase.md.langevin import Langevin
from ase.optimize import BFGS
from rdkit import Chem
from rdkit.Chem import AllChem

from allscaip_lite.labels.xtb import GFN2xTB

CAFFEINE = "Cn1c(=O)c2c(ncn2C)n(C)c1=O"
ACROLEIN = "C=CC=O"
ACROLEIN_TORSION = (0, 1, 2, 3)  # C=C-C=O
SCAN_STEP = 10  # degrees
METHYLDIAZIRINE = "CC1N=N1"


def relaxed(smiles: str) -> Atoms:
    """The molecule as a neutral singlet at a minimum of GFN2-xTB."""
    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    AllChem.EmbedMolecule(molecule, randomSeed=1)
    numbers = [atom.GetAtomicNum() for atom in molecule.GetAtoms()]
    atoms = Atoms(numbers, molecule.GetConformer().GetPositions(), info={"charge": 0, "spin": 1})
    atoms.calc = GFN2xTB(accuracy=0.1)
    BFGS(atoms, logfile=None).run(fmax=0.002, steps=500)
    atoms.positions -= atoms.positions.mean(0)
    atoms.rotate(np.linalg.eigh(np.cov(atoms.positions.T))[1][:, 0], "z")  # flat in the xy plane
    return atoms


def snapshot(atoms: Atoms, temperature: float, steps: int) -> Atoms:
    """The molecule after `steps` steps of 0.5 fs of Langevin dynamics at `temperature` K."""
    atoms = atoms.copy()
    atoms.calc = GFN2xTB(accuracy=0.1)
    thermostat = {"temperature_K": temperature, "friction": 0.02 / units.fs, "fixcm": False}
    rng = np.random.default_rng(0)
    Langevin(atoms, 0.5 * units.fs, rng=rng, **thermostat).run(steps)
    atoms.positions -= atoms.positions.mean(0)
    return atoms


def turned(atoms: Atoms, torsion: tuple[int, int, int, int]) -> list[Atoms]:
    """The molecule at torsions 0°, 10° … 350°, otherwise unchanged."""
    from allscaip_lite.notebook.plots import bonds

    kept = [pair for pair in bonds(atoms) if set(pair) != set(torsion[1:3])]
    side = {torsion[2]}
    while grown := {a for pair in kept for a in pair if side & set(pair)} - side:
        side |= grown
    frames = []
    for angle in range(0, 360, SCAN_STEP):
        frame = atoms.copy()
        frame.set_dihedral(*torsion, angle, indices=sorted(side))
        frame.info["angle"] = angle
        frames.append(frame)
    return frames


def labelled(atoms: Atoms) -> Atoms:
    """A copy with energy and forces from a new calculation with GFN2-xTB."""
    labelled = Atoms(atoms.symbols, atoms.positions.round(6), info=dict(atoms.info))
    labelled.calc = GFN2xTB(accuracy=0.1)
    energy, forces = labelled.get_potential_energy(), labelled.get_forces()
    labelled.calc = SinglePointCalculator(labelled, energy=energy, forces=forces)
    return labelled


if __name__ == "__main__":
    folder = Path(__file__).parent
    caffeine = relaxed(CAFFEINE)
    frames = {
        "caffeine": [caffeine, snapshot(caffeine, 300.0, 600)],
        "acrolein": turned(relaxed(ACROLEIN), ACROLEIN_TORSION),
        "methyldiazirine": [relaxed(METHYLDIAZIRINE)],
    }
    for name, structures in frames.items():
        write(folder / f"{name}.xyz", [labelled(atoms) for atoms in structures], format="extxyz")
