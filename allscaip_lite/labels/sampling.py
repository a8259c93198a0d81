"""Molecules from SMILES, for predictions and for the makers of data sets.

In: SMILES. Out: a `System` with charge and multiplicity, and `ase.Atoms`: conformers, complexes of
several molecules. Which systems a data set holds is said beside it, in `data/<set>`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from ase import Atoms
from scipy.spatial.transform import Rotation

from allscaip_lite.errors import InputError
from allscaip_lite.labels import LabelError

if TYPE_CHECKING:
    from rdkit.Chem import Mol

# --- Systems ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class System:
    """Molecules in one structure, with their total charge and multiplicity.

    Attributes:
        domain: The part of a data set that the system belongs to, its structures' `data_id`.
        parts: Canonical SMILES, one for each molecule.
        charge: Total charge in e.
        multiplicity: Spin multiplicity, 2S + 1.
    """

    domain: str
    parts: tuple[str, ...]
    charge: int
    multiplicity: int

    @property
    def molecule(self) -> str:
        """SMILES of the whole."""
        return ".".join(self.parts)

    @property
    def name(self) -> str:
        """Different for any two systems of one domain."""
        return f"{self.molecule}|{self.charge}|{self.multiplicity}"


def parse_system(domain: str, word: str) -> System:
    """The system of a word: SMILES, or SMILES|charge|multiplicity where these differ from those of
    the SMILES with the fewest unpaired electrons. Raises InputError for a state of another form.
    """
    from rdkit import Chem

    smiles, *state = word.split("|")
    molecules = [Chem.MolFromSmiles(part) for part in smiles.split(".")]
    charge = sum(Chem.GetFormalCharge(molecule) for molecule in molecules)
    unpaired = sum(a.GetNumRadicalElectrons() for m in molecules for a in m.GetAtoms())
    if state:
        try:
            charge, unpaired = map(int, state)
        except ValueError as error:
            raise InputError(f"{word}: write SMILES|charge|multiplicity") from error
        unpaired -= 1
    parts = tuple(Chem.MolToSmiles(molecule) for molecule in molecules)
    return System(domain, parts, charge, unpaired + 1)


def with_hydrogens(smiles: str) -> Mol:
    """RDKit's molecule, with its hydrogens as atoms."""
    from rdkit import Chem, RDLogger

    RDLogger.DisableLog("rdApp.*")
    return Chem.AddHs(Chem.MolFromSmiles(smiles))


# --- Geometries ------------------------------------------------------------------------------


def embed(smiles: str, rng: np.random.Generator, number: int, wary: bool = False) -> list[Atoms]:
    """At most so many conformers of a molecule, at minima of MMFF94 or UFF where these have its
    parameters. Raises LabelError if there is none.

    wary: take UFF where MMFF94 changes a bond by more than a tenth: it guesses some parameters, and
    has N2 at 1.46 Å and CO2 at 1.41 Å.
    """
    from rdkit import Chem
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
        raise LabelError(f"no conformer of {smiles}")
    try:
        if AllChem.MMFFHasAllMoleculeParams(molecule):
            embedded, before = Chem.Mol(molecule), _bond_lengths(molecule)
            AllChem.MMFFOptimizeMoleculeConfs(molecule)
            if wary and np.abs(_bond_lengths(molecule) / before - 1).max(initial=0) > 0.1:
                molecule = embedded
                AllChem.UFFOptimizeMoleculeConfs(molecule)
        elif AllChem.UFFHasAllMoleculeParams(molecule):
            AllChem.UFFOptimizeMoleculeConfs(molecule)
    except (RuntimeError, ValueError):
        pass  # no force field for it: GFN2-xTB relaxes the embedded structure
    return [Atoms(numbers, molecule.GetConformer(index).GetPositions()) for index in found]


def _bond_lengths(molecule: Mol) -> np.ndarray:
    """(conformers, bonds) in Å."""
    ends = np.array([(b.GetBeginAtomIdx(), b.GetEndAtomIdx()) for b in molecule.GetBonds()], int)
    first, second = ends.reshape(-1, 2).T
    places = np.stack([conformer.GetPositions() for conformer in molecule.GetConformers()])
    return np.linalg.norm(places[:, first] - places[:, second], axis=2)


def assemble(
    parts: Sequence[Atoms], rng: np.random.Generator, contact: float | Sequence[float]
) -> Atoms:
    """Molecules around the first, each turned at random and slid towards it from a random side.

    Args:
        parts: the molecules.
        rng: the random numbers.
        contact: how far a molecule's closest atom is from one that is there already, in Å; one
            number for all, or one for each molecule but the first.
    """
    contacts = np.broadcast_to(contact, len(parts) - 1)
    whole = parts[0].copy()
    whole.positions -= whole.positions.mean(0)
    for part, closest in zip(parts[1:], contacts, strict=True):
        turned = part.copy()
        centred = part.positions - part.positions.mean(0)
        turned.positions = Rotation.random(random_state=rng).apply(centred)
        direction = rng.normal(size=3)
        direction /= np.linalg.norm(direction)
        for distance in np.arange(0.0, 30.0 + closest, 0.1):
            moved = turned.positions + distance * direction
            if np.linalg.norm(moved[:, None] - whole.positions, axis=-1).min() >= closest:
                break
        turned.positions = moved
        whole += turned
    return whole
