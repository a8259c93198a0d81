"""What a model saw and how sure its last layer is, of its training data: `allscaip-lite calibrate`.

In: a trained model and the data that it was trained on. Out: the same weights in a new file, with
what the data have in them (`applicability.Seen`) and the posterior of the last layer, from which
`predict(..., uncertainty=True)` has its standard deviations.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from allscaip_lite.applicability import Seen
from allscaip_lite.checkpoints import load_model, read_card, save_model
from allscaip_lite.checkpoints.native import check_file_name
from allscaip_lite.data.aselmdb import Dataset, LabelledData, Subset, evenly_spaced
from allscaip_lite.data.batches import collate, fill_batches
from allscaip_lite.errors import InputError
from allscaip_lite.evaluation.errors import check_zero
from allscaip_lite.files import locked_file
from allscaip_lite.kernels import add_kernels_option
from allscaip_lite.machine import usable_device
from allscaip_lite.model import AllScAIP, check_model
from allscaip_lite.structures import in_own_numbers

RIDGE = 1e-6  # of the mean diagonal, for directions that no structure of the data has


@torch.no_grad()
def energy_rows(
    model: AllScAIP, data: LabelledData, progress: bool = False
) -> tuple[Tensor, Tensor]:
    """What the last layer reads of each structure (S, 2H + 1), an atom, in eV a unit of weight; and
    what is missing of its energy (S,), in eV an atom.
    """
    layer = model.energy_head.contract  # in which the energy is linear: no forces are needed
    weights = torch.cat([layer.weight[0], layer.bias]).double()
    rows, missing = [], []
    with tqdm(total=len(data), unit="structures", disable=not progress) as bar:
        for members in fill_batches(data.natoms, 400):
            batch = collate([data[index] for index in members])
            natoms = batch.structures.natoms
            inputs = model.last_layer_inputs(batch.structures)
            structures = batch.structures.to(model.device)
            nothing = torch.zeros_like(structures.atomic_numbers)
            energy = inputs @ weights + model.in_electronvolts(nothing, structures)
            rows.append(inputs.cpu() / natoms[:, None])
            missing.append((batch.energy - energy.cpu()) / natoms)
            bar.update(len(members))
    return torch.cat(rows), torch.cat(missing)


def posterior(rows: Tensor, missing: Tensor, held_out: tuple[Tensor, Tensor] | None) -> Tensor:
    """The lower factor (2H + 1, 2H + 1) of the covariance of the last layer's weights.

    Of Bayesian linear regression with the training's own root mean square error as the noise (C. M.
    Bishop, Pattern Recognition and Machine Learning, 2006, section 3.3).

    Args:
        rows: as `energy_rows` has them, of the training data.
        missing: likewise.
        held_out: the same of other data, whose errors then set the size of all deviations.
    """
    normal = rows.T @ rows
    normal += RIDGE * normal.trace() / len(normal) * torch.eye(len(normal), dtype=normal.dtype)
    factor = torch.linalg.cholesky(torch.linalg.inv(normal)) * missing.square().mean().sqrt()
    if held_out is None:
        return factor
    deviations = torch.linalg.vector_norm(held_out[0] @ factor, dim=1)
    return factor * (held_out[1] / deviations).square().mean().sqrt()


@torch.inference_mode(mode=False)
@in_own_numbers
def calibrate(
    model: AllScAIP,
    data: LabelledData,
    held_out: LabelledData | None = None,
    structures: int = 5000,
    progress: bool = True,
) -> AllScAIP:
    """A copy of a model with `seen` and `posterior` of its training data.

    Args:
        model: it stays as it is.
        data: what it was trained on.
        held_out: labelled structures that it was not trained on; their errors set the size of all
            deviations, which is too small otherwise.
        structures: so many of the data, evenly spaced, for the posterior; 0: no posterior.
        progress: whether to show progress bars.

    Raises:
        InputError: for fewer structures than the layer has weights, and for energies that are of
            another level of theory than the model's.
    """
    check_model(model)
    made = copy.deepcopy(model).eval()
    seen = Seen()
    for members in tqdm(
        list(fill_batches(data.natoms, 2000)), desc="what training saw", disable=not progress
    ):
        seen.add(collate([data[index] for index in members]).structures)
    seen.leave_out_cells(model.config.node_attention)
    made.seen = seen
    made.posterior = None
    if not structures:
        return made
    chosen = Subset(data, evenly_spaced(len(data), structures))  # type: ignore[arg-type]
    size = model.energy_head.contract.weight.numel() + 1
    if len(chosen) < size:
        raise InputError(f"{len(chosen)} structures are too few for {size} weights: give more")
    rows, missing = energy_rows(made, chosen, progress=progress)
    check_zero(missing, model)
    others = None if held_out is None else energy_rows(made, held_out, progress=progress)
    made.posterior = posterior(rows, missing, others)
    return made


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `allscaip-lite calibrate`."""
    parser.add_argument("model", help="a bundled name or a .safetensors file")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="training .aselmdb")
    parser.add_argument(
        "--val", type=Path, nargs="+", help="data that it was not trained on: sets the size"
    )
    parser.add_argument("--out", type=Path, required=True, help="the model to write (.safetensors)")
    parser.add_argument(
        "--structures", type=int, default=5000, help="for the uncertainty (0: none); seen are all"
    )
    parser.add_argument(
        "--also-seen",
        type=Path,
        metavar="FILE",
        help="JSON of what data that are not here had in them, with the names that `info` shows",
    )
    add_kernels_option(parser)
    parser.add_argument("--device", help="cuda where there is one, else cpu")


def run(args: argparse.Namespace) -> None:
    """`allscaip-lite calibrate`."""
    check_file_name(args.out, f"--out {args.out}")
    with locked_file(args.out):
        device = usable_device(args.device)
        model = load_model(args.model, device=device, kernels=args.kernels).requires_grad_(False)
        held_out = Dataset(args.val) if args.val else None
        made = calibrate(model, Dataset(args.data), held_out, args.structures)
        if args.also_seen and made.seen is not None:
            known = {
                name: value for name, value in made.seen.to_dict().items() if value is not None
            }
            try:
                made.seen.merge(Seen.from_dict(known | json.loads(args.also_seen.read_text())))
            except (RecursionError, TypeError, ValueError) as error:
                raise InputError(
                    f"--also-seen {args.also_seen}: not what `info` shows ({error})"
                ) from error
        save_model(made, args.out, read_card(args.model))
        for name, value in (made.seen.to_dict() if made.seen else {}).items():
            print(f"{name}: {value}")
        print(f"written: {args.out}, with the weights of {args.model}")
