"""Steps recorded once on a CUDA GPU, and repeated.

In: structures of one composition, time after time, or batches of one `Size`. Out: what the model
says of them. A step of a small model is a thousand short kernels, and Python takes longer to order
them than the GPU to run them. A CUDA graph holds the whole order: repeated, nothing waits.

On a CPU the same padded forms run without being recorded, to the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from allscaip_lite.graph import SLOT_STEP, build_graph
from allscaip_lite.kernels.padded import (
    PaddedBatch,
    PaddingError,
    Size,
    pad,
    padded_prediction,
    reduced_cells,
)
from allscaip_lite.model import AllScAIP, Prediction, no_weight_grad
from allscaip_lite.neighbors import candidate_pairs
from allscaip_lite.structures import Structures

SKIN = 1.0  # Å beyond the reach of the model, so that a list of pairs serves for some steps
SPARE = 1.25  # room for as many times the pairs that were there at first
PATIENCE = 5  # calls, before a step is recorded that nobody asked to be
WARMUPS = 3  # before a recording, as PyTorch asks: libraries choose their kernels then


class Recording:
    """A function of tensors, recorded when it is made and repeated with every call.

    `function` takes tensors like `example`, all on one device, and gives tensors; it may not ask
    the device for a value. What comes out is overwritten by the next call.
    """

    def __init__(self, function: Callable[..., Any], example: Sequence[Tensor]) -> None:
        self.function = function
        self.inputs = [tensor.detach().clone() for tensor in example]
        self.graph = None
        device = self.inputs[0].device
        if device.type != "cuda":
            return
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(WARMUPS):
                function(*self.inputs)
        torch.cuda.current_stream(device).wait_stream(side)
        torch.cuda.synchronize(device)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.outputs = function(*self.inputs)

    def set(self, tensors: Sequence[Tensor]) -> None:
        """Other inputs; raises ValueError for tensors of another shape."""
        for mine, given in zip(self.inputs, tensors, strict=True):
            if mine.shape != given.shape:
                raise ValueError(f"recorded with shape {mine.shape}, called with {given.shape}")
            mine.copy_(given, non_blocking=True)

    def __call__(self) -> Any:
        """The function's value of the inputs."""
        if self.graph is None:
            return self.function(*self.inputs)
        self.graph.replay()
        return self.outputs


class RecordedModel:
    """A model for one composition, whose atoms and cell move: fast on a GPU.

    The list of pairs reaches SKIN farther than the model, and is made anew, on the CPU, when atoms
    have moved so far that a pair may be missing. A step that finds more neighbours than there is
    room for is recorded and done once more, with room.

    patient: a composition is recorded only after PATIENCE calls, and a model or structures that have
    no padded form are left to the model itself, where else `PaddingError` is raised.
    """

    def __init__(self, model: AllScAIP, patient: bool = False) -> None:
        self.model, self.patient = model, patient
        self.calls = 0  # of the composition of the last call
        self.asked: Structures | None = None  # in the last call
        self.reach = model.config.reach + SKIN
        self.recording: Recording | None = None
        self.size: Size | None = None
        self.batch: PaddedBatch | None = None  # what is recorded reads these tensors
        self.listed: Structures | None = None  # where the list of pairs was made
        self.cell: Tensor | None = None  # the last one

    def __call__(self, structures: Structures, create_graph: bool = False) -> Prediction:
        """What the model gives of structures on the CPU, on the CPU.

        It cannot be derived further, `create_graph` or not.

        Raises `StructureError` where two atoms stand on one spot and, where it is not patient,
        `PaddingError` for a model or structures that have no padded form.
        """
        if self.patient:
            same = self.asked is not None and _alike(structures, self.asked)
            self.calls = self.calls + 1 if same else 1
            self.asked = structures
            if self.calls <= PATIENCE:
                return self._unrecorded(structures)
        try:
            return self._recorded(structures)
        except PaddingError:
            if not self.patient:
                raise
            return self._unrecorded(structures)

    def _unrecorded(self, structures: Structures) -> Prediction:
        found = self.model(structures, create_graph=False)
        return Prediction(*(part if part is None else part.cpu() for part in found))

    def _recorded(self, structures: Structures) -> Prediction:
        if not self._move(structures):
            self._list(structures)
        while True:
            if self.recording is None:
                self._record()
            overflow, energy, forces, stress = self._unpack(self.recording().cpu())
            if not overflow:
                return Prediction(energy, forces, stress)
            self.size = replace(self.size, slots=self.size.slots + SLOT_STEP)
            self.recording = None

    def _record(self) -> None:
        with no_weight_grad(self.model):
            self.recording = Recording(self._predict, self.batch.tensors())
        self.batch = self.batch.like(self.recording.inputs)

    def _predict(self, *tensors: Tensor) -> Tensor:
        """What is recorded: everything in one tensor, to be fetched in one piece."""
        batch = self.batch.like(list(tensors))
        prediction, overflow = padded_prediction(self.model, batch, self.size)
        parts = [overflow, *(part for part in prediction if part is not None)]
        return torch.cat([part.detach().double().flatten() for part in parts])

    def _unpack(self, packed: Tensor) -> tuple[int, Tensor, Tensor, Tensor | None]:
        batch, n = self.size.systems, self.size.atoms
        rest = len(packed) - 1 - batch - 3 * n
        overflow, energy, forces, stress = packed.split([1, batch, 3 * n, rest])
        stress = stress.view(-1, 3, 3) if len(stress) else None
        return int(overflow), energy, forces.view(n, 3), stress

    def _list(self, structures: Structures) -> None:
        """A new list of pairs; what is recorded stays if that has room."""
        pairs = candidate_pairs(structures, self.reach)
        natoms = structures.natoms
        if self.listed is None or not _alike(structures, self.listed):
            self.size = None
        if self.size is None or self.size.pairs < len(pairs[0]):
            slots = build_graph(structures, self.model.config).num_slots
            room = math.ceil(len(pairs[0]) * SPARE) + 1
            self.size = Size(int(natoms.sum()), len(natoms), int(natoms.max()), room, slots)
            self.recording = None
        batch = pad(structures, pairs, self.size).to(self.model.device, self.model.dtype)
        if self.recording is None:
            self.batch = batch
        else:
            self.recording.set(batch.tensors())
        self.listed, self.cell = structures, structures.cell

    def _move(self, structures: Structures) -> bool:
        """Moves atoms and cell; not so far that the list may miss a pair, then it says False."""
        last = self.listed
        if last is None or not _alike(structures, last):
            return False
        here, before, strain = structures.positions, last.positions, 0.0
        if bool(last.pbc.any()) and not torch.equal(last.cell, structures.cell):
            deformed = torch.linalg.solve(last.cell, structures.cell)  # (B, 3, 3)
            before = (before.unsqueeze(1) @ deformed[last.system]).squeeze(1)
            unit = torch.eye(3, dtype=deformed.dtype)
            strain = max(
                float(torch.linalg.matrix_norm(way - unit, 2).max())
                for way in (deformed, torch.linalg.inv(deformed))
            )
        farthest = float((here - before).square().sum(1).max()) ** 0.5
        if not 2 * farthest + strain * self.reach < SKIN:
            return False
        inner = self.batch.structures
        inner.positions.copy_(here, non_blocking=True)
        inner.charge.copy_(structures.charge)
        inner.spin.copy_(structures.spin)
        if bool(last.pbc.any()) and not torch.equal(self.cell, structures.cell):
            inner.cell.copy_(structures.cell)
            for name, part in reduced_cells(structures).items():
                getattr(self.batch, name).copy_(part)
            self.cell = structures.cell
        return True


def _alike(structures: Structures, others: Structures) -> bool:
    """Whether elements, numbers of atoms and periodic directions are the same."""
    return all(
        torch.equal(getattr(structures, name), getattr(others, name))
        for name in ("atomic_numbers", "natoms", "pbc")
    )
