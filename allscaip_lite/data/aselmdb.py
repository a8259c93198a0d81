"""Labelled structures on disk, in the format of OMol25 (`.aselmdb`).

In: `ase.Atoms` with energy and forces, charge and spin multiplicity in `atoms.info`.
Out: the same, from one file, a folder of shards as OMol25 publishes them, or a list.
An `.aselmdb` is an LMDB file of ASE rows; charge, spin and every other piece of metadata sit in
the row's `data` (Levine et al., The Open Molecules 2025 dataset, arXiv:2505.08762).
Energies are in eV, forces in eV/Å, stress in eV/Å³ (Voigt, ASE's order).
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import operator
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import all_properties
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db.core import now
from ase.db.row import AtomsRow, atoms2dict
from ase.io.jsonio import encode
from tqdm import tqdm

from allscaip_lite.data.checks import LABELS, check_apart, check_atoms, checked_labels, held_results
from allscaip_lite.data.lmdb_file import ROW_BYTES, LMDBFile, unpack_json, write_lmdb
from allscaip_lite.electrons import Assumptions, charge_and_spin, stated_charge_and_spin
from allscaip_lite.errors import DataError, InputError, check_kind
from allscaip_lite.files import atomic_write, fingerprint, listed_paths, locked

SLOW = 4  # seconds, after which what is under way shows a progress bar
SPLITS = ("train", "val", "test")


def write_aselmdb(
    path: str | os.PathLike[str], structures: Iterable[Atoms], overwrite: bool = False
) -> int:
    """Write labelled structures to one `.aselmdb` file and return how many.

    Each structure carries a calculator that holds energy (eV) and forces (N, 3) (eV/Å), stress
    (6,) (eV/Å³) if there is one; everything in `atoms.info` (charge, spin, metadata) goes into the
    row's `data`. The file appears under its name only once it is complete.

    Raises FileExistsError where the file exists and `overwrite` is false, DataError for a
    structure without energy and forces, for labels that `checks` does not take, and for an `info`
    that is no JSON.
    """
    path = Path(path)
    if path.suffix != ".aselmdb":
        raise DataError(f"{path}: the name of a data file ends in .aselmdb")
    natoms: list[int] = []

    def entries() -> Iterator[tuple[str, str]]:
        for index, atoms in enumerate(structures):
            yield str(index + 1), _row(atoms, f"structure {index}")
            natoms.append(len(atoms))
        yield "nextid", encode(len(natoms) + 1)
        yield "metadata", encode({"natoms": natoms})

    with atomic_write(path) as partial:
        if path.exists() and not overwrite:  # asked here, where no other process makes it meanwhile
            what = "exists: choose another name (--out), or replace it (--overwrite, in Python "
            raise FileExistsError(errno.EEXIST, f"{what}overwrite=True)", str(path))
        write_lmdb(partial, entries())
    return len(natoms)


def _row(atoms: Atoms, where: str) -> str:
    """A row of ASE's databases, in JSON; raises `DataError` as `write_aselmdb` does."""
    check_atoms(atoms, where)
    check_apart(atoms, where)
    where = f"{where} ({atoms.symbols})"
    labels = checked_labels(held_results(atoms), len(atoms), where)
    labelled = atoms.copy()
    labelled.calc = SinglePointCalculator(labelled, **labels)
    row = {
        "ctime": now(),
        "mtime": now(),
        **atoms2dict(labelled),
        "cell": atoms.cell.array,
        "pbc": atoms.pbc,
        "data": dict(atoms.info),
    }
    try:
        return encode(row)
    except (RecursionError, TypeError, ValueError) as error:
        raise DataError(f"{where}: its info cannot be written as JSON ({error})") from error


class Dataset:
    """Labelled structures from `.aselmdb` files, by index; safe in DataLoader workers.

    `paths` is a file, a folder whose `.aselmdb` files are read in the order of their names, or a
    list of these. `dataset[i]` is an `ase.Atoms` with energy, forces (and stress where present) in
    a SinglePointCalculator and every entry of the row's `data` in `info`. A row that does not say
    its charge or spin yields an `info` without them. `labelled=False` admits rows without energy
    and forces, such as OMol25's test split.

    Raises FileNotFoundError for a missing path, DataError for a folder without data, a file that
    is not an `.aselmdb`, and (on access) a structure whose labels `checks` does not take.
    """

    def __init__(
        self,
        paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        labelled: bool = True,
    ) -> None:
        groups = [_shards(Path(path)) for path in listed_paths(paths)]
        self.paths = [shard for group in groups for shard in group]
        if not self.paths:
            raise DataError("no data: the list of paths is empty")
        self.labelled = labelled
        self._groups = groups
        self._natoms: np.ndarray | None = None
        self._open: dict[int, _Shard] = {}
        sizes = [len(self._shard(number).ids) for number in range(len(self.paths))]
        self._starts = np.concatenate([[0], np.cumsum(sizes)])  # (shards + 1,)
        if not len(self):
            raise DataError(f"{', '.join(map(str, self.paths))}: no structures inside")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Atoms:
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"structure {index} of a data set of {len(self)}")
        atoms, where = self._atoms(index % len(self))
        if self.labelled:
            found = {} if atoms.calc is None else atoms.calc.results
            try:
                labels = checked_labels(found, len(atoms), where)
            except DataError as error:
                if found:
                    raise
                raise DataError(
                    f"{error}: label it, or open the data set with labelled=False"
                ) from error
            atoms.calc.results = {**found, **labels}
        return atoms

    def _atoms(self, index: int) -> tuple[Atoms, str]:
        """A structure, and the words that name it in messages."""
        part, number = _place(self._starts, index)
        atoms = self._shard(part).atoms(self._shard(part).ids[number])
        return atoms, f"{self.paths[part]}, structure {number} ({atoms.symbols})"

    @property
    def natoms(self) -> np.ndarray:
        """Atoms of every structure, (len,) int64: from the metadata where that is consistent
        (OMol25's `metadata.npz`, or what `write_aselmdb` left in the file), else by reading.
        """
        if self._natoms is None:
            parts, shard = [], 0
            for group in self._groups:
                shards = range(shard, shard + len(group))
                shard += len(group)
                start = int(self._starts[shards.start])
                size = int(self._starts[shards.stop]) - start
                counts = _natoms_in_metadata(group)
                if counts is None or not self._agrees(counts, start, size):
                    counts = np.concatenate([self._count(s) for s in shards])
                parts.append(counts)
            self._natoms = np.concatenate(parts).astype(np.int64)
        return self._natoms

    def _agrees(self, counts: np.ndarray, start: int, size: int) -> bool:
        """Whether `counts` is as long as the structures from `start` on, and right at both ends."""
        if counts.shape != (size,):
            return False
        return all(int(counts[i]) == len(self._atoms(start + i)[0]) for i in {0, size - 1} if size)

    def _count(self, shard: int) -> np.ndarray:
        data = self._shard(shard)
        counts = np.asarray(data.metadata().get("natoms", ()))
        if counts.shape != (len(data.ids),) or counts.dtype.kind not in "iu":
            counts = np.array([len(data.atoms(number)) for number in data.ids], dtype=np.int64)
        return counts

    def _shard(self, number: int) -> _Shard:
        if number not in self._open:
            self._open[number] = _Shard(self.paths[number])
        return self._open[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}


def atoms_of_row(row: AtomsRow, where: str) -> Atoms:
    """The structure of a row of ASE's databases, with its pairs and its data in `info`.

    Raises `DataError`, naming it, where these contradict each other in charge or multiplicity.
    """
    kept = vars(row)  # a row's own attribute `charge`, its initial charges, would hide a pair
    kept["numbers"] = np.asarray(kept["numbers"], int)  # ASE takes a text as a formula
    atoms = row.toatoms()
    # ASE keeps charge, spin and other metadata with the row, not with the atoms.
    pairs = {key: kept[key] for key in row.key_value_pairs}
    data = {key: value for key, value in row.data.items() if value is not None or key not in pairs}
    if pairs:
        said = [stated_charge_and_spin(Atoms(info=part), where) for part in (pairs, data)]
        for name, one, other in zip(("charge", "multiplicity"), *said, strict=True):
            if None not in (one, other) and one != other:
                raise DataError(
                    f"{where}: its pairs say {name} {one}, its data {other}: keep the right one"
                )
    atoms.info = pairs | data
    return atoms


class Subset:
    """Some structures of a data set, by their indices, in that order; reads like a `Dataset`."""

    def __init__(self, data: Dataset, indices: np.ndarray) -> None:
        self.data, self.indices = data, np.asarray(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Atoms:
        return self.data[int(self.indices[index])]

    @property
    def natoms(self) -> np.ndarray:
        return self.data.natoms[self.indices]


class InMemory:
    """Structures by their indices (by default all), held in memory; reads like a `Dataset`."""

    def __init__(
        self, data: Dataset | Sequence[Atoms], chosen: Iterable[int] | None = None
    ) -> None:
        chosen = range(len(data)) if chosen is None else chosen
        self.structures = [data[int(index)] for index in chosen]
        self.natoms = np.array([len(atoms) for atoms in self.structures])

    def __len__(self) -> int:
        return len(self.structures)

    def __getitem__(self, index: int) -> Atoms:
        return self.structures[index]


class Mixture:
    """Several data sets as one, of which training takes given shares of its structures.

    Args:
        sets: the data sets; the mixture is read by index from the first of them to the last.
        shares: of each set, the share of the structures that are trained on; their sum is 1.

    Raises InputError for shares that are not one for each set, positive and of sum 1.
    """

    def __init__(self, sets: Sequence[Dataset | Subset], shares: Sequence[float]) -> None:
        if len(shares) != len(sets) or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
            raise InputError(
                f"shares {', '.join(map(str, shares))} of {len(sets)} data sets: give one for "
                "each, above 0 and with the sum 1"
            )
        self.sets, self.shares = list(sets), tuple(shares)
        self.natoms = np.concatenate([one.natoms for one in self.sets])
        self._starts = np.cumsum([0] + [len(one) for one in self.sets])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Atoms:
        part, number = _place(self._starts, index)
        return self.sets[part][number]

    def epoch(self, seed: int, number: int) -> np.ndarray:
        """Shuffled indices (about len(self),) of what one epoch trains on.

        No structure of a set comes again before all of that set have come: an epoch goes on in the
        shuffled set where the one before it stopped.
        """
        chosen = []
        for part, (one, share) in enumerate(zip(self.sets, self.shares, strict=True)):
            count, size = max(1, round(share * len(self))), len(one)
            first, last = number * count, (number + 1) * count
            passes = [
                np.random.default_rng([seed, part, turn]).permutation(size)
                for turn in range(first // size, (last - 1) // size + 1)
            ]
            start = first - first // size * size
            chosen.append(np.concatenate(passes)[start : start + count] + self._starts[part])
        return np.random.default_rng([seed, number]).permutation(np.concatenate(chosen))


LabelledData = Dataset | Subset | InMemory | Mixture  # what training and evaluation read


def _place(starts: np.ndarray, index: int) -> tuple[int, int]:
    """The part that an index is in, where all parts begin at `starts`, and its number there."""
    part = int(np.searchsorted(starts, index, side="right")) - 1
    return part, index - int(starts[part])


def check_data(data: object) -> None:
    """Raise TypeError for what is no data set, such as the path of one."""
    wanted = "a data set: Dataset(path) of a file or a folder, InMemory(atoms) of a list"
    check_kind(data, LabelledData, wanted)


def _shards(path: Path) -> list[Path]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder of .aselmdb data")
    if path.is_file():
        return [path]
    shards = sorted(file for file in path.glob("*.aselmdb") if file.is_file())
    if not shards:
        raise DataError(f"{path}: a folder without .aselmdb files")
    return shards


class _Shard:
    """One file: rows of an ASE database in LMDB, by their ids (1, 2, ... without deleted ones)."""

    def __init__(self, path: Path) -> None:
        if path.suffix != ".aselmdb":
            raise DataError(
                f"{path}: not an .aselmdb file; `allscaip-lite data convert {path} --out "
                f"{path.stem}.aselmdb` makes one of what ASE reads"
            )
        self.path, self.file = path, LMDBFile(path)
        # whole numbers take 21 digits and a comma
        limit = 22 * self.file.entries + ROW_BYTES
        following, deleted = self._entry("nextid", limit, 1), self._entry("deleted_ids", limit, [])
        try:
            deleted = {int(number) for number in deleted}
            count = int(following) - 1
        except (TypeError, ValueError) as error:
            raise DataError(f"{path} is damaged: its ids are no numbers") from error
        if not 0 <= count - len(deleted) <= self.file.entries:
            raise DataError(f"{path} is damaged: it has fewer than the {count:,} rows that it says")
        self.ids: Sequence[int] = range(1, count + 1)
        if deleted:
            self.ids = [number for number in self.ids if number not in deleted]

    def _entry(self, key: str, limit: int, default: Any) -> Any:
        content = self.file.get(key.encode())
        if content is None:
            return default
        try:
            return unpack_json(content, limit)
        except DataError as error:
            raise DataError(f"{self.path}, entry {key}: {error}") from error
        except (MemoryError, TypeError, ValueError, zlib.error) as error:
            raise DataError(f"{self.path} is damaged: its entry {key} ({error})") from error

    def metadata(self) -> dict[str, Any]:
        found = self._entry("metadata", 22 * self.file.entries + ROW_BYTES, {})
        return found if isinstance(found, dict) else {}

    def atoms(self, number: int) -> Atoms:
        content = self._entry(str(number), ROW_BYTES, None)
        if content is None:
            raise DataError(f"{self.path} has no row {number}, though it says so")
        try:
            for name in all_properties:  # as ASE's own reader does
                if isinstance(content.get(name), list):
                    content[name] = np.array(content[name])
            if not isinstance(content.setdefault("data", {}), dict):
                raise TypeError("its data is no dictionary")  # a text, which ASE would decode
            content["id"] = number
            atoms = atoms_of_row(AtomsRow(content), f"{self.path}, row {number}")
        except InputError:
            raise
        except Exception as error:  # whatever else a row says than what ASE wrote
            raise DataError(
                f"{self.path}, row {number}, is no structure ({type(error).__name__}: {error})"
            ) from error
        return atoms


def _natoms_in_metadata(group: list[Path]) -> np.ndarray | None:
    """`natoms` of the `metadata.npz` in the folder of the shards, where there is one."""
    file = group[0].parent / "metadata.npz"
    if not file.is_file():
        return None
    try:
        with np.load(file, allow_pickle=False) as metadata:
            return metadata.get("natoms")
    except (EOFError, MemoryError, OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{file} is damaged ({error}): copy it again, or remove it") from error


def checksum(structures: Iterable[Atoms]) -> str:
    """SHA-256 of elements, positions, energies and forces, in order, to the last bit.

    Files that hold the same structures may differ in their bytes; this does not.
    """
    digest = hashlib.sha256()
    for atoms in structures:
        energy = atoms.calc.results["energy"]
        for values in (atoms.numbers, atoms.positions, energy, atoms.calc.results["forces"]):
            digest.update(np.ascontiguousarray(values, dtype="<f8").tobytes())
    return digest.hexdigest()


def data_fingerprint(
    data: LabelledData, assumed: Assumptions | None = None, limit: int = 2000
) -> str:
    """The same for the same structures and labels, in order, charges and multiplicities included.

    Of more than `limit` structures, evenly spaced ones are read, and of the others the numbers of
    atoms alone: a change of few of very many goes unnoticed. `assumed` is as for `charge_and_spin`.
    Raises `StructureError` for a charge or multiplicity that is not possible.
    """
    check_data(data)
    parts = [data.natoms]
    chosen = evenly_spaced(len(data), limit)
    for index in tqdm(chosen, desc="looking at the data", delay=SLOW, leave=False):
        atoms = data[int(index)]
        where = f"structure {index} ({atoms.symbols})"
        state = np.array(charge_and_spin(atoms, where, assumed=assumed))
        parts += [atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc, state]
        parts += [np.asarray(atoms.calc.results[n]) for n in LABELS if n in atoms.calc.results]
    return fingerprint(parts)


def evenly_spaced(count: int, limit: int) -> np.ndarray:
    """Indices of at most `limit` of `count` things, from the first to the last of them.

    Raises InputError for a limit below 1.
    """
    if limit < 1:
        raise InputError(f"{limit} structures: give 1 or more")
    return np.unique(np.linspace(0, count - 1, min(limit, count)).astype(int))


def write_sample(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    structures: int,
    overwrite: bool = False,
) -> dict[str, int]:
    """Write a small sample of a data set and return how many structures of each split it has.

    About `structures` in all: seven in ten are of the training set, the others half each; within a
    split they are spread evenly over its length, so the same source yields the same sample. Both
    folders have `{train,val,test}.aselmdb`; `references.json` is copied where there is one.
    All of it is written or nothing. Raises `RunError` where another process writes there.
    """
    if structures < 1:
        raise InputError(f"{structures} structures: give 1 or more")
    source, out = Path(source), Path(out)
    sets = [Dataset(source / f"{split}.aselmdb") for split in SPLITS]
    counts = {}
    with locked(out), ExitStack() as undo:
        for split, dataset, share in zip(SPLITS, sets, (0.7, 0.15, 0.15), strict=True):
            file, wanted = out / f"{split}.aselmdb", min(len(dataset), round(share * structures))
            chosen = np.linspace(0, len(dataset) - 1, wanted).round().astype(int)
            progress = tqdm(chosen, desc=split, delay=SLOW, leave=False)
            picked = (dataset[index] for index in progress)
            counts[split] = write_aselmdb(file, picked, overwrite)
            undo.callback(file.unlink)
        if (source / "references.json").exists():
            with atomic_write(out / "references.json") as partial:
                shutil.copyfile(source / "references.json", partial)
        undo.pop_all()  # all of it is there
    return counts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `allscaip-lite data sample`."""
    parser.add_argument("source", type=Path, help="folder with {train,val,test}.aselmdb")
    parser.add_argument("--out", type=Path, required=True, help="folder of the sample")
    parser.add_argument("--structures", type=int, default=600, help="about how many")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier sample")


def run(args: argparse.Namespace) -> int:
    """`allscaip-lite data sample`: write the sample, say its size; the exit status."""
    for split, count in write_sample(
        args.source, args.out, args.structures, args.overwrite
    ).items():
        print(f"{split}: {count} structures")
    return 0
