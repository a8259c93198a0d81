"""The ASE calculator: units and signs, what is cached, what is refused, ASE's own drivers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress
from ase.filters import FrechetCellFilter
from ase.io import Trajectory
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS
from ase.stress import full_3x3_to_voigt_6_stress

from allscaip_lite import AllScAIP, AllScAIPCalculator, StructureError
from allscaip_lite.checkpoints import save_model
from allscaip_lite.errors import InputError
from allscaip_lite.kernels import choose

ModelMaker = Callable[..., AllScAIP]


def water(charge: int = 0, spin: int = 1) -> Atoms:
    atoms = molecule("H2O")
    atoms.rattle(0.03, seed=0)
    atoms.info.update(charge=charge, spin=spin)
    return atoms


@pytest.fixture(scope="module")
def model(make_model: ModelMaker) -> AllScAIP:
    """With the operations that a calculator chooses, so that numbers agree to the last bit."""
    model = make_model()
    model.operations = choose("auto", model.device, model.dtype)
    return model


@pytest.fixture
def calculator(model: AllScAIP) -> AllScAIPCalculator:
    return AllScAIPCalculator(model)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Atoms]:
    """Every call of the model from here on, so that caching can be seen."""
    calls, predict = [], AllScAIP.predict

    def counting(self: AllScAIP, atoms: Atoms, *options: Any) -> list:
        calls.append(atoms)
        return predict(self, atoms, *options)

    monkeypatch.setattr(AllScAIP, "predict", counting)
    return calls


# --- numbers, signs, shapes -----------------------------------------------------------------------


def test_molecule(model: AllScAIP, calculator: AllScAIPCalculator) -> None:
    atoms = water()
    expected = model.predict(atoms)
    atoms.calc = calculator
    assert isinstance(atoms.get_potential_energy(), float)
    assert atoms.get_potential_energy() == expected.energy
    assert atoms.get_potential_energy(force_consistent=True) == expected.energy  # free_energy
    assert atoms.get_forces().dtype == np.float64
    np.testing.assert_array_equal(atoms.get_forces(), expected.forces)


def test_crystal_in_conventions_of_ase(
    model: AllScAIP, calculator: AllScAIPCalculator, crystal: Atoms
) -> None:
    atoms = crystal.copy()
    atoms.calc = calculator
    stress = atoms.get_stress()
    assert stress.shape == (6,)
    expected = full_3x3_to_voigt_6_stress(model.predict(atoms).stress)
    np.testing.assert_array_equal(stress, expected)
    np.testing.assert_allclose(stress, calculate_numerical_stress(atoms, eps=1e-5), atol=1e-8)
    forces = calculate_numerical_forces(atoms, eps=1e-4, iatoms=[0, 1])
    np.testing.assert_allclose(atoms.get_forces()[:2], forces, atol=1e-6)


def test_results_are_fresh_arrays(calculator: AllScAIPCalculator, crystal: Atoms) -> None:
    atoms = crystal.copy()
    atoms.calc = calculator
    for get in (atoms.get_forces, atoms.get_stress):
        first = get()
        expected = first.copy()
        first += 1
        np.testing.assert_array_equal(get(), expected)
    forces = atoms.get_forces()
    kept = forces.copy()
    atoms.positions[0, 0] += 0.1
    atoms.get_forces()
    np.testing.assert_array_equal(forces, kept)


# --- caching ------------------------------------------------------------------------------------


def test_all_properties_of_one_structure_cost_one_call(
    calculator: AllScAIPCalculator, crystal: Atoms, counted: list[Atoms]
) -> None:
    atoms = crystal.copy()
    atoms.calc = calculator
    atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()
    atoms.get_potential_energy()
    assert len(counted) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda atoms: atoms.info.update(charge=2),
        lambda atoms: atoms.info.update(spin=3),
        lambda atoms: atoms.positions.__iadd__(np.eye(3) / 10),
        lambda atoms: atoms.set_atomic_numbers([16, 1, 1]),
        lambda atoms: (atoms.set_cell([2.5, 6, 7]), atoms.set_pbc(True)),
    ],
    ids=["charge", "multiplicity", "positions", "elements", "cell"],
)
def test_a_change_is_computed_anew(
    model: AllScAIP, calculator: AllScAIPCalculator, counted: list[Atoms], change: Callable
) -> None:
    atoms = water()
    atoms.calc = calculator
    before = atoms.get_potential_energy()
    change(atoms)
    after = atoms.get_potential_energy()
    assert len(counted) == 2
    assert abs(after - before) > 1e-4
    assert after == model.predict(atoms).energy


def test_charge_and_multiplicity_change_under_other_names(
    calculator: AllScAIPCalculator, counted: list[Atoms]
) -> None:
    atoms = water()
    atoms.info = {"total_charge": 0, "multiplicity": 1}
    atoms.calc = calculator
    energies = [atoms.get_potential_energy()]
    for change in ({"multiplicity": 3}, {"total_charge": 2}):
        atoms.info.update(change)
        energies.append(atoms.get_potential_energy())
    assert len(counted) == len(set(energies)) == 3


def test_other_notes_in_info_cost_nothing(
    calculator: AllScAIPCalculator, counted: list[Atoms]
) -> None:
    atoms = water()
    atoms.calc = calculator
    atoms.get_potential_energy()
    atoms.info["name"] = "water"
    atoms.get_forces()
    assert len(counted) == 1


def test_one_calculator_serves_several_structures(
    model: AllScAIP, calculator: AllScAIPCalculator
) -> None:
    batch = [water(), water(1, 2), molecule("CH4", info={"charge": 0, "spin": 1})]
    for atoms in batch:
        atoms.calc = calculator
    for _ in range(2):
        for atoms in batch:
            expected = model.predict(atoms)
            assert atoms.get_potential_energy() == expected.energy
            np.testing.assert_array_equal(atoms.get_forces(), expected.forces)


def test_copies_are_independent(calculator: AllScAIPCalculator) -> None:
    atoms = water()
    atoms.calc = calculator
    energy = atoms.get_potential_energy()
    twin = copy.deepcopy(atoms)
    assert twin.calc is not atoms.calc
    assert twin.get_potential_energy() == energy
    twin.positions[0] += 0.1
    assert twin.get_potential_energy() != energy
    assert atoms.calc.results["energy"] == energy


# --- the model it is given ------------------------------------------------------------------------


def test_the_model_that_is_given_stays_as_it_is(make_model: ModelMaker) -> None:
    """A model in training lends its weights: same memory, no copy, no freezing, no dropout."""
    model = make_model(ffn_dropout=0.5).train()
    calculator = AllScAIPCalculator(model)
    atoms = water()
    atoms.calc = calculator
    first = atoms.get_potential_energy()
    assert model.training and all(weight.requires_grad for weight in model.parameters())
    assert not calculator.model.training
    assert not any(weight.requires_grad for weight in calculator.model.parameters())
    for ours, theirs in zip(calculator.model.parameters(), model.parameters(), strict=True):
        assert ours.data_ptr() == theirs.data_ptr()
    calculator.reset()
    assert atoms.get_potential_energy() == first
    with torch.no_grad():  # an optimiser's step
        model.energy_head.contract.bias.add_(1.0)
    calculator.reset()
    change = 3 * float(model.energy_scale)
    assert atoms.get_potential_energy() == pytest.approx(first + change, abs=1e-10)


def test_dtype_is_chosen_without_touching_the_model(model: AllScAIP) -> None:
    atoms = water()
    exact = model.predict(atoms).energy
    atoms.calc = AllScAIPCalculator(model, device="cpu", dtype=torch.float32)
    assert atoms.calc.model.dtype == torch.float32 and model.dtype == torch.float64
    assert atoms.get_forces().dtype == np.float64  # ASE's
    assert atoms.get_potential_energy() != exact
    assert atoms.get_potential_energy() == pytest.approx(exact, abs=1e-4)


def test_by_path(make_model: ModelMaker, tmp_path: Path) -> None:
    model = make_model(torch.float32)
    save_model(model, tmp_path / "small.safetensors")
    atoms = water()
    for path in (tmp_path / "small.safetensors", str(tmp_path / "small.safetensors")):
        atoms.calc = AllScAIPCalculator(path, device="cpu")
        expected = pytest.approx(model.predict(atoms).energy, rel=1e-5)  # other kernels, float32
        assert atoms.get_potential_energy() == expected
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert AllScAIPCalculator(path).model.device.type == device


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="no model is called 'litle'"):
        AllScAIPCalculator("litle")


# --- what is refused, before the model is asked --------------------------------------------------


def test_stress_of_a_molecule(calculator: AllScAIPCalculator, counted: list[Atoms]) -> None:
    atoms = water()
    atoms.calc = calculator
    message = "not periodic.*set atoms.cell and atoms.pbc"
    with pytest.raises(PropertyNotImplementedError, match=message):
        atoms.get_stress()
    assert not counted
    atoms.get_forces()
    with pytest.raises(PropertyNotImplementedError, match="not periodic"):
        atoms.get_stress()
    assert len(counted) == 1


def test_stress_of_a_wire_whose_cell_has_no_volume(
    calculator: AllScAIPCalculator, counted: list[Atoms]
) -> None:
    atoms = water()
    atoms.set_cell([(4.0, 0, 0), (0, 0, 0), (0, 0, 0)])
    atoms.pbc = (True, False, False)
    atoms.calc = calculator
    with pytest.raises(PropertyNotImplementedError, match="no volume"):
        atoms.get_stress()
    assert not counted
    assert np.isfinite(atoms.get_forces()).all()


@pytest.mark.parametrize("changes", [{"conservative": False}, {"stress": False}])
def test_stress_of_a_model_that_has_none(
    make_model: ModelMaker, crystal: Atoms, counted: list[Atoms], changes: dict
) -> None:
    model = make_model(**changes)
    atoms = crystal.copy()
    atoms.calc = AllScAIPCalculator(model, kernels="plain")
    with pytest.raises(PropertyNotImplementedError, match="this model gives no stress"):
        atoms.get_stress()
    assert not counted
    np.testing.assert_array_equal(atoms.get_forces(), model.predict(crystal).forces)


def test_impossible_structures(calculator: AllScAIPCalculator) -> None:
    """The messages of `structures` arrive unchanged; a repaired structure is answered for."""
    atoms = water(spin=2)
    atoms.calc = calculator
    for _ in range(2):
        with pytest.raises(StructureError, match="multiplicity"):
            atoms.get_potential_energy()
    atoms.info["spin"] = 1
    assert np.isfinite(atoms.get_potential_energy())
    atoms.positions[1] = np.nan
    with pytest.raises(StructureError, match=r"atoms \[1\] are not finite"):
        atoms.get_forces()
    atoms.positions[1] = atoms.positions[2]
    with pytest.raises(StructureError, match="atoms 1 and 2 stand on one spot"):
        atoms.get_forces()


# --- ASE's drivers ------------------------------------------------------------------------------


def test_relaxation_goes_downhill(calculator: AllScAIPCalculator) -> None:
    """Random weights have minima too, not necessarily sensible ones; energy and force fall."""
    atoms = water()
    atoms.calc = calculator
    energy, force = atoms.get_potential_energy(), np.abs(atoms.get_forces()).max()
    BFGS(atoms, logfile=None, maxstep=0.05).run(fmax=0.1 * force, steps=60)
    assert atoms.get_potential_energy() < energy
    assert np.abs(atoms.get_forces()).max() < 0.2 * force


def test_cell_relaxation_goes_downhill(calculator: AllScAIPCalculator, crystal: Atoms) -> None:
    atoms = crystal.copy()
    atoms.calc = calculator
    energy, volume = atoms.get_potential_energy(), atoms.get_volume()
    BFGS(FrechetCellFilter(atoms), logfile=None, maxstep=0.02).run(fmax=0, steps=4)
    assert atoms.get_potential_energy() < energy
    assert atoms.get_volume() != pytest.approx(volume, rel=1e-6)


def test_dynamics_conserve_the_energy(calculator: AllScAIPCalculator) -> None:
    """Verlet's error falls with the square of the time step: four times, for half of it."""
    drifts = []
    for step in (0.5, 0.25):
        atoms = water()
        atoms.calc = calculator
        atoms.set_momenta(np.random.default_rng(0).normal(scale=0.3, size=(3, 3)))
        start, totals = atoms.get_total_energy(), []
        dynamics = VelocityVerlet(atoms, timestep=step * units.fs)
        dynamics.attach(lambda: totals.append(atoms.get_total_energy() - start))
        dynamics.run(round(8 / step))
        drifts.append(np.abs(totals).max())
    assert 0 < drifts[0] < 0.01
    assert drifts[0] / drifts[1] == pytest.approx(4, rel=0.3)


def test_trajectory_keeps_the_results(calculator: AllScAIPCalculator, tmp_path: Path) -> None:
    atoms = water()
    atoms.calc = calculator
    forces = atoms.get_forces()
    with Trajectory(str(tmp_path / "water.traj"), "w") as trajectory:
        trajectory.write(atoms)
    with Trajectory(str(tmp_path / "water.traj")) as trajectory:
        frame = trajectory[0]
    assert frame.get_potential_energy() == atoms.get_potential_energy()
    np.testing.assert_array_equal(frame.get_forces(), forces)
    assert frame.info["charge"] == 0 and frame.info["spin"] == 1


@pytest.mark.parametrize("wrong", [None, "", 3, "water.xyz"])
def test_what_is_no_structure_and_no_model_is_named(
    calculator: AllScAIPCalculator, wrong: Any
) -> None:
    with pytest.raises(TypeError, match=f"give an ase.Atoms or a list of them.* not {wrong!r}"):
        calculator.model.predict(wrong)
    new, used = (AllScAIPCalculator(calculator.model) for _ in range(2))
    used.get_potential_energy(molecule("H2"))
    for one in [new] if wrong is None else [new, used]:  # None: the structure of before
        with pytest.raises(InputError, match="no structure: give an ase.Atoms"):
            one.get_potential_energy(wrong)
    if wrong != "water.xyz":
        with pytest.raises(InputError, match="give the name of a model, such as 'lite', or"):
            AllScAIPCalculator(wrong)
