"""Training: direct forces first, then a conservative fine-tune of the same backbone.

In: data sets in OMol25's format. Out: a run folder with a log, a checkpoint that resumes to the
same numbers, and at the end a model with its card. The recipe is the reference's (paper section 4
and architecture notes): AdamW, warm-up and cosine, gradient clip, EMA, batches filled by atoms.
The loop runs on Lightning Fabric, so one CPU, one GPU or several nodes take the same path.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import lightning_fabric
import numpy as np
import torch
import torch.nn.functional as F
from ase.data import chemical_symbols
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from allscaip_lite.applicability import Seen
from allscaip_lite.checkpoints import load_model, save_model
from allscaip_lite.config import PRESETS, AllScAIPConfig
from allscaip_lite.data.aselmdb import (
    SLOW,
    Dataset,
    LabelledData,
    Mixture,
    Subset,
    data_fingerprint,
    evenly_spaced,
)
from allscaip_lite.data.batches import Batch, Batches, collate
from allscaip_lite.electrons import Assumptions, say_assumptions
from allscaip_lite.errors import DataError, InputError, RunError, StructureWarning
from allscaip_lite.evaluation.errors import check_zero, evaluate
from allscaip_lite.files import (
    alone,
    differing,
    fingerprint,
    read_state,
    restoring,
    store_state,
    store_text,
)
from allscaip_lite.graph import SLOT_STEP
from allscaip_lite.kernels import add_kernels_option, choose
from allscaip_lite.kernels.cuda_graphs import Recording
from allscaip_lite.kernels.padded import PaddedBatch, Size, can_pad, padded_prediction
from allscaip_lite.model import UNITS, AllScAIP, Prediction, check_model
from allscaip_lite.structures import in_own_numbers
from allscaip_lite.training.muon import Muon


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Loss weights multiply normalised errors: |ΔE|/N, ‖ΔF‖ and ‖Δσ‖V/N (V: volume), over rmsd.
    `interaction_weight` is that of |ΔE|/N of interaction energies, for the structures that say what
    is between their molecules (`allscaip_lite.data.batches.Fragments`).
    """

    name: str  # "direct" or "conservative"
    steps: int
    learning_rate: float
    energy_weight: float
    force_weight: float
    warmup: float = 0.02  # fraction of the steps
    final_fraction: float = 0.01  # of the learning rate, at the end of the cosine
    weight_decay: float = 1e-3
    clip: float = 100.0
    ema_decay: float = 0.999
    stress_weight: float = 0.0  # for structures that have a stress; conservative models only
    interaction_weight: float = 0.0
    muon: float = 0.0  # Muon's rate for the blocks' matrices, over learning_rate; 0: AdamW for all

    def __post_init__(self) -> None:
        weights = ("energy_weight", "force_weight", "stress_weight", "interaction_weight")
        for name in ("learning_rate", *weights, "muon"):
            value = getattr(self, name)
            if not 0 <= value < math.inf or (name == "learning_rate" and not value):
                least = "above 0" if name == "learning_rate" else "0 or more"
                raise RunError(f"{name} {value} of the {self.name} stage: give a number, {least}")
        if not any(getattr(self, name) for name in weights):
            raise RunError(f"all weights of the {self.name} stage are 0: nothing would be learned")

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, then a cosine down to `final_fraction`."""
        warmup = max(1, round(self.warmup * self.steps))
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, self.steps - warmup))
        cosine = (1 + math.cos(math.pi * progress)) / 2
        return self.learning_rate * (self.final_fraction + (1 - self.final_fraction) * cosine)


def direct_stage(steps: int, learning_rate: float = 8e-4) -> Stage:
    """The reference's first stage."""
    return Stage("direct", steps, learning_rate, energy_weight=10, force_weight=10)


def conservative_stage(
    steps: int,
    learning_rate: float = 4e-4,
    weights: tuple[float, float] = (40, 20),
    **others: float,
) -> Stage:
    """The reference's second stage; `weights` are those of energy and forces in the loss, `others`
    those of `Stage`.
    """
    return Stage("conservative", steps, learning_rate, *weights, **others)


def fit_units(
    data: LabelledData, max_num_elements: int, limit: int = 20_000
) -> tuple[Tensor, float]:
    """Energy references (max_num_elements,) eV by least squares, and the rms force in eV/Å.

    Of a data set of more than `limit` structures, evenly spaced ones are taken. Elements that do
    not occur keep the reference 0.
    """
    indices = evenly_spaced(len(data), limit)
    counts = np.zeros((len(indices), max_num_elements))
    energies = np.zeros(len(indices))
    squares, components = 0.0, 0
    progress = tqdm(indices, desc="fitting the energies of atoms", delay=SLOW, leave=False)
    for row, index in enumerate(progress):
        atoms = data[int(index)]
        counts[row] = np.bincount(atoms.numbers, minlength=max_num_elements)[:max_num_elements]
        energies[row] = atoms.calc.results["energy"]
        squares += float((atoms.calc.results["forces"] ** 2).sum())
        components += 3 * len(atoms)
    # a small ridge term, for elements whose counts are always in the same ratio
    gram = counts.T @ counts + 1e-6 * np.eye(max_num_elements)
    references = np.linalg.solve(gram, counts.T @ energies)
    return torch.as_tensor(references), math.sqrt(squares / components)


@torch.no_grad()
def missing_energies(model: AllScAIP, data: LabelledData, limit: int) -> tuple[Tensor, Tensor]:
    """Labels minus the model's energies, (S,) eV, of at most `limit` structures, evenly spaced; and
    what is in them, (S, max_num_elements + 1): atoms of each element, and last the charge.
    """
    indices = evenly_spaced(len(data), limit)
    counts = torch.zeros(len(indices), model.config.max_num_elements + 1, dtype=torch.float64)
    missing = torch.zeros(len(indices), dtype=torch.float64)
    progress = tqdm(indices, desc="comparing energies with labels", delay=SLOW, leave=False)
    for row, index in enumerate(progress):
        batch = collate([data[int(index)]])
        energy = model.atomic_energies(batch.structures).sum()  # needs no forces
        missing[row] = float(batch.energy) - float(energy)
        counts[row, :-1] = torch.bincount(
            batch.structures.atomic_numbers, minlength=model.config.max_num_elements
        )
        counts[row, -1] = float(batch.structures.charge)
    return missing, counts


@in_own_numbers
def shift_references(model: AllScAIP, data: LabelledData) -> Tensor:
    """Fit the model's energy references to data of another level of theory.

    The energy (eV) by which each element's reference moves, and last that of a unit of charge,
    (max_num_elements + 1,), is a least-squares fit of labels minus predictions, of at most 2,000
    structures, evenly spaced. What does not occur stays where it is. Levels of theory differ in
    what an electron costs, GFN2-xTB from density functionals by nearly 5 eV. Changes
    `model.element_references` and `model.charge_reference`; returns the shifts.
    """
    missing, counts = missing_energies(model, data, 2_000)
    gram = counts.T @ counts + 1e-6 * torch.eye(counts.shape[1], dtype=torch.float64)
    shifts = torch.linalg.solve(gram, counts.T @ missing)
    model.element_references += shifts[:-1].to(model.element_references)
    model.charge_reference += float(shifts[-1])
    return shifts


@in_own_numbers
def fresh_model(config: AllScAIPConfig, data: LabelledData, seed: int | None = None) -> AllScAIP:
    """A model with random weights, and with energies of elements and a force unit from the data.

    `seed` None takes the random numbers from torch's present state.
    """
    if seed is not None:
        torch.manual_seed(seed)
    model = AllScAIP(config)
    references, rms_force = fit_units(data, config.max_num_elements)
    if not rms_force > 0:
        raise DataError("all forces of the training data are zero: they are no labels to learn")
    model.element_references.copy_(references)
    model.energy_scale.fill_(rms_force)
    model.force_scale.fill_(rms_force)
    return model


def hold_out(data: Dataset, seed: int) -> tuple[Subset, Subset]:
    """A training and a validation part of one data set, the latter a tenth of it drawn at random.

    Raises InputError for a single structure.
    """
    if len(data) < 2:
        raise InputError("one structure cannot both train and validate a model: give more")
    order = np.random.default_rng(seed).permutation(len(data))
    held = max(1, round(0.1 * len(data)))
    return Subset(data, np.sort(order[held:])), Subset(data, np.sort(order[:held]))


def loss(
    prediction: Prediction,
    batch: Batch,
    model: AllScAIP,
    stage: Stage,
    real: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """energy_weight · mean |ΔE|/N + force_weight · mean ‖ΔF‖ + stress_weight · mean ‖Δσ‖V/N
    + interaction_weight · mean |Δ(E - Σ E of its molecules)|/N.

    Errors in units of the rmsd; stresses and interactions of the structures that have them.

    Args:
        prediction: of the batch.
        batch: structures with their labels.
        model: has the units, `energy_scale` and `force_scale`.
        stage: has the weights.
        real: which systems (B,) and atoms (N,) count, if some are padding.
    """
    systems, atoms = (None, None) if real is None else real
    natoms = batch.structures.natoms.clamp(min=1)
    per_atom = (prediction.energy - batch.energy).abs() / natoms
    energy = _mean(per_atom / model.energy_scale, systems)
    force = _mean(torch.linalg.vector_norm(prediction.forces - batch.forces, dim=1), atoms)
    value = stage.energy_weight * energy + stage.force_weight * force / model.force_scale
    if stage.stress_weight and prediction.stress is not None:
        known = batch.stress.isfinite().all(2).all(1)  # (B,)
        error = torch.where(known[:, None, None], prediction.stress - batch.stress, 0.0)
        scaled = torch.linalg.matrix_norm(error) * batch.structures.volume / natoms
        value = value + stage.stress_weight * _mean(scaled / model.energy_scale, known)
    if stage.interaction_weight and batch.fragments is not None:
        alone, interaction = batch.fragments.structures, batch.fragments.interaction
        whole = batch.fragments.whole[alone.system]  # of each atom
        apart = torch.zeros_like(interaction).index_add(0, whole, model.atomic_energies(alone))
        known = interaction.isfinite()  # before abs, whose slope at a NaN is one
        error = (prediction.energy - apart - interaction)[known].abs() / natoms[known]
        value = value + stage.interaction_weight * (error / model.energy_scale).mean()
    return value


def _mean(values: Tensor, real: Tensor | None) -> Tensor:
    """Of those that are real; 0 of none."""
    if real is None:
        return values.mean()
    return torch.where(real, values, 0.0).sum() / real.sum().clamp(min=1)


def make_optimizers(model: AllScAIP, stage: Stage) -> list[torch.optim.Optimizer]:
    """AdamW; weight decay on the matrices of linear layers only, as in the reference.

    With `stage.muon`, the matrices of the blocks are left to Muon (K. Jordan et al., 2024), whose
    steps turn a matrix alike in all its directions, sized as AdamW's are (arXiv:2502.16982).
    """
    blocks = {id(parameter) for parameter in model.blocks.parameters()}
    decayed, kept, turned = list[Tensor](), list[Tensor](), list[Tensor]()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                matrix = isinstance(module, nn.Linear) and name == "weight"
                inside = stage.muon > 0 and id(parameter) in blocks
                (turned if matrix and inside else decayed if matrix else kept).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": stage.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=stage.learning_rate)]
    if turned:
        muon = Muon(
            turned,
            lr=stage.learning_rate,
            weight_decay=stage.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        optimizers.append(muon)
        muon.param_groups[0]["times"] = stage.muon
    return optimizers


def set_rate(optimizers: Sequence[torch.optim.Optimizer], rate: float) -> None:
    """The learning rate of all parameters; Muon's is a multiple of it."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("times", 1.0)


def moving_average(decay: float) -> Callable[..., None]:
    """Exponential moving average (EMA) of the weights, for torch's `AveragedModel`.

    The decay climbs to `decay`, as (1 + n) / (10 + n) after n steps, so that a short run forgets
    the weights it began with.
    """

    def update(averages: list[Tensor], weights: list[Tensor], steps: Tensor) -> None:
        n = int(steps)
        now = min(decay, (1 + n) / (10 + n))
        torch.optim.swa_utils.get_ema_multi_avg_fn(now)(averages, weights, steps)

    return update


def batch_size(natoms: np.ndarray, max_atoms: int, config: AllScAIPConfig) -> Size:
    """The size of nearly all batches of up to `max_atoms` atoms; the others do not fit.

    natoms: how many atoms each structure of the data has.
    """
    longest = int(natoms.max())
    usual = max_atoms / float(natoms.mean())
    return Size(
        atoms=max_atoms,
        systems=math.ceil(usual + 4 * math.sqrt(usual) + 2),
        longest=longest,
        pairs=max_atoms * (longest - 1) // 2,
        slots=-(-(config.k + 3) // SLOT_STEP) * SLOT_STEP,
    )


def can_record(model: AllScAIP, data: LabelledData, fabric: lightning_fabric.Fabric) -> bool:
    """Whether steps can be recorded: on one CUDA GPU, of molecules, without dropout."""
    config = model.config
    still = max(config.ffn_dropout, config.attention_dropout) == 0
    alone = fabric.device.type == "cuda" and fabric.world_size == 1
    return alone and can_pad(config) and still and not data[0].pbc.any()


class RecordedLoss:
    """The loss of batches of one size, with its gradients by the weights: one recording."""

    def __init__(self, model: AllScAIP, stage: Stage, size: Size) -> None:
        self.model, self.stage, self.size = model, stage, size
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.recording: Recording | None = None
        self.pattern: PaddedBatch | None = None

    def __call__(self, batch: Batch) -> float | None:
        """The loss, whose gradients are the weights' then; None of a batch that does not fit."""
        if batch.padded is None:
            return None
        padded = batch.padded.to(self.model.device, self.model.dtype)
        systems, atoms = self.size.systems, self.size.atoms
        tensors = [
            F.pad(batch.energy, (0, systems - len(batch.energy))),
            F.pad(batch.forces, (0, 0, 0, atoms - len(batch.forces))),
            *padded.tensors(),
        ]
        if self.recording is None:
            self.pattern = padded
            self.recording = Recording(self._loss, tensors)
            self.gradients = [weight.grad for weight in self.weights]
        self.recording.set(tensors)
        value, overflow = self.recording().tolist()
        if self.recording.graph is not None:
            for weight, gradient in zip(self.weights, self.gradients, strict=True):
                weight.grad = gradient  # where the recording writes, whatever happened since
        return None if overflow else value

    def _loss(self, energy: Tensor, forces: Tensor, *tensors: Tensor) -> Tensor:
        """What is recorded: (2,), the loss and how many edges found no slot."""
        assert self.pattern is not None
        padded = self.pattern.like(list(tensors))
        prediction, overflow = padded_prediction(self.model, padded, self.size, create_graph=True)
        batch = Batch(padded.structures, energy, forces, energy.new_zeros(0))
        real = (padded.real_systems, padded.real_atoms)
        value = loss(prediction, batch, self.model, self.stage, real)
        # not backward(), for what adds up a weight's gradient may be left from a step that was not
        # recorded, and belong to another stream
        gradients = torch.autograd.grad(value, self.weights, allow_unused=True)
        for weight, gradient in zip(self.weights, gradients, strict=True):
            weight.grad = gradient
        return torch.stack([value.detach(), overflow.to(value.dtype)])


def start_stage(model: AllScAIP, stage: Stage) -> AllScAIP:
    """The model as a stage trains it: same backbone, direct or conservative heads."""
    conservative = stage.name == "conservative"
    if model.config.conservative == conservative:
        return model
    changed = AllScAIP(model.config.replace(conservative=conservative)).to(model.device)
    changed.load_state_dict(model.state_dict(), strict=False)  # the force head comes or goes
    changed.seen = model.seen
    return changed


@alone
@torch.inference_mode(mode=False)
@torch.enable_grad()
@in_own_numbers
def train(
    model: AllScAIP,
    stages: Sequence[Stage],
    training_data: LabelledData,
    validation_data: LabelledData,
    folder: Path,
    *,
    max_atoms: int = 350,
    seed: int = 0,
    validate_every: int = 500,
    save_every: int = 200,
    workers: int = 0,
    kernels: str = "auto",
    fabric: lightning_fabric.Fabric | None = None,
    watch: Callable[[Stage, int, float], None] | None = None,
) -> AllScAIP:
    """Train a model through the stages.

    Everything is kept in `folder`: `state.pt` to resume from, `log.jsonl`, `NAME.safetensors` at
    the end of each stage. Started again with the same arguments, a stopped run continues from its
    last checkpoint, to the same numbers.

    Args:
        model: the start; its weights change.
        stages: direct first, then conservative, or one of them.
        training_data: labelled structures.
        validation_data: labelled structures that it does not train on.
        folder: of the run; one with other settings, data, labels or another start is refused.
        max_atoms: atoms of a batch.
        seed: of the order of structures and of their rotations.
        validate_every: steps between validations.
        save_every: steps between checkpoints.
        workers: processes that read data.
        kernels: how the model computes, to the same numbers but for rounding, see
            `allscaip_lite.kernels`; "auto" takes what is fastest, on one CUDA GPU a step on
            molecules that is recorded and repeated.
        fabric: Lightning's, for GPUs and several processes; by default one device.
        watch: called after each step with stage, step and loss, to draw a curve for example.

    Returns:
        The averaged (EMA) model, in evaluation mode; its `seen` has what the training saw besides
        what the start had seen.

    Raises:
        RunError: for a folder of another run, where another process works, or whose state is
            damaged, for a loss that is not finite, and for a weight of the stress where nothing is
            learned of it.
        DataError: for energies that are of another level of theory than the model's.
    """
    check_model(model)
    folder = Path(folder)
    for name, number, least in (
        *((f"steps of the {stage.name} stage", stage.steps, 1) for stage in stages),
        *(("max_atoms", max_atoms, 1), ("validate_every", validate_every, 1)),
        *(("save_every", save_every, 1), ("workers", workers, 0), ("seed", seed, 0)),
    ):
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise InputError(f"{name} {number!r}: give a whole number, {least} or more")
    for stage in stages:
        _check_stress_weight(stage, model, training_data)
        _check_interaction_weight(stage, training_data)
    fabric = fabric or lightning_fabric.Fabric(accelerator="auto", devices=1)
    operations = choose(kernels, fabric.device, model.dtype)
    folder.mkdir(parents=True, exist_ok=True)
    state_file, log_file = folder / "state.pt", folder / "log.jsonl"
    assumed: Assumptions = {}
    plan = {
        "model": model.config.to_dict(),
        "stages": [asdict(s) for s in stages],
        "max_atoms": max_atoms,
        "seed": seed,
        "weights at the start": fingerprint(
            # references are fitted, on another machine to other last digits
            value.round(decimals=4).cpu().numpy() if name in UNITS else value.cpu().numpy()
            for name, value in model.state_dict().items()
        ),
        "training data": data_fingerprint(training_data, assumed),
        "validation data": data_fingerprint(validation_data, assumed),
        "processes": fabric.world_size,
        "number type": str(model.dtype),
        "shares": list(getattr(training_data, "shares", ())),
    }
    say_assumptions(assumed)
    saved = read_state(
        state_file, lambda file: torch.load(file, map_location="cpu", weights_only=True)
    )
    start = (0, 0)  # stage and step
    if saved is not None:
        with restoring(state_file):
            # what a run of another version wrote down under other names is not held against it
            if changed := differing(saved["plan"], plan, but=plan.keys() ^ saved["plan"].keys()):
                raise RunError(
                    f"{folder} holds a run with other settings ({', '.join(changed)}): give "
                    "another --out, or remove it"
                )
            start = (int(saved["stage"]), int(saved["step"]))
            if not (start[0] in range(len(stages)) and 0 <= start[1] <= stages[start[0]].steps):
                raise ValueError(f"stage {start[0]} and step {start[1]} are none of its plan")
            if "log" in saved and fabric.global_rank == 0:  # without what came after the state
                store_text(log_file, saved["log"])
    else:
        known = log_file.read_text() if log_file.exists() else ""
        steps = [int(step) for step in re.findall('"step": ([0-9]+)', known)]
        models = [file for s in stages if (file := folder / f"{s.name}.safetensors").exists()]
        if models or max(steps, default=math.inf if known else 0) > save_every:
            raise RunError(
                f"{(models or [log_file])[0]} is there, but no state.pt of the run that wrote "
                "it: bring that back, or give another --out"
            )
        log_file.unlink(missing_ok=True)  # lines of a run that was stopped before its first state
        missing, counts = missing_energies(model.eval(), training_data, 50)
        check_zero(missing / counts[:, :-1].sum(1), model)
    if fabric.broadcast(start) != start:
        raise RunError(
            f"{folder} is not one folder for all processes: all nodes have to share --out"
        )
    seen = model.seen = model.seen or Seen()
    model.posterior = None  # of other weights
    for index, stage in enumerate(stages):
        model = start_stage(model, stage)
        model.operations = operations
        if start[0] > index:
            continue
        average = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=moving_average(stage.ema_decay)
        ).to(fabric.device)
        assert isinstance(average.module, AllScAIP)  # a copy of the model
        trained, *optimizers = fabric.setup(model, *make_optimizers(model, stage))
        first, losses = 0, []
        if saved and start[0] == index:
            with restoring(state_file):
                first, losses = start[1], [float(value) for value in saved.get("losses", ())]
                model.load_state_dict(saved["model"])
                average.load_state_dict(saved["average"])
                for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
                    optimizer.load_state_dict(state)
                torch.set_rng_state(saved["random"])
                seen.merge(Seen.from_dict(saved.get("seen", seen.to_dict())))

        def save(step: int, stage_index: int = index) -> None:
            if fabric.global_rank == 0:
                state = {
                    "plan": plan,
                    "stage": stage_index,
                    "step": step,
                    "model": model.state_dict(),
                    "average": average.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                    "random": torch.get_rng_state(),
                    "seen": seen.to_dict(),
                    "losses": losses,
                    "log": log_file.read_text() if log_file.exists() else "",
                }
                with store_state(state_file) as partial:
                    torch.save(state, partial)

        place = (first, stage.steps - first, fabric.global_rank, fabric.world_size)
        batches = Batches(training_data, max_atoms, seed + index, *place)
        recorded = None
        batches.fragments = stage.interaction_weight > 0
        recording = kernels in ("auto", "cuda-graphs") and not batches.fragments
        if recording and can_record(model, training_data, fabric):
            batches.size = batch_size(training_data.natoms, max_atoms, model.config)
            batches.reach = model.config.reach
            recorded = RecordedLoss(model, stage, batches.size)
        # a generator of its own: starting a loader draws a number, which would move the dropout
        own = torch.Generator()
        loader = DataLoader(batches, batch_size=None, num_workers=workers, generator=own)
        started = time.monotonic()
        noted = 0
        for step, batch in enumerate(loader, start=first):
            if noted < 3 * training_data.natoms.sum():  # then nothing new comes, of mixtures either
                seen.add(batch.structures)
                noted += len(batch.structures.atomic_numbers)
            batch = batch.to(fabric.device)
            set_rate(optimizers, stage.learning_rate_at(step))
            model.train()
            with model.operations.threads(len(batch.structures.positions)):
                value = recorded(batch) if recorded else None
                if value is None:
                    trained.zero_grad()
                    of_batch = loss(trained(batch.structures), batch, model, stage)
                    fabric.backward(of_batch)
                    value = of_batch.item()
            norm = nn.utils.clip_grad_norm_(trained.parameters(), stage.clip)
            losses.append(value)
            done = step + 1
            if not math.isfinite(losses[-1] + float(norm)):
                kept = f" (the last good state is {state_file})" if state_file.exists() else ""
                raise RunError(
                    f"the loss is not finite at step {done}: lower the learning rate, and start "
                    f"again in a new folder{kept}"
                )
            for optimizer in optimizers:
                optimizer.step()
            average.update_parameters(model)
            if watch is not None:
                watch(stage, done, losses[-1])
            if done % validate_every == 0 or done == stage.steps:
                errors = evaluate(average.module, validation_data)
                mean, pace = (
                    sum(losses) / len(losses),
                    (time.monotonic() - started) / (done - first),
                )
                line = {"stage": stage.name, "step": done, "loss": mean, **errors}
                fabric.print(
                    f"{stage.name} {done}/{stage.steps}  loss {mean:.3f}  validation: energy "
                    f"{errors['energy_mae']:.2f} meV/atom, forces {errors['force_mae']:.1f} meV/Å  "
                    f"{pace:.2f} s/step, {pace * (stage.steps - done) / 60:.0f} min left",
                    flush=True,
                )
                if fabric.global_rank == 0:
                    with log_file.open("a") as log:
                        log.write(json.dumps({**line, "seconds_per_step": pace}) + "\n")
                losses.clear()
            if done % save_every == 0:
                save(done)
        model.load_state_dict(average.module.state_dict())
        seen.leave_out_cells(model.config.node_attention)
        save(stage.steps)
        if fabric.global_rank == 0:
            save_model(model, folder / f"{stage.name}.safetensors", {"stage": stage.name})
        saved = None
    return model.eval()


def _check_stress_weight(stage: Stage, model: AllScAIP, data: LabelledData) -> None:
    if not stage.stress_weight:
        return
    if stage.name != "conservative" or not model.config.stress:
        raise RunError(
            f"stress weight {stage.stress_weight:g}: the model has no stress in the stage "
            f"{stage.name!r} (it needs conservative forces and stress=True)"
        )
    found = (data[int(index)] for index in evenly_spaced(len(data), 20_000))
    if not any(atoms.pbc.any() and "stress" in atoms.calc.results for atoms in found):
        raise RunError(
            f"stress weight {stage.stress_weight:g}, but no training structure is periodic and has "
            "a stress: leave --stress-weight out, or convert the data with stresses or virials"
        )


def _check_interaction_weight(stage: Stage, data: LabelledData) -> None:
    found = (data[int(index)] for index in evenly_spaced(len(data), 20_000))
    if stage.interaction_weight and not any("fragments" in atoms.info for atoms in found):
        raise RunError(
            f"interaction weight {stage.interaction_weight:g}, but no training structure says in "
            "its info what its `fragments` and its `interaction_energy` are"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `allscaip-lite train`."""
    parser.add_argument("--data", required=True, type=Path, nargs="+", help="training .aselmdb")
    parser.add_argument(
        "--shares",
        type=float,
        nargs="+",
        help="of each --data, the share of the structures trained on, with the sum 1; without it "
        "all structures come equally often",
    )
    parser.add_argument(
        "--val",
        type=Path,
        nargs="+",
        help="validation .aselmdb; without it a tenth of --data is held out, drawn at random",
    )
    parser.add_argument("--out", required=True, type=Path, help="run folder")
    parser.add_argument("--preset", default="lite", choices=sorted(PRESETS))
    parser.add_argument(
        "--set",
        dest="changes",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change the configuration of the preset, or of --from, as in "
        "--set node_attention=false (repeatable)",
    )
    parser.add_argument(
        "--from",
        dest="start",
        help="model to start from, a name or a file: its energies of each element and of a charge "
        "are fitted to the data anew, then it is fine-tuned",
    )
    parser.add_argument(
        "--keep-references",
        action="store_true",
        help="with --from: data of the very level of theory of the model, nothing is fitted",
    )
    parser.add_argument(
        "--direct-steps", type=int, help="default: 20000; of a conservative --from, 0"
    )
    parser.add_argument("--conservative-steps", type=int, help="default: 5000; with --from 2000")
    parser.add_argument("--direct-rate", type=float, default=8e-4, help="learning rate")
    parser.add_argument(
        "--conservative-rate", type=float, help="learning rate; default: 4e-4, with --from 2e-4"
    )
    parser.add_argument(
        "--conservative-weights",
        type=float,
        nargs=2,
        default=(40, 20),
        metavar=("ENERGY", "FORCE"),
        help="weights of the loss in the conservative stage",
    )
    parser.add_argument(
        "--stress-weight",
        type=float,
        default=0.0,
        help="weight of the stress in the conservative stage, for data that have it",
    )
    parser.add_argument(
        "--interaction-weight",
        type=float,
        default=0.0,
        help="weight of interaction energies in the conservative stage, the energy of a structure "
        "less those of its molecules alone, for data that have `fragments`",
    )
    parser.add_argument(
        "--muon",
        type=float,
        nargs="?",
        const=3.0,
        default=0.0,
        metavar="TIMES",
        help="Muon instead of AdamW for the matrices of the blocks, at so many times the learning "
        "rate (3 if not given)",
    )
    parser.add_argument("--max-atoms", type=int, default=350, help="atoms in a batch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--validate-every", type=int, default=500, help="steps")
    parser.add_argument("--save-every", type=int, default=200, help="steps")
    parser.add_argument("--workers", type=int, default=0, help="processes that read data")
    add_kernels_option(parser)
    parser.add_argument(
        "--tf32",
        action="store_true",
        help="on a GPU, products of matrices with 10 bits behind the point, on its tensor cores",
    )
    parser.add_argument("--devices", default="1", help="as Lightning Fabric takes it")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--accelerator", default="auto", help="cpu, cuda or auto")


def changed(config: AllScAIPConfig, changes: Sequence[str]) -> AllScAIPConfig:
    """A configuration with changes such as "k=12", values as in JSON.

    Raises `InputError` for a name that does not exist or a value that is not one.
    """
    values = config.to_dict()
    for change in changes:
        name, equals, text = change.partition("=")
        if name not in values or not equals:
            raise InputError(
                f"--set {change}: give NAME=VALUE with a NAME among {', '.join(values)}"
            )
        try:
            values[name] = json.loads(text)
        except (json.JSONDecodeError, RecursionError):
            values[name] = text  # a word, such as layer
    try:
        return AllScAIPConfig.from_dict(values)
    except InputError as error:
        raise InputError(f"--set {' '.join(changes)}: {error}") from error


def reconfigured(model: AllScAIP, changes: Sequence[str]) -> AllScAIP:
    """A model with its configuration changed and its weights kept: another cutoff, or a part taken
    out, as in "node_attention=false".

    Raises `InputError` for a change that needs weights which the model does not have.
    """
    if not changes:
        return model
    other = AllScAIP(changed(model.config, changes))
    theirs, ours = model.state_dict(), other.state_dict()
    lacking = [
        name for name in ours if name not in theirs or theirs[name].shape != ours[name].shape
    ]
    if lacking:
        raise InputError(
            f"--set {' '.join(changes)} with --from: the model has no weights for {lacking[0]} and "
            f"{len(lacking) - 1} more; what needs new weights is trained from the start"
        )
    other.load_state_dict({name: theirs[name] for name in ours})
    other.seen = model.seen
    return other


def run(args: argparse.Namespace) -> None:
    """`allscaip-lite train`."""
    # the edges of the last block are not read, so its edge FFN never gets the gradient that
    # several processes would wait for
    several = args.devices != "1" or args.nodes > 1
    try:
        fabric = lightning_fabric.Fabric(
            accelerator=args.accelerator,
            strategy="ddp_find_unused_parameters_true" if several else "auto",
            devices=int(args.devices) if args.devices.isdigit() else args.devices,
            num_nodes=args.nodes,
        )
    except (ImportError, RuntimeError, TypeError, ValueError) as error:  # Lightning's
        raise InputError(
            f"--accelerator {args.accelerator} --devices {args.devices} is not possible here: "
            f"{error}"
        ) from error
    fabric.launch()
    if fabric.world_size > 1:
        os.environ["RANK"] = str(fabric.global_rank)  # `locked` reads it, and Slurm does not set it
    whole = Dataset(args.data)
    files = [path.resolve() for path in whole.paths]
    data: Dataset | Mixture = whole
    if args.shares:
        data = Mixture([Dataset(path) for path in args.data], args.shares)
    training_data: LabelledData
    validation_data: LabelledData
    if args.val:
        held_out = Dataset(args.val)
        files += [path.resolve() for path in held_out.paths]
        training_data, validation_data = data, held_out
    else:
        if isinstance(data, Mixture):
            raise InputError("--shares needs --val: a tenth drawn at random would be of any set")
        training_data, validation_data = hold_out(data, args.seed)
    if twice := sorted({str(path) for path in files if files.count(path) > 1}):
        warnings.warn(
            f"{', '.join(twice)}: given more than once, to train on or to validate: errors of "
            "structures that training saw say nothing of others",
            StructureWarning,
            stacklevel=2,
        )
    torch.manual_seed(args.seed)
    if args.tf32 and fabric.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    torch.set_flush_denormal(True)  # less than 1e-38 is 0: some processors are slow below
    direct, conservative, rate = 20_000, 5_000, 4e-4
    if args.start:
        model = reconfigured(load_model(args.start, device="cpu"), args.changes)
        direct, conservative, rate = 0 if model.config.conservative else 20_000, 2_000, 2e-4
        if not args.keep_references:
            shifts = shift_references(model, training_data)
            names = [*chemical_symbols[: len(shifts) - 1], "a unit of charge"]
            moved = [
                f"{name} {shift:+.3f}"
                for name, shift in zip(names, shifts.tolist(), strict=True)
                if abs(shift) > 1e-6
            ]
            fabric.print(f"energy of an atom, moved to fit the data (eV): {', '.join(moved)}")
    direct = direct if args.direct_steps is None else args.direct_steps
    conservative = conservative if args.conservative_steps is None else args.conservative_steps
    if not args.start:
        config = changed(PRESETS[args.preset], args.changes)
        model = fresh_model(config.replace(conservative=direct == 0), training_data)
    stages = []
    if direct:
        stages.append(direct_stage(direct, args.direct_rate))
    if conservative:
        weights = tuple(args.conservative_weights)
        rate = rate if args.conservative_rate is None else args.conservative_rate
        stages.append(
            conservative_stage(
                conservative,
                rate,
                weights,
                stress_weight=args.stress_weight,
                interaction_weight=args.interaction_weight,
            )
        )
    stages = [replace(stage, muon=args.muon) for stage in stages]
    if not stages:
        raise InputError("nothing to train: give --direct-steps or --conservative-steps")
    fabric.print(
        f"{len(training_data)} structures to train on, {len(validation_data)} to validate, "
        f"{model.num_parameters:,} parameters"
    )
    kept = ("max_atoms", "seed", "validate_every", "save_every", "workers", "kernels")
    options = {name: getattr(args, name) for name in kept}
    train(model, stages, training_data, validation_data, args.out, fabric=fabric, **options)
