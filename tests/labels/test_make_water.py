"""The set `data/water`: repeatable, and no trajectory in two splits."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms, units
from test_spcfw import box, cluster

from allscaip_lite.data.aselmdb import SPLITS, Dataset
from allscaip_lite.labels import LabelError
from allscaip_lite.spcfw import SPCFw

make = importlib.import_module("data.water.make")
Trajectory, plan, sample = make.Trajectory, make.plan, make.sample


# --- the sampler's potential --------------------------------------------------------------------


def by_openmm(atoms: Atoms, cutoff: float) -> tuple[float, np.ndarray]:
    """Energy in eV and forces in eV/Å."""
    openmm = pytest.importorskip("openmm")
    system = make.openmm_system(atoms, cutoff=cutoff, tolerance=1e-6)
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), platform)
    context.setPositions(atoms.positions / 10)
    state = context.getState(getEnergy=True, getForces=True)
    kilojoule = units.kJ / units.mol
    forces = state.getForces(asNumpy=True)._value * kilojoule / 10
    return state.getPotentialEnergy()._value * kilojoule, forces


@pytest.mark.parametrize("small, copies", [(box(whole=True), 4), (cluster(), 1)])
def test_openmm_agrees(small, copies):
    """Its supercell is wide enough for a cutoff of 9 Å, past which it leaves out repulsion."""
    if copies > 1:  # OpenMM wants vectors in its own, lower triangular form
        form, turn = small.cell.standard_form()
        small = Atoms(small.numbers, small.positions @ turn.T, cell=form, pbc=True)
        small.calc = SPCFw()
    large = small.repeat(copies)
    energy, forces = by_openmm(large, cutoff=9.0)
    assert energy / copies**3 / (len(small) // 3) == pytest.approx(
        small.get_potential_energy() / (len(small) // 3), abs=2e-5
    )
    assert forces[: len(small)] == pytest.approx(small.get_forces(), abs=2e-4)


@pytest.mark.parametrize("waters", [32, 48])
def test_the_pressure_that_openmm_leaves_out(waters):
    """In the mean over boxes: minus the slope, by volume, of our energy less OpenMM's."""
    found, expected = [], []
    for frame in Dataset(Path(__file__).resolve().parents[2] / "data/water/train.aselmdb"):
        if len(frame) != 3 * waters or frame.info["data_id"] != "water_npt":
            continue
        missing, volumes = [], []
        for scale in (0.995, 1.005):
            scaled = frame.copy()
            scaled.set_cell(scale * frame.cell, scale_atoms=True)
            scaled.calc = SPCFw()
            energy, _ = by_openmm(scaled, cutoff=make._cutoff(frame))
            missing.append(scaled.get_potential_energy() - energy)
            volumes.append(scaled.get_volume())
        found.append(-np.diff(missing)[0] / np.diff(volumes)[0] / units.bar)
        expected.append(make.missing_pressure(frame))
    assert len(found) >= 5 and np.mean(found) == pytest.approx(np.mean(expected), rel=0.2)


# --- the data set -------------------------------------------------------------------------------


def test_the_plan_covers_its_ranges_in_every_split():
    trajectories = plan(4600)
    assert sum(t.frames for t in trajectories) == pytest.approx(4600, rel=0.02)
    assert len({t.name for t in trajectories}) == len(trajectories)
    boxes = [t for t in trajectories if t.kind in ("npt", "nvt")]
    for split in SPLITS:
        assert {t.waters for t in boxes if t.split == split} == set(make.BOX_SIZES)
        assert {t.kind for t in trajectories if t.split == split} == set(make.SETS["main"])
    for values, (low, high) in (
        ([t.temperature for t in boxes], (280, 360)),
        ([t.pressure for t in boxes if t.kind == "npt"], (-1000, 3000)),
    ):
        assert low <= min(values) < low + 0.1 * (high - low)
        assert high >= max(values) > high - 0.1 * (high - low)
    assert 0.7 < sum(t.frames for t in trajectories if t.split == "train") / 4600 < 0.9


def test_the_liquid_set_stays_near_ambient_conditions_in_every_split():
    trajectories = plan(1500, "liquid")
    assert sum(t.frames for t in trajectories) == pytest.approx(1500, rel=0.03)
    for split in SPLITS:
        runs = [t for t in trajectories if t.split == split]
        assert {t.waters for t in runs} == {32, 48} and {t.kind for t in runs} == {"liquid"}
        assert np.mean([t.temperature for t in runs]) == pytest.approx(298, abs=5)
        assert abs(np.mean([t.pressure for t in runs])) < 250


def test_too_few_structures_for_three_splits_are_refused():
    with pytest.raises(LabelError, match="100 or more"):
        plan(20)
    assert {t.split for t in plan(100)} == set(SPLITS)


def short(name: str, kind: str, waters: int, split: str, frames: int = 3) -> Trajectory:
    return Trajectory(name, kind, waters, 300.0, 1.0, 1.0, frames, split)


@pytest.fixture
def quick(monkeypatch):
    """Short equilibration, and a strained structure in three."""
    pytest.importorskip("openmm")
    monkeypatch.setattr(make, "STEPS_BEFORE", 50)
    monkeypatch.setattr(make, "STEPS_BETWEEN", 10)
    monkeypatch.setattr(make, "STRAINED_EVERY", 3)


@pytest.mark.parametrize("kind, waters", [("npt", 16), ("nvt", 16), ("cluster", 3), ("liquid", 32)])
def test_the_same_seed_yields_the_same_labelled_structures(quick, kind, waters):
    trajectory = short("a", kind, waters, "train")
    first, again, other = (sample(trajectory, seed) for seed in (0, 0, 1))
    for one, two, three in zip(first, again, other, strict=True):
        assert np.array_equal(one.positions, two.positions)
        assert np.array_equal(one.get_forces(), two.get_forces())
        assert not np.allclose(one.positions, three.positions)


def test_labels_are_the_teacher_s_and_say_what_they_are(quick):
    frames = sample(short("a", "npt", 16, "train"), 0) + sample(short("b", "dimer", 2, "val"), 0)
    kinds = [frame.info["data_id"] for frame in frames]
    assert kinds == ["water_npt"] * 2 + ["water_strained"] + ["water_dimer"] * 3
    for frame in frames:
        again = frame.copy()
        again.calc = SPCFw()
        assert frame.get_potential_energy() == again.get_potential_energy()
        assert (frame.info["charge"], frame.info["spin"]) == (0, 1)
        assert ("stress" in frame.calc.results) == bool(frame.pbc.all())
        if frame.pbc.all():
            assert np.array_equal(frame.get_stress(), again.get_stress())


def test_molecules_and_pairs_need_no_sampler():
    frames = sample(short("m", "molecule", 1, "train", 20), 0)
    lengths = np.array([frame.get_distances(0, [1, 2]) for frame in frames])
    assert 0.02 < lengths.std() < 0.15
    pairs = sample(short("d", "dimer", 2, "train", 20), 0)
    between = np.array([pair.get_distance(0, 3) for pair in pairs])
    assert between.min() > 2.3 and between.max() < 9.1
    assert np.ptp(between) > 4


def closest(frames: list, one: str, other: str) -> np.ndarray:
    """Of each frame, the least distance of such atoms of two molecules."""
    found = []
    for frame in frames:
        apart = frame.get_all_distances(mic=True)
        owner = np.arange(len(frame)) // 3
        symbols = np.array(frame.get_chemical_symbols())
        rows, columns = np.flatnonzero(symbols == one), np.flatnonzero(symbols == other)
        between = owner[rows][:, None] != owner[columns]
        found.append(apart[np.ix_(rows, columns)][between].min())
    return np.array(found)


def test_contacts_are_closer_than_the_liquid_s_and_never_closer_than_said(quick):
    pairs = sample(short("c", "contact", 2, "train", 40), 0)
    boxes = sample(short("s", "squeezed", 16, "train", 12), 0)
    liquid = sample(short("l", "nvt", 16, "train", 6), 0)
    usual = {kind: closest(liquid, *kind).min() for kind in make.CONTACTS}
    for frames in (pairs, boxes):
        assert {frame.info["data_id"] for frame in frames} <= {"water_contact", "water_squeezed"}
        for (one, other), (low, _) in make.CONTACTS.items():
            assert closest(frames, one, other).min() > low - 1e-6
        closer = [closest(frames, *kind) < least for kind, least in usual.items()]
        assert np.any(closer, axis=0).mean() > 0.4
        assert max(np.abs(frame.get_forces()).max() for frame in frames) < make.MAX_FORCE
    assert not any(frame.pbc.any() for frame in pairs) and all(f.pbc.all() for f in boxes)


def test_older_kinds_stay_as_they_were_when_kinds_are_added(monkeypatch):
    names = {trajectory.name for trajectory in plan(4600)}
    kinds = ("npt", "nvt", "cluster", "dimer", "molecule")
    few = {kind: make.SETS["main"][kind] for kind in kinds}
    monkeypatch.setitem(make.SETS, "main", few)
    assert names > {trajectory.name for trajectory in plan(4000)}


LISTED = [
    short("cluster-0", "cluster", 2, "train", 2),
    short("molecule-0", "molecule", 1, "train", 2),
    short("dimer-0", "dimer", 2, "val", 2),
    short("dimer-1", "dimer", 2, "test", 2),
]


def contents(folder: Path) -> list[tuple]:
    return [
        (split, atoms.info["source"], atoms.positions.tobytes(), atoms.get_forces().tobytes())
        for split in SPLITS
        for atoms in Dataset(folder / f"{split}.aselmdb")
    ]


def test_any_number_of_workers_makes_the_same_data(tmp_path):
    pytest.importorskip("openmm")
    one, two = tmp_path / "one", tmp_path / "two"
    make.make(one, LISTED, workers=1)
    make.make(two, LISTED, workers=2)
    assert json.loads((one / "references.json").read_text()) == {"H": 0.0, "O": 0.0}
    found = contents(one)
    assert found == contents(two)
    assert [split for split, *_ in found] == ["train"] * 4 + ["val"] * 2 + ["test"] * 2

    with pytest.raises(LabelError, match="choose a new --out"):
        make.make(one, LISTED, seed=1)


def test_the_sample_in_the_repository_has_the_teacher_s_labels():
    folder = Path(__file__).resolve().parents[2] / "data" / "water"
    trajectories: dict[str, set[str]] = {}
    for split in SPLITS:
        data = Dataset(folder / f"{split}.aselmdb")
        trajectories[split] = {data[index].info["trajectory"] for index in range(len(data))}
        for index in range(0, len(data), 5):
            atoms = data[index]
            fresh = atoms.copy()
            fresh.calc = SPCFw()
            assert atoms.get_potential_energy() == pytest.approx(fresh.get_potential_energy())
            assert atoms.get_forces() == pytest.approx(fresh.get_forces(), abs=1e-9)
            if atoms.pbc.any():
                assert atoms.get_stress() == pytest.approx(fresh.get_stress(), abs=1e-9)
    assert not trajectories["train"] & (trajectories["val"] | trajectories["test"])
    assert not trajectories["val"] & trajectories["test"]
