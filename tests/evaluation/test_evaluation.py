"""Errors come out right, by domain and in a saved card."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import units
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.stress import full_3x3_to_voigt_6_stress

from allscaip_lite import AllScAIP, AllScAIPConfig, cli, save_model
from allscaip_lite.checkpoints import read_card
from allscaip_lite.data.aselmdb import Dataset, write_aselmdb
from allscaip_lite.evaluation import errors as evaluation
from allscaip_lite.evaluation.errors import (
    GROUPS,
    by_element,
    by_group,
    describe,
    evaluate,
    fit_references,
    residuals,
    table,
    xtb_residuals,
)
from allscaip_lite.files import locked_file

SMALL = AllScAIPConfig(
    hidden_size=16, num_layers=1, num_heads=2, angular_channels=(4, 4), num_distance_basis=16
)


@pytest.fixture
def model() -> AllScAIP:
    torch.manual_seed(0)
    return AllScAIP(SMALL).eval()


@pytest.fixture
def labelled(model: AllScAIP, tmp_path: Path) -> Path:
    """Water and ammonia labelled by the model itself, then moved off by known amounts."""
    structures = []
    for name, shift, push in (("H2O", 0.3, 0.01), ("NH3", -0.4, 0.03), ("H2O", 0.6, 0.0)):
        atoms = molecule(name)
        atoms.info.update(charge=0, spin=1, data_id=name.lower())
        result = model.predict(atoms)
        forces = result.forces - push
        atoms.calc = SinglePointCalculator(atoms, energy=result.energy - shift, forces=forces)
        structures.append(atoms)
    write_aselmdb(tmp_path / "set.aselmdb", structures)
    return tmp_path / "set.aselmdb"


def test_errors_overall(model: AllScAIP, labelled: Path) -> None:
    errors = evaluate(model, Dataset(labelled))
    per_atom = np.array([0.3 / 3, -0.4 / 4, 0.6 / 3]) * 1e3
    pushes = np.repeat([10.0, 30.0, 0.0], [9, 12, 9])
    assert errors["structures"] == 3
    assert errors["energy_mae"] == pytest.approx(np.abs(per_atom).mean(), abs=0.02)
    assert errors["energy_rmse"] == pytest.approx(np.sqrt((per_atom**2).mean()), abs=0.02)
    assert errors["force_mae"] == pytest.approx(pushes.mean(), abs=0.02)
    assert errors["force_rmse"] == pytest.approx(np.sqrt((pushes**2).mean()), abs=0.02)


def test_errors_by_domain(model: AllScAIP, labelled: Path) -> None:
    data = Dataset(labelled)
    rows = by_group(describe(data), residuals(model, data), GROUPS["domain"])
    assert list(rows) == ["h2o", "nh3", "all"]
    assert rows["h2o"]["structures"] == 2
    assert rows["nh3"]["energy_mae"] == pytest.approx(100, abs=0.02)
    assert rows["nh3"]["force_mae"] == pytest.approx(30, abs=0.02)
    assert "| nh3 | 1 | 100.0 | 100.0 | 30.0 | 30.0 |" in table(rows)


def test_errors_of_the_stress(model: AllScAIP, tmp_path: Path) -> None:
    """In bar, of the structures that have one: a wrong pressure of 300 bar, and a wrong shear."""
    crystal = bulk("NaCl", "rocksalt", a=5.5)
    crystal.rattle(0.05, seed=0)
    lone = molecule("H2O")
    structures = []
    for atoms, shift in ((crystal, 300.0 * np.array([1, 1, 1, 0.5, 0, 0])), (lone, None)):
        atoms.info.update(charge=0, spin=1, data_id="salt" if atoms is crystal else "water")
        result = model.predict(atoms)
        labels = {"energy": result.energy, "forces": result.forces}
        if shift is not None:
            labels["stress"] = full_3x3_to_voigt_6_stress(result.stress) - shift * units.bar
        atoms.calc = SinglePointCalculator(atoms, **labels)
        structures.append(atoms)
    write_aselmdb(tmp_path / "set.aselmdb", structures)
    data = Dataset(tmp_path / "set.aselmdb")
    rows = by_group(describe(data), residuals(model, data), GROUPS["domain"])
    assert rows["salt"]["pressure_mae"] == pytest.approx(300, abs=1)
    assert rows["all"]["stress_mae"] == pytest.approx((3 * 300 + 2 * 150) / 9, abs=1)
    assert "stress_mae" not in rows["water"]
    assert "| water | 1 | 0.0 | 0.0 | 0.0 | 0.0 | – | – |" in table(rows)


def test_the_command_puts_the_errors_into_the_card(
    model: AllScAIP, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(model, tmp_path / "model.safetensors", {"about": "a test"})
    command = ["evaluate", str(tmp_path / "model.safetensors"), str(labelled), "--device", "cpu"]
    for out, more in (("auto", []), ("plain", ["--kernels", "plain"])):
        save = ["--save", str(tmp_path / f"{out}.safetensors"), "--note", "how"]
        with locked_file(tmp_path / f"{out}.safetensors"):
            assert cli.main([*command, *more, *save]) == 2
        assert "another process works on" in capsys.readouterr().err
        assert cli.main([*command, *more, *save]) == 0
        card = read_card(tmp_path / f"{out}.safetensors")
        assert card["about"] == "a test" and card["trained"] == "how"
        assert card["errors"]["nh3"]["energy_mae"] == pytest.approx(100, abs=0.02)


@pytest.mark.parametrize(
    "options, words",
    [(["--save", "a.pt"], "give a file .safetensors"), (["--fit-references"], "leave out --fit-")],
)
def test_what_cannot_be_saved_is_said_before_the_work(
    model: AllScAIP, labelled: Path, tmp_path: Path, capsys, options: list[str], words: str
) -> None:
    save_model(model, tmp_path / "model.safetensors")
    command = ["evaluate", str(tmp_path / "model.safetensors"), str(labelled)]
    assert cli.main([*command, "--save", str(tmp_path / "out.safetensors"), *options]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


def test_errors_by_element_charge_multiplicity_and_size(model: AllScAIP, labelled: Path) -> None:
    data = Dataset(labelled)
    found, described = residuals(model, data), describe(data)
    rows = by_element(described, found)
    assert list(rows) == ["H", "N", "O", "all"]
    assert rows["N"]["force_mae"] == pytest.approx(30, abs=0.02)
    assert rows["O"]["force_mae"] == pytest.approx(5, abs=0.02)  # 10 and 0
    assert rows["H"]["force_mae"] == pytest.approx((2 * 10 + 3 * 30 + 2 * 0) / 7, abs=0.02)
    assert (rows["O"]["structures"], rows["H"]["structures"]) == (2, 3)
    assert rows["O"]["energy_mae"] == pytest.approx(150, abs=0.02)
    assert list(by_group(described, found, GROUPS["charge"])) == ["0", "all"]
    assert list(by_group(described, found, GROUPS["multiplicity"])) == ["1", "all"]
    sizes = by_group(described, found, GROUPS["atoms"])
    assert {name: row["structures"] for name, row in sizes.items()} == {"4": 3, "all": 3}


def relabelled(model: AllScAIP, tmp_path: Path, own: dict[str, float]) -> Dataset:
    """Structures whose labels are the model's forces plus a little, at another zero of energy and
    another price of an electron."""
    structures = []
    for seed, name in enumerate(["H2O", "NH3", "CH4", "CH3OH", "H2CO", "H2O2", "N2H4", "HCN"]):
        atoms = molecule(name)
        atoms.rattle(0.05, seed=seed)
        charge = {"NH3": 1, "CH3OH": -1, "N2H4": 2}.get(name, 0)
        atoms.info |= {"charge": charge, "spin": 1 + charge % 2}
        atoms.info |= {"data_id": "any", "source": f"here/{name}", "molecule": f"{name}.Ne"}
        result = model.predict(atoms)
        zero = sum(own[symbol] for symbol in atoms.symbols) - 4700.0 * charge
        error = 1e-3 * (-1) ** seed * len(atoms)
        labels = {"energy": result.energy + zero + error, "forces": result.forces + 0.02}
        atoms.info |= {"xtb_energy": result.energy, "xtb_forces": result.forces}
        atoms.calc = SinglePointCalculator(atoms, **labels)
        structures.append(atoms)
    write_aselmdb(tmp_path / "other.aselmdb", structures)
    return Dataset(tmp_path / "other.aselmdb")


def test_another_zero_of_energy_is_fitted_away(model: AllScAIP, tmp_path: Path) -> None:
    data = relabelled(model, tmp_path, {"H": 3.0, "C": -400.0, "N": 900.0, "O": 7000.0})
    found, described = residuals(model, data), describe(data)
    assert found.energies.abs().mean() > 1e4
    fitted = fit_references(described, found)
    assert 0.05 < fitted.energies.abs().mean() < 1.01  # of the 1 meV/atom that was put in
    assert fitted.forces is found.forces
    own = xtb_residuals(described)
    np.testing.assert_allclose(own.energies, fitted.energies, atol=0.15)
    assert own.forces[0].mean() == pytest.approx(-20, abs=0.01)
    with pytest.raises(ValueError, match="too few to fit"):
        fit_references(described[:3], found._replace(energies=found.energies[:3]))


def test_the_command_writes_predictions_and_pictures(
    model: AllScAIP, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = relabelled(model, tmp_path, {"H": 9.0, "C": 0.0, "N": 0.0, "O": 5000.0})
    save_model(model, tmp_path / "model.safetensors")
    command = ["evaluate", str(tmp_path / "model.safetensors"), str(tmp_path / "other.aselmdb")]
    files = ["--plots", str(tmp_path / "a.png"), "--predictions", str(tmp_path / "a.npz")]
    groups = ["--by", "element", "atoms"]
    assert cli.main([*command, "--device", "cpu", *files, *groups]) == 0
    words = capsys.readouterr().out
    assert "| element | structures |" in words and "| up to so many atoms |" in words
    assert "another level of theory" in words and "--fit-references" in words
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with np.load(tmp_path / "a.npz") as found:
        assert sorted(found) == ["energy", "forces", "ids", "natoms"]
        assert list(found["ids"][:2]) == ["here/H2O", "here/NH3"]
        assert list(found["natoms"]) == [len(atoms) for atoms in data]
        ends = np.cumsum(found["natoms"])
        for index, part in enumerate(np.split(found["forces"], ends[:-1])):
            alone = model.predict(data[index])
            np.testing.assert_allclose(part, alone.forces, atol=1e-5)
            assert found["energy"][index] == pytest.approx(alone.energy, abs=1e-4)


@pytest.mark.parametrize("factor", [1.0, -1.0, 0.02])
def test_labels_that_are_no_forces_are_said(
    model: AllScAIP, tmp_path: Path, capsys: pytest.CaptureFixture[str], factor: float
) -> None:
    """Gradients, and forces in another unit: they follow the model's."""
    structures = list(relabelled(model, tmp_path, dict.fromkeys("HCNO", 0.0)))
    for atoms in structures:
        atoms.calc.results["forces"] = factor * atoms.get_forces()
    write_aselmdb(tmp_path / "other.aselmdb", structures, overwrite=True)
    save_model(model, tmp_path / "model.safetensors")
    command = ["evaluate", str(tmp_path / "model.safetensors"), str(tmp_path / "other.aselmdb")]
    assert cli.main([*command, "--device", "cpu"]) == 0
    said = re.search(r"forces are (\S+) times the labels: .*eV/Å", capsys.readouterr().out)
    assert (said is None) == (factor == 1)
    assert said is None or float(said[1]) == pytest.approx(1 / factor, rel=0.02)


def test_models_side_by_side(
    model: AllScAIP,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = relabelled(model, tmp_path, {"H": 9.0, "C": 0.0, "N": 0.0, "O": 5000.0})
    torch.manual_seed(1)
    other = AllScAIP(SMALL).eval()
    names = {name: str(tmp_path / f"{name}.safetensors") for name in ("one", "two")}
    save_model(model, names["one"])
    save_model(other, names["two"])
    command = ["evaluate", names["one"], str(tmp_path / "other.aselmdb"), "--device", "cpu"]
    command += ["--fit-references", "--compare", names["two"], "--containing", "H2O"]

    def printed() -> tuple[list[str], dict[str, list[str]]]:
        assert cli.main(command) == 0
        words = capsys.readouterr().out
        lines = [line.strip("| ").split(" | ") for line in words.splitlines() if "|" in line]
        return words.splitlines(), {line[0]: line[1:] for line in lines}

    described = describe(data)
    errors = [
        fit_references(described, residuals(model, data)),
        fit_references(described, residuals(other, data)),
        xtb_residuals(described),
    ]
    monkeypatch.setattr(evaluation, "MIN_STRUCTURES", len(data))
    lines, rows = printed()
    assert f"elements and charge: {names['one']}, {names['two']}, GFN2-xTB." in lines[-1]
    for group, chosen in (("all", range(8)), ("with `H2O`", [0]), ("without `H2O`", range(1, 8))):
        forces = [torch.cat([found.forces[i] for i in chosen]).abs().mean() for found in errors]
        energies = [found.energies[list(chosen)].abs().mean() for found in errors]
        wanted = [f"{float(error):.0f}" for error in (*forces, *energies)]
        assert rows[group] == [str(len(chosen)), *wanted]
    assert rows["all"][1:3] != rows["with `H2O`"][1:3] and len(set(rows["all"][1:3])) == 2

    monkeypatch.setattr(evaluation, "MIN_STRUCTURES", len(data) + 1)
    _, rows = printed()
    assert rows["all"][4] != "–" and rows["all"][5:] == ["–", "–"]
    command[-1] = "Ne"
    assert cli.main(command) == 2
    assert "molecules here are C" in capsys.readouterr().err


def test_structures_without_labels_get_predictions_only(
    model: AllScAIP, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import ase.db

    with ase.db.connect(tmp_path / "test.aselmdb", use_lock_file=False) as database:
        database.write(molecule("H2O"), data={"charge": 0, "spin": 1, "source": "w"})
    save_model(model, tmp_path / "model.safetensors")
    command = ["evaluate", str(tmp_path / "model.safetensors"), str(tmp_path / "test.aselmdb")]
    assert cli.main([*command, "--unlabelled"]) == 2
    assert "--predictions FILE.npz" in capsys.readouterr().err
    assert cli.main([*command, "--unlabelled", "--predictions", str(tmp_path / "p.npz")]) == 0
    with np.load(tmp_path / "p.npz") as found:
        assert list(found["ids"]) == ["w"] and found["forces"].shape == (3, 3)
    assert cli.main([*command, "--predictions", str(tmp_path / "missing" / "p.npz")]) == 2
    assert "a folder that exists" in capsys.readouterr().err
