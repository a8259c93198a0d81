"""How far a model is from its labels: `allscaip-lite evaluate`.

In: a model and a data set in OMol25's format. Out: mean absolute (MAE) and root mean square (RMSE)
errors of the energy in meV/atom and of force components in meV/Å, overall and by domain.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from allscaip_lite.batches import in_order
from allscaip_lite.checkpoint import load_model, read_card, save_model
from allscaip_lite.data import Dataset
from allscaip_lite.model import AllScAIP


@torch.no_grad()
def residuals(
    model: AllScAIP, data: Dataset, max_atoms: int = 400, progress: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """Predicted minus labelled: energies (S,) in meV/atom, and forces, S of (n, 3), in meV/Å."""
    model.eval()
    energies, forces = [], []
    with tqdm(total=len(data), unit="structures", disable=not progress) as bar:
        for batch in in_order(data, max_atoms):
            energy, force, _ = model(batch.structures, create_graph=False)
            natoms = batch.structures.natoms
            energies.append(1e3 * (energy.cpu() - batch.energy) / natoms)
            forces.extend((1e3 * (force.cpu().double() - batch.forces)).split(natoms.tolist()))
            bar.update(len(natoms))
    return torch.cat(energies), forces


def summary(energies: Tensor, forces: Sequence[Tensor]) -> dict[str, float]:
    """MAE and RMSE of residuals, in their units, and the number of structures."""
    flat = torch.cat([force.flatten() for force in forces])
    return {
        "structures": len(energies),
        "energy_mae": energies.abs().mean().item(),
        "energy_rmse": energies.square().mean().sqrt().item(),
        "force_mae": flat.abs().mean().item(),
        "force_rmse": flat.square().mean().sqrt().item(),
    }


def evaluate(model: AllScAIP, data: Dataset) -> dict[str, float]:
    """`summary` of a whole data set."""
    return summary(*residuals(model, data))


def by_domain(
    data: Dataset, energies: Tensor, forces: Sequence[Tensor]
) -> dict[str, dict[str, float]]:
    """`summary` of each `data_id` that occurs, and of `all`."""
    domains: dict[str, list[int]] = {}
    for index in range(len(data)):
        domains.setdefault(str(data[index].info.get("data_id", "unknown")), []).append(index)
    rows = {
        name: summary(energies[members], [forces[i] for i in members])
        for name, members in sorted(domains.items())
    }
    return {**rows, "all": summary(energies, forces)}


def table(rows: dict[str, dict[str, float]]) -> str:
    """A markdown table of `by_domain`."""
    lines = [
        "| domain | structures | energy MAE | RMSE (meV/atom) | force MAE | RMSE (meV/Å) |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        numbers = [f"{row[key]:.1f}" for key in list(row)[1:]]
        lines.append(f"| {name} | {row['structures']} | " + " | ".join(numbers) + " |")
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
    rows = by_domain(data, *residuals(model, data, progress=True))
    print(table(rows))
    if args.save:
        card: dict[str, Any] = {
            **read_card(args.model),
            "errors": rows,
            "errors_on": ", ".join(path.name for path in args.data),
            "units": "energy meV/atom, forces meV/Å (components)",
            "measured_with": f"torch {torch.__version__}, {platform.machine()}, {device}",
        }
        if args.note:
            card["trained"] = args.note
        save_model(model, args.save, card)
        print(f"written: {args.save}")
