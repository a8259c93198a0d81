"""The first examples that a student tries: diatomics, frequencies, barriers, ion pairs, rotation.

In: methods, each a model (name or path), `gfn2-xtb` or `wb97m-v`. Out: a file of results for each,
and a page with a table and a picture of all. The methods that give labels, GFN2-xTB and
ωB97M-V/def2-TZVPD, answer the same questions as the models that learned from them. Every energy is
kept in `--work`, so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.build import molecule
from ase.calculators.calculator import Calculator, all_changes
from ase.units import _c, _e, _hbar
from scipy.interpolate import CubicSpline
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from allscaip_lite.calculator import AllScAIPCalculator
from allscaip_lite.cli import run_script
from allscaip_lite.errors import InputError
from allscaip_lite.files import locked, store_text
from allscaip_lite.labels.sampling import embed, parse_system, with_hydrogens
from allscaip_lite.labels.xtb import results_of
from allscaip_lite.machine import processor_name
from allscaip_lite.tables import markdown_table
from allscaip_lite.tasks.relax import relax
from data.xtb.sets import in_state
from data.xtb.sets import relax as relax_by_xtb
from docs.studies.report import insert_table

HERE = Path(__file__).parent
DFT, XTB = "wb97m-v", "gfn2-xtb"
TRUTHS = {"lite": DFT, "lite-local": DFT, "lite-xtb": XTB, "lite-local-xtb": XTB}
COULOMB = 14.399645  # eV Å, of two unit charges
PER_CM = 1e-2 * _e / (2 * np.pi * _c * _hbar)  # cm⁻¹ of one eV

# Bond lengths in Å, from experiment (Huber and Herzberg, NIST WebBook): they only set the grid.
DIATOMICS = {
    "H2": (0.741, 1),
    "N2": (1.098, 1),
    "O2": (1.208, 3),
    "HF": (0.917, 1),
    "NaCl": (2.361, 1),
    "LiF": (1.564, 1),
}
STRETCHES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25, 1.5, 2.0, 2.5, 3.0)
NEAR = (0.7, 2.0)  # of the bond length: where the error of a curve is taken

VIBRATING = ("H2O", "NH3", "CH4", "N2", "CO2", "HCN", "H2CO", "C2H2", "C2H4", "CH3OH")
LINEAR = ("N2", "CO2", "HCN", "C2H2")
TURNED = (*VIBRATING, "C2H6", "C6H6")

# A molecule and the four atoms whose dihedral angle is turned, as SMARTS.
TORSIONS = {
    "hydrogen peroxide": ("OO", "[H]OO[H]"),
    "formic acid": ("OC=O", "O=CO[H]"),
    "glyoxal": ("O=CC=O", "O=CC=O"),
    "acrolein": ("C=CC=O", "C=CC=O"),
    "ethane": ("CC", "[H]CC[H]"),
}
ANGLES = tuple(range(0, 181, 30))

OXYGENS = 2.8  # Å between the oxygens of two waters that share a proton
PROTON = tuple(np.linspace(0.95, OXYGENS - 0.95, 7))  # Å from the first oxygen

TAILS = {
    "Na⁺ Cl⁻": ("[Na+]", "[Cl-]"),
    "Li⁺ F⁻": ("[Li+]", "[F-]"),
    "ammonium formate": ("[NH4+]", "[O-]C=O"),
    "guanidinium acetate": ("NC(N)=[NH2+]", "CC(=O)[O-]"),
    "imidazolium chloride": ("c1c[nH]c[nH+]1", "[Cl-]"),
}
SEPARATIONS = (4.0, 6.0, 8.0, 12.0, 20.0, 40.0)  # Å between the centres of mass


class Remembered(Calculator):
    """A calculator whose energies and forces are kept in a file, one line each."""

    implemented_properties = ["energy", "forces"]

    def __init__(self, answer: Callable[[Atoms], tuple[float, np.ndarray]], file: Path) -> None:
        super().__init__()
        self.answer, self.file = answer, file
        self.known: dict[str, tuple[float, list[list[float]]]] = {}
        if file.exists():
            for line in file.read_text().splitlines(keepends=True):
                if line.endswith("\n"):  # the last one may have been cut short
                    name, *entry = json.loads(line)
                    self.known[name] = tuple(entry)

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """Charge and spin in `info` count too; looking a structure up is cheap."""
        return list(all_changes)

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        super().calculate(atoms, list(properties), list(system_changes))
        assert atoms is not None
        state = [atoms.info.get("charge", 0), atoms.info.get("spin", 1), *atoms.numbers.tolist()]
        place = (atoms.positions - atoms.positions[0]).round(7) + 0.0
        name = hashlib.sha256(json.dumps([state, place.tolist()]).encode()).hexdigest()[:24]
        if name not in self.known:
            energy, forces = self.answer(atoms)
            self.known[name] = (float(energy), np.asarray(forces).tolist())
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a") as stream:
                stream.write(json.dumps([name, *self.known[name]]) + "\n")
        energy, forces = self.known[name]
        self.results = {"energy": energy, "forces": np.array(forces)}


def method(name: str, work: Path) -> Calculator:
    """The calculator of a method; those of labels remember what they computed."""
    if name == XTB:
        return Remembered(_by_xtb, work / f"{XTB}.jsonl")
    if name == DFT:
        return Remembered(_by_dft, work / f"{DFT}.jsonl")
    import torch

    return AllScAIPCalculator(name, dtype=torch.float64, outside_training="ignore")


def _by_xtb(atoms: Atoms) -> tuple[float, np.ndarray]:
    results = results_of(atoms)
    return results["energy"], results["forces"]


def _by_dft(atoms: Atoms) -> tuple[float, np.ndarray]:
    from allscaip_lite.labels.dft import label

    labelled = label(atoms)
    return labelled.get_potential_energy(), labelled.get_forces()


def answers_of(
    structures: Sequence[Atoms], calculator: Calculator
) -> list[tuple[float, np.ndarray]]:
    """Energy (eV) and forces (eV/Å) of each; not numbers where the method fails."""
    if isinstance(calculator, AllScAIPCalculator):
        results = calculator.model.predict(structures, outside_training="ignore")
        return [(result.energy, result.forces) for result in results]
    found = []
    for atoms in structures:
        try:
            calculator.calculate(atoms)
            found.append((calculator.results["energy"], calculator.results["forces"]))
        except InputError:  # an SCF that does not converge
            found.append((np.nan, np.full((len(atoms), 3), np.nan)))
    return found


def energies_of(structures: Sequence[Atoms], calculator: Calculator) -> list[float]:
    """Energies in eV; not a number where the method fails."""
    return [energy for energy, _ in answers_of(structures, calculator)]


# --- Questions ---------------------------------------------------------------------------------


def diatomics(calculator: Calculator) -> dict[str, list[float]]:
    """Of each molecule the energies (eV) at STRETCHES of its bond length."""
    curves = {}
    for name, (length, spin) in DIATOMICS.items():
        pair = in_state(Atoms(name, [[0, 0, 0], [0, 0, length]]), 0, spin)
        curves[name] = energies_of([_scaled(pair, stretch) for stretch in STRETCHES], calculator)
    return curves


def _scaled(atoms: Atoms, factor: float) -> Atoms:
    scaled = atoms.copy()
    scaled.positions *= factor
    return scaled


def frequencies(calculator: Calculator) -> dict[str, list[float]]:
    """Harmonic frequencies (cm⁻¹, ascending; imaginary ones negative) at the method's minimum."""
    found = {}
    for name in VIBRATING:
        atoms, _ = relax(_named(name), calculator, fmax=0.003, steps=200)
        atoms.calc = calculator
        moves = 0.01 * np.eye(3 * len(atoms)).reshape(-1, len(atoms), 3)
        moved = [_shifted(atoms, move) for move in (*moves, *-moves)]
        forces = np.array([forces.ravel() for _, forces in answers_of(moved, calculator)])
        plus, minus = np.split(forces, 2)
        hessian = (minus - plus) / 0.02
        masses = np.sqrt(atoms.get_masses().repeat(3))
        squared = np.linalg.eigvalsh((hessian + hessian.T) / 2 / np.outer(masses, masses))
        # eV/Å²/u → cm⁻¹: ħω = ħ √(eV/u)/Å
        scale = 1e10 * np.sqrt(_e / 1.66053906660e-27) * _hbar / _e * PER_CM
        waves = np.sign(squared) * np.sqrt(np.abs(squared)) * scale
        outside = 5 if name in LINEAR else 6  # turning and moving it as a whole
        found[name] = sorted(waves[np.argsort(np.abs(waves))][outside:].tolist())
    return found


def _shifted(atoms: Atoms, move: np.ndarray) -> Atoms:
    shifted = atoms.copy()
    shifted.positions += move
    return shifted


def torsions(calculator: Calculator) -> dict[str, list[float]]:
    """Energies (eV) at ANGLES, the rest of the molecule as GFN2-xTB has it at its minimum."""
    return {
        name: energies_of(list(_turned(*words)), calculator) for name, words in TORSIONS.items()
    }


def proton(calculator: Calculator) -> list[float]:
    """Energies (eV) of H5O2⁺ with a proton at PROTON between oxygens that are held."""
    arms = np.array([[-0.58, 0.77, 0], [-0.58, -0.77, 0]])  # O–H 0.964 Å, 106°
    other = arms[:, [0, 2, 1]] * [-1, 1, 1] + [OXYGENS, 0, 0]
    waters = [[0, 0, 0], *arms, [OXYGENS, 0, 0], *other]
    structures = [Atoms("OH2OH2H", [*waters, [place, 0, 0]]) for place in PROTON]
    return energies_of([in_state(atoms, 1, 1) for atoms in structures], calculator)


def tails(calculator: Calculator) -> dict[str, list[float]]:
    """Energies of ion pairs less those of their ions (eV) at SEPARATIONS, flat sides facing."""
    found = {}
    for name, words in TAILS.items():
        first, second = (_flat(_relaxed(word)) for word in words)
        pairs = [
            in_state(first + _shifted(second, np.array([distance, 0, 0])), 0, 1)
            for distance in SEPARATIONS
        ]
        *energies, cation, anion = energies_of([*pairs, first, second], calculator)
        found[name] = [energy - cation - anion for energy in energies]
    return found


def _flat(atoms: Atoms) -> Atoms:
    """With its centre of mass in the origin and its shortest extent along x."""
    flat = atoms.copy()
    arms = atoms.positions - atoms.get_center_of_mass()
    flat.positions = arms @ np.linalg.svd(arms, full_matrices=True)[2].T[:, ::-1]
    return flat


def rotation(calculator: Calculator, turns: int = 100) -> dict[str, list[float]]:
    """Standard deviation and range (eV) of the energy over random orientations."""
    spread = {}
    for name in TURNED:
        atoms = _named(name)
        arms = atoms.positions - atoms.get_center_of_mass()
        turned = [
            _shifted(atoms, turn.apply(arms) - atoms.positions)
            for turn in Rotation.random(turns, random_state=0)
        ]
        energies = energies_of(turned, calculator)
        spread[name] = [float(np.std(energies)), float(np.ptp(energies))]
    return spread


def _named(name: str) -> Atoms:
    return in_state(molecule(name), 0, 1)


def _relaxed(smiles: str) -> Atoms:
    """The minimum of GFN2-xTB, from a SMILES."""
    system = parse_system("", smiles)
    start = embed(smiles, np.random.default_rng(0), 1)[0]
    atoms = in_state(start, system.charge, system.multiplicity)
    return relax_by_xtb(atoms, 300) if len(atoms) > 1 else atoms


def _turned(smiles: str, pattern: str) -> Iterator[Atoms]:
    from rdkit import Chem

    graph = with_hydrogens(smiles)
    four = graph.GetSubstructMatch(Chem.MolFromSmarts(pattern))
    cut = Chem.RWMol(graph)
    cut.RemoveBond(four[1], four[2])
    side = next(part for part in Chem.GetMolFrags(cut) if four[2] in part)
    atoms = _relaxed(smiles)
    for angle in ANGLES:
        atoms.set_dihedral(*four, angle, indices=list(side))
        yield atoms.copy()


_COULOMB = ", ".join(f"{-COULOMB / distance:.2f}" for distance in SEPARATIONS)
_PLACES = ", ".join(f"{distance:.0f}" for distance in SEPARATIONS)
TABLES = {
    "diatomics": "The distance of the minimum (Å), and the energies at half and at three times the "
    "bond length (eV above the minimum). In brackets the largest error against what the model "
    f"learned from, from {NEAR[0]} to {NEAR[1]:.0f} bond lengths. *No wall*: the energy does not "
    "rise all the way to half of the bond length.",
    "frequencies": "The mean of a molecule's harmonic frequencies, cm⁻¹, and in brackets the mean "
    "error of its frequencies against what the model learned from.",
    "barriers": "The dihedral angle of the minimum, the highest energy, and the energy at 180° "
    "less that at 0°, eV; all other coordinates stay as they are at GFN2-xTB's minimum.",
    "ion pairs": f"Energies less those of the ions, eV, at {_PLACES} Å between the centres of "
    f"mass. Two point charges have {_COULOMB}. A dash: the SCF finds no solution. At 20 and 40 Å "
    "GFN2-xTB's own values are too low, for a part of an electron goes back to the cation.",
    "rotation": "The standard deviation and the range of the energy over 100 random orientations, "
    "meV. The truth is 0.",
}

QUESTIONS: dict[str, Callable[[Calculator], Any]] = {
    "diatomics": diatomics,
    "frequencies": frequencies,
    "torsions": torsions,
    "proton": proton,
    "tails": tails,
    "rotation": rotation,
}
# Symmetric under rotation by construction, and no ion pair stays one in vacuum at this level.
NOT_ASKED = {DFT: ("tails", "rotation"), XTB: ("rotation",)}


def answers(name: str, work: Path) -> dict[str, Any]:
    """All results of a method, and where they were made."""
    calculator = method(name, work)
    questions = [q for q in QUESTIONS if q not in NOT_ASKED.get(name, ())]
    results = {q: QUESTIONS[q](calculator) for q in tqdm(questions, desc=name)}
    return {"method": name, "machine": processor_name()} | results


# --- Page ----------------------------------------------------------------------------------------


def _curve(energies: Sequence[float]) -> np.ndarray:
    """A curve above its lowest point, eV."""
    values = np.array(energies, dtype=float)
    return values - np.nanmin(values)


def _minimum(name: str, energies: Sequence[float]) -> float:
    """Bond length (Å) where a cubic spline through the energies is lowest."""
    length = DIATOMICS[name][0]
    curve = _curve(energies)
    known = np.isfinite(curve)
    spline = CubicSpline(np.array(STRETCHES)[known], curve[known])
    fine = np.linspace(*np.array(STRETCHES)[known][[0, -1]], 2000)
    return float(length * fine[spline(fine).argmin()])


def _has_wall(energies: Sequence[float]) -> bool:
    """Whether the energy rises with every step from the minimum to half of the bond length."""
    curve = _curve(energies)
    left = curve[: int(np.nanargmin(curve)) + 1]
    left = left[np.isfinite(left)]
    return bool((np.diff(left) < 0).all()) and len(left) > 1


def summary(result: dict[str, Any], truth: dict[str, Any] | None) -> dict[str, dict[str, str]]:
    """Of each table its rows, in the words of one method."""
    tables: dict[str, dict[str, str]] = {title: {} for title in TABLES}
    for name, energies in result["diatomics"].items():
        curve = _curve(energies)
        text = f"{_minimum(name, energies):.2f}, {_numbers(curve[[0, -1]], '.1f')}"
        if truth:
            inside = [NEAR[0] <= stretch <= NEAR[1] for stretch in STRETCHES]
            error = np.abs(curve - _curve(truth["diatomics"][name]))[inside]
            text += f" ({np.nanmax(error):.1f})"
        tables["diatomics"][name] = text + ("" if _has_wall(energies) else ", no wall")
    for name, waves in result["frequencies"].items():
        text = f"{np.mean(waves):.0f}"
        if truth:
            text += f" ({_errors(waves, truth['frequencies'][name]).mean():.0%})"
        tables["frequencies"][name] = text
    if truth:
        pairs = [(waves, truth["frequencies"][n]) for n, waves in result["frequencies"].items()]
        errors = np.concatenate([_errors(*pair) for pair in pairs])
        tables["frequencies"]["mean and largest error"] = f"{errors.mean():.1%}, {errors.max():.0%}"
    for name, energies in result["torsions"].items():
        curve = _curve(energies)
        tables["barriers"][name] = (
            f"{ANGLES[int(curve.argmin())]}°, {curve.max():.2f}, {curve[-1] - curve[0]:+.2f}"
        )
    proton = _curve(result["proton"])
    tables["barriers"]["proton in the middle of two waters"] = f"{proton[len(PROTON) // 2]:.2f}"
    for name, energies in result.get("tails", {}).items():
        tables["ion pairs"][name] = _numbers(energies, "+.2f")
    for name, spread in result.get("rotation", {}).items():
        tables["rotation"][name] = _numbers(1e3 * np.array(spread), ".1f")
    return tables


def _numbers(values: Sequence[float] | np.ndarray, form: str) -> str:
    shown = (f"{value:{form}}" for value in np.array(values, dtype=float))
    return ", ".join("–" if text.endswith("nan") else text for text in shown)


def _errors(waves: Sequence[float], truth: Sequence[float]) -> np.ndarray:
    return np.abs(np.array(waves) / np.array(truth) - 1)


def write_page(page: Path, results: Path) -> None:
    """The tables and the picture of all results in the folder."""
    found = {file.stem: json.loads(file.read_text()) for file in sorted(results.glob("*.json"))}
    order = [name for name in (DFT, "lite", "lite-local", XTB, "lite-xtb") if name in found]
    order += [name for name in found if name not in order]
    columns = {name: summary(found[name], found.get(TRUTHS.get(name, ""))) for name in order}
    text = []
    for title, words in TABLES.items():
        asked = [name for name in order if columns[name][title]]
        rows = dict.fromkeys(row for name in asked for row in columns[name][title])
        cells = ([row, *(columns[name][title].get(row, "–") for name in asked)] for row in rows)
        text += [f"## {title.capitalize()}", words, markdown_table(["", *asked], cells)]
        if title == "diatomics":
            text.append("![Six curves](results/diatomics.png)")
    machines = ", ".join(dict.fromkeys(str(result["machine"]) for result in found.values()))
    insert_table(page, "\n\n".join([*text, f"Machine: {machines}."]))
    _draw(found, order, results / "diatomics.png")


def _draw(found: dict[str, Any], order: Sequence[str], file: Path) -> None:
    import matplotlib.pyplot as plt

    from allscaip_lite.notebook.plots import LINES, STYLE

    plt.rcParams.update(STYLE)
    styles = dict(zip(order, LINES, strict=False))
    figure, axes = plt.subplots(2, 3, figsize=(10, 6), constrained_layout=True)
    for name, panel in zip(DIATOMICS, axes.flat, strict=True):
        length = DIATOMICS[name][0]
        for title in order:
            if title in styles:
                curve = _curve(found[title]["diatomics"][name])
                places = np.array(STRETCHES) * length
                panel.plot(places, curve, **styles[title], markersize=3.5, label=title)
        panel.set(title=name, ylim=(-0.5, 15), xlabel="distance (Å)", ylabel="energy (eV)")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(file, dpi=100, metadata={"Software": None})
    plt.close(figure)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the study."""
    parser.add_argument(
        "methods", nargs="*", help=f"models, by name or path, {XTB} or {DFT}; none: only the page"
    )
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--page", type=Path, default=HERE / "README.md")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("data/generated/first-molecules"),
        help="where labels are kept, so that a stopped run goes on",
    )


def run(args: argparse.Namespace) -> None:
    """Ask the methods, then write the page."""
    args.work.mkdir(parents=True, exist_ok=True)
    args.results.mkdir(parents=True, exist_ok=True)
    with locked(args.work):
        for name in args.methods:
            text = json.dumps(_rounded(answers(name, args.work)), indent=1)
            text = re.sub(r"\[[^][{}]*\]", lambda found: " ".join(found[0].split()), text)
            store_text(args.results / f"{Path(name).stem}.json", text + "\n")
    write_page(args.page, args.results)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    if isinstance(value, float):
        return round(value, 5) if np.isfinite(value) else None
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study; returns the exit status."""
    return run_script(
        add_arguments,
        run,
        "docs/studies/first_molecules/run.py",
        __doc__,
        "what was computed is kept; the same command goes on",
        argv,
    )


if __name__ == "__main__":
    sys.exit(main())
