"""Make `golden/`: twenty structures and more, and what fairchem answers for them.

Run where `fairchem-core==2.24.0` is installed (the `parity` extra):

    python tests/parity/make_golden.py

It writes the structures, a small official checkpoint, and energies (eV), forces (eV/Å) and stresses
(eV/Å³) in float64, by fairchem, for this file and for the models of `golden_models`, which reach
fairchem through `save_official`. It takes half a minute. `test_golden.py` compares with them.
"""

from __future__ import annotations

import json
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path

import ase.io
import numpy as np
import reference
import torch
from ase import Atoms
from ase.build import add_adsorbate, bulk, fcc111, graphene, molecule
from golden_models import ANSWERS, FOLDER, MODELS, OFFICIAL, STRUCTURES, golden_model

from allscaip_lite.checkpoints import save_official


def state(name: str, atoms: Atoms, charge: int = 0, spin: int = 1) -> Atoms:
    """Named, with charge and multiplicity, and no symmetry that makes distances equal.

    Positions and cell are rounded to what the file holds.
    """
    atoms.rattle(0.05, seed=sum(name.encode()))
    atoms.positions = atoms.positions.round(6)
    atoms.cell = atoms.cell.array.round(6)
    plain = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    plain.info.update(name=name, charge=charge, spin=spin)
    return plain


def apart(first: Atoms, second: Atoms, distance: float) -> Atoms:
    """Two fragments, the second turned and moved by `distance` Å."""
    second.rotate(70, (1, 2, 3))
    second.positions += (distance, 0.3, -0.2)
    return first + second


def dense_cluster() -> Atoms:
    """30 atoms, most of them with more neighbours within the cutoff than k."""
    atoms = bulk("Ar", "fcc", a=3.4, cubic=True) * 3
    atoms.pbc, atoms.cell = False, None
    from_center = np.linalg.norm(atoms.positions - atoms.positions.mean(0), axis=1)
    atoms = atoms[np.argsort(from_center, kind="stable")[:30]]
    atoms.numbers[::3], atoms.numbers[1::3] = 8, 16
    atoms.rattle(0.25, seed=5)
    return atoms


def crystal(symbols: str, cell: list[tuple[float, float, float]], seed: int) -> Atoms:
    """Atoms near the sites of a grid in a cell of any shape."""
    count = len(Atoms(symbols))
    sites = np.stack(np.meshgrid(*3 * [[0.1, 0.6]], indexing="ij"), -1).reshape(-1, 3)
    sites = np.concatenate([sites, sites + (0.25, 0.22, 0.24)])[:count]
    atoms = Atoms(symbols, cell=cell, scaled_positions=sites, pbc=True)
    atoms.rattle(0.2, seed=seed)
    return atoms


def wire() -> Atoms:
    """A zigzag chain of CH2, periodic along x, its cell filled up with vacuum."""
    units = []
    for index in range(6):
        up = (-1) ** index
        x = 1.27 * index
        units += [("C", (x, 0, 0.42 * up)), *(("H", (x, y, 1.05 * up)) for y in (-0.88, 0.88))]
    symbols, positions = zip(*units, strict=True)
    atoms = Atoms(symbols, positions, cell=[6 * 1.27, 15, 15], pbc=(True, False, False))
    atoms.positions += (0.2, 7.0, 7.0)
    return atoms


def slab() -> Atoms:
    atoms = fcc111("Al", (3, 3, 2), vacuum=4.0)
    add_adsorbate(atoms, molecule("CO"), 2.0, offset=(0.3, 0.4))
    return atoms


def sheet() -> Atoms:
    """Graphene in a cell that is not orthogonal, with a molecule above it."""
    atoms = graphene(size=(4, 4, 1), vacuum=8.0)
    water = molecule("H2O")
    water.positions += atoms.positions.mean(0) + (0.4, 0.2, 3.1)
    return atoms + water


def structures() -> list[Atoms]:
    """Molecules, ions, radicals, atoms, dimers, fragments, crystals, slabs and a wire.

    Cells with more than a few atoms have heights that exceed the cutoff by the width of the soft
    ranks: in smaller ones the reference can miss candidates, and is not the model it describes.
    """
    corners = np.array([(0, 0, 0), (1, 1, 1), (-1, -1, 1), (-1, 1, -1), (1, -1, -1)])
    skewed = [(7.4, 0.0, 0.0), (2.1, 7.6, 0.0), (-1.3, 1.7, 7.9)]
    left_handed = [(0.4, 7.9, 0.3), (8.3, 0.5, 1.9), (1.2, -2.4, 8.8)]
    primitive = [(2.7, 0.1, 0.0), (1.1, 2.6, 0.2), (0.9, 0.8, 2.9)]
    moved = crystal("MgO" * 4, skewed, seed=3)
    moved.positions[3] += moved.cell[0] - 2 * moved.cell[2]
    return [
        state("water", molecule("H2O")),
        state("ethanol", molecule("CH3CH2OH")),
        state("isobutane", molecule("isobutane")),
        state("ammonium", Atoms("NH4", 0.6 * corners), charge=1),
        state("hydroxide", molecule("OH"), charge=-1),
        state("benzene cation", molecule("C6H6"), charge=1, spin=2),
        state("methyl radical", molecule("CH3"), spin=2),
        state("triplet oxygen", molecule("O2"), spin=3),
        state("hydrogen atom", Atoms("H"), spin=2),
        state("sodium cation", Atoms("Na"), charge=1),
        state("argon dimer", Atoms("Ar2", [(0, 0, 0), (3.8, 0, 0)])),
        state("sodium chloride", Atoms("NaCl", [(0, 0, 0), (2.4, 0, 0)])),
        state("argon dimer beyond the cutoff", Atoms("Ar2", [(0, 0, 0), (7.5, 0, 0)])),
        state("waters apart", apart(molecule("H2O"), molecule("H2O"), 9.0)),
        state("ions apart", Atoms("NaCl", [(0, 0, 0), (8.0, 1.0, 0)])),
        state("dense cluster", dense_cluster()),
        state("sodium cation in a box", Atoms("Na", cell=[18, 19, 20], pbc=True), charge=1),
        state("one atom a cell", Atoms("Al", cell=primitive, pbc=True), spin=2),
        state("small cell", bulk("MgO", "rocksalt", a=4.2, cubic=True)),
        state("triclinic crystal", crystal("MgO" * 8, skewed, seed=1)),
        state("left-handed cell", crystal("SiO2" * 5, left_handed, seed=2)),
        state("atoms outside the cell", moved),
        state("slab", slab()),
        state("sheet", sheet()),
        state("wire", wire()),
    ]


def answers(path: Path, systems: list[Atoms]) -> dict[str, list]:
    """Of fairchem, each structure in a batch of its own; of single atoms too by the network.

    (The reference answers for single atoms from a table of energies, unless it is told that the
    network knows them.)
    """
    unit = reference.load_unit(path, torch.float64)
    unit.model.module.supports_single_atoms = True
    found: dict[str, list] = {"energies": [], "forces": [], "stresses": []}
    for atoms in systems:
        answer = reference.predict(unit, [atoms])
        found["energies"].append(float(answer.energies[0]))
        found["forces"].append(answer.forces[0].tolist())
        stress = answer.stresses[0].tolist() if answer.stresses and atoms.pbc.any() else None
        found["stresses"].append(stress)
    return found


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    ase.io.write(STRUCTURES, structures(), format="extxyz", write_results=False)
    systems = ase.io.read(STRUCTURES, ":")
    reference.make_checkpoint(
        OFFICIAL,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        stress=True,
        seed=11,
        omegaconf=True,
        max_num_elements=40,
        knn_k=12,
        edge_distance_expansion_size=32,
        freequency_list=[3, 1, 1, 1, 2],
    )
    models = {"official file": answers(OFFICIAL, systems)}
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            path = save_official(golden_model(name, torch.float32), Path(folder) / "model.pt")
            models[name] = answers(path, systems)
    made_with = {name: version(name) for name in ("fairchem-core", "torch", "numpy", "ase")}
    content = {
        "command": "python tests/parity/make_golden.py",
        "made_with": {"python": platform.python_version(), **made_with},
        "precision": "float64",
        "units": {"energies": "eV", "forces": "eV/Å", "stresses": "eV/Å³"},
        "models": models,
    }
    ANSWERS.write_text(json.dumps(content, ensure_ascii=False, indent=None) + "\n")


if __name__ == "__main__":
    main()
