"""What is in a data set: the tables that a data card shows (`allscaip-lite data describe`).

In: one or several sets in OMol25's format, each split a file of its own or all in one folder. Out:
counts by split, domain, element, charge, multiplicity and size, the spread of the forces, and a
checksum a split, as a `Summary` or as Markdown.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers
from tqdm import tqdm

from allscaip_lite.data.aselmdb import SLOW, SPLITS, Dataset, checksum
from allscaip_lite.electrons import charge_and_spin
from allscaip_lite.errors import DataError
from allscaip_lite.tables import markdown_table


@dataclass
class Summary:
    """What one split holds; counts are of structures."""

    sizes: Counter[int] = field(default_factory=Counter)  # by number of atoms
    systems: set[tuple[str, int, int]] = field(default_factory=set)  # molecule, charge, spin
    domains: Counter[str] = field(default_factory=Counter)  # by `data_id`
    elements: Counter[str] = field(default_factory=Counter)
    charges: Counter[int] = field(default_factory=Counter)
    multiplicities: Counter[int] = field(default_factory=Counter)
    forces: list[np.ndarray] = field(default_factory=list)  # (atoms, 3) each, eV/Å
    checksum: str = ""

    @property
    def structures(self) -> int:
        return self.sizes.total()

    @property
    def atoms(self) -> int:
        return sum(size * count for size, count in self.sizes.items())

    def add(self, atoms: Atoms) -> None:
        info = atoms.info
        charge, spin = charge_and_spin(atoms)
        self.sizes[len(atoms)] += 1
        name = info.get("molecule") or atoms.get_chemical_formula("hill")
        self.systems.add((name, charge, spin))
        self.domains[info.get("data_id", "without data_id")] += 1
        self.elements.update(set(atoms.symbols))
        self.charges[charge] += 1
        self.multiplicities[spin] += 1
        self.forces.append(np.asarray(atoms.calc.results["forces"]))


def summarise(structures: Iterable[Atoms]) -> Summary:
    """Count what is in labelled structures; see `Summary`."""
    summary = Summary()

    def counted() -> Iterable[Atoms]:
        for atoms in structures:
            summary.add(atoms)
            yield atoms

    summary.checksum = checksum(counted())
    return summary


def read_splits(path: str | os.PathLike[str]) -> dict[str, Dataset]:
    """The data sets of a folder by split, or those of one file or folder of shards as "all"."""
    path = Path(path)
    splits = {
        split: Dataset(path / f"{split}.aselmdb")
        for split in SPLITS
        if (path / f"{split}.aselmdb").exists()
    }
    return splits or {"all": Dataset(path)}


def to_markdown(splits: dict[str, Summary]) -> str:
    """The tables of a data card, in Markdown."""
    columns = list(splits.values())
    several = len(columns) > 1
    names = [*splits, "all"] if several else list(splits)

    def row(title: str, values: Iterable[int]) -> list[str]:
        values = list(values)
        shown = [*values, sum(values)] if several else values
        return [title, *(f"{value:,}" for value in shown)]

    def listed(counts: Counter[Any], order: Callable[[Any], Any]) -> str:
        return ", ".join(f"{key} {counts[key]:,}" for key in sorted(counts, key=order))

    def summed(name: str) -> Counter[Any]:
        return sum((getattr(column, name) for column in columns), Counter())

    amounts = [
        row("structures", (column.structures for column in columns)),
        row("systems", (len(column.systems) for column in columns)),
        row("atoms", (column.atoms for column in columns)),
    ]
    domains = summed("domains")
    by_domain = [
        row(f"`{domain}`", (column.domains[domain] for column in columns))
        for domain in sorted(domains, key=lambda domain: -domains[domain])
    ]
    elements, sizes = summed("elements"), summed("sizes")
    forces = np.concatenate([force for column in columns for force in column.forces])
    lengths = np.linalg.norm(forces, axis=1)
    lines = [
        markdown_table(["", *names], amounts),
        "",
        markdown_table(["`data_id`", *names], by_domain),
        "",
        "Structures with each element: " + listed(elements, lambda e: -elements[e]) + ".",
        "Charges: " + listed(summed("charges"), int) + ".",
        "Multiplicities: " + listed(summed("multiplicities"), int) + ".",
        (
            f"Atoms a structure: {min(sizes)} to {max(sizes)}, "
            f"{sum(c.atoms for c in columns) / sizes.total():.1f} in the mean."
        ),
        (
            f"Forces: root mean square {np.sqrt((forces**2).mean()):.2f} eV/Å a component, "
            f"99 % of the atoms below {np.quantile(lengths, 0.99):.1f} eV/Å, "
            f"none above {lengths.max():.1f}."
        ),
    ]
    absent = {
        split: sorted(set(elements) - set(column.elements), key=atomic_numbers.__getitem__)
        for split, column in splits.items()
    }
    for split, missing in absent.items():
        if missing:
            lines.append(f"Not in {split}: {', '.join(missing)}.")
    lines += [f"Checksum of {split}: `{column.checksum}`." for split, column in splits.items()]
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `allscaip-lite data describe`."""
    parser.add_argument("data", type=Path, help="folder of a data set, or an .aselmdb file")


def run(args: argparse.Namespace) -> int:
    """`allscaip-lite data describe`: print the tables; the exit status."""
    splits = {
        split: summarise(
            data[index] for index in tqdm(range(len(data)), desc=split, delay=SLOW, leave=False)
        )
        for split, data in read_splits(args.data).items()
    }
    empty = [split for split, summary in splits.items() if not summary.structures]
    if empty:
        raise DataError(f"{args.data}: no structures in {', '.join(empty)}")
    print(to_markdown(splits))
    return 0
