"""Attention: the fused twins beside the plain formulas, the plain formulas beside longer ways.

Everything in float64 except `linear`, whose fast path is float32. Layouts come from graphs of a
batch whose systems differ in size, so empty slots are always there.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from ase import Atoms
from ase.build import molecule
from torch import Tensor

from allscaip_lite import attention
from allscaip_lite.encodings import (
    pair_sums,
    radial_basis,
    rotary_frequencies,
    slot_legendre,
    spherical_harmonics,
)
from allscaip_lite.graph import Graph
from allscaip_lite.kernels import compiled, fused, slots
from allscaip_lite.kernels.slots import Collect, Layout, Spread, SystemTable

HEADS = 2
CHANNELS = {
    "lae": (5, 4, 1, 3, 3),
    "empty group": (9, 0, 4, 0, 3),
    "no invariant group": (0, 8, 8),
    "one group": (16,),
    "none": None,
}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype)


def neutral(name: str, spin: int = 1) -> Atoms:
    atoms = Atoms("He") if name == "He" else molecule(name)
    atoms.info.update(charge=0, spin=spin)
    return atoms


@dataclass
class Case:
    """One attention's inputs: leaves that ask for gradients, and the layout they belong to."""

    graph: Graph
    qkv: Tensor
    log_weight: Tensor
    legendre: Tensor | None
    layout: Layout
    groups: list[slice]

    @property
    def inputs(self) -> tuple:
        return (self.qkv, self.log_weight, self.legendre, self.layout, self.groups, HEADS)

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.qkv, self.log_weight, self.legendre) if x is not None]


def make_case(
    graph: Graph, channels: tuple[int, ...] | None, which: str = "source", head_size: int = 16
) -> Case:
    occupied = torch.arange(graph.num_slots) < graph.counts.unsqueeze(1)
    slot = graph.source_slot if which == "source" else graph.destination_slot
    degrees = len(channels or ()) - 1
    legendre = slot_legendre(graph, degrees).detach().requires_grad_() if degrees > 0 else None
    rows = graph.num_atoms + 2 * graph.num_pairs
    return Case(
        graph=graph,
        qkv=random(rows, 3 * HEADS * head_size).requires_grad_(),
        log_weight=graph.log_weight.detach().clone().requires_grad_(),
        legendre=legendre,
        layout=Layout.make(slot, occupied),
        groups=attention.channel_groups(channels, head_size),
    )


@pytest.fixture(scope="module")
def graph(make_graph: Callable[..., Graph], cluster: Atoms) -> Graph:
    """Full rows, half-empty rows and one atom alone."""
    found = make_graph([cluster, neutral("CH3OH"), neutral("He")])
    assert found.counts.min() == 1 and found.counts.max() == found.num_slots > 9
    return found


@pytest.fixture
def kernels() -> None:
    """The compiled kernels, or the test is skipped."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")


@pytest.fixture(scope="module")
def tiny_graph(make_graph: Callable[..., Graph]) -> Graph:
    return make_graph([neutral("H2O"), neutral("OH", spin=2)])


# --- the neighbourhood attention, fused and plain ----------------------------------------------


@pytest.mark.parametrize("which", ["source", "destination"])
@pytest.mark.parametrize("channels", CHANNELS.values(), ids=CHANNELS)
@pytest.mark.parametrize("chunk", [None, 1, 7])
def test_fused_neighborhood_attention_is_the_formula(
    graph: Graph,
    channels: tuple[int, ...] | None,
    which: str,
    chunk: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if chunk:
        monkeypatch.setattr(slots, "FEWEST_ROWS", 1)
        monkeypatch.setattr(slots, "RUN_ENTRIES", chunk * graph.num_slots**2)
    case = make_case(graph, channels, which)
    if chunk:
        assert len(case.layout.runs) > 3 and len(case.layout.full) < graph.log_weight.numel()
    plain, weights = attention.neighborhood_attention(*case.inputs)
    fast = fused.FusedNeighborhoodAttention.apply(*case.inputs)
    assert plain.shape == (len(case.qkv), 32)
    assert torch.allclose(fast, plain, rtol=0, atol=1e-12)
    assert torch.allclose(weights.sum(-1), torch.ones_like(weights[..., 0]))
    pull = random(*plain.shape, seed=1)
    expected = torch.autograd.grad(plain, case.leaves, pull)
    found = torch.autograd.grad(fast, case.leaves, pull)
    for a, b in zip(found, expected, strict=True):
        assert torch.isfinite(a).all()
        assert torch.allclose(a, b, rtol=0, atol=1e-12)
    assert all(g.abs().max() > 1e-3 for g in expected)


@pytest.mark.parametrize("which", ["source", "destination"])
@pytest.mark.parametrize("channels", CHANNELS.values(), ids=CHANNELS)
@pytest.mark.parametrize("threads", [1, 3])
def test_compiled_neighborhood_attention_is_the_formula(
    graph: Graph, channels: tuple[int, ...] | None, which: str, threads: int, kernels: None
) -> None:
    """And its derivatives, first and second: of queries, keys, values, envelopes and directions."""
    directions = graph.slot_directions.detach().requires_grad_()
    graph = replace(graph, slot_directions=directions)
    case = make_case(graph, channels, which)
    degrees = len(channels or ()) - 1
    legendre = slot_legendre(graph, degrees) if degrees > 0 else None
    inputs = (case.qkv, case.log_weight, legendre, case.layout, case.groups, HEADS)
    plain, _ = attention.neighborhood_attention(*inputs)
    rows = compiled.Rows.make(replace(graph, log_weight=case.log_weight))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        qkv = case.qkv.t().contiguous().t()  # lying any way
        fast = compiled.neighborhood_attention(qkv, rows, which, case.groups, HEADS)
        leaves = [case.qkv, case.log_weight, directions]
        pull = random(*plain.shape, seed=1).requires_grad_()
        found = twice(fast, leaves, pull)
    finally:
        torch.set_num_threads(before)
    assert torch.allclose(fast, plain, rtol=0, atol=1e-12)
    expected = twice(plain, leaves, pull)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-11)
    assert degrees <= 0 or expected[2].abs().max() > 1e-3
    assert all(x.abs().max() > 1e-3 for x in expected[3:6])


def twice(value: Tensor, leaves: list[Tensor], pull: Tensor) -> list[Tensor]:
    """By all leaves; and, of those pulled in turn at random, by all leaves and by the pull."""
    first = torch.autograd.grad(value, leaves, pull, create_graph=True, materialize_grads=True)
    along = sum((x * random(*x.shape, seed=2)).sum() for x in first)
    options = {"materialize_grads": True, "retain_graph": True}
    return [*first, *torch.autograd.grad(along, [*leaves[:2], pull, *leaves[2:]], **options)]


def test_compiled_attention_in_float32(make_graph: Callable[..., Graph], kernels: None) -> None:
    """Its own exponential and sums in any order: as near to float64 as the formula in float32."""
    atoms = Atoms("OH2" * 20, 3 * random(60, 3).numpy())
    atoms.info.update(charge=0, spin=1)
    graph = make_graph([atoms, neutral("H2O")])
    groups = attention.channel_groups((10, 5, 2, 5, 10), 32)
    qkv = 3 * random(len(graph.source_slot), 3 * HEADS * 32)
    occupied = torch.arange(graph.num_slots) < graph.counts.unsqueeze(1)
    layout = Layout.make(graph.source_slot, occupied)

    def answer(dtype: torch.dtype, by_kernels: bool) -> list[Tensor]:
        x = qkv.to(dtype).requires_grad_()
        weight, directions = graph.log_weight.to(dtype), graph.slot_directions.to(dtype)
        moved = replace(graph, log_weight=weight, slot_directions=directions)
        if by_kernels:
            rows = compiled.Rows.make(moved)
            y = compiled.neighborhood_attention(x, rows, "source", groups, HEADS)
        else:
            inputs = (x, weight, slot_legendre(moved, 4), layout, groups, HEADS)
            y, _ = attention.neighborhood_attention(*inputs)
        return [y.detach().double(), torch.autograd.grad(y.square().sum(), x)[0].double()]

    exact, found = answer(torch.float64, True), answer(torch.float32, True)
    for x, a, b in zip(exact, found, answer(torch.float32, False), strict=True):
        assert (a - x).abs().mean() < 1.5 * (b - x).abs().mean() < 3e-6 * x.abs().mean()
        assert (a - x).abs().max() < 3 * (b - x).abs().max()


@pytest.mark.parametrize("form", ["fused", "compiled"])
def test_pair_sums_are_the_formula(graph: Graph, form: str, kernels: None) -> None:
    directions = graph.slot_directions.detach().requires_grad_()
    graph = replace(graph, slot_directions=directions)
    weights = (graph.log_weight.exp() * (0.5 + random(*graph.log_weight.shape).square())).detach()
    weights.requires_grad_()
    expected = pair_sums(slot_legendre(graph, 9), weights)
    if form == "fused":
        runs = make_case(graph, None).layout.runs
        found = fused.FusedPairSums.apply(directions, weights, 9, runs)
    else:
        found = compiled.pair_sums(weights, compiled.Rows.make(graph), 9)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    pull = random(*expected.shape, seed=1).requires_grad_()
    if form == "compiled":
        leaves = [weights, directions]
        pairs = zip(twice(found, leaves, pull), twice(expected, leaves, pull), strict=True)
        assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-10) for a, b in pairs)
    for a, b in zip(
        torch.autograd.grad(found, (weights, directions), pull.detach(), retain_graph=True),
        torch.autograd.grad(expected, (weights, directions), pull.detach(), retain_graph=True),
        strict=True,
    ):
        full = graph.log_weight.isfinite()
        assert b.abs().max() > 1e-3
        assert torch.allclose(a[full], b[full], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("counts", [[1], [5, 3], [32] * 300, [9, 30, 2] * 50, range(70, 0, -1)])
def test_runs_cover_every_row_once(counts: Sequence[int]) -> None:
    counts = torch.tensor(counts)
    longest = int(counts.max())
    for num_slots in (longest, longest + 3):
        found = slots.make_runs(counts, num_slots)
        row, slot = 0, 0
        for run in found:
            assert (run.rows.start, run.slots.start) == (row, slot)
            row, slot = run.rows.stop, run.slots.stop
            assert slot - run.slots.start == (row - run.rows.start) * run.width
            fullest = int(counts[run.rows].max())
            assert fullest <= run.width <= min(fullest + slots.SLOT_STEP, num_slots)
        assert row == len(counts)
        assert all((r.rows.stop - r.rows.start) * r.width**2 <= slots.RUN_ENTRIES for r in found)
        if len(counts) > 1 and (counts == longest).all():
            assert len(found) == 1 + (len(counts) * 32**2 - 1) // slots.RUN_ENTRIES
    if counts.tolist() == list(range(70, 0, -1)):
        assert slot < 0.8 * len(counts) * longest  # sorted rows leave most empty slots out


def test_fused_neighborhood_attention_without_gradient_of_legendre(graph: Graph) -> None:
    """Training direct forces needs none: it comes back as None, and the others do not change."""
    case = make_case(graph, CHANNELS["lae"])
    pull = random(len(case.qkv), 32, seed=1)
    leaves = case.leaves[:2]
    expected = torch.autograd.grad(
        fused.FusedNeighborhoodAttention.apply(*case.inputs), leaves, pull
    )
    case.legendre.requires_grad_(False)
    found = torch.autograd.grad(fused.FusedNeighborhoodAttention.apply(*case.inputs), leaves, pull)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("form", ["plain", "fused"])
def test_attention_stays_inside_its_row(graph: Graph, form: str) -> None:
    """A state hears the states that share its row, and no other."""
    case = make_case(graph, CHANNELS["lae"])
    row = case.layout.slot // graph.num_slots
    apply = {
        "plain": lambda *x: attention.neighborhood_attention(*x)[0],
        "fused": fused.FusedNeighborhoodAttention.apply,
    }[form]
    (gradient,) = torch.autograd.grad(apply(*case.inputs)[row == 3].sum(), case.qkv)
    heard = gradient.abs().sum(1) > 0
    assert torch.equal(heard, row == 3)


def test_empty_slots_never_matter(graph: Graph) -> None:
    """More empty slots, with any Legendre entries there: the same numbers, fused and plain."""
    case = make_case(graph, CHANNELS["lae"])
    expected, _ = attention.neighborhood_attention(*case.inputs)
    extra = 3
    width, wider = graph.num_slots, graph.num_slots + extra
    slot = case.layout.slot // width * wider + case.layout.slot % width
    occupied = F.pad(case.layout.occupied, (0, extra))
    log_weight = F.pad(case.log_weight, (0, extra), value=-torch.inf)
    legendre = F.pad(case.legendre, (0, extra, 0, extra)).detach().clone()
    empty = ~(occupied.unsqueeze(2) & occupied.unsqueeze(1))
    legendre[:, empty] = random(len(legendre), int(empty.sum()), seed=5)
    inputs = (case.qkv, log_weight, legendre, Layout.make(slot, occupied), case.groups, HEADS)
    plain, weights = attention.neighborhood_attention(*inputs)
    assert (weights[:, ~occupied.unsqueeze(1).expand(-1, wider, -1)] == 0).all()
    assert torch.allclose(plain, expected, rtol=0, atol=1e-13)
    fast = fused.FusedNeighborhoodAttention.apply(*inputs)
    assert torch.allclose(fast, expected, rtol=0, atol=1e-12)
    pull = random(*expected.shape, seed=1)
    (wanted,) = torch.autograd.grad(expected, case.qkv, pull)
    for form in (plain, fast):
        (found,) = torch.autograd.grad(form, case.qkv, pull, retain_graph=True)
        assert torch.allclose(found, wanted, rtol=0, atol=1e-12)


def test_neighborhood_attention_can_be_differentiated_twice(tiny_graph: Graph) -> None:
    graph = tiny_graph
    case = make_case(graph, (1, 2, 1), head_size=4)
    real = graph.log_weight.isfinite()
    finite = graph.log_weight[real].detach().requires_grad_()

    def attend(qkv: Tensor, weight: Tensor, legendre: Tensor) -> Tensor:
        table = torch.full_like(graph.log_weight, -torch.inf).masked_scatter(real, weight)
        inputs = (qkv, table, legendre, case.layout, case.groups, HEADS)
        return attention.neighborhood_attention(*inputs)[0]

    inputs = (case.qkv, finite, case.legendre)
    assert not real.all()
    assert torch.autograd.gradcheck(attend, inputs)
    assert torch.autograd.gradgradcheck(attend, inputs)


@pytest.mark.parametrize("form", [fused, compiled], ids=["fused", "compiled"])
def test_rms_norm_twice(form: ModuleType, kernels: None) -> None:
    """Value, gradient and gradient of the gradient of PyTorch's own."""
    x, weight = random(7, 5).t().requires_grad_(), random(7, seed=1).requires_grad_()

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return form.rms_norm(x, weight, 1e-3)

    for asked in (weight, weight.detach()):
        assert torch.autograd.gradcheck(norm, (x, asked))
        assert torch.autograd.gradgradcheck(norm, (x, asked))
    expected = F.rms_norm(x, (7,), weight, 1e-3)
    assert torch.allclose(norm(x, weight), expected, rtol=0, atol=1e-14)
    pull = random(7, 5, seed=2).t()  # as it may lie
    pairs = [torch.autograd.grad(y, (x, weight), pull) for y in (norm(x, weight), expected)]
    assert all(torch.allclose(a, b, rtol=0, atol=1e-13) for a, b in zip(*pairs, strict=True))


@pytest.mark.parametrize("form", [fused, compiled], ids=["fused", "compiled"])
def test_gelu(form: ModuleType, kernels: None) -> None:
    x = (3 * random(11, 3)).t().requires_grad_()  # lying any way
    assert torch.allclose(form.gelu(x), F.gelu(x), rtol=0, atol=1e-15)
    assert torch.autograd.gradcheck(form.gelu, x)
    assert torch.autograd.gradgradcheck(form.gelu, x)


def test_gelu_any_number_of_times() -> None:
    x = (3 * random(11)).requires_grad_()

    def bend(x: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(fused.gelu(x).sum(), x, create_graph=True)
        return torch.autograd.grad(slope.sum(), x, create_graph=True)[0]

    assert torch.autograd.gradcheck(bend, x)


def test_compiled_gelu_in_float32(kernels: None) -> None:
    """Its own error function: as near as float32 is, far out too, and on several threads."""
    x = torch.cat([torch.linspace(-30, 30, 6001), torch.tensor([-1e4, 0.0, 1e4])]).double()
    wide, pull = x.clone().requires_grad_(), random(len(x))
    narrow = x.float().requires_grad_()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        found = compiled.gelu(narrow)
        slope = torch.autograd.grad(found, narrow, pull.float(), create_graph=True)[0]
        bend = torch.autograd.grad(slope.sum(), narrow)[0]
    finally:
        torch.set_num_threads(before)
    expected = F.gelu(wide)
    first = torch.autograd.grad(expected, wide, pull, create_graph=True)[0]
    second = torch.autograd.grad(first.sum(), wide)[0]
    for a, b in ((found, expected), (slope, first), (bend, second)):
        assert torch.allclose(a.double(), b, rtol=1e-6, atol=2e-6)
    assert compiled.gelu(torch.empty(0, 4)).shape == (0, 4)


def test_gaussians_any_number_of_times() -> None:
    d = torch.tensor([0.0, 0.7, 3.1, 6.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda d: radial_basis(d, "gaussian", 6.0, 9), d)
    assert torch.autograd.gradgradcheck(lambda d: radial_basis(d, "gaussian", 6.0, 9), d)


def test_fused_attention_refuses_a_second_differentiation(tiny_graph: Graph) -> None:
    """An error, never a silently wrong gradient of the loss on forces."""
    case = make_case(tiny_graph, CHANNELS["lae"])
    mixed = fused.FusedNeighborhoodAttention.apply(*case.inputs)
    (gradient,) = torch.autograd.grad(mixed.square().sum(), case.qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


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
    row, column = case.layout.slot // graph.num_slots, case.layout.slot % graph.num_slots
    for i in range(graph.num_atoms):
        states = (row == i).nonzero().squeeze(1)
        mask = case.log_weight[i, column[states]].expand(1, len(states), -1)
        own = F.scaled_dot_product_attention(q[:, states], k[:, states], v[:, states], mask)
        expected = own.transpose(0, 1).reshape(len(states), -1)
        assert torch.allclose(mixed[states], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("channels", [CHANNELS["lae"], CHANNELS["none"]], ids=["lae", "none"])
def test_self_edge_attention_is_the_first_row_of_the_full_one(
    graph: Graph, channels: tuple[int, ...] | None
) -> None:
    """What the last block computes is what the whole destination attention gives the atoms."""
    case = make_case(graph, channels, "destination")
    n = graph.num_atoms
    full = attention.neighborhood_attention(*case.inputs)[0][:n]
    query, key_value = case.qkv.split([32, 64], dim=1)
    short = attention.self_edge_attention(
        query[:n].view(n, HEADS, 16), key_value, case.log_weight, case.layout, case.groups[0]
    )
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


def pair_distances(n: int) -> tuple[Tensor, Tensor]:
    """(n, n) Å of random points, zero on the diagonal, and (n(n+1)/2,) of the pairs i ≤ j."""
    points = 3 * random(n, 3, seed=3)
    full = (points.unsqueeze(0) - points.unsqueeze(1)).norm(dim=-1)
    i, j = torch.triu_indices(n, n)
    return full, full[i, j]


@pytest.mark.parametrize("chunk", [8192, 11, 1])
def test_fused_rotary_bias_is_the_formula(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "PAIRS_AT_ONCE", chunk)
    n = 9
    _, pairs = pair_distances(n)
    weight = random(6, 8).requires_grad_()
    i, j = torch.triu_indices(n, n)
    full = torch.zeros(n, n, dtype=pairs.dtype)
    full = full.index_put((i, j), pairs).index_put((j, i), pairs).detach().requires_grad_()
    frequencies = rotary_frequencies(8, pairs)
    expected = attention.rotary_bias(full.unsqueeze(0), weight, frequencies).squeeze(1)
    found = fused.rotary_bias(full.unsqueeze(0), weight, frequencies).squeeze(1)
    assert found.shape == (6, n, n)
    assert torch.allclose(found, expected, rtol=0, atol=1e-13)
    assert torch.equal(found, found.transpose(1, 2))
    pull = random(6, n, n, seed=1)
    (d_full, d_weight), (expected_full, expected_weight) = (
        torch.autograd.grad(bias, [full, weight], pull) for bias in (found, expected)
    )
    # each pair is read once: both of its places together are what the formula gives to either
    assert torch.allclose(d_full + d_full.T, expected_full + expected_full.T, rtol=0, atol=1e-12)
    assert torch.allclose(d_weight, expected_weight, rtol=0, atol=1e-12)
    assert expected_full.abs().max() > 0.1 and expected_weight.abs().max() > 0.1


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


@pytest.mark.parametrize("chunk", [8192, 2])
@pytest.mark.parametrize("learned", [True, False])
def test_fused_rotary_bias_can_be_differentiated_twice(
    chunk: int, learned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "PAIRS_AT_ONCE", chunk)
    full, _ = pair_distances(3)
    full = (full + 0.1 * torch.eye(3)).unsqueeze(0).requires_grad_()  # a root has no slope at zero
    weight = random(2, 4).requires_grad_(learned)
    frequencies = rotary_frequencies(4, full)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda d, w: fused.rotary_bias(d, w, frequencies), (full, weight))


def test_fused_rotary_bias_of_an_atom_with_itself_has_no_slope() -> None:
    d = torch.zeros(1, 1, 1, dtype=torch.float64, requires_grad=True)
    weight, frequencies = random(2, 8), rotary_frequencies(8, d)
    found = [
        slope_and_bend(form(d, weight, frequencies), d)
        for form in (fused.rotary_bias, attention.rotary_bias)
    ]
    assert found[0][0] == found[1][0] == 0
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-9) and found[0][1] != 0


def slope_and_bend(bias: Tensor, d: Tensor) -> tuple[float, float]:
    """First and second derivative of the sum by one distance."""
    (slope,) = torch.autograd.grad(bias.sum(), d, create_graph=True)
    (bend,) = torch.autograd.grad(slope, d)
    return float(slope), float(bend)


def test_symmetric_spreads_each_pair_to_both_places() -> None:
    pairs = torch.arange(6.0, dtype=torch.float64).view(1, 6).requires_grad_()
    matrix = fused._Symmetric.apply(pairs, 3)
    assert matrix.tolist() == [[[0, 1, 2], [1, 3, 4], [2, 4, 5]]]
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x: fused._Symmetric.apply(x, 3), (pairs,))


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
def test_fused_node_attention_is_the_formula(natoms: list[int], rotary: bool) -> None:
    table = SystemTable.make(torch.tensor(natoms))
    assert (table.slot is None) == (len(set(natoms)) == 1)
    bias = node_bias(table, rotary)
    qkv = random(sum(natoms), 3 * 32).requires_grad_()
    plain, weights = attention.node_attention(qkv, bias, table, HEADS)
    fast, none = attention.node_attention(qkv, bias, table, HEADS, fused=True)
    assert none is None and plain.shape == (sum(natoms), 32)
    assert torch.allclose(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert (weights.transpose(1, 3)[~table.real] == 0).all()  # nobody attends to an empty slot
    assert torch.allclose(fast, plain, rtol=0, atol=1e-12)
    pull = random(*plain.shape, seed=1)
    (expected,) = torch.autograd.grad(plain, qkv, pull)
    (found,) = torch.autograd.grad(fast, qkv, pull)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["plain", "fused"])
def test_node_attention_of_each_system_apart(form: str) -> None:
    """A system in a batch gets what it gets alone."""
    natoms = [5, 1, 3]
    table = SystemTable.make(torch.tensor(natoms))
    bias = node_bias(table, rotary=True)
    qkv = random(9, 3 * 32)
    together, _ = attention.node_attention(qkv, bias, table, HEADS, fused=form == "fused")
    parts = zip(qkv.split(natoms), together.split(natoms), bias, natoms, strict=True)
    for own, expected, system_bias, n in parts:
        table = SystemTable.make(torch.tensor([n]))
        own_bias = system_bias[None, :, :n, :n]
        alone, _ = attention.node_attention(own, own_bias, table, HEADS, fused=form == "fused")
        assert torch.allclose(alone, expected, rtol=0, atol=1e-12)


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
    dropped, same = attention.neighborhood_attention(*case.inputs, 0.5)
    assert torch.equal(weights, same)
    assert (kept - dropped).abs().max() > 0.1


# --- slots -------------------------------------------------------------------------------------


def test_spread_and_collect_are_adjoint() -> None:
    """⟨Spread x, y⟩ = ⟨x, Collect y⟩, and Collect undoes Spread."""
    slots = torch.tensor([5, 0, 9, 3])
    x, y = random(4, 3), random(12, 3, seed=1)
    spread = Spread.apply(x, slots, 12)
    assert torch.allclose((spread * y).sum(), (x * Collect.apply(y, slots)).sum())
    assert torch.equal(Collect.apply(spread, slots), x)
    empty = torch.ones(12, dtype=torch.bool).index_fill(0, slots, False)
    assert (spread[empty] == 0).all() and int(empty.sum()) == 8


def test_spread_and_collect_can_be_differentiated_twice() -> None:
    slots = torch.tensor([5, 0, 3])
    x, y = random(3, 2).requires_grad_(), random(6, 2).requires_grad_()
    for function, argument in (
        (lambda t: Spread.apply(t, slots, 6).pow(3), x),
        (lambda t: Collect.apply(t, slots).pow(3), y),
    ):
        assert torch.autograd.gradcheck(function, (argument,))
        assert torch.autograd.gradgradcheck(function, (argument,))


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


# --- linear ------------------------------------------------------------------------------------


def derivatives(
    function: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> list[Tensor]:
    """Value, first derivatives, and those of a force-like gradient: all that training asks."""
    leaves = [t for t in (x, weight, bias) if t is not None and t.requires_grad]
    y = function(x, weight, bias)
    results = [y]
    if leaves:
        pulled = (y.tanh() * random(*y.shape, seed=9, dtype=y.dtype)).sum()
        first = torch.autograd.grad(pulled, leaves, create_graph=True)
        results += first
        results += torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    return [r.detach() for r in results]


@pytest.mark.parametrize("rows", [1, 17, 200])
@pytest.mark.parametrize("needs", ["all", "input", "weight", "nothing"])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "column slice"])
def test_linear_is_that_of_pytorch(
    rows: int, needs: str, with_bias: bool, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float32, in values, first and second derivatives; frozen weights and trained ones.

    By oneDNN wherever there is one, whoever made the processor.
    """
    available = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    monkeypatch.setattr(fused, "_BY_ONEDNN", available and torch.backends.mkldnn.is_available())
    x = random(rows, 24, seed=1, dtype=torch.float32)
    weight = {
        "contiguous": random(10, 24, seed=2, dtype=torch.float32),
        "transposed": random(24, 10, seed=2, dtype=torch.float32).t(),
        "column slice": random(10, 40, seed=2, dtype=torch.float32)[:, 7:31],
    }[layout]
    assert weight.is_contiguous() == (layout == "contiguous")
    bias = random(10, seed=3, dtype=torch.float32) if with_bias else None
    x.requires_grad_(needs in ("all", "input"))
    weight = weight.detach().requires_grad_(needs in ("all", "weight"))
    if bias is not None:
        bias.requires_grad_(needs in ("all", "weight"))
    found = derivatives(fused.linear, x, weight, bias)
    expected = derivatives(F.linear, x, weight, bias)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 2e-5 * max(1.0, b.abs().max())


def test_linear_of_no_rows() -> None:
    """A molecule of one atom has no edges."""
    x = torch.zeros(0, 24, requires_grad=True)
    weight = random(10, 24, dtype=torch.float32).requires_grad_()
    y = fused.linear(x, weight, torch.zeros(10))
    assert y.shape == (0, 10)
    gradients = torch.autograd.grad(y.sum(), [x, weight])
    assert gradients[0].shape == (0, 24) and (gradients[1] == 0).all()


def test_linear_in_float64_is_that_of_pytorch() -> None:
    """Elsewhere than in float32 it is PyTorch's own, to the last bit."""
    x, weight, bias = random(5, 24), random(10, 24, seed=1), random(10, seed=2)
    assert torch.equal(fused.linear(x, weight, bias), F.linear(x, weight, bias))
    layer = fused.Linear(24, 10)
    x = random(5, 24, dtype=torch.float32)
    assert torch.allclose(layer(x), F.linear(x, layer.weight, layer.bias), atol=1e-6)
