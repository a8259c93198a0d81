"""The crystals of `data/crystals`, and what is done to them: strained, displaced, given defects.

In: the tables of prototypes and compounds below. Out: which crystals there are and in which split,
their primitive cells at CHGNet's minimum, and changed cells. `data/crystals/make.py` makes a data
set of them, and `data/gpaw/make.py` another.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers, covalent_radii, reference_states
from ase.filters import FrechetCellFilter
from ase.neighborlist import neighbor_list
from ase.optimize import BFGS

from allscaip_lite.labels import LabelError
from allscaip_lite.labels.chgnet import CHGNet

# --- Which crystals there are ----------------------------------------------------------------


@dataclass(frozen=True)
class Prototype:
    """A crystal structure.

    Attributes:
        kinds: Which element each atom of the motif is: 0 is the first of the formula.
        places: The motif in units of the conventional cell's vectors, (M, 3).
        centring: Bravais centring of the conventional cell: P, I or F.
        lattice: The conventional cell's vectors in units of a, (3, 3).
    """

    kinds: tuple[int, ...]
    places: tuple[tuple[float, float, float], ...]
    centring: str = "P"
    lattice: tuple[tuple[float, float, float], ...] = ((1, 0, 0), (0, 1, 0), (0, 0, 1))


def tetragonal(ratio: float) -> tuple[tuple[float, float, float], ...]:
    """Vectors of a cell with a square base, whose height is `ratio` of its width."""
    return ((1, 0, 0), (0, 1, 0), (0, 0, ratio))


HALF, THIRD, QUARTER = 1 / 2, 1 / 3, 1 / 4
ORIGIN, CENTRE = (0.0, 0.0, 0.0), (HALF, HALF, HALF)
FACES = ((HALF, HALF, 0.0), (HALF, 0.0, HALF), (0.0, HALF, HALF))
U = 0.305  # of rutile's anions
RUTILE = (
    ORIGIN,
    CENTRE,
    (U, U, 0.0),
    (1 - U, 1 - U, 0.0),
    (HALF + U, HALF - U, HALF),
    (HALF - U, HALF + U, HALF),
)
PROTOTYPES = {
    "fcc": Prototype((0,), (ORIGIN,), "F"),
    "bcc": Prototype((0,), (ORIGIN,), "I"),
    "hcp": Prototype(
        (0, 0),
        ((THIRD, 2 * THIRD, QUARTER), (2 * THIRD, THIRD, 3 * QUARTER)),
        lattice=((1, 0, 0), (-HALF, 0.75**0.5, 0), (0, 0, 1.63)),
    ),
    "diamond": Prototype((0, 0), (ORIGIN, (QUARTER,) * 3), "F"),
    "rock salt": Prototype((0, 1), (ORIGIN, CENTRE), "F"),
    "zinc blende": Prototype((0, 1), (ORIGIN, (QUARTER,) * 3), "F"),
    "fluorite": Prototype((0, 1, 1), (ORIGIN, (QUARTER,) * 3, (3 * QUARTER,) * 3), "F"),
    "perovskite": Prototype((0, 1, 2, 2, 2), (ORIGIN, CENTRE, *FACES)),
    "rutile": Prototype((0, 0, 1, 1, 1, 1), RUTILE, lattice=tetragonal(0.65)),
    "ordered rutile": Prototype((0, 1, 2, 2, 2, 2), RUTILE, lattice=tetragonal(0.65)),
    "ordered rock salt": Prototype(
        (0, 1, 2, 2),
        (ORIGIN, CENTRE, (HALF, HALF, 0.0), (0.0, 0.0, HALF)),
        lattice=tetragonal(2**0.5),
    ),
    "half-Heusler": Prototype((0, 1, 2), (ORIGIN, CENTRE, (QUARTER,) * 3), "F"),
    "Heusler": Prototype((0, 1, 2, 2), (ORIGIN, CENTRE, (QUARTER,) * 3, (3 * QUARTER,) * 3), "F"),
    "ordered zinc blende": Prototype(
        (0, 1, 2, 2),
        (ORIGIN, CENTRE, (HALF, 0.0, QUARTER), (0.0, HALF, 3 * QUARTER)),
        lattice=tetragonal(2**0.5),
    ),
    "ordered fluorite": Prototype(
        (0, 1, 2, 2, 2, 2),
        (
            ORIGIN,
            CENTRE,
            (HALF, 0.0, QUARTER),
            (0.0, HALF, QUARTER),
            (HALF, 0.0, 3 * QUARTER),
            (0.0, HALF, 3 * QUARTER),
        ),
        lattice=tetragonal(2**0.5),
    ),
    "ordered antifluorite": Prototype((2, 0, 1), (ORIGIN, (QUARTER,) * 3, (3 * QUARTER,) * 3), "F"),
    "ordered L1_2": Prototype((0, 1, 2, 2), (ORIGIN, *FACES)),
    "B2": Prototype((0, 1), (ORIGIN, CENTRE)),
    "L1_2": Prototype((0, 1, 1, 1), (ORIGIN, *FACES)),
    "L1_0": Prototype((0, 1), (ORIGIN, CENTRE), lattice=tetragonal(2**0.5)),
}
# Vectors of the primitive cell in units of the conventional ones.
PRIMITIVE = {
    "P": np.eye(3),
    "I": np.array([(-HALF, HALF, HALF), (HALF, -HALF, HALF), (HALF, HALF, -HALF)]),
    "F": np.array([(0, HALF, HALF), (HALF, 0, HALF), (HALF, HALF, 0)]),
}

# Elements in the structure that each has, and, with fewer structures, in those of OTHER.
METALS = "Li Na Mg Al K Ca Ti Fe Ni Cu Zn Pd Ag Pt Au"
TETRAHEDRAL = "C Si Ge"
OTHER = {"fcc": ("bcc", "hcp"), "bcc": ("fcc", "hcp"), "hcp": ("fcc", "bcc"), "diamond": ()}
# Elements in the order of the prototype's sites, and a (Å) from which the relaxation starts.
COMPOUNDS = {
    "rock salt": """Li-F 4.03 Li-Cl 5.14 Na-F 4.63 Na-Cl 5.64 K-F 5.34 K-Cl 6.29 Mg-O 4.21
        Ca-O 4.81 Mg-S 5.20 Ca-S 5.69 Ti-N 4.24 Ti-C 4.33""",
    "zinc blende": "Si-C 4.36 Zn-S 5.41 Zn-O 4.60 Al-N 4.38 Cu-Cl 5.42",
    "fluorite": "Ca-F 5.46 O-Li 4.62 O-Na 5.55 O-K 6.43 S-Li 5.71 S-Na 6.53 Si-Mg 6.35 Ge-Mg 6.39",
    "perovskite": "Ca-Ti-O 3.89 Ca-Si-O 3.55 K-Mg-F 3.99 Na-Mg-F 3.92 K-Zn-F 4.06 K-Ca-F 4.43",
    "rutile": "Ti-O 4.60 Mg-F 4.62 Zn-F 4.70 Ni-F 4.65 Ge-O 4.40 Si-O 4.18",
    "B2": """Ni-Al 2.89 Fe-Al 2.90 Cu-Zn 2.95 Ti-Ni 3.01 Ti-Fe 2.97 Ag-Mg 3.31 Li-Ag 3.17
        Cu-Pd 2.99 Au-Mg 3.27 Pt-Al 3.04 Zn-Ag 3.16""",
    "L1_2": "Au-Cu 3.75 Cu-Au 3.97 Al-Ni 3.56 Ti-Al 3.97 Fe-Ni 3.55 Pt-Cu 3.70 Ag-Pt 3.90",
    "L1_0": "Cu-Au 2.80 Ti-Al 2.82 Fe-Pt 2.72 Fe-Pd 2.72 Ni-Pt 2.71 Pd-Zn 2.89",
}
# What the set `pairs` has of two metals, and of a metal or tetrahedral element with an anion.
ANIONS = "N O F S Cl"
PAIRED = {
    "metals": ("B2", "L1_0", "L1_2"),
    "anions": ("rock salt", "zinc blende", "B2", "fluorite", "rutile"),
}
# What the set `triples` has, and how many: of two metals or tetrahedral elements and an anion, of
# one of them and two anions, and of three metals. In ordered structures two elements share a site.
ORDERED = ("ordered rock salt", "ordered zinc blende", "ordered fluorite", "ordered antifluorite")
TRIPLED = {
    "cations": (*ORDERED, "ordered rutile", "perovskite", "half-Heusler"),
    "anions": ORDERED,
    "metals": ("Heusler", "ordered L1_2", "half-Heusler"),
}
TRIPLES = {"N": 100, "O": 170, "F": 90, "S": 100, "Cl": 60, "anions": 100, "metals": 200}
# What the set `mixtures` has: structures, and which elements share the sites of each kind.
MIXED = (
    ("fcc", ("metals",)),
    ("bcc", ("metals",)),
    ("hcp", ("metals",)),
    ("rock salt", ("cations", "anions")),
    ("zinc blende", ("cations", "anions")),
    ("B2", ("cations", "anions")),
    ("rutile", ("cations", "anions")),
    ("fluorite", ("cations", "anions")),
    ("fluorite", ("anions", "cations")),
    ("perovskite", ("cations", "cations", "anions")),
)
SHARING = {"metals": METALS, "cations": f"{METALS} {TETRAHEDRAL}", "anions": ANIONS}
MIXTURES = 3000
# All compounds of these elements, in any structure, are in the split; the others are trained on.
HELD_OUT = {
    "test": "Pd Na-Cl Ca-O Zn-S Na-O K-Mg-F Ge-O Cu-Au Ni-Al",
    "val": "Ag Li-F Mg-S Al-N Li-S K-Zn-F Ni-F Fe-Pt Cu-Zn",
}
SPLIT_OF = {
    frozenset(system.split("-")): split
    for split, systems in HELD_OUT.items()
    for system in systems.split()
}

# --- What is done to them --------------------------------------------------------------------

MOST_ATOMS = 24
SIZES = {6: 0.3, 8: 0.25, 12: 0.2, 16: 0.15, MOST_ATOMS: 0.1}  # most atoms of a cell, and how often
SPREADS = (0.01, 0.03, 0.06, 0.10)  # of displacements, in units of the nearest distance
CLOSEST = 0.65  # a structure with two atoms nearer than this, in the same units, is left out
MAX_FORCE = 20.0  # eV/Å: a structure with a larger one is left out
MIXED_STEPS = 12  # of the relaxation of a mixture, which does not have to end at a minimum


@dataclass(frozen=True)
class Crystal:
    """An element or a compound in a crystal structure.

    Attributes:
        prototype: One of PROTOTYPES.
        elements: In the order of the prototype's sites; "Na+K" where two share the sites at random.
        a: Where the relaxation of the lattice constant starts, Å.
        natural: Whether it is in the tables; if not, fewer structures are made of it, and no slabs.
    """

    prototype: str
    elements: tuple[str, ...]
    a: float
    natural: bool = True

    @property
    def mixed(self) -> bool:
        """Whether elements share sites."""
        return any("+" in shared for shared in self.elements)

    @property
    def centring(self) -> str:
        """Of its structures' cells; a mixture's have no smaller cell inside."""
        return "P" if self.mixed else PROTOTYPES[self.prototype].centring

    @property
    def split(self) -> str:
        """The split of its chemical system."""
        return split_of([symbol for shared in self.elements for symbol in shared.split("+")])

    @property
    def name(self) -> str:
        """Different for any two crystals."""
        return f"{'-'.join(self.elements)} {self.prototype}"


def split_of(elements: Sequence[str]) -> str:
    """The split of all structures that hold these elements and no others."""
    return SPLIT_OF.get(frozenset(elements), "train")


def crystals() -> list[Crystal]:
    """All crystals of the tables, and elements in the structures of others."""
    found = []
    for element in f"{METALS} {TETRAHEDRAL}".split():
        state = reference_states[atomic_numbers[element]]
        found.append(Crystal(state["symmetry"], (element,), float(state["a"])))
        volume = _volume(state["symmetry"]) * state["a"] ** 3
        for other in OTHER[state["symmetry"]]:
            a = float((volume / _volume(other)) ** (1 / 3))
            found.append(Crystal(other, (element,), a, natural=False))
    for prototype, text in COMPOUNDS.items():
        words = text.split()
        for compound, a in zip(words[::2], words[1::2], strict=True):
            found.append(Crystal(prototype, tuple(compound.split("-")), float(a)))
    return found


def pairs() -> list[Crystal]:
    """Compounds of two elements each, in two structures drawn at random, whether they exist or not.

    A model that meets an element in a few compounds alone learns these and not the element. What is
    in the tables, and all chemical systems that are held out, are left out.
    """
    rng = np.random.default_rng(0)
    metals, others = METALS.split(), TETRAHEDRAL.split()
    kinds = {
        "metals": itertools.combinations(metals, 2),
        "anions": itertools.product(metals + others, ANIONS.split()),
    }
    drawn: list[tuple[str, Sequence[str]]] = []
    for kind, systems in kinds.items():
        for system in systems:
            for prototype in rng.choice(PAIRED[kind], 2, replace=False):
                turned = prototype == "fluorite" or kind == "metals"
                drawn.append((prototype, rng.permutation(system) if turned else system))
    return _to_train_on(drawn)


def triples() -> list[Crystal]:
    """Compounds of three elements, drawn at random.

    Here two elements meet even if their own compounds are held out.
    """
    rng = np.random.default_rng(1)
    metals, anions = METALS.split(), ANIONS.split()
    others = metals + TETRAHEDRAL.split()
    drawn: list[tuple[str, Sequence[str]]] = []
    for kind, count in TRIPLES.items():
        for _ in range(count):
            if kind == "metals":
                elements = rng.choice(metals, 3, replace=False)
            elif kind == "anions":
                elements = (*rng.choice(anions, 2, replace=False), rng.choice(others))
            else:
                elements = (*rng.choice(others, 2, replace=False), kind)
            drawn.append((rng.choice(TRIPLED.get(kind, TRIPLED["cations"])), elements))
    return _to_train_on(drawn)


def _to_train_on(drawn: list[tuple[str, Sequence[str]]]) -> list[Crystal]:
    """Of prototypes and elements those that are not held out and not in the tables, each once."""
    known, found = {crystal.name for crystal in crystals()}, {}
    for prototype, elements in drawn:
        names = tuple(map(str, elements))
        crystal = Crystal(str(prototype), names, _start(prototype, names), natural=False)
        if crystal.split == "train" and crystal.name not in known:
            found[crystal.name] = crystal
    return list(found.values())


def mixtures() -> list[Crystal]:
    """Crystals of two to nine elements, one to three of which share the sites of each kind.

    Each structure has the neighbourhoods of many compounds.
    """
    rng = np.random.default_rng(2)
    drawn: list[tuple[str, Sequence[str]]] = []
    while len(drawn) < MIXTURES:
        prototype, kinds = MIXED[rng.integers(len(MIXED))]
        pool = {  # in an order that is the same in every process
            kind: list(rng.permutation(SHARING[kind].split()))
            for kind in sorted(set(kinds), reverse=True)
        }
        elements = []
        for kind in kinds:
            count = int(rng.integers(1, 4)) + (kind == "metals")
            elements.append("+".join(pool[kind].pop() for _ in range(count)))
        if any("+" in shared for shared in elements):
            drawn.append((prototype, elements))
    return _to_train_on(drawn)


SETS = {"tables": crystals, "pairs": pairs, "triples": triples, "mixtures": mixtures}


def _start(prototype: str, elements: Sequence[str]) -> float:
    """A lattice constant (Å) where atoms touch, by their covalent radii, and none overlap.

    The radius of a site that elements share is their mean.
    """
    atoms = built(prototype, elements, 10.0)
    of_kinds = [
        np.mean([covalent_radii[atomic_numbers[symbol]] for symbol in shared.split("+")])
        for shared in elements
    ]
    radii = [of_kinds[kind] for kind in PROTOTYPES[prototype].kinds]
    return 10.0 * max(
        (radii[i] + radii[j]) / distance
        for i, j, distance in zip(*neighbor_list("ijd", atoms, 10.1), strict=True)
    )


def _volume(prototype: str) -> float:
    """Of an atom, in units of a³."""
    atoms = built(prototype, "XX", 1.0)
    return atoms.cell.volume / len(atoms)


def built(prototype: str, elements: Sequence[str], a: float, primitive: bool = True) -> Atoms:
    """A crystal in its primitive or its conventional cell; shared sites have the first element."""
    form = PROTOTYPES[prototype]
    cell = a * np.array(form.lattice)
    symbols = [elements[kind].split("+")[0] for kind in form.kinds]
    vectors = PRIMITIVE[form.centring]
    motif = Atoms(symbols, np.array(form.places) @ cell, cell=vectors @ cell, pbc=True)
    return motif if primitive else conventional(motif, form.centring)


def conventional(primitive: Atoms, centring: str) -> Atoms:
    """The conventional cell of a primitive one, however that is strained."""
    into = np.linalg.inv(PRIMITIVE[centring])  # conventional vectors in primitive ones
    copies = round(np.linalg.det(into))
    steps = np.stack(np.meshgrid(*[np.arange(3)] * 3, indexing="ij"), -1).reshape(-1, 3)
    inside = np.unique((steps @ PRIMITIVE[centring] % 1).round(6) % 1, axis=0)
    assert len(inside) == copies
    cell = into @ primitive.cell.array
    positions = (inside @ cell)[:, None] + primitive.positions  # (copies, M, 3)
    symbols = primitive.get_chemical_symbols() * copies
    return Atoms(symbols, positions.reshape(-1, 3), cell=cell, pbc=True)


def relaxed(crystal: Crystal) -> Atoms:
    """The primitive cell at CHGNet's lattice constants; symmetry stays, as its forces keep it.

    Compounds that are not in the tables are relaxed less far. Raises LabelError where no minimum
    is found.
    """
    atoms = built(crystal.prototype, crystal.elements, crystal.a)
    if not _relax(atoms, 0.03 if crystal.natural else 0.1, steps=60):
        raise LabelError(f"{crystal.name}: no minimum in 60 steps")
    return atoms


def mixture(crystal: Crystal, rng: np.random.Generator) -> Atoms:
    """A cell of at least 4 atoms; the elements of each kind of site take turns at random.

    It is relaxed by MIXED_STEPS steps, which need not lead to a minimum.
    """
    primitive = built(crystal.prototype, crystal.elements, crystal.a)
    cell = some_cell(primitive, PROTOTYPES[crystal.prototype].centring, rng, 4)
    symbols = np.array(cell.get_chemical_symbols(), dtype="U2")
    for shared in crystal.elements:
        elements = shared.split("+")
        sites = np.flatnonzero(symbols == elements[0])
        symbols[rng.permutation(sites)] = np.resize(rng.permutation(elements), len(sites))
    cell.set_chemical_symbols(list(symbols))
    _relax(cell, 0.1, MIXED_STEPS)
    return cell


def _relax(atoms: Atoms, fmax: float, steps: int) -> bool:
    """Relax atoms and cell in place by CHGNet; whether it came to forces below `fmax` (eV/Å)."""
    atoms.calc = CHGNet()
    converged = BFGS(FrechetCellFilter(atoms), logfile=None).run(fmax, steps)
    atoms.calc = None
    return bool(converged)


def nearest(atoms: Atoms) -> float:
    """Å, the least distance of two atoms, images among them."""
    cutoff = 2.0
    while not len(found := neighbor_list("d", atoms, cutoff)):
        cutoff *= 1.4
    return float(found.min())


def strained(atoms: Atoms, rng: np.random.Generator, spread: float, volume: float = 0.0) -> Atoms:
    """The crystal under a random symmetric strain.

    Args:
        atoms: the crystal.
        rng: the random numbers.
        spread: standard deviation of a strain's component.
        volume: each length is stretched by at most this much more, or shrunk by 0.8 of it.
    """
    noise = rng.normal(size=(3, 3)) * spread
    deformation = np.eye(3) * (1 + rng.uniform(-0.8, 1.0) * volume) + (noise + noise.T) / 2
    moved = atoms.copy()
    moved.set_cell(atoms.cell.array @ deformation, scale_atoms=True)
    return moved


def displaced(atoms: Atoms, rng: np.random.Generator, spread: float) -> Atoms:
    """All atoms moved at random, `spread` (Å) a component."""
    moved = atoms.copy()
    moved.positions += rng.normal(size=atoms.positions.shape) * spread
    return moved


def some_cell(primitive: Atoms, centring: str, rng: np.random.Generator, least: int = 1) -> Atoms:
    """The primitive or conventional cell, repeated at random.

    It has at least `least` atoms, and at most one of SIZES if such a cell is found.
    """
    starts = [primitive, conventional(primitive, centring)]
    most = max(least, int(rng.choice(list(SIZES), p=list(SIZES.values()))))
    for _ in range(100):
        repeats = rng.choice([1, 1, 2, 2, 3], size=3)
        start = starts[rng.integers(2)]
        if least <= len(start) * repeats.prod() <= most:
            return start.repeat(tuple(int(repeat) for repeat in repeats))
    return starts[1].repeat((2, 1, 1)) if len(starts[1]) < least else starts[1]


def with_defect(atoms: Atoms, rng: np.random.Generator, split: str) -> Atoms:
    """A vacancy, two atoms of a compound exchanged, or another element on a site.

    A substitution makes no chemical system of another split.
    """
    changed = atoms.copy()
    kinds = sorted(set(atoms.symbols))
    kind = rng.integers(3)
    if kind == 0:
        del changed[int(rng.integers(len(atoms)))]
        return changed
    symbols = np.array(atoms.get_chemical_symbols(), dtype="U2")
    if kind == 1 and len(kinds) > 1:
        one, two = rng.choice(kinds, 2, replace=False)
        first = int(rng.choice(np.flatnonzero(symbols == one)))
        second = int(rng.choice(np.flatnonzero(symbols == two)))
        symbols[[first, second]] = two, one
    else:
        metals = METALS.split()
        sites = [index for index, symbol in enumerate(symbols) if symbol in metals]
        group = metals if sites else TETRAHEDRAL.split()
        site = int(rng.choice(sites or range(len(atoms))))
        others = set(np.delete(symbols, site))
        allowed = [
            element
            for element in group
            if element not in kinds and split_of([*others, element]) == split
        ]
        if allowed:
            symbols[site] = rng.choice(allowed)
    changed.set_chemical_symbols(list(symbols))
    return changed
