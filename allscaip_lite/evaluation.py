"""How far a model is from its labels: `allscaip-lite evaluate`.

In: a model and a data set in OMol25's format. Out: mean absolute (MAE) and root mean square (RMSE)
errors of the energy in meV/atom, of force components in meV/Å, and, where there are such labels, of
the stress in bar, overall and by domain.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ase import units
from torch import Tensor
from tqdm import tqdm

from allscaip_lite.batches import in_order
from allscaip_lite.checkpoint import load_model, read_card, save_model
from allscaip_lite.data import Dataset
from allscaip_lite.model import AllScAIP


class Residuals(NamedTuple):
    """Predicted minus labelled, of S structures: energies (S,) in meV/atom, forces, S of (n, 3), in
    meV/Å, and stresses (S, 3, 3) in bar, not a number where a structure or the model has none."""

    energies: Tensor
    forces: list[Tensor]
    stresses: Tensor


@torch.no_grad()
def residuals(
    model: AllScAIP, data: Dataset, max_atoms: int = 400, progress: bool = False
) -> Residuals:
    """Of a whole data set, in its order."""
    model.eval()
    energies, forces, stresses = [], [], []
    with tqdm(total=len(data), unit="structures", disable=not progress) as bar:
        for batch in in_order(data, max_atoms):
            energy, force, stress = model(batch.structures, create_graph=False)
            natoms = batch.structures.natoms
            energies.append(1e3 * (energy.cpu() - batch.energy) / natoms)
            forces.extend((1e3 * (force.cpu().double() - batch.forces)).split(natoms.tolist()))
            missing = torch.full_like(batch.stress, torch.nan)
            stress = missing if stress is None else stress.cpu() - batch.stress
            stresses.append(stress.double() / units.bar)
            bar.update(len(natoms))
    return Residuals(torch.cat(energies), forces, torch.cat(stresses))


def summary(found: Residuals) -> dict[str, float]:
    """MAE and RMSE in the units of `Residuals`, and the number of structures.

    Of stresses, where there are any, the MAE of the components and of the pressure.
    """
    flat = torch.cat([force.flatten() for force in found.forces])
    row = {
        "structures": len(found.energies),
        "energy_mae": found.energies.abs().mean().item(),
        "energy_rmse": found.energies.square().mean().sqrt().item(),
        "force_mae": flat.abs().mean().item(),
        "force_rmse": flat.square().mean().sqrt().item(),
    }
    known = found.stresses[found.stresses.isfinite().all(2).all(1)]
    if len(known):
        row["stress_mae"] = known.abs().mean().item()
        row["pressure_mae"] = (known.diagonal(dim1=1, dim2=2).mean(1)).abs().mean().item()
    return row


def evaluate(model: AllScAIP, data: Dataset) -> dict[str, float]:
    """`summary` of a whole data set."""
    return summary(residuals(model, data))


def by_domain(data: Dataset, found: Residuals) -> dict[str, dict[str, float]]:
    """`summary` of each `data_id` that occurs, and of `all`."""
    domains: dict[str, list[int]] = {}
    for index in range(len(data)):
        domains.setdefault(str(data[index].info.get("data_id", "unknown")), []).append(index)
    rows = {}
    for name, members in sorted(domains.items()):
        forces = [found.forces[i] for i in members]
        rows[name] = summary(Residuals(found.energies[members], forces, found.stresses[members]))
    return {**rows, "all": summary(found)}


COLUMNS = {
    "energy_mae": "energy MAE",
    "energy_rmse": "RMSE (meV/atom)",
    "force_mae": "force MAE",
    "force_rmse": "RMSE (meV/Å)",
    "stress_mae": "stress MAE",
    "pressure_mae": "pressure MAE (bar)",
}


def table(rows: dict[str, dict[str, float]]) -> str:
    """A markdown table of `by_domain`; a domain without stresses has dashes there."""
    columns = [name for name in COLUMNS if any(name in row for row in rows.values())]
    lines = [
        f"| domain | structures | {' | '.join(COLUMNS[name] for name in columns)} |",
        "|---|---:|" + "---:|" * len(columns),
    ]
    for name, row in rows.items():
        numbers = [f"{row[column]:.1f}" if column in row else "–" for column in columns]
        lines.append(f"| {name} | {row['structures']} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a name such as lite, or a file (.safetensors or .pt)")
    parser.add_argument("data", type=Path, nargs="+", help=".aselmdb files, or folders of them")
    parser.add_argument("--device", help="default: a CUDA GPU where there is one")
    parser.add_argument(
        "--save", type=Path, help="write the model here, with the errors in its card (.safetensors)"
    )
    parser.add_argument("--note", default="", help="a line for that card: how it was trained")


def run(args: argparse.Namespace) -> None:
    """`allscaip-lite evaluate`."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(args.model, device=device).requires_grad_(False)
    data = Dataset(args.data)
    rows = by_domain(data, residuals(model, data, progress=True))
    print(table(rows))
    if args.save:
        card: dict[str, Any] = {
            **read_card(args.model),
            "errors": rows,
            "errors_on": ", ".join(path.name for path in args.data),
            "units": "energy meV/atom, forces meV/Å and stress bar (components)",
            "measured_with": f"torch {torch.__version__}, {platform.machine()}, {device}",
        }
        if args.note:
            card["trained"] = args.note
        save_model(model, args.save, card)
        print(f"written: {args.save}")
