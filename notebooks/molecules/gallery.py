"""Make the structures of notebook 07 with the teacher, GFN2-xTB.

Run `python notebooks/molecules/gallery.py` with the `labels-xtb` extra; it writes beside itself

- 07_glycine_water.xyz: glycine as a zwitterion with six water molecules, relaxed;
- 07_ion_pair.xyz: tetramethylammonium and chloride, relaxed;
- 07_proton_transfer.xyz: the transfer of both protons in the dimer of formic acid: frames from the
  minimum to its mirror image, relaxed as a nudged elastic band.

All are neutral singlets. Energies are in eV, forces in eV/Å.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import minimize_rotation_and_translation
from ase.io import write
from ase.mep import NEB
from ase.optimize import BFGS, FIRE
from make import labelled
from rdkit import Chem
from rdkit.Chem import AllChem

from allscaip_lite.labels.xtb import GFN2xTB

GLYCINE = "[NH3+]CC(=O)[O-]"
TETRAMETHYLAMMONIUM = "C[N+](C)(C)C"
EXCHANGED = [0, 2, 1, 3, 9, 5, 7, 6, 8, 4]  # for each atom, the one whose role it has at the end
FRAMES = 19
CONTACT = 2.0  # Å


def relaxed(atoms: Atoms, fmax: float = 0.01) -> Atoms:
    """A neutral singlet at a minimum of GFN2-xTB, with its longest directions along x and y."""
    atoms = atoms.copy()
    atoms.info.update(charge=0, spin=1)
    atoms.calc = GFN2xTB(accuracy=0.1)
    BFGS(atoms, logfile=None).run(fmax=fmax, steps=1000)
    atoms.positions -= atoms.positions.mean(0)
    atoms.positions = atoms.positions @ np.linalg.svd(atoms.positions)[2].T
    return atoms


def embedded(smiles: str) -> Atoms:
    """A first geometry of one molecule, from RDKit."""
    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    AllChem.EmbedMolecule(molecule, randomSeed=1)
    numbers = [atom.GetAtomicNum() for atom in molecule.GetAtoms()]
    return Atoms(numbers, molecule.GetConformer().GetPositions())


def put_around(center: Atoms, others: list[Atoms], seed: int = 0) -> Atoms:
    """Add molecules in random directions, each as near as a shortest contact of 2 Å allows."""
    rng, cluster = np.random.default_rng(seed), center.copy()
    for other in others:
        other = other.copy()
        other.rotate(rng.uniform(0, 360), rng.normal(size=3))
        other.positions += cluster.positions[: len(center)].mean(0) - other.positions.mean(0)
        direction = rng.normal(size=3)
        step = 0.1 * direction / np.linalg.norm(direction)
        while np.linalg.norm(cluster.positions[:, None] - other.positions, axis=-1).min() < CONTACT:
            other.positions += step
        cluster += other
    return cluster


def formic_acid_dimer() -> Atoms:
    """Two times C, O (of C=O), O (of O-H), H (on C) and H (on O), relaxed."""
    one = np.array([[1.9, 0.1], [1.3, 1.15], [1.3, -1.1], [3.0, 0.15], [0.3, -1.1]])
    both = np.concatenate([one, -one])
    return relaxed(Atoms("COOHHCOOHH", np.pad(both, ((0, 0), (0, 1)))), 0.002)


def proton_transfer(first: Atoms) -> list[Atoms]:
    """Frames from the dimer to its mirror image, in which each proton is at the other oxygen."""
    last = first.copy()
    last.positions = first.positions[EXCHANGED] * [1, -1, 1]  # one of two possible alignments
    minimize_rotation_and_translation(first, last)
    frames = [first.copy() for _ in range(FRAMES - 1)] + [last]
    for frame in frames:
        frame.calc = GFN2xTB(accuracy=0.1)
    band = NEB(frames, k=0.5, climb=True, method="improvedtangent")
    band.interpolate()
    FIRE(band, logfile=None).run(fmax=0.02, steps=500)
    return frames


if __name__ == "__main__":
    folder = Path(__file__).parent
    found = {
        "glycine_water": [relaxed(put_around(embedded(GLYCINE), 6 * [embedded("O")]))],
        "ion_pair": [relaxed(put_around(embedded(TETRAMETHYLAMMONIUM), [Atoms("Cl")]))],
        "proton_transfer": proton_transfer(formic_acid_dimer()),
    }
    for name, frames in found.items():
        write(folder / f"07_{name}.xyz", [labelled(one) for one in frames], format="extxyz")
