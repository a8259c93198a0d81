"""Make `data/gpaw`: small crystals labelled with PBE, and adsorbates on metals with RPBE, by GPAW.

    python data/gpaw/make.py --set crystals --out data/generated/crystals-pbe
    python data/gpaw/make.py --set adsorbates --out data/generated/adsorbates

In: the crystals of `data/crystals/prototypes.py`, relaxed by CHGNet, and the tables below. Out:
`{train,val,test}.aselmdb` with energies (eV), forces (eV/Å) and stresses (eV/Å³), split by chemical
system as there. Labels are made in an order in which every beginning is a fair sample of the whole;
the same command goes on, and with `--collect` it writes what is done.

Adsorbates come with `references.json`: energies of the clean slabs, and of H, C, N and O in gases;
see `adsorption_energy`. With `--set convergence`: how far labels are from those of finer settings;
with `--set cutoff`: what the stress lacks at the cutoff of the plane waves.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.build import add_adsorbate, fcc100, fcc111, molecule
from ase.constraints import FixAtoms
from ase.data import covalent_radii
from ase.optimize import BFGS

from allscaip_lite.cli import run_script
from allscaip_lite.data.aselmdb import SPLITS
from allscaip_lite.files import store_text
from allscaip_lite.labels import LabelError, gpaw, queue
from allscaip_lite.labels.chgnet import CHGNet
from allscaip_lite.tables import markdown_table
from data.crystals import prototypes as crystals

# How many structures each set of data/crystals gives, of at most so many atoms.
SIZES = {
    ("tables", "train"): 450,
    ("tables", "val"): 90,
    ("tables", "test"): 130,
    ("pairs", "train"): 200,
    ("triples", "train"): 130,
}
MOST_ATOMS = (4, 8)  # of the first half of the structures, which come first, and of the others
KINDS = ("strained", "displaced", "displaced", "defect")

METALS = "Al Cu Ag Au Pd Pt Ni"
# Atoms of an adsorbate, the one that binds first.
ADSORBATES = {
    "H": Atoms("H"),
    "O": Atoms("O"),
    "N": Atoms("N"),
    "OH": Atoms("OH", [[0, 0, 0], [0.80, 0, 0.55]]),
    "CO": Atoms("CO", [[0, 0, 0], [0, 0, 1.15]]),
    "CH3": Atoms("CH3", [[0, 0, 0], [1.03, 0, 0.35], [-0.515, 0.89, 0.35], [-0.515, -0.89, 0.35]]),
}
FACES = {"111": fcc111, "100": fcc100}
SITES = {"111": ("ontop", "bridge", "fcc", "hcp"), "100": ("ontop", "bridge", "hollow")}
FRAMES = 4  # of each adsorbate on each face
VACUUM = 5.0  # Å, on both sides
GASES = "H2 H2O CO N2".split()


@dataclass(frozen=True)
class Crystalline:
    """The `index`-th structure of a crystal, at PBE, in a cell of `most_atoms` where it fits."""

    crystal: crystals.Crystal
    index: int
    most_atoms: int
    level: gpaw.Level = gpaw.LEVELS["pbe"]

    @property
    def name(self) -> str:
        return f"{self.crystal.name}, {self.index}"

    @property
    def split(self) -> str:
        return self.crystal.split

    @property
    def magnetic(self) -> bool:
        """Whether an element of the crystal may have a moment."""
        return not gpaw.MOMENTS.keys().isdisjoint(self.crystal.elements)

    def structure(self) -> Atoms:
        """A small cell: strained, displaced, or with a defect."""
        rng = _rng(self.name)
        primitive = relaxed(self.crystal)
        distance = crystals.nearest(primitive)
        kind = KINDS[(self.index + len(self.crystal.name)) % len(KINDS)]
        for _ in range(20):
            cell = self._cell(primitive, rng, {"strained": 1, "displaced": 2, "defect": 4}[kind])
            if kind == "strained":
                cell = crystals.strained(cell, rng, rng.choice([0.0, 0.02, 0.04]), volume=0.08)
                atoms = crystals.displaced(cell, rng, 0.005 * distance)
            else:
                if kind == "defect":
                    cell = crystals.with_defect(cell, rng, self.split)
                cell = crystals.strained(cell, rng, 0.015, volume=0.03)
                atoms = crystals.displaced(cell, rng, rng.choice(crystals.SPREADS) * distance)
            held = crystals.split_of(atoms.get_chemical_symbols()) == self.split
            if held and crystals.nearest(atoms) > crystals.CLOSEST * distance:
                atoms.info["data_id"] = f"crystal_{kind}"
                return atoms
        raise LabelError(f"{self.name}: the atoms come too close, or are of another split")

    def _cell(self, primitive: Atoms, rng: np.random.Generator, least: int) -> Atoms:
        """The primitive cell, the conventional one, or one of them doubled; a small one rather."""
        whole = crystals.conventional(
            primitive, crystals.PROTOTYPES[self.crystal.prototype].centring
        )
        found = [
            start.repeat(repeats)
            for start in (primitive, whole)
            for repeats in ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2))
            if least <= len(start) * np.prod(repeats) <= self.most_atoms
        ] or [primitive]
        weights = np.array([len(cell) for cell in found]) ** -2.0
        return found[rng.choice(len(found), p=weights / weights.sum())]


@dataclass(frozen=True)
class OnSurface:
    """A slab of a metal, clean or with an adsorbate, at RPBE.

    On its way from where it is put to CHGNet's minimum: the first structure is that, the others are
    displaced between the two.
    """

    metal: str
    face: str
    adsorbate: str = ""
    index: int = 0
    level: gpaw.Level = gpaw.LEVELS["rpbe"]

    @property
    def slab(self) -> str:
        return f"{self.metal}({self.face})"

    @property
    def name(self) -> str:
        return f"{self.adsorbate or 'clean'} on {self.slab}, {self.index}"

    @property
    def split(self) -> str:
        """That of the metal; of a metal that is trained on, that of all elements together."""
        split = crystals.split_of([self.metal])
        elements = {self.metal, *ADSORBATES.get(self.adsorbate, Atoms()).symbols}
        return crystals.split_of(elements) if split == "train" else split

    def structure(self) -> Atoms:
        start = self.start()
        end = start.copy()
        end.calc = CHGNet()
        BFGS(end, logfile=None).run(fmax=0.05, steps=40)
        atoms = Atoms(end.symbols, end.positions, cell=end.cell, pbc=True)
        if self.index:
            rng = _rng(self.name)
            way = rng.uniform(0.2, 1.0)
            moved = way * (end.positions - start.positions) + rng.normal(size=(len(end), 3)) * 0.05
            atoms.positions = start.positions + moved * (start.get_tags() < 3)[:, None]
        atoms.info |= {"data_id": "adsorbate" if self.adsorbate else "slab", "slab": self.slab}
        return atoms

    def start(self) -> Atoms:
        """Three layers of 2 × 2 atoms, the lowest fixed; the adsorbate touches the next atom."""
        [crystal] = [c for c in listed("tables") if c.name == f"{self.metal} fcc"]
        a = crystals.conventional(relaxed(crystal), "F").cell.lengths()[0]
        slab = FACES[self.face](self.metal, (2, 2, 3), a=a, vacuum=VACUUM)
        if self.adsorbate:
            sites, put = SITES[self.face], ADSORBATES[self.adsorbate]
            add_adsorbate(slab, put, 1.0, sites[_number(self.name) % len(sites)])
            binding = len(slab) - len(put)
            top = np.flatnonzero(slab.get_tags() == 1)
            away = slab.get_distances(binding, top, mic=True, vector=True)[:, :2]
            radii = covalent_radii[slab.numbers[[0, binding]]].sum()
            height = np.sqrt(max(radii**2 - (away**2).sum(1).min(), 0.6**2))
            slab.positions[binding:, 2] += height - 1.0
        slab.center(VACUUM, axis=2)
        slab.set_constraint(FixAtoms(mask=slab.get_tags() == 3))
        return slab


@dataclass(frozen=True)
class Gas:
    """A molecule of ASE's table in a box, at RPBE."""

    name: str
    split: str = "references"
    level: gpaw.Level = gpaw.LEVELS["rpbe"]

    def structure(self) -> Atoms:
        atoms = molecule(self.name, vacuum=VACUUM)
        atoms.pbc = True
        return atoms


Entry = Crystalline | OnSurface | Gas


def crystalline() -> list[Entry]:
    """The set `crystals`, in the order of labelling: small cells first, and of these the ones
    without an element that may need spin, which doubles the time.
    """
    classes: dict[tuple[int, bool], list[list[Entry]]] = defaultdict(list)
    for (kind, split), count in SIZES.items():
        members = [crystal for crystal in listed(kind) if crystal.split == split]
        members.sort(key=lambda crystal: _number(crystal.name))
        turns = [(members[k % len(members)], k // len(members)) for k in range(count)]
        for most_atoms, part in zip(MOST_ATOMS, np.array_split(range(count), 2), strict=True):
            entries = [Crystalline(*turns[k], most_atoms) for k in part]
            for magnetic in (False, True):
                chosen: list[Entry] = [e for e in entries if e.magnetic == magnetic]
                classes[most_atoms, magnetic].append(chosen)
    return [entry for _, groups in sorted(classes.items()) for entry in merged(groups)]


def adsorbed() -> list[Entry]:
    """The set `adsorbates`, in the order of labelling: what energies refer to, then the others."""
    slabs = [(metal, face) for metal in METALS.split() for face in FACES]
    entries = [
        OnSurface(*slab, adsorbate, index)
        for slab in slabs
        for adsorbate in ADSORBATES
        for index in range(FRAMES)
    ]
    entries.sort(key=lambda entry: (entry.index, _number(entry.name)))
    groups = [[entry for entry in entries if entry.split == split] for split in SPLITS]
    return [*map(Gas, GASES), *(OnSurface(*slab) for slab in slabs), *merged(groups)]


def merged(groups: Sequence[Sequence[Entry]]) -> list[Entry]:
    """All entries, those of each group in their order and evenly spread over the whole."""
    placed = [
        ((k + 0.5) / len(group), _number(entry.name), entry)
        for group in groups
        for k, entry in enumerate(group)
    ]
    return [entry for *_, entry in sorted(placed, key=lambda one: one[:2])]


def converging() -> list[Entry]:
    """The set `convergence`: a few entries as they are, and at finer settings."""
    found: list[Entry] = _some(
        "Cu fcc, Al fcc, Si diamond, Mg-O rock salt, Ti-N rock salt, Ni-Al B2"
    )
    found += [OnSurface("Cu", "111", "O"), OnSurface("Al", "100", "H")]
    return [
        replace(entry, level=level)
        for entry in found
        for level in (
            entry.level,
            replace(entry.level, cutoff=entry.level.cutoff + 300, pulay={}),
            replace(entry.level, density=4 / 3 * entry.level.density),
        )
    ]


def cut() -> list[Entry]:
    """The set `cutoff`: all elements, with few k-points, as GPAW has the stress, and at 900 eV."""
    entries = _some(
        "Li-F rock salt, Na-Cl rock salt, K-Cl rock salt, Mg-O rock salt, Ca-O rock salt, "
        "Zn-O zinc blende, O-Li fluorite, Ca-F fluorite, Al-N zinc blende, Ti-N rock salt, "
        "Ti-C rock salt, Zn-S zinc blende, Ge diamond, Ni-Al B2, Ti-Ni B2, "
        "Ag-Mg B2, Cu-Pd B2, Ti-Fe B2, Au-Mg B2, Pt-Al B2"
    )
    coarse = replace(gpaw.LEVELS["pbe"], magnetic=False, density=1.0, pulay={})
    levels = (coarse, replace(coarse, cutoff=900.0))
    return [replace(entry, level=level) for entry in entries for level in levels]


def _some(names: str) -> list[Entry]:
    """Displaced structures of crystals of the tables."""
    named = {crystal.name: crystal for crystal in listed("tables")}
    first = {name: (1 - len(name)) % len(KINDS) for name in names.split(", ")}
    return [Crystalline(named[name], index, MOST_ATOMS[0]) for name, index in first.items()]


SETS = {
    "crystals": crystalline,
    "adsorbates": adsorbed,
    "convergence": converging,
    "cutoff": cut,
}


def label_entry(entry: Entry) -> list[Atoms]:
    """The labelled structure of an entry; LabelError where a force is larger than any wanted."""
    atoms = entry.structure()
    atoms.info |= {"source": entry.name, "reference_source": "allscaip-lite, data/gpaw/make.py"}
    atoms.info["system"] = "-".join(sorted(set(atoms.symbols)))
    labelled = gpaw.label(atoms, entry.level)
    if (largest := np.abs(labelled.get_forces()).max()) > crystals.MAX_FORCE:
        raise LabelError(f"{entry.name}: a force of {largest:.1f} eV/Å")
    return [labelled]


def jobs_of(entries: Sequence[Entry]) -> list[queue.Job]:
    """An entry at another level has another file."""
    names = [f"{entry.name}, {entry.level.name}" for entry in entries]
    files = [hashlib.sha256(name.encode()).hexdigest()[:20] for name in names]
    return [queue.Job(*one, e.split, e) for *one, e in zip(names, files, entries, strict=True)]


@cache
def listed(kind: str) -> list[crystals.Crystal]:
    return crystals.SETS[kind]()


@cache
def relaxed(crystal: crystals.Crystal) -> Atoms:
    return crystals.relaxed(crystal)


def _number(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16)


def _rng(text: str) -> np.random.Generator:
    return np.random.default_rng(_number(text))


# --- Results ---------------------------------------------------------------------------------


def references(folder: Path, jobs: Sequence[queue.Job]) -> dict[str, float]:
    """Energies (eV) of clean slabs by their names, and, as OC20 has them, of H, O, C and N: half of
    H₂, H₂O less H₂, CO less O, half of N₂.
    """
    found = {}
    for job in jobs:
        for atoms in queue.stored(folder, job):
            if isinstance(job.task, Gas) or not job.task.adsorbate:
                name = job.task.name if isinstance(job.task, Gas) else job.task.slab
                found[name] = atoms.get_potential_energy()
    gases = [found.pop(gas, np.nan) for gas in GASES]
    hydrogen, oxygen = gases[0] / 2, gases[1] - gases[0]
    found |= {"H": hydrogen, "O": oxygen, "C": gases[2] - oxygen, "N": gases[3] / 2}
    return {name: energy for name, energy in found.items() if np.isfinite(energy)}


def adsorption_energy(atoms: Atoms, energies: Mapping[str, float]) -> float:
    """eV, of a structure of the set `adsorbates`; negative where it binds. See `references`."""
    slab = atoms.info["slab"]
    free = sum(energies[one] for one in atoms.symbols if not slab.startswith(f"{one}("))
    return float(atoms.get_potential_energy() - energies[slab] - free)


def convergence_table(folder: Path, jobs: Sequence[queue.Job]) -> str:
    """What changes from an entry's own settings to finer ones, of all that is labelled."""
    rows = []
    for start in range(0, len(jobs), 3):
        base, *finer = jobs[start : start + 3]
        for job in finer:
            pair = [*queue.stored(folder, base), *queue.stored(folder, job)]
            if len(pair) < 2:
                continue
            (own, fine), task = pair, job.task
            energy = own.get_potential_energy() - fine.get_potential_energy()
            forces = np.abs(own.get_forces() - fine.get_forces()).max()
            stress = ""
            if task.level.stress:
                off = np.abs(own.get_stress() - fine.get_stress()).max() / units.GPa
                stress = f"{off:.2f}"
            rows.append(
                [
                    task.name,
                    f"{task.level.cutoff:g}, {task.level.density:g}",
                    f"{1000 * energy / len(own):+.1f}",
                    f"{1000 * forces:.1f}",
                    stress,
                ]
            )
    head = ["structure", "finer: eV, k-points (Å)", "energy (meV/atom)"]
    return markdown_table([*head, "a force (meV/Å)", "a stress (GPa)"], rows, "llrrr")


def pulay_table(folder: Path, jobs: Sequence[queue.Job]) -> str:
    """What `gpaw.PULAY` has (eV), by least squares: the stress that is more than at 900 eV, times
    the volume, as a sum over atoms. And how large that stress is, without PULAY and with it.
    """
    found = []
    for base, fine in zip(jobs[::2], jobs[1::2], strict=True):
        pair = [*queue.stored(folder, base), *queue.stored(folder, fine)]
        if len(pair) == 2:
            more = (pair[0].get_stress() - pair[1].get_stress())[:3].mean()
            counts = [sum(pair[0].symbols == symbol) for symbol in gpaw.PULAY]
            found.append([more, pair[0].get_volume(), *counts])
    more, volumes, *counts = np.transpose(found)
    fitted = np.linalg.lstsq(np.transpose(counts), more * volumes)[0]
    left = more - list(gpaw.PULAY.values()) @ np.array(counts) / volumes
    rows = [[name, f"{value:.2f}"] for name, value in zip(gpaw.PULAY, fitted, strict=True)]
    for name, values in {"stress without them": more, "with PULAY": left}.items():
        off = np.abs(values) / units.GPa
        rows.append([f"{name}: mean, largest (GPa)", f"{off.mean():.2f}, {off.max():.2f}"])
    return markdown_table([f"{len(found)} structures", "eV"], rows, "lr")


# --- The command -----------------------------------------------------------------------------


def make(
    folder: Path,
    kind: str = "crystals",
    workers: queue.Workers = 1,
    collect_only: bool = False,
    first: int | None = None,
) -> None:
    """Label the entries of one of SETS, or go on with it, and write what is labelled.

    Args:
        folder: Folder of the data set; `folder/jobs` keeps the result of each entry.
        kind: Which set.
        workers: As `run_jobs` has it.
        collect_only: Label nothing.
        first: Only so many entries, the first ones.
    """
    jobs, store = jobs_of(SETS[kind]()[:first]), folder / "jobs"
    if not collect_only:
        for library in ("chgnet", "gpaw", "gpaw_data"):  # a missing one, before any work
            import_module(library)
        queue.run_jobs(store, jobs, label_entry, workers)
    if kind in ("convergence", "cutoff"):
        print((convergence_table if kind == "convergence" else pulay_table)(store, jobs))
        return
    queue.collect(store, jobs, folder)
    if kind == "adsorbates":
        store_text(folder / "references.json", json.dumps(references(store, jobs), indent=1))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--set", choices=tuple(SETS), default="crystals", help="what is labelled")
    parser.add_argument("--collect", action="store_true", help="label nothing, write what is done")
    parser.add_argument("--first", type=int, help="only so many entries")
    queue.add_workers(parser)


def run(args: argparse.Namespace) -> None:
    make(args.out, args.set, args.workers, args.collect, args.first)


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(
        add_arguments,
        run,
        script="data/gpaw/make.py",
        description=__doc__,
        stopped="the same command goes on from here",
        argv=argv,
    )


if __name__ == "__main__":
    sys.exit(main())
