"""Make `data/physics`: groups of structures that differ in one thing.

    python data/physics/make.py --out data/physics
    python data/physics/make.py --dft --out data/generated/physics-dft

In: `molecules.txt`, small molecules and complexes of the test part of `data/xtb`, on which no model
of this package is trained. Out: `test.aselmdb`, geometries by GFN2-xTB, labels by GFN2-xTB or, with
`--dft`, by wB97M-V/def2-TZVPD. `measure.py` says what the tasks are, and measures a model on them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.calculators.calculator import CalculatorError
from ase.calculators.singlepoint import SinglePointCalculator
from ase.optimize import BFGS
from tqdm import tqdm

from allscaip_lite.cli import run_script
from allscaip_lite.data.aselmdb import checksum, write_aselmdb
from allscaip_lite.labels import LabelError, queue, xtb
from allscaip_lite.labels.sampling import assemble, embed
from allscaip_lite.labels.xtb import GFN2xTB
from data.xtb.sets import in_state, label_entry, take_over
from data.xtb.systems import protomers

MOLECULES = Path(__file__).parent / "molecules.txt"
CUTOFF = 6.0  # Å between closest atoms: beyond it, `long_range`
GROUPS = 12  # of a task
MEMBERS = 4  # conformers of a molecule, at most
GAPS = (1.0, 2.0, 3.0, 5.0, 7.0, 9.0, 12.0)  # Å, added to the contact of the relaxed complex


@dataclass(frozen=True)
class Group:
    """Structures of one task and one molecule; an entry of the queue of DFT labels."""

    task: str
    molecule: str
    seed: int = 0

    @property
    def name(self) -> str:
        return f"physics/{self.task}/{self.molecule}/seed {self.seed}"

    @property
    def split(self) -> str:
        return "test"

    def structures(self) -> list[Atoms]:
        """All members, GFN2-xTB's energy (eV) and forces (eV/Å) in `info`; [] if one fails."""
        return list(_structures(self))


Made = list[tuple[str, Atoms]]  # task and structure, charge and spin in `info`


def plan(
    seed: int = 0, groups: int = GROUPS, progress: bool = False, tasks: Sequence[str] = ()
) -> list[Group]:
    """The first `groups` groups that can be made of every task, or of `tasks`; the tasks take
    turns.
    """
    candidates = _candidates(seed)
    chosen: list[tuple[int, Group]] = []
    tasks = tasks or list(_MAKERS)
    with tqdm(total=groups * len(tasks), unit="groups", disable=not progress) as bar:
        for task in tasks:
            made = 0
            for molecule in candidates["complex" if task == "distance" else "molecule"]:
                if made < groups and (group := Group(task, molecule, seed)).structures():
                    chosen.append((made, group))
                    made += 1
                    bar.update()
    return [group for _, group in sorted(chosen, key=lambda pair: pair[0])]


@cache
def _candidates(seed: int) -> dict[str, list[str]]:
    """The molecules and the complexes of `molecules.txt`, well mixed."""
    names = MOLECULES.read_text(encoding="utf-8").split()
    rng = np.random.default_rng(seed)
    return {
        kind: [str(name) for name in rng.permutation([n for n in names if ("." in n) == several])]
        for kind, several in (("molecule", False), ("complex", True))
    }


@cache
def _structures(group: Group) -> list[Atoms]:
    try:
        made = _MAKERS[group.task](group)
        return [_labelled(atoms, group, task) for task, atoms in made]
    except (CalculatorError, LabelError):
        return []


def _conformers(group: Group) -> Made:
    """Minima that differ by more than 5 meV, the lowest first."""
    found: list[tuple[float, Atoms]] = []
    for start in _embedded(group.molecule, group.seed, 12):
        atoms, energy = _minimum(start)
        if atoms is not None and all(abs(energy - other) > 0.005 for other, _ in found):
            found.append((energy, atoms))
    if len(found) < 2:
        raise LabelError("one conformer")
    found.sort(key=lambda pair: pair[0])
    return [("conformers", atoms) for _, atoms in found[:MEMBERS]]


def _protonated(group: Group) -> Made:
    """The molecule, and every ion of it with a proton more or less, each at its minimum."""
    neutral = _lowest(group.molecule, group.seed)
    found = []
    for smiles, change in protomers(group.molecule):
        ion = _lowest(smiles, group.seed)
        if len(ion) == len(neutral) + change:
            found.append(ion)
    if not found:
        raise LabelError("no site")
    return [("protonation", atoms) for atoms in [neutral, *found]]


def _ionised(group: Group) -> Made:
    """One geometry, charges 0, +1 and −1."""
    neutral = _lowest(group.molecule, group.seed)
    states = ((0, 1), (1, 2), (-1, 2))
    return [("ionisation", in_state(neutral, *state)) for state in states]


def _two_spins(group: Group) -> Made:
    """One geometry, singlet and triplet."""
    singlet = _lowest(group.molecule, group.seed)
    return [("spin_gap", in_state(singlet, 0, spin)) for spin in (1, 3)]


def _separated(group: Group) -> Made:
    """A relaxed complex, then its second molecule ever further away along the line of centres: up
    to `CUTOFF` one group, beyond it another, both compared with the relaxed complex.
    """
    rng = np.random.default_rng(group.seed)
    parts = [_lowest(part, group.seed) for part in group.molecule.split(".")]
    charge = sum(part.info["charge"] for part in parts)
    best: tuple[float, Atoms] | None = None
    for _ in range(4):
        start = in_state(assemble(parts, rng, contact=2.2), charge, 1)
        atoms, energy = _minimum(start)
        if atoms is not None and (best is None or energy < best[0]):
            best = energy, atoms
    if best is None:
        raise LabelError("no minimum")
    whole, first = best[1], len(parts[0])
    axis = whole.positions[first:].mean(0) - whole.positions[:first].mean(0)
    axis /= np.linalg.norm(axis)
    contact = _gap(whole, first)
    if not 1.2 < contact < 4.0:
        raise LabelError("the two molecules react")
    made: dict[str, list[Atoms]] = {"short_range": [whole], "long_range": [whole]}
    for more in (-0.2, *GAPS):
        moved = whole.copy()
        moved.positions[first:] += more * axis
        made["short_range" if _gap(moved, first) <= CUTOFF else "long_range"].append(moved)
    return [(task, atoms) for task, members in made.items() for atoms in members]


_MAKERS: dict[str, Callable[[Group], Made]] = {
    "conformers": _conformers,
    "protonation": _protonated,
    "ionisation": _ionised,
    "spin_gap": _two_spins,
    "distance": _separated,
}


def _gap(atoms: Atoms, first: int) -> float:
    """Distance (Å) of the closest atoms of the first `first` atoms and the others."""
    return float(atoms.get_all_distances()[:first, first:].min())


@cache
def _embedded(smiles: str, seed: int, number: int) -> list[Atoms]:
    from rdkit import Chem

    rng = np.random.default_rng(seed)
    charge = Chem.GetFormalCharge(Chem.MolFromSmiles(smiles))
    return [in_state(atoms, charge, 1) for atoms in embed(smiles, rng, number)]


@cache
def _lowest(smiles: str, seed: int) -> Atoms:
    """The lowest of a few minima; several tasks start from it, so copy it before a change."""
    minima = [_minimum(start) for start in _embedded(smiles, seed, 4)]
    found = [(energy, index) for index, (atoms, energy) in enumerate(minima) if atoms is not None]
    if not found:
        raise LabelError(f"no minimum of {smiles}")
    return minima[min(found)[1]][0]


def _minimum(start: Atoms) -> tuple[Atoms | None, float]:
    """A minimum of GFN2-xTB and its energy (eV); None if 250 steps do not reach it."""
    state = start.info["charge"], start.info["spin"]
    atoms = in_state(start, *state)
    if len(atoms) == 1:
        return atoms, 0.0
    atoms.calc = GFN2xTB()
    if not BFGS(atoms, logfile=None, maxstep=0.1).run(fmax=0.02, steps=250):
        return None, np.nan
    return in_state(atoms, *state), float(atoms.get_potential_energy())


def _labelled(atoms: Atoms, group: Group, task: str) -> Atoms:
    """With GFN2-xTB's energy and forces, both as labels and in `info`."""
    done = in_state(atoms, atoms.info["charge"], atoms.info["spin"])
    done.positions = np.round(done.positions - done.positions.mean(axis=0), 6)
    results = xtb.results_of(done)
    energy, forces = results["energy"], results["forces"]
    done.info |= {
        "data_id": task,
        "group": group.molecule,
        "molecule": group.molecule,
        "source": group.name,
        "reference_source": "allscaip-lite, data/physics/make.py",
        "xtb_energy": energy,
        "xtb_forces": forces,
    }
    done.calc = SinglePointCalculator(done, energy=energy, forces=forces)
    return done


# --- The command -----------------------------------------------------------------------------


def make_dft(
    folder: Path,
    groups: Sequence[Group],
    workers: queue.Workers = 1,
    known: Path | None = None,
    collect_only: bool = False,
) -> None:
    """Label the groups by DFT, or go on with it, and write those that are labelled.

    Args:
        folder: Folder of the data set; `folder/jobs` keeps the result of each group.
        groups: What is labelled.
        workers: As `run_jobs` has it.
        known: Folder of a set that this command made, whose labels are taken.
        collect_only: Label nothing.
    """
    from allscaip_lite.labels import dft

    store = folder / "jobs"
    jobs = [queue.Job(group.name, dft.job_file(group.name), "test", group) for group in groups]
    store.mkdir(parents=True, exist_ok=True)
    if known is not None:
        count = take_over(store, jobs, known, dft.OMOL25.name)
        print(f"{count} groups taken from {known}")
    if not collect_only:
        queue.run_jobs(store, jobs, label_entry, workers)
    queue.collect(store, jobs, folder, ["test"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--groups", type=int, default=GROUPS, help="of each task, at most")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other molecules")
    parser.add_argument("--tasks", nargs="+", choices=list(_MAKERS), help="default: all")
    parser.add_argument(
        "--dft",
        action="store_true",
        help="label by wB97M-V/def2-TZVPD: hours; a run that was stopped goes on",
    )
    queue.add_workers(parser)
    parser.add_argument(
        "--known", type=Path, help="with --dft: folder of a set it made: its labels are taken"
    )
    parser.add_argument(
        "--collect",
        action="store_true",
        help="with --dft: label nothing, write the groups that are labelled so far",
    )


def run(args: argparse.Namespace) -> None:
    if (args.collect or args.known) and not args.dft:
        raise LabelError("--collect and --known go with --dft: GFN2-xTB takes two minutes")
    groups = plan(args.seed, args.groups, progress=True, tasks=args.tasks or ())
    if args.dft:
        make_dft(args.out, groups, args.workers, args.known, args.collect)
        return
    structures = [atoms for group in groups for atoms in group.structures()]
    args.out.mkdir(parents=True, exist_ok=True)
    write_aselmdb(args.out / "test.aselmdb", structures, overwrite=True)
    print(f"{len(structures)} structures, checksum {checksum(structures)[:16]}")


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(
        add_arguments,
        run,
        script="data/physics/make.py",
        description=__doc__,
        stopped="with --dft the same command goes on from here",
        argv=argv,
    )


if __name__ == "__main__":
    sys.exit(main())
