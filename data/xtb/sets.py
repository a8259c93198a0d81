"""Sets of molecules that are sampled and labelled by GFN2-xTB, each system a job of a queue.

In: systems with the structures wanted of each, and a function that samples one. Out: the folder of
a data set, `{train,val,test}.aselmdb` and `references.json` with the energies of the free atoms.
`relax` and `langevin` move a structure by GFN2-xTB. `take_over` spares the jobs of a queue, of
whatever labels, that a set has already.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from ase import Atoms, units
from ase.data import atomic_numbers
from ase.md.langevin import Langevin
from ase.optimize import BFGS

from allscaip_lite.data.aselmdb import SPLITS, Dataset, write_aselmdb
from allscaip_lite.files import store_text
from allscaip_lite.labels import LabelError, dft, queue
from allscaip_lite.labels.sampling import System
from allscaip_lite.labels.xtb import GFN2xTB, results_of


def in_state(atoms: Atoms, charge: int, spin: int) -> Atoms:
    """Elements and positions alone, with charge and multiplicity in `info`."""
    return Atoms(atoms.numbers, atoms.positions, info={"charge": charge, "spin": spin})


def relax(atoms: Atoms, steps: int) -> Atoms:
    """The structure after so many steps of BFGS by GFN2-xTB, or fewer: until no force is above
    0.02 eV/Å.
    """
    atoms = atoms.copy()
    atoms.calc = GFN2xTB()
    BFGS(atoms, logfile=None, maxstep=0.1).run(fmax=0.02, steps=steps)
    atoms.calc = None
    return atoms


def langevin(start: Atoms, temperature: float, rng: np.random.Generator) -> Langevin:
    """Dynamics of a copy of `start` at `temperature` (K) by GFN2-xTB, in steps of 1 fs."""
    atoms = start.copy()
    atoms.calc = GFN2xTB()
    spread = np.sqrt(atoms.get_masses() * units.kB * temperature)  # Maxwell–Boltzmann, (N,)
    atoms.set_momenta(rng.normal(size=(len(atoms), 3)) * spread[:, None])
    return Langevin(
        atoms,
        1.0 * units.fs,
        temperature_K=temperature,
        friction=0.02 / units.fs,
        fixcm=False,
        rng=rng,
    )


class Entry(Protocol):
    """What a data set is made of: something with structures to label."""

    def structures(self) -> list[Atoms]:
        """Its structures, with charge and spin multiplicity in `info`."""


def label_entry(entry: Entry) -> list[Atoms]:
    """The structures of an entry of a data set, labelled by DFT: the work of a queue."""
    return [dft.label(atoms) for atoms in entry.structures()]


def store_plan(folder: str | os.PathLike[str], plan: Mapping[str, Any]) -> None:
    """Record in `plan.json` which data set a folder holds; LabelError where it holds another."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path, text = folder / "plan.json", json.dumps(plan, indent=0)
    if path.exists() and path.read_text() != text:
        raise LabelError(f"{folder} holds another data set (its plan.json): choose a new --out")
    store_text(path, text)


@dataclass(frozen=True)
class Job:
    """Structures of one system.

    Attributes:
        system: What is sampled.
        count: How many structures are wanted.
        split: The split they go to.
        seed: Another seed, other structures.
    """

    system: System
    count: int
    split: str
    seed: int = 0


def take_share(jobs: Sequence[Job], share: float) -> list[Job]:
    """The jobs of some of the systems, by a hash of their names: a larger share holds a smaller
    one. Raises LabelError for a share that no system belongs to.
    """
    taken = [
        job
        for job in jobs
        if int(hashlib.sha256(job.system.name.encode()).hexdigest()[:8], 16) < share * 16**8
    ]
    if not taken:
        raise LabelError(f"no system is in a share of {share}: a number above 0, up to 1")
    return taken


def make_set(
    folder: str | os.PathLike[str],
    jobs: Sequence[Job],
    sample: Callable[[Job], list[Atoms]],
    workers: queue.Workers = 1,
) -> None:
    """Sample all jobs, or go on with it, and write the data set and the energies of free atoms.

    The number of workers changes nothing but the time.

    Args:
        folder: Folder of the data set; `folder/jobs` keeps the result of each job.
        jobs: What is sampled, all with one seed.
        sample: Makes the structures of a job, labelled by GFN2-xTB.
        workers: As `run_jobs` has it.

    Raises:
        LabelError: `folder` holds the results of other jobs or another seed.
    """
    folder = Path(folder)
    listed = [[job.system.name, job.count, job.split] for job in jobs]
    store_plan(folder, {"seed": jobs[0].seed, "jobs": listed})
    queued = [
        queue.Job(job.system.name, f"{index:05d}", job.split, job) for index, job in enumerate(jobs)
    ]
    queue.run_jobs(folder / "jobs", queued, sample, workers)
    found = queue.collect(folder / "jobs", queued, folder)
    elements = {symbol for split in found.values() for atoms in split for symbol in atoms.symbols}
    references = free_atom_energies(sorted(elements, key=lambda element: atomic_numbers[element]))
    store_text(folder / "references.json", json.dumps(references, indent=1))


def free_atom_energies(elements: Iterable[str]) -> dict[str, float]:
    """GFN2-xTB energy in eV of each free neutral atom, in its lowest multiplicity state."""
    energies = {}
    for element in elements:
        number = atomic_numbers[element]
        tried = []
        for spin in range(1 + number % 2, 6, 2):
            try:
                tried.append(results_of(Atoms(element, info={"charge": 0, "spin": spin}))["energy"])
            except LabelError:
                continue  # too many unpaired electrons for the shell
        energies[element] = min(tried)
    return energies


def take_over(
    folder: str | os.PathLike[str],
    jobs: Sequence[queue.Job],
    known: str | os.PathLike[str],
    method: str,
    others: Mapping[str, list[Atoms]] = MappingProxyType({}),
) -> int:
    """Put the structures of a data set that `collect` wrote into a queue.

    What the queue has already stays as it is.

    Args:
        folder: The queue's folder.
        jobs: Its jobs.
        known: Folder of the data set.
        method: What `info["label"]` of its structures must begin with.
        others: Structures of more jobs, by the names of these.

    Returns:
        How many jobs are spared.

    Raises:
        FileNotFoundError: There is no such data set.
        LabelError: It was labelled by another method.
    """
    folder, known = Path(folder), Path(known)
    found: dict[str, list[Atoms]] = {}
    for path in (known / f"{split}.aselmdb" for split in SPLITS):
        for atoms in Dataset(path) if path.exists() else ():
            theirs = atoms.info.get("label", "an unknown method")
            if not theirs.startswith(method):
                raise LabelError(f"{path} is labelled by {theirs}: no labels for this queue")
            found.setdefault(atoms.info.get("entry") or atoms.info["source"], []).append(atoms)
    if not found:
        raise FileNotFoundError(
            f"{known} has no train, val or test.aselmdb: --known takes the folder of a data set "
            "that this command collected"
        )
    folder.mkdir(parents=True, exist_ok=True)
    found |= others
    missing = [job for job in jobs if job.name in found and not queue.is_done(folder / job.file)]
    for job in missing:
        write_aselmdb(folder / f"{job.file}.aselmdb", found[job.name])
    return len(missing)
