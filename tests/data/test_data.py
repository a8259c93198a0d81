"""What goes into an `.aselmdb` comes out of it, here and in fairchem; what is wrong is said."""

from __future__ import annotations

import errno
import os
import pickle
from contextlib import contextmanager
from pathlib import Path

import ase.db
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from torch.utils.data import DataLoader

from allscaip_lite import cli
from allscaip_lite.data import aselmdb as data
from allscaip_lite.data import lmdb_file
from allscaip_lite.data.aselmdb import (
    Dataset,
    write_aselmdb,
)
from allscaip_lite.errors import DataError, InputError, RunError
from allscaip_lite.files import atomic_write, locked

SAMPLE = Path(__file__).resolve().parents[2] / "data" / "xtb"


def labelled(name: str, seed: int = 0, **info) -> Atoms:
    rng = np.random.default_rng(seed)
    atoms = molecule(name, info=info)
    forces = rng.normal(size=(len(atoms), 3))
    atoms.calc = SinglePointCalculator(atoms, energy=float(rng.normal()), forces=forces)
    return atoms


def assert_same(read: Atoms, written: Atoms) -> None:
    np.testing.assert_array_equal(read.numbers, written.numbers)
    np.testing.assert_array_equal(read.positions, written.positions)
    np.testing.assert_array_equal(read.cell, written.cell)
    np.testing.assert_array_equal(read.pbc, written.pbc)
    assert read.info == written.info
    assert read.calc.results.keys() == written.calc.results.keys()
    for name, value in written.calc.results.items():
        np.testing.assert_array_equal(read.calc.results[name], value)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two shards of three and two structures, named so that the order of names matters."""
    shards = tmp_path / "shards"
    names = ["H2O", "CH4", "C2H6", "NH3", "H2"]
    structures = [labelled(n, i, charge=i - 1, spin=i) for i, n in enumerate(names)]
    write_aselmdb(shards / "data0001.aselmdb", structures[3:])
    write_aselmdb(shards / "data0000.aselmdb", structures[:3])
    return shards


def test_a_file_is_written_without_locks_and_grows(tmp_path, monkeypatch) -> None:
    """A lock file is shared memory, and to write there ends the process on a full disk."""
    monkeypatch.setattr(lmdb_file, "_MAP", 1 << 16)
    written, listed = [labelled("C6H6", seed) for seed in range(150)], []

    def structures():
        yield from written
        listed.extend(path.name for path in (tmp_path / ".a.aselmdb.partial").iterdir())

    assert write_aselmdb(tmp_path / "a.aselmdb", structures()) == 150
    assert sorted(listed) == [".lock", "a.aselmdb"]
    assert (tmp_path / "a.aselmdb").stat().st_size > 1 << 16
    read = Dataset(tmp_path / "a.aselmdb")
    assert_same(read[0], written[0])
    assert_same(read[149], written[149])


def test_an_info_that_is_no_json_is_named(tmp_path) -> None:
    with pytest.raises(DataError, match=r"structure 1 \(OH2\): its info cannot be written"):
        write_aselmdb(tmp_path / "a.aselmdb", [labelled("H2O"), labelled("H2O", note=object())])
    assert not list(tmp_path.iterdir())


def test_an_index_is_a_whole_number(folder) -> None:
    data_set = Dataset(folder)
    assert len(data_set[np.int64(1)]) == len(data_set[1])
    for index in (1.5, "1", slice(2)):
        with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
            data_set[index]


def test_a_sample_of_nothing_is_refused(tmp_path) -> None:
    with pytest.raises(InputError, match="-3 structures: give 1 or more"):
        data.write_sample(tmp_path, tmp_path / "out", -3)
    with pytest.raises(InputError, match="0 structures: give 1 or more"):
        data.evenly_spaced(10, 0)


# --- round trip ---------------------------------------------------------------------------------


def test_a_molecule_comes_back_with_charge_spin_and_all_metadata(tmp_path):
    written = labelled(
        "CH3",
        charge=-2,
        spin=3,
        source="somewhere/1",
        data_id="radicals",
        num_electrons=9,
        homo_lumo_gap=[5.5, 2.25],
        nested={"a": [1, 2], "b": None},
    )
    assert write_aselmdb(tmp_path / "one.aselmdb", [written]) == 1
    (read,) = Dataset(tmp_path / "one.aselmdb")
    assert_same(read, written)
    assert isinstance(read.info["charge"], int)


def test_arrays_in_the_metadata_come_back_as_arrays(tmp_path):
    charges = np.array([-0.8, 0.4, 0.4])
    write_aselmdb(tmp_path / "one.aselmdb", [labelled("H2O", mulliken_charges=charges)])
    np.testing.assert_array_equal(
        Dataset(tmp_path / "one.aselmdb")[0].info["mulliken_charges"], charges
    )


def test_a_crystal_comes_back_with_cell_and_stress(tmp_path):
    crystal = bulk("Cu", cubic=True)
    crystal.rattle(0.1, seed=0)
    crystal.calc = EMT()
    forces, stress = crystal.get_forces(), crystal.get_stress()
    write_aselmdb(tmp_path / "cu.aselmdb", [crystal])
    read = Dataset(tmp_path / "cu.aselmdb")[0]
    assert read.pbc.all()
    np.testing.assert_array_equal(read.cell, crystal.cell)
    np.testing.assert_array_equal(read.get_forces(), forces)
    np.testing.assert_array_equal(read.get_stress(), stress)
    assert read.get_potential_energy() == crystal.get_potential_energy()


def test_missing_charge_and_spin_stay_missing(tmp_path):
    structures = [labelled("H2O", charge=0, spin=1), labelled("H2O"), labelled("H2O", charge=1)]
    write_aselmdb(tmp_path / "a.aselmdb", structures)
    infos = [atoms.info for atoms in Dataset(tmp_path / "a.aselmdb")]
    assert infos == [{"charge": 0, "spin": 1}, {}, {"charge": 1}]


def test_charge_in_the_key_value_pairs_is_found_too(tmp_path):
    with ase.db.connect(tmp_path / "other.aselmdb") as database:
        database.write(labelled("H2O"), key_value_pairs={"charge": 1, "spin": 2})
    assert Dataset(tmp_path / "other.aselmdb")[0].info == {"charge": 1, "spin": 2}


def test_labels_are_checked_when_they_are_written_and_read(tmp_path):
    odd = labelled("H2O", charge=0, spin=1)
    odd.calc.results |= {"energy": np.array([-1.5]), "stress": np.eye(3)}
    write_aselmdb(tmp_path / "a.aselmdb", [odd])
    results = Dataset(tmp_path / "a.aselmdb")[0].calc.results
    assert results["energy"] == -1.5 and np.ndim(results["energy"]) == 0
    np.testing.assert_array_equal(results["stress"], [1, 1, 1, 0, 0, 0])
    for change, words in (
        ({"energy": np.nan}, "energy is not finite"),
        ({"forces": np.zeros((2, 3))}, r"structure 1 \(OH2\): its forces have shape \(2, 3\); 3"),
        ({"stress": np.zeros(5)}, "stress has shape"),
    ):
        broken = labelled("H2O")
        broken.calc.results |= change
        with pytest.raises(DataError, match=words):
            write_aselmdb(tmp_path / "b.aselmdb", [labelled("H2O"), broken])
        with ase.db.connect(tmp_path / "theirs.aselmdb") as database:  # as others write it
            database.write(labelled("H2O"))
            database.write(broken)
        with pytest.raises(DataError, match=f"theirs.aselmdb, .*{words}"):
            Dataset(tmp_path / "theirs.aselmdb")[1]
        (tmp_path / "theirs.aselmdb").unlink()
    assert not (tmp_path / "b.aselmdb").exists()


def test_rows_deleted_from_a_file_are_skipped(tmp_path):
    path = tmp_path / "a.aselmdb"
    write_aselmdb(path, [labelled(name) for name in ("H2O", "CH4", "H2")])
    database = ase.db.connect(path)
    database.delete([2])
    database.close()
    dataset = Dataset(path)
    assert [len(atoms) for atoms in dataset] == [3, 2]
    assert list(dataset.natoms) == [3, 2]


# --- folders and indices ------------------------------------------------------------------------


def test_a_folder_of_shards_is_read_in_the_order_of_names(folder):
    dataset = Dataset(folder)
    assert len(dataset) == 5
    formulas = [atoms.get_chemical_formula() for atoms in dataset]
    assert formulas == ["H2O", "CH4", "C2H6", "H3N", "H2"]
    assert [atoms.info["charge"] for atoms in dataset] == [-1, 0, 1, 2, 3]
    assert list(dataset.natoms) == [3, 5, 8, 4, 2]
    assert dataset.natoms.dtype == np.int64


def test_indices_run_from_both_ends_and_stop_there(folder):
    dataset = Dataset(str(folder))
    assert len(dataset[-1]) == len(dataset[np.int64(4)]) == 2
    for index in (5, -6):
        with pytest.raises(IndexError, match="data set of 5"):
            dataset[index]


def test_a_list_mixes_files_and_folders(folder, tmp_path):
    write_aselmdb(tmp_path / "more.aselmdb", [labelled("O2")])
    dataset = Dataset([tmp_path / "more.aselmdb", folder])
    assert list(dataset.natoms) == [2, 3, 5, 8, 4, 2]
    assert dataset[0].get_chemical_formula() == "O2"


def test_metadata_npz_gives_natoms_without_reading_the_rows(folder):
    # A number in the middle that is not true shows where the answer came from.
    np.savez(folder / "metadata.npz", natoms=np.array([3, 5, 99, 4, 2]), other=np.zeros(5))
    assert list(Dataset(folder).natoms) == [3, 5, 99, 4, 2]


@pytest.mark.parametrize("natoms", [[3, 5, 8, 4], [2, 4, 8, 5, 3], [[3, 5, 8, 4, 2]]])
def test_metadata_npz_that_does_not_fit_is_not_believed(folder, natoms):
    np.savez(folder / "metadata.npz", natoms=np.array(natoms))
    assert list(Dataset(folder).natoms) == [3, 5, 8, 4, 2]


def test_natoms_of_files_that_others_wrote_is_counted(tmp_path):
    with ase.db.connect(tmp_path / "other.aselmdb") as database:
        for name in ("H2O", "CH4"):
            database.write(labelled(name))
    assert list(Dataset(tmp_path / "other.aselmdb").natoms) == [3, 5]


@pytest.mark.slow
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_worker_processes_read_the_same(folder, context):
    dataset = Dataset(folder)
    dataset[0]  # open before the workers start: their handles must be their own
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context=context)
    for read, expected in zip(loader, dataset, strict=True):
        assert_same(read, expected)


def test_a_read_only_folder_stays_as_it_is(folder):
    files = sorted(os.listdir(folder))
    dataset = Dataset(folder)
    assert len(list(dataset)) == 5
    assert sorted(os.listdir(folder)) == files
    assert len(pickle.loads(pickle.dumps(dataset))[2]) == 8


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
def test_paths_that_hold_no_data_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Dataset(tmp_path / "nowhere")
    with pytest.raises(DataError, match="without .aselmdb files"):
        Dataset(tmp_path)
    with pytest.raises(DataError, match="list of paths is empty"):
        Dataset([])
    write_aselmdb(tmp_path / "none" / "a.aselmdb", [])
    with pytest.raises(DataError, match="a.aselmdb: no structures inside"):
        Dataset(tmp_path / "none")
    (tmp_path / "text.xyz").write_text("3\n")
    with pytest.raises(DataError, match="not an .aselmdb file"):
        Dataset(tmp_path / "text.xyz")
    for content in (b"", b"not a database" * 1000):
        (tmp_path / "text.aselmdb").write_bytes(content)
        with pytest.raises(DataError, match="not a readable .aselmdb file"):
            Dataset(tmp_path)


def test_structures_without_labels_are_not_written(tmp_path):
    half = molecule("H2O")
    half.calc = SinglePointCalculator(half, energy=1.0)
    moved = labelled("H2O")
    moved.positions[0] += 0.1  # the labels are those of another structure now
    for atoms in (molecule("H2O"), half, moved):
        with pytest.raises(DataError, match="structure 1 .* has no (energy and no )?forces"):
            write_aselmdb(tmp_path / "a.aselmdb", [labelled("H2O"), atoms])
        assert not list(tmp_path.iterdir())


def test_rows_without_labels_are_read_only_when_asked(tmp_path):
    with ase.db.connect(tmp_path / "test.aselmdb") as database:
        database.write(molecule("H2O"), data={"charge": 0, "spin": 1})
    with pytest.raises(DataError, match="test.aselmdb, structure 0 .* labelled=False"):
        Dataset(tmp_path)[0]
    read = Dataset(tmp_path, labelled=False)[0]
    assert read.calc is None
    assert read.info == {"charge": 0, "spin": 1}


def test_a_file_is_overwritten_only_when_asked(tmp_path):
    path = tmp_path / "a.aselmdb"
    write_aselmdb(path, [labelled("H2O")])
    with pytest.raises(FileExistsError, match="overwrite=True"):
        write_aselmdb(path, [labelled("CH4")])
    assert len(Dataset(path)[0]) == 3
    write_aselmdb(path, [labelled("CH4")], overwrite=True)
    assert len(Dataset(path)[0]) == 5
    with pytest.raises(DataError, match="ends in .aselmdb"):
        write_aselmdb(tmp_path / "a.db", [labelled("H2O")])


def test_a_killed_writer_leaves_nothing_that_looks_complete(tmp_path):
    child = os.fork()
    if child == 0:

        def structures():
            for _ in range(10):
                yield labelled("H2O")
            os._exit(7)  # as by SIGKILL: no clean-up of any kind

        write_aselmdb(tmp_path / "a.aselmdb", structures())
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7
    assert list(tmp_path.iterdir())  # what it left
    with pytest.raises(DataError, match="without .aselmdb files"):
        Dataset(tmp_path)
    write_aselmdb(tmp_path / "a.aselmdb", [labelled("H2O")])
    assert len(Dataset(tmp_path)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.aselmdb"]


def test_a_file_that_another_process_made_meanwhile_is_kept(tmp_path, monkeypatch):
    path = tmp_path / "a.aselmdb"

    @contextmanager
    def after_another(file):
        with atomic_write(file) as partial:
            path.write_text("another's")  # while this one waited for the lock
            yield partial

    monkeypatch.setattr(data, "atomic_write", after_another)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        write_aselmdb(path, [labelled("H2O")])
    assert path.read_text() == "another's"


# --- splits, samples, neighbours ----------------------------------------------------------------


def test_a_sample_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """A mixture of two samples would have structures of one's training in the other's test."""
    for split in data.SPLITS:
        write_aselmdb(tmp_path / "all" / f"{split}.aselmdb", [labelled("H2")])
    out = tmp_path / "few"
    with locked(out), pytest.raises(RunError, match="another process works in"):
        data.write_sample(tmp_path / "all", out, 20)

    def until_full(file, structures, overwrite=False):
        if file.stem == "test":
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        return write_aselmdb(file, structures, overwrite)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(data, "write_aselmdb", until_full)
        data.write_sample(tmp_path / "all", out, 20)
    assert not list(out.iterdir())
    assert data.write_sample(tmp_path / "all", out, 20) == dict.fromkeys(data.SPLITS, 1)


def test_a_sample_is_spread_over_each_split(tmp_path, capsys):
    for split, count in (("train", 30), ("val", 3), ("test", 9)):
        structures = [labelled("H2", charge=i) for i in range(count)]
        write_aselmdb(tmp_path / "all" / f"{split}.aselmdb", structures)
    (tmp_path / "all" / "references.json").write_text("{}")
    counts = data.write_sample(tmp_path / "all", tmp_path / "few", 20)
    assert counts == {"train": 14, "val": 3, "test": 3}
    charges = [atoms.info["charge"] for atoms in Dataset(tmp_path / "few" / "train.aselmdb")]
    assert (charges[0], charges[-1], len(set(charges))) == (0, 29, 14)
    assert (tmp_path / "few" / "references.json").exists()

    arguments = ["data", "sample", str(tmp_path / "all"), "--out", str(tmp_path / "cli")]
    if "sample" in cli.DATA_COMMANDS:
        assert cli.main([*arguments, "--structures", "20"]) == 0
        assert "train: 14 structures" in capsys.readouterr().out


def test_the_committed_sample_is_small_labelled_and_split_by_molecule():
    molecules = {}
    for split in data.SPLITS:
        dataset = Dataset(SAMPLE / f"{split}.aselmdb")
        molecules[split] = {atoms.info["molecule"] for atoms in dataset}
        for atoms in dataset:
            info = atoms.info
            assert np.isfinite(atoms.get_forces()).all()
            assert info["num_atoms"] == len(atoms)
            assert info["num_electrons"] == atoms.numbers.sum() - info["charge"]
            assert (info["num_electrons"] + info["spin"]) % 2 == 1
            assert "GFN2-xTB" in info["label"]
    assert not molecules["train"] & (molecules["val"] | molecules["test"])
    assert not molecules["val"] & molecules["test"]
    caffeine = "Cn1c(=O)c2c(ncn2C)n(C)c1=O"  # held out, alone and with others
    assert not any(caffeine in name for name in molecules["train"] | molecules["val"])
    size = sum(path.stat().st_size for path in SAMPLE.glob("*.aselmdb"))
    assert size < 2e6


@pytest.mark.slow
def test_fairchem_reads_what_we_write(folder):
    datasets = pytest.importorskip("fairchem.core.datasets")
    options = {"r_energy": True, "r_forces": True, "r_data_keys": ["charge", "spin"]}
    theirs = datasets.AseDBDataset({"src": str(folder), "a2g_args": options})
    ours = Dataset(folder)
    assert len(theirs) == len(ours)
    for read, atoms in zip(theirs, ours, strict=True):
        np.testing.assert_array_equal(read.atomic_numbers, atoms.numbers)
        np.testing.assert_allclose(read.pos, atoms.positions, atol=1e-6)
        np.testing.assert_allclose(read.forces, atoms.get_forces(), atol=1e-6)
        assert float(read.energy) == pytest.approx(atoms.get_potential_energy(), abs=1e-6)
        assert (int(read.charge), int(read.spin)) == (atoms.info["charge"], atoms.info["spin"])
