"""Random structures, from one atom in a cell of 1 Å to some in 10,000 Å: one answer, however asked.

Forces are the slope of the energy; a batch gives what single structures give, fast kernels what the
plain formulas give, float32 what float64 gives, and other images of the same atoms the same. More
of them: `python tests/model/test_fuzz.py --first 1000 --count 500`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import suppress
from functools import cache

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.data import atomic_numbers, covalent_radii
from ase.geometry import get_distances

from allscaip_lite import AllScAIP, load_model
from allscaip_lite.electrons import lowest_multiplicity
from allscaip_lite.errors import StructureError
from allscaip_lite.kernels import choose
from allscaip_lite.model import Result

ELEMENTS = "H H H Li C C C N O O F Na Mg Si P S Cl K Ca Zn Br I".split()
STEP = 1e-4  # Å, of the slope
# Of float64, of float32 and of the slope, in parts of the largest force (or 1 eV/Å).
EXACT, SINGLE, SLOPE = 1e-8, 5e-4, 1e-4
CHUNK = 20  # structures that are asked for together


@cache
def models() -> dict[str, AllScAIP]:
    """The bundled model in two number types, and in the forms of its operations."""
    double = load_model("lite", dtype=torch.float64, kernels="plain")
    fast = load_model("lite", dtype=torch.float64, kernels="plain")
    fast.operations = choose("auto", "cpu", torch.float64)
    return {"plain": double, "fast": fast, "float32": load_model("lite")}


def structure(seed: int) -> Atoms:
    """Some atoms, none on top of another, with any boundaries and any cell."""
    rng = np.random.default_rng([20, seed])
    numbers = [atomic_numbers[name] for name in rng.choice(ELEMENTS, rng.integers(1, 13))]
    atoms = Atoms()
    periodic = rng.random(3) < 0.6 if rng.random() < 0.6 else np.zeros(3, bool)
    if periodic.any():
        lengths = 10 ** rng.uniform(0, 4, 3) if rng.random() < 0.5 else rng.uniform(3, 15, 3)
        atoms.cell = lengths[:, None] * (np.eye(3) + np.tril(rng.uniform(-0.6, 0.6, (3, 3)), -1))
        atoms.pbc = periodic
    size = rng.uniform(3, 8)
    for number in numbers:
        for _ in range(50):
            place = rng.uniform(0, size, 3)
            trial = atoms + Atoms([number], [place])
            reach = covalent_radii[trial.numbers] + covalent_radii[number]
            _, apart = get_distances([place], trial.positions, cell=atoms.cell, pbc=atoms.pbc)
            if (apart[0, :-1] > 0.7 * reach[:-1]).all():
                atoms = trial
                break
    atoms.positions += rng.normal(size=3) * 10 ** rng.uniform(-1, 2)
    charge = min(int(rng.integers(-2, 3)), int(atoms.numbers.sum()))
    low = lowest_multiplicity(atoms, charge)
    electrons = int(atoms.numbers.sum()) - charge
    atoms.info = {"charge": charge, "spin": low + 2 * int(rng.random() < 0.2 and electrons > low)}
    return atoms


def elsewhere(atoms: Atoms, seed: int) -> Atoms:
    """The same atoms in other images, and the whole somewhere else."""
    rng = np.random.default_rng([21, seed])
    moved = atoms.copy()
    cells = rng.integers(-3, 4, (len(atoms), 3)) * atoms.pbc
    moved.positions += cells @ atoms.cell.array + rng.normal(size=3) * 10
    return moved


def difference(one: Result, other: Result) -> float:
    """Of energies an atom (eV) and forces (eV/Å), over the largest force (or 1 eV/Å)."""
    scale = max(1.0, float(np.abs(one.forces).max()))
    energy = abs(one.energy - other.energy) / len(one.forces)
    return max(energy, float(np.abs(one.forces - other.forces).max())) / scale


def faults(seeds: Sequence[int]) -> list[str]:
    """What is wrong with the answers for these structures; a structure may be refused."""

    def ask(name: str, structures: list[Atoms]) -> list[Result]:
        return models()[name].predict(structures, outside_training="ignore")

    alone: dict[int, Result] = {}
    for seed in seeds:
        with suppress(StructureError):
            (alone[seed],) = ask("fast", [structure(seed)])
    chosen = list(alone)
    rng = np.random.default_rng([22, *seeds])
    original = [structure(seed) for seed in chosen]
    moved = [elsewhere(atoms, seed) for atoms, seed in zip(original, chosen, strict=True)]
    directions = [rng.normal(size=(len(atoms), 3)) for atoms in original]
    directions = [direction / np.linalg.norm(direction) for direction in directions]
    ahead, behind = ([atoms.copy() for atoms in original] for _ in range(2))
    for index, direction in enumerate(directions):
        ahead[index].positions += STEP * direction
        behind[index].positions -= STEP * direction
    order = rng.permutation(4 * len(chosen))  # of any sizes, one after the other
    every = [*original, *moved, *ahead, *behind]
    answers = dict(zip(order, ask("fast", [every[index] for index in order]), strict=True))
    plain, single = ask("plain", original), ask("float32", [*original, *moved])
    found = []
    for index, seed in enumerate(chosen):
        one, count = alone[seed], len(chosen)
        batch, images, up, down = (answers[index + part * count] for part in range(4))
        slope = (up.energy - down.energy) / (2 * STEP) + (one.forces * directions[index]).sum()
        for name, off, limit in (
            ("batch", difference(one, batch), EXACT),
            ("plain", difference(one, plain[index]), EXACT),
            ("images", difference(one, images), EXACT),
            ("float32", difference(one, single[index]), SINGLE),
            ("images in float32", difference(one, single[index + count]), SINGLE),
            ("slope", abs(slope) / max(1.0, np.abs(one.forces).max()), SLOPE),
        ):
            if not off < limit:
                found.append(f"seed {seed}, {original[index].symbols}, {name}: {off:.1e}")
    return found


def test_one_answer_however_it_is_asked() -> None:
    assert faults([0, 1, 2, 11]) == []  # the last in a cell of 10,000 Å


@pytest.mark.slow
def test_one_answer_of_many_structures() -> None:
    assert [
        fault for first in range(4, 64, CHUNK) for fault in faults(range(first, first + CHUNK))
    ] == []


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=100, help="how many structures")
    arguments = parser.parse_args()
    seeds = range(arguments.first, arguments.first + arguments.count)
    for first in seeds[::CHUNK]:
        for fault in faults([seed for seed in range(first, first + CHUNK) if seed in seeds]):
            print(fault, flush=True)
        print(f"seeds to {min(first + CHUNK, seeds.stop) - 1}", flush=True)
