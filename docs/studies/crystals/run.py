"""What people compute of crystals: elastic constants, phonons, vacancies, surfaces, expansion.

In: a model (name or path) or `chgnet`. Out: a file of results for each, and a page with tables of
all beside experiment:

    python docs/studies/crystals/run.py run lite-crystal --out FILE.json
    python docs/studies/crystals/run.py table FILE.json OTHER.json

Each part of a solid is kept as soon as it is done: the same command goes on where it was stopped. A
solid with an element that a model was not trained on is left out.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.build import bulk, fcc100, fcc111
from ase.calculators.calculator import Calculator
from ase.eos import EquationOfState
from ase.filters import FrechetCellFilter
from ase.md.nose_hoover_chain import IsotropicMTKNPT
from ase.md.verlet import VelocityVerlet
from ase.mep import NEB
from ase.optimize import BFGS, FIRE
from ase.phonons import Phonons
from ase.stress import full_3x3_to_voigt_6_stress

from allscaip_lite.calculator import AllScAIPCalculator
from allscaip_lite.cli import run_script
from allscaip_lite.errors import InputError
from allscaip_lite.files import locked, store_text
from allscaip_lite.tables import markdown_table
from docs.studies.report import insert_table

HERE = Path(__file__).parent
TEACHER = "chgnet"


@dataclass(frozen=True)
class Solid:
    """A cubic crystal, and what experiments say of it.

    Attributes:
        structure: As `ase.build.bulk` calls it.
        a: Lattice constant at room temperature, Å.
        known: Other quantities by their names in `QUANTITIES`.
    """

    structure: str
    a: float
    known: dict[str, float] = field(default_factory=dict)


def _known(
    bulk_modulus: float | None, elastic: tuple[float, float, float], **others: float
) -> dict[str, float]:
    """Experiment, by the names of `QUANTITIES`; a bulk modulus of None is left out."""
    values = dict(zip(("c11", "c12", "c44"), elastic, strict=True)) | others
    return values if bulk_modulus is None else {"bulk_modulus": bulk_modulus} | values


# Sources are on the page. GPa; eV; J/m²; THz.
SOLIDS = {
    "Al": Solid(
        "fcc",
        4.05,
        _known(
            72.2,
            (114.3, 61.9, 31.6),
            vacancy=0.67,
            surface_111=1.14,
            migration=0.61,
            expansion=23.1,
        ),
    ),
    "Cu": Solid(
        "fcc",
        3.61,
        _known(
            137, (176.2, 124.9, 81.8), vacancy=1.28, surface_111=1.79, migration=0.7, expansion=16.5
        ),
    ),
    "Ni": Solid(
        "fcc",
        3.52,
        _known(
            186,
            (261.2, 150.8, 131.7),
            vacancy=1.79,
            surface_111=2.38,
            migration=1.04,
            expansion=13.4,
        ),
    ),
    "Ag": Solid(
        "fcc",
        4.09,
        _known(
            100.7,
            (131.5, 97.3, 51.1),
            vacancy=1.11,
            surface_111=1.25,
            migration=0.66,
            expansion=18.9,
        ),
    ),
    "Pd": Solid(
        "fcc",
        3.89,
        _known(
            180.8,
            (234.1, 176.1, 71.2),
            vacancy=1.85,
            surface_111=2.00,
            migration=1.03,
            expansion=11.8,
        ),
    ),
    "Au": Solid(
        "fcc",
        4.08,
        _known(
            173.2,
            (201.6, 169.7, 45.4),
            vacancy=0.93,
            surface_111=1.51,
            migration=0.71,
            expansion=14.2,
        ),
    ),
    "Si": Solid("diamond", 5.43, _known(98.8, (166, 64, 79.6), optical=15.5)),
    "C": Solid("diamond", 3.567, _known(443, (1076, 125, 576), optical=39.9)),
    "MgO": Solid("rocksalt", 4.21, _known(None, (297, 95, 156))),
    "NaCl": Solid("rocksalt", 5.64, _known(None, (57.3, 11.2, 13.3))),
    "LiF": Solid("rocksalt", 4.03, _known(None, (124.6, 42.4, 64.9))),
}
QUANTITIES = {  # what it is called on the page, and its decimals
    "a": ("lattice constant, Å", 3),
    "bulk_modulus": ("bulk modulus, GPa", 0),
    "c11": ("C₁₁, GPa", 0),
    "c12": ("C₁₂, GPa", 0),
    "c44": ("C₄₄, GPa", 0),
    "optical": ("optical phonon at Γ, THz", 1),
    "longitudinal": ("longitudinal phonon at X, THz", 1),
    "transverse": ("transverse phonon at X, THz", 1),
    "vacancy": ("vacancy, eV", 2),
    "migration": ("barrier of the vacancy's hop, eV", 2),
    "surface_111": ("surface (111), J/m²", 2),
    "surface_100": ("surface (100), J/m²", 2),
    "expansion": ("thermal expansion of lengths, 10⁻⁶/K", 0),
}
CHECKS = {
    "spread": ("primitive, conventional and repeated cell: spread, meV/atom", 1),
    "cubic": ("largest difference of C₁₁, C₂₂, C₃₃, GPa", 1),
    "force": ("largest force in the perfect crystal, eV/Å", 4),
    "jump": ("largest jump of a force where a pair changes its nearest image, eV/Å", 4),
    "acoustic": ("largest acoustic frequency at Γ, THz", 2),
    "drift": ("drift of the energy in NVE at 300 K, meV/atom/ps", 3),
}
STRETCHES = np.linspace(0.97, 1.03, 7)  # of the lattice constant, for the equation of state
STRAIN = 0.005
TEMPERATURES = (300.0, 600.0)  # K, between which lengths expand


def calculator_of(method: str) -> tuple[Calculator, set[str] | None]:
    """The calculator of a method, and the elements it was trained on; None where that is all."""
    if method == TEACHER:
        from allscaip_lite.labels.chgnet import CHGNet

        return CHGNet(), None
    calculator = AllScAIPCalculator(method, outside_training="ignore")
    seen = calculator.model.seen
    return calculator, None if seen is None else seen.elements


def _crystal(name: str, a: float | None = None, cubic: bool = False) -> Atoms:
    """The primitive or the conventional cell of a solid, by default at experiment's constant."""
    solid = SOLIDS[name]
    return bulk(name, solid.structure, a=a or solid.a, cubic=cubic)


def energy_per_atom(atoms: Atoms, calculator: Calculator) -> float:
    """In eV, of the structure as it is."""
    atoms = atoms.copy()
    atoms.calc = calculator
    return atoms.get_potential_energy() / len(atoms)


def at_rest(atoms: Atoms, calculator: Calculator, cell: bool = False, steps: int = 60) -> Atoms:
    """The structure with its atoms, and if asked its cell, relaxed."""
    atoms = atoms.copy()
    atoms.calc = calculator
    BFGS(FrechetCellFilter(atoms) if cell else atoms, logfile=None).run(fmax=0.01, steps=steps)
    return atoms


def equation_of_state(primitive: Atoms, calculator: Calculator) -> tuple[float, float]:
    """The volume of least energy in Å³ and the bulk modulus in GPa, by Birch and Murnaghan."""
    volumes, energies = [], []
    for stretch in STRETCHES:
        moved = primitive.copy()
        moved.set_cell(primitive.cell * stretch, scale_atoms=True)
        volumes.append(moved.get_volume())
        energies.append(len(moved) * energy_per_atom(moved, calculator))
    volume, _, modulus = EquationOfState(volumes, energies, eos="birchmurnaghan").fit(warn=False)
    return volume, modulus / units.GPa


def elastic_constants(primitive: Atoms, calculator: Calculator) -> np.ndarray:
    """(6, 6) GPa, the slopes of the stress by strains of ±STRAIN, with the atoms at rest."""
    constants = np.zeros((6, 6))
    for row, (i, j) in enumerate([(0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)]):
        for sign in (1, -1):
            strain = np.zeros((3, 3))
            strain[i, j] += sign * STRAIN / 2
            strain[j, i] += sign * STRAIN / 2
            moved = primitive.copy()
            moved.set_cell(primitive.cell.array @ (np.eye(3) + strain), scale_atoms=True)
            if len(moved) > 1:
                moved = at_rest(moved, calculator, steps=20)
            moved.calc = calculator
            stress = full_3x3_to_voigt_6_stress(moved.get_stress(voigt=False))
            constants[row] += sign * stress / (2 * STRAIN) / units.GPa
    return constants


def phonons(primitive: Atoms, calculator: Calculator, repeats: int = 3) -> dict[str, float]:
    """Frequencies in THz at Γ and X, by displacements in a repeated primitive cell.

    Long-range forces of charges (the splitting of optical modes at Γ in polar crystals) are left
    out.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = Phonons(primitive, calculator, supercell=3 * (repeats,), name=f"{folder}/phonons")
        found.run()
        found.read(acoustic=False)
        gamma, x = 1e-12 * found.band_structure([(0, 0, 0), (0.5, 0, 0.5)], verbose=False) / _PLANCK
    gamma, x = np.sort(gamma), np.sort(x)
    values = {"acoustic": float(np.abs(gamma[:3]).max())}
    if len(primitive) > 1:
        values["optical"] = float(gamma[3:].min())
    else:
        values |= {"transverse": float(x[:2].mean()), "longitudinal": float(x[2])}
    return values


_PLANCK = 2 * np.pi * units._hbar / units._e  # eV s


def vacancy(conventional: Atoms, calculator: Calculator) -> float:
    """In eV, of one atom of 32 taken out at constant volume; the others relax."""
    whole = conventional.repeat(2)
    holed = whole.copy()
    del holed[0]
    energy = at_rest(holed, calculator).get_potential_energy()
    return energy - len(holed) * energy_per_atom(whole, calculator)


def migration(conventional: Atoms, calculator: Calculator, images: int = 1) -> float:
    """In eV, what a neighbour of a vacancy has to climb to jump into it, by a nudged elastic band.

    The cell is that of `vacancy`. The path has so many images, of which the highest climbs; as the
    jump is symmetric, one that climbs is enough.
    """
    whole = conventional.repeat(2)
    jumping = int(np.argsort(whole.get_distances(0, range(len(whole)), mic=True))[1])
    start, end = whole.copy(), whole.copy()
    end.positions[jumping] -= whole.get_distance(0, jumping, mic=True, vector=True)
    ends = []
    for atoms in (start, end):
        del atoms[0]
        ends.append(at_rest(atoms, calculator))
    path = [ends[0], *(ends[0].copy() for _ in range(images)), ends[1]]
    for atoms in path[1:-1]:
        atoms.calc = calculator
    band = NEB(path, climb=True, method="improvedtangent", allow_shared_calculator=True)
    band.interpolate(mic=True)
    FIRE(band, logfile=None).run(fmax=0.05, steps=100)
    energies = [atoms.get_potential_energy() for atoms in path]
    return max(energies) - energies[0]


def expansion(conventional: Atoms, calculator: Calculator, picoseconds: float) -> float:
    """Mean growth of a length in 10⁻⁶/K between TEMPERATURES, at zero pressure.

    From two NPT runs (Martyna, Tobias and Klein) of 32 or 64 atoms in steps of 2 fs, without their
    first fifths. Nuclei are classical.
    """
    lengths = []
    for temperature in TEMPERATURES:
        atoms = conventional.repeat(2)
        atoms.calc = calculator
        _warm(atoms, 2 * temperature)
        dynamics = IsotropicMTKNPT(
            atoms,
            timestep=2 * units.fs,
            temperature_K=temperature,
            pressure_au=0.0,
            tdamp=100 * units.fs,
            pdamp=500 * units.fs,
        )
        found: list[float] = []
        dynamics.attach(_note_length, 5, found, atoms)
        dynamics.run(round(500 * picoseconds))
        lengths.append(np.mean(found[len(found) // 5 :]))
    cold, warm = TEMPERATURES
    return 1e6 * (lengths[1] / lengths[0] - 1) / (warm - cold)


def _warm(atoms: Atoms, temperature: float) -> None:
    """Give the atoms momenta of a temperature (K), half of which becomes potential energy."""
    spread = np.sqrt(atoms.get_masses() * units.kB * temperature)
    momenta = np.random.default_rng(0).normal(size=(len(atoms), 3)) * spread[:, None]
    atoms.set_momenta(momenta - momenta.mean(0))


def _note_length(found: list[float], atoms: Atoms) -> None:
    found.append(atoms.get_volume() ** (1 / 3))


def surface(symbol: str, a: float, face: str, calculator: Calculator) -> float:
    """In J/m², of a relaxed slab of six layers.

    The bulk has the same atoms in the same cell without its vacuum, so that a model whose energy
    depends on the number of atoms is asked the same question twice.
    """
    build = {"111": fcc111, "100": fcc100}[face]
    slab = build(symbol, (1, 1, 6), a=a, vacuum=6.0)
    layer = np.diff(np.unique(slab.positions[:, 2].round(6)))[0]
    slab.pbc = True
    solid = slab.copy()
    solid.cell[2] = (0, 0, 6 * layer)
    area = np.linalg.norm(np.cross(*slab.cell.array[:2]))
    excess = at_rest(slab, calculator).get_potential_energy()
    excess -= len(slab) * energy_per_atom(solid, calculator)
    return excess / (2 * area) / (units.J / units.m**2)


def image_jump(conventional: Atoms, calculator: Calculator, pairs: int = 10) -> float:
    """Largest jump of a force (eV/Å) where a pair changes its nearest image, in a warm crystal.

    Along x two images of an atom are equally far from another at half the cell's width. Node
    attention reads the nearer one, so its forces jump there, by a little for each such pair. Of
    the jump found, up to 5e-4 eV/Å are the ordinary change over the step.
    """
    rng = np.random.default_rng(0)
    atoms = conventional.repeat(2)
    atoms.positions += rng.normal(size=atoms.positions.shape) * 0.1
    half = atoms.cell[0, 0] / 2
    beyond = half - np.abs(atoms.positions[:, 0] - atoms.positions[0, 0])
    found = 0.0
    for other in rng.permutation(np.flatnonzero(np.abs(beyond) < 0.5))[:pairs]:
        forces = []
        for side in (-2e-5, 2e-5):  # distances that differ by less than 1e-5 Å count as equal
            moved = atoms.copy()
            moved.positions[other, 0] = moved.positions[0, 0] + half + side
            moved.calc = calculator
            forces.append(moved.get_forces()[[0, other]])
        found = max(found, float(np.abs(forces[1] - forces[0]).max()))
    return found


def drift(conventional: Atoms, calculator: Calculator, picoseconds: float) -> float:
    """Of the energy, meV/atom/ps, of 32 or 64 atoms in steps of 2 fs.

    They start in the perfect crystal at 600 K, half of which becomes potential energy.
    """
    atoms = conventional.repeat(2)
    atoms.calc = calculator
    _warm(atoms, 600)
    dynamics = VelocityVerlet(atoms, 2 * units.fs)
    times, energies = [], []

    def note() -> None:
        times.append(dynamics.get_time() / (1000 * units.fs))
        energies.append(1000 * atoms.get_total_energy() / len(atoms))

    dynamics.attach(note, interval=5)
    dynamics.run(round(500 * picoseconds))
    return float(np.polyfit(times, energies, 1)[0])


def properties(name: str, calculator: Calculator) -> dict[str, float]:
    """What is computed of a solid at rest, by the names of `QUANTITIES` and `CHECKS`."""
    solid = SOLIDS[name]
    start = _crystal(name)
    volume = at_rest(start, calculator, cell=True).get_volume()
    # from here on cubic, which a model that does not know rotations may not be at rest
    a = solid.a * (volume / start.get_volume()) ** (1 / 3)
    primitive, cube = _crystal(name, a), _crystal(name, a, cubic=True)
    values: dict[str, float] = {"a": a}
    _, values["bulk_modulus"] = equation_of_state(primitive, calculator)
    constants = elastic_constants(primitive, calculator)
    normal = constants.diagonal()[:3]
    values |= {
        "c11": normal.mean(),
        "c12": constants[[0, 0, 1, 1, 2, 2], [1, 2, 0, 2, 0, 1]].mean(),
        "c44": constants.diagonal()[3:].mean(),
        "cubic": np.ptp(normal),
    }
    cells = [primitive, cube, cube.repeat((2, 1, 1)), cube.repeat(2)]
    values["spread"] = 1000 * np.ptp([energy_per_atom(cell, calculator) for cell in cells])
    cube.calc = calculator
    values["force"] = np.abs(cube.get_forces()).max()
    cube.calc = None
    values |= phonons(primitive, calculator)
    if solid.structure == "fcc":
        values["vacancy"] = vacancy(cube, calculator)
        values["migration"] = migration(cube, calculator)
        for face in ("111", "100"):
            values[f"surface_{face}"] = surface(name, a, face, calculator)
    if isinstance(calculator, AllScAIPCalculator):
        values["jump"] = image_jump(cube, calculator)
    return {key: float(value) for key, value in values.items()}


# --- The command -----------------------------------------------------------------------------


def run_study(
    method: str, solids: Sequence[str], out: Path, nve: float = 0.0, npt: float = 0.0
) -> None:
    """Compute what `out` does not have yet, with runs of so many picoseconds.

    Raises InputError for an `out` of another method.
    """
    found: dict[str, Any] = {"method": method, "solids": {}}
    if out.exists():
        found = json.loads(out.read_text())
        if found["method"] != method:
            raise InputError(f"{out} has results of {found['method']}: give another --out")
    calculator, known = calculator_of(method)
    for name in solids:
        if known is not None and not set(_crystal(name).symbols) <= known:
            print(f"{name}: left out, the model was not trained on it")
            continue
        done = found["solids"].setdefault(name, {})
        for values in _missing(name, done, calculator, nve, npt):
            done |= values
            store_text(out, json.dumps(found, indent=1))
            print(f"{name}: {done}", flush=True)


def _missing(
    name: str, done: dict[str, float], calculator: Calculator, nve: float, npt: float
) -> Iterator[dict[str, float]]:
    """Compute what `done` lacks of a solid; each part is put there before the next is asked for."""
    if not done:
        yield properties(name, calculator)
    cube = _crystal(name, done["a"], cubic=True)
    if nve and "drift" not in done:
        yield {"drift": drift(cube, calculator, nve)}
    if npt and "expansion" not in done and SOLIDS[name].structure == "fcc":
        yield {"expansion": expansion(cube, calculator, npt)}


def table(files: Sequence[Path]) -> str:
    """Of each solid what all methods find, and of the models what a perfect crystal has exactly."""
    results = [json.loads(file.read_text()) for file in files]
    learned = [found for found in results if found["method"] != TEACHER]
    names = {found["method"]: f"`{found['method']}`" for found in results} | {TEACHER: "CHGNet"}
    parts = []
    for title, columns, quantities in (
        ("quantity", results, QUANTITIES),
        ("of the perfect crystal", learned, CHECKS),
    ):
        rows = []
        for name, solid in SOLIDS.items():
            values = [found["solids"].get(name, {}) for found in columns]
            if quantities is QUANTITIES:
                values.append({"a": solid.a} | solid.known)
            for key, (text, decimals) in quantities.items():
                if any(key in found["solids"].get(name, {}) for found in columns):
                    cells = [_cell(column, key, decimals) for column in values]
                    rows.append([name, text, *cells])
        head = ["solid", title, *(names[found["method"]] for found in columns)]
        head += ["experiment"] if quantities is QUANTITIES else []
        if rows:
            parts.append(markdown_table(head, rows, "ll" + "r" * (len(head) - 2)))
    return "\n\n".join(parts)


def _cell(values: dict[str, float], key: str, decimals: int) -> str:
    return f"{values[key]:.{decimals}f}" if key in values else ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True, dest="command")
    compute = commands.add_parser("run", help="compute with one method, or go on with it")
    compute.add_argument("method", help=f"a model's name or file, or {TEACHER}")
    compute.add_argument("--out", type=Path, required=True, help="a JSON file")
    compute.add_argument("--solids", nargs="+", choices=tuple(SOLIDS), default=tuple(SOLIDS))
    compute.add_argument(
        "--nve", type=float, default=0.0, metavar="PS", help="also the drift in so many picoseconds"
    )
    compute.add_argument(
        "--npt",
        type=float,
        default=0.0,
        metavar="PS",
        help="also the expansion of metals, likewise",
    )
    write = commands.add_parser("table", help="write the tables of several methods into the page")
    write.add_argument("files", type=Path, nargs="+", help="JSON files, in the order of columns")
    write.add_argument("--page", type=Path, default=HERE / "README.md")


def run(args: argparse.Namespace) -> None:
    if args.command == "run":
        with locked(args.out.parent, f".{args.out.name}-lock"):
            run_study(args.method, args.solids, args.out, args.nve, args.npt)
    else:
        insert_table(args.page, table(args.files))


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(
        add_arguments,
        run,
        script="docs/studies/crystals/run.py",
        description=__doc__,
        stopped="the same command goes on from here",
        argv=argv,
    )


if __name__ == "__main__":
    sys.exit(main())
