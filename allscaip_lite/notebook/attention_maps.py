"""The attention weights of a model on one structure, as plain tensors.

In: an `AllScAIP` and an `ase.Atoms`. Out: `AttentionMaps`. The weights are those of the plain
formulas (paper sections 3.2 and 3.3); faster kernels, which the model otherwise runs, never hold
them, and are tested to give what these weights give.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from allscaip_lite.model import AllScAIP, AttentionRecord
from allscaip_lite.operations import PLAIN
from allscaip_lite.structures import Structures, structures_from_atoms

KINDS = ("node", "source", "destination")


@dataclass(frozen=True)
class AttentionMaps:
    """Attention of L blocks and h heads over N atoms with K slots each. CPU tensors.

    node (L, h, N, N): the weight of atom j (column, the key) in the row of atom i (the query);
    every row sums to one. None for a model without node attention.

    source, destination (L, h, N, K, K): neighbourhood attention. Slot s of atom i is the edge i→j
    in the source layout and the edge j→i in the destination layout; entry [..., i, s, t] is the
    weight with which the edge in slot s attends to the edge in slot t. Rows of occupied slots sum
    to one; rows and columns of empty slots are zero. In the last block only the destination rows
    of slot 0 influence the energy, which is computed from the states of the atoms.

    neighbor (N, K): the atom j of each slot. Slot 0 is the self-edge of the atom; the others are
    in order of decreasing envelope; -1 marks empty slots. image (N, K, 3): the periodic image of
    j, in lattice vectors. envelope (N, K): the factor between 0 and 1 that multiplies the weight
    of the edge in the softmax.

    atomic_numbers (N,). energy: eV, computed with the plain formulas.
    """

    node: Tensor | None
    source: Tensor
    destination: Tensor
    neighbor: Tensor
    image: Tensor
    envelope: Tensor
    atomic_numbers: Tensor
    energy: float

    @property
    def num_blocks(self) -> int:
        return self.source.shape[0]

    @property
    def num_heads(self) -> int:
        return self.source.shape[1]


@torch.no_grad()
def attention_maps(model: AllScAIP, atoms: Atoms) -> AttentionMaps:
    """All attention weights of a model on one structure; see `AttentionMaps`.

    Computed without dropout, in the dtype of the model. The result has L·h·(N² + 2NK²) numbers.

    Raises:
        StructureError: The model does not support the structure.
        TypeError: `atoms` is not one structure, for example a list.
    """
    if not isinstance(atoms, Atoms):
        raise TypeError(f"attention_maps takes one ase.Atoms, not a {type(atoms).__name__}")
    limit = model.config.max_num_elements
    structures = structures_from_atoms(atoms, torch.float64, max_num_elements=limit)
    structures = structures.to(model.device, model.dtype)
    record = AttentionRecord(source=[], destination=[], node=[])
    training = model.training
    model.eval()
    try:
        nodes = model.features(structures, PLAIN, record)  # (N, H)
        atomic = model.energy_head(nodes).squeeze(1)  # (N,)
    finally:
        model.train(training)
    assert record.geometry is not None
    graph = record.geometry.graph
    occupied = graph.log_weight.isfinite()  # (N, K)

    neighbor = torch.full_like(occupied, -1, dtype=torch.long)
    image = torch.zeros(*occupied.shape, 3, dtype=torch.long, device=occupied.device)
    own = torch.arange(len(occupied), device=occupied.device)
    neighbor.view(-1)[graph.source_slot] = torch.cat([own, graph.target])
    cells = _cells_away(atoms, structures)
    shift = graph.shift.long() + cells[graph.source] - cells[graph.target]
    image.view(-1, 3)[graph.source_slot[len(own) :]] = shift
    # the softmax has rows for empty slots too, without a meaning
    in_use = occupied.unsqueeze(2)  # (N, K, 1)
    return AttentionMaps(
        node=torch.stack(record.node)[:, 0].cpu() if record.node else None,
        source=(torch.stack(record.source) * in_use).cpu(),
        destination=(torch.stack(record.destination) * in_use).cpu(),
        neighbor=neighbor.cpu(),
        image=image.cpu(),
        envelope=graph.log_weight.exp().cpu(),
        atomic_numbers=structures.atomic_numbers.cpu(),
        energy=float(model.in_electronvolts(atomic, structures)),
    )


def _cells_away(atoms: Atoms, structures: Structures) -> Tensor:
    """(N, 3) lattice vectors by which `Structures.centered` moved each atom back."""
    if not atoms.pbc.any():
        return torch.zeros(len(atoms), 3, dtype=torch.long, device=structures.positions.device)
    moved = atoms.positions - structures.positions.double().cpu().numpy()
    cells = np.rint(atoms.cell.complete().scaled_positions(moved)) * atoms.pbc
    return torch.as_tensor(cells, device=structures.positions.device).long()
