"""AllScAIP: the network, its heads, and energies, forces and stress (paper section 3).

In: `Structures`, or `ase.Atoms` through `predict`. Out: `Prediction` in eV, eV/Å and eV/Å³.

    Input ▸ L × Block(source ▸ destination ▸ edge FFN ▸ node attention ▸ node FFN) ▸ heads

States are one flat list (M, H): the N atoms, then the 2P edges (see `graph`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from ase import Atoms
from torch import Tensor, nn

from allscaip_lite import attention, encodings
from allscaip_lite.attention import SelfAttention
from allscaip_lite.config import AllScAIPConfig
from allscaip_lite.graph import Graph, build_graph
from allscaip_lite.kernels import compiled, fused
from allscaip_lite.kernels.fused import Linear
from allscaip_lite.kernels.slots import AttentionRecord, Layout, SystemTable, by_count
from allscaip_lite.layers import Activation, FeedForward, RMSNorm, make_norm
from allscaip_lite.neighbors import system_distances
from allscaip_lite.structures import (
    MAX_CHARGE,
    MAX_MULTIPLICITY,
    Structures,
    structures_from_atoms,
)

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


@dataclass(frozen=True)
class Geometry:
    """All that the blocks read of a batch besides the states, made once a forward pass."""

    graph: Graph
    legendre: Tensor | None  # (l, N, K, K) for LAE
    source: Layout
    destination: Layout
    systems: SystemTable
    biases: Sequence[Any]  # of each block's node attention, (B, h, n, n) or None
    fused: bool  # whether the forms that can be differentiated once may serve
    rows: compiled.Rows | None  # for the compiled form


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

    def forward(self, structures: Structures, graph: Graph, order: Tensor) -> Tensor:
        """→ (M, H) states of atoms and edges; order (N, 10): the bond-orientational order."""
        config, act = self.config, self.activation
        atoms = self.atom_embedding(structures.atomic_numbers)  # (N, H)
        nodes = torch.cat([atoms, act(self.bond_order(order))], dim=1)  # (N, 2H)
        nodes = act(self.node(self.norm(nodes)))  # (N, H)
        charge = self.charge_embedding(structures.charge + MAX_CHARGE)  # (B, H)
        spin = self.spin_embedding(structures.spin)  # (B, H)
        charge_spin = act(self.charge_spin(torch.cat([charge, spin], dim=1)))  # (B, H)
        nodes = nodes + charge_spin[structures.system]

        # Lin([node ; attributes]) in two halves: the node's half once an atom, not once an edge
        node_weight, attribute_weight = self.edge.weight.split(config.hidden_size, dim=1)
        node_half = fused.linear(nodes, node_weight, self.edge.bias)  # (N, H)
        row = torch.cat([torch.arange(len(nodes), device=nodes.device), graph.source])
        node_half = node_half.gather(0, row.unsqueeze(1).expand(-1, config.hidden_size))  # (M, H)
        attributes = act(self.attributes(graph))  # (M, H)
        return act(node_half + fused.linear(attributes, attribute_weight, None))

    def attributes(self, graph: Graph) -> Tensor:
        """(M, H): Lin([basis(d) ; Y(r̂)]), each pair computed once for both its directions."""
        size, degree = self.config.num_distance_basis, self.config.direction_degree
        basis_weight, direction_weight = self.edge_attributes.weight.tensor_split([size], dim=1)
        distances = torch.cat([graph.distances.new_zeros(1), graph.distances])  # self-edge first
        radial = fused.linear(self.basis(distances), basis_weight, self.edge_attributes.bias)
        harmonics = encodings.spherical_harmonics(graph.directions, degree)  # (P, 36)
        number = torch.arange((degree + 1) ** 2, device=harmonics.device)  # l² + l + m
        parity = 1 - 2 * (number.sqrt().long() % 2)  # Y(-r) = (-1)^l Y(r)
        harmonics = torch.cat([harmonics, harmonics * parity])  # (2P, 36)
        edges = radial[1:].repeat(2, 1) + fused.linear(harmonics, direction_weight, None)  # (2P, H)
        alone = radial[:1] + direction_weight[:, 0]  # only Y_00 = 1 survives without a direction
        return torch.cat([alone.expand(graph.num_atoms, -1), edges])

    def basis(self, distances: Tensor) -> Tensor:
        """(E,) Å → (E, 512)."""
        config = self.config
        if config.distance_basis == "silu":
            ones = torch.ones_like(distances)
            return F.silu(self.distance_basis(torch.stack([distances, ones], dim=1)))
        return encodings.radial_basis(
            distances, config.distance_basis, config.cutoff, config.num_distance_basis
        )


class Block(nn.Module):
    """One transformer block; every branch is x + scale · branch(norm(x))."""

    def __init__(self, config: AllScAIPConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.groups = attention.channel_groups(config.angular_channels, config.head_size)
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

    def forward(
        self, states: Tensor, geometry: Geometry, index: int, record: AttentionRecord | None = None
    ) -> Tensor:
        """(M, H) → (M, H), or (N, H) from the last block, whose edges nobody reads."""
        graph = geometry.graph
        states = self.mix_edges(states, "source", geometry, record)
        if index == self.config.num_layers - 1 and record is None:
            nodes, edges = self.mix_self_edges(states, geometry), None
        else:
            states = self.mix_edges(states, "destination", geometry, record)
            nodes, edges = states.split([graph.num_atoms, 2 * graph.num_pairs])
            edges = torch.addcmul(edges, self.edge_ffn(edges), self.scale["edge_ffn"])
        if self.config.node_attention:
            nodes = self.mix_nodes(nodes, geometry, index, record)
        nodes = torch.addcmul(nodes, self.node_ffn(nodes), self.scale["node_ffn"])
        return nodes if edges is None else torch.cat([nodes, edges])

    def mix_edges(
        self, states: Tensor, layout: str, geometry: Geometry, record: AttentionRecord | None
    ) -> Tensor:
        """Neighbourhood attention in one layout, with its residual: (M, H) → (M, H)."""
        norm, layer = getattr(self, f"{layout}_norm"), getattr(self, f"{layout}_attention")
        groups, heads = self.groups, self.config.num_heads
        qkv = layer.project(norm(states))  # (M, 3H)
        table = (geometry.graph.log_weight, geometry.legendre, getattr(geometry, layout))
        if geometry.rows is not None and not self.dropout:
            mixed = compiled.neighborhood_attention(qkv, geometry.rows, layout, groups, heads)
        elif geometry.fused and not self.dropout:
            mixed = fused.FusedNeighborhoodAttention.apply(qkv, *table, groups, heads)
        else:
            options = (groups, heads, self.dropout)
            mixed, weights = attention.neighborhood_attention(qkv, *table, *options)
            if record is not None:
                getattr(record, layout).append(weights)
        return torch.addcmul(states, layer.output(mixed), self.scale[layout])

    def mix_self_edges(self, states: Tensor, geometry: Geometry) -> Tensor:
        """Destination attention for the atoms alone, with its residual: (M, H) → (N, H)."""
        layer, log_weight = self.destination_attention, geometry.graph.log_weight
        normed = self.destination_norm(states)
        nodes = states[: len(log_weight)]
        q = layer.query(normed[: len(nodes)]).unflatten(1, (self.config.num_heads, -1))  # (N, h, D)
        key_value = layer.project(normed, ("key", "value"))  # (M, 2H)
        mixed = attention.self_edge_attention(
            q, key_value, log_weight, geometry.destination, self.groups[0], self.dropout
        )
        return torch.addcmul(nodes, layer.output(mixed), self.scale["destination"])

    def mix_nodes(
        self, nodes: Tensor, geometry: Geometry, index: int, record: AttentionRecord | None
    ) -> Tensor:
        """All-to-all attention over the atoms of a system, with its residual: (N, H) → (N, H)."""
        mixed, weights = attention.node_attention(
            self.node_attention.project(self.node_norm(nodes)),  # (N, 3H)
            geometry.biases[index],
            geometry.systems,
            self.config.num_heads,
            self.dropout,
            geometry.fused and record is None and not self.dropout,
        )
        if record is not None:
            record.node.append(weights)
        return torch.addcmul(nodes, self.node_attention.output(mixed), self.scale["node"])


class AllScAIP(nn.Module):
    """The whole model.

    Residual scales start at 1/L and biases at zero, as in the reference; matrices start at variance
    2/fan-in and atom embeddings at 1, larger than there: short trainings then learned faster.
    """

    def __init__(self, config: AllScAIPConfig) -> None:
        super().__init__()
        self.config = config
        self._compiled = False
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

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Move or cast the weights, but keep the energy's scale and references in float64."""
        exact = {name: getattr(self, name) for name in UNITS}  # a cast would round them
        super()._apply(fn, recurse)
        for name, value in exact.items():
            if not value.is_meta:
                setattr(self, name, value.to(getattr(self, name).device))
        return self

    @property
    def compiled(self) -> bool:
        """Whether the kernels of `compiled` serve; set, they are compiled now, on a CPU only."""
        return self._compiled

    @compiled.setter
    def compiled(self, wanted: bool) -> None:
        wanted = wanted and self.device.type == "cpu"
        if wanted:
            compiled.load_kernels(self.dtype)  # now, not at the first step
        self._compiled = wanted
        for module in self.modules():
            if isinstance(module, Activation | RMSNorm):
                module.compiled = wanted

    @property
    def dtype(self) -> torch.dtype:
        return self.input.atom_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.input.atom_embedding.weight.device

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def forward(
        self,
        structures: Structures,
        create_graph: bool | None = None,
        features: Callable[..., Tensor] | None = None,
        periodic: bool | None = None,
    ) -> Prediction:
        """Energy, forces and, for a conservative model with periodic systems, stress.

        `create_graph` keeps forces differentiable (default: in training mode); otherwise the fused
        kernels run, which can be differentiated once. The compiled ones serve for both. `features`
        may replace those below, and `periodic` say whether anything is.
        """
        features = features or self.features
        create_graph = self.training if create_graph is None else create_graph
        structures = structures.to(self.device, self.dtype)
        if not self.config.conservative:
            nodes = features(structures, fused=True)
            energy = self.in_electronvolts(self.energy_head(nodes).squeeze(1), structures)
            forces = self.force_head(nodes) * self.force_scale.to(self.dtype)
            return Prediction(energy, forces, None)
        with torch.enable_grad():
            positions = structures.positions.detach().requires_grad_()
            inputs = [positions]
            moved = structures.replace(positions=positions)
            periodic = bool(structures.pbc.any()) if periodic is None else periodic
            with_stress = self.config.stress and periodic
            if with_stress:
                inputs.append(positions.new_zeros(len(structures), 3, 3).requires_grad_())
                moved = moved.strained(inputs[1])
            atomic = self.energy_head(features(moved, fused=not create_graph)).squeeze(1)
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

    def features(
        self, structures: Structures, fused: bool, record: AttentionRecord | None = None
    ) -> Tensor:
        """(N, H): the states of the atoms after the last block, before the heads' norms."""
        graph, atoms, rows = build_graph(structures, self.config), None, None
        if self.compiled and record is None and not any(block.dropout for block in self.blocks):
            rows = compiled.Rows.make(graph)
        elif fused:
            structures, graph, atoms = by_count(structures, graph)
        systems = SystemTable.make(structures.natoms)
        occupied = torch.arange(graph.num_slots, device=self.device) < graph.counts.unsqueeze(1)
        lae = 0 if rows else len(self.config.angular_channels or (0,)) - 1
        geometry = Geometry(
            graph=graph,
            legendre=encodings.slot_legendre(graph, lae) if lae else None,
            source=Layout.make(graph.source_slot, occupied),
            destination=Layout.make(graph.destination_slot, occupied),
            systems=systems,
            biases=self.biases(structures, systems),
            fused=fused,
            rows=rows,
        )
        nodes = self.states(structures, geometry, record)
        return nodes if atoms is None else torch.empty_like(nodes).index_copy(0, atoms, nodes)

    def states(
        self, structures: Structures, geometry: Geometry, record: AttentionRecord | None = None
    ) -> Tensor:
        """(N, H): the same from a geometry that is made, in the order of its atoms."""
        states = self.input(structures, geometry.graph, self.bond_order(geometry))  # (M, H)
        for index, block in enumerate(self.blocks):
            states = block(states, geometry, index, record)
        if record is not None:
            record.geometry = geometry
        return states[: geometry.graph.num_atoms]

    def bond_order(self, geometry: Geometry) -> Tensor:
        """(N, 10): the bond-orientational order of all atoms."""
        graph, degree = geometry.graph, self.config.bond_order_degree
        smooth, log_weight = self.config.smooth_bond_order, graph.log_weight  # (N, K)
        weights = log_weight.exp() if smooth else log_weight.isfinite().to(self.dtype)
        if geometry.rows is not None:
            sums = compiled.pair_sums(weights, geometry.rows, degree)
        elif geometry.fused:
            sums = fused.pair_sums(graph.slot_directions, weights, degree, geometry.source.runs)
        else:
            sums = encodings.pair_sums(encodings.slot_legendre(graph, degree), weights)
        return encodings.bond_orientational_order(sums, weights)

    def biases(
        self, structures: Structures, systems: SystemTable, distances: Tensor | None = None
    ) -> Sequence[Any]:
        """Logits of each block's node attention, (B, h, n, n): ERoPE, and -inf at empty keys, from
        `distances` (B, n, n) Å between nearest images, if they are known."""
        config, empty = self.config, systems.mask(self.dtype)
        if not config.rotary:
            return [empty] * config.num_layers
        if distances is None:
            positions = systems.spread(structures.positions).view(*systems.real.shape, 3)
            distances = system_distances(structures, positions)
        weight = torch.cat([block.rotary_weight for block in self.blocks])  # (L·h, F)
        frequencies = encodings.rotary_frequencies(weight.shape[1], distances)
        # all blocks at once, (L·h, B, n, n)
        bias = fused.rotary_bias(distances, weight, frequencies)
        bias = bias.unflatten(0, (config.num_layers, -1)).transpose(1, 2)  # (L, B, h, n, n)
        return (bias if empty is None else bias + empty).unbind(0)

    def in_electronvolts(self, atomic: Tensor, structures: Structures) -> Tensor:
        """(N,), what the energy head says of each atom → (B,) eV, in float64."""
        per_atom = atomic.double() * self.energy_scale
        per_atom = per_atom + self.element_references[structures.atomic_numbers]
        energy = per_atom.new_zeros(len(structures)).index_add(0, structures.system, per_atom)
        return energy + self.energy_mean + self.charge_reference * structures.charge

    def predict(
        self, atoms: Atoms | Sequence[Atoms], forward: Callable[..., Prediction] | None = None
    ) -> list[Result]:
        """Energies, forces and stresses of structures, in one batch; `forward` may be recorded.

        Charge and multiplicity come from `atoms.info["charge"]` and `["spin"]`. Raises
        `StructureError` for what the model cannot answer for.
        """
        batch = [atoms] if isinstance(atoms, Atoms) else list(atoms)
        limit = self.config.max_num_elements
        structures = structures_from_atoms(batch, torch.float64, max_num_elements=limit)
        # gradients are switched on for forces alone
        with torch.no_grad(), nullcontext() if forward else fused.frozen(self):
            energy, forces, stress = (forward or self)(structures, create_graph=False)
        forces = forces.double().cpu().split(structures.natoms.tolist())
        stress = [None] * len(batch) if stress is None else list(stress.double().cpu().numpy())
        full = [bool(system.pbc.any()) and system.cell.rank == 3 for system in batch]
        return [
            Result(float(energy[i]), forces[i].numpy(), stress[i] if full[i] else None)
            for i in range(len(batch))
        ]
