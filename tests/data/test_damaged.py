"""Data files that are cut short, damaged or made to harm: an error that names the file."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import ase.db
import lmdb
import numpy as np
import pytest
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator

from allscaip_lite.data.aselmdb import Dataset, write_aselmdb
from allscaip_lite.data.lmdb_file import LMDBFile
from allscaip_lite.errors import DataError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Two hundred small structures, and a large one, whose row needs pages of its own."""
    structures = []
    for number in range(200):
        atoms = molecule("H2O", info={"charge": 0, "spin": 1, "number": number})
        if number == 77:
            atoms.cell = [4, 4, 4]
            atoms = atoms.repeat((12, 12, 12))
            atoms.rattle(0.1, seed=1)
            atoms.info = {"charge": 0, "spin": 1, "number": number}
        zeros = np.zeros((len(atoms), 3))
        atoms.calc = SinglePointCalculator(atoms, energy=-float(number), forces=zeros)
        structures.append(atoms)
    write_aselmdb(tmp_path / "a.aselmdb", structures)
    return tmp_path / "a.aselmdb"


def change(file: Path, key: str, value: bytes) -> None:
    environment = lmdb.open(str(file), subdir=False, map_size=2**30, lock=False)
    with environment, environment.begin(write=True) as transaction:
        transaction.put(key.encode(), value)


def packed(value: object) -> bytes:
    return zlib.compress(json.dumps(value).encode())


def test_every_key_is_what_lmdb_finds(file: Path) -> None:
    ours = LMDBFile(file)
    environment = lmdb.open(str(file), subdir=False, readonly=True, lock=False)
    with environment, environment.begin() as transaction:
        found = {bytes(key): bytes(value) for key, value in transaction.cursor()}
    assert len(found) == 202 == ours.entries
    assert {key: ours.get(key) for key in found} == found
    assert [ours.get(key) for key in (b"", b"0", b"2000", b"zzz", b"\xff" * 9)] == [None] * 5
    rows = [row.toatoms() for row in ase.db.connect(file, readonly=True).select()]
    assert [one == other for one, other in zip(rows, Dataset(file), strict=True)] == [True] * 200


@pytest.mark.parametrize("pages", [0, 1, 2, 3, 10, -1])
def test_a_file_that_was_cut_short_says_so(file: Path, pages: int) -> None:
    whole = file.read_bytes()
    file.write_bytes(whole[: pages * 4096 + 100 if pages >= 0 else -1])
    with pytest.raises(DataError, match=r"a\.aselmdb.*(cut short|not a readable)"):
        Dataset(file)


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("nextid", packed(10**10), "fewer than the 9,999,999,999 rows"),
        ("nextid", packed("many"), "ids are no numbers"),
        ("nextid", zlib.compress(b"[" * 10**6), "nested too deep"),
        ("deleted_ids", packed({"a": 1}), "ids are no numbers"),
        ("nextid", packed(-5), "rows that it says"),
        ("metadata", packed([1, 2]), ""),
        ("metadata", packed({"natoms": "ab"}), ""),
        ("5", b"not zlib", "its entry 5"),
        ("5", zlib.compress(b"\0" * (65 << 20)), "entry 5: it asks for more than 67,108,864"),
        ("5", packed({"a": 1}), "row 5, is no structure"),
        ("5", packed([1]), "row 5, is no structure"),
        ("5", packed({"__ndarray__": [[10**13], "f8", [1]]}), "entry 5: an array"),
        ("5", packed({"__ndarray__": [[1], f"S{10**9}", ["a"]]}), "entry 5: it asks for more"),
        ("5", packed({"__ndarray__": [[1], "O", ["a"]]}), "entry 5: an array of type O"),
        ("5", packed({"__ase_objtype__": "atoms", "numbers": "H90000000"}), "numbers are a text"),
        ("5", packed({"numbers": "H90000000", "positions": []}), "row 5, is no .*invalid literal"),
    ],
)
def test_entries_that_lie_are_named(file: Path, key: str, value: bytes, complaint: str) -> None:
    change(file, key, value)
    if not complaint:  # what is no list of sizes is not believed
        assert Dataset(file).natoms.tolist() == [3] * 77 + [5184] + [3] * 122
        return
    with pytest.raises(DataError, match=rf"a\.aselmdb.*{complaint}"):
        Dataset(file)[4]


def test_a_damaged_table_of_sizes_is_named(file: Path) -> None:
    (file.parent / "metadata.npz").write_bytes(b"PK nothing")
    with pytest.raises(DataError, match=r"metadata\.npz is damaged"):
        _ = Dataset(file).natoms
