"""Make `data/delta`: labels near wB97M-V/def2-TZVPD at the price of GFN2-xTB.

    python data/delta/make.py differences --out data/generated/delta
    python data/delta/make.py judge --delta MODEL ... --direct MODEL ...
    python data/delta/make.py labels --delta MODEL ... --data FOLDER ... --out FOLDER
    python data/delta/make.py pairs --delta MODEL ... --out data/generated/delta-pairs
    python data/delta/make.py interactions --direct MODEL ... --data data/generated/delta-pairs

In: `data/omol-mini`, whose rows have both labels; sets that `data/xtb/make.py` made. Out:
`{train,val,test}.aselmdb` with energies (eV) and forces (eV/Å).

- `differences`: the labels of wB97M-V less those of GFN2-xTB, for `allscaip-lite train` to learn
  (Δ-learning: Ramakrishnan et al., J. Chem. Theory Comput. 11, 2087 (2015)), and models to start
  from.
- `interactions` prints how far models are from the interaction energies of `pairs`' test part.
- `judge` prints how far GFN2-xTB and the models are from wB97M-V.
- `labels`: structures with GFN2-xTB's labels, plus the difference that models predict. Those on
  whose forces the models disagree by more than `DISAGREEMENT` are left out.
- `pairs`: ions and polar molecules in twos and threes, from contact to `FARTHEST`. Wide apart,
  where GFN2-xTB gives an electron of the anion back to the cation, the energy is that of each alone
  plus Coulomb's law between their atoms' charges.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.calculators.calculator import CalculatorError
from ase.calculators.singlepoint import SinglePointCalculator
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from allscaip_lite.checkpoints import load_model, save_model
from allscaip_lite.cli import run_script
from allscaip_lite.data.aselmdb import SPLITS, Dataset, write_aselmdb
from allscaip_lite.labels import LabelError, counts_of, xtb
from allscaip_lite.labels.point_charges import COULOMB
from allscaip_lite.labels.sampling import (
    System,
    assemble,
    atom_count,
    embed,
    in_state,
    parse_system,
    relax,
    split_of,
)
from allscaip_lite.model import AllScAIP
from allscaip_lite.tables import markdown_table

OMOL_MINI = Path(__file__).parents[1] / "omol-mini"
DISAGREEMENT = 0.4  # eV/Å, root mean square over a structure
STARTS, HEAD = ("lite-xtb", "lite-local-xtb"), 0.02
AT_ONCE = 32  # structures in a batch
KEYS = ("charge", "spin", "data_id", "molecule", "source", "num_atoms", "num_electrons")

# --- Differences -----------------------------------------------------------------------------


def differences(split: str) -> Iterator[Atoms]:
    """The structures of a part of `data/omol-mini`, labelled with wB97M-V less GFN2-xTB."""
    for atoms in Dataset(OMOL_MINI / f"{split}.aselmdb"):
        energy = atoms.get_potential_energy() - atoms.info["xtb_energy"]
        forces = atoms.get_forces() - np.asarray(atoms.info["xtb_forces"])
        yield _labelled(atoms, energy, forces, "ωB97M-V/def2-TZVPD less GFN2-xTB")


def _labelled(atoms: Atoms, energy: float, forces: np.ndarray, label: str) -> Atoms:
    """A copy with these labels; of its metadata only what holds of the structure."""
    copy = Atoms(atoms.numbers, atoms.positions)
    copy.info = {key: atoms.info[key] for key in KEYS if key in atoms.info}
    copy.info |= {"reference_source": "allscaip-lite, data/delta/make.py", "label": label}
    copy.calc = SinglePointCalculator(copy, energy=energy, forces=forces)
    return copy


def write_start(name: str, file: Path) -> None:
    """A model that is to learn differences: one that knows GFN2-xTB, with a head near zero."""
    model = load_model(name).requires_grad_(False)
    model.energy_head.contract.weight.mul_(HEAD)
    model.energy_head.contract.bias.zero_()
    save_model(model, file)


class Corrections:
    """What is added to GFN2-xTB's labels: the mean over models, some of which predict the
    difference itself (`deltas`), others wB97M-V's labels (`directs`).
    """

    def __init__(self, deltas: Sequence[str], directs: Sequence[str] = ()) -> None:
        self.deltas: list[AllScAIP] = [load_model(name) for name in deltas]
        self.directs: list[AllScAIP] = [load_model(name) for name in directs]

    def knows(self, atoms: Atoms) -> bool:
        """Whether the models saw all elements, the charge and the multiplicity."""
        seen = [model.seen for model in self.deltas + self.directs if model.seen is not None]
        return all(
            {*atoms.symbols} <= (one.elements or set())
            and atoms.info["charge"] in (one.charges or ())
            and atoms.info["spin"] in (one.multiplicities or ())
            for one in seen
        )

    def __call__(self, batch: Sequence[Atoms]) -> list[tuple[float, np.ndarray, float]]:
        """Energy (eV), forces (N, 3) (eV/Å) and the models' disagreement on the forces (root mean
        square, eV/Å) of each structure; GFN2-xTB's labels are with the structures.
        """
        found = [model.predict(batch, outside_training="ignore") for model in self.deltas]
        direct = [model.predict(batch, outside_training="ignore") for model in self.directs]
        answers = []
        for index, atoms in enumerate(batch):
            energy, forces = atoms.get_potential_energy(), atoms.get_forces()
            energies = [one[index].energy for one in found]
            energies += [one[index].energy - energy for one in direct]
            pulls = [one[index].forces for one in found]
            pulls += [one[index].forces - forces for one in direct]
            spread = float(np.sqrt(np.var(pulls, 0).mean()))
            answers.append((float(np.mean(energies)), np.mean(pulls, 0), spread))
        return answers


def judge(deltas: Sequence[str], directs: Sequence[str]) -> str:
    """A table of what GFN2-xTB, each model and the mean of all are off by on `data/omol-mini`: mean
    absolute errors of forces (meV/Å) and energies (meV/atom), on `test` and on `larger`.
    """
    tried = {"the mean of all": Corrections(deltas, directs)}
    tried |= {f"GFN2-xTB and `{Path(name).parent.name}`": Corrections([name]) for name in deltas}
    tried |= {f"`{name}`": Corrections([], [name]) for name in directs}
    rows: dict[str, list[str]] = {name: [] for name in ("GFN2-xTB", *tried)}
    for file in ("test", "larger"):
        truth = list(Dataset(OMOL_MINI / f"{file}.aselmdb"))
        by_xtb = [_labelled(a, a.info["xtb_energy"], a.info["xtb_forces"], "") for a in truth]
        missing = [np.subtract(a.get_forces(), a.info["xtb_forces"]).ravel() for a in truth]
        rows["GFN2-xTB"] += [f"{1e3 * np.abs(np.concatenate(missing)).mean():.0f}", "–"]
        for name, corrections in tried.items():
            found = corrections(by_xtb)
            forces = [
                pull.ravel() - rest for (_, pull, _), rest in zip(found, missing, strict=True)
            ]
            energies = [
                (a.info["xtb_energy"] + energy - a.get_potential_energy()) / len(a)
                for a, (energy, _, _) in zip(truth, found, strict=True)
            ]
            rows[name].append(f"{1e3 * np.abs(np.concatenate(forces)).mean():.0f}")
            rows[name].append(f"{1e3 * np.abs(energies).mean():.0f}")
    heads = ["", "forces, meV/Å", "energies, meV/atom", "larger ones: forces", "energies"]
    return markdown_table(heads, [[name, *values] for name, values in rows.items()])


# --- Labels of a set -------------------------------------------------------------------------


def corrected(structures: Iterable[Atoms], corrections: Corrections) -> Iterator[Atoms]:
    """Structures with GFN2-xTB's labels plus the difference, but for those with something that the
    models did not see, or on which they disagree by more than `DISAGREEMENT`.
    """
    for batch in _batches(filter(corrections.knows, structures)):
        for atoms, (energy, forces, spread) in zip(batch, corrections(batch), strict=True):
            if spread <= DISAGREEMENT:
                energy += atoms.get_potential_energy()
                yield _labelled(atoms, energy, forces + atoms.get_forces(), LABEL)


LABEL = "GFN2-xTB and a learned difference to ωB97M-V/def2-TZVPD"


def _rows(folders: Sequence[Path], split: str) -> Iterator[Atoms]:
    data = Dataset([folder / f"{split}.aselmdb" for folder in folders])
    yield from (data[index] for index in tqdm(range(len(data)), split))


def _batches(structures: Iterable[Atoms]) -> Iterator[list[Atoms]]:
    batch: list[Atoms] = []
    for atoms in structures:
        batch.append(atoms)
        if len(batch) == AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


# --- Pairs and trios -------------------------------------------------------------------------

GEOMETRIES = 8  # of each molecule
DISPLACEMENTS = (0.0, 0.02, 0.05)  # Å
CONTACT, SEPARATE, FARTHEST = 1.6, 5.0, 40.0  # Å, gaps between molecules
SHARE_NEAR = 0.4
LEAKED = 0.1  # e: a molecule with more than that of another's charge is in another state
MAX_FORCE = 15.0  # eV/Å


@dataclass(frozen=True)
class Molecule:
    """One geometry of a molecule alone: GFN2-xTB's charges (e) and labels, and what is added."""

    atoms: Atoms
    charges: np.ndarray
    energy: float
    forces: np.ndarray
    correction: float
    force_corrections: np.ndarray


class Molecules:
    """The geometries of every molecule, each labelled once.

    Raises LabelError (on access) for one that GFN2-xTB or the models do not take.
    """

    def __init__(self, corrections: Corrections) -> None:
        self.corrections = corrections
        self._known: dict[str, list[Molecule]] = {}

    def __getitem__(self, smiles: str) -> list[Molecule]:
        if smiles not in self._known:
            self._known[smiles] = list(self._make(smiles))
        if not self._known[smiles]:
            raise LabelError(f"no geometry of {smiles}")
        return self._known[smiles]

    def _make(self, smiles: str) -> Iterator[Molecule]:
        state = parse_system("", smiles)
        rng = np.random.default_rng(_seed(smiles))
        try:
            shapes = [in_state(a, state.charge, state.multiplicity) for a in embed(smiles, rng, 4)]
            shapes = [relax(atoms, steps=40) if len(atoms) > 1 else atoms for atoms in shapes]
        except (CalculatorError, LabelError):
            return
        for index in range(GEOMETRIES if len(shapes[0]) > 1 else 1):
            atoms = in_state(shapes[index % len(shapes)], state.charge, state.multiplicity)
            amplitude = DISPLACEMENTS[index % len(DISPLACEMENTS)]
            atoms.positions += amplitude * rng.normal(size=(len(atoms), 3)) * (len(atoms) > 1)
            atoms.positions -= atoms.positions.mean(0)
            if not self.corrections.knows(atoms):
                return
            found = xtb.results_of(atoms)
            xtb_labels = {name: found[name] for name in ("energy", "forces")}
            atoms.calc = SinglePointCalculator(atoms, **xtb_labels)
            ((energy, forces, _),) = self.corrections([atoms])
            atoms.calc = None
            yield Molecule(atoms, found["charges"], *xtb_labels.values(), energy, forces)


def meeting(system: System, molecules: Molecules, rng: np.random.Generator) -> Atoms | None:
    """One structure of molecules that meet, or None where GFN2-xTB has no such state.

    Up to a gap of `SEPARATE` the energy is GFN2-xTB's plus the difference of each molecule alone;
    from there on it is that of each alone plus Coulomb's law between their charges.
    """
    known = [molecules[part] for part in system.parts]
    chosen = [options[rng.integers(len(options))] for options in known]
    near = rng.random() < SHARE_NEAR
    least, most = (CONTACT, SEPARATE) if near else (SEPARATE, FARTHEST)
    gaps = [least * (most / least) ** rng.random() for _ in chosen[1:]]
    atoms = in_state(
        assemble([one.atoms for one in chosen], rng, gaps), system.charge, system.multiplicity
    )
    atoms.positions -= atoms.positions.mean(0)
    ends = np.cumsum([len(one.atoms) for one in chosen])
    owner = np.repeat(np.arange(len(chosen)), np.diff(ends, prepend=0))
    charges = np.concatenate([one.charges for one in chosen])
    energy = sum(one.correction for one in chosen)
    moved = np.split(atoms.positions, ends[:-1])
    own = [one.force_corrections + (0 if near else one.forces) for one in chosen]
    forces = np.concatenate(
        [_turned(*parts) for parts in zip(own, (one.atoms for one in chosen), moved, strict=True)]
    )
    if near:
        try:
            found = xtb.results_of(atoms)
        except LabelError:
            return None
        sums = [found["charges"][owner == number].sum() for number in range(len(chosen))]
        stated = [one.atoms.info["charge"] for one in chosen]
        if min(gaps) > 3 and np.abs(np.subtract(sums, stated)).max() > LEAKED:
            return None
        energy, forces = energy + found["energy"], forces + found["forces"]
    else:
        between, pushes = coulomb(atoms.positions, charges, owner)
        energy, forces = energy + sum(one.energy for one in chosen) + between, forces + pushes
    if not np.abs(forces).max() < MAX_FORCE:
        return None
    atoms.info |= counts_of(atoms, system.charge)
    atoms.info |= {"data_id": system.domain, "molecule": system.molecule}
    atoms.info["source"] = f"delta/{'near' if near else 'separate'}/{min(gaps):.2f} Å"
    return _labelled(atoms, energy, forces, LABEL if near else f"{LABEL}, Coulomb's law between")


def coulomb(
    positions: np.ndarray, charges: np.ndarray, owner: np.ndarray
) -> tuple[float, np.ndarray]:
    """Coulomb's law between the atoms of different molecules: energy (eV), forces (N, 3) (eV/Å).

    Args:
        positions: (N, 3), Å.
        charges: (N,), e.
        owner: (N,), the molecule of each atom.
    """
    vectors = positions[:, None] - positions[None]
    other = owner[:, None] != owner[None]
    inverse = np.where(other, 1 / np.where(other, np.linalg.norm(vectors, axis=2), 1.0), 0.0)
    strength = COULOMB * charges[:, None] * charges * inverse
    forces = (strength * inverse**2)[..., None] * vectors
    return float(strength.sum() / 2), forces.sum(1)


def _turned(forces: np.ndarray, before: Atoms, after: np.ndarray) -> np.ndarray:
    """Forces that turned with a rigid molecule, from its positions before and after."""
    if len(before) == 1:
        return forces
    here, there = before.positions - before.positions.mean(0), after - after.mean(0)
    with warnings.catch_warnings(action="ignore"):  # a linear molecule's turn about its axis
        turn, _ = Rotation.align_vectors(there, here)
    return turn.apply(forces)


@cache
def _systems() -> list[System]:
    return list(import_module("data.xtb.make").ionic_systems())


def _meetings(molecules: Molecules, seed: int) -> Iterator[tuple[System, Atoms]]:
    """Structures of the systems in turn, in an order drawn at random, without end."""
    systems = _systems()
    order = np.random.default_rng(seed).permutation(len(systems))
    for index in itertools.count():
        system = systems[order[index % len(systems)]]
        try:
            atoms = meeting(system, molecules, np.random.default_rng([seed, index]))
        except LabelError:
            continue
        if atoms is not None:
            yield system, atoms


def pairs(structures: int, molecules: Molecules, seed: int) -> dict[str, list[Atoms]]:
    """That many structures by split: the systems of the set `ionic` of `data/xtb/make.py` in
    turn, and every molecule of them alone.
    """
    found: dict[str, list[Atoms]] = {split: [] for split in SPLITS}
    made = itertools.islice(_meetings(molecules, seed), structures)
    for system, atoms in tqdm(made, "pairs", structures, disable=not sys.stderr.isatty()):
        found[split_of(system)].append(atoms)
    for smiles in sorted({part for system in _systems() for part in system.parts}):
        alone = parse_system("alone", smiles)
        try:
            known = molecules[smiles]
        except LabelError:
            continue
        for one in known:
            atoms = one.atoms.copy()
            atoms.info |= {"data_id": "alone", "molecule": smiles, "source": "delta/alone"}
            energy, forces = one.energy + one.correction, one.forces + one.force_corrections
            found[split_of(alone)].append(_labelled(atoms, energy, forces, LABEL))
    return found


# --- How far a model is from them ------------------------------------------------------------

GAPS = (3.0, SEPARATE, 8.0, np.inf)  # Å
MEETING = {
    (-1, 1): "cation and anion",
    (0, 1): "ion and molecule",
    (1, 1): "two ions of one sign",
    (0, 0): "two molecules",
}


def interactions(structures: Sequence[Atoms], models: Sequence[str]) -> str:
    """A table of interaction energies of `pairs`, by kind and gap: their mean size in the labels,
    and the mean absolute error of each model (eV).

    What a model says of the pair less what it says of each molecule alone, against GFN2-xTB's
    difference for those near each other, and Coulomb's law for those apart.
    """
    alone: list[Atoms] = []
    groups: dict[tuple[str, int], list[int]] = {}
    expected = []
    for index, atoms in enumerate(tqdm(structures, disable=not sys.stderr.isatty())):
        states = [parse_system("", part) for part in atoms.info["molecule"].split(".")]
        first = atom_count(states[0])
        pieces = [
            in_state(piece, state.charge, state.multiplicity)
            for piece, state in zip((atoms[:first], atoms[first:]), states, strict=True)
        ]
        found = [xtb.results_of(piece) for piece in pieces]
        if "near" in atoms.info["source"]:
            energy = xtb.results_of(atoms)["energy"] - sum(one["energy"] for one in found)
        else:
            charges = np.concatenate([one["charges"] for one in found])
            owner = np.repeat([0, 1], [first, len(atoms) - first])
            energy, _ = coulomb(atoms.positions, charges, owner)
        expected.append(energy)
        alone += pieces
        signs = np.sign([state.charge for state in states]).astype(int)
        kind = (0, 0) if not signs.any() else tuple(sorted(signs * signs[np.abs(signs).argmax()]))
        closest = np.linalg.norm(atoms.positions[:first, None] - atoms.positions[first:], axis=2)
        place = int(np.searchsorted(GAPS, closest.min(), side="right"))
        metal = any(len(piece) == 1 and piece.info["charge"] > 0 for piece in pieces)
        name = MEETING[kind] + ", one a metal ion" * metal
        groups.setdefault((name, place), []).append(index)
    off = []
    for model_name in models:
        model = load_model(model_name)
        energies = [
            result.energy
            for batch in _batches([*structures, *alone])
            for result in model.predict(batch, outside_training="ignore")
        ]
        whole, pieces_of = np.array(energies[: len(structures)]), energies[len(structures) :]
        off.append(np.abs(whole - np.add(pieces_of[::2], pieces_of[1::2]) - expected))
    rows = []
    for (kind, place), members in sorted(groups.items()):
        least = GAPS[place - 1] if place else 0.0
        gaps = f"{least:g} to {GAPS[place]:g}" if place < len(GAPS) - 1 else f"above {least:g}"
        values = [f"{column[members].mean():.2f}" for column in (np.abs(expected), *off)]
        rows.append([kind, gaps, len(members), *values])
    heads = ["what", "gap (Å)", "pairs", "size", *(f"`{Path(name).name}`" for name in models)]
    return markdown_table(heads, rows, "ll" + "r" * (len(heads) - 2))


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


# --- The command -----------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("differences", "interactions", "judge", "labels", "pairs"))
    parser.add_argument("--out", type=Path, help="folder of the data set")
    parser.add_argument("--delta", nargs="+", help="models trained on the differences")
    parser.add_argument("--direct", nargs="*", default=[], help="models trained on the labels")
    parser.add_argument("--data", nargs="+", type=Path, help="folders with GFN2-xTB's labels")
    parser.add_argument("--structures", type=int, default=15_380, help="of pairs, how many")
    parser.add_argument("--seed", type=int, default=0, help="of pairs: another seed, other ones")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier data set")


def run(args: argparse.Namespace) -> None:
    if args.what == "interactions":
        if not args.direct or not args.data:
            raise LabelError("interactions needs --direct MODEL ... and --data FOLDER of pairs")
        data = Dataset([folder / "test.aselmdb" for folder in args.data])
        print(interactions([a for a in data if a.info["data_id"] == "ionic_pairs"], args.direct))
        return
    if args.what != "differences" and not args.delta:
        raise LabelError(f"{args.what} needs models of the difference: --delta MODEL ...")
    if args.what == "labels" and not args.data:
        raise LabelError("labels needs folders to correct: --data FOLDER ...")
    if args.what == "judge":
        print(judge(args.delta, args.direct))
        return
    if args.out is None:
        raise LabelError(f"{args.what} writes a data set: --out FOLDER")
    args.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Iterable[Atoms]]
    if args.what == "differences":
        found = {split: differences(split) for split in SPLITS}
        for name in STARTS:
            write_start(name, args.out / f"{name}.safetensors")
    elif args.what == "pairs":
        found = dict(
            pairs(args.structures, Molecules(Corrections(args.delta, args.direct)), args.seed)
        )
    else:
        models = Corrections(args.delta, args.direct)
        found = {split: corrected(_rows(args.data, split), models) for split in SPLITS}
    for split, structures in found.items():
        count = write_aselmdb(args.out / f"{split}.aselmdb", structures, overwrite=args.overwrite)
        print(f"{split}: {count} structures")


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(
        add_arguments,
        run,
        script="data/delta/make.py",
        description=__doc__,
        stopped="nothing was kept; the same command starts again",
        argv=argv,
    )


if __name__ == "__main__":
    sys.exit(main())
