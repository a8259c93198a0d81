"""Make the sets of `data/long_range`, whose energy reaches far: ions, pairs and chains.

    python data/long_range/make.py ions --out data/generated/long-range/ions

In: the tables below and a seed. Out: `{train,val,test,curves}.aselmdb` with energies (eV) and
forces (eV/Å). Each structure is two groups of atoms, and `info["distance"]` (Å) is the distance of
their centres; `test` holds what is not trained on, by `data_id`; `curves` separates some pairs in
steps.

- `ions`: point charges ±1 and dipoles with a soft core, labelled by their formula.
- `pairs`: ions and polar molecules at GFN2-xTB, 2 to 15 Å apart; some pairs are in `test` alone,
  others are trained on up to 9 Å only.
- `chain`: molecules with a charge at one end and a polar group, or another such charge, at the
  other, 5 to 20 Å away, at GFN2-xTB.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.calculators.calculator import CalculatorError, all_changes
from ase.data import covalent_radii
from ase.optimize import BFGS
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from allscaip_lite.cli import run_script
from allscaip_lite.data.aselmdb import SPLITS, write_aselmdb
from allscaip_lite.labels import LabelError, counts_of
from allscaip_lite.labels.xtb import GFN2xTB
from data.long_range.ions import ion_curves, ions, join, labelled

FILES = (*SPLITS, "curves")


def write_ions(folder: Path, structures: int, seed: int) -> dict[str, int]:
    """Write the four files of `ions`; a tenth of the structures each are `val` and `test`."""
    tenth = max(1, structures // 10)
    counts = {"train": structures - 2 * tenth, "val": tenth, "test": tenth}
    for number, (split, count) in enumerate(counts.items()):
        found = ions(count, 10 * seed + number)
        found = tqdm(found, split, count, disable=not sys.stderr.isatty())
        write_aselmdb(folder / f"{split}.aselmdb", found, overwrite=True)
    counts["curves"] = write_aselmdb(folder / "curves.aselmdb", ion_curves(), overwrite=True)
    return counts


# --- Pairs of molecules and ions at GFN2-xTB -------------------------------------------------

# Symbols, rough positions in Å and charge; `fragment` relaxes them.
FRAGMENTS: dict[str, tuple[str, list[tuple[float, float, float]], int]] = {
    "Li+": ("Li", [(0, 0, 0)], 1),
    "Na+": ("Na", [(0, 0, 0)], 1),
    "K+": ("K", [(0, 0, 0)], 1),
    "F-": ("F", [(0, 0, 0)], -1),
    "Cl-": ("Cl", [(0, 0, 0)], -1),
    "NH4+": (
        "NH4",
        [(0, 0, 0), (0.6, 0.6, 0.6), (-0.6, -0.6, 0.6), (0.6, -0.6, -0.6), (-0.6, 0.6, -0.6)],
        1,
    ),
    "OH-": ("OH", [(0, 0, 0), (0, 0, 0.97)], -1),
    "H2O": ("OH2", [(0, 0, 0), (0.76, 0, 0.58), (-0.76, 0, 0.58)], 0),
    "HF": ("FH", [(0, 0, 0), (0, 0, 0.92)], 0),
    "HCN": ("CHN", [(0, 0, 0), (0, 0, -1.07), (0, 0, 1.15)], 0),
    "NH3": ("NH3", [(0, 0, 0), (0.94, 0, 0.3), (-0.47, 0.81, 0.3), (-0.47, -0.81, 0.3)], 0),
}

NEAR = 9.0  # Å: how far the pairs of role "near" are trained on
FARTHEST = 15.0
PAIRS = (
    *[(*pair, "train") for pair in (("Na+", "K+"), ("NH4+", "Li+"), ("Cl-", "F-"), ("OH-", "F-"))],
    *[(*pair, "train") for pair in (("NH4+", "H2O"), ("NH4+", "HF"), ("OH-", "HF"))],
    *[(*pair, "train") for pair in (("Cl-", "H2O"), ("Na+", "H2O"), ("K+", "H2O"))],
    *[(*pair, "train") for pair in (("H2O", "HF"), ("NH3", "HF"), ("NH4+", "Cl-"))],
    *[(*pair, "train") for pair in (("Na+", "Cl-"), ("Li+", "F-"))],
    *[(*pair, "near") for pair in (("Na+", "Li+"), ("K+", "NH4+"), ("NH4+", "NH3"))],
    *[(*pair, "near") for pair in (("Cl-", "HF"), ("H2O", "HCN"), ("OH-", "H2O"))],
    *[(*pair, "unseen") for pair in (("Na+", "NH4+"), ("OH-", "Cl-"), ("NH4+", "HCN"))],
    *[(*pair, "unseen") for pair in (("Cl-", "NH3"), ("HF", "HCN"))],
)
LEAKED = 0.15  # e: more charge than that on the wrong side is another electronic state
MAX_FORCE = 15.0  # eV/Å


class Fragments(GFN2xTB):
    """GFN2-xTB that refuses a state in which two fragments have other charges.

    Raises LabelError where the SCF does not converge, where the first `count` atoms do not carry
    `charge` e (Mulliken) within `LEAKED`, or where a force is above `MAX_FORCE`.
    """

    def __init__(self, count: int, charge: int) -> None:
        super().__init__(accuracy=0.1)
        self.count, self.charge = count, charge

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        try:
            super().calculate(atoms, properties, system_changes)
        except CalculatorError as error:
            raise LabelError(str(error)) from error
        found = self.results["charges"][: self.count].sum()
        if abs(found - self.charge) > LEAKED:
            raise LabelError(f"{found:+.2f} e on the first fragment, not {self.charge:+d}")
        if np.abs(self.results["forces"]).max() > MAX_FORCE:
            raise LabelError(f"a force above {MAX_FORCE} eV/Å")


@cache
def fragment(name: str) -> Atoms:
    """A molecule or ion of `FRAGMENTS`, relaxed at GFN2-xTB, its atoms' mean at the origin.

    `info["dipole"]` is the dipole moment of its atoms' charges about that point, in e Å.
    """
    symbols, positions, charge = FRAGMENTS[name]
    atoms = Atoms(symbols, positions, info={"charge": charge, "spin": 1})
    method = Fragments(len(atoms), charge)
    atoms.calc = method
    if len(atoms) > 1:
        BFGS(atoms, logfile=None).run(fmax=0.005, steps=200)
    atoms.get_potential_energy()
    atoms.positions -= atoms.positions.mean(0)
    atoms.info["dipole"] = method.results["charges"] @ atoms.positions
    atoms.calc = None
    return atoms


def _oriented(name: str, direction: np.ndarray | None, rng: np.random.Generator) -> Atoms:
    """A copy of a fragment, its dipole along `direction`, or turned and displaced at random."""
    part = fragment(name).copy()
    dipole = part.info.pop("dipole")
    if direction is None:
        part.positions = Rotation.random(rng=rng).apply(part.positions)
        part.positions += 0.03 * rng.normal(size=part.positions.shape) * (len(part) > 1)
    elif np.linalg.norm(dipole) > 1e-3:
        turn, _ = Rotation.align_vectors([direction], [dipole])
        part.positions = turn.apply(part.positions)
    return part


def _pair(first: Atoms, second: Atoms, distance: float, kind: str, name: str) -> Atoms:
    """Two fragments with centres `distance` Å apart along x; LabelError where that fails."""
    moved = second.copy()
    moved.positions += [distance, 0.0, 0.0] - second.positions.mean(0) + first.positions.mean(0)
    between = np.linalg.norm(first.positions[:, None] - moved.positions, axis=2)
    bond = covalent_radii[first.numbers][:, None] + covalent_radii[moved.numbers]
    if (between < 0.9 * bond).any():
        raise LabelError("the fragments overlap")
    charge = first.info["charge"]
    pair = join(first, moved, kind, name, Fragments(len(first), charge))
    pair.info["label"] = GFN2
    return pair


GFN2 = "GFN2-xTB, spin-polarised"


def pairs(structures: int, seed: int) -> dict[str, list[Atoms]]:
    """About that many structures by file: {train, val, test, curves}.

    Fragments are turned at random and 2 to 15 Å apart (centres). A structure whose SCF does not
    converge, or is not on the intended state, is left out. `test` has a tenth of what is trained on
    (`pairs_seen`), pairs that are nowhere else (`pairs_unseen_pair`), and pairs of role "near"
    beyond 9 Å (`pairs_unseen_distance`).
    """
    found: dict[str, list[Atoms]] = {name: [] for name in FILES}
    each = max(4, structures // len(PAIRS))
    for first, second, role in tqdm(PAIRS, "pairs", disable=not sys.stderr.isatty()):
        name = f"{first}...{second}"
        rng = np.random.default_rng([seed, *name.encode()])
        for index, distance in enumerate(rng.uniform(2.0, FARTHEST, each)):
            parts = [_oriented(part, None, rng) for part in (first, second)]
            split, kind = ("train", "pairs_seen") if index % 10 < 8 else ("val", "pairs_seen")
            if role == "unseen":
                split, kind = "test", "pairs_unseen_pair"
            elif role == "near" and distance > NEAR:
                split, kind = "test", "pairs_unseen_distance"
            elif index % 10 == 9:
                split = "test"
            try:
                found[split].append(_pair(*parts, distance, kind, f"{name}/{index}"))
            except LabelError:
                continue
        found["curves"] += _pair_curve(first, second, rng)
    return found


def _pair_curve(first: str, second: str, rng: np.random.Generator) -> list[Atoms]:
    """A pair in its attractive orientation, in steps of 0.5 Å; nothing if few of them converge."""
    charges = [FRAGMENTS[part][2] for part in (first, second)]
    along = np.array([1.0, 0.0, 0.0])
    one = _oriented(first, along * (-np.sign(charges[1]) or 1.0), rng)
    other = _oriented(second, along * (np.sign(charges[0]) or 1.0), rng)
    curve = []
    for distance in np.arange(2.0, FARTHEST + 0.01, 0.5):
        try:
            curve.append(_pair(one, other, float(distance), "curve", f"{first}...{second}"))
        except LabelError:
            continue
    return curve if len(curve) >= 12 else []


# --- A charge felt along a chain -------------------------------------------------------------

# SMILES of one end and its charge; -NH2 and -S- are made from the SMILES by taking a proton away
CHARGED = {"NH3+": ("[NH3+]", 1), "NH2": ("[NH3+]", 0), "S-": ("S", -1), "SH": ("S", 0)}
# SMILES of the other end and its charge
ENDS = {"OH": ("O", 0), "F": ("F", 0), "CN": ("C#N", 0), "NH3+": ("[NH3+]", 1), "S-": ("[S-]", -1)}
LENGTHS = tuple(range(3, 16))  # CH2 groups between
TRAINED_LENGTH = 10  # longer chains are in `test` alone
DISPLACEMENT = 0.01  # Å: the strain is to stay small compared with the effect of the charge
UNSEEN_END = "F"  # with a charge at the other end, this one is in `test` alone


@cache
def _stretched(start: str, groups: int, end: str) -> tuple[Atoms, int, tuple[int, ...]]:
    """All-trans start–(CH2)n–end: atoms, the first heavy atom, and the end group's atoms."""
    from rdkit import Chem, RDLogger
    from rdkit.Chem import AllChem, rdMolTransforms

    RDLogger.DisableLog("rdApp.*")  # a complaint for each charged end
    smiles = CHARGED[start][0] + "C" * groups + ENDS[end][0]
    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    if AllChem.EmbedMolecule(molecule, randomSeed=1) != 0:
        raise LabelError(f"no conformer of {smiles}")
    conformer = molecule.GetConformer()
    for i in range(groups - 1):  # heavy atoms come in the order of the SMILES
        rdMolTransforms.SetDihedralDeg(conformer, i, i + 1, i + 2, i + 3, 180.0)
    AllChem.MMFFOptimizeMolecule(molecule, maxIters=500)
    numbers = [atom.GetAtomicNum() for atom in molecule.GetAtoms()]
    heavy = groups + 1  # the end group's first atom; the last CH2 comes before it
    hydrogens = [a.GetIdx() for a in molecule.GetAtomWithIdx(heavy).GetNeighbors()]
    group = {heavy, *(index for index in hydrogens if numbers[index] in (1, 7))}
    atoms = Atoms(numbers, molecule.GetConformer().GetPositions())
    if start in ("NH2", "S-"):  # the same geometry without one proton: both states compare
        bound = [a.GetIdx() for a in molecule.GetAtomWithIdx(0).GetNeighbors()]
        proton = max(index for index in bound if numbers[index] == 1)
        group = {index - (index > proton) for index in group}
        del atoms[proton]
    atoms.info = {"charge": CHARGED[start][1] + ENDS[end][1], "spin": 1}
    return atoms, heavy, tuple(sorted(group))


def chain(start: str, groups: int, end: str, kind: str, rng: np.random.Generator | None) -> Atoms:
    """A labelled chain; with `rng`, atoms displaced a little. `info` as in `join`, with the
    end group as the probe; LabelError where the SCF fails.
    """
    atoms, heavy, group = _stretched(start, groups, end)
    atoms = atoms.copy()
    if rng is not None:
        atoms.positions += DISPLACEMENT * rng.normal(size=atoms.positions.shape)
    axis = atoms.positions[heavy] - atoms.positions[0]
    distance = float(np.linalg.norm(axis))
    charge = int(atoms.info["charge"])
    atoms.info |= {
        **counts_of(atoms, charge),
        "reference_source": "allscaip-lite, data/long_range/make.py",
        "data_id": kind,
        "source": f"{start}...{end}",
        "distance": distance,
        "gap": distance,
        "axis": (axis / distance).tolist(),
        "probe": list(group),
        "label": GFN2,
    }
    return labelled(atoms, Fragments(len(atoms), charge))


def chains(structures: int, seed: int) -> dict[str, list[Atoms]]:
    """About that many structures by file: {train, val, test, curves}.

    Chains of 3 to 15 CH2 groups with -NH3+, -NH2, -S- or -SH at one end and -OH, -F, -CN, -NH3+ or
    -S- at the other, but not two opposite charges, between which an electron would cross. `test`
    has a tenth of what is trained on (`chain_seen`), chains of more than 10 groups
    (`chain_unseen_length`), and -F opposite a charge (`chain_unseen_end`). Both states of a curve
    share one geometry: their difference is the effect of the charge.
    """
    found: dict[str, list[Atoms]] = {name: [] for name in FILES}
    ends = [(s, e) for s in CHARGED for e in ENDS if CHARGED[s][1] * ENDS[e][1] >= 0]
    each = max(2, structures // (len(ends) * len(LENGTHS)))
    plan = [(start, groups, end) for groups in LENGTHS for start, end in ends]
    for start, groups, end in tqdm(plan, "chains", disable=not sys.stderr.isatty()):
        rng = np.random.default_rng([seed, groups, *f"{start}{end}".encode()])
        for _ in range(each):
            draw = rng.uniform()
            split = "train" if draw < 0.8 else "val" if draw < 0.9 else "test"
            kind = "chain_seen"
            if groups > TRAINED_LENGTH:
                split, kind = "test", "chain_unseen_length"
            elif end == UNSEEN_END and CHARGED[start][1]:
                split, kind = "test", "chain_unseen_end"
            try:
                found[split].append(chain(start, groups, end, kind, rng))
            except LabelError:
                continue
        try:
            found["curves"].append(chain(start, groups, end, "curve", None))
        except LabelError:
            continue
    return found


def write_lists(make: Callable[[int, int], dict[str, list[Atoms]]]) -> Writer:
    """A writer of the four files for a function that gives their structures."""

    def write(folder: Path, structures: int, seed: int) -> dict[str, int]:
        files = make(structures, seed).items()
        return {
            name: write_aselmdb(folder / f"{name}.aselmdb", found, overwrite=True)
            for name, found in files
        }

    return write


# --- The command -----------------------------------------------------------------------------

Writer = Callable[[Path, int, int], dict[str, int]]
SOURCES: dict[str, Writer] = {
    "ions": write_ions,
    "pairs": write_lists(pairs),
    "chain": write_lists(chains),
}
SIZES = {"ions": 5000, "pairs": 3000, "chain": 2000}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", choices=sorted(SOURCES), help="which of the data sets")
    parser.add_argument("--out", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--structures", type=int, help="about how many (each set has a default)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other structures")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier data set")


def run(args: argparse.Namespace) -> None:
    files = [args.out / f"{name}.aselmdb" for name in FILES]
    if any(file.exists() for file in files) and not args.overwrite:
        raise LabelError(f"{args.out} holds a data set: choose another --out or --overwrite")
    structures = SIZES[args.kind] if args.structures is None else args.structures
    if structures < 20:
        raise LabelError(f"--structures {structures}: give 20 or more, so that all splits fill")
    args.out.mkdir(parents=True, exist_ok=True)
    for name, count in SOURCES[args.kind](args.out, structures, args.seed).items():
        print(f"{name}: {count} structures")


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(
        add_arguments,
        run,
        script="data/long_range/make.py",
        description=__doc__,
        stopped="nothing was kept; the same command starts again",
        argv=argv,
    )


if __name__ == "__main__":
    sys.exit(main())
