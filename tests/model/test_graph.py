"""The graph beside a dense one written from the formulas with loops, in float64.

`dense_graph` lists every pair and every image, ranks all of them and takes the soft maximum, for
one atom after the other; nothing in it is shared with the package.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.geometry import find_mic
from ase.neighborlist import neighbor_list

from allscaip_lite import AllScAIPConfig, neighbors
from allscaip_lite.graph import (
    Graph,
    build_graph,
    bump,
    hard_rank,
    log_envelope,
    soft_maximum,
    soft_rank,
)
from allscaip_lite.neighbors import (
    candidate_pairs,
    nearest_images,
    safe_norm,
    system_distances,
)
from allscaip_lite.structures import structures_from_atoms

GraphMaker = Callable[..., Graph]
Edge = tuple[int, int, int, int, int]  # i, j, and the image of j
RANKINGS = {
    "soft": {},
    "full": {"truncated_rank": False},
    "hard": {"soft_rank": False},
}


def closed(atoms: Atoms) -> Atoms:
    atoms.info.update(charge=0, spin=1 + int(atoms.numbers.sum()) % 2)
    return atoms


# --- the dense graph ----------------------------------------------------------------------------


def step(x: float) -> float:
    """The smooth step of the specification, from its own two exponentials."""
    if abs(x) >= 4:
        return float(x > 0)
    a, b = np.exp(-2 / (1 + x / 4)), np.exp(-2 / (1 - x / 4))
    return a / (a + b)


def ranks_of(distances: list[float], config: AllScAIPConfig, last: bool) -> list[float]:
    """The rank of each candidate of one atom, the atom itself among them.

    Hard ranks put equal distances in any order: each gets the first rank it may have, or the last.
    """
    cut = np.sort(distances)[: config.k + 20][-1] + 1e-5  # what is as far as the last counts too
    nearest = np.array(distances)[np.array(distances) < cut]
    found = []
    for d in distances:
        if not config.soft_rank:
            slack = 1e-9 if last else -1e-9
            found.append(float(np.sum(np.array(distances) < d + slack)) - last)
        elif config.truncated_rank:
            inside = d < cut
            count = sum(step((d - other) / config.rank_width) for other in nearest)
            found.append(count if inside else np.inf)
        else:
            found.append(
                sum(1 / (1 + np.exp(-(d - other) / config.rank_width)) for other in distances)
            )
    return found


def dense_graph(
    atoms: Atoms, config: AllScAIPConfig, last: bool = False
) -> dict[Edge, tuple[float, np.ndarray]]:
    """Every edge with its envelope and its vector; self-edges left out. See `ranks_of`."""
    reach = config.cutoff + (1 if config.truncated_rank else 6)  # e^-30 is left of a sigmoid
    inverse = np.linalg.inv(atoms.cell.complete().array)
    spans = np.ptp(atoms.positions @ inverse, axis=0) + reach * np.linalg.norm(inverse, axis=0)
    images = np.where(atoms.pbc, np.ceil(spans), 0).astype(int)
    shifts = list(product(*(range(-n, n + 1) for n in images)))
    ranks: dict[Edge, float] = {}
    vectors: dict[Edge, np.ndarray] = {}
    for i in range(len(atoms)):
        mine = {}
        for j in range(len(atoms)):
            for shift in shifts:
                r = atoms.positions[j] + np.array(shift) @ atoms.cell.array - atoms.positions[i]
                if np.linalg.norm(r) < reach:
                    mine[(i, j, *shift)] = r
        distances = [float(np.linalg.norm(r)) for r in mine.values()]
        ranks.update(zip(mine, ranks_of(distances, config, last), strict=True))
        vectors.update(mine)
    found = {}
    for (i, j, *shift), r in vectors.items():
        if i == j and not any(shift):
            continue
        edge, reverse = (i, j, *shift), (j, i, *(-s for s in shift))
        limits = [
            ranks[edge] / config.k,
            ranks[reverse] / config.k,
            np.linalg.norm(r) / config.cutoff,
        ]
        envelope = max(limits)
        if config.soft_rank:
            t = config.envelope_temperature
            envelope += t * np.log(sum(np.exp((x - envelope) / t) for x in limits))
        if envelope < 1:
            found[edge] = (float(envelope), r)
    return found


def edges_of(graph: Graph) -> list[Edge]:
    columns = torch.cat([graph.source[:, None], graph.target[:, None], graph.shift.long()], dim=1)
    return [tuple(edge) for edge in columns.tolist()]


def assert_is_dense(graph: Graph, atoms: Atoms, config: AllScAIPConfig) -> None:
    """To the last digit; with hard ranks, within those that equal distances may have."""
    expected, edges = dense_graph(atoms, config), edges_of(graph)
    last = expected if config.soft_rank else dense_graph(atoms, config, last=True)
    assert len(edges) == len(set(edges))
    assert set(last) <= set(edges) <= set(expected)
    distances = graph.distances.repeat(2)
    directions = torch.cat([graph.directions, -graph.directions])
    log_weight = graph.log_weight.flatten()[graph.source_slot[graph.num_atoms :]]
    for index, edge in enumerate(edges):
        envelope, r = expected[edge]
        length = np.linalg.norm(r)
        assert distances[index].item() == pytest.approx(length, abs=1e-10)
        np.testing.assert_allclose(directions[index], r / length, atol=1e-10)
        largest = last[edge][0] if edge in last else 1.0
        lower, upper = (-(x**2) / (1 - x**2) if x < 1 else -np.inf for x in (largest, envelope))
        tolerance = 1e-9 + 1e-7 * abs(upper)
        assert lower - tolerance <= log_weight[index].item() <= upper + tolerance


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize(("k", "cutoff"), [(5, 6.0), (12, 6.0), (40, 6.0), (7, 2.5)])
def test_molecule_is_the_dense_graph(
    make_graph: GraphMaker,
    small_config: AllScAIPConfig,
    cluster: Atoms,
    ranking: str,
    k: int,
    cutoff: float,
) -> None:
    """Ranks decide, or the cutoff, or both; atoms beyond the cutoff count for ranks inside it."""
    changes = {"k": k, "cutoff": cutoff, **RANKINGS[ranking]}
    assert_is_dense(make_graph(cluster, **changes), cluster, small_config.replace(**changes))


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("name", ["triclinic", "slab", "one atom", "sheared", "wire"])
def test_periodic_is_the_dense_graph(
    make_graph: GraphMaker,
    small_config: AllScAIPConfig,
    request: pytest.FixtureRequest,
    name: str,
    ranking: str,
) -> None:
    """Several images of an atom, its own among them; atoms outside their cell."""
    if name == "one atom":
        atoms = closed(Atoms("Cu", [(0.3, 0.2, 9.1)], pbc=True))
        atoms.set_cell([(2.5, 0.1, 0), (1.1, 2.4, 0.2), (0.9, 0.8, 2.7)])
    elif name == "sheared":  # a cell as skewed as they come
        atoms = closed(Atoms("HF", [(0, 0, 0), (1.3, 0.4, 0.2)], pbc=True))
        atoms.set_cell([(3.1, 0, 0), (7.4, 3.0, 0), (-5.3, 8.1, 3.6)])
    elif name == "wire":
        atoms = closed(Atoms("HF", [(0, 0, 0), (1.3, 0.4, 0.2)], pbc=(True, False, False)))
        atoms.set_cell([(2.2, 0.3, 0.1), (0, 0, 0), (0, 0, 0)])
    else:
        atoms = request.getfixturevalue("crystal" if name == "triclinic" else name)
    changes = {"k": 10, "cutoff": 4.0, **RANKINGS[ranking]}
    graph = make_graph(atoms, **changes)
    assert graph.shift.any()
    own = graph.source == graph.target
    assert own.any() == (name not in ("triclinic", "slab"))
    assert_is_dense(graph, atoms, small_config.replace(**changes))


def test_equal_distances_share_their_rank(make_graph: GraphMaker) -> None:
    """A perfect crystal: hard ranks would choose among equals, soft ranks treat them alike."""
    graph = make_graph(closed(bulk("Ar", "fcc", a=5.3, cubic=True)), k=30, cutoff=6.0)
    assert (graph.counts == graph.counts[0]).all()
    first_shell = graph.distances < 3.8
    weights = graph.log_weight.flatten()[graph.source_slot[graph.num_atoms :]]
    weights = weights[: graph.num_pairs][first_shell]
    assert len(weights) == 4 * 12 / 2
    assert torch.allclose(weights, weights[0].expand_as(weights), rtol=0, atol=1e-10)


# --- slots --------------------------------------------------------------------------------------


def test_every_edge_has_its_reverse(make_graph: GraphMaker, cluster: Atoms, crystal: Atoms) -> None:
    for atoms in (cluster, crystal):
        graph = make_graph(atoms)
        edges = edges_of(graph)
        half = graph.num_pairs
        for edge, reverse in zip(edges[:half], edges[half:], strict=True):
            i, j, *shift = edge
            assert reverse == (j, i, *(-s for s in shift))


def test_slots_hold_what_they_say(
    make_graph: GraphMaker, cluster: Atoms, crystal: Atoms, slab: Atoms
) -> None:
    """Source and destination slots of a batch: the right row, each once, the strongest first."""
    graph = make_graph([cluster, closed(Atoms("He")), crystal, slab])
    n, slots, half = graph.num_atoms, graph.num_slots, graph.num_pairs
    atoms = torch.arange(n)
    assert slots % 4 == 0 and slots - 4 < graph.counts.max() <= slots and graph.counts.min() == 1
    state_rows = torch.cat([atoms, graph.source])
    arrival_rows = torch.cat([atoms, graph.target])
    for slot, rows in (
        (graph.source_slot, state_rows),
        (graph.destination_slot, arrival_rows),
    ):
        assert len(slot.unique()) == len(slot) == n + 2 * half
        assert torch.equal(slot // slots, rows)
        assert torch.equal(slot[:n] % slots, torch.zeros(n, dtype=torch.long))
        assert (slot % slots < graph.counts[rows]).all()
    # slot s of the destination layout is the reverse of slot s of the source layout
    swapped = torch.cat([atoms, atoms.new_tensor(range(n + half, n + 2 * half))])
    swapped = torch.cat([swapped, atoms.new_tensor(range(n, n + half))])
    assert torch.equal(graph.destination_slot, graph.source_slot[swapped])

    occupied = torch.arange(slots) < graph.counts.unsqueeze(1)
    assert torch.equal(graph.log_weight.isfinite(), occupied)
    assert (graph.log_weight[:, 0] == 0).all()
    assert (graph.log_weight[:, 1:] <= graph.log_weight[:, :-1]).all()
    directions = torch.zeros(n * slots, 3).double()
    directions[graph.source_slot[n:]] = torch.cat([graph.directions, -graph.directions])
    assert torch.equal(graph.slot_directions.flatten(0, 1), directions)


def test_systems_of_a_batch_are_strangers(
    make_graph: GraphMaker, cluster: Atoms, crystal: Atoms
) -> None:
    batch = [cluster, crystal, cluster]
    graph = make_graph(batch)
    system = torch.repeat_interleave(torch.arange(3), torch.tensor([len(a) for a in batch]))
    assert torch.equal(system[graph.source], system[graph.target])
    alone = [make_graph(atoms) for atoms in batch]
    assert graph.num_pairs == sum(part.num_pairs for part in alone)
    assert torch.equal(graph.counts, torch.cat([part.counts for part in alone]))


def test_far_and_lone_atoms(make_graph: GraphMaker) -> None:
    lone = make_graph(closed(Atoms("He")))
    assert (lone.num_atoms, lone.num_pairs, lone.num_slots) == (1, 0, 4)
    assert lone.log_weight.tolist() == [[0.0, *[-math.inf] * 3]]
    far = make_graph(closed(Atoms("He2", [(0, 0, 0), (6.001, 0, 0)])))
    assert (far.num_pairs, far.num_slots) == (0, 4)
    near = make_graph(closed(Atoms("He2", [(0, 0, 0), (5.9, 0, 0)])))
    assert near.num_pairs == 1 and near.counts.tolist() == [2, 2]
    assert near.log_weight[0, 1] < -20  # nearly faded
    assert torch.equal(near.source, torch.tensor([0, 1]))
    assert torch.equal(near.slot_directions[:, 1, 0], torch.tensor([1.0, -1.0]).double())


def test_the_k_limit_bites(make_graph: GraphMaker, cluster: Atoms) -> None:
    inside = (cluster.get_all_distances() < 6.0).sum(1)
    free, limited = make_graph(cluster, k=60), make_graph(cluster, k=6)
    assert (limited.counts <= 6).all() and limited.counts.max() >= 5
    assert free.counts.max() > 12
    assert inside.min() > 12
    pairs = lambda graph: {edge[:2] for edge in edges_of(graph)}
    assert pairs(limited) < pairs(free)


# --- a fixed number of slots --------------------------------------------------------------------


def test_a_fixed_number_of_slots_drops_the_weakest(make_graph: GraphMaker, cluster: Atoms) -> None:
    """An edge goes when it is among the last of either of its rows; nothing is ranked again."""
    free = make_graph(cluster)
    with pytest.warns(UserWarning, match="max_neighbors = 8 is fewer than the .* weakest edges"):
        fixed = make_graph(cluster, max_neighbors=8)
    assert fixed.num_slots == 8 < free.num_slots
    position = free.source_slot[free.num_atoms :] % free.num_slots
    fits = (position < 8).view(2, -1).all(0)
    assert 0 < fits.sum() < free.num_pairs
    expected = [edge for edge, keep in zip(edges_of(free), fits.repeat(2), strict=True) if keep]
    assert edges_of(fixed) == expected
    weight = lambda g: g.log_weight.flatten()[g.source_slot[g.num_atoms :]]
    assert torch.equal(weight(fixed), weight(free)[fits.repeat(2)])
    # the weaker one of two edges never stays while the stronger one of the same row goes for it
    occupied = torch.arange(8) < fixed.counts.unsqueeze(1)
    assert torch.equal(fixed.log_weight.isfinite(), occupied)


def test_more_slots_than_edges_stay_empty(make_graph: GraphMaker, cluster: Atoms) -> None:
    free = make_graph(cluster)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fixed = make_graph(cluster, max_neighbors=40)
    assert fixed.num_slots == 40
    assert edges_of(fixed) == edges_of(free)
    assert torch.equal(fixed.log_weight[:, : free.num_slots], free.log_weight)
    assert (fixed.log_weight[:, free.num_slots :] == -torch.inf).all()


# --- derivatives --------------------------------------------------------------------------------


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("name", ["cluster", "crystal"])
def test_graph_is_differentiable_in_positions_and_cell(
    small_config: AllScAIPConfig, request: pytest.FixtureRequest, name: str, ranking: str
) -> None:
    """The fading weights, distances and directions, along random displacements."""
    config = small_config.replace(**RANKINGS[ranking], k=8)
    structures = structures_from_atoms(request.getfixturevalue(name), torch.float64)
    generator = torch.Generator().manual_seed(0)
    random = lambda like: torch.randn(like.shape, generator=generator).double()
    ways = random(structures.positions), random(structures.cell)

    def numbers(s: torch.Tensor) -> torch.Tensor:
        moved = structures.replace(
            positions=structures.positions + s * ways[0], cell=structures.cell + s * ways[1]
        )
        graph = build_graph(moved, config)
        weights = graph.log_weight.exp()  # the weight itself: its logarithm diverges at the end
        parts = weights.flatten(), graph.distances, graph.directions.flatten()
        return torch.cat(parts) if ranking != "hard" else torch.cat(parts[1:])

    s = torch.zeros((), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(numbers, (s,), eps=1e-6, atol=1e-6, fast_mode=True)


# --- the functions it is made of ----------------------------------------------------------------


def test_bump_is_the_smooth_step() -> None:
    x = torch.linspace(-4.5, 4.5, 181, dtype=torch.float64)
    found = bump(x)
    expected = [step(float(value)) for value in x]
    np.testing.assert_allclose(found, expected, atol=1e-15)
    assert (found[x <= -4] == 0).all() and (found[x >= 4] == 1).all()
    assert bump(torch.zeros(1).double()).item() == 0.5
    assert (found.diff() >= 0).all()
    np.testing.assert_allclose(found + found.flip(0), 1, atol=1e-15)
    for dtype in (torch.float32, torch.float64):
        ends = torch.tensor([-4.0, 4.0, -1e6, 1e6], dtype=dtype, requires_grad=True)
        (gradient,) = torch.autograd.grad(bump(ends).sum(), ends)
        assert bump(ends).tolist() == [0, 1, 0, 1] and gradient.tolist() == [0] * 4
    inside = torch.linspace(-3.9, 3.9, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(bump, (inside,))
    assert torch.autograd.gradgradcheck(bump, (inside,))


def test_soft_rank_counts_the_nearer_ones() -> None:
    """Far apart compared with the width, it is the position plus one half; empty ones have none."""
    distances = torch.tensor([[0.0, 2.0, 5.0, 5.0, torch.inf]], dtype=torch.float64)
    for truncated in (True, False):
        rank = soft_rank(distances, 0.05, truncated)[0]
        np.testing.assert_allclose(rank[:4], [0.5, 1.5, 3, 3], atol=1e-12)
        assert rank[4] == torch.inf
    assert hard_rank(distances)[0].tolist() == [0, 1, 2, 3, torch.inf]


def test_an_empty_candidate_leaves_no_trace_in_the_gradient() -> None:
    distances = torch.tensor([[0.0, 1.0, 1.1, torch.inf]], dtype=torch.float64, requires_grad=True)
    rank = soft_rank(distances, 0.2)[0, :3]
    (gradient,) = torch.autograd.grad(rank[2], distances)
    assert gradient.isfinite().all() and gradient[0, 3] == 0 and gradient[0, 2] > 0


def test_soft_maximum_is_above_the_maximum_by_little() -> None:
    values = torch.tensor([[0.2, 0.9], [0.7, 0.9], [0.1, 0.9]], dtype=torch.float64)
    found = soft_maximum(values, 0.1)
    assert found[1].item() == pytest.approx(0.9 + 0.1 * np.log(3))
    assert 0.7 < found[0] < 0.71


def test_log_envelope_fades_to_nothing() -> None:
    envelope = torch.tensor([0.0, 0.5, 0.99, 1 - 2.0**-24], requires_grad=True)
    log_weight = log_envelope(envelope)
    assert log_weight[0] == 0 and log_weight[1].item() == pytest.approx(-1 / 3)
    assert (log_weight.diff() < 0).all() and log_weight.isfinite().all()
    (gradient,) = torch.autograd.grad(log_weight.sum(), envelope)
    assert gradient.isfinite().all() and gradient[0] == 0


def test_safe_norm_of_a_zero_vector() -> None:
    vectors = torch.tensor([[0.0, 0, 0], [3, 4, 0]], dtype=torch.float64, requires_grad=True)
    length = safe_norm(vectors)
    assert length.tolist() == [0, 5]
    (gradient,) = torch.autograd.grad(length.sum(), vectors, create_graph=True)
    np.testing.assert_allclose(gradient.detach(), [[0, 0, 0], [0.6, 0.8, 0]])
    (second,) = torch.autograd.grad(gradient.square().sum(), vectors)
    assert second.isfinite().all()


# --- who is near whom ---------------------------------------------------------------------------


def pairs_of(atoms: Atoms, reach: float) -> dict[Edge, int]:
    """How often each pair is found, either way round being the same pair."""
    first, second, shift = candidate_pairs(structures_from_atoms(atoms, torch.float64), reach)
    counts: dict[Edge, int] = {}
    for i, j, s in zip(first.tolist(), second.tolist(), shift.long().tolist(), strict=True):
        edge = min((i, j, *s), (j, i, *(-x for x in s)))
        counts[edge] = counts.get(edge, 0) + 1
    return counts


def test_cell_list_finds_what_all_pairs_find(
    monkeypatch: pytest.MonkeyPatch, cluster: Atoms
) -> None:
    boxed = cluster.copy()
    boxed.set_cell([(3, 0, 0), (0, 3, 0), (3, 3, 0)])  # not periodic: means nothing, and is flat
    for atoms in (cluster, boxed, closed(molecule("C60")), closed(Atoms("He"))):
        dense = pairs_of(atoms, 4.1)
        with monkeypatch.context() as context:
            context.setattr(neighbors, "DENSE_SEARCH_ATOMS", 0)
            assert pairs_of(atoms, 4.1) == dense
        assert set(dense.values()) <= {1}


@pytest.mark.parametrize("reach", [2.0, 6.8, 12.5])
def test_periodic_candidates_are_those_of_ase(crystal: Atoms, slab: Atoms, reach: float) -> None:
    for atoms in (crystal, slab):
        i, j, shift = neighbor_list("ijS", atoms, reach)
        expected = {
            min((a, b, *s), (b, a, *(-x for x in s)))
            for a, b, s in zip(i.tolist(), j.tolist(), shift.tolist(), strict=True)
        }
        found = pairs_of(atoms, reach)
        assert set(found) == expected and set(found.values()) <= {1}


SKEWED = {
    "cube": np.diag([5.0, 6.0, 7.0]),
    "triclinic": [(4.1, 0.2, 0.0), (1.6, 3.9, 0.3), (-0.7, 1.1, 4.6)],
    "sheared": [(3.1, 0, 0), (7.4, 3.0, 0), (-5.3, 8.1, 3.6)],
    "needle": [(2.0, 0, 0), (0.99, 20.0, 0), (0.98, 9.9, 31.0)],
    "left-handed": [(0, 4.0, 0), (4.5, 1.9, 0), (2.2, 2.1, -5.0)],
}


@pytest.mark.parametrize("pbc", [(1, 1, 1), (1, 1, 0)], ids=str)
def test_other_vectors_of_a_lattice_have_the_same_pairs(pbc: tuple) -> None:
    compact = np.array([(8, 0, 0), (1, 9, 0), (2, -3, 10.0)])
    others = np.array([(1, 0, 0), (20, 1, 0), (-7 * pbc[2], 5 * pbc[2], 1)])
    positions = np.random.default_rng(0).random((7, 3)) @ compact
    lengths = []
    for cell in (compact, others @ compact):
        atoms = closed(Atoms("He7", positions, cell=cell, pbc=pbc))
        structures = structures_from_atoms(atoms, torch.float64)
        pairs = candidate_pairs(structures, 7.0)
        lengths.append(neighbors.pair_vectors(structures, *pairs).norm(dim=1).sort().values)
        assert len(pairs[0]) > 20 and lengths[-1].max() < 7
    torch.testing.assert_close(*lengths, rtol=0, atol=1e-9)


@pytest.mark.parametrize("pbc", [(1, 1, 1), (1, 1, 0), (0, 1, 0), (1, 0, 1)], ids=str)
@pytest.mark.parametrize("name", SKEWED)
def test_nearest_images(name: str, pbc: tuple) -> None:
    """Beside trying 19³ images around what is found, for atoms far outside the cell too.

    ASE's `find_mic` agrees wherever all three directions are periodic; where they are not and the
    cell is oblique, it overlooks images.
    """
    cell, n = np.array(SKEWED[name], dtype=float), 9
    positions = np.random.default_rng(3).uniform(-1.5, 2.5, (n, 3)) @ cell
    shift, ties = nearest_images(
        torch.tensor(positions), torch.tensor(cell), torch.tensor(pbc).bool()
    )
    assert len(ties[0]) == 0
    shift = shift.numpy()
    np.testing.assert_allclose(shift, shift.round(), atol=1e-9)
    assert (shift[..., np.array(pbc) == 0] == 0).all()
    apart = positions[None] - positions[:, None]
    distances = np.linalg.norm(apart + shift @ cell, axis=2)
    _, from_ase = find_mic(apart.reshape(-1, 3), cell, pbc)
    if all(pbc):
        np.testing.assert_allclose(distances.flatten(), from_ase, atol=1e-8)
    assert (distances.flatten() <= from_ase + 1e-8).all()
    around = np.array(list(product(*(range(-9, 10) if p else (0,) for p in pbc)))) @ cell
    vectors = apart + shift @ cell
    nearest = [np.linalg.norm(vectors + step, axis=2) for step in around]
    np.testing.assert_allclose(distances, np.min(nearest, axis=0), atol=1e-8)


@pytest.mark.parametrize(
    ("crystal", "most"),
    [
        (bulk("NaCl", "rocksalt", a=5.6, cubic=True), 8),  # the body centre of a cube
        (bulk("NaCl", "rocksalt", a=5.6), 6),  # an octahedral hole of a face-centred lattice
        (bulk("Ti", "hcp", a=2.95, c=4.68) * (2, 2, 1), 6),
    ],
    ids=["cube", "primitive", "hexagonal"],
)
def test_all_of_the_equally_near_images_are_found(crystal: Atoms, most: int) -> None:
    crystal = closed(crystal)
    crystal.rattle(1e-7, seed=1)  # as float32 leaves them
    positions, cell, pbc = (
        torch.tensor(x) for x in (crystal.positions, crystal.cell.array, crystal.pbc)
    )
    shift, (rows, columns, others) = nearest_images(positions, cell, pbc)
    steps = np.array(list(product(range(-3, 4), repeat=3)))
    for i, j in product(range(len(crystal)), repeat=2):
        apart = crystal.positions[j] - crystal.positions[i] + steps @ crystal.cell.array
        lengths = np.linalg.norm(apart, axis=1)
        expected = {tuple(step) for step in steps[lengths < lengths.min() + 1e-5]}
        found = [shift[i, j], *others[(rows == i) & (columns == j)]]
        assert {tuple(int(x) for x in image.round()) for image in found} == expected
        assert len(found) == len(expected)
    assert np.unique(rows * len(crystal) + columns, return_counts=True)[1].max() + 1 == most


@pytest.mark.parametrize("pbc", [(1, 1, 1), (1, 1, 0), (1, 0, 1), (1, 0, 0), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("lengths", [(2e4, 11, 1e4), (2e4, 11, 11), (9, 2e4, 2e4), (40, 30, 2e4)])
def test_pairs_in_long_and_empty_boxes(lengths: tuple, pbc: tuple) -> None:
    """In a process of a cell list that divides by zero in some of them; tilted, beyond the cell."""
    flags = np.array(pbc, dtype=bool)
    cell = np.diag(lengths) @ (np.eye(3) + np.triu(np.full((3, 3), 0.3), 1))
    near = np.random.default_rng(0).uniform(0, 9, (6, 3))
    positions = near + (np.array([0, 0, 1, -1, 2, 5])[:, None] * flags) @ cell
    positions = np.concatenate([positions, near + 0.9 * cell[0] + 0.9 * cell[2]])
    atoms = closed(Atoms("H12", positions, cell=cell, pbc=flags))
    structures = structures_from_atoms(atoms, torch.float64)
    first, second, shift = candidate_pairs(structures, 7.0)
    found = neighbors.pair_vectors(structures, first, second, shift).norm(dim=1)
    assert bool((found < 7).all())
    steps = np.array(list(product(*(range(-9, 10) if flag else (0,) for flag in flags))))
    apart = atoms.positions[None] - atoms.positions[:, None]
    images = np.linalg.norm(apart[:, :, None] + steps @ cell, axis=-1)
    expected = np.sort(images[(images > 0) & (images < 7)])[::2]
    np.testing.assert_allclose(found.sort().values, expected, atol=1e-8)


def test_equally_near_images_pull_equally() -> None:
    """The slope of a distance at a tie is the mean of the slopes to its two sides."""
    atoms = closed(Atoms("H2", [(0, 0, 0), (2, 0, 0)], cell=[4, 9, 9], pbc=True))

    def distance(x: float) -> torch.Tensor:
        structures = structures_from_atoms(atoms, torch.float64)
        positions = torch.tensor([[[0, 0, 0], [x, 0.0, 0]]], dtype=torch.float64)
        positions.requires_grad_()
        between = system_distances(structures, positions)[0, 0, 1]
        return between.detach(), torch.autograd.grad(between, positions)[0][0, 1, 0]

    assert [round(float(distance(x)[1]), 12) for x in (1.99, 2.0, 2.01)] == [1, 0, -1]
    assert float(distance(2.0)[0]) == 2


def test_order_of_the_atoms_does_not_choose_the_candidates(make_graph: GraphMaker) -> None:
    """In a crystal the shell of the last candidate is ranked as a whole."""
    slab = closed(bulk("Cu", a=3.6, cubic=True) * (3, 3, 2))
    order = np.random.default_rng(0).permutation(len(slab))
    weights = [
        make_graph(atoms, k=10, cutoff=6.0).log_weight.exp().sum(1) for atoms in (slab, slab[order])
    ]
    np.testing.assert_allclose(weights[1], weights[0][order], rtol=0, atol=1e-13)


def test_system_distances_of_a_batch(cluster: Atoms, crystal: Atoms, slab: Atoms) -> None:
    """Smallest image distances of each system, padded; gradients are finite on the diagonal."""
    batch = [cluster, crystal, slab]
    structures = structures_from_atoms(batch, torch.float64)
    longest = max(len(atoms) for atoms in batch)
    padded = torch.zeros(3, longest, 3, dtype=torch.float64)
    for index, part in enumerate(structures.positions.split(structures.natoms.tolist())):
        padded[index, : len(part)] = part
    padded.requires_grad_()
    distances = system_distances(structures, padded)
    assert distances.shape == (3, longest, longest)
    for index, atoms in enumerate(batch):
        n = len(atoms)
        expected = atoms.get_all_distances(mic=bool(atoms.pbc.any()))
        np.testing.assert_allclose(distances[index, :n, :n].detach(), expected, atol=1e-9)
    (gradient,) = torch.autograd.grad(distances.sum(), padded)
    assert gradient.isfinite().all()
