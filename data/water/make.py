"""Make `data/water`: liquid water, clusters and molecules, labelled with SPC/Fw.

    python data/water/make.py --out data/generated/water --structures 4600 --seed 0

In: a plan of trajectories and a seed. Out: `{train,val,test}.aselmdb` with energies (eV), forces
(eV/Å) and, of periodic boxes, stresses (eV/Å³), split by trajectory, and `references.json`. A run
that was stopped goes on where it was.

Structures are sampled with OpenMM, whose cutoff has to fit into the box; the labels are those of
`allscaip_lite.spcfw`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from ase import Atoms, units

from allscaip_lite.cli import run_script
from allscaip_lite.files import store_text
from allscaip_lite.labels import LabelError, queue
from allscaip_lite.labels.spcfw import label
from allscaip_lite.spcfw import (
    ANGLE,
    ANGLE_CONSTANT,
    BOND_CONSTANT,
    BOND_LENGTH,
    C12,
    CHARGES,
    EPSILON,
    SIGMA,
)
from data.water.boxes import molecules, water_box
from data.xtb.sets import store_plan

if TYPE_CHECKING:
    import openmm

SETS = {  # kinds: of 4,600 structures how many; structures a trajectory
    "main": {
        "npt": (1680, 28),
        "nvt": (1120, 28),
        "cluster": (600, 15),
        "dimer": (300, 20),
        "molecule": (300, 20),
        "contact": (200, 20),
        "squeezed": (400, 20),
    },
    "liquid": {"liquid": (4600, 40)},
}
SIZES = {
    "cluster": tuple(range(2, 21)),
    "dimer": (2,),
    "molecule": (1,),
    "contact": (2,),
    "squeezed": (16, 24, 32),
    "liquid": (32, 48),
}
BOX_SIZES = (16, 24, 32, 48, 64)
TEMPERATURES = {"cluster": (150.0, 350.0), "liquid": (290.0, 310.0)}  # K, of others 280 to 360
PRESSURES = {"npt": (-1000.0, 3000.0), "liquid": (-500.0, 500.0)}  # bar
DENSITIES = (0.90, 1.12)  # g/cm³, of boxes of constant volume
MAX_FORCE = 15.0  # eV/Å: a structure with a larger one is left out
# Distances (Å) of atoms of two molecules that SPC/Fw's dynamics hardly show. A model trained
# without them may have a minimum there.
CONTACTS = {("H", "H"): (0.4, 2.0), ("O", "H"): (1.2, 1.9), ("O", "O"): (2.2, 2.7)}
STRAINED_EVERY = 7  # of a box's structures, one in so many is strained and displaced
STEP, STEPS_BETWEEN, STEPS_BEFORE = 1.0, 200, 2500  # fs; two structures are 0.2 ps apart


@dataclass(frozen=True)
class Trajectory:
    """One run of the sampler; all its structures are in one split.

    kind is one of SETS'; temperature in K; pressure in bar (NPT) and density in g/cm³ (start of
    boxes, and fixed in NVT) are read only where the kind has them.
    """

    name: str
    kind: str
    waters: int
    temperature: float
    pressure: float
    density: float
    frames: int
    split: str


def plan(structures: int, chosen: str = "main") -> list[Trajectory]:
    """Trajectories of about that many structures; conditions are spread evenly over their ranges.

    `chosen` is one of SETS: main has boxes, clusters and molecules of every kind; liquid has what
    SPC/Fw water looks like near 298 K and 1 bar. Raises LabelError below 100 structures,
    where some split would stay empty.
    """
    if structures < 100:
        raise LabelError(
            f"{structures} structures: give 100 or more, so that every split gets some"
        )
    trajectories = []
    kinds = SETS[chosen]
    whole = sum(share for share, _ in kinds.values())
    for kind, (share, frames) in kinds.items():
        sizes = SIZES.get(kind, BOX_SIZES)
        frames = min(frames, max(1, share * structures // (3 * whole)))
        for index in range(round(share * structures / whole / frames)):
            # multiples of these irrational numbers fill the square evenly (the R2 sequence)
            x, y = (0.5 + (index + 1) * np.array([0.7548776662466927, 0.5698402909980532])) % 1
            low, high = TEMPERATURES.get(kind, (280.0, 360.0))
            least, most = PRESSURES.get(kind, PRESSURES["npt"])
            # 11 has no divisor in common with the number of sizes: each size gets into each split
            split = {0: "test", 1: "val"}.get(index % 11, "train")
            trajectories.append(
                Trajectory(
                    name=f"{kind}-{index:03d}",
                    kind=kind,
                    waters=sizes[index % len(sizes)],
                    temperature=round(low + (high - low) * x, 1),
                    pressure=round(least + (most - least) * y),
                    density=round(DENSITIES[0] + (DENSITIES[1] - DENSITIES[0]) * y, 3)
                    if kind == "nvt"
                    else 1.0,
                    frames=frames,
                    split=split,
                )
            )
    return trajectories


def sample(trajectory: Trajectory, seed: int = 0) -> list[Atoms]:
    """The labelled structures of one trajectory; the same arguments give the same structures."""
    rng = np.random.default_rng([seed, *trajectory.name.encode()])
    kind = trajectory.kind
    if kind in ("dimer", "molecule"):
        frames = _random(trajectory, rng)
    elif kind == "contact":
        frames = (_contact(rng) for _ in range(trajectory.frames))
    else:
        frames = _dynamics(trajectory, rng)
    kept = []
    for number, frame in enumerate(frames):
        data_id = f"water_{kind}"
        if kind == "squeezed":
            frame = _squeezed(frame, rng)
        elif kind in ("npt", "nvt") and number % STRAINED_EVERY == STRAINED_EVERY - 1:
            frame, data_id = _strained(frame, rng), "water_strained"
        labelled = label(frame)
        if np.abs(labelled.get_forces()).max() < MAX_FORCE:
            labelled.info |= {
                "source": f"{trajectory.name}, {trajectory.temperature:g} K, structure {number}",
                "reference_source": "allscaip-lite, data/water/make.py",
                "data_id": data_id,
                "trajectory": trajectory.name,
            }
            kept.append(labelled)
    return kept


def _random(trajectory: Trajectory, rng: np.random.Generator) -> Iterator[Atoms]:
    """Single molecules with strong vibrations, or pairs 2.4 to 9 Å apart with weaker ones."""
    made = 0
    while made < trajectory.frames:
        single = trajectory.kind == "molecule"
        spread = rng.choice([0.02, 0.05, 0.1]) if single else rng.choice([0.01, 0.03])
        placed = molecules(rng, trajectory.waters, spread)
        if not single:
            direction = rng.normal(size=3)
            placed[1] += rng.uniform(2.4, 9.0) * direction / np.linalg.norm(direction)
            between = np.linalg.norm(placed[0][:, None] - placed[1], axis=2)
            if between.min() < 1.5:
                continue
        made += 1
        yield Atoms("OH2" * trajectory.waters, placed.reshape(-1, 3))


def _closest() -> np.ndarray:
    """The least distance in Å of two molecules' atoms, (3, 3), that any contact has."""
    names = ("O", "H", "H")
    pairs = [[tuple(sorted((one, other), reverse=True)) for other in names] for one in names]
    return np.array([[CONTACTS[pair][0] for pair in row] for row in pairs])


def _touching(rng: np.random.Generator) -> tuple[int, int, float]:
    """Which atom of one molecule comes how close (Å) to which atom of another; half are H and H."""
    kinds = list(CONTACTS)
    kind = kinds[rng.choice(3, p=(0.5, 0.25, 0.25))]
    first, second = (0 if name == "O" else int(rng.integers(1, 3)) for name in kind)
    return first, second, float(rng.uniform(*CONTACTS[kind]))


def _contact(rng: np.random.Generator) -> Atoms:
    """Two waters in vacuum, turned at random, that touch."""
    while True:
        placed = molecules(rng, 2, rng.choice([0.01, 0.03]))
        first, second, distance = _touching(rng)
        direction = rng.normal(size=3)
        direction *= distance / np.linalg.norm(direction)
        placed[1] += placed[0, first] + direction - placed[1, second]
        if (np.linalg.norm(placed[0][:, None] - placed[1], axis=2) > _closest() - 1e-9).all():
            return Atoms("OH2OH2", placed.reshape(-1, 3))


def _squeezed(frame: Atoms, rng: np.random.Generator) -> Atoms:
    """A box in which one molecule is moved along the line of two atoms until they touch."""
    waters = len(frame) // 3
    while True:
        first, second, distance = _touching(rng)
        fixed = int(rng.integers(waters))
        others = np.delete(np.arange(waters), fixed)
        vectors = frame.get_distances(3 * fixed + first, 3 * others + second, mic=True, vector=True)
        nearest = int(np.linalg.norm(vectors, axis=1).argmin())
        line, moving = vectors[nearest], int(others[nearest])
        squeezed = frame.copy()
        squeezed.positions[3 * moving : 3 * moving + 3] += line * (
            distance / np.linalg.norm(line) - 1
        )
        rest = np.delete(np.arange(len(frame)), range(3 * moving, 3 * moving + 3))
        around = np.stack(
            [squeezed.get_distances(3 * moving + k, rest, mic=True) for k in range(3)]
        )
        if (around > np.tile(_closest(), waters - 1) - 1e-9).all():
            return squeezed


def _strained(frame: Atoms, rng: np.random.Generator) -> Atoms:
    """Molecules moved by a random strain of some per cent, atoms displaced."""
    noise = rng.normal(size=(3, 3)) * 0.015
    deformation = np.eye(3) + (noise + noise.T) / 2 + np.eye(3) * rng.normal() * 0.01
    strained = frame.copy()
    whole = frame.positions.reshape(-1, 3, 3)
    moved = whole + (whole[:, :1] @ deformation - whole[:, :1])
    strained.positions = moved.reshape(-1, 3) + rng.normal(size=frame.positions.shape) * 0.02
    strained.set_cell(frame.cell.array @ deformation)
    return strained


# --- Sampling with OpenMM --------------------------------------------------------------------


def _dynamics(trajectory: Trajectory, rng: np.random.Generator) -> Iterator[Atoms]:
    """Structures of one run at constant temperature, after minimisation and a hotter start."""
    import openmm

    if trajectory.kind == "cluster":
        atoms = _droplet(trajectory.waters, rng)
    else:
        atoms = water_box(trajectory.waters, trajectory.density, int(rng.integers(2**31)))
    if trajectory.kind == "nvt":  # a cell that is no cube, of the same volume
        skew = np.tril(rng.normal(size=(3, 3))) * 0.06
        skew = np.eye(3) + np.clip(skew, -0.12, 0.12)
        atoms.set_cell(atoms.cell.array @ skew / np.linalg.det(skew) ** (1 / 3))
        shift = atoms.get_scaled_positions()[::3] @ atoms.cell.array - atoms.positions[::3]
        atoms.positions += np.repeat(shift, 3, axis=0)
    system = openmm_system(atoms)
    temperature = trajectory.temperature
    if trajectory.kind in PRESSURES:
        pressure = trajectory.pressure
        if trajectory.kind == "liquid":
            pressure -= missing_pressure(atoms)
        barostat = openmm.MonteCarloBarostat(pressure, temperature, 25)
        barostat.setRandomNumberSeed(int(rng.integers(1, 2**31)))
        system.addForce(barostat)
    integrator = openmm.LangevinMiddleIntegrator(1.25 * temperature, 2.0, STEP / 1000)
    integrator.setRandomNumberSeed(int(rng.integers(1, 2**31)))
    # one thread: sums over several depend on their order
    platform = openmm.Platform.getPlatformByName("CPU")
    properties = {"Threads": "1", "DeterministicForces": "true"}
    context = openmm.Context(system, integrator, platform, properties)
    context.setPositions(atoms.positions / 10)
    openmm.LocalEnergyMinimizer.minimize(context, 10.0, 200)
    context.setVelocitiesToTemperature(temperature, int(rng.integers(1, 2**31)))
    integrator.step(STEPS_BEFORE)
    integrator.setTemperature(temperature)
    integrator.step(STEPS_BEFORE)
    for _ in range(trajectory.frames):
        integrator.step(STEPS_BETWEEN)
        state = context.getState(getPositions=True, enforcePeriodicBox=bool(atoms.pbc.any()))
        frame = atoms.copy()
        frame.positions = 10 * state.getPositions(asNumpy=True)._value
        if frame.pbc.any():
            frame.set_cell(10 * state.getPeriodicBoxVectors(asNumpy=True)._value)
        else:
            frame.positions -= frame.positions.mean(0)
        yield frame


def _droplet(waters: int, rng: np.random.Generator) -> Atoms:
    """Waters on the sites of a cubic lattice that are next to a random point, 3.1 Å apart."""
    grid = np.stack(np.meshgrid(*[np.arange(-3, 4)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    distance = np.linalg.norm(grid - rng.uniform(-0.5, 0.5, 3), axis=1)
    sites = 3.1 * grid[np.argsort(distance)[:waters]]
    positions = sites[:, None] + molecules(rng, waters)
    return Atoms("OH2" * waters, positions.reshape(-1, 3))


def openmm_system(
    atoms: Atoms, cutoff: float | None = None, tolerance: float = 5e-4
) -> openmm.System:
    """The same water as an `openmm.System`: no cutoff in vacuum, in a box Coulomb and dispersion by
    particle mesh Ewald (LJPME), within a relative error `tolerance`.

    `cutoff` (Å) is that of repulsion and real-space sums; by default 0.42 of the box's narrowest
    width, so that a fluctuating box stays wider than twice the cutoff, and 9 Å at most.
    """
    import openmm

    system = openmm.System()
    nonbonded, bonds = openmm.NonbondedForce(), openmm.HarmonicBondForce()
    angles = openmm.HarmonicAngleForce()
    kilojoule = units.kJ / units.mol
    for first in range(0, len(atoms), 3):
        for atom, mass in enumerate(atoms.get_masses()[first : first + 3]):
            system.addParticle(mass)
            well = EPSILON / kilojoule if atom == 0 else 0.0
            nonbonded.addParticle(CHARGES[atom], SIGMA / 10, well)
        for hydrogen in (first + 1, first + 2):
            constant = 100 * BOND_CONSTANT / kilojoule
            bonds.addBond(first, hydrogen, BOND_LENGTH / 10, constant)
            nonbonded.addException(first, hydrogen, 0, 1, 0)
        nonbonded.addException(first + 1, first + 2, 0, 1, 0)
        angles.addAngle(first + 1, first, first + 2, ANGLE, ANGLE_CONSTANT / kilojoule)
    if atoms.pbc.any():
        nonbonded.setNonbondedMethod(openmm.NonbondedForce.LJPME)
        nonbonded.setCutoffDistance((cutoff or _cutoff(atoms)) / 10)
        nonbonded.setEwaldErrorTolerance(tolerance)
        system.setDefaultPeriodicBoxVectors(*(atoms.cell.array / 10))
    for force in (nonbonded, bonds, angles):
        system.addForce(force)
    return system


def _cutoff(atoms: Atoms) -> float:
    widths = 1 / np.linalg.norm(np.linalg.inv(atoms.cell.array), axis=0)
    return min(9.0, 0.42 * widths.min())


def missing_pressure(atoms: Atoms) -> float:
    """The mean pressure (bar) of the repulsion that OpenMM leaves out of a box of water: that of
    oxygens beyond its cutoff, were they spread evenly there (g_OO = 1). 400 bar for 32 waters.

    2π/3 ρ² ∫ r³ · 12 C12 / r¹³ dr from the cutoff on (Allen and Tildesley, Computer Simulation of
    Liquids, section 2.8), and of LJPME's dispersion nothing is left out.
    """
    oxygens = len(atoms) // 3 / atoms.get_volume()  # Å⁻³
    return 8 / 9 * np.pi * oxygens**2 * C12 / _cutoff(atoms) ** 9 / units.bar


# --- The command -----------------------------------------------------------------------------


def make(
    folder: Path, trajectories: Sequence[Trajectory], seed: int = 0, workers: queue.Workers = 1
) -> None:
    """Sample and label all trajectories, or go on with it, and write the data set into `folder`.

    The number of workers changes nothing but the time. Raises LabelError where `folder` holds
    another plan or seed.
    """
    import openmm  # noqa: F401  a missing one is to be reported before any work

    store_plan(folder, {"seed": seed, "trajectories": [vars(t) for t in trajectories]})
    jobs = [queue.Job(t.name, t.name, t.split, (t, seed)) for t in trajectories]
    store = folder / "trajectories"
    queue.run_jobs(store, jobs, _sample, workers)
    queue.collect(store, jobs, folder)
    store_text(folder / "references.json", json.dumps({"H": 0.0, "O": 0.0}, indent=1))


def _sample(task: tuple[Trajectory, int]) -> list[Atoms]:
    return sample(*task)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder of the data set")
    parser.add_argument(
        "--set",
        choices=tuple(SETS),
        default="main",
        help="main; liquid: boxes near 298 K and 1 bar, the liquid of docs/studies/water",
    )
    parser.add_argument("--structures", type=int, default=4600, help="about how many")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other structures")
    queue.add_workers(parser)


def run(args: argparse.Namespace) -> None:
    make(args.out, plan(args.structures, args.set), args.seed, args.workers)


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(
        add_arguments,
        run,
        script="data/water/make.py",
        description=__doc__,
        stopped="the same command goes on from here",
        argv=argv,
    )


if __name__ == "__main__":
    sys.exit(main())
