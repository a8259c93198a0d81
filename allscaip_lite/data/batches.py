"""Batches of labelled structures, filled by atom count.

In: a `Dataset` or a part of one. Out: `Batch`, structures as the model reads them with energies and
forces; either an endless, seeded shuffle to train on, or the whole data set once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from ase import Atoms
from ase.stress import voigt_6_to_full_3x3_stress
from scipy.spatial.transform import Rotation
from torch import Tensor

from allscaip_lite.data.aselmdb import LabelledData, Mixture, check_data
from allscaip_lite.data.checks import checked_labels
from allscaip_lite.errors import DataError, KernelError
from allscaip_lite.kernels.padded import PaddedBatch, Size, pad
from allscaip_lite.neighbors import candidate_pairs
from allscaip_lite.structures import Structures, structures_from_atoms


@dataclass(frozen=True)
class Fragments:
    """The molecules of some structures of a batch, each alone, where it is in the whole.

    structures: F molecules. whole (F,): the structure in the batch that each is of. interaction
    (B,): the energy of the whole less those of its molecules, eV; not a number without molecules.
    """

    structures: Structures
    whole: Tensor
    interaction: Tensor

    def to(self, device: torch.device) -> Fragments:
        """The same on a device."""
        return Fragments(
            self.structures.to(device), self.whole.to(device), self.interaction.to(device)
        )


@dataclass(frozen=True)
class Batch:
    """Structures with their labels: energy (B,) eV in float64, forces (N, 3) eV/Å.

    stress (B, 3, 3) eV/Å³: not a number where a structure has no such label or is not periodic.
    padded: the same structures padded to a size, if they were asked for and fit.
    fragments: the molecules of those that say what is between theirs.
    """

    structures: Structures
    energy: Tensor
    forces: Tensor
    stress: Tensor
    padded: PaddedBatch | None = None
    fragments: Fragments | None = None

    def to(self, device: torch.device) -> Batch:
        return Batch(
            self.structures.to(device),
            self.energy.to(device),
            self.forces.to(device),
            self.stress.to(device),
            None if self.padded is None else self.padded.to(device),
            None if self.fragments is None else self.fragments.to(device),
        )

    def padded_to(self, size: Size, reach: float) -> Batch:
        """With `padded`, whose pairs are within `reach` Å; KernelError if it does not fit."""
        pairs = candidate_pairs(self.structures, reach)
        return replace(self, padded=pad(self.structures, pairs, size))


def collate(
    systems: Sequence[Atoms], rotation_seed: int | None = None, fragments: bool = False
) -> Batch:
    """Labelled structures as one batch; with a seed, each turned by a random rotation.

    `fragments` are read from the `info` of the structures that have them, if they are asked for.
    """
    systems = list(systems)
    labels = [
        checked_labels(system.calc.results, len(system), f"structure {index}")
        for index, system in enumerate(systems)
    ]
    forces = [label["forces"] for label in labels]
    stress = [
        _full_stress(label.get("stress") if system.pbc.any() else None)
        for system, label in zip(systems, labels, strict=True)
    ]
    if rotation_seed is not None:
        rotations = Rotation.random(len(systems), rng=np.random.default_rng(rotation_seed))
        for index, rotation in enumerate(rotations):
            turned = systems[index].copy()
            turned.calc = systems[index].calc
            turned.positions = rotation.apply(turned.positions)
            turned.cell = rotation.apply(turned.cell.array)
            forces[index] = rotation.apply(forces[index])
            matrix = rotation.as_matrix()
            stress[index] = matrix @ stress[index] @ matrix.T
            systems[index] = turned
    return Batch(
        structures=structures_from_atoms(systems, assumed={}),  # said of the whole data set
        energy=torch.tensor([label["energy"] for label in labels], dtype=torch.float64),
        forces=torch.as_tensor(np.concatenate(forces), dtype=torch.float32),
        stress=torch.as_tensor(np.stack(stress), dtype=torch.float32),
        fragments=_fragments(systems) if fragments else None,
    )


def molecules_of(atoms: Atoms, where: object) -> list[Atoms]:
    """The molecules that `info["fragments"]` names, each alone, with charge and multiplicity.

    It has how many atoms, the charge and the multiplicity of each, in order. Raises DataError,
    which calls the structure `where`, if that is not so.
    """
    found: list[Atoms] = []
    first = 0
    try:
        for natoms, charge, spin in atoms.info["fragments"]:
            found.append(atoms[first : first + natoms])
            found[-1].info = {"charge": charge, "spin": spin}
            first += natoms
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{where}: `fragments` in its info need [atoms, charge, multiplicity] for each "
            f"molecule ({error!r})"
        ) from error
    if first != len(atoms):
        raise DataError(f"{where}: its `fragments` have {first} atoms, and it has {len(atoms)}")
    return found


def _fragments(systems: Sequence[Atoms]) -> Fragments | None:
    """Of the structures whose `info` has `fragments`, which need an `interaction_energy`, eV."""
    alone: list[Atoms] = []
    whole: list[int] = []
    interaction = torch.full((len(systems),), torch.nan, dtype=torch.float64)
    for index, system in enumerate(systems):
        if "fragments" not in system.info:
            continue
        try:
            interaction[index] = float(system.info["interaction_energy"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"structure {index}: `fragments` need an `interaction_energy` in eV beside them "
                f"({error!r})"
            ) from error
        molecules = molecules_of(system, f"structure {index}")
        alone += molecules
        whole += [index] * len(molecules)
    if not alone:
        return None
    return Fragments(structures_from_atoms(alone, assumed={}), torch.tensor(whole), interaction)


def _full_stress(voigt: np.ndarray | None) -> np.ndarray:
    """(3, 3) eV/Å³, not a number without a label."""
    return np.full((3, 3), np.nan) if voigt is None else voigt_6_to_full_3x3_stress(voigt)


class Batches(torch.utils.data.Dataset[Batch]):
    """Batch i of an endless, seeded shuffle, each filled up to `max_atoms` atoms (`fill_batches`).

    Batches are numbered from the start of training, so that a resumed run goes on with exactly
    the one it would have seen next. Ranks of a distributed run take turns. With a `size`, batches
    of molecules come as `PaddedBatch` too, with the pairs of atoms within `reach` Å, if they fit.
    `fragments` is as for `collate`.
    """

    def __init__(
        self,
        data: LabelledData,
        max_atoms: int,
        seed: int,
        first: int = 0,
        count: int = 10**9,
        rank: int = 0,
        world_size: int = 1,
        rotate: bool = True,
        size: Size | None = None,
        reach: float = 0.0,
        fragments: bool = False,
    ) -> None:
        self.data, self.max_atoms, self.seed, self.rotate = data, max_atoms, seed, rotate
        self.size, self.reach, self.fragments = size, reach, fragments
        self.first, self.count, self.rank, self.world_size = first, count, rank, world_size
        largest = int(data.natoms.max())
        if largest > max_atoms:
            raise DataError(
                f"a structure of {largest} atoms does not fit into batches of {max_atoms}: "
                f"give --max-atoms {largest} or more"
            )
        self._epochs: dict[int, list[np.ndarray]] = {}
        self._starts = [0]  # number of the first batch of each epoch made so far

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < self.count:
            raise IndexError(index)
        number = (self.first + index) * self.world_size + self.rank
        while self._starts[-1] <= number:
            epoch = len(self._starts) - 1
            self._epochs = {epoch - 1: self._epochs.get(epoch - 1, []), epoch: self._fill(epoch)}
            self._starts.append(self._starts[-1] + len(self._epochs[epoch]))
        epoch = int(np.searchsorted(self._starts, number, side="right")) - 1
        if epoch not in self._epochs:
            self._epochs[epoch] = self._fill(epoch)
        members = self._epochs[epoch][number - self._starts[epoch]]
        rotation_seed = hash((self.seed, number)) % 2**63 if self.rotate else None
        batch = collate([self.data[int(i)] for i in members], rotation_seed, self.fragments)
        if self.size is None or batch.structures.periodic:
            return batch
        try:
            return batch.padded_to(self.size, self.reach)
        except KernelError:
            return batch

    def _fill(self, epoch: int) -> list[np.ndarray]:
        if isinstance(self.data, Mixture):
            order = self.data.epoch(self.seed, epoch)
        else:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.data))
        return [np.array(part) for part in fill_batches(self.data.natoms, self.max_atoms, order)]


def fill_batches(
    natoms: Sequence[int] | np.ndarray, max_atoms: int, order: Iterable[int] | None = None
) -> Iterator[list[int]]:
    """Indices of structures in groups, each filled until the next structure does not fit.

    Args:
        natoms: how many atoms each structure has.
        max_atoms: atoms of a group; a larger structure has a group of its own.
        order: the indices, in the order in which they are taken; by default all, from the first.

    Yields:
        One group after the other, none empty.
    """
    members: list[int] = []
    atoms = 0
    for index in range(len(natoms)) if order is None else order:
        size = int(natoms[index])
        if members and atoms + size > max_atoms:
            yield members
            members, atoms = [], 0
        members.append(int(index))
        atoms += size
    if members:
        yield members


def in_order(data: LabelledData, max_atoms: int) -> Iterator[Batch]:
    """The whole data set once, in batches of at most `max_atoms` atoms (one structure at least)."""
    check_data(data)
    for members in fill_batches(data.natoms, max_atoms):
        yield collate([data[index] for index in members])
