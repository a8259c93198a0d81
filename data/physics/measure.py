"""Differences of energy that chemists ask for: how a model does on `data/physics`.

    python data/physics/measure.py lite-xtb

A task is a set of groups, and a group some structures that differ in one thing: the conformer, a
proton, the charge, the spin, the distance of two molecules. What is evaluated is the energy of each
relative to the first of its group; errors that all of them share cancel. Tasks are those of
OMol25's evaluations (D. S. Levine et al., arXiv:2505.08762, section on evaluations), in small:

- `conformers`: minima of one molecule, against the lowest;
- `protonation`: a molecule with a proton more or less, against the neutral one and a bare proton;
- `ionisation`: charge +1 and −1 at the geometry of the neutral molecule;
- `spin_gap`: triplet and singlet at one geometry;
- `short_range`, `long_range`: two molecules, closest atoms up to and beyond 6 Å apart, against
  their minimum.

In: a model, and data such as `data/physics`, whose structures name their task (`info["data_id"]`)
and their group (`info["group"]`). Out: errors of the differences, by task.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from allscaip_lite.checkpoints import load_model
from allscaip_lite.cli import run_script
from allscaip_lite.data.aselmdb import Dataset
from allscaip_lite.data.batches import in_order
from allscaip_lite.errors import DataError
from allscaip_lite.kernels import add_kernels_option
from allscaip_lite.machine import usable_device
from allscaip_lite.model import AllScAIP
from allscaip_lite.tables import markdown_table

# eV, a bare proton's energy in GFN2-xTB, η/2 + Γ/3 of hydrogen (Bannwarth et al., 2019); without
# electrons it is zero in DFT
GFN2_PROTON = 6.2464


class Difference(NamedTuple):
    """The energy of one structure against the first of its group, in eV."""

    task: str
    group: str
    truth: float
    predicted: float
    xtb: float  # GFN2-xTB's; not a number where the data do not keep it


@torch.no_grad()
def differences(
    model: AllScAIP, data: Dataset, max_atoms: int = 400, proton: float = 0.0
) -> list[Difference]:
    """Of every structure of a data set but the first ones of their groups.

    `proton`: the energy (eV) of a bare proton at the level of theory that the model has learned,
    where it is another one than that of the labels: `GFN2_PROTON` for a model of GFN2-xTB against
    labels by DFT. From GFN2-xTB's own energies it is subtracted in any case.

    `info["data_id"]` is the task of a structure and `info["group"]` its group; the first of a group
    is the one that the others are compared with. Raises DataError where these are missing, or where
    a group has one structure only.
    """
    model.eval()
    batches = in_order(data, max_atoms)
    energies = [model(b.structures, create_graph=False).energy.cpu() for b in batches]
    predicted = torch.cat(energies).tolist()
    groups: dict[tuple[str, str], list[tuple[float, float, float]]] = defaultdict(list)
    sizes: dict[tuple[str, str], int] = {}
    for index, energy in enumerate(predicted):
        atoms = data[index]
        if not {"group", "data_id"} <= set(atoms.info):
            raise DataError(
                f"structure {index} has no `group` and `data_id` in its info; "
                "data/physics/make.py makes data that do"
            )
        key = atoms.info["data_id"], atoms.info["group"]
        truth, xtb = atoms.get_potential_energy(), atoms.info.get("xtb_energy", np.nan)
        protons = len(atoms) - sizes.setdefault(key, len(atoms))  # more than the first one has
        if not np.isclose(xtb, truth, rtol=0, atol=1e-6):
            xtb -= protons * GFN2_PROTON
        groups[key].append((truth, energy - protons * proton, xtb))
    lonely = [group for (_, group), members in groups.items() if len(members) < 2]
    if lonely:
        raise DataError(f"groups of one structure, nothing to compare: {', '.join(lonely[:5])}")
    return [
        Difference(*key, *(value - base for value, base in zip(member, members[0], strict=True)))
        for key, members in groups.items()
        for member in members[1:]
    ]


def summary(found: Sequence[Difference]) -> dict[str, dict[str, float]]:
    """By task: how many groups and differences, their mean size, the MAE of the model and, where
    GFN2-xTB is not the truth itself, GFN2-xTB's, all in meV.
    """
    rows = {}
    for task in dict.fromkeys(one.task for one in found):
        chosen = [one for one in found if one.task == task]
        truth, predicted, xtb = (
            1e3 * np.array([getattr(one, name) for one in chosen])
            for name in ("truth", "predicted", "xtb")
        )
        rows[task] = {
            "groups": len({one.group for one in chosen}),
            "differences": len(chosen),
            "size": float(np.abs(truth).mean()),
            "mae": float(np.abs(predicted - truth).mean()),
        }
        if np.isfinite(xtb).all() and not np.allclose(xtb, truth, atol=1e-3):
            rows[task]["xtb_mae"] = float(np.abs(xtb - truth).mean())
    return rows


def table(rows: dict[str, dict[str, float]]) -> str:
    """A markdown table of `summary`."""
    with_xtb = any("xtb_mae" in row for row in rows.values())
    head = ["task", "groups", "differences", "mean size (meV)", "MAE (meV)"]
    head += ["GFN2-xTB's MAE (meV)"] if with_xtb else []
    names = ["groups", "differences", "size", "mae", *(["xtb_mae"] if with_xtb else [])]
    return markdown_table(
        head,
        [
            [task, *(f"{row[name]:.0f}" if name in row else "–" for name in names)]
            for task, row in rows.items()
        ],
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a name such as lite, or a file (.safetensors or .pt)")
    parser.add_argument(
        "data",
        type=Path,
        nargs="?",
        default=Path(__file__).with_name("test.aselmdb"),
        help="an .aselmdb file (default: that beside this script)",
    )
    parser.add_argument(
        "--proton",
        type=float,
        default=0.0,
        metavar="EV",
        help="where model and labels are of different levels of theory: a bare proton's energy at "
        "the model's (GFN2-xTB's is 6.2464 eV, that of DFT 0)",
    )
    parser.add_argument("--device", help="default: a CUDA GPU where there is one")
    add_kernels_option(parser)


def run(args: argparse.Namespace) -> None:
    model = load_model(args.model, device=usable_device(args.device), kernels=args.kernels)
    found = differences(model.requires_grad_(False), Dataset(args.data), proton=args.proton)
    print(table(summary(found)))


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(
        add_arguments,
        run,
        script="data/physics/measure.py",
        description=__doc__,
        stopped="nothing was kept",
        argv=argv,
    )


if __name__ == "__main__":
    sys.exit(main())
