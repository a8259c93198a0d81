"""Equal to the reference where it is not installed: energies, forces and stresses kept in a file.

`golden/answers.json` holds what fairchem gives for the structures of `golden/structures.extxyz`, in
float64; `make_golden.py` makes both and says how.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator

import ase.io
import numpy as np
import pytest
import torch
from golden_models import ANSWERS, MODELS, OFFICIAL, STRUCTURES, golden_model

from allscaip_lite import AllScAIP, load_model
from allscaip_lite.model import Result
from allscaip_lite.structures import structures_from_atoms

GOLDEN = json.loads(ANSWERS.read_text())["models"]
SYSTEMS = ase.io.read(STRUCTURES, ":")
QUANTITIES = ("energies", "forces", "stresses")
ENERGY_TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-8}  # eV/atom
FORCE_TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-8}  # of the largest component

STRESS_TOLERANCE = FORCE_TOLERANCE  # of the largest component

Answer = Callable[[AllScAIP], Iterable[Result]]


def make(name: str, dtype: torch.dtype) -> AllScAIP:
    if name == "official file":
        return load_model(OFFICIAL, dtype=dtype)
    return golden_model(name, dtype)


def by_default(model: AllScAIP) -> Iterator[Result]:
    """As a user gets them."""
    yield from model.predict(SYSTEMS)


def by_plain_formulas(model: AllScAIP) -> Iterator[Result]:
    """By those that can be differentiated again."""
    structures = structures_from_atoms(SYSTEMS, torch.float64)
    answer = model(structures, create_graph=True)
    forces = answer.forces.detach().double().split(structures.natoms.tolist())
    for index, atoms in enumerate(SYSTEMS):
        stress = None
        if atoms.pbc.any() and answer.stress is not None:
            stress = answer.stress[index].detach().double().numpy()
        yield Result(answer.energy[index].item(), forces[index].numpy(), stress)


@pytest.mark.parametrize(
    ("answer", "dtype"),
    [
        (by_default, torch.float32),
        (by_default, torch.float64),
        (by_plain_formulas, torch.float64),
    ],
    ids=["default, float32", "default, float64", "plain, float64"],
)
@pytest.mark.parametrize("name", GOLDEN)
def test_answers_are_those_of_fairchem(name: str, answer: Answer, dtype: torch.dtype) -> None:
    golden = GOLDEN[name]
    for index, (atoms, found) in enumerate(zip(SYSTEMS, answer(make(name, dtype)), strict=True)):
        about = f"{name}, {atoms.info['name']}"
        error = abs(found.energy - golden["energies"][index]) / len(atoms)
        assert error < ENERGY_TOLERANCE[dtype], about
        # those of single atoms are zero, or rounding
        forces, stress = np.array(golden["forces"][index]), golden["stresses"][index]
        largest = max(np.abs(forces).max(), 1e-2)
        assert np.abs(found.forces - forces).max() < FORCE_TOLERANCE[dtype] * largest, about
        assert (found.stress is None) == (stress is None), about
        if stress is not None:
            largest = max(np.abs(stress).max(), 1e-4)
            error = np.abs(found.stress - np.array(stress)).max()
            assert error < STRESS_TOLERANCE[dtype] * largest, about


def test_the_answers_are_of_many_kinds_of_structures() -> None:
    """Every model answers for all, with forces and stresses that are not zero."""
    assert GOLDEN.keys() == {"official file", *MODELS}
    assert len(SYSTEMS) >= 20
    assert {tuple(atoms.pbc.tolist()) for atoms in SYSTEMS} == {
        (False, False, False),
        (True, False, False),
        (True, True, False),
        (True, True, True),
    }
    for name, golden in GOLDEN.items():
        answers = zip(SYSTEMS, *(golden[kind] for kind in QUANTITIES), strict=True)
        for atoms, _, forces, stress in answers:
            about = f"{name}, {atoms.info['name']}"
            assert np.shape(forces) == (len(atoms), 3)
            assert np.abs(forces).max() > 1e-3 or len(atoms) < 3, about
            assert (stress is None) == (name == "direct" or not atoms.pbc.any()), about
            assert stress is None or np.abs(stress).max() > 1e-5 or len(atoms) == 1, about
