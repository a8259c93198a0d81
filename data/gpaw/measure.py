"""How far CHGNet is from the labels of `data/gpaw`.

    python data/gpaw/measure.py data/gpaw/test.aselmdb

In: data with stress. Out: errors of forces, stress and, from 100 structures on, energies after one
of each element is fitted (CHGNet's have another zero), by kind of structure, in the table of
`allscaip-lite evaluate`, which does the same for a model of this package.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from ase import units
from ase.stress import voigt_6_to_full_3x3_stress

from allscaip_lite.cli import run_script
from allscaip_lite.data.aselmdb import Dataset
from allscaip_lite.evaluation.errors import (
    GROUPS,
    MIN_STRUCTURES,
    Residuals,
    by_group,
    describe,
    fit_references,
    table,
)
from allscaip_lite.labels.chgnet import results_of


def chgnet_residuals(data: Dataset) -> Residuals:
    """CHGNet's errors, in the order of the data; see `Residuals` for the units."""
    energies, forces, stresses = [], [], []
    for index in range(len(data)):
        atoms = data[index]
        [found] = results_of([atoms])
        energies.append(1e3 * (found["energy"] - atoms.get_potential_energy()) / len(atoms))
        forces.append(torch.as_tensor(1e3 * (found["forces"] - atoms.get_forces())))
        stress = (found["stress"] - atoms.get_stress()) / units.bar
        stresses.append(voigt_6_to_full_3x3_stress(stress))
    return Residuals(torch.tensor(energies), forces, torch.as_tensor(np.array(stresses)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", nargs="+", type=Path, help=".aselmdb files, or folders of them")


def run(args: argparse.Namespace) -> None:
    data = Dataset(args.data)
    described = describe(data)
    found = chgnet_residuals(data)
    if len(described) >= MIN_STRUCTURES:
        found = fit_references(described, found)
    else:
        found = found._replace(energies=torch.full_like(found.energies, torch.nan))
    print(table(by_group(described, found, GROUPS["domain"])))


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(
        add_arguments,
        run,
        script="data/gpaw/measure.py",
        description=__doc__,
        stopped="nothing was kept",
        argv=argv,
    )


if __name__ == "__main__":
    sys.exit(main())
