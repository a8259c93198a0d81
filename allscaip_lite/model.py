"""AllScAIP: the network, its heads, and energies, forces and stress (paper section 3).

In: `Structures`, or `ase.Atoms` through `predict`. Out: `Prediction` in eV, eV/Å and eV/Å³.

    Input ▸ L × Block(source ▸ destination ▸ edge FFN ▸ node attention ▸ node FFN) ▸ heads

States are one flat list (M, H): the N atoms, then the 2P edges (see `graph`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar, cast, overload

import numpy as np
import torch
import torch.nn.functional as F
from ase import Atoms
from torch import Tensor, nn

from allscaip_lite import encodings
from allscaip_lite.applicability import Seen, warn_outside
from allscaip_lite.attention import Heads, SystemTable, channel_groups
from allscaip_lite.config import AllScAIPConfig
from allscaip_lite.electrons import MAX_CHARGE, MAX_MULTIPLICITY, Assumptions, say_assumptions
from allscaip_lite.errors import InputError, StructureError, check_kind
from allscaip_lite.graph import Graph, build_graph
from allscaip_lite.layers import Activation, FeedForward, Linear, SelfAttention, make_norm
from allscaip_lite.neighbors import candidate_pairs
from allscaip_lite.operations import PLAIN, Operations
from allscaip_lite.structures import (
    Structures,
    in_own_numbers,
    listed,
    say_cells_not_used,
    structures_from_atoms,
)

M = TypeVar("M", bound=nn.Module)
# In float64: eV and eV/Å of one output; eV of a system, an atom of each element, a unit of charge.
UNITS = ("energy_scale", "energy_mean", "force_scale", "element_references", "charge_reference")


class Prediction(NamedTuple):
    """energy (B,) eV, float64; forces (N, 3) eV/Å; stress (B, 3, 3) eV/Å³, 0 of molecules."""

    energy: Tensor
    forces: Tensor
    stress: Tensor | None


@dataclass(frozen=True)
class Result:
    """One structure's energy in eV, forces (N, 3) in eV/Å, stress (3, 3) in eV/Å³ or None."""

    energy: float
    forces: np.ndarray
    stress: np.ndarray | None
    uncertainty: float | None = None  # of the energy, eV, where it was asked for


@dataclass(frozen=True)
class Geometry:
    """All that the blocks read of a batch besides the states, made once a forward pass."""

    graph: Graph
    neighborhoods: Any  # the graph with its angles, as `operations.neighborhoods` makes it
    systems: SystemTable
    biases: Sequence[Any]  # of each block's node attention, as `operations.rotary_biases` makes it
    operations: Operations


@dataclass
class AttentionRecord:
    """Where a forward pass leaves its attention weights, a list entry a block, on request.

    source, destination (h, N, K, K); node (B, h, n, n). Only the plain operations have them.
    """

    source: list[Any] = field(default_factory=list)
    destination: list[Any] = field(default_factory=list)
    node: list[Any] = field(default_factory=list)
    geometry: Geometry | None = None  # whose slots the weights belong to


class Input(nn.Module):
    """Atoms and edges as vectors: section "Input" of the paper's architecture."""

    def __init__(self, config: AllScAIPConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        directions = (config.direction_degree + 1) ** 2
        self.atom_embedding = nn.Embedding(config.max_num_elements, size)
        self.charge_embedding = nn.Embedding(2 * MAX_CHARGE + 1, size)
        self.spin_embedding = nn.Embedding(MAX_MULTIPLICITY + 1, size)
        self.charge_spin = Linear(2 * size, size)
        self.bond_order = Linear(config.bond_order_degree + 1, size)
        self.activation = Activation(config)
        self.norm = make_norm(config, 2 * size)
        self.node = Linear(2 * size, size)
        self.edge_attributes = Linear(config.num_distance_basis + directions, size)
        self.edge = Linear(2 * size, size)
        if config.distance_basis == "silu":
            self.distance_basis = Linear(2, config.num_distance_basis)

    def forward(
        self, structures: Structures, graph: Graph, order: Tensor, operations: Operations = PLAIN
    ) -> Tensor:
        """→ (M, H) states of atoms and edges; order (N, 10): the bond-orientational order."""
        ops = operations

        def act(x: Tensor) -> Tensor:
            return self.activation(x, ops)

        atoms = self.atom_embedding(structures.atomic_numbers)  # (N, H)
        nodes = torch.cat([atoms, act(self.bond_order(order, ops))], dim=1)  # (N, 2H)
        nodes = act(self.node(self.norm(nodes, ops), ops))  # (N, H)
        charge = self.charge_embedding(structures.charge + MAX_CHARGE)  # (B, H)
        spin = self.spin_embedding(structures.spin)  # (B, H)
        charge_spin = self.charge_spin(torch.cat([charge, spin], dim=1), ops)  # (B, H)
        nodes = nodes + act(charge_spin)[structures.system]

        # Lin([node ; attributes]), each state with the atom it starts from
        own = torch.arange(len(nodes), device=nodes.device)
        parts = [(nodes, torch.cat([own, graph.source])), (act(self.attributes(graph, ops)), None)]
        return act(ops.linear_of_parts(parts, self.edge.weight, self.edge.bias))  # (M, H)

    def attributes(self, graph: Graph, ops: Operations = PLAIN) -> Tensor:
        """(M, H): Lin([basis(d) ; Y(r̂)]) of every state; a self-edge has d = 0 and no direction."""
        n, device = graph.num_atoms, graph.distances.device
        forward = torch.arange(1, graph.num_pairs + 1, device=device)  # row 0 is the self-edge's
        itself = forward.new_zeros(n)
        pair = torch.cat([itself, forward, forward])  # (M,)
        edge = torch.cat([itself, forward, forward + graph.num_pairs])  # (M,)
        distances = torch.cat([graph.distances.new_zeros(1), graph.distances])  # (1+P,)
        directions = torch.cat([graph.directions, -graph.directions])  # (2P, 3)
        harmonics = encodings.spherical_harmonics(directions, self.config.direction_degree)
        alone = torch.eye(1, harmonics.shape[1], dtype=harmonics.dtype, device=device)  # Y_00 alone
        parts = [(self.basis(distances, ops), pair), (torch.cat([alone, harmonics]), edge)]
        return ops.linear_of_parts(parts, self.edge_attributes.weight, self.edge_attributes.bias)

    def basis(self, distances: Tensor, ops: Operations = PLAIN) -> Tensor:
        """(E,) Å → (E, 512)."""
        kind, cutoff = self.config.distance_basis, self.config.cutoff
        size = self.config.num_distance_basis
        if kind == "silu":
            ones = torch.ones_like(distances)
            return F.silu(self.distance_basis(torch.stack([distances, ones], dim=1), ops))
        if kind == "gaussian":
            return ops.gaussian_basis(distances, *encodings.radial_centers(cutoff, size, distances))
        return encodings.radial_basis(distances, kind, cutoff, size)


class Block(nn.Module):
    """One transformer block; every branch is x + scale · branch(norm(x))."""

    def __init__(self, config: AllScAIPConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.groups = channel_groups(config.angular_channels, config.head_size)
        self.source_norm = make_norm(config, size)
        self.source_attention = SelfAttention(size)
        self.destination_norm = make_norm(config, size)
        self.destination_attention = SelfAttention(size)
        self.edge_ffn = FeedForward(config, size, config.ffn_dropout)
        self.node_ffn = FeedForward(config, size, config.ffn_dropout)
        branches = ["source", "destination", "edge_ffn", "node_ffn"]
        if config.node_attention:
            branches.append("node")
            self.node_norm = make_norm(config, size)
            self.node_attention = SelfAttention(size)
            if config.rotary:
                shape = (config.num_heads, config.num_rotary_frequencies)
                self.rotary_weight = nn.Parameter(torch.full(shape, 1 / shape[1]))
        learned = config.residual_scaling
        self.scale = nn.ParameterDict()
        for name in branches:
            start = torch.tensor(1 / config.num_layers if learned else 1.0)
            self.scale[name] = nn.Parameter(start, requires_grad=learned)

    @property
    def dropout(self) -> float:
        return self.config.attention_dropout if self.training else 0.0

    @property
    def heads(self) -> Heads:
        return Heads(self.groups, self.config.num_heads, self.dropout)

    def forward(
        self, states: Tensor, geometry: Geometry, index: int, record: AttentionRecord | None = None
    ) -> Tensor:
        """(M, H) → (M, H)."""
        graph, ops = geometry.graph, geometry.operations
        states = self.mix_edges(states, "source", geometry, record)
        states = self.mix_edges(states, "destination", geometry, record)
        nodes, edges = states.split([graph.num_atoms, 2 * graph.num_pairs])
        edges = torch.addcmul(edges, self.edge_ffn(edges, ops), self.scale["edge_ffn"])
        return torch.cat([self.update_nodes(nodes, geometry, index, record), edges])

    def forward_atoms(self, states: Tensor, geometry: Geometry, index: int) -> Tensor:
        """(M, H) → (N, H): the same for the atoms alone, the only states that the heads read."""
        states = self.mix_edges(states, "source", geometry)
        return self.update_nodes(self.mix_self_edges(states, geometry), geometry, index)

    def update_nodes(
        self, nodes: Tensor, geometry: Geometry, index: int, record: AttentionRecord | None = None
    ) -> Tensor:
        """(N, H) → (N, H): node attention and the atoms' feed-forward network."""
        if self.config.node_attention:
            nodes = self.mix_nodes(nodes, geometry, index, record)
        update = self.node_ffn(nodes, geometry.operations)
        return torch.addcmul(nodes, update, self.scale["node_ffn"])

    def mix_edges(
        self, states: Tensor, layout: str, geometry: Geometry, record: AttentionRecord | None = None
    ) -> Tensor:
        """Neighbourhood attention in one layout, with its residual: (M, H) → (M, H)."""
        ops = geometry.operations
        norm, layer = getattr(self, f"{layout}_norm"), getattr(self, f"{layout}_attention")
        mixed, weights = ops.neighborhood_attention(
            layer.project(norm(states, ops), ops),  # (M, 3H)
            geometry.neighborhoods,
            layout,
            self.heads,
        )
        if record is not None:
            getattr(record, layout).append(weights)
        return torch.addcmul(states, layer.output(mixed, ops), self.scale[layout])

    def mix_self_edges(self, states: Tensor, geometry: Geometry) -> Tensor:
        """Destination attention for the atoms alone, with its residual: (M, H) → (N, H)."""
        ops, layer = geometry.operations, self.destination_attention
        normed = self.destination_norm(states, ops)
        nodes = states[: geometry.graph.num_atoms]
        mixed, _ = ops.self_edge_attention(
            layer.query(normed[: len(nodes)], ops),  # (N, H)
            layer.project(normed, ops, ("key", "value")),  # (M, 2H)
            geometry.neighborhoods,
            "destination",
            self.heads,
        )
        return torch.addcmul(nodes, layer.output(mixed, ops), self.scale["destination"])

    def mix_nodes(
        self, nodes: Tensor, geometry: Geometry, index: int, record: AttentionRecord | None = None
    ) -> Tensor:
        """All-to-all attention over the atoms of a system, with its residual: (N, H) → (N, H)."""
        ops, layer = geometry.operations, self.node_attention
        mixed, weights = ops.node_attention(
            layer.project(self.node_norm(nodes, ops), ops),  # (N, 3H)
            geometry.biases[index],
            geometry.systems,
            self.config.num_heads,
            self.dropout,
        )
        if record is not None:
            record.node.append(weights)
        return torch.addcmul(nodes, layer.output(mixed, ops), self.scale["node"])


class AllScAIP(nn.Module):
    """The whole model.

    Residual scales start at 1/L and biases at zero, as in the reference; matrices start at variance
    2/fan-in and atom embeddings at 1, larger than there: short trainings then learned faster.

    operations: the formulas, in their plain form or a faster one (see `kernels.choose`).
    """

    energy_scale: Tensor
    energy_mean: Tensor
    force_scale: Tensor
    element_references: Tensor
    charge_reference: Tensor

    @torch.inference_mode(mode=False)  # forces need weights that allow gradients
    def __init__(self, config: AllScAIPConfig) -> None:
        wanted = "an AllScAIPConfig, such as PRESETS['lite'] (load_model takes a name)"
        check_kind(config, AllScAIPConfig, wanted)
        super().__init__()
        self.config = config
        self.operations = PLAIN
        self.seen: Seen | None = None  # of training, where that is known
        self.said: set[str] = set()  # what `predict` has warned of
        # (2H + 1, 2H + 1), lower: of the covariance of the last layer's weights, where it is known
        self.posterior: Tensor | None = None
        self.input = Input(config)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.num_layers)])
        self.energy_head = FeedForward(config, 1)
        if not config.conservative:
            self.force_head = FeedForward(config, 3)
        for name in UNITS:
            shape = config.max_num_elements if name == "element_references" else ()
            start = torch.ones if name.endswith("scale") else torch.zeros
            self.register_buffer(name, start(shape, dtype=torch.float64))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AllScAIP:
        """Move or cast the weights, but keep the energy's scale and references in float64."""
        exact = {name: getattr(self, name) for name in UNITS}  # a cast would round them
        super()._apply(fn, recurse)
        for name, value in exact.items():
            if not value.is_meta:
                setattr(self, name, value.to(getattr(self, name).device))
        return self

    @property
    def dtype(self) -> torch.dtype:
        return self.input.atom_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.input.atom_embedding.weight.device

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    @in_own_numbers
    def forward(
        self,
        structures: Structures,
        create_graph: bool | None = None,
        geometry: Callable[[Structures, Operations], Geometry] | None = None,
        hidden: list[Tensor] | None = None,
    ) -> Prediction:
        """Energy, forces and, for a conservative model with periodic systems, stress.

        `create_graph` keeps forces differentiable (default: in training mode). `geometry` may
        replace `self.geometry`, for padded input. In `hidden`, if it is given, is left what the
        energy's last layer read, for `energy_uncertainty`.
        """
        create_graph = self.training if create_graph is None else create_graph
        check_number_type(self.dtype)
        if torch.is_inference_mode_enabled():  # forces are gradients, and here none can be taken
            with torch.inference_mode(False), torch.no_grad():
                return self(structures.clone(), create_graph, geometry, hidden)
        structures = self._here(structures)
        if not self.config.conservative:
            nodes = self.features(structures, self.operations, geometry=geometry)
            atomic = self._atomic(nodes, self.operations, hidden)
            forces = self.force_head(nodes, self.operations) * self.force_scale.to(self.dtype)
            return Prediction(self.in_electronvolts(atomic, structures), forces, None)
        ops = self.operations.twice_differentiable if create_graph else self.operations
        with torch.enable_grad():
            positions = structures.positions.detach().requires_grad_()
            inputs = [positions]
            moved = structures.replace(positions=positions)
            with_stress = self.config.stress and structures.periodic
            if with_stress:
                inputs.append(positions.new_zeros(len(structures), 3, 3).requires_grad_())
                moved = moved.strained(inputs[1])
            nodes = self.features(moved, ops, geometry=geometry)
            atomic = self._atomic(nodes, ops, hidden)
            gradients = torch.autograd.grad(
                atomic.sum(), inputs, create_graph=create_graph, materialize_grads=True
            )
            energy = self.in_electronvolts(atomic, structures)
        forces = -gradients[0] * self.force_scale.to(self.dtype)
        stress = None
        if with_stress:
            volume = structures.volume  # (B,), of a molecule as if infinite: 0/0 spoils gradients
            volume = volume.masked_fill(~structures.pbc.any(1), torch.inf)
            stress = gradients[1] * self.energy_scale.to(self.dtype) / volume[:, None, None]
        return Prediction(energy if create_graph else energy.detach(), forces, stress)

    def _here(self, structures: Structures) -> Structures:
        """A batch on the model's device, in its number type; TypeError for what is none."""
        wanted = (
            "Structures, as structures_from_atoms(atoms) makes them (model.predict takes atoms)"
        )
        check_kind(structures, Structures, wanted)
        return structures.to(self.device, self.dtype)

    def _atomic(self, nodes: Tensor, ops: Operations, hidden: list[Tensor] | None) -> Tensor:
        """(N, H) → (N,): what the energy head says of each atom, by way of (N, 2H)."""
        inner = self.energy_head.hidden(nodes, ops)
        if hidden is not None:
            hidden.append(inner.detach())
        return self.energy_head.contract(inner, ops).squeeze(1)

    @in_own_numbers
    def features(
        self,
        structures: Structures,
        operations: Operations | None = None,
        record: AttentionRecord | None = None,
        geometry: Callable[[Structures, Operations], Geometry] | None = None,
    ) -> Tensor:
        """(N, H): the states of the atoms after the last block, before the heads' norms.

        operations: by default the model's own, in a form that can be differentiated twice.
        """
        made = (geometry or self.geometry)(
            structures, operations or self.operations.twice_differentiable
        )
        order = self.bond_order(made)  # (N, 10)
        states = self.input(structures, made.graph, order, made.operations)  # (M, H)
        *blocks, last = cast("list[Block]", list(self.blocks))
        for index, block in enumerate(blocks):
            states = made.operations.call_block(block, states, made, index, record)
        if record is None:
            return last.forward_atoms(states, made, len(blocks))
        record.geometry = made
        return last(states, made, len(blocks), record)[: made.graph.num_atoms]

    def geometry(self, structures: Structures, operations: Operations) -> Geometry:
        """The graph of a batch with its angles, and the logits of ERoPE."""
        graph = build_graph(structures, self.config, operations.soft_rank)
        systems = SystemTable.make(structures.natoms)
        distances = None
        if self.config.rotary:
            positions = systems.spread(structures.positions).view(*systems.real.shape, 3)
            distances = operations.system_distances(structures, positions)
        return self.geometry_of(graph, systems, distances, operations)

    def geometry_of(
        self, graph: Graph, systems: SystemTable, distances: Tensor | None, operations: Operations
    ) -> Geometry:
        """The same of a graph that is made; distances (B, n, n) Å between nearest images."""
        degree = max(self.config.bond_order_degree, len(self.config.angular_channels or (0,)) - 1)
        return Geometry(
            graph=graph,
            neighborhoods=operations.neighborhoods(graph, degree),
            systems=systems,
            biases=self.biases(systems, distances, operations),
            operations=operations,
        )

    def bond_order(self, geometry: Geometry) -> Tensor:
        """(N, 10): the bond-orientational order of all atoms."""
        smooth, log_weight = self.config.smooth_bond_order, geometry.graph.log_weight  # (N, K)
        weights = log_weight.exp() if smooth else log_weight.isfinite().to(self.dtype)
        sums = geometry.operations.pair_sums(
            geometry.neighborhoods, weights, self.config.bond_order_degree
        )
        return encodings.bond_orientational_order(sums, weights, self.config.bond_order_softness)

    def biases(
        self, systems: SystemTable, distances: Tensor | None, operations: Operations
    ) -> Sequence[Any]:
        """Of each block's node attention, (B, h, n, n): ERoPE, and -inf at empty keys."""
        empty, layers = systems.mask(self.dtype), self.config.num_layers
        if distances is None:
            return [empty] * layers
        weight = torch.stack([block.get_parameter("rotary_weight") for block in self.blocks])
        frequencies = encodings.rotary_frequencies(weight.shape[2], distances)
        return operations.rotary_biases(distances, weight, frequencies, empty)  # L of them

    @torch.no_grad()
    @in_own_numbers
    def atomic_energies(self, structures: Structures) -> Tensor:
        """(N,) eV: a share of the energy for each atom, in float64.

        Only their sum means anything: training sees no other, and another training shares the same
        sum out in another way. What belongs to no atom is shared alike.
        """
        structures = self._here(structures)
        states = self.features(structures, self.operations)
        atomic = self._atomic(states, self.operations, None)
        common = self.energy_mean + self.charge_reference * structures.charge  # (B,)
        shares = (common / structures.natoms)[structures.system]
        return self.own_energies(atomic, structures) + shares

    def own_energies(self, atomic: Tensor, structures: Structures) -> Tensor:
        """(N,), what the energy head says of each atom → (N,) eV with its reference, in float64."""
        return (
            atomic.double() * self.energy_scale + self.element_references[structures.atomic_numbers]
        )

    def in_electronvolts(self, atomic: Tensor, structures: Structures) -> Tensor:
        """(N,), what the energy head says of each atom → (B,) eV, in float64."""
        own = self.own_energies(atomic, structures)
        energy = own.new_zeros(len(structures)).index_add(0, structures.system, own)
        return energy + self.energy_mean + self.charge_reference * structures.charge

    @torch.no_grad()
    def energy_uncertainty(self, structures: Structures, hidden: Tensor | None = None) -> Tensor:
        """(B,) eV: the standard deviation of each energy by the last layer's posterior.

        The energy is linear in the weights of the last layer, so that their covariance C gives its
        variance φᵀCφ, with φ the sum over the atoms of what that layer reads (Bayesian linear
        regression on the network's features). It tells how far a structure is from those of the
        training, in the terms of the network; it does not know of errors that all of them share.
        `hidden` is what `forward` left of these structures; without it the network runs again.

        Raises `InputError` for a model without `posterior`.
        """
        if self.posterior is None:
            raise InputError(
                "this model has no uncertainty: `allscaip-lite calibrate` makes it from the data "
                "that the model was trained on"
            )
        rows = self.last_layer_inputs(structures, hidden)
        return torch.linalg.vector_norm(rows @ self.posterior.to(rows), dim=1)

    @torch.no_grad()
    @in_own_numbers
    def last_layer_inputs(self, structures: Structures, hidden: Tensor | None = None) -> Tensor:
        """(B, 2H + 1) eV: the derivatives of each energy by the last layer's weights and bias."""
        structures = self._here(structures)
        if hidden is None:
            hidden = self.energy_head.hidden(self.features(structures, self.operations))
        hidden = hidden.double()  # (N, 2H)
        sums = hidden.new_zeros(len(structures), hidden.shape[1])  # (B, 2H)
        sums = sums.index_add(0, structures.system, hidden)
        natoms = structures.natoms[:, None].to(sums)  # what a change of the bias adds
        return torch.cat([sums, natoms], dim=1) * self.energy_scale

    @overload
    def predict(self, atoms: Atoms, *others: Any, **named: Any) -> Result: ...

    @overload
    def predict(self, atoms: Sequence[Atoms], *others: Any, **named: Any) -> list[Result]: ...

    @in_own_numbers
    def predict(
        self,
        atoms: Atoms | Sequence[Atoms],
        forward: Callable[..., Prediction] | None = None,
        outside_training: str = "warn",
        uncertainty: bool = False,
    ) -> Result | list[Result]:
        """Energies, forces and stresses of structures.

        Charge and multiplicity come from `atoms.info["charge"]` and `["spin"]`; what is assumed
        of them is said, once a formula. Structures are computed in one batch, or, where their sizes
        are very different, in a few.

        Args:
            atoms: one structure, or a sequence of them.
            forward: computes in place of the model, as a recorded model does.
            outside_training: what happens where a structure has something that training did not
                see: "warn", once a kind and formula, "error" or "ignore".
            uncertainty: whether results have the standard deviation of their energy.

        Returns:
            One result of one structure, else a list in the order of the structures.

        Raises:
            StructureError: the model cannot answer for a structure, or `outside_training` is
                "error" and something is outside.
            TypeError: for what is no `ase.Atoms`.
        """
        batch = listed(atoms)
        limit = self.config.max_num_elements
        assumed: Assumptions = {}
        structures = structures_from_atoms(batch, torch.float64, "cpu", limit, assumed)
        say_assumptions(assumed, self.said)
        say_cells_not_used(batch, self.said)
        with saying_which(structures, self.config.reach):
            warn_outside(self.seen, structures, outside_training, self.said)
        groups = [list(range(len(batch)))]
        hidden: list[Tensor] = []
        asked = {"hidden": hidden} if uncertainty and forward is None else {}
        if forward is None:
            groups = similar_sizes(structures.natoms.tolist())
            asks = any(weight.requires_grad for weight in self.parameters())
            forward = without_weight_grad(self) if asks else self
        results: dict[int, Result] = {}
        for group in groups:
            part = structures if len(groups) == 1 else structures.select(group)
            # gradients are switched on for forces alone
            threads = self.operations.threads(len(part.positions))
            with torch.no_grad(), threads, saying_which(structures, self.config.reach):
                energy, forces, stress = forward(part, create_graph=False, **asked)
            doubts = self.energy_uncertainty(part, *hidden).tolist() if uncertainty else None
            hidden.clear()
            of_atoms = forces.double().cpu().split(part.natoms.tolist())
            boxes = [None] * len(group) if stress is None else list(stress.double().cpu().numpy())
            for row, index in enumerate(group):
                full = batch[index].pbc.any() and batch[index].cell.rank == 3
                results[index] = Result(
                    float(energy[row]),
                    of_atoms[row].numpy(),
                    boxes[row] if full else None,
                    doubts[row] if doubts else None,
                )
        return results[0] if isinstance(atoms, Atoms) else [results[i] for i in range(len(batch))]


def check_model(model: object) -> None:
    """Raise TypeError for what is no model, such as the name of one."""
    check_kind(model, AllScAIP, "a model, such as load_model('lite')")


def check_number_type(dtype: torch.dtype | None) -> None:
    """Raise `InputError` for numbers that cannot tell positions apart, or are none of PyTorch."""
    if dtype not in (None, torch.float32, torch.float64):
        raise InputError(
            f"number type {dtype}: positions and forces need torch.float32 or torch.float64"
        )


@contextmanager
def saying_which(structures: Structures, reach: float) -> Iterator[None]:
    """Around what is done with a part of them: errors say which structure of the whole it is."""
    try:
        yield
    except StructureError:
        candidate_pairs(structures, reach)
        raise


def similar_sizes(natoms: Sequence[int]) -> list[list[int]]:
    """Indices of systems in groups that are computed together.

    The node attention pads all to the longest, n² for each: among systems of very different sizes
    most of it would be padding. Then no group has systems 1.5 times as long as others, but short
    ones. Each group is in the order of the indices.
    """
    if len(natoms) * max(natoms) ** 2 <= 4 * sum(n * n for n in natoms):
        return [list(range(len(natoms)))]
    groups: list[list[int]] = [[]]
    for index in sorted(range(len(natoms)), key=natoms.__getitem__):
        if groups[-1] and natoms[index] > max(32, 1.5 * natoms[groups[-1][0]]):
            groups.append([])
        groups[-1].append(index)
    return [sorted(group) for group in groups]


def without_weight_grad(module: M) -> M:
    """A second module on the same weights, which asks for no gradients of them.

    The weights of `module` stay as they are, so that another thread may train it meanwhile.
    """
    twin, own = copy.copy(module), vars(module)
    vars(twin).update(
        _parameters={  # some are None, as a linear layer's bias
            name: None if weight is None else nn.Parameter(weight.detach(), False)
            for name, weight in own["_parameters"].items()
        },
        _buffers=dict(own["_buffers"]),
        _modules={name: without_weight_grad(part) for name, part in module.named_children()},
    )
    return twin
