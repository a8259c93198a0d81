"""GPAW's labels are derivatives of its energy; `data/gpaw` plans fairly and keeps its splits."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, fcc111, molecule
from ase.calculators.singlepoint import SinglePointCalculator

from allscaip_lite.data.aselmdb import Dataset, write_aselmdb
from allscaip_lite.labels import LabelError, gpaw

make = importlib.import_module("data.gpaw.make")


def test_k_points_follow_the_reciprocal_cell_and_vacuum_has_one():
    cell = bulk("Cu", cubic=True, a=3.6)
    assert gpaw.k_points(cell, 2.0) == (4, 4, 4)
    assert gpaw.k_points(cell.repeat((2, 1, 1)), 2.0) == (2, 4, 4)
    slab = fcc111("Cu", (1, 2, 3), vacuum=4.0)
    assert gpaw.k_points(slab, 2.0) == (6, 3, 1)
    slab.positions[:, 2] += 6.0  # across the border of the cell
    slab.pbc = True
    assert gpaw.k_points(slab, 2.0) == (6, 3, 1)
    assert gpaw.k_points(molecule("H2O", vacuum=4.0), 2.0) == (1, 1, 1)


@pytest.mark.parametrize(
    ("atoms", "words"),
    [
        (Atoms("Cu", cell=[3, 3, 3], pbc=True, info={"charge": 1}), "neutral"),
        (molecule("H2O"), "a cell"),
        (molecule("H2O", vacuum=2.0), "4.0 Å of vacuum"),
        (Atoms("He2", [[1, 4, 4], [9, 4, 4]], cell=[10, 8, 8]), "2.0 Å of vacuum"),
        (molecule("CH3", vacuum=5.0), "unpaired"),
    ],
)
def test_what_is_not_labelled_is_refused(atoms, words):
    with pytest.raises(LabelError, match=words):
        gpaw.k_points(atoms, 2.0)


def test_only_structures_with_a_magnetic_element_are_spin_polarised():
    assert gpaw.moments(bulk("NaCl", "rocksalt", a=5.6)) is None
    np.testing.assert_array_equal(gpaw.moments(bulk("NiAl", "cesiumchloride", a=2.9)), [1.0, 0.0])


@pytest.mark.slow
def test_forces_and_stress_are_the_energy_s_derivatives():
    pytest.importorskip("gpaw")
    level = replace(gpaw.LEVELS["pbe"], density=1.2)
    atoms = bulk("MgO", "rocksalt", a=4.3)
    atoms.positions[0, 0] += 0.1
    done = gpaw.label(atoms, level)
    assert (done.info["spin"], done.info["magnetic_moment"]) == (1, 0)
    assert done.info["label"].startswith("PBE, 600 eV")

    def slope(change, step):
        energies = []
        for sign in (1, -1):
            moved = atoms.copy()
            change(moved, sign * step)
            energies.append(gpaw.label(moved, level).get_potential_energy())
        return (energies[0] - energies[1]) / (2 * step)

    def shift(moved, step):
        moved.positions[0, 0] += step

    def stretch(moved, step):
        moved.set_cell(moved.cell.array * (1 + step), scale_atoms=True)

    assert abs(done.get_forces()[0, 0]) > 0.15
    assert done.get_forces()[0, 0] == pytest.approx(-slope(shift, 0.01), abs=0.01)
    # at a fixed cutoff the number of plane waves jumps with the cell; 0.003 eV/Å³ is 0.5 GPa
    strained = slope(stretch, 0.02) / (3 * atoms.get_volume())
    assert done.get_stress()[:3].mean() == pytest.approx(strained, abs=0.003)
    assert gpaw.PULAY["O"] / atoms.get_volume() > 0.02  # what GPAW's own stress is off by


@pytest.mark.parametrize(
    ("symbol", "moment", "gap", "then"),
    [
        ("Fe", 2.1, 0.0, [True]),
        ("Fe", 0.05, 0.0, [False]),
        ("S", 0.0, 2.0, []),
        ("S", 0.0, 0.4, [False]),
        ("Si", 0.0, 2.0, [False]),  # no ion
        ("F", 0.0, 9.0, [False]),  # bands are half full
    ],
)
def test_few_k_points_tell_whether_more_and_spin_are_needed(monkeypatch, symbol, moment, gap, then):
    pytest.importorskip("gpaw")
    calls = []

    class Known(SinglePointCalculator):
        def get_homo_lumo(self):
            return np.array([0.0, gap])

    def computed(atoms, level, counts, start):
        calls.append((counts, start is not None))
        results = {"energy": 0.0, "free_energy": 0.0, "forces": np.zeros((1, 3))}
        results |= {"stress": np.zeros(6), "magmoms": np.full(1, moment), "magmom": moment}
        work = atoms.copy()
        work.calc = Known(work, **results)
        return work

    monkeypatch.setattr(gpaw, "_computed", computed)
    gpaw.label(bulk(symbol, "bcc", a=2.83))
    assert calls == [((5, 5, 5), symbol == "Fe"), *(((10, 10, 10), spin) for spin in then)]


@pytest.mark.parametrize("kind", ["crystals", "adsorbates"])
def test_a_plan_is_the_same_each_time_and_its_beginnings_are_fair(kind):
    plan = make.SETS[kind]()
    assert [entry.name for entry in plan] == [entry.name for entry in make.SETS[kind]()]
    jobs = make.jobs_of(plan)
    assert len({job.file for job in jobs}) == len(jobs) > 300
    sampled = [entry for entry in plan if kind == "crystals" or getattr(entry, "adsorbate", "")]
    whole = Counter(entry.split for entry in sampled)
    half = Counter(entry.split for entry in sampled[: len(sampled) // 2])
    for split in ("train", "val", "test"):
        assert abs(half[split] - whole[split] / 2) <= 2 and whole[split] > 40


def test_what_is_held_out_is_held_out_here_too():
    splits = {entry.crystal.name: entry.split for entry in make.crystalline()}
    assert splits["Pd fcc"] == splits["Na-Cl rock salt"] == "test"
    slabs = {(e.metal, e.adsorbate): e.split for e in make.adsorbed() if e.split != "references"}
    assert {split for (metal, _), split in slabs.items() if metal == "Pd"} == {"test"}
    assert (slabs["Al", "N"], slabs["Al", "O"]) == ("val", "train")  # as the compound Al-N


@pytest.fixture
def unrelaxed(monkeypatch):
    """Crystals at the table's lattice constant, and no relaxation of slabs."""
    built = lambda crystal: make.crystals.built(crystal.prototype, crystal.elements, crystal.a)
    monkeypatch.setattr(make, "relaxed", built)


def test_crystals_are_small_and_repeatable(unrelaxed):
    for entry in make.crystalline()[::15]:
        atoms, again = entry.structure(), entry.structure()
        assert 1 <= len(atoms) <= max(entry.most_atoms, len(make.relaxed(entry.crystal)))
        assert np.array_equal(atoms.positions, again.positions)
        assert min(gpaw.k_points(atoms, 2.0)) > 1


def test_a_vacancy_makes_no_chemical_system_of_another_split(unrelaxed):
    """Li-C-S without its carbon is Li-S, of the validation set."""
    name = "Li-C-S ordered fluorite"
    entries = [entry for entry in make.crystalline() if entry.crystal.name == name]
    assert entries
    for entry in entries:
        symbols = entry.structure().get_chemical_symbols()
        assert make.crystals.split_of(symbols) == entry.split == "train"


@pytest.mark.parametrize("adsorbate", make.ADSORBATES)
def test_an_adsorbate_touches_the_surface_with_its_first_atom(unrelaxed, adsorbate):
    for face in make.FACES:
        atoms = make.OnSurface("Cu", face, adsorbate).start()
        assert len(atoms) == 12 + len(make.ADSORBATES[adsorbate])
        gaps = np.sort(atoms.get_distances(12, range(12), mic=True))
        radii = make.crystals.covalent_radii[atoms.numbers[[0, 12]]].sum()
        assert gaps[0] == pytest.approx(radii, abs=0.15)
        assert atoms.positions[12:, 2].min() == atoms.positions[12, 2]
        assert gpaw.k_points(atoms, 2.0)[2] == 1


def test_adsorption_energies_are_differences_of_labels(monkeypatch, tmp_path):
    energies = {"H2": -6.8, "H2O": -14.2, "CO": -14.8, "N2": -16.6, "Cu(111)": -40.0}

    def labelled(entry):
        atoms = Atoms(getattr(entry, "metal", entry.name) + getattr(entry, "adsorbate", ""))
        atoms.positions[:, 0] = np.arange(len(atoms))
        atoms.info = {"charge": 0, "spin": 1, "slab": getattr(entry, "slab", entry.name)}
        energy = energies[atoms.info["slab"]] - 20.0 * (len(atoms) == 3 and "Cu" in atoms.symbols)
        forces = np.zeros((len(atoms), 3))
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
        return [atoms]

    entries = [*map(make.Gas, make.GASES), make.OnSurface("Cu", "111")]
    entries.append(make.OnSurface("Cu", "111", "CO"))
    for job in make.jobs_of(entries):
        (tmp_path / "jobs").mkdir(exist_ok=True)
        make.queue._do(job, tmp_path / "jobs" / job.file, labelled)
    monkeypatch.setitem(make.SETS, "adsorbates", lambda: entries)
    make.make(tmp_path, "adsorbates", collect_only=True)
    found = json.loads((tmp_path / "references.json").read_text())
    assert (found["H"], found["O"], found["N"]) == pytest.approx((-3.4, -7.4, -8.3))
    assert found["C"] == pytest.approx(-14.8 + 7.4)
    _, atoms = Dataset(tmp_path / "train.aselmdb")
    assert make.adsorption_energy(atoms, found) == pytest.approx(-20.0 + 14.8)


def test_the_table_of_convergence_has_stresses_where_they_are_labelled(tmp_path):
    def labelled(entry):
        atoms = bulk("Cu", a=3.6)
        results = {"energy": entry.level.cutoff / 1e3, "forces": np.zeros((1, 3))}
        if entry.level.stress:
            results["stress"] = np.full(6, entry.level.cutoff / 1e6)
        atoms.calc = SinglePointCalculator(atoms, **results)
        atoms.info = {"charge": 0, "spin": 2}
        return [atoms]

    jobs = [job for job in make.jobs_of(make.converging()) if "Cu" in job.task.name]
    assert len(jobs) == 6  # the crystal, by PBE, and the slab, by RPBE
    for job in jobs:
        make.queue._do(job, tmp_path / job.file, labelled)
    crystal, _, slab, _ = make.convergence_table(tmp_path, jobs).splitlines()[2:]
    assert [cell.strip() for cell in crystal.split("|")[3:6]] == ["-300.0", "0.0", "0.05"]
    assert [cell.strip() for cell in slab.split("|")[3:6]] == ["-300.0", "0.0", ""]


def test_chgnet_is_measured_after_a_fit_of_the_elements(monkeypatch, tmp_path, capsys):
    measure = importlib.import_module("data.gpaw.measure")
    structures, shifts = [], {"Cu": -3.0, "Au": 5.0}
    for symbols in ("Cu", "Au", "CuAu", "Cu3Au"):
        atoms = Atoms(symbols, cell=np.eye(3) * 4.0, pbc=True)
        atoms.positions[:, 0] = np.arange(len(atoms))
        atoms.info |= {"charge": 0, "spin": 1 + atoms.numbers.sum() % 2, "data_id": "crystal"}
        results = {"energy": 1.0, "forces": np.zeros((len(atoms), 3)), "stress": np.zeros(6)}
        atoms.calc = SinglePointCalculator(atoms, **results)
        structures.append(atoms)

    def results_of(chosen):
        return [
            {
                "energy": 1.0 + sum(shifts[symbol] for symbol in atoms.symbols),
                "forces": np.full((len(atoms), 3), 0.02),
                "stress": np.full(6, 1.5 * units.GPa),
            }
            for atoms in chosen
        ]

    monkeypatch.setattr(measure, "results_of", results_of)
    write_aselmdb(tmp_path / "test.aselmdb", structures)
    for least, energy in ((4, "0.0"), (5, "–")):
        monkeypatch.setattr(measure, "MIN_STRUCTURES", least)
        assert measure.main([str(tmp_path)]) == 0
        row = [cell.strip() for cell in capsys.readouterr().out.splitlines()[-1].split("|")]
        assert row[1:-1] == ["all", "4", energy, energy, "20.0", "20.0", "15000.0", "15000.0"]
