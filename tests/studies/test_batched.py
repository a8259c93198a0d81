"""Runs side by side get what they would get alone, and fail alone."""

from __future__ import annotations

from concurrent.futures import CancelledError

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.calculator import Calculator

from allscaip_lite import AllScAIP, AllScAIPCalculator, AllScAIPConfig
from allscaip_lite.errors import StructureError
from docs.studies.stability.run import side_by_side

NEUTRAL = {"charge": 0, "spin": 1}


@pytest.fixture
def calculator() -> AllScAIPCalculator:
    torch.manual_seed(0)
    model = AllScAIP(AllScAIPConfig(hidden_size=64, num_heads=2, num_layers=1, k=6))
    return AllScAIPCalculator(model.double())


def walk(name: str, steps: int):
    """A work: the energies of a molecule that is moved a little after each."""

    def work(calculator: Calculator) -> list[float]:
        atoms = molecule(name, info=dict(NEUTRAL))
        atoms.calc = calculator
        energies = []
        for _ in range(steps):
            energies.append(atoms.get_potential_energy())
            atoms.positions += 0.01 * atoms.get_forces() + 0.001
        return energies

    return work


def test_each_gets_what_it_would_get_alone_and_one_that_ends_holds_nobody_up(calculator):
    works, batches = [walk("H2O", 3), walk("CH4", 5), walk("NH3", 1)], []
    together = side_by_side(calculator, works, tick=batches.append)
    for found, work in zip(together, works, strict=True):
        np.testing.assert_allclose(found, work(calculator), atol=1e-9)
    assert batches == [3, 2, 2, 1, 1]  # a step's energy and forces come from one call
    assert side_by_side(calculator, []) == []


def collide(calculator: Calculator) -> str:
    atoms = Atoms("H2", [[0, 0, 0], [0, 0, 0]], info=dict(NEUTRAL))
    atoms.calc = calculator
    with pytest.raises(StructureError):
        atoms.get_potential_energy()
    return "went on"


def test_what_one_asks_in_vain_is_an_error_in_that_run_alone(calculator):
    outcome, energies = side_by_side(calculator, [collide, walk("H2O", 4)])
    assert outcome == "went on"
    np.testing.assert_allclose(energies, walk("H2O", 4)(calculator), atol=1e-9)


def test_an_error_nobody_catches_stops_the_others_and_is_raised(calculator):
    seen = []

    def fails(own: Calculator) -> None:
        walk("H2O", 2)(own)
        raise OSError("disk full")

    def endless(own: Calculator) -> None:
        try:
            walk("CH4", 1_000_000)(own)
        except CancelledError as error:
            seen.append(error)
            raise

    with pytest.raises(OSError, match="disk full"):
        side_by_side(calculator, [endless, fails])
    assert len(seen) == 1


def test_an_interrupt_stops_all(calculator):
    def interrupt(runs: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        side_by_side(calculator, [walk("CH4", 1_000_000)] * 2, tick=interrupt)
