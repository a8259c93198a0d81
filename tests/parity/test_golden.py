"""Equal to the reference where it is not installed: energies, forces and stresses kept in a file.

`golden/answers.json` holds what fairchem gives for the structures of `golden/structures.extxyz`, in
float64; `make_golden.py` makes both and says how.
"""

from __future__ import annotations

import json

import ase.io
import numpy as np
import pytest
import torch
from golden_models import ANSWERS, MODELS, OFFICIAL, STRUCTURES, golden_model

from allscaip_lite import AllScAIP, load_model
from allscaip_lite.kernels import choose

GOLDEN = json.loads(ANSWERS.read_text())["models"]
SYSTEMS = ase.io.read(STRUCTURES, ":")
QUANTITIES = ("energies", "forces", "stresses")
ENERGY_TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-8}  # eV/atom
FORCE_TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-8}  # of the largest component

STRESS_TOLERANCE = FORCE_TOLERANCE  # of the largest component


def make(name: str, dtype: torch.dtype) -> AllScAIP:
    if name == "official file":
        return load_model(OFFICIAL, dtype=dtype)
    return golden_model(name, dtype)


@pytest.mark.parametrize(
    ("kernels", "dtype"),
    [
        ("plain", torch.float64),
        ("torch", torch.float64),
        ("auto", torch.float64),
        ("auto", torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", GOLDEN)
def test_answers_are_those_of_fairchem(name: str, kernels: str, dtype: torch.dtype) -> None:
    model = make(name, dtype)
    model.operations = choose(kernels, model.device, dtype)
    results = model.predict(SYSTEMS)
    golden = GOLDEN[name]
    for index, (atoms, found) in enumerate(zip(SYSTEMS, results, strict=True)):
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
