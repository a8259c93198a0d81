"""The plan of omol-mini: OMol25's domains, split by molecule, the same every time."""

from __future__ import annotations

import importlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms

pytest.importorskip("tblite")
Chem = pytest.importorskip("rdkit.Chem")

from allscaip_lite.labels import LabelError
from allscaip_lite.labels.xtb import GFN2xTB

make = importlib.import_module("data.omol-mini.make")
splits = importlib.import_module("data.xtb.splits")
MOST_ATOMS, SIZES, Item = make.MOST_ATOMS, make.SIZES, make.Item
plan, systems = make.plan, make.systems


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return plan(0)


def only(items: list[Item], domain: str, index: int = 0) -> Item:
    return next(item for item in items if item.domain == domain and item.index == index)


def test_every_domain_is_there_and_any_beginning_is_a_fair_sample(items):
    assert len(items) > 1500 and len({item.name for item in items}) == len(items)
    assert {item.domain for item in items} == set(SIZES)
    whole, half = Counter(i.domain for i in items), Counter(i.domain for i in items[:400])
    for domain, count in whole.items():
        assert half[domain] == pytest.approx(count * 400 / len(items), rel=0.15, abs=3)
    shares = Counter(item.split for item in items[:400])
    assert shares["train"] / 400 == pytest.approx(0.8, abs=0.03)


def test_the_order_of_what_is_labelled_stays_as_it_was(items):
    """A digest of all names: a changed one would make the labels in the repository worthless."""
    names = ",".join(item.name for item in items)
    assert make._digest(names).startswith("5df0ea3b6c1d0758")


def test_the_thermal_set_is_small_systems_split_as_the_others():
    thermal = plan(0, "thermal")
    domains = Counter(item.domain for item in thermal[:280])
    assert domains["fragments"] == pytest.approx(220, abs=4)
    assert {item.domain for item in thermal} == {"fragments", "contacts"}
    first = [item.system for item in thermal if item.domain == "fragments"][:200]
    assert len(set(first)) > 150  # many systems before the second structure of any
    for item in thermal:
        assert 2 <= splits.atom_count(item.system) <= MOST_ATOMS
        assert item.split == splits.split_of(item.system)
        assert item.system.multiplicity == 1


def test_a_fragment_is_warm_and_the_one_that_models_disagree_on(monkeypatch):
    item = next(i for i in plan(0, "thermal") if i.system.parts == ("CC(N)=O",))
    calls = []

    def choose(structures):
        calls.append([atoms.positions.copy() for atoms in structures])
        return [0.1, 0.3, 0.2, 0.1]

    monkeypatch.setattr(make, "_disagreement", choose)
    [atoms] = item.structures()
    [candidates] = calls
    assert len(candidates) == make.CANDIDATES
    centred = candidates[1] - candidates[1].mean(axis=0)
    np.testing.assert_allclose(atoms.positions, centred, atol=1e-6)
    assert "langevin" in atoms.info["source"]
    warmest = {how.split()[1] for how in [atoms.info["source"].rpartition("/")[2]]}
    assert warmest <= {"300", "400", "500", "600"}


def test_models_disagree_more_on_a_stretched_bond():
    water = Atoms("OH2", [[0, 0, 0], [0.76, 0, 0.58], [-0.76, 0, 0.58]])
    water.info = {"charge": 0, "spin": 1}
    torn = water.copy()
    torn.positions[1] *= 1.8
    same, more = make._disagreement([water, torn])
    assert 0 < same < more < 10


def test_ours_beside_published_labels(tmp_path, capsys):
    """Hydrogen's molecule, 10 meV above what a file says of it; the second call labels nothing."""
    from allscaip_lite.labels import dft

    pytest.importorskip("pyscf")
    hydrogen = Atoms("H2", [[0, 0, 0], [0, 0, 0.8]], info={"charge": 0, "spin": 1})
    ours = dft.label(hydrogen)
    energy, force = ours.get_potential_energy(), np.abs(ours.get_forces()).max()
    text = f"data_id=spice charge=0 multiplicity=1 energy_eV={energy - 0.01} "
    text += f"max_force_eV_per_A={force}"
    file = tmp_path / "published" / "one.xyz"
    file.parent.mkdir()
    command = ["--out", str(tmp_path / "out"), "--published", str(file.parent)]
    assert make.main(command) == 2 and "no .xyz files" in capsys.readouterr().err
    file.write_text(f"2\n{text}\nH 0 0 0\nH 0 0 0.8\n")
    assert make.main(command) == 2 and "homo_lumo_gap_eV" in capsys.readouterr().err
    file.write_text(f"2\n{text} homo_lumo_gap_eV=20.0\nH 0 0 0\nH 0 0 0.8\n")
    for more in ([], ["--collect"]):
        assert make.main(command + more) == 0
        row = capsys.readouterr().out.strip().splitlines()[-1].strip("| ").split(" | ")
        assert row[:5] == ["H2", "spice", "2", "+10.0", "+5.00"]
        assert row[5] == row[6] == f"{force:.3f}"
        assert float(row[8]) == 20


def test_systems_are_small_and_have_electrons_for_their_multiplicity():
    for domain, listed in systems().items():
        assert len(listed) > 2, domain
        for system in listed:
            atoms = [
                atom.GetAtomicNum()
                for part in system.parts
                for atom in Chem.AddHs(Chem.MolFromSmiles(part)).GetAtoms()
            ]
            assert 2 <= len(atoms) <= MOST_ATOMS, system
            assert (sum(atoms) - system.charge + system.multiplicity) % 2 == 1, system


def test_no_molecule_is_in_two_splits_nor_on_two_sides_of_both_data_sets(items):
    split = {}
    for item in items:
        whole = ".".join(sorted(map(splits.parent, item.system.parts)))
        assert split.setdefault(whole, item.split) == item.split, item.name
    theirs = {
        ".".join(sorted(j.system.parts)): j.split
        for j in importlib.import_module("data.xtb.make").plan(60_000)
    }
    shared = [i for i in items if ".".join(sorted(i.system.parts)) in theirs]
    assert len(shared) > 500
    for item in shared:
        assert theirs[".".join(sorted(item.system.parts))] == item.split, item.name


@pytest.mark.parametrize("domain", sorted(SIZES))
def test_a_structure_is_whole_repeatable_and_carries_xtb_s_labels(items, domain):
    item = only(items, domain)
    made = item.structures()
    assert len(made) == (2 if domain == "two_spins" else 1)
    again = item.structures()
    for atoms, twin in zip(made, again, strict=True):
        assert (atoms.positions == twin.positions).all() and atoms.info["source"]
        assert (atoms.info["charge"], atoms.info["data_id"]) == (item.system.charge, domain)
        assert np.abs(atoms.info["xtb_forces"]).max() < make.MAX_FORCE
        probe = atoms.copy()
        probe.calc = GFN2xTB(accuracy=0.1)
        assert atoms.info["xtb_energy"] == pytest.approx(probe.get_potential_energy(), abs=1e-6)
    if domain == "two_spins":
        assert [atoms.info["spin"] for atoms in made] == [1, 3]
        assert (made[0].positions == made[1].positions).all()


def test_dimers_reach_from_contact_to_eight_angstrom(items):
    gaps = []
    for item in [item for item in items if item.domain == "dimers"][:24]:
        (atoms,) = item.structures()
        first = sum(
            Chem.AddHs(Chem.MolFromSmiles(part)).GetNumAtoms() for part in item.system.parts[:1]
        )
        away = atoms.positions[:first, None] - atoms.positions[None, first:]
        gaps.append(np.linalg.norm(away, axis=-1).min())
    assert min(gaps) < 2.4 and 5 < max(gaps) < 8.5


def test_the_set_reactive_holds_every_system_and_draws_anew(items):
    jobs = make.reactive_plan(24_000)
    assert {job.system for job in jobs} == {s for listed in systems().values() for s in listed}
    wanted = Counter()
    for job in jobs:
        wanted[job.system.domain] += job.count * (2 if job.system.domain == "two_spins" else 1)
    assert sum(wanted.values()) == pytest.approx(24_000, rel=0.05)
    assert wanted["stretches"] == max(wanted.values())
    for job in jobs:
        assert job.split == splits.split_of(job.system)

    job = next(j for j in jobs if j.system.domain == "stretches" and j.system.parts == ("CCO",))
    assert job.seed == 3_000_000
    made = make.sample_reactive(replace(job, count=3))
    assert 0 < len(made) <= 3
    known = [item.structures() for item in items if item.system == job.system]
    for atoms in made:
        assert atoms.info["source"].startswith("xtb/reactive/stretches/CCO")
        assert atoms.info["data_id"] == "stretches" and "xtb_energy" not in atoms.info
        probe = atoms.copy()
        probe.calc = GFN2xTB(accuracy=0.1)
        assert atoms.get_potential_energy() == pytest.approx(probe.get_potential_energy(), abs=1e-6)
        for others in known:
            assert all(np.abs(atoms.positions - o.positions).max() > 1e-3 for o in others)


@pytest.mark.parametrize(("kind", "place"), [("mini", ""), ("thermal", "thermal")])
def test_the_set_in_the_repository_is_of_the_plan(tmp_path, kind, place):
    """Its labels are those of entries of the plan, and give the data set with its checksums."""
    folder = Path(__file__).resolve().parents[2] / "data" / "omol-mini" / place
    command = ["--set", kind, "--out", str(tmp_path), "--known", str(folder), "--collect"]
    assert make.main(command) == 0
    for name in ("checksums.json", "references.json"):
        assert (tmp_path / name).read_text() == (folder / name).read_text()


def test_an_ion_of_two_parts_is_whole(items):
    item = next(i for i in items if i.domain == "ions" and i.system.parts == ("[F-]", "F"))
    [atoms] = item.structures()
    assert sorted(atoms.symbols) == ["F", "F", "H"]
    hydrogen = list(atoms.symbols).index("H")
    assert (np.delete(atoms.get_all_distances()[hydrogen], hydrogen) < 1.5).all()


def test_a_system_of_which_nothing_is_usable_is_a_failed_job(items, monkeypatch):
    monkeypatch.setattr(Item, "structures", lambda item: [])
    with pytest.raises(LabelError, match="no usable structure"):
        make.sample_reactive(make.Job(items[0].system, 2, "train"))
