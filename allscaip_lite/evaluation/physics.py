"""Differences of energy that chemists ask for: `allscaip-lite data physics`, `evaluate --physics`.

A task is a set of groups, and a group some structures that differ in one thing: the conformer, a
proton, the charge, the spin, the distance of two molecules. What counts is the energy of each
against the first of its group; errors that all of them share cancel. Tasks are those of OMol25's
evaluations (D. S. Levine et al., arXiv:2505.08762, section on evaluations), in small:

- `conformers`: minima of one molecule, against the lowest;
- `protonation`: a molecule with a proton more or less, against the neutral one and a bare proton;
- `ionisation`: charge +1 and −1 at the geometry of the neutral molecule;
- `spin_gap`: triplet and singlet at one geometry;
- `short_range`, `long_range`: two molecules, closest atoms up to and beyond 6 Å apart, against
  their minimum.

Comes in: molecules that no model of this package is trained on, the test part of `teacher`. Goes
out: `test.aselmdb`, geometries by GFN2-xTB, labels by GFN2-xTB or by ωB97M-V/def2-TZVPD.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import CalculatorError
from ase.calculators.singlepoint import SinglePointCalculator
from ase.optimize import BFGS
from tqdm import tqdm

from allscaip_lite.data.aselmdb import Dataset, checksum, write_aselmdb
from allscaip_lite.data.batches import in_order
from allscaip_lite.model import AllScAIP


class PhysicsError(ValueError):
    """Data without the groups of this room, or a wrong command; the message says what to do."""


# --- Measuring -------------------------------------------------------------------------------

CUTOFF = 6.0  # Å between closest atoms: beyond it, `long_range`
# eV, a bare proton's energy in GFN2-xTB, η/2 + Γ/3 of hydrogen (Bannwarth et al., 2019); without
# electrons it is zero in DFT
GFN2_PROTON = 6.2464


class Difference(NamedTuple):
    """The energy of one structure against the first of its group, in eV."""

    task: str
    group: str
    truth: float
    predicted: float
    xtb: float  # GFN2-xTB's; not a number where the data do not keep it


@torch.no_grad()
def differences(
    model: AllScAIP, data: Dataset, max_atoms: int = 400, proton: float = 0.0
) -> list[Difference]:
    """Of every structure of a data set but the first ones of their groups.

    `proton`: the energy (eV) of a bare proton at the level of theory that the model has learned,
    where it is another one than that of the labels: `GFN2_PROTON` for a model of GFN2-xTB against
    labels by DFT. From GFN2-xTB's own energies beside such labels it is taken off in any case.

    Structures say where they belong: `info["data_id"]` (the task) and `info["group"]`; the first of
    a group is the one that the others are held against. Raises PhysicsError where they do not, or
    where a group has one structure only.
    """
    model.eval()
    batches = in_order(data, max_atoms)
    energies = [model(b.structures, create_graph=False).energy.cpu() for b in batches]
    predicted = torch.cat(energies).tolist()
    groups: dict[tuple[str, str], list[tuple[float, float, float]]] = defaultdict(list)
    sizes: dict[tuple[str, str], int] = {}
    for index, energy in enumerate(predicted):
        atoms = data[index]
        if not {"group", "data_id"} <= set(atoms.info):
            raise PhysicsError(
                f"structure {index} has no `group` and `data_id` in its info; "
                "`allscaip-lite data physics --out FOLDER` makes data that do"
            )
        key = atoms.info["data_id"], atoms.info["group"]
        truth, xtb = atoms.get_potential_energy(), atoms.info.get("xtb_energy", np.nan)
        protons = len(atoms) - sizes.setdefault(key, len(atoms))  # more than the first one has
        if not np.isclose(xtb, truth, rtol=0, atol=1e-6):
            xtb -= protons * GFN2_PROTON
        groups[key].append((truth, energy - protons * proton, xtb))
    lonely = [group for (_, group), members in groups.items() if len(members) < 2]
    if lonely:
        raise PhysicsError(f"groups of one structure, nothing to compare: {', '.join(lonely[:5])}")
    return [
        Difference(*key, *(value - base for value, base in zip(member, members[0], strict=True)))
        for key, members in groups.items()
        for member in members[1:]
    ]


def summary(found: Sequence[Difference]) -> dict[str, dict[str, float]]:
    """By task: how many groups and differences, their mean size, the MAE of the model and, where
    GFN2-xTB is not the truth itself, GFN2-xTB's, all in meV."""
    rows = {}
    for task in dict.fromkeys(one.task for one in found):
        chosen = [one for one in found if one.task == task]
        truth, predicted, xtb = (
            1e3 * np.array([getattr(one, name) for one in chosen])
            for name in ("truth", "predicted", "xtb")
        )
        rows[task] = {
            "groups": len({one.group for one in chosen}),
            "differences": len(chosen),
            "size": float(np.abs(truth).mean()),
            "mae": float(np.abs(predicted - truth).mean()),
        }
        if np.isfinite(xtb).all() and not np.allclose(xtb, truth, atol=1e-3):
            rows[task]["xtb_mae"] = float(np.abs(xtb - truth).mean())
    return rows


def table(rows: dict[str, dict[str, float]]) -> str:
    """A markdown table of `summary`."""
    beside = any("xtb_mae" in row for row in rows.values())
    head = ["task", "groups", "differences", "mean size (meV)", "MAE (meV)"]
    head += ["GFN2-xTB's MAE (meV)"] if beside else []
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for task, row in rows.items():
        cells = [task, str(row["groups"]), str(row["differences"])]
        cells += [f"{row['size']:.0f}", f"{row['mae']:.0f}"]
        if beside:
            cells.append(f"{row['xtb_mae']:.0f}" if "xtb_mae" in row else "–")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# --- Making ----------------------------------------------------------------------------------

MOST_ATOMS = 12  # so that DFT takes minutes
MOST_HEAVY = 6
GROUPS = 12  # of a task
MEMBERS = 4  # conformers of a molecule, at most
GAPS = (1.0, 2.0, 3.0, 5.0, 7.0, 9.0, 12.0)  # Å, added to the contact of the relaxed complex


@dataclass(frozen=True)
class Group:
    """Structures of one task and one molecule; an entry of `dft.label_all`'s queue."""

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


class NoGroup(RuntimeError):
    """A molecule from which a task cannot be made."""


Made = list[tuple[str, Atoms]]  # task and structure, charge and spin in `info`


def plan(
    seed: int = 0, groups: int = GROUPS, progress: bool = False, tasks: Sequence[str] = ()
) -> list[Group]:
    """The first groups that can be made of every task, or of `tasks`, at most so many, the tasks in
    turn."""
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
    """Neutral singlets, and complexes of two, of teacher's test part: small, well mixed."""
    from rdkit import Chem

    from allscaip_lite.labels import species

    found: dict[str, list[str]] = {"molecule": [], "complex": []}
    for system in species.systems():
        if species.split_of(system) != "test" or system.multiplicity != 1:
            continue
        heavy = [Chem.MolFromSmiles(part).GetNumHeavyAtoms() for part in system.parts]
        if species.atom_count(system) > MOST_ATOMS or sum(heavy) > MOST_HEAVY:
            continue
        if len(system.parts) == 2:
            found["complex"].append(".".join(sorted(system.parts)))
        elif len(system.parts) == 1 and system.charge == 0 and heavy[0] > 2:
            found["molecule"].append(system.molecule)
    rng = np.random.default_rng(seed)
    return {
        kind: [str(name) for name in rng.permutation(sorted(set(names)))]
        for kind, names in found.items()
    }


@cache
def _structures(group: Group) -> list[Atoms]:
    try:
        made = _MAKERS[group.task](group)
        return [_labelled(atoms, group, task) for task, atoms in made]
    except (CalculatorError, NoGroup):
        return []


def _conformers(group: Group) -> Made:
    """Minima that differ by more than 5 meV, the lowest first."""
    found: list[tuple[float, Atoms]] = []
    for start in _embedded(group.molecule, group.seed, 12):
        atoms, energy = _minimum(start)
        if atoms is not None and all(abs(energy - other) > 0.005 for other, _ in found):
            found.append((energy, atoms))
    if len(found) < 2:
        raise NoGroup("one conformer")
    found.sort(key=lambda pair: pair[0])
    return [("conformers", atoms) for _, atoms in found[:MEMBERS]]


def _protonated(group: Group) -> Made:
    """The molecule, and every ion of it with a proton more or less, each at its minimum."""
    from allscaip_lite.labels import species

    neutral = _lowest(group.molecule, group.seed)
    found = []
    for smiles, change in species.protomers(group.molecule):
        ion = _lowest(smiles, group.seed)
        if len(ion) == len(neutral) + change:
            found.append(ion)
    if not found:
        raise NoGroup("no site")
    return [("protonation", atoms) for atoms in [neutral, *found]]


def _ionised(group: Group) -> Made:
    """One geometry, charges 0, +1 and −1."""
    neutral = _lowest(group.molecule, group.seed)
    states = ((0, 1), (1, 2), (-1, 2))
    return [("ionisation", _in_state(neutral, *state)) for state in states]


def _two_spins(group: Group) -> Made:
    """One geometry, singlet and triplet."""
    singlet = _lowest(group.molecule, group.seed)
    return [("spin_gap", _in_state(singlet, 0, spin)) for spin in (1, 3)]


def _apart(group: Group) -> Made:
    """A relaxed complex, then its second molecule ever further away along the line of centres: up
    to `CUTOFF` one group, beyond it another, both held against the relaxed complex."""
    from allscaip_lite.labels import xtb as teacher

    rng = np.random.default_rng(group.seed)
    parts = [_lowest(part, group.seed) for part in group.molecule.split(".")]
    charge = sum(part.info["charge"] for part in parts)
    best: tuple[float, Atoms] | None = None
    for _ in range(4):
        start = _in_state(teacher.assemble(parts, rng, contact=2.2), charge, 1)
        atoms, energy = _minimum(start)
        if atoms is not None and (best is None or energy < best[0]):
            best = energy, atoms
    if best is None:
        raise NoGroup("no minimum")
    whole, first = best[1], len(parts[0])
    axis = whole.positions[first:].mean(0) - whole.positions[:first].mean(0)
    axis /= np.linalg.norm(axis)
    contact = _gap(whole, first)
    if not 1.2 < contact < 4.0:
        raise NoGroup("the two molecules react")
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
    "distance": _apart,
}


def _gap(atoms: Atoms, first: int) -> float:
    """Distance (Å) of the closest atoms of the first `first` atoms and the others."""
    return float(atoms.get_all_distances()[:first, first:].min())


def _in_state(atoms: Atoms, charge: int, spin: int) -> Atoms:
    atoms = Atoms(atoms.numbers, atoms.positions)
    atoms.info = {"charge": charge, "spin": spin}
    return atoms


@cache
def _embedded(smiles: str, seed: int, number: int) -> list[Atoms]:
    from rdkit import Chem

    from allscaip_lite.labels import xtb as teacher

    rng = np.random.default_rng(seed)
    charge = Chem.GetFormalCharge(Chem.MolFromSmiles(smiles))
    try:
        return [_in_state(atoms, charge, 1) for atoms in teacher.embed(smiles, rng, number)]
    except teacher.JobFailed as error:
        raise NoGroup(str(error)) from error


@cache
def _lowest(smiles: str, seed: int) -> Atoms:
    """The lowest of a few minima; several tasks start from it, so copy it before a change."""
    minima = [_minimum(start) for start in _embedded(smiles, seed, 4)]
    found = [(energy, index) for index, (atoms, energy) in enumerate(minima) if atoms is not None]
    if not found:
        raise NoGroup(f"no minimum of {smiles}")
    return minima[min(found)[1]][0]


def _minimum(start: Atoms) -> tuple[Atoms | None, float]:
    """A minimum of GFN2-xTB and its energy (eV); None if the way down takes too many steps."""
    from allscaip_lite.labels.xtb import GFN2xTB

    state = start.info["charge"], start.info["spin"]
    atoms = _in_state(start, *state)
    if len(atoms) == 1:
        return atoms, 0.0
    atoms.calc = GFN2xTB()
    if not BFGS(atoms, logfile=None, maxstep=0.1).run(fmax=0.02, steps=250):
        return None, np.nan
    return _in_state(atoms, *state), float(atoms.get_potential_energy())


def _labelled(atoms: Atoms, group: Group, task: str) -> Atoms:
    """With GFN2-xTB's energy and forces, both as labels and in `info`."""
    from allscaip_lite.labels.xtb import GFN2xTB

    done = _in_state(atoms, atoms.info["charge"], atoms.info["spin"])
    done.positions = np.round(done.positions - done.positions.mean(axis=0), 6)
    teacher = GFN2xTB(accuracy=0.1)
    teacher.calculate(done)
    energy, forces = teacher.results["energy"], teacher.results["forces"]
    done.info |= {
        "data_id": task,
        "group": group.molecule,
        "molecule": group.molecule,
        "source": group.name,
        "reference_source": "allscaip-lite data physics",
        "xtb_energy": energy,
        "xtb_forces": forces,
    }
    done.calc = SinglePointCalculator(done, energy=energy, forces=forces)
    return done


# --- The command -----------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `allscaip-lite data physics`."""
    parser.add_argument("--out", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--groups", type=int, default=GROUPS, help="of each task, at most")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other molecules")
    parser.add_argument("--tasks", nargs="+", choices=list(_MAKERS), help="default: all")
    parser.add_argument(
        "--dft",
        action="store_true",
        help="label by wB97M-V/def2-TZVPD: hours; a run that was stopped goes on",
    )
    parser.add_argument("--workers", type=int, default=1, help="with --dft: processes")
    parser.add_argument(
        "--known", type=Path, help="with --dft: folder of a set it made: its labels are taken"
    )
    parser.add_argument(
        "--collect",
        action="store_true",
        help="with --dft: label nothing, write the groups that are labelled so far",
    )


def run(args: argparse.Namespace) -> int:
    """`allscaip-lite data physics`: make the groups, or go on labelling; the exit status."""
    if (args.collect or args.known) and not args.dft:
        raise PhysicsError("--collect and --known go with --dft: GFN2-xTB takes two minutes")
    groups = plan(args.seed, args.groups, progress=True, tasks=args.tasks or ())
    if args.dft:
        from allscaip_lite.labels import dft

        if args.known:
            print(f"{dft.take_over(args.out, groups, args.known)} groups taken from {args.known}")
        if not args.collect:
            dft.label_all(args.out, groups, workers=args.workers)
        counts = dft.collect(args.out, groups)
        print(f"{counts['test']} structures")
        return 0
    structures = [atoms for group in groups for atoms in group.structures()]
    args.out.mkdir(parents=True, exist_ok=True)
    write_aselmdb(args.out / "test.aselmdb", structures, overwrite=True)
    print(f"{len(structures)} structures, checksum {checksum(structures)[:16]}")
    return 0
