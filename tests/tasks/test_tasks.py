"""Commands on structures: energies, geometries at rest, frequencies, from files and SMILES."""

from __future__ import annotations

import re
from functools import partial
from itertools import product
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import molecule
from ase.calculators.calculator import Calculator
from ase.constraints import FixAtoms
from ase.optimize import BFGS, FIRE, LBFGS

from allscaip_lite import AllScAIPCalculator, cli, load_model
from allscaip_lite.errors import RunError, StructureError
from allscaip_lite.md.dynamics import Settings, run_md
from allscaip_lite.tasks.predict import _from_smiles
from allscaip_lite.tasks.relax import NoTorque, relax
from allscaip_lite.tasks.vibrations import vibrations
from docs.studies.stability.run import side_by_side


def water(charge: int = 0, spin: int = 1) -> Atoms:
    return molecule("H2O", info={"charge": charge, "spin": spin})


def test_predict_writes_a_line_a_structure_and_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = [water(), water(1, 2), molecule("OH")]
    ase.io.write(tmp_path / "a.extxyz", frames)
    out = tmp_path / "found.extxyz"
    command = ["predict", str(tmp_path / "a.extxyz"), "--out", str(out), "--device", "cpu"]
    assert cli.main([*command, "--charge", "-1", "--spin", "1"]) == 0  # of OH alone
    said = capsys.readouterr()
    frames[2].info = {"charge": -1, "spin": 1}
    expected = load_model("lite").predict(frames)
    for index, (atoms, result) in enumerate(zip(ase.io.read(out, ":"), expected, strict=True)):
        assert atoms.get_potential_energy() == pytest.approx(result.energy, abs=1e-5)
        np.testing.assert_allclose(atoms.get_forces(), result.forces, atol=1e-5)
        line = next(line for line in said.out.splitlines() if f"structure {index}" in line)
        assert f"{result.energy:.4f}"[:-1] in line
    assert (atoms.info["charge"], atoms.info["spin"]) == (-1, 1)


@pytest.mark.parametrize("command", ["predict", "relax"])
def test_a_file_that_cannot_hold_the_results_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    ase.io.write(tmp_path / "a.extxyz", [water(), water()])
    for name in ("a.foo", "POSCAR", "noname"):  # a POSCAR has one structure
        words = [command, str(tmp_path / "a.extxyz"), "--out", str(tmp_path / name)]
        assert cli.main([*words, "--device", "cpu"]) == 2
        said = capsys.readouterr()
        assert f"{name}: give a format in which ASE writes 2 structures" in said.err
        assert "eV" not in said.out
    assert [file.name for file in tmp_path.iterdir()] == ["a.extxyz"]
    (tmp_path / "b.extxyz").mkdir()
    words = [command, str(tmp_path / "a.extxyz"), "--out", str(tmp_path / "b.extxyz")]
    assert cli.main([*words, "--device", "cpu"]) == 2
    said = capsys.readouterr()
    assert "b.extxyz: it is a folder" in said.err and "eV" not in said.out


@pytest.mark.parametrize("name", ["a.cif", "a.json", "a.xsf"])
def test_a_format_that_drops_results_is_refused_or_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    box = water()
    box.set_cell([6, 6, 6])
    box.pbc = True
    ase.io.write(tmp_path / "a.extxyz", box)
    words = [str(tmp_path / "a.extxyz"), "--out", str(tmp_path / name), "--device", "cpu"]
    assert cli.main(["predict", *words]) == 2
    said = capsys.readouterr()
    assert (
        f"{name}: this format drops energies, forces, charge or spin" in said.err
        and "eV" not in said.out
    )
    assert not (tmp_path / name).exists()
    assert cli.main(["relax", *words]) == 0  # the structure is the result
    assert (
        f"{name} (energies, forces, charges and spins are kept by .extxyz"
        in capsys.readouterr().out
    )
    assert cli.main(["predict", words[0], "--out", str(tmp_path / "a.traj")]) == 0
    kept = ase.io.read(tmp_path / "a.traj")
    assert kept.info["spin"] == 1 and kept.calc.results.keys() >= {"energy", "forces", "stress"}


@pytest.mark.filterwarnings("default")
def test_what_is_outside_is_said_at_the_end_and_may_stop(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ase.io.write(tmp_path / "a.xyz", Atoms("Xe"))
    model = load_model("lite")
    if model.seen is None:
        pytest.skip("the bundled weights do not say what they saw")
    assert cli.main(["predict", str(tmp_path / "a.xyz"), "--device", "cpu"]) == 0
    said = capsys.readouterr().err
    assert said.count("element: Xe: Xe") == 2
    assert said.index("once more") < said.rindex("element: Xe: Xe")
    command = ["predict", str(tmp_path / "a.xyz"), "--outside-training", "error"]
    assert cli.main([*command, "--device", "cpu"]) == 2


def test_smiles_have_their_charge_and_multiplicity(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rdkit")
    words = ["[OH-]", "[CH3]", "O.O", "[O][O]"]
    assert cli.main(["predict", *words, "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    states = [tuple(map(int, re.findall(r"([+-]\d+) +(\d+)  \S+$", line)[0])) for line in lines]
    assert states == [(-1, 1), (0, 2), (0, 1), (0, 3)]


@pytest.mark.parametrize("command", [["predict"], ["relax"], ["vibrations"], ["md", "--time=1ps"]])
def test_a_structure_that_cannot_be_is_named_with_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    flat = water()
    flat.cell, flat.pbc = [9, 9, 0.01], True
    ase.io.write(tmp_path / "a.extxyz", [water(), flat])
    name, *options = command
    options += ["--device", "cpu", "--out", str(tmp_path / "out")] if name == "md" else []
    assert cli.main([name, str(tmp_path / "a.extxyz"), *options]) == 2
    said = capsys.readouterr().err
    where = "a.extxyz" if name == "md" else "a.extxyz, structure 1 (OH2)"  # md: of the last
    assert f"{where} is periodic along a lattice vector that is zero or flat" in said


@pytest.mark.parametrize("word", ["nowhere.xyz", "nowhere", "C(", "C" * 300 + "("])
def test_what_is_no_file_and_no_smiles_is_said(
    word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["predict", word, "--device", "cpu"]) == 2
    assert "no such file" in capsys.readouterr().err


@pytest.mark.parametrize(("word", "length"), [("N#N", 1.10), ("O=C=O", 1.16), ("S=C=S", 1.55)])
def test_bonds_of_smiles_are_not_those_that_a_force_field_guesses(word: str, length: float) -> None:
    """Experimental lengths, Å."""
    ((_, atoms),) = _from_smiles(word)
    assert atoms.get_distance(0, 1) == pytest.approx(length, rel=0.08)


@pytest.mark.parametrize("word", ["C|5", "C|a|1", "C|0|1|2"])
def test_a_state_behind_smiles_has_two_numbers(
    word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["predict", word]) == 2
    assert f"{word}: write SMILES|charge|multiplicity" in capsys.readouterr().err


SMALL = "H2 N2 O2 F2 Cl2 CO HF HCl LiH H2O CO2 HCN N2O NH3 CH4 C2H2 C2H4 H2CO CH3OH C2H6".split()


@pytest.mark.slow
def test_small_molecules_come_to_rest_with_every_optimiser() -> None:
    """None turns away, and all optimisers find the same minimum, or one of two 4 meV apart (H2)."""
    optimisers = {"BFGS": BFGS, "LBFGS": LBFGS, "FIRE": FIRE}

    def work(atoms: Atoms, optimiser: str, calculator: Calculator) -> tuple[bool, float]:
        atoms.calc = calculator
        at_rest = optimisers[optimiser](atoms, logfile=None).run(fmax=0.005, steps=100)
        return bool(at_rest), atoms.get_potential_energy()

    cases, works = list(product(SMALL, optimisers)), []
    for name, optimiser in cases:  # made here, for ASE reads its list once, and not in threads
        atoms = molecule(name, info={"charge": 0, "spin": 3 if name == "O2" else 1})
        atoms.set_constraint(NoTorque())
        works.append(partial(work, atoms, optimiser))
    found = side_by_side(AllScAIPCalculator("lite", "cpu", outside_training="ignore"), works)
    ends = dict(zip(cases, found, strict=True))
    assert not [case for case, (at_rest, _) in ends.items() if not at_rest]
    for name in SMALL:
        energies = [ends[name, optimiser][1] for optimiser in optimisers]
        assert np.ptp(energies) < (0.005 if name == "H2" else 0.002), name


def test_relax_comes_to_rest_or_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    start = water()
    start.rattle(0.1, seed=1)
    ase.io.write("w.xyz", start)
    command = ["relax", "w.xyz", "--charge", "0", "--spin", "1", "--device", "cpu"]
    assert cli.main([*command, "--fmax", "0.05"]) == 0
    still = ase.io.read("w-relaxed.extxyz")
    assert np.linalg.norm(still.get_forces(), axis=1).max() <= 0.05
    assert still.info["charge"] == 0
    assert cli.main([*command, "--fmax", "1e-9", "--steps", "1"]) == 2
    assert "forces above 1e-09" in capsys.readouterr().out
    assert cli.main([*command, "--cell"]) == 2
    assert "no cell" in capsys.readouterr().err


def test_limits_that_are_none_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for options, words in (
        (["relax", "--fmax", "0"], "give a force above 0"),
        (["relax", "--steps", "-1"], "0 steps or more"),
        (["vibrations", "--no-relax", "--displacement", "0"], "give a length above 0"),
    ):
        assert cli.main([*options, "O"]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("mass", [0.0, -1.0, np.nan])
def test_masses_that_nothing_can_move_with_are_refused(tmp_path: Path, mass: float) -> None:
    atoms, calculator = water(), AllScAIPCalculator("lite", kernels="torch")
    atoms.set_masses([16.0, 1.0, mass])
    with pytest.raises(StructureError, match=r"masses of atoms \[2\] are"):
        vibrations(atoms, calculator)
    with pytest.raises(StructureError, match=r"masses of atoms \[2\] are"):
        run_md(atoms, calculator, Settings(), tmp_path)
    atoms = water()
    atoms.set_momenta([[0, 0, np.inf]] * 3)
    with pytest.raises(RunError, match="velocities that are not finite"):
        run_md(atoms, calculator, Settings(), tmp_path)


def test_frequencies_are_those_of_a_numerical_hessian() -> None:
    calculator = AllScAIPCalculator("lite-xtb", "cpu", torch.float64)
    still, converged = relax(water(), calculator, 0.01)
    assert converged
    waves = vibrations(still, calculator).get_energies() / units.invcm
    bend, *stretches = sorted(waves.real)[-3:]
    assert 1300 < bend < 1900 and all(3200 < wave < 4200 for wave in stretches)
    # the curvature along a stretch, by energies
    energies = []
    for change in (-0.01, 0.0, 0.01):
        moved = still.copy()
        moved.positions[1] += (0, change, 0)
        energies.append(calculator.get_potential_energy(moved))
    curvature = (energies[0] - 2 * energies[1] + energies[2]) / 0.01**2
    hessian = vibrations(still, calculator).get_hessian_2d()
    assert hessian[4, 4] == pytest.approx(curvature, rel=0.02)
    still.set_constraint(FixAtoms([0]))  # the oxygen
    held = vibrations(still, calculator).get_hessian_2d()
    np.testing.assert_allclose(held, hessian[3:, 3:], atol=1e-6)


def test_shares_of_atoms_add_up_to_the_energy() -> None:
    calculator = AllScAIPCalculator("lite", "cpu")
    for atoms in (water(), water(1, 2)):
        atoms.calc = calculator
        shares = atoms.get_potential_energies()
        assert shares.shape == (3,)
        assert shares.sum() == pytest.approx(atoms.get_potential_energy(), abs=1e-5)
        assert shares[1] == pytest.approx(shares[2], abs=0.02)  # the two hydrogens


class Turning(Calculator):
    """A spring between two atoms, whose energy also depends on where it points: 5 meV · z/r."""

    implemented_properties = ["energy", "forces"]

    def calculate(self, *args: object, **kwargs: object) -> None:
        super().calculate(*args, **kwargs)
        arrow = self.atoms.positions[1] - self.atoms.positions[0]
        length = np.linalg.norm(arrow)
        axis = arrow / length
        up = 0.005 * (np.array([0, 0, 1]) - axis[2] * axis) / length
        force = -20 * (length - 1.2) * axis - up
        energy = 10 * (length - 1.2) ** 2 + 0.005 * axis[2]
        self.results = {"energy": energy, "forces": np.array([-force, force])}


def test_a_molecule_is_not_turned_by_an_energy_that_depends_on_its_direction() -> None:
    start = Atoms("N2", [(0, 0, 0), (0.8, 0.1, 0.6)])
    still, converged = relax(start, Turning(), fmax=1e-4, steps=60)
    assert converged and not still.constraints
    arrow = still.positions[1] - still.positions[0]
    assert np.linalg.norm(arrow) == pytest.approx(1.2, abs=1e-5)
    assert arrow @ start.positions[1] / np.linalg.norm(start.positions[1]) > 1.2 - 1e-4
    start.calc = Turning()
    start.set_constraint(NoTorque())
    forces = start.get_forces()
    assert np.abs(np.cross(start.positions, forces).sum(0)).max() < 1e-12
    assert start.get_number_of_degrees_of_freedom() == 4
    turned = start.get_forces(apply_constraint=False)
    assert np.abs(np.cross(start.positions, turned).sum(0)).max() > 1e-3
