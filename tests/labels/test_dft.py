"""Labels by PySCF are physical, the VV10 kernel is PySCF's own, and the queue loses nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms, units
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator

pytest.importorskip("pyscf")
pytest.importorskip("numba")

from allscaip_lite.cli import main  # noqa: E402
from allscaip_lite.data.aselmdb import Dataset, checksum, write_aselmdb  # noqa: E402
from allscaip_lite.errors import InputError  # noqa: E402
from allscaip_lite.labels import dft  # noqa: E402
from allscaip_lite.labels.dft import (  # noqa: E402
    FreeAtom,
    LabelFailed,
    Level,
    collect,
    job_file,
    label,
)

# The functional of the data set, at a price a test can pay.
SMALL = Level(basis="def2-svp", grid=2)


def in_state(atoms: Atoms, charge: int = 0, spin: int = 1) -> Atoms:
    atoms.info = {"charge": charge, "spin": spin}
    return atoms


def energy(atoms: Atoms, level: Level = SMALL) -> float:
    return label(atoms, level).get_potential_energy()


# --- VV10 ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def densities():
    """Density and gradient (4, P) of water on a small grid, weights and points, in atomic units."""
    from pyscf import dft as pyscf_dft
    from pyscf import gto

    water = molecule("H2O")
    mol = gto.M(atom=list(zip(water.symbols, water.positions, strict=True)), basis="def2-svp")
    grid = pyscf_dft.gen_grid.Grids(mol)
    grid.level = 0
    grid.build()
    matrix = mol.RHF().density_fit().run(verbose=0, max_cycle=3).make_rdm1()
    orbitals = mol.eval_gto("GTOval_sph_deriv1", grid.coords)
    rho = pyscf_dft.numint.eval_rho(mol, orbitals, matrix, xctype="GGA")
    return rho, grid.weights, grid.coords


def test_the_vv10_kernel_gives_pyscf_s_energy_and_potential(densities):
    from pyscf.dft import numint

    from allscaip_lite.labels.vv10 import energy_and_potential

    rho, weights, coords = densities
    ours = energy_and_potential(rho, coords, rho, weights, coords, (6.0, 0.01))
    theirs = numint._vv10nlc(rho, coords, rho, weights, coords, (6.0, 0.01))
    assert np.abs(theirs[0]).max() > 1e-3
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-9, atol=1e-13)


def test_the_vv10_kernel_gives_pyscf_s_grid_forces(densities):
    from pyscf.grad import rks

    from allscaip_lite.labels.vv10 import pair_gradient

    rho, weights, coords = densities
    here, there = slice(0, 800), slice(800, None)  # as if two atoms' points
    arguments = (rho[:, here], coords[here], rho[:, there], weights[there], coords[there])
    ours, beta = pair_gradient(*arguments, (6.0, 0.01))
    theirs, expected = rks._vv10nlc_grad(*arguments, (6.0, 0.01))
    assert np.abs(theirs).max() > 1e-6
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-15)
    assert beta == pytest.approx(expected)


def test_products_by_numpy_are_pyscf_s():
    from pyscf import lib

    from allscaip_lite.labels.faster_pyscf import _product, products_by_numpy

    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(30, 20)), rng.normal(size=(20, 10))
    start = rng.normal(size=(30, 10))
    for left in (a, np.asfortranarray(a)):
        for right in (b, np.asfortranarray(b)):
            for alpha, beta in ((1, 0), (2, 0), (1, 1), (-0.5, 3)):
                expected = lib.dot(left, right, alpha, start.copy(), beta)
                with products_by_numpy():
                    found = lib.dot(left, right, alpha, start.copy(), beta)
                np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    assert lib.numpy_helper._dgemm is not _product
    with products_by_numpy():  # what is to be written over may be no number
        found = lib.dot(a, b, 2, np.full((30, 10), np.nan))
    np.testing.assert_allclose(found, 2 * a @ b, rtol=0, atol=1e-12)


def test_small_blocks_and_products_by_numpy_change_no_label(monkeypatch):
    import contextlib

    from pyscf.dft import numint

    from allscaip_lite.labels import faster_pyscf

    methanol = in_state(molecule("CH3OH"))
    ours = label(methanol, SMALL)
    monkeypatch.setattr(faster_pyscf, "SmallBlocks", numint.NumInt)
    monkeypatch.setattr(faster_pyscf, "products_by_numpy", contextlib.nullcontext)
    stock = label(methanol, SMALL)
    assert ours.get_potential_energy() == pytest.approx(stock.get_potential_energy(), abs=1e-8)
    np.testing.assert_allclose(ours.get_forces(), stock.get_forces(), rtol=0, atol=1e-5)


def test_pyscf_has_its_own_functions_back_afterwards():
    from pyscf.dft import numint

    from allscaip_lite.labels.vv10 import compiled_vv10

    stock = numint._vv10nlc
    with pytest.raises(KeyError), compiled_vv10():
        assert numint._vv10nlc is not stock
        raise KeyError
    assert numint._vv10nlc is stock


# --- labels -------------------------------------------------------------------------------------


def test_forces_are_the_energy_s_derivative_and_sum_to_zero():
    water = in_state(molecule("H2O"))
    water.rattle(0.1, seed=2)
    labelled = label(water, SMALL)
    forces, step = labelled.get_forces(), 2e-3
    np.testing.assert_allclose(forces.sum(0), 0, atol=1e-4)
    for atom, axis in ((0, 2), (1, 1)):
        sides = []
        for sign in (1, -1):
            moved = water.copy()
            moved.positions[atom, axis] += sign * step
            sides.append(energy(moved))
        assert forces[atom, axis] == pytest.approx(-(sides[0] - sides[1]) / (2 * step), abs=2e-3)


def test_a_label_says_what_was_computed():
    hydroxyl = in_state(Atoms("OH", [[0, 0, 0], [0, 0, 0.97]]), 0, 2)
    hydroxyl.info["data_id"] = "radicals"
    labelled = label(hydroxyl, SMALL)
    info = labelled.info
    assert (info["data_id"], info["charge"], info["spin"]) == ("radicals", 0, 2)
    assert (info["num_atoms"], info["num_electrons"], info["composition"]) == (2, 9, "HO")
    assert info["unrestricted"] and info["s_squared"] == pytest.approx(0.75, abs=0.02)
    assert info["mulliken_spins"].sum() == pytest.approx(1, abs=1e-4)
    assert info["lowdin_charges"].sum() == pytest.approx(0, abs=1e-4)
    assert info["lowdin_spins"][0] > 0.8  # the electron is oxygen's
    assert len(info["homo_lumo_gap"]) == len(info["homo_energy"]) == 2
    assert 1.5 < np.linalg.norm(info["dipole"]) / units.Debye < 2.1  # experiment: 1.66 D
    assert info["dipole"][2] > 0  # from oxygen to hydrogen
    assert info["nl_energy"] > 0
    assert info["warnings"] == []


def test_an_ion_s_dipole_is_about_the_centre_of_nuclear_charge():
    ion = in_state(Atoms("Li", [[3.0, 0, 0]]), 1)
    pair = in_state(Atoms("LiH", [[3.0, 0, 0], [4.6, 0, 0]]))
    np.testing.assert_allclose(label(ion, SMALL).info["dipole"], 0, atol=1e-4)
    assert label(pair, SMALL).info["dipole"][0] < -0.5  # e Å: lithium is positive


def test_triplet_oxygen_lies_below_singlet_and_a_free_atom_has_no_force():
    oxygen = Atoms("O2", [[0, 0, 0], [0, 0, 1.21]])
    triplet = energy(in_state(oxygen.copy(), 0, 3))
    assert triplet < energy(in_state(oxygen.copy())) - 0.3
    (atom,) = FreeAtom("O").structures()
    free = label(atom, SMALL)
    assert not free.get_forces().any()
    assert 4.0 < 2 * free.get_potential_energy() - triplet < 6.5  # eV; experiment 5.2


def test_a_bond_that_breaks_ends_as_two_atoms():
    apart = in_state(Atoms("H2", [[0, 0, 0], [0, 0, 4.0]]))
    labelled = label(apart, SMALL)
    atom = in_state(Atoms("H"), 0, 2)
    assert labelled.get_potential_energy() == pytest.approx(2 * energy(atom), abs=0.02)
    assert labelled.info["unrestricted"] and labelled.info["s_squared"] > 0.9
    spins = labelled.info["lowdin_spins"]
    assert spins[0] == pytest.approx(-spins[1], abs=1e-3) and abs(spins[0]) > 0.9
    assert any("spin contamination" in line for line in labelled.info["warnings"])
    together = label(in_state(Atoms("H2", [[0, 0, 0], [0, 0, 0.74]])), SMALL)
    assert not together.info["unrestricted"]


def test_a_multiplicity_that_the_electrons_forbid_is_refused():
    with pytest.raises(LabelFailed, match="charge 0, multiplicity 2"):
        label(in_state(molecule("H2O"), 0, 2), SMALL)


# --- the queue ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """H2 of some length; one of no length, which no method can label."""

    length: float
    split: str = "train"

    @property
    def name(self) -> str:
        return f"H2 {self.length}"

    def structures(self) -> list[Atoms]:
        pair = in_state(Atoms("H2", [[0, 0, 0], [0, 0, self.length]]))
        if not self.length:
            return [in_state(pair, 0, 2)]
        return [pair]


ENTRIES = [
    FreeAtom("H"),
    *(Entry(0.6 + 0.02 * i, "train") for i in range(5)),
    Entry(0.9, "val"),
    Entry(0.0),
    Entry(1.0, "test"),
]
SCRIPT = """
import sys
from tests.test_dft import ENTRIES, SMALL
from allscaip_lite.labels.dft import label_all
if __name__ == "__main__":
    label_all(sys.argv[1], ENTRIES, SMALL, workers=int(sys.argv[2]))
"""
ROOT = Path(__file__).resolve().parents[2]


def start(folder: Path, workers: int) -> subprocess.Popen:
    arguments = [sys.executable, "-c", SCRIPT, str(folder), str(workers)]
    return subprocess.Popen(arguments, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE)


def test_a_killed_queue_goes_on_and_two_runs_share_the_work(tmp_path):
    process = start(tmp_path, 1)
    store = tmp_path / "jobs"
    while not list(store.glob("*.aselmdb")) and process.poll() is None:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    first = {path.name: path.stat().st_mtime_ns for path in store.glob("*.aselmdb")}
    assert 0 < len(first) < 8

    crews = [start(tmp_path, 1) for _ in range(2)]
    for crew in crews:
        words = crew.communicate()[1].decode()
        assert crew.returncode == 0, words
    assert "9 of 9 (1 failed)" in words
    assert len(list(store.glob("*.aselmdb"))) == 8
    assert not list(store.glob("*.claim")) and not list(store.glob("*.partial"))
    for name, written in first.items():
        assert (store / name).stat().st_mtime_ns == written, "a label was made twice"

    counts = collect(tmp_path, ENTRIES, SMALL)
    assert counts == {"train": 5, "val": 1, "test": 1}
    lengths = [atoms.get_distance(0, 1) for atoms in Dataset(tmp_path / "train.aselmdb")]
    np.testing.assert_allclose(lengths, [0.6, 0.62, 0.64, 0.66, 0.68])
    failed = json.loads((tmp_path / "failed.json").read_text())
    assert list(failed) == ["H2 0.0"] and "multiplicity 2" in failed["H2 0.0"]
    references = json.loads((tmp_path / "references.json").read_text())
    assert references == {"H": pytest.approx(-13.6, abs=0.3)}
    sums = json.loads((tmp_path / "checksums.json").read_text())
    assert sums["train"] == checksum(Dataset(tmp_path / "train.aselmdb"))
    again = label(ENTRIES[1].structures()[0], SMALL).get_potential_energy()
    stored = Dataset(job_file(tmp_path, ENTRIES[1], SMALL).with_suffix(".aselmdb"))[0]
    assert stored.get_potential_energy() == pytest.approx(again, abs=1e-9)


def test_what_a_worker_left_that_was_killed_just_after_a_label_is_cleared(tmp_path):
    """Of a file that is complete under its name; that of another run, still at work, stays."""
    dft.label_all(tmp_path, ENTRIES[:1], SMALL)
    done, other = (job_file(tmp_path, entry, SMALL) for entry in ENTRIES[:2])
    for stem in (done, other):
        stem.with_suffix(".claim").touch()
        (stem.parent / f".{stem.name}.aselmdb.partial").mkdir()
    dft.label_all(tmp_path, ENTRIES[:1], SMALL)
    left = {path.name for path in done.parent.iterdir()}
    theirs = {f"{other.name}.claim", f".{other.name}.aselmdb.partial"}
    assert left == {f"{done.name}.aselmdb", *theirs}


def test_what_is_labelled_so_far_can_be_collected(tmp_path):
    dft.label_all(tmp_path, ENTRIES[:2], SMALL)
    assert collect(tmp_path, ENTRIES, SMALL) == {"train": 1, "val": 0, "test": 0}
    assert not (tmp_path / "val.aselmdb").exists()


def test_a_queue_takes_over_a_set_that_was_collected(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    dft.label_all(first, ENTRIES[:3], SMALL)
    collect(first, ENTRIES, SMALL)
    assert dft.take_over(second, ENTRIES, first, SMALL) == 3
    assert dft.take_over(second, ENTRIES, first, SMALL) == 0, "what is there stays"
    collect(second, ENTRIES, SMALL)
    for name in ("checksums.json", "references.json"):
        assert (second / name).read_text() == (first / name).read_text()
    assert [a.info["entry"] for a in Dataset(second / "train.aselmdb")] == ["H2 0.6", "H2 0.62"]


def test_a_queue_refuses_what_is_not_its_own(tmp_path):
    with pytest.raises(FileNotFoundError, match="--known takes the folder"):
        dft.take_over(tmp_path, ENTRIES, tmp_path / "none")
    labelled = label(ENTRIES[1].structures()[0], SMALL)
    labelled.info["entry"] = ENTRIES[1].name
    write_aselmdb(tmp_path / "train.aselmdb", [labelled])
    with pytest.raises(ValueError, match="no labels for this queue"):
        dft.take_over(tmp_path, ENTRIES, tmp_path)


def test_another_level_is_another_job(tmp_path):
    assert job_file(tmp_path, ENTRIES[0], SMALL) != job_file(tmp_path, ENTRIES[0])
    assert job_file(tmp_path, ENTRIES[0]) != job_file(tmp_path, ENTRIES[1])


# --- one's own structures ------------------------------------------------------------------------


def test_one_s_own_structures_are_labelled_and_xtb_stands_beside(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tblite")
    ase.io.write(tmp_path / "mine.xyz", [molecule("H2"), molecule("H2")])
    ion = in_state(Atoms("H2", [[0, 0, 0], [0, 0, 1.1]]), charge=1, spin=2)
    ion.calc = SinglePointCalculator(ion, energy=7.0, forces=np.zeros((2, 3)))
    write_aselmdb(tmp_path / "ion.aselmdb", [ion])
    for name in ("label_all", "collect"):
        monkeypatch.setattr(dft, name, partial(getattr(dft, name), level=SMALL))
    files = [str(tmp_path / "mine.xyz"), str(tmp_path / "ion.aselmdb")]
    command = ["data", "dft", "--out", str(tmp_path / "out"), "--structures", *files]
    assert main(command) == 0
    assert capsys.readouterr().out == "labelled: 3 structures\n"
    first, twin, positive = Dataset(tmp_path / "out" / "labelled.aselmdb")
    assert first.get_potential_energy() == twin.get_potential_energy()
    assert first.get_potential_energy() == energy(in_state(molecule("H2")))
    assert (positive.info["charge"], positive.info["spin"]) == (1, 2)
    assert positive.get_potential_energy() - energy(ion) == pytest.approx(0, abs=1e-6)
    assert "wb97m_v" in positive.info["label"] and positive.info["source"].endswith("(H2)")
    assert np.abs(positive.info["xtb_forces"] - positive.get_forces()).max() < 2  # eV/Å


def test_structures_that_cannot_be_labelled_are_refused(tmp_path):
    crystal, wrong = molecule("H2", pbc=True, cell=[4, 4, 4]), in_state(molecule("H2"), spin=2)
    for atoms, what in ((crystal, "is periodic"), (wrong, r'"spin"\] = 2 is the multi')):
        ase.io.write(tmp_path / "it.extxyz", atoms)
        with pytest.raises(InputError, match=what):
            dft.read_given([tmp_path / "it.extxyz"])
    with pytest.raises(FileNotFoundError, match="no such file"):
        dft.read_given([tmp_path / "none.xyz"])
    with pytest.raises(LabelFailed, match="I needs a core potential"):
        label(in_state(Atoms("HI", [[0, 0, 0], [0, 0, 1.6]])), SMALL)
