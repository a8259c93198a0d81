"""`allscaip-lite label`: one's own structures get the labels of each method, or a clear error."""

from __future__ import annotations

import json
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator

from allscaip_lite.cli import main
from allscaip_lite.data.aselmdb import Dataset, write_aselmdb
from allscaip_lite.labels import command as label_command
from allscaip_lite.labels import spcfw, xtb
from data.water.boxes import water_box


def in_state(atoms: Atoms, charge: int = 0, spin: int = 1) -> Atoms:
    atoms.info = {"charge": charge, "spin": spin}
    return atoms


def command(method: str, out: Path, *names: Path) -> list[str]:
    return ["label", *map(str, names), "--method", method, "--out", str(out)]


def test_gfn2_xtb_labels_structures_of_several_files_and_goes_on(tmp_path, capsys):
    pytest.importorskip("tblite")
    ase.io.write(tmp_path / "mine.xyz", [molecule("H2"), molecule("H2")])
    ion = in_state(Atoms("H2", [[0, 0, 0], [0, 0, 1.1]]), charge=1, spin=2)
    ion.calc = SinglePointCalculator(ion, energy=7.0, forces=np.zeros((2, 3)))
    write_aselmdb(tmp_path / "ion.aselmdb", [ion])
    names = [tmp_path / "mine.xyz", tmp_path / "ion.aselmdb"]
    out = tmp_path / "out"
    assert main(command("gfn2-xtb", out, *names)) == 0
    assert capsys.readouterr().out == "labelled: 3 structures\n"
    first, twin, positive = Dataset(out / "labelled.aselmdb")
    assert first.get_potential_energy() == twin.get_potential_energy()
    expected = xtb.label(molecule("H2")).get_potential_energy()
    assert first.get_potential_energy() == pytest.approx(expected, abs=1e-6)
    assert (positive.info["charge"], positive.info["spin"]) == (1, 2)
    expected = xtb.label(ion).get_potential_energy()
    assert positive.get_potential_energy() == pytest.approx(expected, abs=1e-6)
    assert positive.info["source"].endswith("(H2)") and positive.info["data_id"] == "ion"
    results = {path.name: path.stat().st_mtime_ns for path in (out / "jobs").iterdir()}
    assert len(results) == 2  # one for both twins

    ase.io.write(tmp_path / "more.xyz", molecule("NH3"))
    assert main(command("gfn2-xtb", out, *names, tmp_path / "more.xyz")) == 0
    assert len(Dataset(out / "labelled.aselmdb")) == 4
    for name, written in results.items():
        assert (out / "jobs" / name).stat().st_mtime_ns == written, "a label was made twice"


def test_water_boxes_are_labelled_into_a_file_that_another_method_does_not_replace(
    tmp_path, capsys
):
    box, out = water_box(4), tmp_path / "water.aselmdb"
    ase.io.write(tmp_path / "box.extxyz", box)
    assert main(command("spc-fw", out, tmp_path / "box.extxyz")) == 0
    [labelled] = Dataset(out)
    expected = spcfw.label(box)
    assert labelled.get_potential_energy() == pytest.approx(expected.get_potential_energy())
    np.testing.assert_allclose(labelled.get_stress(), expected.get_stress(), atol=1e-5)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"box.extxyz", "water.aselmdb", "water.jobs"}
    assert main(command("spc-fw", out, tmp_path / "box.extxyz")) == 0, "the same command goes on"

    ase.io.write(tmp_path / "other.extxyz", water_box(5))
    assert main(command("spc-fw", out, tmp_path / "other.extxyz")) == 2
    assert "choose another --out" in capsys.readouterr().err


def test_the_workers_of_a_dask_cluster_label_too(tmp_path):
    distributed = pytest.importorskip("distributed")
    ase.io.write(tmp_path / "boxes.extxyz", [water_box(4), water_box(5)])
    options = {"n_workers": 1, "threads_per_worker": 1, "dashboard_address": ":0"}
    with distributed.LocalCluster(**options) as cluster:
        arguments = ["--scheduler", cluster.scheduler_address]
        assert main([*command("spc-fw", tmp_path, tmp_path / "boxes.extxyz"), *arguments]) == 0
    assert [len(atoms) for atoms in Dataset(tmp_path / "labelled.aselmdb")] == [12, 15]


def test_dft_has_gfn2_xtb_s_energies_in_its_metadata(tmp_path):
    pytest.importorskip("pyscf")
    pytest.importorskip("numba")
    pytest.importorskip("tblite")
    from allscaip_lite.labels import dft

    ase.io.write(tmp_path / "mine.xyz", molecule("H2"))
    assert main(command("wb97m-v", tmp_path / "out", tmp_path / "mine.xyz")) == 0
    [labelled] = Dataset(tmp_path / "out" / "labelled.aselmdb")
    hydrogen = in_state(molecule("H2"))
    expected = dft.label(hydrogen).get_potential_energy()
    assert labelled.get_potential_energy() == pytest.approx(expected, abs=1e-6)
    assert labelled.info["label"].startswith("wb97m_v/def2-tzvpd")
    assert labelled.info["xtb_energy"] == pytest.approx(xtb.results_of(hydrogen)["energy"])
    assert np.abs(labelled.info["xtb_forces"] - labelled.get_forces()).max() < 2  # eV/Å


@pytest.mark.parametrize(
    ("atoms", "method", "words"),
    [
        (molecule("H2", pbc=True, cell=[4, 4, 4]), "wb97m-v", "is periodic"),
        (in_state(molecule("H2"), spin=2), "gfn2-xtb", "= 2 is the multi"),
        (molecule("CH4"), "spc-fw", "not water"),
    ],
)
def test_structures_that_a_method_cannot_label_are_refused(tmp_path, capsys, atoms, method, words):
    pytest.importorskip({"wb97m-v": "pyscf", "gfn2-xtb": "tblite"}.get(method, "numpy"))
    ase.io.write(tmp_path / "it.extxyz", atoms)
    assert main(command(method, tmp_path / "out", tmp_path / "it.extxyz")) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_files_that_are_missing_or_no_structures_are_refused(tmp_path, capsys):
    assert main(command("spc-fw", tmp_path / "out", tmp_path / "none.xyz")) == 2
    assert "no such file" in capsys.readouterr().err
    (tmp_path / "notes.txt").write_text("no structure")
    assert main(command("spc-fw", tmp_path / "out", tmp_path / "notes.txt")) == 2
    assert "notes.txt is not a file that ASE can read" in capsys.readouterr().err


def test_structures_without_a_label_are_named_and_the_others_written(tmp_path, capsys):
    pytest.importorskip("tblite")
    overlapping = Atoms("H3", [[0, 0, 0], [0, 0, 0], [0, 0, 1]])
    ase.io.write(tmp_path / "both.extxyz", [molecule("H2"), overlapping])
    assert main(command("gfn2-xtb", tmp_path / "out", tmp_path / "both.extxyz")) == 0
    assert len(Dataset(tmp_path / "out" / "labelled.aselmdb")) == 1
    assert "1 of 2 jobs failed" in capsys.readouterr().err
    [name] = json.loads((tmp_path / "out" / "failed.json").read_text())
    assert name.startswith("H3 ")


def test_results_of_earlier_folders_are_found():
    """A result has the name that `data dft --structures` of version 0.1 gave it."""
    pytest.importorskip("pyscf")
    water = in_state(Atoms("OH2", [[0, 0, 0], [0.76, 0, 0.58], [-0.76, 0, 0.58]]))
    assert label_command._job(water, "wb97m-v").file == "bf2a660639ee675c0f81"
