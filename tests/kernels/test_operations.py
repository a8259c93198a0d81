"""Every operation of every set of kernels against the plain formula of the same name.

Values, first derivatives and, of the sets that training uses, second derivatives; in float64 and in
float32; of full, half-empty and empty rows, of single atoms, of molecules and of crystals.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ase import Atoms
from conftest import CHANNELS, neutral, random
from torch import Tensor

from allscaip_lite import AllScAIP, attention, kernels
from allscaip_lite.attention import SystemTable
from allscaip_lite.encodings import radial_centers, rotary_frequencies
from allscaip_lite.graph import Graph
from allscaip_lite.kernels import compiled, elementwise, fused_attention
from allscaip_lite.operations import PLAIN, Operations
from allscaip_lite.structures import Structures, structures_from_atoms

HEADS = 2
SETS: dict[str, Callable[[], Operations]] = {
    "torch": lambda: kernels.in_torch("cpu"),
    "torch, for training": lambda: kernels.in_torch("cpu").twice_differentiable,
    "torch, as on a GPU": lambda: kernels.in_torch("cuda"),
    "onednn": lambda: replace(kernels.in_torch("cpu"), linear=elementwise.linear_by_onednn),
    "c": kernels.in_c,
    "c, for training": lambda: kernels.in_c().twice_differentiable,
}


@pytest.fixture(params=SETS)
def operations(request: pytest.FixtureRequest) -> Operations:
    if request.param == "onednn" and not elementwise.has_onednn():
        pytest.skip("no oneDNN in this build of PyTorch")
    if request.param.startswith("c") and shutil.which("cc") is None:
        pytest.skip("no C compiler")
    return SETS[request.param]()


def of_its_own(operations: Operations, name: str) -> bool:
    """Whether a set has a form of its own of the operation that a case is named after."""
    words = {
        "linear of parts": "linear_of_parts",
        "linear": "linear",
        "norm": "rms_norm",
        "gelu": "gelu",
        "radial basis": "gaussian_basis",
        "soft rank": "soft_rank",
        "rotary bias": "rotary_biases",
        "distances": "system_distances",
        "node attention": "node_attention",
        "pair sums": "pair_sums",
        "attention of the atoms": "self_edge_attention",
        "attention": "neighborhood_attention",
    }
    field = next(field for words, field in words.items() if name.startswith(words))
    return getattr(operations, field) is not getattr(PLAIN, field)


@pytest.fixture(scope="module")
def graphs(
    make_graph: Callable[..., Graph], cluster: Atoms, crystal: Atoms, slab: Atoms
) -> dict[str, Graph]:
    """Rows of all lengths in one batch; periodic images; one atom without any edge."""
    found = {
        "molecules": make_graph([cluster, neutral("CH3OH"), neutral("He")]),
        "periodic": make_graph([crystal, slab]),
        "one atom": make_graph(neutral("He")),
    }
    counts = found["molecules"].counts
    assert counts.min() == 1 and counts.max() == found["molecules"].num_slots > 9
    return found


@dataclass
class Case:
    """What an operation is asked: `call(operations, *leaves)`, which may be differentiated."""

    call: Callable[..., Tensor]
    leaves: list[Tensor]


def linear_case(graph: Graph, rows: int = 17, way: str = "contiguous") -> Case:
    weight = {
        "contiguous": random(10, 24, seed=2),
        "transposed": random(24, 10, seed=2).t(),
        "column slice": random(10, 40, seed=2)[:, 7:31],
    }[way]
    assert weight.is_contiguous() == (way == "contiguous")
    leaves = [random(rows, 24, seed=1), weight, random(10, seed=3)]
    return Case(lambda ops, x, w, b: ops.linear(x, w, b), leaves)


def parts_case(graph: Graph, states: int = 40) -> Case:
    """Rows taken never, once and often, and a table that is taken as it is."""
    row = torch.randint(0, 9, (states,), generator=torch.Generator().manual_seed(0))

    def call(ops: Operations, x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.linear_of_parts([(x, row), (y, None)], weight, bias)

    leaves = [random(10, 6, seed=1), random(states, 4, seed=2), random(7, 10, seed=3), random(7)]
    return Case(call, leaves)


def norm_case(graph: Graph, rows: int = 7) -> Case:
    leaves = [random(9, rows).t(), random(9, seed=1)]  # lying any way
    return Case(lambda ops, x, w: ops.rms_norm(x, w, 1e-3), leaves)


def gelu_case(graph: Graph, rows: int = 11) -> Case:
    return Case(lambda ops, x: ops.gelu(x), [(3 * random(5, rows)).t()])


def basis_case(graph: Graph) -> Case:
    def call(ops: Operations, d: Tensor) -> Tensor:
        return ops.gaussian_basis(d, *radial_centers(6.0, 9, d))

    return Case(call, [torch.tensor([0.0, 0.7, 3.1, 6.0], dtype=torch.float64)])


def rank_case(graph: Graph, rows: int = 40, candidates: int = 12) -> Case:
    """Rows of different lengths, near and far candidates, the atom itself at 0."""
    distances = (3 * random(rows, candidates).abs()).sort(1).values
    distances[:, 0] = 0
    lengths = torch.randint(1, candidates + 1, (rows, 1), generator=torch.Generator())
    empty = torch.arange(candidates) >= lengths

    def call(ops: Operations, d: Tensor) -> Tensor:
        return ops.soft_rank(d.masked_fill(empty, torch.inf), 0.2).masked_fill(empty, 0)

    return Case(call, [distances])


def rotary_case(graph: Graph, n: int = 6) -> Case:
    distances = distances_of(2, n)
    frequencies = rotary_frequencies(8, distances)

    def call(ops: Operations, weight: Tensor, d: Tensor) -> Tensor:
        d = (d + d.transpose(1, 2)) / 2
        return torch.stack(list(ops.rotary_biases(d, weight, frequencies.to(d.dtype))))

    return Case(call, [random(3, 2, 8), distances])


def distances_of(batch: int, n: int) -> Tensor:
    points = 3 * random(batch, n, 3, seed=3)
    return torch.cdist(points, points) + 0.1 * torch.eye(n)


def distances_case(graph: Graph, lattice: str = "none") -> Case:
    """Two systems of different sizes; of cells that are smaller than the molecule, and larger."""
    natoms, n = torch.tensor([7, 4]), 7
    cell = {
        "none": torch.zeros(3, 3),
        "box": torch.diag(torch.tensor([3.1, 4.2, 9.0])),
        "slab": torch.tensor([[3.1, 0.4, 0.0], [0.2, 4.2, 0.1], [0.0, 0.3, 8.0]]),
        "tilted": torch.tensor([[3.1, 0.4, 0.0], [2.9, 4.2, 0.1], [-2.5, 3.3, 5.0]]),
    }[lattice].double()
    pbc = torch.tensor([[lattice != "none", lattice != "none", lattice in ("box", "tilted")]] * 2)
    real = torch.arange(n) < natoms[:, None]

    def call(ops: Operations, positions: Tensor, strain: Tensor) -> Tensor:
        moved = cell.to(strain) + cell.to(strain) @ strain
        structures = Structures(
            positions=positions[real],
            atomic_numbers=torch.ones(11, dtype=torch.long),
            cell=moved,
            pbc=pbc,
            charge=torch.zeros(2),
            spin=torch.ones(2),
            natoms=natoms,
        )
        found = ops.system_distances(structures, positions * real[..., None])
        return found * (real[:, :, None] & real[:, None])

    return Case(call, [3 * random(2, n, 3, seed=5), 0.1 * random(2, 3, 3, seed=6)])


def sums_case(graph: Graph, degree: int = 9) -> Case:
    real = graph.log_weight.isfinite()
    weights = graph.log_weight.exp() * (0.5 + random(*graph.log_weight.shape).square())

    def call(ops: Operations, weights: Tensor, directions: Tensor) -> Tensor:
        moved = at_precision(graph, weights.dtype, slot_directions=directions)
        return ops.pair_sums(ops.neighborhoods(moved, 9), weights * real, degree)

    return Case(call, [weights, graph.slot_directions])


def attention_case(
    graph: Graph, layout: str = "source", channels: str = "lae", atoms_alone: bool = False
) -> Case:
    groups = attention.channel_groups(CHANNELS[channels], 16)
    finite = graph.log_weight.isfinite()
    n = graph.num_atoms

    def call(ops: Operations, qkv: Tensor, weight: Tensor, directions: Tensor) -> Tensor:
        table = torch.full_like(graph.log_weight, -torch.inf, dtype=qkv.dtype)
        table = table.masked_scatter(finite, weight)
        moved = at_precision(graph, qkv.dtype, log_weight=table, slot_directions=directions)
        rows = (ops.neighborhoods(moved, 9), layout, attention.Heads(groups, HEADS))
        if atoms_alone:
            return ops.self_edge_attention(qkv[:n, :32], qkv[:, 32:], *rows)[0]
        return ops.neighborhood_attention(qkv.t().contiguous().t(), *rows)[0]

    qkv = random(len(graph.source_slot), 3 * HEADS * 16)
    return Case(call, [qkv, graph.log_weight[finite], graph.slot_directions])


def node_case(graph: Graph, natoms: tuple[int, ...] = (5, 1, 3), rotary: bool = True) -> Case:
    systems = SystemTable.make(torch.tensor(natoms))
    batch, longest = systems.real.shape

    def call(ops: Operations, qkv: Tensor, bias: Tensor) -> Tensor:
        mask = systems.mask(qkv.dtype)
        bias = bias if mask is None else bias + mask
        return ops.node_attention(qkv, bias if rotary else mask, systems, HEADS)[0]

    return Case(call, [random(sum(natoms), 3 * 32), random(batch, HEADS, longest, longest, seed=4)])


def node_by_distance_case(
    graph: Graph,
    natoms: tuple[int, ...] = (5, 1, 3),
    size: int = 16,
    heads: int = 2,
    weight: float = 0.3,
    stretch: float = 1.0,
) -> Case:
    """Node attention of two blocks, whose biases are read by the distance."""
    systems = SystemTable.make(torch.tensor(natoms))
    distances = stretch * distances_of(*systems.real.shape)
    weight, frequencies = weight * random(2, heads, 8), rotary_frequencies(8, distances)

    def call(ops: Operations, qkv: Tensor, d: Tensor) -> Tensor:
        mask = systems.mask(qkv.dtype)
        d = (d + d.transpose(1, 2)) / 2
        biases = ops.rotary_biases(d, weight.to(d.dtype), frequencies.to(d.dtype), mask)
        found = [ops.node_attention(qkv, bias, systems, heads)[0] for bias in biases]
        return torch.stack(found)

    return Case(call, [random(sum(natoms), 3 * heads * size), distances])


def at_precision(graph: Graph, dtype: torch.dtype, **changes: Tensor) -> Graph:
    parts = {"log_weight": graph.log_weight, "slot_directions": graph.slot_directions} | changes
    return replace(graph, **{name: part.to(dtype) for name, part in parts.items()})


CASES: dict[str, Callable[[Graph], Case]] = {
    **{
        f"linear, {rows} rows, {way}": partial(linear_case, rows=rows, way=way)
        for rows, way in (
            (0, "contiguous"),
            (1, "transposed"),
            (17, "column slice"),
            (200, "contiguous"),
        )
    },
    "linear of parts": parts_case,
    "linear of parts, no states": partial(parts_case, states=0),
    "norm": norm_case,
    "norm of no rows": partial(norm_case, rows=0),
    "gelu": gelu_case,
    "gelu of nothing": partial(gelu_case, rows=0),
    "radial basis": basis_case,
    "soft rank": rank_case,
    "rotary bias": rotary_case,
    "rotary bias of one atom": partial(rotary_case, n=1),
    "distances": distances_case,
    **{
        f"distances, {name}": partial(distances_case, lattice=name)
        for name in ("box", "slab", "tilted")
    },
    "node attention": node_case,
    "node attention by distance": node_by_distance_case,
    "node attention by distance, one atom": partial(node_by_distance_case, natoms=(1,)),
    "node attention by distance, one system": partial(node_by_distance_case, natoms=(9,)),
    "node attention by distance, several tiles": partial(
        node_by_distance_case, natoms=(300, 70, 65), size=10, heads=3
    ),
    "node attention by distance, more heads than one read": partial(
        node_by_distance_case, heads=6, size=5
    ),
    "node attention by distance, tiny weights": partial(node_by_distance_case, weight=1e-6),
    "node attention by distance, large weights": partial(node_by_distance_case, weight=10.0),
    "node attention by distance, no distance": partial(node_by_distance_case, stretch=0.0),
    "node attention by distance, far apart": partial(node_by_distance_case, stretch=30.0),
    "node attention by distance, beyond the table": partial(node_by_distance_case, stretch=300.0),
    "node attention, equal sizes": partial(node_case, natoms=(4, 4)),
    "node attention, no bias": partial(node_case, rotary=False),
    "node attention, one atom": partial(node_case, natoms=(1,)),
}
CASES_OF_GRAPHS: dict[str, Callable[[Graph], Case]] = {
    "pair sums": sums_case,
    "pair sums, one degree": partial(sums_case, degree=1),
    **{
        f"attention, {layout}, {channels}": partial(
            attention_case, layout=layout, channels=channels
        )
        for layout in ("source", "destination")
        for channels in CHANNELS
    },
    **{
        f"attention of the atoms, {channels}": partial(
            attention_case, layout="destination", channels=channels, atoms_alone=True
        )
        for channels in CHANNELS
    },
}


def derivatives(
    case: Case, operations: Operations, dtype: torch.dtype, second: bool
) -> list[Tensor]:
    """Value, first derivatives and, on request, the derivatives of a mixture of these."""
    leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in case.leaves]
    value = case.call(operations, *leaves)
    pull = random(*value.shape, seed=1).to(dtype).requires_grad_()
    options: dict[str, Any] = {"materialize_grads": True}
    first = torch.autograd.grad(value, leaves, pull, create_graph=second, **options)
    found = [value, *first]
    if second:
        mixture = sum((x * random(*x.shape, seed=2).to(dtype)).sum() for x in first)
        found += torch.autograd.grad(mixture, [*leaves, pull], **options)
    return [x.detach().double() for x in found]


def compare(case: Case, operations: Operations, dtype: torch.dtype) -> None:
    second = operations.second_order is None
    found = derivatives(case, operations, dtype, second)
    expected = derivatives(case, PLAIN, torch.float64, second)
    assert len(found) == len(expected)
    near = 1e-10 if dtype == torch.float64 else 2e-4
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        if b.numel():
            assert (a - b).abs().max() <= near * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_an_operation_is_its_formula(
    graphs: dict[str, Graph], operations: Operations, name: str, dtype: torch.dtype
) -> None:
    if not of_its_own(operations, name):
        pytest.skip("this set takes the plain formula")
    compare(CASES[name](graphs["one atom"]), operations, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", CASES_OF_GRAPHS)
@pytest.mark.parametrize("kind", ["molecules", "periodic", "one atom"])
def test_an_operation_on_a_graph_is_its_formula(
    graphs: dict[str, Graph], operations: Operations, kind: str, name: str, dtype: torch.dtype
) -> None:
    if not of_its_own(operations, name):
        pytest.skip("this set takes the plain formula")
    compare(CASES_OF_GRAPHS[name](graphs[kind]), operations, dtype)


def test_the_cases_move_every_number(graphs: dict[str, Graph]) -> None:
    """No comparison above is one of zeros with zeros."""
    for name, make in {**CASES, **CASES_OF_GRAPHS}.items():
        value, *slopes = derivatives(make(graphs["molecules"]), PLAIN, torch.float64, second=False)
        if value.numel() == 0 or "one atom" in name:
            continue
        assert value.abs().max() > 1e-3, name
        # without angles, directions change nothing; nor does a bias that is not read
        blind = any(word in name for word in ("one group", "none", "atoms", "no bias"))
        blind = blind or "no distance" in name  # at which biases are flat
        blind = blind or name == "distances"  # of molecules, which have no cell
        for slope in slopes[:1] if blind else slopes:
            assert slope.abs().max() > 1e-6, name


def test_a_set_for_one_differentiation_refuses_a_second(graphs: dict[str, Graph]) -> None:
    """An error, never a silently wrong gradient of a loss on forces."""
    cases = [(attention_case(graphs["molecules"]), kernels.in_torch("cpu"))]
    if shutil.which("cc"):
        cases += [(make(None), kernels.in_c()) for make in (node_by_distance_case, distances_case)]
    for case, operations in cases:
        leaves = [leaf.detach().float().requires_grad_() for leaf in case.leaves[:2]]
        leaves += [leaf.detach().float() for leaf in case.leaves[2:]]
        mixed = case.call(operations, *leaves)
        (gradient,) = torch.autograd.grad(mixed.square().sum(), leaves[0], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()


def test_dropout_draws_the_same_numbers(graphs: dict[str, Graph], operations: Operations) -> None:
    """Kernels draw no random numbers: where attention has dropout, the formula serves."""
    graph, qkv = graphs["molecules"], random(len(graphs["molecules"].source_slot), 96)
    groups = attention.channel_groups(CHANNELS["lae"], 16)
    found = []
    for ops in (PLAIN, operations):
        torch.manual_seed(0)
        heads = attention.Heads(groups, HEADS, 0.5)
        rows = ops.neighborhoods(graph, 9)
        found.append(ops.neighborhood_attention(qkv, rows, "source", heads)[0])
        systems = SystemTable.make(torch.tensor([len(qkv)]))
        found.append(ops.node_attention(qkv, None, systems, HEADS, 0.5)[0])
    assert torch.allclose(found[0], found[2], rtol=0, atol=1e-12)
    assert torch.allclose(found[1], found[3], rtol=0, atol=1e-12)


# --- what is particular to one form --------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7])
@pytest.mark.parametrize("name", ["attention, source, lae", "pair sums"])
def test_any_cut_into_runs(
    graphs: dict[str, Graph], chunk: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = graphs["molecules"]
    monkeypatch.setattr(fused_attention, "FEWEST_ROWS", 1)
    monkeypatch.setattr(fused_attention, "RUN_ENTRIES", chunk * graph.num_slots**2)
    made = fused_attention.PackedNeighborhoods.make(graph, 9)
    assert len(made.runs) > 3 and len(made.full) < graph.log_weight.numel()
    compare(CASES_OF_GRAPHS[name](graph), kernels.in_torch("cpu"), torch.float64)


@pytest.mark.parametrize("counts", [[1], [5, 3], [32] * 300, [9, 30, 2] * 50, range(70, 0, -1)])
def test_runs_cover_every_row_once(counts: list[int]) -> None:
    counts = torch.tensor(counts)
    longest = int(counts.max())
    for num_slots in (longest, longest + 3):
        found = fused_attention.make_runs(counts, num_slots)
        row, slot = 0, 0
        for run in found:
            assert (run.rows.start, run.slots.start) == (row, slot)
            row, slot = run.rows.stop, run.slots.stop
            assert slot - run.slots.start == (row - run.rows.start) * run.width
            fullest = int(counts[run.rows].max())
            assert fullest <= run.width <= min(fullest + fused_attention.SLOT_STEP, num_slots)
        assert row == len(counts)
        assert all(
            (r.rows.stop - r.rows.start) * r.width**2 <= fused_attention.RUN_ENTRIES for r in found
        )
        if len(counts) > 1 and (counts == longest).all():
            assert len(found) == 1 + (len(counts) * 32**2 - 1) // fused_attention.RUN_ENTRIES
    if counts.tolist() == list(range(70, 0, -1)):
        assert slot < 0.8 * len(counts) * longest  # sorted rows leave most empty slots out


@pytest.mark.parametrize("chunk", [11, 1])
def test_any_chunk_of_pairs(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "PAIRS_AT_ONCE", chunk)
    biases = partial(attention.rotary_biases, bias=elementwise.rotary_bias)
    operations = replace(PLAIN, rotary_biases=biases)
    compare(rotary_case(None), operations, torch.float64)


def test_any_chunk_of_ranks() -> None:
    case = rank_case(None, 90, 60)
    assert len(elementwise._SoftRank.chunks(case.leaves[0])) > 1
    operations = replace(PLAIN, soft_rank=elementwise.soft_rank)
    compare(case, operations, torch.float64)


def test_rotary_bias_of_an_atom_with_itself_has_no_slope() -> None:
    d = torch.zeros(1, 1, 1, dtype=torch.float64, requires_grad=True)
    weight, frequencies = random(2, 8), rotary_frequencies(8, d)
    found = []
    for form in (elementwise.rotary_bias, attention.rotary_bias):
        bias = form(d, weight, frequencies).sum()
        (slope,) = torch.autograd.grad(bias, d, create_graph=True)
        (bend,) = torch.autograd.grad(slope, d)
        found.append((float(slope.detach()), float(bend)))
    assert found[0][0] == found[1][0] == 0
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-9) and found[0][1] != 0


def test_derivatives_of_any_order() -> None:
    """Of the forms that say so, the third derivative, against differences."""
    x = (3 * random(11)).requires_grad_()
    distances = torch.tensor([[0.0, 0.7, 1.1, 1.3]], dtype=torch.float64, requires_grad=True)
    for form, start in (
        (elementwise.gelu, x),
        (lambda d: elementwise.gaussian_basis(d, torch.linspace(0, 6, 9).double(), 0.75), x),
        (lambda d: elementwise.soft_rank(d, 0.2), distances),
    ):

        def bend(x: Tensor, form: Callable[[Tensor], Tensor] = form) -> Tensor:
            (slope,) = torch.autograd.grad(form(x).sin().sum(), x, create_graph=True)
            return torch.autograd.grad(slope.sin().sum(), x, create_graph=True)[0]

        assert torch.autograd.gradcheck(bend, start)


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.parametrize("scale", [1 / 32, 0.3, 3.0])
def test_a_table_is_its_function(scale: float) -> None:
    """Values to 1e-7 of the largest and slopes to 5e-6 of the steepest, of each head."""
    weight, frequencies = scale * random(2, 5, 32), rotary_frequencies(32, random(1))
    d = torch.cat([torch.zeros(1), 90 * torch.rand(5000, generator=torch.Generator())]).double()
    biases = compiled.rotary_biases(d.float(), weight.float(), frequencies.float())
    d, weight, frequencies = (
        d.float().double(),
        weight.float().double(),
        frequencies.float().double(),
    )
    for block, bias in enumerate(biases):
        x = d * bias.per_length
        cell, t = x.long(), x - x.long()
        c = bias.table[cell].double().permute(2, 0, 1, 3).flatten(2)[..., :5]  # (4, q, h)
        value = c[0] + t[:, None] * (c[1] + t[:, None] * (c[2] + t[:, None] * c[3]))
        slope = (c[1] + t[:, None] * (2 * c[2] + 3 * t[:, None] * c[3])) * bias.per_length
        exact = elementwise.rotary_bias_and_slope(d, weight[block], frequencies)
        for found, right, near in ((value.T, exact[0], 2e-7), (slope.T, exact[1], 6e-6)):
            error = (found - right).abs().amax(1)  # float32 rounds a value by 6e-8
            assert (error <= near * right.abs().amax(1)).all()


def test_weights_that_need_derivatives_take_no_table() -> None:
    distances, frequencies = distances_of(1, 4).float(), rotary_frequencies(8, random(1).float())
    weight = random(1, 2, 8).float().requires_grad_()
    found = compiled.rotary_biases(distances, weight, frequencies)
    assert isinstance(found[0], Tensor) and found[0].requires_grad
    apart = compiled.rotary_biases(distances + 1000, weight.detach(), frequencies)
    steep = compiled.rotary_biases(distances, 1e4 * weight.detach(), frequencies)
    assert isinstance(apart[0], Tensor) and isinstance(steep[0], Tensor)


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_blocks_that_are_called_twice(
    make_model: Callable[..., AllScAIP], cluster: Atoms, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where memory is short, the first blocks' forward pass is done again; nothing else changes."""
    model, found = make_model(num_layers=4), []
    model.operations = kernels.in_c()
    calls = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda block, *_: calls.append(block))
    for kept in (2**30, 0):
        monkeypatch.setattr(compiled, "KEPT", kept)
        calls.clear()
        found.append(model(structures_from_atoms(cluster, torch.float64), create_graph=False))
        assert len(calls) == (3 if kept else 6)  # the last block is called in another way
    assert torch.equal(found[0].forces, found[1].forces)


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.parametrize("name", ["attention, source, lae", "pair sums", "attention, source, none"])
def test_c_on_several_threads(graphs: dict[str, Graph], name: str) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        compare(
            CASES_OF_GRAPHS[name](graphs["molecules"]), SETS["c, for training"](), torch.float64
        )
        for other in ("node attention by distance, several tiles", "distances, tilted"):
            compare(CASES[other](graphs["molecules"]), kernels.in_c(), torch.float32)
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_c_attention_in_float32(make_graph: Callable[..., Graph]) -> None:
    """Its own exponential and sums in any order: as near to float64 as the formula in float32."""
    atoms = Atoms("OH2" * 20, 3 * random(60, 3).numpy())
    atoms.info.update(charge=0, spin=1)
    graph = make_graph([atoms, neutral("H2O")])
    groups = attention.channel_groups((10, 5, 2, 5, 10), 32)
    qkv = 3 * random(len(graph.source_slot), 3 * HEADS * 32)

    def answer(dtype: torch.dtype, operations: Operations) -> list[Tensor]:
        x = qkv.to(dtype).requires_grad_()
        rows = operations.neighborhoods(at_precision(graph, dtype), 4)
        y, _ = operations.neighborhood_attention(x, rows, "source", attention.Heads(groups, HEADS))
        return [y.detach().double(), torch.autograd.grad(y.square().sum(), x)[0].double()]

    in_c = kernels.in_c()
    exact, found = answer(torch.float64, in_c), answer(torch.float32, in_c)
    for x, a, b in zip(exact, found, answer(torch.float32, PLAIN), strict=True):
        assert (a - x).abs().mean() < 1.5 * (b - x).abs().mean() < 3e-6 * x.abs().mean()
        assert (a - x).abs().max() < 3 * (b - x).abs().max()


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_c_gelu_in_float32() -> None:
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
