"""What a model saw in training, and what of a structure is outside of that.

In: `Structures`. Out: `Seen`, kept with the model and in its file; and, for a structure, the words
for each thing that training never showed. A network gives a number for everything; outside of its
data that number means little, and nothing in it tells.
"""

from __future__ import annotations

import reprlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from ase.data import atomic_numbers, chemical_symbols, covalent_radii
from ase.symbols import Symbols

from allscaip_lite.electrons import MAX_CHARGE, MAX_MULTIPLICITY
from allscaip_lite.errors import WAYS, InputError, StructureError, StructureWarning
from allscaip_lite.neighbors import candidate_pairs, pair_vectors
from allscaip_lite.structures import Structures

REACH = 3.0  # Å, within which the closest pair of a structure is looked for
SMALL = 64  # atoms; below, all pairs of a molecule are looked at
LARGE = 3000  # atoms; above, distances between all atoms would take too long
CLOSER, FARTHER = 0.9, 1.1  # times the closest and the farthest pair of training is still inside
KINDS = ("molecules", "periodic systems")
_RADII = torch.as_tensor(covalent_radii)


@dataclass
class Seen:
    """What the structures of a training had in them.

    closest is a distance over the sum of the two covalent radii (Cordero et al., Dalton Trans.
    2008, 2832), the smallest of all pairs; farthest is in Å, between two atoms of one molecule.
    A field that is None is not known, and nothing is outside of it.
    """

    elements: set[str] | None = field(default_factory=set)
    charges: set[int] | None = field(default_factory=set)
    multiplicities: set[int] | None = field(default_factory=set)
    atoms: int | None = 0  # of the largest system
    closest: float | None = np.inf
    farthest: float | None = 0.0
    kinds: set[str] | None = field(default_factory=set)  # of KINDS

    def add(self, structures: Structures) -> None:
        """Note what a batch has in it."""
        for one in structures.each():
            self.merge(
                Seen(
                    {chemical_symbols[number] for number in one.atomic_numbers.tolist()},
                    {int(one.charge)},
                    {int(one.spin)},
                    len(one.positions),
                    _closest(one)[0],
                    _farthest(one),
                    {KINDS[bool(one.periodic)]},
                )
            )

    def merge(self, other: Seen) -> None:
        """Note what another training saw; what one of both does not know is not known then."""
        for name, (join, _) in _JOIN.items():
            ours, theirs = getattr(self, name), getattr(other, name)
            known = ours is not None and theirs is not None
            setattr(self, name, join(ours, theirs) if known else None)

    def leave_out_cells(self, node_attention: bool) -> None:
        """Know no largest size of crystals, for a model without node attention: a larger cell is
        then the same crystal.
        """
        if self.kinds == {KINDS[1]} and not node_attention:
            self.atoms = None

    def outside(self, structures: Structures) -> list[tuple[str, str, str]]:
        """The formula of a structure, a kind, and words, for each thing that was never seen."""
        found: list[tuple[str, str, str]] = []
        for one in structures.each():
            texts: dict[str, str] = {}
            numbers = set(one.atomic_numbers.tolist())
            unseen = [chemical_symbols[number] for number in sorted(numbers)]
            unseen = [name for name in unseen if self.elements and name not in self.elements]
            if unseen:
                texts["element"] = ", ".join(unseen)
            for kind, value, known, sign in (
                ("charge", int(one.charge), self.charges, "+d"),
                ("multiplicity", int(one.spin), self.multiplicities, "d"),
            ):
                if known is not None and value not in known:
                    texts[kind] = f"{value:{sign}} (seen: {_range(known, sign)})"
            natoms, systems = len(one.positions), KINDS[bool(one.periodic)]
            if self.atoms is not None and natoms > self.atoms:
                texts["size"] = f"{natoms} atoms (seen: at most {self.atoms})"
            if self.kinds is not None and systems not in self.kinds:
                texts["periodicity"] = (
                    f"one of {systems} (seen: {' and '.join(sorted(self.kinds))})"
                )
            if self.closest is not None:
                ratio, distance = _closest(one)
                if ratio < CLOSER * self.closest:
                    texts["closest atoms"] = (
                        f"{distance:.2f} Å, {ratio:.2f} of the sum of the covalent radii (seen: "
                        f"{self.closest:.2f} or more)"
                    )
            if self.farthest is not None and (distance := _farthest(one)) > FARTHER * self.farthest:
                texts["farthest atoms"] = f"{distance:.1f} Å (seen: at most {self.farthest:.1f} Å)"
            if texts:
                formula = Symbols(one.atomic_numbers.numpy()).get_chemical_formula()
                found += [(formula, kind, text) for kind, text in texts.items()]
        return found

    def to_dict(self) -> dict[str, Any]:
        """For JSON; the inverse of `from_dict`."""
        values: dict[str, Any] = {}
        for name in _JOIN:
            value = getattr(self, name)
            key = atomic_numbers.__getitem__ if name == "elements" else None
            values[name] = sorted(value, key=key) if isinstance(value, set) else value
            if isinstance(value, float):
                values[name] = round(value, 4) if np.isfinite(value) else None
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Seen:
        """Of what `to_dict` made; a name that is missing is not known. TypeError for what is not
        of the kind and in the range of what `to_dict` makes.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"what was seen is a {type(values).__name__}, not a table")
        made: dict[str, Any] = dict.fromkeys(_JOIN)
        for name, (join, possible) in _JOIN.items():
            value = values.get(name)
            if value is None:
                continue
            items = value if join is set.union else [value]
            if not isinstance(items, list) or not all(map(possible, items)):
                raise TypeError(f"{name} of what was seen is {reprlib.repr(value)}")
            made[name] = set(items) if join is set.union else value
        return cls(**made)


def _number(kind: Any, low: float, high: float) -> Callable[[Any], bool]:
    """Whether a value is a number of a kind from `low` to `high`; NaN is in no range."""
    return lambda v: isinstance(v, kind) and not isinstance(v, bool) and low <= v <= high


# How two trainings are joined, and what a number, or one of a set, can be.
_JOIN: dict[str, tuple[Any, Callable[[Any], bool]]] = {
    "elements": (set.union, tuple(chemical_symbols[1:]).__contains__),
    "charges": (set.union, _number(int, -MAX_CHARGE, MAX_CHARGE)),
    "multiplicities": (set.union, _number(int, 1, MAX_MULTIPLICITY)),
    "atoms": (max, _number(int, 0, 10**9)),
    "closest": (min, _number((int, float), 0, np.inf)),
    "farthest": (max, _number((int, float), 0, np.inf)),
    "kinds": (set.union, KINDS.__contains__),
}


def warn_outside(
    seen: Seen | None, structures: Structures, way: str, said: set[str] | None = None
) -> None:
    """Say what of a batch is outside of what a model saw.

    Args:
        seen: what it saw; nothing is said where that is not known.
        structures: the batch.
        way: one of `WAYS`.
        said: kinds and formulas that were said before, which are left out; new ones are added.

    Raises:
        StructureError: with the way "error".
        InputError: for a way that does not exist.
    """
    if way not in WAYS:
        raise InputError(f"outside_training {way!r} is not one of {', '.join(WAYS)}")
    if seen is None or way == "ignore":
        return
    by_kind: dict[str, list[str]] = {}
    for formula, kind, text in seen.outside(structures):
        key = f"{kind} of {formula}"
        if said is not None and way == "warn":
            if key in said:
                continue
            said.add(key)
        by_kind.setdefault(kind, []).append(f"{formula}: {text}")
    for kind, texts in by_kind.items():
        more = f" and {len(texts) - 4} more" if len(texts) > 4 else ""
        message = (
            f"outside of what the model saw in training, {kind}: {'; '.join(texts[:4])}{more}. "
            "Its numbers mean little there"
        )
        if way == "error":
            raise StructureError(message)
        warnings.warn(message, StructureWarning, stacklevel=4)


def _closest(one: Structures) -> tuple[float, float]:
    """The smallest distance over the sum of covalent radii, and that distance in Å."""
    if not one.periodic and len(one.positions) <= SMALL:
        first, second = torch.triu_indices(len(one.positions), len(one.positions), 1)
        shift = first.new_zeros(len(first), 3)
    else:
        first, second, shift = candidate_pairs(one, REACH)
    if not len(first):
        return np.inf, np.inf
    distances = pair_vectors(one, first, second, shift).norm(dim=1)
    radii = _RADII[one.atomic_numbers]
    ratios = distances / (radii[first] + radii[second])
    index = int(ratios.argmin())
    return float(ratios[index]), float(distances[index])


def _farthest(one: Structures) -> float:
    """Å between two atoms of a molecule; 0 where there are too many to look at."""
    if one.periodic or len(one.positions) > LARGE:
        return 0.0
    return float(torch.cdist(one.positions, one.positions).max())


def _range(values: set[int], sign: str) -> str:
    low, high = min(values, default=0), max(values, default=0)
    if len(values) == high - low + 1 > 2:
        return f"{low:{sign}} to {high:{sign}}"
    return ", ".join(f"{value:{sign}}" for value in sorted(values))
