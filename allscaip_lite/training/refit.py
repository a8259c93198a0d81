"""The last layer once more, by least squares, after training.

In: a conservative model and labelled structures. Out: the same model with other weights in its very
last layer. Energies, forces and stresses are all linear in those, so the best ones are the solution
of a linear problem, without steps, rates or the noise of small batches. Training weighs a box of a
liquid by a few structures at a time, and what is off by a tenth of a meV an atom, but the same way
in all thin boxes, drowns in that noise; here it does not.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from allscaip_lite.checkpoints import load_model, read_card, save_model
from allscaip_lite.checkpoints.native import check_file_name
from allscaip_lite.data.aselmdb import Dataset, Subset, evenly_spaced
from allscaip_lite.electrons import Assumptions, say_assumptions
from allscaip_lite.errors import InputError
from allscaip_lite.evaluation.errors import check_zero
from allscaip_lite.files import locked_file
from allscaip_lite.kernels import add_kernels_option, choose
from allscaip_lite.machine import usable_device
from allscaip_lite.model import AllScAIP, check_model
from allscaip_lite.structures import in_own_numbers, structures_from_atoms

FLOOR = 1e-4  # eV an atom, eV/Å: errors below it count by their square
ROUNDS = 30  # of reweighting
RIDGE = 1e-6  # of the mean square of a column
KINDS = {"energy": "meV/atom", "forces": "meV/Å", "pressure times volume": "meV/atom"}


class Rows(NamedTuple):
    """What a change of the last layer does (R, 2H + 1), and what is missing (R,), row by row."""

    features: np.ndarray
    missing: np.ndarray


class Refit(NamedTuple):
    """The changed model, and mean absolute errors on its data by `KINDS`, before and after."""

    model: AllScAIP
    before: dict[str, float]
    after: dict[str, float]


@torch.inference_mode(mode=False)
@in_own_numbers
def refit(
    model: AllScAIP,
    data: Dataset | Subset,
    *,
    energy_weight: float = 600.0,
    force_weight: float = 20.0,
    stress_weight: float | None = None,
    seed: int = 0,
    kernels: str = "auto",
    progress: bool = True,
) -> Refit:
    """A copy of a conservative model whose last layer has the least loss on `data`.

    The loss is training's (`training.Stage`), of means of absolute errors: the linear problem is
    solved again with weights 1/|error| until it is that one (Schlossmacher, J. Am. Stat. Assoc. 68,
    857, 1973). The forces of a structure count along one random direction of all its atoms.

    Args:
        model: conservative; it stays as it is.
        data: labelled structures, more than the layer has weights.
        energy_weight: of energies in the loss.
        force_weight: of forces in the loss.
        stress_weight: of stresses in the loss; by default 100, of data that have them.
        seed: of the directions of forces.
        kernels: how the model computes, see `allscaip_lite.kernels`.
        progress: whether to show a progress bar.

    Returns:
        The changed model, and errors before and after.

    Raises:
        InputError: for a direct model, for fewer structures than weights, for a stress weight
            where no structure has a stress, and for energies of another level of theory.
    """
    check_model(model)
    if not model.config.conservative:
        raise InputError("a direct model's forces do not follow from its energy: train it")
    if min(energy_weight, force_weight, stress_weight or 0) < 0:
        raise InputError("a weight of the loss is negative: give 0 or more")
    size = model.energy_head.contract.weight.numel() + 1
    if len(data) < size:
        raise InputError(f"{len(data)} structures are too few for {size} weights: give more")
    kinds = dict(zip(KINDS, measure(model, data, seed, kernels, progress), strict=True))
    check_zero(torch.from_numpy(kinds["energy"].missing), model)
    kinds = {name: rows for name, rows in kinds.items() if len(rows.missing)}
    if stress_weight is not None and "pressure times volume" not in kinds:
        raise InputError(f"stress weight {stress_weight:g}, but no structure has a stress")
    stress_weight = 100.0 if stress_weight is None else stress_weight
    weights = dict(zip(KINDS, (energy_weight, force_weight, stress_weight), strict=True))
    step = solve([(rows, weights[name]) for name, rows in kinds.items()])
    changed = copy.deepcopy(model)
    changed.posterior = None  # of other weights
    layer = changed.energy_head.contract
    added = torch.from_numpy(step).to(layer.weight)
    with torch.no_grad():
        layer.weight.add_(added[:-1])
        layer.bias.add_(added[-1])
    before, after = (
        {
            name: float(1000 * np.abs(rows.missing - rows.features @ change).mean())
            for name, rows in kinds.items()
        }
        for change in (np.zeros_like(step), step)
    )
    return Refit(changed, before, after)


def measure(
    model: AllScAIP,
    data: Dataset | Subset,
    seed: int = 0,
    kernels: str = "auto",
    progress: bool = True,
) -> tuple[Rows, Rows, Rows]:
    """Rows of energies (eV an atom), forces (eV/Å) and pressures (times volume, eV an atom).

    With Φ, the sum of the layer's inputs over the atoms, a change u of its weights changes the
    energy by u·Φ, hence a force along v by -u·(∂Φ/∂x v). That product costs no Jacobian: it is the
    derivative by u of the gradient of u·Φ along v.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    model.operations = choose(kernels, model.device, model.dtype)
    layer = model.energy_head.contract
    weights = layer.weight[0].double()  # as they are: what they say of a row is row · weights
    energy_scale, force_scale = float(model.energy_scale), float(model.force_scale)
    generator = torch.Generator().manual_seed(seed)
    found: tuple[list[tuple[list[float], float]], ...] = ([], [], [])

    def keep(kind: int, row: Tensor, bias: float, missing: float) -> None:
        found[kind].append(([*row.tolist(), bias], missing))

    assumed: Assumptions = {}
    for index in tqdm(range(len(data)), unit="structures", disable=not progress):
        atoms = data[index]
        count, results = len(atoms), atoms.calc.results
        device = layer.weight.device
        structures = structures_from_atoms(atoms, model.dtype, device, assumed=assumed)
        positions = structures.positions.detach().requires_grad_()
        strain = positions.new_zeros(1, 3, 3).requires_grad_()
        moved = structures.replace(positions=positions)
        boxed = bool(atoms.pbc.any()) and "stress" in results and model.config.stress
        moved = moved.strained(strain) if boxed else moved
        hidden = model.energy_head.hidden(model.features(moved))  # (N, 2H)
        atomic = layer(hidden).squeeze(1)
        total = hidden.sum(0)  # (2H,): Φ
        change = torch.zeros_like(total).requires_grad_()
        variables = [positions, strain] if boxed else [positions]
        gradients = torch.autograd.grad(total @ change, variables, create_graph=True)

        def derivative(value: Tensor, change: Tensor = change) -> Tensor:
            return torch.autograd.grad(value, change, retain_graph=True)[0].double()

        energy = float(model.in_electronvolts(atomic.detach(), structures))
        row = total.detach().double() * energy_scale / count
        keep(0, row, energy_scale, (results["energy"] - energy) / count)
        way = torch.randn(positions.shape, generator=generator).to(positions)
        way *= 3**0.5 / way.norm()  # so that |ΔF·way| is about the root mean square of ‖ΔF‖
        row = -derivative((gradients[0] * way).sum()) * force_scale
        along = float((torch.from_numpy(results["forces"]).to(way) * way).sum())
        keep(1, row, 0.0, along - float(row @ weights))
        if boxed:
            # the mean of three components times the volume, which is the derivative by a strain
            row = derivative(gradients[1].diagonal(dim1=1, dim2=2).sum()) * energy_scale / 3 / count
            stress = results["stress"][:3].mean() * atoms.get_volume() / count
            keep(2, row, 0.0, float(stress) - float(row @ weights))
    say_assumptions(assumed)
    width = layer.weight.numel() + 1
    kinds = []
    for rows in found:
        features = np.array([row for row, _ in rows], float).reshape(-1, width)
        kinds.append(Rows(features, np.array([missing for _, missing in rows], float)))
    return kinds[0], kinds[1], kinds[2]


def solve(kinds: list[tuple[Rows, float]]) -> np.ndarray:
    """The change (2H + 1,) with the least Σ weight · mean |missing - features · change|."""
    features = np.concatenate([rows.features for rows, _ in kinds])
    missing = np.concatenate([rows.missing for rows, _ in kinds])
    weights = np.concatenate(
        [np.full(len(rows.missing), weight / len(rows.missing)) for rows, weight in kinds]
    )
    change = np.zeros(features.shape[1])
    for _ in range(ROUNDS):
        share = weights / np.maximum(np.abs(missing - features @ change), FLOOR)
        weighted = features.T * share
        normal = weighted @ features
        normal += RIDGE * np.trace(normal) / len(normal) * np.eye(len(normal))
        change = np.linalg.solve(normal, weighted @ missing)
    return change


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `allscaip-lite refit`."""
    parser.add_argument("model", help="a bundled name or a .safetensors file")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="training .aselmdb")
    parser.add_argument("--out", type=Path, required=True, help="the model to write (.safetensors)")
    parser.add_argument(
        "--structures",
        type=int,
        default=2000,
        help="so many, evenly spaced, are enough: there are a few hundred weights (2000)",
    )
    parser.add_argument(
        "--weights",
        type=float,
        nargs=2,
        default=(600.0, 20.0),
        metavar=("ENERGY", "FORCES"),
        help="in the loss, as in training (600 20)",
    )
    parser.add_argument(
        "--stress-weight", type=float, help="likewise (100, where the data have stresses)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the directions of forces")
    add_kernels_option(parser)
    parser.add_argument("--device", help="cuda where there is one, else cpu")


def run(args: argparse.Namespace) -> None:
    """`allscaip-lite refit`."""
    check_file_name(args.out, f"--out {args.out}")
    with locked_file(args.out):
        device = usable_device(args.device)
        model = load_model(args.model, device=device, kernels="plain")  # `measure` chooses
        whole = Dataset(args.data)
        data = Subset(whole, evenly_spaced(len(whole), args.structures))
        energy, force = args.weights
        weights = {
            "energy_weight": energy,
            "force_weight": force,
            "stress_weight": args.stress_weight,
        }
        found = refit(model, data, **weights, seed=args.seed, kernels=args.kernels)
        save_model(found.model, args.out, read_card(args.model))
        for name, before in found.before.items():
            print(f"{name:22s} {before:8.3f} → {found.after[name]:8.3f} {KINDS[name]}")
        print(f"written: {args.out}; `allscaip-lite evaluate` says how it does on other structures")
