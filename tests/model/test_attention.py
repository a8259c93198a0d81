"""The formulas of attention, beside longer ways to the same numbers.

Everything in float64. Layouts come from graphs of a batch whose systems differ in size, so empty
slots are always there. `tests/kernels` holds the faster forms to these formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from ase import Atoms
from conftest import CHANNELS, neutral, random
from torch import Tensor

from allscaip_lite import attention
from allscaip_lite.attention import Neighborhoods, SystemTable
from allscaip_lite.encodings import (
    rotary_frequencies,
    slot_legendre,
    spherical_harmonics,
)
from allscaip_lite.graph import Graph

HEADS = 2


@dataclass
class Case:
    """One attention's inputs: leaves that ask for gradients, and the layout they belong to."""

    graph: Graph
    qkv: Tensor
    log_weight: Tensor
    legendre: Tensor
    layout: str
    groups: list[slice]

    @property
    def inputs(self) -> tuple:
        graph = replace(self.graph, log_weight=self.log_weight)
        return (
            self.qkv,
            Neighborhoods(graph, self.legendre),
            self.layout,
            attention.Heads(self.groups, HEADS),
        )

    @property
    def slot(self) -> Tensor:
        return self.graph.slot(self.layout)


def make_case(
    graph: Graph, channels: tuple[int, ...] | None, layout: str = "source", head_size: int = 16
) -> Case:
    legendre = slot_legendre(graph, max(0, len(channels or ()) - 1))
    return Case(
        graph=graph,
        qkv=random(len(graph.source_slot), 3 * HEADS * head_size).requires_grad_(),
        log_weight=graph.log_weight.detach().clone().requires_grad_(),
        legendre=legendre.detach().requires_grad_(),
        layout=layout,
        groups=attention.channel_groups(channels, head_size),
    )


@pytest.fixture(scope="module")
def graph(make_graph: Callable[..., Graph], cluster: Atoms) -> Graph:
    """Full rows, half-empty rows and one atom alone."""
    found = make_graph([cluster, neutral("CH3OH"), neutral("He")])
    assert found.counts.min() == 1 and found.counts.max() == found.num_slots > 9
    return found


@pytest.fixture(scope="module")
def tiny_graph(make_graph: Callable[..., Graph]) -> Graph:
    return make_graph([neutral("H2O"), neutral("OH", spin=2)])


# --- the neighbourhood attention ---------------------------------------------------------------


def test_attention_stays_inside_its_row(graph: Graph) -> None:
    """A state hears the states that share its row, and no other."""
    case = make_case(graph, CHANNELS["lae"])
    row = case.slot // graph.num_slots
    mixed, _ = attention.neighborhood_attention(*case.inputs)
    (gradient,) = torch.autograd.grad(mixed[row == 3].sum(), case.qkv)
    assert torch.equal(gradient.abs().sum(1) > 0, row == 3)


def test_empty_slots_never_matter(graph: Graph) -> None:
    """More empty slots, with any Legendre entries there: the same numbers."""
    case = make_case(graph, CHANNELS["lae"])
    expected, _ = attention.neighborhood_attention(*case.inputs)
    extra = 3
    width, wider = graph.num_slots, graph.num_slots + extra
    slot = case.slot // width * wider + case.slot % width
    log_weight = F.pad(case.log_weight, (0, extra), value=-torch.inf)
    occupied = log_weight.isfinite()
    legendre = F.pad(case.legendre, (0, extra, 0, extra)).detach().clone()
    empty = ~(occupied.unsqueeze(2) & occupied.unsqueeze(1))
    legendre[:, empty] = random(len(legendre), int(empty.sum()), seed=5)
    wide = Neighborhoods(replace(graph, log_weight=log_weight, source_slot=slot), legendre)
    found, weights = attention.neighborhood_attention(
        case.qkv, wide, "source", attention.Heads(case.groups, HEADS)
    )
    assert (weights[:, ~occupied.unsqueeze(1).expand(-1, wider, -1)] == 0).all()
    assert torch.allclose(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert torch.allclose(found, expected, rtol=0, atol=1e-13)
    pull = random(*expected.shape, seed=1)
    (wanted,) = torch.autograd.grad(expected, case.qkv, pull)
    (found,) = torch.autograd.grad(found, case.qkv, pull)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_neighborhood_attention_can_be_differentiated_twice(tiny_graph: Graph) -> None:
    graph = tiny_graph
    case = make_case(graph, (1, 2, 1), head_size=4)
    real = graph.log_weight.isfinite()
    finite = graph.log_weight[real].detach().requires_grad_()

    def attend(qkv: Tensor, weight: Tensor, legendre: Tensor) -> Tensor:
        table = torch.full_like(graph.log_weight, -torch.inf).masked_scatter(real, weight)
        rows = Neighborhoods(replace(graph, log_weight=table), legendre)
        return attention.neighborhood_attention(
            qkv, rows, "source", attention.Heads(case.groups, HEADS)
        )[0]

    inputs = (case.qkv, finite, case.legendre)
    assert not real.all()
    assert torch.autograd.gradcheck(attend, inputs)
    assert torch.autograd.gradgradcheck(attend, inputs)


# --- the angular encoding ----------------------------------------------------------------------


def test_angular_logits_are_repeated_channels_times_harmonics(graph: Graph) -> None:
    """The reference's way: each channel 2l + 1 times, each times Y_lm/√(2l+1), one product."""
    channels = CHANNELS["lae"]
    groups = attention.channel_groups(channels, 16)
    n, slots = graph.log_weight.shape
    q, k = random(HEADS, n, slots, 16, seed=1), random(HEADS, n, slots, 16, seed=2)
    directions = graph.slot_directions.reshape(-1, 3)
    present = directions.norm(dim=1) > 0.5
    harmonics = torch.zeros(n * slots, len(channels) ** 2, dtype=q.dtype)
    harmonics[present] = spherical_harmonics(directions[present], len(channels) - 1)
    harmonics[:, 0] = 1  # Y_00, also without a direction
    harmonics = harmonics.view(n, slots, -1)

    def expand(x: Tensor) -> Tensor:
        parts = []
        for l, group in enumerate(groups):
            angular = harmonics[..., l * l : (l + 1) ** 2] / math.sqrt(2 * l + 1)
            parts.append((x[..., group, None] * angular.unsqueeze(-2)).flatten(-2))
        return torch.cat(parts, -1)

    expected = expand(q) @ expand(k).transpose(-1, -2)
    found = attention.angular_logits(q, k, slot_legendre(graph, len(channels) - 1), groups)
    assert torch.allclose(found, expected, rtol=0, atol=1e-11)


def test_channel_groups_cover_a_head() -> None:
    assert attention.channel_groups((2, 0, 3), 5) == [slice(0, 2), slice(2, 2), slice(2, 5)]
    assert attention.channel_groups(None, 5) == [slice(0, 5)]


def test_without_lae_attention_is_a_plain_dot_product(graph: Graph) -> None:
    """Row by row, by PyTorch's own attention on the occupied slots alone."""
    case = make_case(graph, None)
    mixed, _ = attention.neighborhood_attention(*case.inputs)
    q, k, v = case.qkv.view(-1, 3, HEADS, 16).permute(1, 2, 0, 3)  # (h, M, D)
    row, column = case.slot // graph.num_slots, case.slot % graph.num_slots
    for i in range(graph.num_atoms):
        states = (row == i).nonzero().squeeze(1)
        mask = case.log_weight[i, column[states]].expand(1, len(states), -1)
        own = F.scaled_dot_product_attention(q[:, states], k[:, states], v[:, states], mask)
        expected = own.transpose(0, 1).reshape(len(states), -1)
        assert torch.allclose(mixed[states], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("channels", CHANNELS.values(), ids=CHANNELS)
def test_self_edge_attention_is_the_first_row_of_the_full_one(
    graph: Graph, channels: tuple[int, ...] | None
) -> None:
    """What the last block computes is what the whole destination attention gives the atoms."""
    case = make_case(graph, channels, "destination")
    n = graph.num_atoms
    full = attention.neighborhood_attention(*case.inputs)[0][:n]
    query, key_value = case.qkv.split([32, 64], dim=1)
    short, weights = attention.self_edge_attention(query[:n], key_value, *case.inputs[1:])
    assert weights.shape == (HEADS, n, 1, graph.num_slots)
    assert torch.allclose(short, full, rtol=0, atol=1e-12)
    pull = random(n, 32, seed=1)
    leaves = [case.qkv, case.log_weight]
    for a, b in zip(
        torch.autograd.grad(short, leaves, pull),
        torch.autograd.grad(full, leaves, pull),
        strict=True,
    ):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


# --- rotary bias -------------------------------------------------------------------------------


def test_rotary_bias_is_the_logarithm_of_a_softplus_of_mixed_sincs() -> None:
    d, weight = torch.tensor([0.0, 1.3, 40.0], dtype=torch.float64), random(2, 4)
    frequencies = torch.logspace(math.log10(math.pi / 120), math.log10(4 * math.pi), 4)
    for head in range(2):
        for index, distance in enumerate(d.tolist()):
            mixed = sum(
                float(w) * (math.sin(f * distance) / (f * distance) if distance else 1.0)
                for w, f in zip(weight[head], frequencies.double().tolist(), strict=True)
            )
            expected = math.log(math.log1p(math.exp(mixed)) + 1e-6)
            found = attention.rotary_bias(d, weight, frequencies.double())[head, index].item()
            assert found == pytest.approx(expected, abs=1e-12)


def test_rotary_bias_can_be_differentiated_twice() -> None:
    d = torch.tensor([0.4, 2.0, 9.0], dtype=torch.float64, requires_grad=True)
    weight = random(2, 4).requires_grad_()
    frequencies = rotary_frequencies(4, d)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda d, w: attention.rotary_bias(d, w, frequencies), (d, weight))


# --- node attention ----------------------------------------------------------------------------


def node_bias(table: SystemTable, rotary: bool) -> Tensor | None:
    """(B, h, n, n) random, -inf at empty keys."""
    if not rotary and table.slot is None:
        return None
    batch, longest = table.real.shape
    bias = random(batch, HEADS, longest, longest, seed=4) if rotary else torch.zeros(1).double()
    return (bias + torch.zeros(batch, HEADS, longest, longest)).masked_fill(
        ~table.real[:, None, None], -torch.inf
    )


@pytest.mark.parametrize("natoms", [[4, 4], [5, 1, 3], [1]])
@pytest.mark.parametrize("rotary", [True, False])
def test_node_attention_of_each_system_is_pytorch_s_own(natoms: list[int], rotary: bool) -> None:
    """A system in a batch gets what PyTorch's attention gives it alone."""
    table = SystemTable.make(torch.tensor(natoms))
    assert (table.slot is None) == (len(set(natoms)) == 1)
    bias = node_bias(table, rotary)
    qkv = random(sum(natoms), 3 * 32)
    mixed, weights = attention.node_attention(qkv, bias, table, HEADS)
    assert torch.allclose(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert (weights.transpose(1, 3)[~table.real] == 0).all()  # nobody attends to an empty slot
    for index, (own, found) in enumerate(zip(qkv.split(natoms), mixed.split(natoms), strict=True)):
        q, k, v = own.view(len(own), 3, HEADS, 16).permute(1, 2, 0, 3)
        mask = None if bias is None else bias[index, :, : len(own), : len(own)]
        expected = F.scaled_dot_product_attention(q, k, v, mask).transpose(0, 1).flatten(1)
        assert torch.allclose(found, expected, rtol=0, atol=1e-12)


def test_node_attention_can_be_differentiated_twice() -> None:
    table = SystemTable.make(torch.tensor([2, 1]))
    logits = random(2, 2, 2, 2).requires_grad_()
    qkv = random(3, 12).requires_grad_()

    def attend(qkv: Tensor, logits: Tensor) -> Tensor:
        bias = logits.masked_fill(~table.real[:, None, None], -torch.inf)
        return attention.node_attention(qkv, bias, table, HEADS)[0]

    assert torch.autograd.gradcheck(attend, (qkv, logits))
    assert torch.autograd.gradgradcheck(attend, (qkv, logits))


def test_dropout_changes_the_mixing_but_not_the_recorded_weights(graph: Graph) -> None:
    case = make_case(graph, CHANNELS["lae"])
    torch.manual_seed(0)
    kept, weights = attention.neighborhood_attention(*case.inputs)
    *inputs, heads = case.inputs
    dropped, same = attention.neighborhood_attention(*inputs, heads._replace(dropout=0.5))
    assert torch.equal(weights, same)
    assert (kept - dropped).abs().max() > 0.1


def test_the_two_layouts_hold_the_same_edges_reversed(graph: Graph) -> None:
    """Each state has a slot of its own; a slot's edge in one layout is its reverse in the other."""
    n, pairs = graph.num_atoms, graph.num_pairs
    occupied = torch.arange(graph.num_slots) < graph.counts.unsqueeze(1)
    for slot in (graph.source_slot, graph.destination_slot):
        assert len(slot.unique()) == len(slot) == n + 2 * pairs
        assert occupied.flatten()[slot].all() and occupied.sum() == len(slot)
    reverse = torch.cat([torch.arange(n), n + pairs + torch.arange(pairs), n + torch.arange(pairs)])
    assert torch.equal(graph.destination_slot, graph.source_slot[reverse])
    arrive = graph.destination_slot[n:] // graph.num_slots
    assert torch.equal(arrive, graph.target)
