"""Make `data/crystals`: crystals, defects, liquids and slabs, labelled with CHGNet.

    python data/crystals/make.py --out data/generated/crystals --rounds 2 --seed 0
    python data/crystals/make.py --set pairs --out data/generated/crystals-pairs --rounds 1

In: the crystals of `data/crystals/prototypes.py` and a seed. Out: `{train,val,test}.aselmdb` with
energies (eV), forces (eV/Å) and stresses (eV/Å³), split by chemical system. A run that was stopped
goes on where it was, and one with more rounds adds to the same folder.

Each crystal is first relaxed by CHGNet; its structures are strained, displaced, given defects, cut
to slabs, or taken from short Langevin runs of hot cells.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.build import (
    bcc100,
    bcc110,
    bcc111,
    diamond100,
    diamond111,
    fcc100,
    fcc110,
    fcc111,
    hcp0001,
    surface,
)
from ase.md.langevin import Langevin

from allscaip_lite.cli import run_script
from allscaip_lite.labels import LabelError, queue
from allscaip_lite.labels.chgnet import CHGNet, label_all
from data.crystals.prototypes import (
    CLOSEST,
    MAX_FORCE,
    MOST_ATOMS,
    PROTOTYPES,
    SETS,
    SPREADS,
    Crystal,
    conventional,
    crystals,
    displaced,
    mixture,
    nearest,
    relaxed,
    some_cell,
    split_of,
    strained,
    with_defect,
)
from data.xtb.sets import store_plan

# --- How structures are made -----------------------------------------------------------------

# Structures of a crystal in each round: of the tables', and of an element in another's structure.
COUNTS = {"strained": 6, "displaced": 6, "defect": 3, "slab": 3, "hot": 2}
FEWER = {"strained": 3, "displaced": 3, "defect": 2, "slab": 0, "hot": 0}
FEWEST = {"strained": 2, "displaced": 2, "defect": 1, "slab": 0, "hot": 0}  # of a mixture
VACUUM = 10.0  # Å between a slab and its image; more than any cutoff
TEMPERATURES = (300.0, 3000.0)  # K
STEP, STEPS_BEFORE, STEPS_BETWEEN = 3.0, 6, 5  # fs; of Langevin runs, which start displaced
SLABS: dict[str, tuple[Callable[..., Atoms], ...]] = {
    "fcc": (fcc111, fcc100, fcc110),
    "bcc": (bcc111, bcc100, bcc110),
    "diamond": (diamond111, diamond100),
    "hcp": (hcp0001,),
}


def slab(crystal: Crystal, primitive: Atoms, rng: np.random.Generator) -> Atoms | None:
    """A slab of (111), (100) or (110), or of (0001), with VACUUM between it and its image.

    Half of them are periodic along the surface only. None where it has more than MOST_ATOMS atoms.
    """
    centring = PROTOTYPES[crystal.prototype].centring
    whole = conventional(primitive, centring)
    lengths = whole.cell.lengths()
    if crystal.prototype in SLABS:
        build = SLABS[crystal.prototype][rng.integers(len(SLABS[crystal.prototype]))]
        layers = int(rng.integers(3, 8))
        more = {"c": lengths[2]} if crystal.prototype == "hcp" else {}
        size = (int(rng.integers(1, 3)), 1, layers)
        cut = build(crystal.elements[0], size, a=lengths[0], vacuum=VACUUM / 2, **more)
    else:
        faces = [(1, 0, 0), (1, 1, 0), (1, 1, 1)]
        cut = surface(whole, faces[rng.integers(3)], int(rng.integers(1, 4)), VACUUM / 2)
    if len(cut) > MOST_ATOMS:
        return None
    made = Atoms(cut.symbols, cut.positions, cell=cut.cell, pbc=True)
    made.pbc[2] = bool(rng.integers(2))
    stretch = np.eye(3)
    noise = rng.normal(size=(2, 2)) * 0.02
    stretch[:2, :2] += (noise + noise.T) / 2
    made.set_cell(made.cell.array @ stretch, scale_atoms=True)
    return made


def hot(start: Atoms, temperature: float, frames: int, rng: np.random.Generator) -> list[Atoms]:
    """Structures of a Langevin run by CHGNet at `temperature` (K), from displaced atoms."""
    atoms = start.copy()
    atoms.calc = CHGNet()
    spread = np.sqrt(atoms.get_masses() * units.kB * temperature)
    atoms.set_momenta(rng.normal(size=(len(atoms), 3)) * spread[:, None])
    dynamics = Langevin(
        atoms,
        STEP * units.fs,
        temperature_K=temperature,
        friction=0.02 / units.fs,
        fixcm=False,
        rng=rng,
    )
    found = []
    dynamics.run(STEPS_BEFORE)
    for _ in range(frames):
        dynamics.run(STEPS_BETWEEN)
        found.append(Atoms(atoms.symbols, atoms.positions, cell=atoms.cell, pbc=atoms.pbc))
    return found


def structures_of(
    crystal: Crystal, primitive: Atoms, rng: np.random.Generator
) -> list[tuple[str, Atoms]]:
    """What one round makes of a crystal's relaxed primitive cell: kinds and bare structures."""
    distance = nearest(primitive)
    centring = crystal.centring
    wanted = COUNTS if crystal.natural else FEWEST if crystal.mixed else FEWER
    made = []
    for number in range(wanted["strained"]):
        cell = some_cell(primitive, centring, rng)
        cell = strained(cell, rng, (0.0, 0.02, 0.04)[number % 3], volume=0.08)
        made.append(("strained", cell if number % 2 else displaced(cell, rng, 0.005 * distance)))
    for _ in range(wanted["displaced"]):
        cell = strained(some_cell(primitive, centring, rng, 2), rng, 0.015, volume=0.03)
        made.append(("displaced", displaced(cell, rng, rng.choice(SPREADS) * distance)))
    for _ in range(wanted["defect"]):
        cell = with_defect(some_cell(primitive, centring, rng, 7), rng, crystal.split)
        cell = strained(cell, rng, 0.01, volume=0.02)
        made.append(("defect", displaced(cell, rng, rng.choice(SPREADS[:2]) * distance)))
    for _ in range(wanted["slab"]):
        cut = slab(crystal, primitive, rng)
        if cut is not None:
            made.append(("slab", displaced(cut, rng, rng.choice(SPREADS[:3]) * distance)))
    if wanted["hot"]:
        start = strained(some_cell(primitive, centring, rng, 4), rng, 0.01, volume=0.05)
        start = displaced(start, rng, 0.07 * distance)
        temperature = float(np.exp(rng.uniform(*np.log(TEMPERATURES))))
        made += [("hot", frame) for frame in hot(start, temperature, wanted["hot"], rng)]
    return made


def sample(crystal: Crystal, number: int = 0, seed: int = 0) -> list[Atoms]:
    """The labelled structures of a crystal in a round; the same arguments give the same ones.

    The first structure of the first round is the relaxed primitive cell.
    """
    rng = np.random.default_rng([seed, number, *crystal.name.encode()])
    primitive = mixture(crystal, rng) if crystal.mixed else relaxed(crystal)
    made = structures_of(crystal, primitive, rng)
    if number == 0:
        made.insert(0, ("strained", primitive))
    least = CLOSEST * nearest(primitive)
    apart = [
        (kind, atoms)
        for kind, atoms in made
        if nearest(atoms) > least and split_of(atoms.get_chemical_symbols()) == crystal.split
    ]
    kept = []
    labelled = label_all([atoms for _, atoms in apart])
    for index, ((kind, _), atoms) in enumerate(zip(apart, labelled, strict=True)):
        largest = np.abs(atoms.get_forces()).max()
        if not largest < MAX_FORCE:
            continue
        atoms.info |= {
            "source": f"{crystal.name}, round {number}, structure {index}",
            "reference_source": "allscaip-lite, data/crystals/make.py",
            "data_id": f"crystal_{kind}",
            "prototype": crystal.prototype,
            "system": "-".join(sorted(set(atoms.symbols))),
        }
        kept.append(atoms)
    return kept


# --- The command -----------------------------------------------------------------------------


def make(
    folder: Path,
    rounds: int,
    seed: int = 0,
    workers: queue.Workers = 1,
    chosen: Sequence[Crystal] | None = None,
) -> None:
    """Make and label the structures of so many rounds, or go on with it, and write the data set.

    The crystals are by default those of the tables. In a round those of the tables come first,
    elements in other structures last. The number of workers changes nothing but the time. Raises
    LabelError where `folder` holds another plan or seed, and without a round.
    """
    import chgnet  # noqa: F401  a missing one is to be reported before any work

    if rounds < 1:
        raise LabelError(f"{rounds} rounds make no structure: give 1 or more")
    chosen = crystals() if chosen is None else list(chosen)
    store_plan(folder, {"seed": seed, "crystals": [vars(crystal) for crystal in chosen]})
    jobs = [
        queue.Job(
            f"{crystal.name}, round {number}",
            f"{number:02d}_{crystal.name.replace(' ', '_')}",
            crystal.split,
            (crystal, number, seed),
        )
        for number in range(rounds)
        for crystal in sorted(chosen, key=lambda crystal: not crystal.natural)
    ]
    queue.run_jobs(folder / "jobs", jobs, _sample, workers)
    queue.collect(folder / "jobs", jobs, folder)


def _sample(task: tuple[Crystal, int, int]) -> list[Atoms]:
    return sample(*task)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder of the data set")
    parser.add_argument(
        "--set",
        choices=tuple(SETS),
        default="tables",
        help="crystals of the tables; pairs, triples: two or three elements, whether it exists; "
        "mixtures: elements share sites",
    )
    parser.add_argument(
        "--rounds", type=int, default=2, help="each makes up to 20 structures of every crystal"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed, other structures")
    queue.add_workers(parser)


def run(args: argparse.Namespace) -> None:
    make(args.out, args.rounds, args.seed, args.workers, SETS[args.set]())


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(
        add_arguments,
        run,
        script="data/crystals/make.py",
        description=__doc__,
        stopped="the same command goes on from here",
        argv=argv,
    )


if __name__ == "__main__":
    sys.exit(main())
