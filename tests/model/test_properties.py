"""What must hold for every structure: properties of the graph, of batches and of the answers.

Hypothesis draws molecules, crystals, slabs and wires: atoms on a grid, each moved by a random step,
none closer than 0.8 Å, cells of any shape and handedness, many of them smaller than the cutoff. The
random steps keep two distances from being equal: at an exact tie of two images the nearest one is a
choice, and forces are not defined. Failing examples shrink to few atoms in a plain cell.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from ase import Atoms
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from allscaip_lite import AllScAIP, AllScAIPCalculator, AllScAIPConfig
from allscaip_lite.graph import Graph, build_graph
from allscaip_lite.kernels import choose
from allscaip_lite.model import Result
from allscaip_lite.neighbors import TIE, nearest_images
from allscaip_lite.notebook.attention_maps import attention_maps
from allscaip_lite.operations import Operations
from allscaip_lite.structures import structures_from_atoms

Edge = tuple[int, int, int, int, int]  # atoms i and j, and the image of j
Edges = dict[Edge, tuple[float, np.ndarray]]  # its envelope weight, and the vector from i to j

few = settings(derandomize=True, deadline=None, max_examples=15)
many = settings(derandomize=True, deadline=None, max_examples=120)

ELEMENTS = (1, 6, 7, 8, 9, 11, 16, 17)
SPACING = 1.3  # Å between the grid's sites in a molecule
STEP = 0.25  # Å, how far each coordinate is moved off the grid
CLOSEST = 0.8  # Å between any two atoms


# --- structures ---------------------------------------------------------------------------------


def with_random_state(draw: st.DrawFn, atoms: Atoms) -> Atoms:
    """Charge -1, 0 or 1, and the lowest or the second lowest multiplicity it allows."""
    electrons = int(atoms.numbers.sum()) - (charge := draw(st.integers(-1, 1)))
    spin = 1 + electrons % 2
    if electrons > 1:
        spin += 2 * draw(st.integers(0, 1))
    atoms.info.update(charge=charge, spin=spin)
    return atoms


def elements(count: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.sampled_from(ELEMENTS), min_size=count, max_size=count)


@st.composite
def molecules(draw: st.DrawFn, most: int = 8) -> Atoms:
    """Up to `most` atoms; in a line of sites they reach beyond the cutoff."""
    site = st.tuples(st.integers(0, 6), st.integers(0, 2), st.integers(0, 2))
    sites = draw(st.lists(site, min_size=1, max_size=most, unique=True))
    steps = np.random.default_rng(draw(st.integers(0, 99))).uniform(-STEP, STEP, (len(sites), 3))
    positions = SPACING * np.array(sites) + steps
    return with_random_state(draw, Atoms(draw(elements(len(sites))), positions))


@st.composite
def clusters(draw: st.DrawFn, most: int = 40) -> Atoms:
    """Up to `most` atoms as a ball, in which more are near than ranks count."""
    sites = np.array(list(product(range(-2, 3), repeat=3)))
    sites = sites[np.argsort((sites**2).sum(1), kind="stable")[: draw(st.integers(1, most))]]
    steps = np.random.default_rng(draw(st.integers(0, 99))).uniform(-STEP, STEP, sites.shape)
    atoms = Atoms([draw(st.sampled_from(ELEMENTS))] * len(sites), SPACING * sites + steps)
    return with_random_state(draw, atoms)


@st.composite
def cells(draw: st.DrawFn) -> np.ndarray:
    """(3, 3) Å: heights of 1.5 to 7.5 Å, any tilt, often flat or much skewed, either hand."""
    a, b, c = (draw(st.integers(6, 30)) / 4 for _ in range(3))
    ab, ac, bc = (draw(st.integers(-8, 8)) / 8 for _ in range(3))
    lattice = np.array([(a, 0, 0), (ab * a, b, 0), (ac * a, bc * b, c)])
    if draw(st.booleans()):
        lattice[:, draw(st.integers(0, 2))] *= -1  # left-handed
    shear = np.eye(3)
    shear[0, 1], shear[0, 2], shear[1, 2] = (draw(st.integers(-1, 1)) for _ in range(3))
    rotation = draw(st.integers(0, 9))
    if rotation:
        turned, _ = np.linalg.qr(np.random.default_rng(rotation).normal(size=(3, 3)))
        lattice = lattice @ turned
    return shear @ lattice


SOLID = [(True, True, True)]
ANY = [flags for flags in product((True, False), repeat=3) if any(flags)]


@st.composite
def periodic(draw: st.DrawFn, pbc: list[tuple[bool, ...]] = ANY, most: int = 4) -> Atoms:
    """A crystal, slab or wire of up to `most` atoms, some of them outside the cell.

    Lattice vectors along which it is not periodic are given or zero.
    """
    cell, flags = draw(cells()), np.array(draw(st.sampled_from(pbc)))
    site = st.tuples(*3 * [st.integers(0, 2)])
    sites = draw(st.lists(site, min_size=1, max_size=most, unique=True))
    steps = np.random.default_rng(draw(st.integers(0, 99))).uniform(-0.1, 0.1, (len(sites), 3))
    scaled = (np.array(sites) + steps) / 3 + draw(st.tuples(*3 * [st.integers(-1, 1)]))
    positions = scaled @ cell
    if draw(st.booleans()):
        cell[~flags] = 0
    atoms = Atoms(draw(elements(len(sites))), positions, cell=cell, pbc=flags)
    distances = pairs_over_images(atoms, CLOSEST)[3]
    if len(distances):
        atoms.set_cell(atoms.cell * (CLOSEST / distances.min()))
        atoms.positions *= CLOSEST / distances.min()
    return with_random_state(draw, atoms)


structures = st.one_of(molecules(), periodic())


def moves(low: int, high: int) -> st.SearchStrategy[np.ndarray]:
    """Three whole numbers."""
    return st.tuples(*3 * [st.integers(low, high)]).map(np.array)


# --- the graph by trying all images -------------------------------------------------------------


def pairs_over_images(
    atoms: Atoms, reach: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """i, j, image of j, distance and vector of all pairs below `reach` Å, in both directions.

    Every image is tried that could be so near: its number along a lattice vector is the component
    of a vector no longer than `reach` plus the difference of the two atoms.
    """
    vectors = atoms.positions[None] - atoms.positions[:, None]  # (N, N, 3)
    images = np.zeros(3, dtype=int)
    if atoms.pbc.any():
        inverse = np.linalg.pinv(atoms.cell.array[atoms.pbc])  # (3, number of periodic directions)
        span = np.abs(vectors @ inverse).max((0, 1)) + reach * np.linalg.norm(inverse, axis=0)
        images[atoms.pbc] = np.ceil(span)
    shifts = np.array(list(product(*(range(-n, n + 1) for n in images))))  # (S, 3)
    vectors = vectors[:, :, None] + shifts @ atoms.cell.array  # (N, N, S, 3)
    distances = np.linalg.norm(vectors, axis=3)
    near = distances < reach
    own = np.eye(len(atoms), dtype=bool)[:, :, None] & (shifts == 0).all(1)
    i, j, s = np.nonzero(near & ~own)
    return i, j, shifts[s], distances[i, j, s], vectors[i, j, s]


def edges_over_images(atoms: Atoms, config: AllScAIPConfig) -> tuple[Edges, float]:
    """The graph by its formulas; and how near the envelope of any pair comes to 1, the end."""
    atoms = atoms.copy()
    atoms.positions = graph_positions(atoms)
    reach = config.cutoff + 4 * config.rank_width
    i, j, shift, distances, vectors = pairs_over_images(atoms, reach)
    ranks = np.zeros(len(i))
    for atom in range(len(atoms)):
        mine = i == atom
        nearest = np.sort([0, *distances[mine]])
        cut = nearest[: config.k + 20][-1] + TIE  # what is as far as the last is ranked too
        nearest = nearest[nearest < cut]
        x = (distances[mine][:, None] - nearest) / config.rank_width / 4
        inside = np.abs(x) < 0.9999
        x = np.where(inside, x, 0)
        a, b = np.exp(-2 / (1 + x)), np.exp(-2 / (1 - x))
        smaller = distances[mine][:, None] > nearest
        counts = np.where(inside, a / (a + b), smaller).sum(1)
        ranks[mine] = np.where(distances[mine] < cut, counts, 1e3)
    names = [(a, b, *s) for a, b, s in zip(i.tolist(), j.tolist(), shift.tolist(), strict=True)]
    rank = dict(zip(names, ranks.tolist(), strict=True))
    found, margin = {}, np.inf
    for name, distance, vector in zip(names, distances.tolist(), vectors, strict=True):
        a, b, *s = name
        limits = [rank[name] / config.k, rank[(b, a, *(-x for x in s))] / config.k]
        limits = np.array([*limits, distance / config.cutoff]) / config.envelope_temperature
        envelope = config.envelope_temperature * np.logaddexp.reduce(limits)
        margin = min(margin, abs(envelope - 1))
        if envelope < 1:
            found[name] = (float(np.exp(-(envelope**2) / (1 - envelope**2))), vector)
    return found, margin


def graph_of(atoms: Atoms | list[Atoms], config: AllScAIPConfig) -> Graph:
    return build_graph(structures_from_atoms(atoms, torch.float64), config)


def graph_positions(atoms: Atoms) -> np.ndarray:
    """(N, 3) Å, to which the images of `graph_of` belong."""
    return structures_from_atoms(atoms, torch.float64).positions.numpy()


def edges_of(graph: Graph) -> Edges:
    """The edges as attention reads them: the weight and the direction from the slot of each."""
    slot = graph.source_slot[graph.num_atoms :]
    weights = graph.log_weight.flatten()[slot].exp().tolist()
    lengths = graph.distances.repeat(2).unsqueeze(1)
    vectors = (graph.slot_directions.flatten(0, 1)[slot] * lengths).numpy()
    columns = torch.cat([graph.source[:, None], graph.target[:, None], graph.shift.long()], dim=1)
    names = [tuple(row) for row in columns.tolist()]
    assert len(set(names)) == len(names)
    return dict(zip(names, zip(weights, vectors, strict=True), strict=True))


def assert_same_edges(found: Edges, expected: Edges) -> None:
    assert found.keys() == expected.keys()
    for edge, (weight, vector) in expected.items():
        assert found[edge][0] == pytest.approx(weight, rel=1e-6, abs=1e-9)
        np.testing.assert_allclose(found[edge][1], vector, rtol=0, atol=1e-9)


@many
@given(
    atoms=st.one_of(periodic(), clusters(), molecules()),
    k=st.integers(3, 15),
    cutoff=st.sampled_from([3.0, 6.0, 8.0]),
)
def test_edges_are_those_found_among_all_images(
    small_config: AllScAIPConfig, atoms: Atoms, k: int, cutoff: float
) -> None:
    """Cells of any shape; atoms alone, with no image in reach, or with hundreds of them."""
    config = small_config.replace(k=k, cutoff=cutoff)
    expected, margin = edges_over_images(atoms, config)
    assume(margin > 1e-9)  # at its very end, rounding decides whether an edge is there
    assert_same_edges(edges_of(graph_of(atoms, config)), expected)


@many
@given(atoms=structures)
def test_every_edge_has_its_reverse(small_config: AllScAIPConfig, atoms: Atoms) -> None:
    """Of the same weight and the opposite direction, in the slot that destinations read."""
    graph = graph_of(atoms, small_config)
    edges = edges_of(graph)
    for (i, j, *shift), (weight, vector) in edges.items():
        reverse = edges[(j, i, *(-s for s in shift))]
        assert reverse[0] == weight
        np.testing.assert_array_equal(reverse[1], -vector)
    arrivals = graph.destination_slot[graph.num_atoms :]
    assert torch.equal(arrivals // graph.num_slots, graph.target)
    assert torch.equal(
        graph.slot_directions.flatten(0, 1)[arrivals].repeat(2, 1)[: len(arrivals)],
        torch.cat([-graph.directions, graph.directions]),
    )


@many
@given(cell=cells(), flags=st.sampled_from(ANY), seed=st.integers(0, 99))
def test_nearest_images_are_those_found_among_all_images(
    cell: np.ndarray, flags: tuple[bool, ...], seed: int
) -> None:
    """Of points anywhere in three cells and more, for node attention."""
    points = np.random.default_rng(seed).uniform(-1, 2, (6, 3)) @ cell
    atoms = Atoms("H6", points, cell=cell, pbc=flags)
    shift, _ = nearest_images(*(torch.as_tensor(x) for x in (points, cell, atoms.pbc)))
    shift = shift.numpy()
    np.testing.assert_allclose(shift, shift.round(), rtol=0, atol=1e-9)
    assert (shift[..., ~atoms.pbc] == 0).all()
    found = np.linalg.norm(points[None] - points[:, None] + shift @ cell, axis=2)
    i, j, _, distances, _ = pairs_over_images(atoms, found.max() + 0.1)
    nearest = np.where(np.eye(len(atoms), dtype=bool), 0, np.inf)
    np.minimum.at(nearest, (i, j), distances)
    np.testing.assert_allclose(found, nearest, rtol=0, atol=1e-9)


@few
@given(atoms=periodic(SOLID, most=3), repeats=moves(1, 2))
def test_atoms_of_a_supercell_have_the_edges_of_the_cell(
    small_config: AllScAIPConfig, atoms: Atoms, repeats: np.ndarray
) -> None:
    """Each copy of an atom has the envelope weights of the atom."""
    atoms.info.update(charge=0, spin=0)
    small, large = (
        graph_of(atoms, small_config),
        graph_of(atoms * repeats, small_config),
    )
    copies = int(repeats.prod())
    assert torch.equal(large.counts, small.counts.repeat(copies))
    assert large.num_slots == small.num_slots
    weights = small.log_weight.exp().sort(descending=True).values
    found = large.log_weight.exp().sort(descending=True).values
    torch.testing.assert_close(found, weights.repeat(copies, 1), rtol=0, atol=1e-9)


@few
@given(atoms=structures, seed=st.integers(0, 99))
def test_rotations_and_mirrors_turn_the_edges(
    small_config: AllScAIPConfig, atoms: Atoms, seed: int
) -> None:
    """The weights stay; the model as a whole is not invariant, its edges hold directions."""
    turn, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    turned = atoms.copy()
    turned.set_cell(atoms.cell.array @ turn)
    turned.positions = atoms.positions @ turn
    expected = edges_of(graph_of(atoms, small_config))
    expected = {edge: (weight, vector @ turn) for edge, (weight, vector) in expected.items()}
    assert_same_edges(edges_of(graph_of(turned, small_config)), expected)


# --- the answers --------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["plain", "auto"])
def operations(request: pytest.FixtureRequest) -> Operations:
    """The plain formulas, and what a user gets on this machine."""
    return choose(request.param, "cpu", torch.float64)


@pytest.fixture(scope="module")
def plain_model(make_model: Callable[..., AllScAIP]) -> AllScAIP:
    return make_model()


@pytest.fixture(scope="module")
def model(make_model: Callable[..., AllScAIP], operations: Operations) -> AllScAIP:
    found = make_model()
    found.operations = operations
    return found


@pytest.fixture(scope="module")
def local_model(make_model: Callable[..., AllScAIP], operations: Operations) -> AllScAIP:
    """Without node attention: atoms beyond the cutoff of all others are alone.

    The multiplicity, which is that of the whole, changes nothing.
    """
    found = make_model(node_attention=False)
    found.operations = operations
    with torch.no_grad():  # the multiplicity of two systems is not that of one, whatever it is
        found.input.spin_embedding.weight[:] = found.input.spin_embedding.weight[0]
    return found


def assert_same(found: Result, expected: Result, order: np.ndarray | None = None) -> None:
    """Energy, forces and stress; `order` are the atoms of `expected` in the order of `found`."""
    forces = expected.forces if order is None else expected.forces[order]
    assert found.energy == pytest.approx(expected.energy, rel=0, abs=1e-8)
    np.testing.assert_allclose(found.forces, forces, rtol=0, atol=1e-8)
    assert (found.stress is None) == (expected.stress is None)
    if expected.stress is not None:
        np.testing.assert_allclose(found.stress, expected.stress, rtol=0, atol=1e-8)


@few
@given(atoms=structures, data=st.data())
def test_permuted_atoms_have_permuted_forces(
    model: AllScAIP, atoms: Atoms, data: st.DataObject
) -> None:
    order = np.array(data.draw(st.permutations(range(len(atoms)))))
    assert_same(*model.predict([atoms[order], atoms]), order)


@few
@given(atoms=structures, vector=moves(-100, 100))
def test_translation_changes_nothing(model: AllScAIP, atoms: Atoms, vector: np.ndarray) -> None:
    moved = atoms.copy()
    moved.positions += vector / 7  # Å
    assert_same(*model.predict([moved, atoms]))


@few
@given(atoms=periodic(), data=st.data())
def test_an_atom_and_its_image_are_the_same(
    model: AllScAIP, atoms: Atoms, data: st.DataObject
) -> None:
    """Every atom carried into another cell; the edges' images follow."""
    count = len(atoms)
    carried = np.array(data.draw(st.lists(moves(-2, 2), min_size=count, max_size=count)))
    carried *= atoms.pbc
    moved = atoms.copy()
    moved.positions += carried @ atoms.cell.array
    assert_same(*model.predict([moved, atoms]))
    # an atom far from the cell is brought back to it
    apart = (graph_positions(moved) - graph_positions(atoms)) @ np.linalg.pinv(atoms.cell.array)
    carried = (apart - apart[0]).round().astype(int)
    expected = {
        (i, j, *(np.array(shift) + carried[i] - carried[j]).tolist()): edge
        for (i, j, *shift), edge in edges_of(graph_of(atoms, model.config)).items()
    }
    assert_same_edges(edges_of(graph_of(moved, model.config)), expected)


@few
@given(batch=st.lists(structures, min_size=2, max_size=3))
def test_a_structure_answers_in_a_batch_as_alone(model: AllScAIP, batch: list[Atoms]) -> None:
    for atoms, found in zip(batch, model.predict(batch), strict=True):
        assert_same(found, model.predict(atoms))


@few
@given(atoms=periodic(SOLID, most=3), repeats=moves(1, 2))
def test_a_local_model_is_extensive(
    local_model: AllScAIP, atoms: Atoms, repeats: np.ndarray
) -> None:
    """A supercell has so many times the energy, the same forces and the same stress.

    Its charge and multiplicity are given to each atom, so they are those of the cell; the total
    charge of a cell is not otherwise part of the energy.
    """
    atoms.info.update(charge=0, spin=0)
    cell, supercell = local_model.predict([atoms, atoms * repeats])
    copies, offset = int(repeats.prod()), float(local_model.energy_mean)
    expected = Result(
        offset + copies * (cell.energy - offset),
        np.tile(cell.forces, (copies, 1)),
        cell.stress,
    )
    assert_same(supercell, expected)


@few
@given(left=molecules(5), right=molecules(5), gap=st.integers(0, 40))
def test_a_local_model_adds_up_what_is_beyond_the_cutoff(
    local_model: AllScAIP, left: Atoms, right: Atoms, gap: int
) -> None:
    """Single atoms and molecules, from just beyond the cutoff on."""
    far = right.copy()
    gap = local_model.config.cutoff + 0.01 + gap / 4
    far.positions[:, 0] += left.positions[:, 0].max() - right.positions[:, 0].min() + gap
    parts = [left, right, left + far]
    for atoms in parts:
        atoms.info.update(charge=0, spin=0)
    one, other, both = local_model.predict(parts)
    assert both.energy == pytest.approx(
        one.energy + other.energy - float(local_model.energy_mean), rel=0, abs=1e-8
    )
    expected = np.concatenate([one.forces, other.forces])
    np.testing.assert_allclose(both.forces, expected, rtol=0, atol=1e-8)


@few
@given(number=st.sampled_from(ELEMENTS), charge=st.integers(-1, 1))
def test_an_atom_alone_feels_no_force(model: AllScAIP, number: int, charge: int) -> None:
    """Nor does it matter whether a cell beyond all reach makes it periodic."""
    electrons = number - charge
    atoms = Atoms([number], info={"charge": charge, "spin": 1 + electrons % 2})
    boxed = atoms.copy()
    boxed.set_cell([20.0, 21.0, 22.0])
    boxed.pbc = True
    alone, in_box = model.predict([atoms, boxed])
    assert np.abs(alone.forces).max() < 1e-12
    assert np.abs(in_box.forces).max() < 1e-12
    assert in_box.energy == pytest.approx(alone.energy, rel=0, abs=1e-10)


@few
@given(atoms=structures)
def test_forces_add_up_to_zero(model: AllScAIP, atoms: Atoms) -> None:
    assert np.abs(model.predict(atoms).forces.sum(0)).max() < 1e-8


@few
@given(atoms=structures)
def test_rows_of_attention_sum_to_one(plain_model: AllScAIP, atoms: Atoms) -> None:
    """And nothing is taken from an empty slot."""
    maps = attention_maps(plain_model, atoms)
    torch.testing.assert_close(maps.node.sum(-1), torch.ones_like(maps.node[..., 0]))
    occupied = (maps.neighbor >= 0).double()  # (N, K)
    for weights in (maps.source, maps.destination):  # (L, h, N, K, K)
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.sum(-1), occupied.expand(weights.shape[:-1]))
        assert (weights * (1 - occupied).unsqueeze(1)).abs().max() == 0


@settings(derandomize=True, deadline=None, max_examples=8)
@given(atoms=molecules(5), other=periodic(), data=st.data())
def test_a_calculator_keeps_nothing_of_the_structures_before(
    plain_model: AllScAIP, atoms: Atoms, other: Atoms, data: st.DataObject
) -> None:
    """One that is asked in turn for structures that differ in one thing only, or in all."""
    moved, charged, heavier = atoms.copy(), atoms.copy(), atoms.copy()
    moved.positions[-1] += (0.01, -0.02, 0.01)
    charged.info.update(charge=atoms.info["charge"] - 2)
    heavier.numbers[0] += 2
    variants = [atoms, moved, charged, heavier, other]
    calculator, answers = AllScAIPCalculator(plain_model), plain_model.predict(variants)
    for index in data.draw(st.permutations([0, 1, 2, 3, 4, 0])):
        atoms, expected = variants[index], answers[index]
        energy = calculator.get_potential_energy(atoms)
        assert energy == pytest.approx(expected.energy, rel=0, abs=1e-8)
        forces = calculator.get_forces(atoms)
        np.testing.assert_allclose(forces, expected.forces, rtol=0, atol=1e-8)
