"""OMol25's evaluations: what is read and refused, predicted, resumed and counted.

The oracles are fairchem's recipes and, where it is installed, OMol25's own evaluator.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import pickle
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.calculator import Calculator
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms, FixBondLength
from ase.io.jsonio import decode, encode
from ase.optimize import LBFGS
from ase.spacegroup import Spacegroup

from allscaip_lite.calculator import AllScAIPCalculator
from allscaip_lite.checkpoints import save_model
from allscaip_lite.config import AllScAIPConfig
from allscaip_lite.errors import DataError, InputError, RunError, StructureError
from allscaip_lite.evaluation import leaderboard
from allscaip_lite.evaluation.leaderboard import (
    jobs,
    metrics,
    predict,
    read,
    table,
)
from allscaip_lite.model import AllScAIP


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = AllScAIPConfig(hidden_size=16, num_layers=1, num_heads=2, angular_channels=None)
    return AllScAIP(config).double().eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch):
    monkeypatch.setattr(leaderboard, "STEPS", 4)


def structure(name="H2O", charge=0, spin=1, shift=0.0):
    atoms = molecule(name)
    atoms.positions[0] += shift
    atoms.info = {"charge": charge, "spin": spin, "source": f"{name}/{shift}"}
    return atoms


def far(name, other, gap):
    return structure(name) + Atoms(other, [[0, 0, gap]])


POCKET = structure("CH4", shift=0.02)
LIGAND = Atoms("He", [[0, 0, 3.5]], info={"charge": 0, "spin": 1})
INPUTS = {
    "conformers": {
        "water": [{"sid": f"w{i}", "initial_atoms": structure(shift=0.1 * i)} for i in range(3)],
        "methane": [{"sid": 7, "initial_atoms": structure("CH4", shift=0.1)}],
    },
    "protonation": {
        "water": {
            "water_0_1": {"initial_atoms": structure(), "final_atoms": None},
            "water_-1_1": {"initial_atoms": structure("OH", -1)},
        }
    },
    "ieea": {
        "water": {
            charge: {spin: {"atoms": structure("H2O", charge, spin)}}
            for charge, spin in ((-1, 2), (0, 1), (1, 2))
        }
    },
    "spin_gap": {"oxygen": {spin: {"atoms": structure("O2", 0, spin)} for spin in (1, 3)}},
    "ligand_pocket": {
        "pair": {
            "ligand": LIGAND,
            "pocket": POCKET,
            "ligand_pocket": POCKET + LIGAND,
            "name": "CH4-He",
        }
    },
    "ligand_strain": {
        "water": {
            "bioactive_conf": structure(shift=0.2),
            "conformers": [structure(shift=0.1 * i) for i in range(2)],
        }
    },
    "distance_scaling": {
        "noble": {
            "a": {
                f"{'short' if gap < 5 else 'long'}_range_{gap}": far("CH4", "Ne", gap)
                for gap in (3.0, 3.5, 4.0, 7.0, 8.0)
            }
        }
    },
    "singlepoint": {"one": structure(), "two": structure("CH3OH"), "three": structure("CH4")},
}


@pytest.fixture
def inputs(tmp_path):
    def write(task, protocol=4):
        file = tmp_path / f"{task}_inputs.pkl"
        file.write_bytes(pickle.dumps(INPUTS[task], protocol))
        return file

    return write


def assert_same(found, wanted, place=""):
    """Equal nesting, keys and texts, and numbers up to the rounding of float64."""
    assert type(found) is type(wanted), place
    if isinstance(wanted, dict):
        assert list(found) == list(wanted), place
        for key in wanted:
            if key == "atoms_json":
                found[key], wanted[key] = (json.loads(one[key]) for one in (found, wanted))
            assert_same(found[key], wanted[key], f"{place}/{key}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), place
        for index, pair in enumerate(zip(found, wanted, strict=True)):
            assert_same(*pair, f"{place}/{index}")
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, abs=1e-7), place
    else:
        assert found == wanted, place


# --- Reading ---------------------------------------------------------------------------------


@pytest.fixture
def mson_pickle(monkeypatch):
    """Pickles structures as pymatgen's MSONAtoms, of a stand-in that is gone afterwards."""

    def dump(make, protocol=4):
        class MSONAtoms(Atoms): ...

        MSONAtoms.__module__, MSONAtoms.__qualname__ = "pymatgen.io.ase", "MSONAtoms"
        with monkeypatch.context() as patch:
            for name in ("pymatgen", "pymatgen.io", "pymatgen.io.ase"):
                patch.setitem(sys.modules, name, ModuleType(name))
            sys.modules["pymatgen.io.ase"].MSONAtoms = MSONAtoms
            return pickle.dumps(make(MSONAtoms), protocol)

    return dump


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_of_msonatoms_needs_no_pymatgen(mson_pickle, tmp_path, monkeypatch, protocol):
    made = structure("CH3OH", np.int64(1), 2)
    made.set_tags(range(6))
    made.cell, made.pbc = np.diag([9.0, 8, 7]), (True, False, True)
    made.set_constraint(FixAtoms([0, 3]))
    made.info |= {"list": [1, (2.5, "x")], "array": np.asfortranarray(np.arange(6).reshape(2, 3))}
    made.calc = SinglePointCalculator(made, energy=-1.0, forces=np.zeros((6, 3)))
    file = tmp_path / "a.pkl"
    file.write_bytes(mson_pickle(lambda kind: {"a": kind(made), "b": [kind("H")]}, protocol))
    monkeypatch.setitem(sys.modules, "pymatgen", None)  # whoever imports it, fails
    found = read(file)
    assert type(found["a"]) is Atoms and found["a"].calc is None
    assert encode(found["a"]) == encode(made)
    assert found["b"][0].symbols == "H"


def test_the_same_as_json(tmp_path):
    made = structure("CH3OH")
    bare = made.copy()
    bare.info = {}
    entry = {
        "@module": "pymatgen.io.ase",
        "@class": "MSONAtoms",
        "atoms_json": encode(bare),
        "atoms_info": made.info,
    }
    (tmp_path / "a.json").write_text(json.dumps({"a": {"atoms": entry, "energy": 1.5}}))
    found = read(tmp_path / "a.json")
    assert found["a"]["atoms"] == made and found["a"]["atoms"].info == made.info
    assert found["a"]["energy"] == 1.5
    (tmp_path / "b.json").write_text(json.dumps({"a": {"atoms_json": "[1]"}}))
    with pytest.raises(DataError, match="b.json"):
        read(tmp_path / "b.json")


class Evil:
    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ([structure(), Evil(os.system, ("exit 3",))], "system"),
        (Evil(eval, ("1",)), "eval"),
        (Evil(getattr, (dict, "__class__")), "getattr"),
        (Evil(getattr, (structure(), "write")), "getattr"),
        ({"a": Path("x")}, "pathlib"),
        (Atoms("H", info={"spacegroup": Spacegroup(1)}), "Spacegroup"),
        (Atoms("H2", [[0, 0, 0], [0, 0, 1]], constraint=FixBondLength(0, 1)), "FixBond"),
        (np.array([structure()], dtype=object), "not of numbers"),
    ],
)
def test_a_pickle_that_asks_for_more_than_data_is_refused(tmp_path, monkeypatch, content, named):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))

    def forbidden(*_):
        raise AssertionError("the pickle was run")

    monkeypatch.setattr(os, "system", forbidden)
    with pytest.raises(DataError, match=f"a.pkl was refused.*{named}"):
        read(tmp_path / "a.pkl")


def array(code: str, shape: object, raw: bytes) -> bytes:
    """The pickle of a numpy array of this type, shape and bytes, true or not."""
    return (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n"
        + pickle.dumps(shape, 0)[:-1]
        + f"cnumpy\ndtype\n(S'{code}'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\n".encode()
        + pickle.dumps(raw, 2)[2:-1]
        + b"tb."
    )


@pytest.mark.parametrize(
    ("code", "shape", "raw"),
    [
        ("f8,O", (1,), b"\1" * 16),  # memory that the file chooses, read as Python's objects
        ("O", (1,), b"\1" * 8),
        ("(1,)O", (1,), b"\1" * 8),
        ("(2,)f8", (1,), b"\1" * 16),
        ("V8", (1,), b"\1" * 8),
        ("U0", (10**12,), b""),
        ("U", (10**12,), b""),
        ("U1", (1,), b"\xff" * 4),
        ("f8", (1,), b"\1" * 16),
        ("f8", (3,), b"\1" * 16),
        ("f8", (-1, -1), b"\1" * 8),
        ("f8", (2**62, 4), b""),
        ("f8", "ab", b"\1" * 8),
    ],
)
def test_an_array_is_of_numbers_that_are_in_the_file(tmp_path, code, shape, raw):
    (tmp_path / "a.pkl").write_bytes(array("f8", (2,), np.arange(2.0).tobytes()))
    assert read(tmp_path / "a.pkl").tolist() == [0, 1]
    (tmp_path / "a.pkl").write_bytes(array(code, shape, raw))
    with pytest.raises(DataError, match=r"a\.pkl"):
        read(tmp_path / "a.pkl")


def test_bools_are_true_or_false_whatever_their_bytes(tmp_path):
    (tmp_path / "a.pkl").write_bytes(array("b1", (3,), b"\0\2\xff"))
    assert read(tmp_path / "a.pkl").view(np.uint8).tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    "program",
    [
        b"}" + b")" + b"\x85" * 100_000 + b"Ns",
        b"Nr\xff\xff\xff\x3f",
        b"]q\0](h\0h\0eq\1" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(1, 60)),
    ],
    ids=["deep", "memo", "shared"],
)
def test_small_pickles_cannot_ask_for_much(tmp_path, program):
    (tmp_path / "a.pkl").write_bytes(b"\x80\x04" + program + b".")
    with pytest.raises(DataError, match="deeper than|under the number|bytes of structures"):
        read(tmp_path / "a.pkl")


def test_a_formula_in_place_of_numbers_is_refused(mson_pickle, tmp_path):
    def make(kind):
        atoms = kind("H2O")
        atoms.arrays["numbers"] = "H200000000"
        return atoms

    (tmp_path / "a.pkl").write_bytes(mson_pickle(make))
    with pytest.raises(DataError, match=r"a\.pkl.*invalid literal"):
        read(tmp_path / "a.pkl")


def test_json_has_a_depth_and_arrays_that_are_in_the_file(tmp_path):
    for text in (
        '{"a":' * 100_000,
        '{"a": {"atoms_json": "{\\"__ndarray__\\": [[1], \\"S1000000000\\", [\\"a\\"]]}"}}',
        '{"a": {"atoms_json": "{\\"__ndarray__\\": [[1000000000000], \\"f8\\", [1]]}"}}',
    ):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(DataError, match=r"a\.json"):
            read(tmp_path / "a.json")


@pytest.mark.parametrize("content", [b"", b"{", b"\x80\x04nonsense", b"not a pickle"])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / "a.pkl").write_bytes(content)
    with pytest.raises(DataError, match="a.pkl is neither"):
        read(tmp_path / "a.pkl")


def test_inputs_of_another_task_say_what_they_should_be():
    for task in INPUTS:
        for other, data in INPUTS.items():
            if other != task:
                with pytest.raises(DataError, match=f"no inputs of {task}, which are"):
                    jobs(task, data)
    with pytest.raises(DataError, match="no inputs of singlepoint"):
        jobs("singlepoint", [structure()])
    with pytest.raises(DataError, match="no structures"):
        jobs("singlepoint", {})


def test_a_structure_without_charge_or_spin_is_named():
    data = copy.deepcopy(INPUTS["spin_gap"])
    del data["oxygen"][3]["atoms"].info["spin"]
    with pytest.raises(DataError, match=r"oxygen / 3: no spin in its info"):
        jobs("spin_gap", data)
    data["oxygen"][3]["atoms"].info["spin"] = 2
    with pytest.raises(DataError, match=r"oxygen / 3: .*do not allow"):
        jobs("spin_gap", data)


# --- Predicting ------------------------------------------------------------------------------


@pytest.fixture
def recipes(monkeypatch):
    """fairchem's own, with as few steps as here; pymatgen is itself or a stand-in."""
    pytest.importorskip("monty", reason="the reference is the `parity` extra")
    found = importlib.util.find_spec("fairchem.core")
    if found is None:
        pytest.skip("the reference is the `parity` extra")

    class MSONAtoms(Atoms):
        def as_dict(self):
            from monty.json import jsanitize

            bare = self.copy()
            bare.info = {}
            return {
                "@module": "pymatgen.io.ase",
                "@class": "MSONAtoms",
                "atoms_json": encode(bare),
                "atoms_info": jsanitize(self.info, strict=True),
            }

    settings = {"optimizer": LBFGS, "fmax": 0.01, "max_steps": 4, "optimizer_kwargs": {}}
    contents = {
        "fairchem.data": {},
        "fairchem.data.omol": {},
        "fairchem.data.omol.orca": {},
        "fairchem.data.omol.orca.calc": {"EVAL_OPT_PARAMETERS": settings},
    }
    try:
        import pymatgen.io.ase  # noqa: F401
    except ImportError:
        contents |= {"pymatgen": {}, "pymatgen.io": {}, "pymatgen.io.ase": {"MSONAtoms": MSONAtoms}}
    for name, content in contents.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    (folder,) = found.submodule_search_locations
    file = Path(folder) / "components" / "calculate" / "recipes" / "omol.py"
    spec = importlib.util.spec_from_file_location("recipes_omol", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("task", INPUTS)
def test_predictions_are_those_of_the_recipes(model, recipes, inputs, tmp_path, task):
    predict(model, task, inputs(task), tmp_path / "out.json")
    calculator = AllScAIPCalculator(model)
    wanted = getattr(recipes, task)(copy.deepcopy(INPUTS[task]), calculator)
    assert_same(json.loads((tmp_path / "out.json").read_text()), json.loads(json.dumps(wanted)))


def test_constraints_count_as_in_the_recipes(model, recipes, tmp_path):
    held = structure("CH3OH")
    held.set_constraint(FixAtoms([0, 1]))
    for task, data in (
        ("singlepoint", {"a": held}),
        ("conformers", {"a": [{"sid": "b", "initial_atoms": held}]}),
    ):
        (tmp_path / "in.pkl").write_bytes(pickle.dumps(data))
        predict(model, task, tmp_path / "in.pkl", tmp_path / f"{task}.json")
        wanted = getattr(recipes, task)(copy.deepcopy(data), AllScAIPCalculator(model))
        found = json.loads((tmp_path / f"{task}.json").read_text())
        assert_same(found, json.loads(json.dumps(wanted)))
    assert found["a"]["b"]["final"]["forces"][0] == [0, 0, 0]


@pytest.mark.parametrize("task", INPUTS)
def test_shapes_and_energies(model, inputs, tmp_path, task):
    predict(model, task, inputs(task), tmp_path / "out.json")
    found = read(tmp_path / "out.json")
    for path, atoms, relax in jobs(task, INPUTS[task]):
        place = found
        for key in path:
            place = place[key]
        first = place["initial"] if relax else place
        (wanted,) = model.predict([atoms])
        assert first["atoms"] == atoms and first["atoms"].info == atoms.info
        assert first["energy"] == pytest.approx(wanted.energy, abs=1e-7)
        np.testing.assert_allclose(first["forces"], wanted.forces, atol=1e-7)
        if relax:
            (wanted,) = model.predict([place["final"]["atoms"]])
            assert place["final"]["energy"] == pytest.approx(wanted.energy, abs=1e-7)
            assert place["final"]["energy"] < first["energy"]


def test_the_same_inputs_as_json_give_the_same(model, inputs, tmp_path):
    predict(model, "spin_gap", inputs("spin_gap"), tmp_path / "a.json")
    data = json.loads((tmp_path / "a.json").read_text())  # results hold `atoms` where inputs do
    (tmp_path / "in.json").write_text(json.dumps(data))
    predict(model, "spin_gap", tmp_path / "in.json", tmp_path / "b.json")
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()


def test_single_points_go_in_batches_filled_by_atoms(model, inputs, tmp_path, monkeypatch):
    seen = []
    plain = AllScAIP.predict

    def counted(self, structures):
        seen.append([len(atoms) for atoms in structures])
        return plain(self, structures)

    monkeypatch.setattr(AllScAIP, "predict", counted)
    predict(model, "singlepoint", inputs("singlepoint"), tmp_path / "a.json", max_atoms=9)
    assert seen == [[3, 6], [5]]
    predict(model, "singlepoint", inputs("singlepoint"), tmp_path / "b.json", max_atoms=4)
    assert seen[2:] == [[3], [6], [5]]


def test_relaxations_that_do_not_converge_are_named(model, inputs, tmp_path, monkeypatch):
    restless = predict(model, "conformers", inputs("conformers"), tmp_path / "a.json")
    assert restless == ["water / w0", "water / w1", "water / w2", "methane / 7"]
    monkeypatch.setattr(leaderboard, "FMAX", 1e6)
    assert predict(model, "conformers", inputs("conformers"), tmp_path / "b.json") == []


class Cliff(Calculator):
    """A slope on which every atom slides; 0.25 Å from its top there is no answer."""

    implemented_properties = ("energy", "forces")

    def __init__(self, top, failure):
        super().__init__()
        self.top, self.failure = top, failure

    def calculate(self, atoms=None, properties=None, system_changes=()):
        super().calculate(atoms, properties, system_changes)
        moved = atoms.positions - self.top
        beyond = np.linalg.norm(moved, axis=1).max() > 0.25
        if beyond and self.failure:
            raise self.failure
        forces = np.full_like(moved, np.nan) if beyond else 1.0 - 0.1 * moved
        self.results = {"energy": -moved.sum() + 0.05 * (moved**2).sum(), "forces": forces}


@pytest.mark.parametrize("failure", [None, StructureError("lost")])
def test_a_relaxation_that_falls_apart_is_recorded_as_it_was_last(failure, monkeypatch):
    monkeypatch.setattr(leaderboard, "STEPS", 100)
    start = structure()
    found = leaderboard.relaxation(start, Cliff(start.positions, failure))
    before, after = (decode(found[when]["atoms"]["atoms_json"]) for when in ("initial", "final"))
    np.testing.assert_array_equal(before.positions, start.positions)
    moved = np.linalg.norm(after.positions - start.positions, axis=1)
    assert moved.min() > 0 and moved.max() <= 0.25
    np.testing.assert_allclose(
        found["final"]["forces"], 1 - 0.1 * (after.positions - start.positions)
    )


def test_settings_are_omol25s(monkeypatch):
    calc = pytest.importorskip("fairchem.data.omol.orca.calc")
    monkeypatch.undo()
    settings = calc.EVAL_OPT_PARAMETERS
    assert settings["optimizer"] is leaderboard.LBFGS and settings["optimizer_kwargs"] == {}
    assert (settings["fmax"], settings["max_steps"]) == (leaderboard.FMAX, leaderboard.STEPS)


# --- Stopping and going on -------------------------------------------------------------------


def test_a_stopped_run_goes_on(model, inputs, tmp_path, monkeypatch):
    file, out = inputs("conformers"), tmp_path / "out.json"
    predict(model, "conformers", file, tmp_path / "whole.json")
    plain, calls = leaderboard.relaxation, []

    def relaxation(start, calculator):
        calls.append(start.info["source"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(start, calculator)

    monkeypatch.setattr(leaderboard, "relaxation", relaxation)
    with pytest.raises(KeyboardInterrupt):
        predict(model, "conformers", file, out)
    assert not out.exists()
    with (tmp_path / "out.json.journal").open("a") as stream:
        stream.write('{"system": ["water", "w')  # as a power cut would leave it
    predict(model, "conformers", file, out)
    assert len(calls) == 3 + 2 and calls[3] == calls[2]
    assert out.read_text() == (tmp_path / "whole.json").read_text()
    predict(model, "conformers", file, out)
    assert len(calls) == 5
    journal = tmp_path / "out.json.journal"
    journal.write_text(journal.read_text().replace("[0.", "[7.", 1))  # another number, still JSON
    with pytest.warns(UserWarning, match="journal: 1 damaged lines, which are computed again"):
        predict(model, "conformers", file, out)
    assert len(calls) == 6
    assert out.read_text() == (tmp_path / "whole.json").read_text()


def test_lines_of_something_else_in_a_journal_are_computed_again(tmp_path):
    """They are JSON, and without a checksum, as those of an older version."""
    journal, header = tmp_path / "a.journal", {"task": "singlepoint"}
    lines = [
        "[1]",
        "3",
        '{"system": 3, "result": {}}',
        '{"system": ["a"]}',
        '{"system": [], "x": {}}',
    ]
    good = leaderboard._line({"system": ["a"], "result": {"energy": 1.0}})
    journal.write_text(leaderboard._line(header) + good + "\n".join(lines) + "\n")
    with pytest.warns(UserWarning, match="5 damaged lines"):
        assert leaderboard._resume(journal, header) == {("a",): {"energy": 1.0}}
    journal.write_text("[1]\n")
    with pytest.raises(RunError, match="damaged in its first line"):
        leaderboard._resume(journal, header)


def test_a_journal_of_another_model_task_or_inputs_is_refused(model, inputs, tmp_path):
    out = tmp_path / "out.json"
    predict(model, "singlepoint", inputs("singlepoint"), out)
    before = out.read_bytes()
    other = copy.deepcopy(model)
    other.energy_mean.fill_(0.5)
    with pytest.raises(RunError, match="of another model: "):
        predict(other, "singlepoint", inputs("singlepoint"), out)
    with pytest.raises(RunError, match="of another task and another inputs: "):
        predict(model, "spin_gap", inputs("spin_gap"), out)
    assert out.read_bytes() == before
    (tmp_path / "out.json.journal").unlink()
    with pytest.raises(FileExistsError, match="another name"):
        predict(model, "singlepoint", inputs("singlepoint"), out)
    with pytest.raises(InputError, match=r"\.json file in a folder that exists"):
        predict(model, "singlepoint", inputs("singlepoint"), tmp_path / "no" / "out.json")


# --- Measuring -------------------------------------------------------------------------------


def point(energy, push=0.0, atoms=None):
    """A single point: energy in meV, each component of the forces in meV/Å."""
    atoms = Atoms("H") if atoms is None else atoms
    forces = np.full((len(atoms), 3), push / 1e3).tolist()
    return {"energy": energy / 1e3, "forces": forces, "atoms": atoms}


def relaxed(energy, length=1.0, axis=2):
    """The end of a relaxation: energy in meV, a molecule of two atoms of this length."""
    positions = np.zeros((2, 3))
    positions[1, axis] = length
    return {"initial": {}, "final": point(energy, 0.0, Atoms("OH", positions))}


def errors_of(task, reference, predicted):
    return pytest.approx(metrics(task, reference, predicted), abs=1e-9)


def test_errors_of_single_points():
    three = Atoms("H3", np.eye(3))
    truth = {"a": point(100.0), "b": point(-50.0, 0.0, three)}
    found = {"a": point(110.0, 1.0), "b": point(-80.0, -2.0, three), "c": point(0.0)}
    assert errors_of("singlepoint", truth, found) == {
        "energy_mae": 20.0,
        "energy_per_atom_mae": 10.0,
        "forces_mae": 1.75,
    }


def test_errors_of_states():
    truth = {"a": {spin: point(100.0) for spin in ("1", "3", "5")}}
    found = {"a": {"1": point(110.0, 1.0), "3": point(80.0, 2.0), "5": point(130.0, 5.0)}}
    assert errors_of("spin_gap", truth, found) == {
        "energy_mae": 20.0,
        "forces_mae": 8 / 3,
        "deltaE_mae": 35.0,
        "deltaF_mae": 3.5,
    }
    truth = {"a": {"-1": {"2": point(0.0)}, "0": {"1": point(0.0)}, "1": {"2": point(0.0)}}}
    found = {"a": {"-1": {"2": point(10.0)}, "0": {"1": point(-20.0)}, "1": {"2": point(40.0)}}}
    result = metrics("ieea", truth, found)
    assert result["energy_mae"] == pytest.approx(70 / 3)
    assert result["deltaE_mae"] == pytest.approx(45.0)


def test_errors_of_a_ligand_in_its_pocket():
    ligand, pocket = Atoms("H", [[5.0, 0, 0]]), Atoms("OH", [[0, 0, 0], [1.0, 0, 0]])
    whole = pocket[:1] + ligand + pocket[1:]  # the ligand amid the pocket's atoms
    atoms = {"ligand": ligand, "pocket": pocket, "ligand_pocket": whole}
    truth = {"a": {part: point(0.0, 0.0, atoms[part]) for part in atoms}}
    values = {"ligand": (10.0, 2.0), "pocket": (20.0, -1.0), "ligand_pocket": (60.0, 1.0)}
    found = {"a": {part: point(*values[part], atoms[part]) for part in atoms}}
    assert errors_of("ligand_pocket", truth, found) == {
        "energy_mae": 30.0,
        "forces_mae": 21 / 18,
        "interaction_energy_mae": 30.0,
        "interaction_forces_mae": 15 / 9,
    }


def test_errors_of_a_strained_ligand():
    def ligand(bound, *conformers):
        gas = {str(i): relaxed(*conformer) for i, conformer in enumerate(conformers)}
        return {"a": {"bioactive": point(bound), "gas_phase": gas}}

    truth = ligand(1000.0, (200.0, 1.0), (500.0, 1.2))  # strain 800 meV
    found = ligand(1000.0, (600.0, 1.0), (300.0, 1.2, 0))  # 700 meV, from the other one
    assert errors_of("ligand_strain", truth, found) == {
        "strain_energy_mae": 100.0,
        "global_min_rmsd": 0.1,
    }


def test_errors_of_conformers_are_of_those_that_look_alike():
    truth = {"a": {"x": relaxed(100.0, 1.3), "y": relaxed(0.0, 1.0), "z": relaxed(300.0, 1.6)}}
    found = {
        "a": {"x": relaxed(20.0, 1.02, 0), "y": relaxed(150.0, 1.32), "z": relaxed(270.0, 1.62)}
    }
    assert errors_of("conformers", truth, found) == {"deltaE_mae": 40.0, "ensemble_rmsd": 0.01}


def test_errors_of_protonation_are_of_one_proton():
    truth = {"a": {f"a_b_{charge}_1": relaxed(0.0) for charge in (0, 1, 2)}}
    found = {"a": {f"a_b_{q}_1": relaxed(e, 1.04) for q, e in ((0, 10.0), (1, 30.0), (2, -5.0))}}
    assert errors_of("protonation", truth, found) == {"deltaE_mae": 27.5, "rmsd": 0.02}


def test_errors_along_a_curve():
    names = [f"short_range_{i}" for i in range(3)] + ["long_range_0", "long_range_1"]
    truth = {"k": {"a": {n: point(e) for n, e in zip(names, (9, 0, 9, 5, -9), strict=True)}}}
    wrong = {"k": {"a": {}}}
    for name, energy, push in zip(names, (24, 5, 4, 30, 36), (1, 2, 3, 6, 2), strict=True):
        wrong["k"]["a"][name] = point(energy, push)
    assert errors_of("distance_scaling", truth, wrong) == {
        "sr_ddE_mae": 10 / 3,  # |15 − 5| and |−5 − 5|, over three points
        "sr_ddF_mae": 1.0,
        "lr_ddE_mae": 15.0,  # |25 − 5| and |45 − 5|, over two
        "lr_ddF_mae": 3.0,
    }


def test_a_model_against_itself_makes_no_error(model, inputs, tmp_path):
    for task in INPUTS:
        predict(model, task, inputs(task), tmp_path / f"{task}.json")
        found = read(tmp_path / f"{task}.json")
        assert max(metrics(task, found, found).values()) < 1e-6


@pytest.mark.parametrize("task", INPUTS)
def test_errors_are_those_of_the_evaluator(model, inputs, tmp_path, task):
    evaluator = pytest.importorskip("fairchem.data.omol.modules.evaluator")
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    for weight in other.parameters():
        weight += 0.1 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    files = [tmp_path / "truth.json", tmp_path / "found.json"]
    predict(other, task, inputs(task), files[0])
    predict(model, task, inputs(task), files[1])
    names = {
        "conformers": "geom_conformers",
        "protonation": "protonation_energies",
        "ieea": "unoptimized_ie_ea",
        "spin_gap": "unoptimized_spin_gap",
    }
    function = getattr(evaluator, names.get(task, task), None)
    if function is None:
        pytest.skip(f"this evaluator has no {task}")
    wanted = function(*(json.loads(file.read_text()) for file in files))
    found = metrics(task, *(read(file) for file in files))
    assert set(found) == {name for name in wanted if not name.endswith("_dist")}
    for name, value in found.items():
        assert value > 0
        assert value == pytest.approx(wanted[name] * (1 if "rmsd" in name else 1e3), rel=1e-6)


def test_what_cannot_be_compared_says_why():
    found = {"a": {"1": point(0.0), "3": point(0.0)}}
    with pytest.raises(DataError, match=r"2 structures .* not in the inputs: b / 1, b / 3"):
        metrics("spin_gap", found | {"b": found["a"]}, found)
    with pytest.raises(DataError, match="no results of conformers"):
        metrics("conformers", found, found)
    with pytest.raises(DataError, match="no results at a / note"):
        metrics("spin_gap", {"a": {"note": "x"}}, found)
    short = {"a": {"1": point(0.0), "3": point(0.0, 0.0, Atoms("H2"))}}
    with pytest.raises(DataError, match="no results of spin_gap that can be compared"):
        metrics("spin_gap", short, {"a": {"1": point(0.0), "3": point(0.0, 0.0, Atoms("H3"))}})


def test_table_has_units():
    found = {"deltaE_mae": 1.0, "rmsd": 0.1, "forces_mae": 2.0, "sr_ddF_mae": 3.0}
    lines = table(found | {"energy_per_atom_mae": 4.0}).splitlines()
    assert lines[2:] == [
        "| deltaE_mae | 1.000 | meV |",
        "| rmsd | 0.100 | Å |",
        "| forces_mae | 2.000 | meV/Å |",
        "| sr_ddF_mae | 3.000 | meV/Å |",
        "| energy_per_atom_mae | 4.000 | meV/atom |",
    ]


def test_the_command(model, inputs, tmp_path, capsys):
    save_model(copy.deepcopy(model).float(), tmp_path / "model.safetensors")
    parser = argparse.ArgumentParser()
    leaderboard.add_arguments(parser)

    def command(task, out, *more):
        arguments = [task, tmp_path / "model.safetensors", inputs(task), "--out", tmp_path / out]
        leaderboard.run(parser.parse_args([str(one) for one in (*arguments, *more)]))
        return capsys.readouterr().out

    assert "written" in command("conformers", "a.json", "--device", "cpu")
    text = command("conformers", "b.json", "--reference", tmp_path / "a.json")
    assert "4 relaxations ended before 0.01 eV/Å" in text
    assert "| ensemble_rmsd | 0.000 | Å |" in text
    reference = json.loads((tmp_path / "a.json").read_text())
    reference["ammonia"] = reference["water"]
    (tmp_path / "r.json").write_text(json.dumps(reference))
    with pytest.raises(DataError, match="ammonia / w0"):
        command("conformers", "c.json", "--reference", tmp_path / "r.json")
    assert not (tmp_path / "c.json.journal").exists()  # said before the work, not after
    with pytest.raises(SystemExit):
        parser.parse_args(["boiling", "lite", "in.pkl", "--out", "out.json"])
