"""Make `data/xtb`: molecules, ions, radicals and complexes, labelled with GFN2-xTB.

    python data/xtb/make.py --out data/generated/xtb --structures 60000 --seed 0

In: the systems of `systems.py` and a seed. Out: `{train,val,test}.aselmdb` with energies (eV) and
forces (eV/Å), split by molecule, and `references.json` with the energies of the free atoms. A run
that was stopped goes on where it was.

Structures come from RDKit conformers and random complexes of molecules, short Langevin runs,
rotated bonds and random displacements.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import CalculatorError
from ase.data import covalent_radii
from scipy.spatial.transform import Rotation

from allscaip_lite.cli import run_script
from allscaip_lite.labels import LabelError, queue, xtb
from allscaip_lite.labels.sampling import System, assemble, embed, parse_system, with_hydrogens
from data.xtb.sets import Job, langevin, make_set, relax, take_share
from data.xtb.splits import atom_count, split_of
from data.xtb.systems import (
    RUN_SPLITS,
    RUN_START,
    RUN_STEPS,
    RUN_TEMPERATURE,
    SampledSystem,
    charged_systems,
    ionic_systems,
    main_systems,
    runs_of_ethanol,
    separated_systems,
    simplest_systems,
)

# --- Which systems ---------------------------------------------------------------------------

# The systems of a set, and the millions of its seed, so that no structure is in two of them; the
# third million is that of `data/omol-mini/make.py --method gfn2-xtb`.
SETS = {
    "main": (main_systems, 0),
    "charged": (charged_systems, 1),
    "apart": (separated_systems, 2),
    "ionic": (ionic_systems, 4),
    "simplest": (simplest_systems, 5),
    "ethanol": (runs_of_ethanol, 6),
}


def plan(structures: int, kind: str = "main", seed: int = 0) -> list[Job]:
    """The jobs that together yield about `structures` structures of one of `SETS`."""
    make_systems, millions = SETS[kind]
    chosen = make_systems()
    share = 1.05 * structures / sum(system.weight for system in chosen)
    seed += 1_000_000 * millions
    return [Job(system, _count(system, share), _split(system), seed) for system in chosen]


def _split(system: SampledSystem) -> str:
    return split_of(system) if system.run is None else RUN_SPLITS[system.run]


def _count(system: SampledSystem, share: float) -> int:
    """How many structures of a system: one of an atom, which has no other, else two or more."""
    return 1 if system.domain == "atoms" else max(2, round(share * system.weight))


# --- Sampling --------------------------------------------------------------------------------

MAX_FORCE = 25.0  # eV/Å: a structure with a larger one is left out
STATE_TOLERANCE = 0.02  # eV between a run's electronic state and one found from scratch
# Two molecules with a gap of FAR (Å) or more must have the energy of each alone, plus Coulomb's,
# within FAR_TOLERANCE (eV): GFN2-xTB tends to spread the charge of one over both.
FAR, FAR_TOLERANCE = 5.0, 0.3
# In the set `ionic` a molecule that has a gap of FAR or more to all others must have its own charge
# within LEAKED e (Mulliken).
LEAKED = 0.05  # e
# Of two stretched atoms: distances in units of the sum of their covalent radii, and the largest
# force (eV/Å).
STRETCHES, STRETCHED_MAX_FORCE = (0.4, 6.0), 300.0


def sample(job: Job) -> list[Atoms]:
    """Labelled structures of one system, always the same ones for the same job.

    Half come from Langevin runs (1 fs steps, 25 fs between snapshots, 300–1000 K; complexes
    200–500 K), started from a conformer or complex relaxed for a few steps; the rest from
    rotated bonds (complexes: new ones) and random displacements. A system that `moves_as` another
    state is relaxed and run in that one, and labelled in its own. One with a `reach` is molecules
    relaxed alone, displaced at random and put at gaps from 1.6 Å to it, as many between 2 and 4 Å
    as between 4 and 8. From 5 Å on there are only those whose energy is that of each alone, plus
    Coulomb's of their charges, or, in the set `ionic`, whose molecules have their own charges.
    Two `stretched` atoms are at distances from 0.4 to 6 sums of their covalent radii. A system with
    the number of a `run` is one Langevin run at 500 K.

    Raises LabelError if fewer than half of the structures wanted come out usable.
    """
    system, count = job.system, job.count
    digest = hashlib.sha256(f"{job.seed}:{system.name}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    if system.stretched:
        return _stretched(system, count, rng)
    if system.run is not None:
        return _one_run(system, count, rng)
    number = min(6, max(2, count // 4))
    charge, multiplicity = system.moves_as or (system.charge, system.multiplicity)
    moving = replace(system, charge=charge, multiplicity=multiplicity)
    molecules = {part: embed(part, rng, number) for part in dict.fromkeys(system.parts)}
    shapes = [_shape(moving, molecules, rng, contact=2.0) for _ in range(number)]
    bonds = _rotatable_bonds(system.parts[0]) if len(system.parts) == 1 else []
    kept: list[Atoms] = []

    def keep(atoms: Atoms, how: str, expected: float | None = None) -> None:
        tolerance = STATE_TOLERANCE if system.reach is None else FAR_TOLERANCE
        labelled = _label(atoms, system, None if system.moves_as else expected, tolerance)
        if labelled is not None and system.domain.startswith("ionic") and _charge_moved(labelled):
            return
        if labelled is not None and len(kept) < count:
            labelled.info["source"] = f"xtb/{system.domain}/{system.name}/{len(kept)}/{how}"
            kept.append(labelled)

    if system.reach is not None:
        molecules = {part: _relax_each(system, part, molecules[part]) for part in molecules}
        reach = system.reach
        for _ in range(4 * count):
            if len(kept) >= count:
                break
            gaps = [1.6 * (reach / 1.6) ** rng.random() for _ in system.parts[1:]]
            atoms = _shape(system, molecules, rng, gaps)
            atoms.positions += rng.normal(size=(len(atoms), 3)) * rng.choice([0.01, 0.03, 0.06])
            checked = system.domain == "apart" and gaps[0] >= FAR
            before = len(kept)
            keep(atoms, "apart", _energy_when_separated(atoms, system) if checked else None)
            if system.domain != "apart" and len(kept) == before and max(gaps) > FAR:
                reach = max(gaps)  # a charge that has moved is not to be expected back farther away
        return _enough(kept, count)

    runs = max(1, min(len(shapes), count // 6))
    relaxed = []
    for shape in shapes[:runs]:
        try:
            relaxed.append(relax(shape, steps=15 if len(system.parts) == 1 else 30))
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
            _rotate(atoms, *bonds[rng.integers(len(bonds))], rng.uniform(0, 2 * np.pi))
            how = "turned"
        atoms.positions += rng.normal(size=(len(atoms), 3)) * rng.choice([0.02, 0.05, 0.1])
        keep(atoms, how)
    return _enough(kept, count)


def _enough(kept: list[Atoms], count: int) -> list[Atoms]:
    if 2 * len(kept) < count:
        raise LabelError(f"{len(kept)} usable structures of {count}")
    return kept


def _stretched(system: SampledSystem, count: int, rng: np.random.Generator) -> list[Atoms]:
    """Two atoms at `count` distances, evenly spread in their logarithm but for a random part; those
    whose force is too large, or whose SCF fails, are left out.
    """
    numbers = [atom.GetAtomicNum() for atom in with_hydrogens(system.parts[0]).GetAtoms()]
    bond, (least, most) = covalent_radii[numbers].sum(), STRETCHES
    kept = []
    for index in range(count):
        factor = least * (most / least) ** ((index + rng.random()) / count)
        axis = rng.normal(size=3)
        axis *= factor * bond / (2 * np.linalg.norm(axis))
        atoms = Atoms(numbers, [-axis, axis], info=_metadata(system))
        atoms.info["source"] = f"xtb/{system.domain}/{system.name}/{index}/{factor:.2f} bonds"
        try:
            kept.append(xtb.label(atoms, STRETCHED_MAX_FORCE))
        except LabelError:
            continue
    return _enough(kept, 2)


def _one_run(system: SampledSystem, count: int, rng: np.random.Generator) -> list[Atoms]:
    """`count` snapshots of one Langevin run; positions are rounded to 1e-4 Å and then labelled,
    forces are rounded to 1e-4 eV/Å: what is rounded takes less space in a file.
    """
    start = embed(system.parts[0], rng, 1)[0]
    start.info = {"charge": system.charge, "spin": system.multiplicity}
    dynamics = langevin(relax(start, steps=30), RUN_TEMPERATURE, rng)
    dynamics.run(RUN_START)
    kept = []
    for index in range(count):
        dynamics.run(RUN_STEPS)
        positions = dynamics.atoms.positions - dynamics.atoms.positions.mean(0)
        snapshot = Atoms(start.numbers, positions.round(4), info=_metadata(system))
        labelled = xtb.label(snapshot, MAX_FORCE)
        labelled.calc.results["forces"] = labelled.get_forces().round(4)
        labelled.info["source"] = f"xtb/{system.domain}/{system.name}/{index}/langevin"
        kept.append(labelled)
    return kept


def _charge_moved(atoms: Atoms) -> bool:
    """Whether a molecule far from all others has not its own charge: GFN2-xTB spreads charges over
    molecules in vacuum where an electron of one is higher than an empty level of another.
    """
    parts = [parse_system("", part) for part in atoms.info["molecule"].split(".")]
    ends = np.cumsum([atom_count(part) for part in parts])
    distances = atoms.get_all_distances()
    charges = xtb.results_of(atoms)["charges"]
    for part, end in zip(parts, ends, strict=True):
        inside = np.zeros(len(atoms), dtype=bool)
        inside[end - atom_count(part) : end] = True
        alone = distances[inside][:, ~inside].min() >= FAR
        if alone and abs(charges[inside].sum() - part.charge) > LEAKED:
            return True
    return False


def _metadata(system: System) -> dict[str, str | int]:
    return {
        "charge": system.charge,
        "spin": system.multiplicity,
        "reference_source": "allscaip-lite, data/xtb/make.py",
        "data_id": system.domain,
        "molecule": system.molecule,
    }


def _label(
    atoms: Atoms,
    system: SampledSystem,
    expected: float | None = None,
    tolerance: float = STATE_TOLERANCE,
) -> Atoms | None:
    """The structure with its labels and metadata, or None if it is not fit for training: among
    others if its energy is not within `tolerance` of `expected` (eV).
    """
    numbers, positions = atoms.numbers, atoms.positions
    distance = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    bond = covalent_radii[numbers][:, None] + covalent_radii[numbers][None]
    if (distance + 9.0 * np.eye(len(atoms)) < 0.6 * bond).any():
        return None
    reach = 1.8 * bond if len(system.parts) == 1 else system.reach or 6.0
    if not _connected(distance < reach):
        return None
    centred = Atoms(numbers, positions - positions.mean(axis=0), info=_metadata(system))
    try:
        labelled = xtb.label(centred, MAX_FORCE)
    except LabelError:
        return None
    if expected is None:
        return labelled
    energy = labelled.get_potential_energy()
    return labelled if abs(energy - expected) <= tolerance else None  # so for NaN too


def _connected(near: np.ndarray) -> bool:
    """Whether every atom is reached from the first by steps between near atoms; near (N, N)."""
    reached = near[0]
    for _ in range(len(near)):
        reached = near[reached].any(0)
    return bool(reached.all())


def _relax_each(system: System, part: str, shapes: Sequence[Atoms]) -> list[Atoms]:
    alone = parse_system(system.domain, part)
    for atoms in shapes:
        atoms.info = {"charge": alone.charge, "spin": alone.multiplicity}
    return [relax(atoms, steps=8) if len(atoms) > 1 else atoms for atoms in shapes]


def _energy_when_separated(atoms: Atoms, system: System) -> float:
    """Energies of two molecules alone plus Coulomb's of their charges, in eV; NaN where GFN2-xTB
    fails for one of them.
    """
    first = with_hydrogens(system.parts[0]).GetNumAtoms()
    pieces, energy = (atoms[:first], atoms[first:]), 0.0
    states = [parse_system(system.domain, part) for part in system.parts]
    for piece, state in zip(pieces, states, strict=True):
        piece.info = {"charge": state.charge, "spin": state.multiplicity}
        try:
            energy += xtb.results_of(piece)["energy"]
        except LabelError:
            return np.nan
    distance = np.linalg.norm(pieces[0].positions.mean(0) - pieces[1].positions.mean(0))
    coulomb = units.Hartree * units.Bohr / distance  # of two charges of one
    return energy + coulomb * states[0].charge * states[1].charge


def _langevin(
    start: Atoms, rng: np.random.Generator, snapshots: int, system: System
) -> Iterator[tuple[Atoms, float]]:
    """Snapshots (structure, energy in eV) of one run; it ends early where GFN2-xTB fails."""
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
    system: System,
    molecules: dict[str, list[Atoms]],
    rng: np.random.Generator,
    contact: float | Sequence[float],
) -> Atoms:
    """A conformer of a molecule, or a random complex of conformers of several."""
    parts = [molecules[part][rng.integers(len(molecules[part]))] for part in system.parts]
    shape = assemble(parts, rng, contact)
    shape.info = {"charge": system.charge, "spin": system.multiplicity}
    return shape


def _rotatable_bonds(smiles: str) -> list[tuple[int, int, np.ndarray]]:
    """Single bonds outside rings between two atoms that have other neighbours: (i, j, the atoms on
    the side of j).
    """
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


def _rotate(atoms: Atoms, i: int, j: int, side: np.ndarray, angle: float) -> None:
    """Rotate the atoms `side` by `angle` (radians) about the bond from i to j, in place."""
    axis = atoms.positions[j] - atoms.positions[i]
    turn = Rotation.from_rotvec(angle * axis / np.linalg.norm(axis))
    pivot = atoms.positions[j].copy()
    atoms.positions[side] = turn.apply(atoms.positions[side] - pivot) + pivot


# --- The command -----------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder of the data set")
    parser.add_argument(
        "--set",
        choices=tuple(SETS),
        default="main",
        help="main; charged: more ions, radicals, triplets and metals, of which main has few; "
        "apart: two molecules from contact to 14 Å; ionic: ions with ions and polar molecules from "
        "contact to 20 Å; simplest: atoms, diatomics from the wall to dissociation, linear "
        "molecules; ethanol: one molecule, five Langevin runs at 500 K, of which four are trained "
        "on (bonds that break: data/omol-mini/make.py)",
    )
    parser.add_argument("--structures", type=int, default=60_000, help="about how many")
    parser.add_argument(
        "--share",
        type=float,
        default=1.0,
        help="make only this share of the systems: a part of the same set",
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed, other structures")
    queue.add_workers(parser)


def run(args: argparse.Namespace) -> None:
    jobs = take_share(plan(args.structures, args.set, args.seed), args.share)
    make_set(args.out, jobs, sample, args.workers)


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(
        add_arguments,
        run,
        script="data/xtb/make.py",
        description=__doc__,
        stopped="the same command goes on from here",
        argv=argv,
    )


if __name__ == "__main__":
    sys.exit(main())
