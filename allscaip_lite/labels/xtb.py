"""GFN2-xTB as a teacher: what labels structures on a laptop, and the command that makes a data set.

Comes in: the species of `species.plan`. Goes out:
`{train,val,test}.aselmdb` with energies (eV) and forces (eV/Å), split by molecule, and
`references.json` with the energies of the free atoms. Structures come from RDKit conformers and
random assemblies of molecules, short Langevin runs, turned bonds and random displacements.

Teacher: GFN2-xTB (Bannwarth, Ehlert, Grimme, J. Chem. Theory Comput. 15, 1652, 2019), with spin
polarisation, by the tblite library. Metadata follow OMol25 (arXiv:2505.08762).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator, CalculatorError, all_changes
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import atomic_numbers, covalent_radii
from ase.md.langevin import Langevin
from ase.optimize import BFGS
from scipy.spatial.transform import Rotation

from allscaip_lite.data.aselmdb import SPLITS, Dataset, checksum, write_aselmdb
from allscaip_lite.files import store_text
from allscaip_lite.labels.species import SETS, Job, System, plan, with_hydrogens
from allscaip_lite.labels.workers import in_processes
from allscaip_lite.structures import lowest_multiplicity, stated_charge_and_spin

# --- The teacher -----------------------------------------------------------------------------


class GFN2xTB(Calculator):
    """ASE calculator: GFN2-xTB with spin polarisation.

    Charge and spin multiplicity come from `atoms.info["charge"]` and `["spin"]`; absent means
    neutral and the lowest multiplicity. Results: energy (eV), forces (N, 3) (eV/Å), stress (6,)
    (eV/Å³) of a periodic system, homo_lumo_gap [eV], one number for each occupied spin channel.
    `accuracy` scales tblite's SCF thresholds (smaller is tighter). A step of a trajectory starts
    from the electronic state of the step before; `reset()` forgets it.

    Raises CalculatorError for a multiplicity that the electron count forbids and for an SCF that
    does not converge.
    """

    implemented_properties = ["energy", "free_energy", "forces", "stress"]

    def __init__(self, accuracy: float = 1.0) -> None:
        super().__init__()
        self.accuracy = accuracy
        self._key, self._tblite, self._state = None, None, None

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """What changed since the last call; charge and spin in `atoms.info` count too."""
        changes = super().check_state(atoms, tol)
        if self._key is not None and _charge_and_spin(atoms) != self._key[:2]:
            changes.append("info")
        return changes

    def reset(self) -> None:
        super().reset()
        self._key, self._tblite, self._state = None, None, None

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        from tblite.exceptions import TBLiteRuntimeError
        from tblite.interface import Calculator as TBLite

        super().calculate(atoms, properties, system_changes)
        atoms = self.atoms
        charge, spin = _charge_and_spin(atoms)
        positions = atoms.positions / units.Bohr
        lattice = atoms.cell.array / units.Bohr if atoms.pbc.any() else None
        key = (charge, spin, tuple(atoms.numbers), tuple(atoms.pbc))
        try:
            if key != self._key:
                self._state = None
                self._tblite = TBLite(
                    "GFN2-xTB", atoms.numbers, positions, charge, spin - 1, lattice, atoms.pbc
                )
                self._tblite.set("verbosity", 0)
                self._tblite.set("accuracy", self.accuracy)
                self._tblite.add("spin-polarization", 1.0)
                self._key = key
            else:
                self._tblite.update(positions, lattice)
            self._state = self._tblite.singlepoint(self._state)
        except TBLiteRuntimeError as error:
            self.reset()
            raise CalculatorError(
                f"GFN2-xTB failed for {atoms.symbols}, charge {charge}, "
                f"multiplicity {spin}: {error}"
            ) from error
        energy = float(self._state["energy"]) * units.Hartree
        self.results = {
            "energy": energy,
            "free_energy": energy,
            "forces": -np.asarray(self._state["gradient"]) * (units.Hartree / units.Bohr),
            "homo_lumo_gap": _gaps(self._state, spin),
        }
        if lattice is not None:
            stress = np.asarray(self._state["virial"]) * (units.Hartree / atoms.get_volume())
            self.results["stress"] = stress[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]


def _charge_and_spin(atoms: Atoms) -> tuple[int, int]:
    """Not held to the rules of the number of electrons, which tblite applies itself."""
    charge, spin = stated_charge_and_spin(atoms)
    charge = charge or 0
    return charge, spin or lowest_multiplicity(atoms, charge)


def _gaps(state, spin: int) -> list[float]:
    """HOMO–LUMO gaps in eV: one of a singlet, of alpha and beta spins else."""
    levels = np.atleast_2d(state["orbital-energies"]) * units.Hartree
    filled = np.atleast_2d(state["orbital-occupations"]) > 0.5
    gaps = []
    for level, full in zip(levels, filled, strict=True):
        if full.any() and not full.all():
            gaps.append(round(float(level[~full].min() - level[full].max()), 6))
    return gaps[:1] if spin == 1 else gaps


def free_atom_energies(elements: Iterable[str]) -> dict[str, float]:
    """GFN2-xTB energy in eV of each free neutral atom, in its lowest multiplicity state."""
    energies = {}
    for element in elements:
        number = atomic_numbers[element]
        tried = []
        for spin in range(1 + number % 2, 6, 2):
            atom = Atoms(element, info={"charge": 0, "spin": spin})
            if results := results_of(atom):  # none: too many unpaired electrons for the shell
                tried.append(results["energy"])
        energies[element] = min(tried)
    return energies


# --- Sampling --------------------------------------------------------------------------------

MAX_FORCE = 25.0  # eV/Å: beyond it, a structure is no use for training
STATE_TOLERANCE = 0.02  # eV between a run's electronic state and one found from scratch
# Two molecules at least FAR (Å) apart have to be what they are alone, within FAR_TOLERANCE (eV):
# the teacher likes to spread the charge of one over both.
FAR, FAR_TOLERANCE = 5.0, 0.3


class JobFailed(RuntimeError):
    """A system that yields too few usable structures."""


def sample(job: Job, seed: int = 0) -> list[Atoms]:
    """Labelled structures of one system: the same ones for the same job and seed, always.

    Half come from Langevin runs (1 fs steps, 25 fs between snapshots, 300–1000 K; complexes
    200–500 K), started from a conformer or assembly relaxed for a few steps; the rest from
    turned bonds (complexes: new assemblies) and random displacements. A system that `moves_as`
    another state is relaxed and run in that one, and labelled in its own. One with a `reach` is
    molecules relaxed alone, displaced at random and put at gaps from 1.6 Å to it, as many between
    2 and 4 Å as between 4 and 8; from 5 Å on only if their energy is that of each alone, plus
    Coulomb's of their charges.
    Raises JobFailed if fewer than half of the structures wanted come out usable.
    """
    system, count = job.system, job.count
    digest = hashlib.sha256(f"{seed}:{system.name}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    number = min(6, max(2, count // 4))
    charge, multiplicity = system.moves_as or (system.charge, system.multiplicity)
    moving = replace(system, charge=charge, multiplicity=multiplicity)
    molecules = {part: embed(part, rng, number) for part in dict.fromkeys(system.parts)}
    shapes = [_shape(moving, molecules, rng, contact=2.0) for _ in range(number)]
    bonds = _turnable(system.parts[0]) if len(system.parts) == 1 else []
    kept: list[Atoms] = []

    def keep(atoms: Atoms, how: str, expected: float | None = None) -> None:
        tolerance = STATE_TOLERANCE if system.reach is None else FAR_TOLERANCE
        labelled = _label(atoms, system, None if system.moves_as else expected, tolerance)
        if labelled is not None and len(kept) < count:
            labelled.info["source"] = f"xtb/{system.domain}/{system.name}/{len(kept)}/{how}"
            kept.append(labelled)

    if system.reach is not None:
        molecules = {part: _relaxed_alone(system, part, molecules[part]) for part in molecules}
        for _ in range(4 * count):
            if len(kept) >= count:
                break
            gap = 1.6 * (system.reach / 1.6) ** rng.random()
            atoms = _shape(system, molecules, rng, gap)
            atoms.positions += rng.normal(size=(len(atoms), 3)) * rng.choice([0.01, 0.03, 0.06])
            keep(atoms, "apart", None if gap < FAR else _energy_apart(atoms, system))
        return _enough(kept, count)

    runs = max(1, min(len(shapes), count // 6))
    relaxed = []
    for shape in shapes[:runs]:
        try:
            relaxed.append(_relax(shape, steps=15 if len(system.parts) == 1 else 30))
        except CalculatorError:
            continue
        keep(relaxed[-1], "relaxed")
        for atoms, energy in _langevin(relaxed[-1], rng, -(-count // (2 * runs)), system):
            keep(atoms, "langevin", energy)
    shapes = relaxed + shapes[runs:]
    for attempt in range(4 * count):
        if len(kept) >= count:
            break
        atoms = shapes[rng.integers(len(shapes))].copy()
        how = "displaced"
        if attempt % 2 and len(system.parts) > 1:
            atoms, how = _shape(moving, molecules, rng, rng.uniform(1.6, 3.6)), "assembled"
        elif attempt % 2 and bonds:
            _turn(atoms, *bonds[rng.integers(len(bonds))], rng.uniform(0, 2 * np.pi))
            how = "turned"
        atoms.positions += rng.normal(size=(len(atoms), 3)) * rng.choice([0.02, 0.05, 0.1])
        keep(atoms, how)
    return _enough(kept, count)


def _enough(kept: list[Atoms], count: int) -> list[Atoms]:
    if 2 * len(kept) < count:
        raise JobFailed(f"{len(kept)} usable structures of {count}")
    return kept


def _label(
    atoms: Atoms, system: System, expected: float | None = None, tolerance: float = STATE_TOLERANCE
) -> Atoms | None:
    """The structure with its labels and metadata, or None if it is not fit for training: among
    others if its energy is not within `tolerance` of `expected` (eV)."""
    numbers, positions = atoms.numbers, atoms.positions
    distance = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    bond = covalent_radii[numbers][:, None] + covalent_radii[numbers][None]
    if (distance + 9.0 * np.eye(len(atoms)) < 0.6 * bond).any():
        return None
    reach = 1.8 * bond if len(system.parts) == 1 else system.reach or 6.0
    if not _connected(distance < reach):
        return None
    centred = Atoms(numbers, positions - positions.mean(axis=0))
    centred.info = {"charge": system.charge, "spin": system.multiplicity}
    found = label(centred, system)
    if found is None or expected is None:
        return found
    energy = found.get_potential_energy()
    return found if abs(energy - expected) <= tolerance else None  # so for NaN too


def results_of(atoms: Atoms, max_force: float | None = None) -> dict[str, Any] | None:
    """GFN2-xTB's energy (eV), forces (eV/Å) and what else `GFN2xTB` finds; None if the SCF fails,
    or if a force component is not below `max_force`, where one is given.

    By a calculator of its own: they depend on the structure alone, not on how a run came by.
    """
    teacher = GFN2xTB(accuracy=0.1)
    try:
        teacher.calculate(atoms)
    except CalculatorError:
        return None
    energy, forces = teacher.results["energy"], teacher.results["forces"]
    if max_force is not None and not (np.isfinite(energy) and np.abs(forces).max() < max_force):
        return None
    return teacher.results


def label(atoms: Atoms, system: System) -> Atoms | None:
    """The structure, charge and spin in `info`, with GFN2-xTB's energy (eV), forces (eV/Å) and
    metadata; None if the SCF fails or a force is above MAX_FORCE."""
    results = results_of(atoms, MAX_FORCE)
    if results is None:
        return None
    labelled = Atoms(atoms.numbers, atoms.positions)
    labelled.info = {
        "charge": atoms.info["charge"],
        "spin": atoms.info["spin"],
        "reference_source": "allscaip-lite data xtb",
        "data_id": system.domain,
        "num_atoms": len(atoms),
        "num_electrons": int(atoms.numbers.sum()) - atoms.info["charge"],
        "composition": labelled.get_chemical_formula("hill"),
        "homo_lumo_gap": results["homo_lumo_gap"],
        "molecule": system.molecule,
        "label": f"GFN2-xTB, spin-polarised (tblite {version('tblite')})",
    }
    labelled.calc = SinglePointCalculator(
        labelled, energy=results["energy"], forces=results["forces"]
    )
    return labelled


def _connected(near: np.ndarray) -> bool:
    """Whether every atom is reached from the first by steps between near atoms; near (N, N)."""
    reached = near[0]
    for _ in range(len(near)):
        reached = near[reached].any(0)
    return bool(reached.all())


def _relaxed_alone(system: System, part: str, shapes: Sequence[Atoms]) -> list[Atoms]:
    alone = system.alone(part)
    for atoms in shapes:
        atoms.info = {"charge": alone.charge, "spin": alone.multiplicity}
    return [_relax(atoms, steps=8) if len(atoms) > 1 else atoms for atoms in shapes]


def _energy_apart(atoms: Atoms, system: System) -> float:
    """Energies of two molecules alone plus Coulomb's of their charges, in eV; NaN where the teacher
    fails on one of them."""
    first = with_hydrogens(system.parts[0]).GetNumAtoms()
    pieces, energy = (atoms[:first], atoms[first:]), 0.0
    states = [system.alone(part) for part in system.parts]
    for piece, state in zip(pieces, states, strict=True):
        piece.info = {"charge": state.charge, "spin": state.multiplicity}
        results = results_of(piece)
        if results is None:
            return np.nan
        energy += results["energy"]
    distance = np.linalg.norm(pieces[0].positions.mean(0) - pieces[1].positions.mean(0))
    coulomb = units.Hartree * units.Bohr / distance  # of two charges of one
    return energy + coulomb * states[0].charge * states[1].charge


def _relax(atoms: Atoms, steps: int) -> Atoms:
    atoms = atoms.copy()
    atoms.calc = GFN2xTB()
    BFGS(atoms, logfile=None, maxstep=0.1).run(fmax=0.02, steps=steps)
    return atoms


def langevin(start: Atoms, temperature: float, rng: np.random.Generator) -> Langevin:
    """Dynamics at `temperature` (K) by the teacher, of a copy of `start`: steps of 1 fs."""
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


def _langevin(
    start: Atoms, rng: np.random.Generator, snapshots: int, system: System
) -> Iterator[tuple[Atoms, float]]:
    """Snapshots (structure, energy in eV) of one run; it ends early where the teacher fails."""
    hot = len(system.parts) == 1
    temperature = float(rng.choice([300, 500, 700, 1000] if hot else [200, 300, 400, 500]))
    run = langevin(start, temperature, rng)
    for _ in range(snapshots):
        try:
            run.run(25)
        except CalculatorError:
            return
        yield run.atoms.copy(), run.atoms.get_potential_energy()


def _shape(
    system: System, molecules: dict[str, list[Atoms]], rng: np.random.Generator, contact: float
) -> Atoms:
    """A conformer of a molecule, or a random assembly of conformers of several."""
    parts = [molecules[part][rng.integers(len(molecules[part]))] for part in system.parts]
    shape = assemble(parts, rng, contact)
    shape.info = {"charge": system.charge, "spin": system.multiplicity}
    return shape


def embed(smiles: str, rng: np.random.Generator, number: int) -> list[Atoms]:
    """At most `number` conformers of a molecule, at minima of MMFF94 or UFF where these know it.

    Raises JobFailed if there is none.
    """
    from rdkit.Chem import AllChem

    molecule = with_hydrogens(smiles)
    numbers = [atom.GetAtomicNum() for atom in molecule.GetAtoms()]
    if len(numbers) == 1:
        return [Atoms(numbers, [[0.0, 0.0, 0.0]])]
    seed = int(rng.integers(2**31 - 1))
    found = list(AllChem.EmbedMultipleConfs(molecule, number, randomSeed=seed))
    if not found:
        found = list(
            AllChem.EmbedMultipleConfs(molecule, number, randomSeed=seed, useRandomCoords=True)
        )
    if not found:
        raise JobFailed(f"no conformer of {smiles}")
    try:
        if AllChem.MMFFHasAllMoleculeParams(molecule):
            AllChem.MMFFOptimizeMoleculeConfs(molecule)
        elif AllChem.UFFHasAllMoleculeParams(molecule):
            AllChem.UFFOptimizeMoleculeConfs(molecule)
    except (RuntimeError, ValueError):
        pass  # no force field for it: the teacher relaxes the embedded structure
    return [Atoms(numbers, molecule.GetConformer(index).GetPositions()) for index in found]


def assemble(parts: Sequence[Atoms], rng: np.random.Generator, contact: float) -> Atoms:
    """Molecules around the first, each turned at random and slid towards it from a random side
    until its closest atom is `contact` (Å) away from one that is there already."""
    whole = parts[0].copy()
    whole.positions -= whole.positions.mean(0)
    for part in parts[1:]:
        turned = part.copy()
        centred = part.positions - part.positions.mean(0)
        turned.positions = Rotation.random(random_state=rng).apply(centred)
        direction = rng.normal(size=3)
        direction /= np.linalg.norm(direction)
        for distance in np.arange(0.0, 30.0, 0.1):
            moved = turned.positions + distance * direction
            if np.linalg.norm(moved[:, None] - whole.positions, axis=-1).min() >= contact:
                break
        turned.positions = moved
        whole += turned
    return whole


def _turnable(smiles: str) -> list[tuple[int, int, np.ndarray]]:
    """Single bonds outside rings with something to turn: (i, j, which atoms hang on j)."""
    from rdkit import Chem

    molecule = with_hydrogens(smiles)
    bonds = []
    for bond in molecule.GetBonds():
        ends = bond.GetBeginAtom(), bond.GetEndAtom()
        if bond.IsInRing() or bond.GetBondType() != Chem.BondType.SINGLE:
            continue
        if min(end.GetDegree() for end in ends) < 2:
            continue
        i, j = (end.GetIdx() for end in ends)
        cut = Chem.RWMol(molecule)
        cut.RemoveBond(i, j)
        side = next(group for group in Chem.GetMolFrags(cut) if j in group)
        bonds.append((i, j, np.array(side)))
    return bonds


def _turn(atoms: Atoms, i: int, j: int, side: np.ndarray, angle: float) -> None:
    """Turn the atoms `side` by `angle` (radians) about the bond from i to j, in place."""
    axis = atoms.positions[j] - atoms.positions[i]
    turn = Rotation.from_rotvec(angle * axis / np.linalg.norm(axis))
    pivot = atoms.positions[j].copy()
    atoms.positions[side] = turn.apply(atoms.positions[side] - pivot) + pivot


# --- The command -----------------------------------------------------------------------------


def generate(
    folder: str | os.PathLike,
    jobs: Sequence[Job],
    seed: int = 0,
    workers: int = 1,
    sampler: Callable[[Job, int], list[Atoms]] = sample,
) -> None:
    """Run `sampler` for each of the jobs and write `{train,val,test}.aselmdb` and
    `references.json` into `folder`, and `checksums.json`, by which two runs of one command are
    compared.

    Each job's result is stored under `folder/jobs` as it is done; a run that was stopped goes on
    from there, and yields what an uninterrupted one does. The number of workers changes nothing
    but the time. A job that fails is recorded in `folder/failed.json` and skipped.
    Raises ValueError where `folder` holds the results of other jobs or another seed. The workers
    are new processes: a script that calls this needs the usual `if __name__ == "__main__"`.
    """
    folder = Path(folder)
    store = folder / "jobs"
    store.mkdir(parents=True, exist_ok=True)
    listed = [[job.system.name, job.count, job.split] for job in jobs]
    text = json.dumps({"seed": seed, "jobs": listed}, indent=0)
    listing = folder / "plan.json"
    if listing.exists() and listing.read_text() != text:
        raise ValueError(f"{folder} holds another data set (its plan.json): choose a new --out")
    store_text(listing, text)

    stems = [store / f"{index:05d}" for index in range(len(jobs))]
    tasks = [(job, seed, stem, sampler) for job, stem in zip(jobs, stems, strict=True)]
    waiting = [task for task in tasks if not any(_outcomes(task[2]))]
    started = shown = time.monotonic()
    for done, _ in enumerate(in_processes(_work, waiting, workers), start=1):
        now = time.monotonic()
        if sys.stderr.isatty() or now - shown > 30 or done == len(waiting):
            left = (now - started) / done * (len(waiting) - done)
            print(
                f"\r{len(tasks) - len(waiting) + done} of {len(tasks)} systems,"
                f" {left / 60:.1f} min left ",
                end="" if sys.stderr.isatty() and done < len(waiting) else "\n",
                file=sys.stderr,
                flush=True,
            )
            shown = now

    results = [_outcomes(stem) for stem in stems]
    failed = {
        job.system.name: bad.read_text() for job, (_, bad) in zip(jobs, results, strict=True) if bad
    }
    store_text(folder / "failed.json", json.dumps(failed, indent=1))
    elements: set[str] = set()
    checksums = {}
    for split in SPLITS:
        mine = [outcome for job, outcome in zip(jobs, results, strict=True) if job.split == split]
        files = [good for good, _ in mine if good]
        if not files:
            continue
        structures = [atoms for file in files for atoms in Dataset(file)]
        write_aselmdb(folder / f"{split}.aselmdb", structures, overwrite=True)
        elements |= {symbol for atoms in structures for symbol in atoms.symbols}
        checksums[split] = checksum(structures)
        print(
            f"{split}: {len(structures)} structures of {len(files)} systems, "
            f"checksum {checksums[split][:16]}",
            file=sys.stderr,
        )
    references = free_atom_energies(sorted(elements, key=atomic_numbers.get))
    store_text(folder / "references.json", json.dumps(references, indent=1))
    store_text(folder / "checksums.json", json.dumps(checksums, indent=1))
    if failed:
        message = f"{len(failed)} of {len(jobs)} systems failed: see {folder / 'failed.json'}"
        print(message, file=sys.stderr)


def _outcomes(stem: Path) -> tuple[Path | None, Path | None]:
    """The stored result of a job and the record of its failure, whichever is there."""
    files = stem.with_suffix(".aselmdb"), stem.with_suffix(".failed")
    return tuple(file if file.exists() else None for file in files)


def _work(task: tuple[Job, int, Path, Callable[[Job, int], list[Atoms]]]) -> None:
    job, seed, stem, sampler = task
    try:
        write_aselmdb(stem.with_suffix(".aselmdb"), sampler(job, seed))
    except (ArithmeticError, RuntimeError, ValueError) as error:
        # One odd system must not end a run of hundreds; a full disk or a missing library does.
        store_text(stem.with_suffix(".failed"), f"{type(error).__name__}: {error}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `allscaip-lite data xtb`."""
    parser.add_argument("--out", type=Path, required=True, help="folder of the data set")
    parser.add_argument(
        "--set",
        choices=(*SETS, "reactive"),
        default="main",
        help="main; charged: more ions, radicals, triplets and metals, of which main has few; "
        "apart: two molecules from contact to 14 Å; reactive: small systems of the domains of "
        "`data dft`, bonds that break and hydrogens that move among them",
    )
    parser.add_argument("--structures", type=int, default=60_000, help="about how many")
    parser.add_argument(
        "--share",
        type=float,
        default=1.0,
        help="make only this share of the systems: a part of the same set",
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed, other structures")
    parser.add_argument("--workers", type=int, default=1, help="processes, one core each")


def run(args: argparse.Namespace) -> int:
    """`allscaip-lite data xtb`: make the data set, or go on making one; the exit status."""
    from allscaip_lite.labels import omol_mini

    # What two sets have in common is made anew.
    seed = args.seed + 1_000_000 * [*SETS, "reactive"].index(args.set)
    if not 0 < args.share <= 1:
        raise ValueError(f"--share {args.share}: a number above 0, up to 1")
    reactive = args.set == "reactive"
    jobs = omol_mini.jobs(args.structures) if reactive else plan(args.structures, args.set)
    jobs = [job for job in jobs if _place(job) < args.share]
    generate(args.out, jobs, seed, args.workers, omol_mini.sample if reactive else sample)
    return 0


def _place(job: Job) -> float:
    """Between 0 and 1, by a hash of the system's name: a larger share holds a smaller one."""
    return int(hashlib.sha256(job.system.name.encode()).hexdigest()[:8], 16) / 16**8


if __name__ == "__main__":
    command = argparse.ArgumentParser(prog="allscaip-lite data xtb", description=__doc__)
    add_arguments(command)
    sys.exit(run(command.parse_args()))
