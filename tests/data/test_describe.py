"""The tables of a data card against structures counted by hand."""

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from allscaip_lite.cli import main
from allscaip_lite.data.aselmdb import checksum, write_aselmdb
from allscaip_lite.data.describe import read_splits, summarise, to_markdown

DATA = Path(__file__).resolve().parents[2] / "data"


def labelled(symbols, force, **info):
    atoms = Atoms(symbols, np.arange(3 * len(symbols), dtype=float).reshape(-1, 3))
    atoms.info = {"charge": 0, "spin": 1, **info}
    forces = np.zeros((len(atoms), 3))
    forces[0] = force
    atoms.calc = SinglePointCalculator(atoms, energy=-1.0, forces=forces)
    return atoms


TRAIN = [
    labelled(["O", "H", "H"], [3, 4, 0], data_id="water", molecule="O"),
    labelled(["O", "H", "H"], [0, 0, 0], data_id="water", molecule="O"),
    labelled(["O", "H"], [0, 0, 1], data_id="ions", molecule="[OH-]", charge=-1),
    labelled(["Li"], [0, 0, 0], data_id="ions", molecule="[Li]", spin=2),
]
TEST = [labelled(["O", "H", "H"], [0, 1, 0], data_id="water", molecule="O.x")]


def test_counts_are_those_of_the_structures():
    found = summarise(TRAIN)
    assert (found.structures, found.atoms, len(found.systems)) == (4, 9, 3)
    assert found.domains == {"water": 2, "ions": 2}
    assert found.elements == {"O": 3, "H": 3, "Li": 1}  # structures, not atoms
    assert found.charges == {0: 3, -1: 1}
    assert found.multiplicities == {1: 3, 2: 1}
    assert found.checksum == checksum(TRAIN)


def test_structures_without_names_are_told_apart_by_formula():
    found = summarise([labelled(["H", "H"], [0, 0, 0]), labelled(["O", "H"], [0, 0, 0], spin=2)])
    assert len(found.systems) == 2
    assert found.domains == {"without data_id": 2}


def test_markdown_has_sums_forces_and_what_a_split_lacks():
    text = to_markdown({"train": summarise(TRAIN), "test": summarise(TEST)})
    assert "| structures | 4 | 1 | 5 |" in text
    assert "| `water` | 2 | 1 | 3 |" in text
    assert "Charges: -1 1, 0 4." in text
    assert "Atoms a structure: 1 to 3, 2.4 in the mean." in text
    root_mean_square = np.sqrt((25 + 1 + 1) / 36)
    assert f"{root_mean_square:.2f} eV/Å a component" in text
    assert "none above 5.0" in text
    assert "Not in test: Li." in text and "Not in train" not in text


def test_command_reads_splits_and_single_files(tmp_path, capsys):
    write_aselmdb(tmp_path / "train.aselmdb", TRAIN)
    write_aselmdb(tmp_path / "test.aselmdb", TEST)
    assert list(read_splits(tmp_path)) == ["train", "test"]
    assert main(["data", "describe", str(tmp_path)]) == 0
    both = capsys.readouterr().out
    assert "| | train | test | all |" in both and checksum(TEST) in both
    assert main(["data", "describe", str(tmp_path / "train.aselmdb")]) == 0
    assert "| structures | 4 |" in capsys.readouterr().out


def test_command_says_where_no_data_are(tmp_path, capsys):
    assert main(["data", "describe", str(tmp_path)]) == 2
    assert "without .aselmdb files" in capsys.readouterr().err


def test_sample_in_the_repository_is_as_large_as_its_card_says():
    pytest.importorskip("ase_db_backends")
    sizes = [len(data) for data in read_splits(DATA / "xtb").values()]
    assert sizes == [420, 90, 90]
    card = (DATA / "xtb" / "README.md").read_text(encoding="utf-8")
    assert "| structures in this sample | 420 | 90 | 90 | 600 |" in card


def test_omol_mini_is_what_its_card_says(capsys):
    pytest.importorskip("ase_db_backends")
    assert main(["data", "describe", str(DATA / "omol-mini")]) == 0
    card = (DATA / "omol-mini" / "README.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() in card
