"""Make `data/delta`: labels near wB97M-V/def2-TZVPD at the price of a force field.

    python data/delta/make.py differences --out data/generated/delta
    python data/delta/make.py judge --delta MODEL ... --direct MODEL ...
    python data/delta/make.py labels --delta MODEL ... --data FOLDER ... --out FOLDER
    python data/delta/make.py molecules --structures 14000 --out data/generated/delta-molecules
    python data/delta/make.py molecules --set ions --out data/generated/delta-ions
    python data/delta/make.py pairs --delta MODEL ... --out data/generated/delta-pairs
    python data/delta/make.py interactions --direct MODEL ... --data data/generated/delta-pairs

In: `data/omol-mini`, whose rows have both labels; sets that `data/xtb/make.py` made. Out:
`{train,val,test}.aselmdb` with energies (eV) and forces (eV/Å). The labels are those of AIMNet2
where it was made for a structure, else GFN2-xTB's and a learned difference.

- `differences`: the labels of wB97M-V less those of GFN2-xTB, for `allscaip-lite train` to learn
  (Δ-learning: Ramakrishnan et al., J. Chem. Theory Comput. 11, 2087 (2015)), and models to start
  from.
- `judge` prints how far the teachers are from wB97M-V.
- `labels`: structures of other sets, with other labels.
- `molecules`: conformers of the molecules of a set, labelled by AIMNet2.
- `pairs`: ions and molecules in twos and threes, from contact to `FARTHEST`. Wide apart,
  where GFN2-xTB gives an electron of the anion back to the cation, the energy is that of each alone
  plus Coulomb's law between their atoms' charges.
- `interactions` prints how far models are from the interaction energies of `pairs`' test part.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms
from ase.calculators.calculator import CalculatorError
from ase.calculators.singlepoint import SinglePointCalculator
from scipy.optimize import least_squares
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from allscaip_lite.checkpoints import load_model, save_model
from allscaip_lite.cli import run_script
from allscaip_lite.data.aselmdb import SPLITS, Dataset, write_aselmdb
from allscaip_lite.data.batches import molecules_of
from allscaip_lite.labels import LabelError, aimnet2, counts_of, xtb
from allscaip_lite.labels.sampling import System, assemble, embed, parse_system
from allscaip_lite.model import AllScAIP
from allscaip_lite.tables import markdown_table
from data.long_range.ions import COULOMB
from data.xtb.sets import in_state, relax
from data.xtb.splits import atom_count, split_of
from data.xtb.systems import (
    further_ions,
    ionic_systems,
    larger_systems,
    main_systems,
    salts,
    separated_systems,
)

OMOL_MINI = Path(__file__).parents[1] / "omol-mini"
STARTS, HEAD = ("lite-xtb", "lite-local-xtb"), 0.02
AT_ONCE = 128  # structures in a batch
KEYS = ("charge", "spin", "data_id", "molecule", "source", "num_atoms", "num_electrons")
KEYS += ("fragments", "interaction_energy")

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


class Answer(NamedTuple):
    """A structure's energy (eV), its forces (N, 3) (eV/Å), and how far the networks behind them are
    from each other on the forces (root mean square, eV/Å).
    """

    energy: float
    forces: np.ndarray
    spread: float


class Corrected:
    """GFN2-xTB's labels, which are with the structures, and what these lack, the mean over models:
    some predict the difference itself (`deltas`), others wB97M-V's labels (`directs`).
    """

    agreement = 0.4  # eV/Å, the largest spread of a label

    def __init__(self, deltas: Sequence[str], directs: Sequence[str] = ()) -> None:
        self.deltas: list[AllScAIP] = [load_model(name) for name in deltas]
        self.directs: list[AllScAIP] = [load_model(name) for name in directs]

    def knows(self, atoms: Atoms) -> bool:
        """Whether the models saw all elements, the charge and the multiplicity."""
        seen = [model.seen for model in self.deltas + self.directs if model.seen is not None]
        return bool(self.deltas + self.directs) and all(
            {*atoms.symbols} <= (one.elements or set())
            and atoms.info["charge"] in (one.charges or ())
            and atoms.info["spin"] in (one.multiplicities or ())
            for one in seen
        )

    def __call__(self, batch: Sequence[Atoms]) -> list[Answer]:
        found = [model.predict(batch, outside_training="ignore") for model in self.deltas]
        direct = [model.predict(batch, outside_training="ignore") for model in self.directs]
        answers = []
        for index, atoms in enumerate(batch):
            energies = [atoms.get_potential_energy() + one[index].energy for one in found]
            energies += [one[index].energy for one in direct]
            forces = [atoms.get_forces() + one[index].forces for one in found]
            forces += [one[index].forces for one in direct]
            spread = float(np.sqrt(np.var(forces, 0).mean()))
            answers.append(Answer(float(np.mean(energies)), np.mean(forces, 0), spread))
        return answers


class Shifted:
    """AIMNet2's labels, at wB97M-V's zero of energy.

    The difference of the two is taken as a sum over atoms, and one over charges (AIMNet2's level of
    theory has no diffuse functions, which anions need), fitted to the train part of `omol-mini`.
    """

    agreement = 0.15  # eV/Å, the largest spread of a label

    def __init__(self) -> None:
        known = [a for a in Dataset(OMOL_MINI / "train.aselmdb") if aimnet2.takes(a)]
        agreed = [
            (atoms, result["energy"])
            for atoms, result in zip(known, aimnet2.results_of(known), strict=True)
            if result["spread"] <= self.agreement
        ]
        counts = np.array([self._counts(atoms) for atoms, _ in agreed])
        missing = np.array([atoms.get_potential_energy() - energy for atoms, energy in agreed])
        start = np.linalg.lstsq(counts, missing, rcond=None)[0]
        fit = least_squares(
            lambda shift: counts @ shift - missing, start, loss="soft_l1", f_scale=0.05
        )
        self.shift = fit.x
        self.elements = {
            element for column, element in enumerate(aimnet2.ELEMENTS) if counts[:, column].any()
        }

    def _counts(self, atoms: Atoms) -> list[float]:
        """How many atoms of each element, and the electrons too few and too many."""
        charge, symbols = atoms.info["charge"], atoms.get_chemical_symbols()
        return [*map(symbols.count, aimnet2.ELEMENTS), max(charge, 0), max(-charge, 0)]

    def knows(self, atoms: Atoms) -> bool:
        """Whether AIMNet2 was made for it, and the shift of its elements is known."""
        return aimnet2.takes(atoms) and {*atoms.symbols} <= self.elements

    def __call__(self, batch: Sequence[Atoms]) -> list[Answer]:
        return [
            Answer(
                result["energy"] + float(np.dot(self._counts(atoms), self.shift)),
                result["forces"],
                result["spread"],
            )
            for atoms, result in zip(batch, aimnet2.results_of(batch), strict=True)
        ]


class SingleIons:
    """wB97M-V's own labels of ions of one atom."""

    agreement = 0.0

    def __init__(self) -> None:
        ions = Dataset(OMOL_MINI / "ions.aselmdb")
        self.energies = {self._name(ion): ion.get_potential_energy() for ion in ions}

    def _name(self, atoms: Atoms) -> tuple[str, int, int]:
        return str(atoms.symbols), atoms.info["charge"], atoms.info["spin"]

    def knows(self, atoms: Atoms) -> bool:
        """Whether it is one of them."""
        return self._name(atoms) in self.energies

    def __call__(self, batch: Sequence[Atoms]) -> list[Answer]:
        return [Answer(self.energies[self._name(ion)], np.zeros((1, 3)), 0.0) for ion in batch]


class Teachers:
    """Labels by the best teacher that knows a structure."""

    def __init__(self, deltas: Sequence[str], directs: Sequence[str] = ()) -> None:
        self.aimnet2 = Shifted()
        self.teachers = (SingleIons(), self.aimnet2, Corrected(deltas, directs))

    def knows(self, atoms: Atoms) -> bool:
        """Whether any of them knows a structure."""
        return any(teacher.knows(atoms) for teacher in self.teachers)

    def __call__(self, batch: Sequence[Atoms]) -> list[Answer | None]:
        """The label of each structure, None where no teacher knows it or its networks differ.

        GFN2-xTB's labels have to be with the structures that AIMNet2 was not made for.
        """
        answers: list[Answer | None] = [None] * len(batch)
        left = list(range(len(batch)))
        for teacher in self.teachers:
            own = [index for index in left if teacher.knows(batch[index])]
            left = [index for index in left if index not in own]
            found = teacher([batch[index] for index in own]) if own else []
            for index, answer in zip(own, found, strict=True):
                if answer.spread <= teacher.agreement:
                    answers[index] = answer
        return answers


def judge(deltas: Sequence[str], directs: Sequence[str]) -> str:
    """A table of what GFN2-xTB, each teacher and model is off by on `data/omol-mini`: mean absolute
    errors of forces (meV/Å) and energies (meV/atom), on `test` and on `larger`; on all, and on the
    structures that AIMNet2 was made for.
    """
    shifted = Shifted()
    tried: dict[str, Corrected | Shifted] = {"the mean of these": Corrected(deltas, directs)}
    tried |= {f"GFN2-xTB and `{Path(name).parent.name}`": Corrected([name]) for name in deltas}
    tried |= {f"`{Path(name).stem}`": Corrected([], [name]) for name in directs}
    rows = {name: [name] for name in ("GFN2-xTB", "AIMNet2", *tried)}
    heads = [""]
    for file in ("test", "larger"):
        truth = list(Dataset(OMOL_MINI / f"{file}.aselmdb"))
        known = [atoms for atoms in truth if shifted.knows(atoms)]
        for what, structures in ((file, truth), (f"{file}, known to AIMNet2", known)):
            heads += [f"{what} ({len(structures)}): forces", "energies"]
            by_xtb = [
                _labelled(a, a.info["xtb_energy"], a.info["xtb_forces"], "") for a in structures
            ]
            rows["GFN2-xTB"] += [_off([a.get_forces() for a in by_xtb], structures), "–"]
            for name, teacher in ({"AIMNet2": shifted} | tried).items():
                if teacher is shifted and structures is not known:
                    rows[name] += ["–", "–"]
                    continue
                found = teacher(by_xtb)
                off = [
                    abs(answer.energy - atoms.get_potential_energy()) / len(atoms)
                    for atoms, answer in zip(structures, found, strict=True)
                ]
                rows[name] += [_off([one.forces for one in found], structures)]
                rows[name] += [f"{1e3 * np.mean(off):.0f}"]
    return markdown_table(heads, list(rows.values()))


def _off(forces: Sequence[np.ndarray], truth: Sequence[Atoms]) -> str:
    off = [np.ravel(f - a.get_forces()) for f, a in zip(forces, truth, strict=True)]
    return f"{1e3 * np.abs(np.concatenate(off)).mean():.0f}"


# --- Labels of a set -------------------------------------------------------------------------


def corrected(structures: Iterable[Atoms], teachers: Teachers) -> Iterator[Atoms]:
    """Structures, which have GFN2-xTB's labels, with those of the teachers; without those that no
    teacher knows, or on which its networks do not agree.
    """
    for batch in _batches(filter(teachers.knows, structures)):
        for atoms, answer in zip(batch, teachers(batch), strict=True):
            if answer is not None:
                yield _labelled(atoms, answer.energy, answer.forces, LABEL)


LABEL = "near ωB97M-V/def2-TZVPD, by AIMNet2 or GFN2-xTB and a learned difference"


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


# --- Conformers ------------------------------------------------------------------------------

CONFORMERS, MOST_DISPLACED = 4, 0.07  # Å


def conformers(
    systems: Sequence[System], structures: int, aimnet2: Shifted, seed: int
) -> dict[str, list[Atoms]]:
    """About that many structures by split, of the systems in turn, labelled by AIMNet2."""
    found: dict[str, list[Atoms]] = {split: [] for split in SPLITS}
    split = {system.molecule: split_of(system) for system in systems}
    made = _displaced(systems, -(-structures // len(systems)), seed)
    for batch in _batches(filter(aimnet2.knows, made)):
        for atoms, answer in zip(batch, aimnet2(batch), strict=True):
            if answer.spread <= aimnet2.agreement and np.abs(answer.forces).max() < MAX_FORCE:
                labelled = _labelled(atoms, answer.energy, answer.forces, LABEL)
                found[split[atoms.info["molecule"]]].append(labelled)
    return found


def _displaced(systems: Sequence[System], turns: int, seed: int) -> Iterator[Atoms]:
    """Structures of each system: conformers of a force field, each displaced at random by up to
    `MOST_DISPLACED`.
    """
    for system in tqdm(systems, "conformers", disable=not sys.stderr.isatty()):
        rng = np.random.default_rng([seed, _seed(system.molecule)])
        try:
            shapes = {part: embed(part, rng, CONFORMERS) for part in dict.fromkeys(system.parts)}
        except LabelError:
            continue
        for index in range(turns):
            parts = [shapes[part][index % len(shapes[part])] for part in system.parts]
            atoms = in_state(
                assemble(parts, rng, rng.uniform(1.6, 2.4)), system.charge, system.multiplicity
            )
            atoms.positions += rng.uniform(0, MOST_DISPLACED) * rng.normal(size=(len(atoms), 3))
            yield _described(atoms, system, f"{system.domain}/{system.molecule}/{index}")


def _described(atoms: Atoms, system: System, source: str) -> Atoms:
    """The structure with the metadata of its system."""
    atoms.info |= counts_of(atoms, system.charge)
    atoms.info |= {"data_id": system.domain, "molecule": system.molecule}
    atoms.info["source"] = f"delta/{source}"
    return atoms


# --- Pairs and trios -------------------------------------------------------------------------

GEOMETRIES = 8  # of each molecule
DISPLACEMENTS = (0.0, 0.02, 0.05)  # Å
CONTACT, SEPARATE, FARTHEST = 1.6, 5.0, 40.0  # Å, gaps between molecules
SHARE_NEAR = 0.4
AT_A_METAL = 3.0  # Å, the farthest near a metal ion that GFN2-xTB and the difference are used
LEAKED = 0.1  # e: a molecule with more than that of another's charge is in another state
MAX_FORCE = 15.0  # eV/Å
REPEATED = 8  # times, pairs of two single atoms


@dataclass(frozen=True)
class Molecule:
    """One geometry of a molecule alone: its label; GFN2-xTB's charges (e), energy and forces."""

    atoms: Atoms
    label: Answer
    charges: np.ndarray
    xtb_energy: float
    xtb_forces: np.ndarray


def _label_of(atoms: Atoms, found: Mapping[str, Any], teachers: Teachers) -> Answer | None:
    """The teachers' label of one structure, of which GFN2-xTB says what is `found`."""
    by_xtb = _labelled(atoms, found["energy"], found["forces"], "GFN2-xTB")
    return teachers([by_xtb])[0]


class Molecules:
    """The geometries of every molecule, each labelled once.

    Raises LabelError (on access) for one that GFN2-xTB or the teachers do not take.
    """

    def __init__(self, teachers: Teachers) -> None:
        self.teachers = teachers
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
            if not self.teachers.knows(atoms):
                return
            found = xtb.results_of(atoms)
            answer = _label_of(atoms, found, self.teachers)
            if answer is not None:
                yield Molecule(atoms, answer, found["charges"], found["energy"], found["forces"])


def meeting(system: System, molecules: Molecules, rng: np.random.Generator) -> Atoms | None:
    """One structure of molecules that meet, or None where no label is to be had.

    Up to a gap of `SEPARATE` the label is AIMNet2's. Of what that does not know, it is the label of
    each molecule alone and what GFN2-xTB says is between them; with a metal ion, of which GFN2-xTB
    says far too much, up to `AT_A_METAL` the label of GFN2-xTB and the learned difference. From
    `SEPARATE` on it is that of each alone, and Coulomb's law between their charges.
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
    answer = None
    if near and molecules.teachers.aimnet2.knows(atoms):
        (answer,) = molecules.teachers([atoms])
    elif near and any(_is_metal(one.atoms) for one in chosen):
        if min(gaps) <= AT_A_METAL:
            answer = _as_a_whole(atoms, molecules.teachers)
    else:
        answer = _put_together(chosen, atoms, near, min(gaps))
    if answer is None or not np.abs(answer.forces).max() < MAX_FORCE:
        return None
    _described(atoms, system, f"{'near' if near else 'separate'}/{min(gaps):.2f} Å")
    atoms.info["fragments"] = [
        [len(one.atoms), one.atoms.info["charge"], one.atoms.info["spin"]] for one in chosen
    ]
    between = answer.energy - sum(one.label.energy for one in chosen)
    atoms.info["interaction_energy"] = float(between)
    text = LABEL if near else f"{LABEL}, Coulomb's law between"
    return _labelled(atoms, answer.energy, answer.forces, text)


def _is_metal(atoms: Atoms) -> bool:
    return len(atoms) == 1 and atoms.info["charge"] > 0


def _as_a_whole(atoms: Atoms, teachers: Teachers) -> Answer | None:
    """The teachers' label of molecules as one structure, None where GFN2-xTB fails."""
    try:
        found = xtb.results_of(atoms)
    except LabelError:
        return None
    return _label_of(atoms, found, teachers)


def _put_together(
    chosen: Sequence[Molecule], atoms: Atoms, near: bool, gap: float
) -> Answer | None:
    """The labels of molecules alone, and what is between them: by GFN2-xTB where they are `near`,
    else by Coulomb's law. None where GFN2-xTB has no such state.
    """
    ends = np.cumsum([len(one.atoms) for one in chosen])
    owner = np.repeat(np.arange(len(chosen)), np.diff(ends, prepend=0))
    energy = sum(one.label.energy - near * one.xtb_energy for one in chosen)
    own = [one.label.forces - near * one.xtb_forces for one in chosen]
    turned = zip(
        own, (one.atoms for one in chosen), np.split(atoms.positions, ends[:-1]), strict=True
    )
    forces = np.concatenate([_turned(*parts) for parts in turned])
    if not near:
        charges = np.concatenate([one.charges for one in chosen])
        between, pushes = coulomb(atoms.positions, charges, owner)
        return Answer(energy + between, forces + pushes, 0.0)
    try:
        found = xtb.results_of(atoms)
    except LabelError:
        return None
    sums = [found["charges"][owner == number].sum() for number in range(len(chosen))]
    stated = [one.atoms.info["charge"] for one in chosen]
    if gap > 3 and np.abs(np.subtract(sums, stated)).max() > LEAKED:
        return None
    return Answer(energy + found["energy"], forces + found["forces"], 0.0)


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


def _of_atoms(system: System) -> bool:
    return all(atom_count(parse_system("", part)) == 1 for part in system.parts)


def _meetings(
    systems: Sequence[System], molecules: Molecules, seed: int
) -> Iterator[tuple[System, Atoms]]:
    """Structures of the systems in turn, in an order drawn at random, without end.

    Those of single atoms come `REPEATED` times: there are few, and one tells nothing of another.
    """
    systems = [one for one in systems for _ in range(REPEATED if _of_atoms(one) else 1)]
    order = np.random.default_rng(seed).permutation(len(systems))
    for index in itertools.count():
        system = systems[order[index % len(systems)]]
        try:
            atoms = meeting(system, molecules, np.random.default_rng([seed, index]))
        except LabelError:
            continue
        if atoms is not None:
            yield system, atoms


def pairs(
    systems: Sequence[System], structures: int, molecules: Molecules, seed: int
) -> dict[str, list[Atoms]]:
    """That many structures of the systems by split, and every molecule of them alone."""
    found: dict[str, list[Atoms]] = {split: [] for split in SPLITS}
    made = itertools.islice(_meetings(systems, molecules, seed), structures)
    for system, atoms in tqdm(made, "pairs", structures, disable=not sys.stderr.isatty()):
        found[split_of(system)].append(atoms)
    for smiles in sorted({part for system in systems for part in system.parts}):
        alone = parse_system("alone", smiles)
        try:
            known = molecules[smiles]
        except LabelError:
            continue
        for one in known:
            atoms = one.atoms.copy()
            atoms.info |= {"data_id": "alone", "molecule": smiles, "source": "delta/alone"}
            found[split_of(alone)].append(
                _labelled(atoms, one.label.energy, one.label.forces, LABEL)
            )
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

    What a model says of the pair less what it says of each molecule alone, against
    `info["interaction_energy"]`.
    """
    alone: list[Atoms] = []
    groups: dict[tuple[str, int], list[int]] = {}
    for index, atoms in enumerate(structures):
        pieces = molecules_of(atoms, f"structure {index}")
        alone += pieces
        first = len(pieces[0])
        signs = np.sign([piece.info["charge"] for piece in pieces])
        kind = (0, 0) if not signs.any() else tuple(sorted(signs * signs[np.abs(signs).argmax()]))
        closest = np.linalg.norm(atoms.positions[:first, None] - atoms.positions[first:], axis=2)
        place = int(np.searchsorted(GAPS, closest.min(), side="right"))
        name = MEETING[kind] + ", one a metal ion" * any(map(_is_metal, pieces))
        groups.setdefault((name, place), []).append(index)
    expected = np.array([atoms.info["interaction_energy"] for atoms in structures])
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


WHAT = ("differences", "interactions", "judge", "labels", "molecules", "pairs")
SETS: dict[str, dict[str, Callable[[], Sequence[System]]]] = {
    "molecules": {"main": main_systems, "larger": larger_systems, "ions": further_ions},
    "pairs": {"ionic": ionic_systems, "apart": separated_systems, "salts": salts},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=WHAT)
    parser.add_argument("--out", type=Path, help="folder of the data set")
    parser.add_argument("--delta", nargs="+", help="models trained on the differences")
    parser.add_argument("--direct", nargs="*", default=[], help="models trained on the labels")
    parser.add_argument("--data", nargs="+", type=Path, help="folders with GFN2-xTB's labels")
    parser.add_argument(
        "--set",
        choices=[name for sets in SETS.values() for name in sets],
        help="of molecules: main, larger or ions; of pairs: ionic, apart or salts",
    )
    parser.add_argument(
        "--structures", type=int, default=15_380, help="of new structures, how many"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of new structures: another seed, other ones"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier data set")


def run(args: argparse.Namespace) -> None:
    if args.what == "interactions":
        if not args.direct or not args.data:
            raise LabelError("interactions needs --direct MODEL ... and --data FOLDER of pairs")
        rows = Dataset([folder / "test.aselmdb" for folder in args.data])
        pairs_of = [a for a in rows if len(a.info.get("fragments", ())) == 2]
        if not pairs_of:
            raise LabelError("no pair has `fragments`: make the set again, as its page says")
        print(interactions(pairs_of, args.direct))
        return
    systems = SETS.get(args.what, {})
    kind = args.set or next(iter(systems), None)
    if kind is not None and kind not in systems:
        raise LabelError(f"{args.what} --set: {', '.join(systems) or 'not here'}, not {kind}")
    if args.what not in ("differences", "molecules") and not args.delta:
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
    elif args.what == "molecules":
        found = dict(conformers(systems[kind](), args.structures, Shifted(), args.seed))
    elif args.what == "pairs":
        molecules = Molecules(Teachers(args.delta, args.direct))
        found = dict(pairs(systems[kind](), args.structures, molecules, args.seed))
    else:
        teachers = Teachers(args.delta, args.direct)
        found = {split: corrected(_rows(args.data, split), teachers) for split in SPLITS}
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
