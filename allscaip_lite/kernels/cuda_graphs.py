"""Steps recorded once on a CUDA GPU, and repeated.

In: structures of one composition, time after time, or batches of one `Size`. Out: what the model
says of them. A step of a small model is a thousand short kernels, and Python takes longer to order
them than the GPU to run them. A CUDA graph holds the whole order: repeated, nothing waits.

On a CPU the same padded forms run without being recorded, to the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from allscaip_lite.errors import KernelError
from allscaip_lite.graph import SLOT_STEP, build_graph
from allscaip_lite.kernels.padded import PaddedBatch, Size, lattices, pad, padded_prediction
from allscaip_lite.model import AllScAIP, Prediction, without_weight_grad
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


@dataclass
class _Prepared:
    """What was made for one composition: a padded batch, and where its list of pairs was made.

    batch: what is recorded reads its tensors. cell: (B, 3, 3) Å, the last one.
    """

    size: Size
    batch: PaddedBatch
    listed: Structures
    cell: Tensor
    recording: Recording | None = None


class RecordedModel:
    """A model for one composition, whose atoms and cell move: fast on a GPU.

    The list of pairs reaches SKIN farther than the model, and is made anew, on the CPU, when atoms
    have moved so far that a pair may be missing. A step that finds more neighbours than there is
    room for is recorded and done once more, with room.

    patient: a composition is recorded only after PATIENCE calls, and a model or structures that
    have no padded form are left to the model itself, where else `KernelError` is raised.
    """

    def __init__(self, model: AllScAIP, *, patient: bool = False) -> None:
        self.model, self.patient = without_weight_grad(model), patient
        self.reach = model.config.reach + SKIN
        self.calls = 0  # of the composition of the last call
        self.last: Structures | None = None  # in the last call
        self.prepared: _Prepared | None = None

    def __call__(self, structures: Structures, create_graph: bool = False) -> Prediction:
        """What the model gives of structures on the CPU, on the CPU.

        It cannot be differentiated further, `create_graph` or not.

        Raises:
            StructureError: two atoms stand on one spot.
            KernelError: there is no padded form, and this is not patient.
        """
        if self.patient:
            same = self.last is not None and _alike(structures, self.last)
            self.calls = self.calls + 1 if same else 1
            self.last = structures
            if self.calls <= PATIENCE:
                return self._unrecorded(structures)
        try:
            return self._recorded(structures)
        except KernelError:
            if not self.patient:
                raise
            return self._unrecorded(structures)

    def _unrecorded(self, structures: Structures) -> Prediction:
        energy, forces, stress = self.model(structures, create_graph=False)
        return Prediction(energy.cpu(), forces.cpu(), None if stress is None else stress.cpu())

    def _recorded(self, structures: Structures) -> Prediction:
        prepared = self.prepared
        if prepared is None or not self._move(prepared, structures):
            prepared = self.prepared = self._prepare(structures, prepared)
        while True:
            if prepared.recording is None:
                self._record(prepared)
            assert prepared.recording is not None
            found = prepared.recording().cpu()
            overflow, energy, forces, stress = _unpack(found, prepared.size)
            if not overflow:
                return Prediction(energy, forces, stress)
            prepared.size = replace(prepared.size, slots=prepared.size.slots + SLOT_STEP)
            prepared.recording = None

    def _record(self, prepared: _Prepared) -> None:
        batch, size = prepared.batch, prepared.size

        def predict(*tensors: Tensor) -> Tensor:
            """Everything in one tensor, to be fetched in one piece."""
            found, overflow = padded_prediction(self.model, batch.like(list(tensors)), size)
            parts = [overflow, *(part for part in found if part is not None)]
            return torch.cat([part.detach().double().flatten() for part in parts])

        prepared.recording = Recording(predict, batch.tensors())
        prepared.batch = batch.like(prepared.recording.inputs)

    def _prepare(self, structures: Structures, before: _Prepared | None) -> _Prepared:
        """A new list of pairs; what is recorded stays if that has room."""
        pairs = candidate_pairs(structures, self.reach)
        count, natoms = len(pairs[0]), structures.natoms
        if before is None or not _alike(structures, before.listed) or before.size.pairs < count:
            slots = build_graph(structures, self.model.config).num_slots
            room = math.ceil(count * SPARE) + 1
            size = Size(int(natoms.sum()), len(natoms), int(natoms.max()), room, slots)
            before = None
        else:
            size = before.size
        batch = pad(structures, pairs, size).to(self.model.device, self.model.dtype)
        if before is None or before.recording is None:
            return _Prepared(size, batch, structures, structures.cell)
        before.recording.set(batch.tensors())
        return replace(before, listed=structures, cell=structures.cell)

    def _move(self, prepared: _Prepared, structures: Structures) -> bool:
        """Moves atoms and cell; not so far that the list may miss a pair, then it says False."""
        listed = prepared.listed
        if not _alike(structures, listed):
            return False
        here, before, strain = structures.positions, listed.positions, 0.0
        if listed.periodic and not torch.equal(listed.cell, structures.cell):
            deformed = torch.linalg.solve(listed.cell, structures.cell)  # (B, 3, 3)
            before = (before.unsqueeze(1) @ deformed[listed.system]).squeeze(1)
            unit = torch.eye(3, dtype=deformed.dtype)
            strain = max(
                float(torch.linalg.matrix_norm(way - unit, 2).max())
                for way in (deformed, torch.linalg.inv(deformed))
            )
        farthest = float((here - before).square().sum(1).max()) ** 0.5
        if not 2 * farthest + strain * self.reach < SKIN:
            return False
        batch = prepared.batch
        batch.structures.positions.copy_(here, non_blocking=True)
        batch.structures.charge.copy_(structures.charge)
        batch.structures.spin.copy_(structures.spin)
        if listed.periodic and not torch.equal(prepared.cell, structures.cell):
            batch.structures.cell.copy_(structures.cell)
            for name, part in lattices(structures).items():
                getattr(batch, name).copy_(part)
            prepared.cell = structures.cell
        return True


def _unpack(packed: Tensor, size: Size) -> tuple[int, Tensor, Tensor, Tensor | None]:
    """Overflow, energy (B,), forces (N, 3) and stress (B, 3, 3) of what `_record` packs."""
    rest = len(packed) - 1 - size.systems - 3 * size.atoms
    overflow, energy, forces, stress = packed.split([1, size.systems, 3 * size.atoms, rest])
    return int(overflow), energy, forces.view(-1, 3), stress.view(-1, 3, 3) if rest else None


def _alike(structures: Structures, others: Structures) -> bool:
    """Whether elements, numbers of atoms and periodic directions are the same."""
    return all(
        torch.equal(getattr(structures, name), getattr(others, name))
        for name in ("atomic_numbers", "natoms", "pbc")
    )
