"""Which split a system of the makers' data sets is in, the same in all sets, so that they join."""

from __future__ import annotations

import hashlib
from functools import cache

import numpy as np

from allscaip_lite.data.aselmdb import SPLITS
from allscaip_lite.labels.sampling import System, with_hydrogens

# In the test or validation set on purpose, whatever the hash says. Keys are `System.molecule`.
CAFFEINE = "Cn1c(=O)c2c(ncn2C)n(C)c1=O"
GLYCINE = "NCC(=O)O"
WATER = "O"
HELD_OUT = {
    CAFFEINE: "test",  # with all that contains it
    f"{GLYCINE}.{WATER}": "test",
    f"{GLYCINE}.{WATER}.{WATER}": "test",
    ".".join([WATER] * 7): "test",
    ".".join(["[Na+]"] + [WATER] * 4): "test",
    ".".join(["[Cl-]"] + [WATER] * 4): "test",
    ".".join([WATER] * 5): "val",
    ".".join(["[K+]"] + [WATER] * 3): "val",
    ".".join(["[Ca+2]"] + [WATER] * 5): "val",
}
_HELD_OUT = {".".join(sorted(name.split("."))): split for name, split in HELD_OUT.items()}
KEPT_IN_TRAIN = {"CCO", "CCCC", GLYCINE, "c1ccccc1", "CC(N)=O", "CNC(C)=O"}


def split_of(system: System) -> str:
    """The split of a system, the same in all data sets, so that they can be joined.

    Systems of `HELD_OUT` go where it says. Molecules of one or two heavy atoms and those of
    `KEPT_IN_TRAIN` are trained on. Others go by the hash of their `parent`. A complex goes with its
    most held-out molecule; if all of them are trained on, by the hash of its parents, so that some
    complexes are new although their molecules are not.
    """
    whole = ".".join(sorted(system.parts))
    if whole in _HELD_OUT:
        return _HELD_OUT[whole]
    splits = [_split_of_part(part) for part in system.parts]
    if len(splits) > 1:
        splits.append(by_hash(".".join(sorted(map(parent, system.parts)))))
    return max(splits, key=SPLITS.index)


@cache
def parent(smiles: str) -> str:
    """SMILES of the molecule with its charges neutralised by protons, without stereochemistry: an
    acid and its anion have the same.
    """
    from rdkit import Chem, RDLogger
    from rdkit.Chem.MolStandardize import rdMolStandardize

    RDLogger.DisableLog("rdApp.*")
    neutral = rdMolStandardize.Uncharger().uncharge(Chem.MolFromSmiles(smiles))
    return Chem.MolToSmiles(neutral, isomericSmiles=False)


@cache
def _split_of_part(smiles: str) -> str:
    from rdkit import Chem

    key = parent(smiles)
    if key in _HELD_OUT:
        return _HELD_OUT[key]
    if key in KEPT_IN_TRAIN or Chem.MolFromSmiles(smiles).GetNumHeavyAtoms() <= 2:
        return "train"
    return by_hash(key)


def by_hash(name: str) -> str:
    """The split of a name by its hash, whatever other names there are; 90, 5 and 5 % expected."""
    digest = hashlib.sha256(f"0:{name}".encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    return SPLITS[int(np.searchsorted(np.cumsum([0.9, 0.05]), share, side="right"))]


def atom_count(system: System) -> int:
    """Atoms of a system, hydrogens included."""
    return sum(with_hydrogens(part).GetNumAtoms() for part in system.parts)
