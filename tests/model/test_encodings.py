"""Encodings beside their definitions: e3nn's harmonics, Steinhardt's sum over m, numpy's sinc.

Where the package takes a shortcut (Legendre polynomials for sums over harmonics, a Taylor series
near zero) the long way is taken here, in float64.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from torch import Tensor

from allscaip_lite import AllScAIPConfig
from allscaip_lite.encodings import (
    HIGHEST_FREQUENCY,
    LOWEST_FREQUENCY,
    bond_orientational_order,
    legendre_polynomials,
    pair_sums,
    radial_basis,
    rotary_frequencies,
    sinc_features,
    slot_legendre,
    spherical_harmonics,
)
from allscaip_lite.graph import Graph, build_graph
from allscaip_lite.structures import structures_from_atoms

CONFIG = AllScAIPConfig(hidden_size=32, num_heads=2, angular_channels=(4, 4, 2, 2, 4), k=12)


def unit_vectors(count: int, seed: int = 0) -> Tensor:
    """(count, 3) float64, evenly over the sphere; the axes among them."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    vectors = torch.cat([torch.eye(3).double(), -torch.eye(3).double(), vectors])[:count]
    return vectors / vectors.norm(dim=1, keepdim=True)


def graph_of(atoms: Atoms | list[Atoms], config: AllScAIPConfig = CONFIG) -> Graph:
    """The graph in float64; neutral, in the lowest multiplicity."""
    for system in [atoms] if isinstance(atoms, Atoms) else atoms:
        system.info.update(charge=0, spin=1 + int(system.numbers.sum()) % 2)
    return build_graph(structures_from_atoms(atoms, torch.float64), config)


# --- spherical harmonics and Legendre polynomials ----------------------------------------------


@pytest.mark.parametrize("degree", [0, 1, 5, 9])
def test_harmonics_are_those_of_e3nn(degree: int) -> None:
    o3 = pytest.importorskip("e3nn.o3")
    x = unit_vectors(64)
    expected = o3.spherical_harmonics(
        list(range(degree + 1)), x, normalize=True, normalization="component"
    )
    assert torch.allclose(spherical_harmonics(x, degree), expected, rtol=0, atol=1e-11)


def test_harmonics_of_a_degree_have_constant_norm_and_definite_parity() -> None:
    x = unit_vectors(64)
    here, opposite = spherical_harmonics(x, 9), spherical_harmonics(-x, 9)
    for l in range(10):
        part = slice(l * l, (l + 1) ** 2)
        norm = here[:, part].square().sum(1)
        assert torch.allclose(norm, torch.full_like(norm, 2 * l + 1), rtol=1e-11)
        assert torch.allclose(opposite[:, part], (-1) ** l * here[:, part], rtol=0, atol=1e-12)


def test_harmonics_are_orthonormal_over_the_sphere() -> None:
    """Gauss-Legendre nodes along y times even angles about it: exact for degree 5 squared."""
    nodes, weights = np.polynomial.legendre.leggauss(8)
    angles = 2 * np.pi * np.arange(12) / 12
    y, phi = (torch.as_tensor(part).flatten() for part in np.meshgrid(nodes, angles))
    weight = torch.as_tensor(np.meshgrid(weights, angles)[0]).flatten() / (2 * len(angles))
    sine = (1 - y * y).sqrt()
    harmonics = spherical_harmonics(torch.stack([sine * phi.sin(), y, sine * phi.cos()], 1), 5)
    gram = harmonics.T @ (weight.unsqueeze(1) * harmonics)
    assert torch.allclose(gram, torch.eye(36).double(), rtol=0, atol=1e-12)


def test_addition_theorem() -> None:
    x, y = unit_vectors(20, seed=1), unit_vectors(20, seed=2)
    polynomials = legendre_polynomials(x @ y.T, 9)
    assert len(polynomials) == 10
    left, right = spherical_harmonics(x, 9), spherical_harmonics(y, 9)
    for l, polynomial in enumerate(polynomials):
        part = slice(l * l, (l + 1) ** 2)
        product = left[:, part] @ right[:, part].T / (2 * l + 1)
        assert torch.allclose(product, polynomial, rtol=0, atol=1e-12)


@pytest.mark.parametrize("degree", [0, 1, 2, 9])
def test_legendre_polynomials_are_those_of_numpy(degree: int) -> None:
    cosine = torch.linspace(-1, 1, 41, dtype=torch.float64).view(1, 41)
    polynomials = legendre_polynomials(cosine, degree)
    assert len(polynomials) == degree + 1
    for l, polynomial in enumerate(polynomials):
        expected = np.polynomial.legendre.Legendre.basis(l)(cosine.numpy())
        assert np.allclose(polynomial.numpy(), expected, rtol=0, atol=1e-13)


def test_harmonics_can_be_differentiated_twice() -> None:
    x = unit_vectors(5).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: spherical_harmonics(v, 4), (x,))
    assert torch.autograd.gradgradcheck(lambda v: spherical_harmonics(v, 3), (x,))


# --- Legendre matrices of the slots and bond-orientational order -------------------------------


def test_slot_legendre_is_zero_without_a_direction() -> None:
    """Self-edges and empty slots; everywhere else it is P_l of the angle between the edges."""
    graph = graph_of([molecule("CH3CH2OH"), molecule("H2O"), Atoms("He")])
    legendre = slot_legendre(graph, 4)
    n, slots = graph.log_weight.shape
    assert legendre.shape == (4, n, slots, slots)
    has_direction = graph.slot_directions.norm(dim=2) > 0.5
    assert (has_direction.sum(1) == graph.counts - 1).all() and not has_direction.all()
    both = has_direction.unsqueeze(2) & has_direction.unsqueeze(1)
    cosine = graph.slot_directions @ graph.slot_directions.transpose(1, 2)
    for l, matrix in enumerate(legendre, start=1):
        assert (matrix[~both] == 0).all()
        expected = np.polynomial.legendre.Legendre.basis(l)(cosine.numpy())
        assert np.allclose(matrix[both].numpy(), expected[both.numpy()], rtol=0, atol=1e-12)
    assert slot_legendre(graph, 0).shape == (0, n, slots, slots)


def order_by_definition(graph: Graph, degree: int) -> Tensor:
    """q_l from mean harmonics, row by row, with the self-edge's Y(0) = (1, 0, 0, ..)."""
    rows = []
    for i in range(graph.num_atoms):
        directions = graph.slot_directions[i, 1 : graph.counts[i]]
        harmonics = spherical_harmonics(directions, degree)
        own = torch.zeros(1, harmonics.shape[1], dtype=harmonics.dtype)
        own[0, 0] = 1
        mean = torch.cat([own, harmonics]).mean(0)
        squares = [
            (mean[l * l : (l + 1) ** 2] / math.sqrt(2 * l + 1)).square().sum().clamp(min=1e-6)
            for l in range(degree + 1)
        ]
        rows.append(torch.stack(squares).sqrt())
    return torch.stack(rows)


def ones(graph: Graph) -> torch.Tensor:
    """(N, K) 1 for every edge."""
    return graph.log_weight.isfinite().double()


def order_of(
    graph: Graph, weights: torch.Tensor, degree: int, softness: float = 0.0
) -> torch.Tensor:
    sums = pair_sums(slot_legendre(graph, 9)[:degree], weights)
    return bond_orientational_order(sums, weights, softness)


def test_bond_order_is_the_norm_of_mean_harmonics() -> None:
    crystal = bulk("NaCl", "rocksalt", a=5.6, cubic=True)
    crystal.rattle(0.1, seed=0)
    graph = graph_of([molecule("CH3CH2OH"), crystal, Atoms("He")])
    assert graph.counts.min() == 1  # one atom has its self-edge only
    for degree in (1, 4, 9):
        order = order_of(graph, ones(graph), degree)
        assert order.shape == (graph.num_atoms, degree + 1)
        assert torch.allclose(order, order_by_definition(graph, degree), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("shape", "known"),
    [
        ("octahedron", {4: math.sqrt(7 / 12), 6: math.sqrt(1 / 8)}),
        ("tetrahedron", {3: math.sqrt(5 / 9), 4: math.sqrt(7 / 27), 6: math.sqrt(32 / 81)}),
        ("line", {2: 1.0, 4: 1.0, 6: 1.0}),
    ],
)
def test_bond_order_of_known_shapes(shape: str, known: dict[int, float]) -> None:
    """Steinhardt's values, diluted by the self-edge: z neighbours out of z + 1 edges."""
    corners = {
        "octahedron": np.vstack([np.eye(3), -np.eye(3)]),
        "tetrahedron": np.array([(1, 1, 1), (1, -1, -1), (-1, 1, -1), (-1, -1, 1)]) / 3**0.5,
        "line": np.array([(0, 0, 1), (0, 0, -1)]),
    }[shape]
    atoms = Atoms("C" + "H" * len(corners), np.vstack([np.zeros(3), 1.5 * corners]))
    graph = graph_of(atoms)
    order = order_of(graph, ones(graph), 9)[0]
    z = len(corners)
    assert graph.counts[0] == z + 1
    assert order[0] == 1
    for l, value in known.items():
        assert order[l].item() == pytest.approx(value * z / (z + 1), abs=1e-10)
    # weighed alike, but not by one: the mean's weights count by their ratios, the self-edge's too
    lighter = order_of(graph, ones(graph) / 3, 9)[0]
    torch.testing.assert_close(lighter, order)
    absent = [1, 2, 5] if shape == "tetrahedron" else [1, 3, 5, 7, 9]
    for l in absent:  # nothing there: held at the floor
        assert order[l].item() == pytest.approx(1e-3, abs=1e-12)
    soft = order_of(graph, ones(graph), 9, softness=0.03)[0]
    exact = torch.where(order > 1e-3, order, 0.0)
    torch.testing.assert_close(soft[1:], (exact[1:].square() + 0.03**2).sqrt())
    assert soft[0] == 1


# --- radial bases ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gaussian", "sigmoid", "linear_sigmoid"])
def test_radial_basis_is_its_formula(kind: str) -> None:
    cutoff, size = 6.0, 24
    d = np.array([0.0, 0.7, 1.09, 3.3, 5.999, 6.0])
    centers, spacing = np.linspace(0, cutoff, size), cutoff / (size - 1)
    offset = d[:, None] - centers
    expected = {
        "gaussian": np.exp(-0.5 * offset**2 / (2 * spacing) ** 2),
        "sigmoid": 1 / (1 + np.exp(-2 * offset / spacing)),
        "linear_sigmoid": 1 / (1 + np.exp(-2 * offset / spacing)) + 0.002 * offset / spacing,
    }[kind]
    distances = torch.as_tensor(d).requires_grad_()
    basis = radial_basis(distances, kind, cutoff, size)
    assert basis.shape == (6, size)
    assert np.allclose(basis.detach().numpy(), expected, rtol=0, atol=1e-13)
    assert torch.autograd.gradcheck(lambda x: radial_basis(x, kind, cutoff, 8), (distances,))


# --- sinc features -----------------------------------------------------------------------------


def test_rotary_frequencies_are_even_in_the_logarithm() -> None:
    frequencies = rotary_frequencies(32, torch.zeros(1, dtype=torch.float64))
    assert frequencies.shape == (32,)
    assert frequencies[0].item() == pytest.approx(LOWEST_FREQUENCY) == math.pi / 120
    assert frequencies[-1].item() == pytest.approx(HIGHEST_FREQUENCY) == math.pi * 4
    ratios = frequencies[1:] / frequencies[:-1]
    assert torch.allclose(ratios, ratios[0].expand(31), rtol=1e-12)


def test_sinc_features_are_those_of_numpy() -> None:
    frequencies = rotary_frequencies(32, torch.zeros(1, dtype=torch.float64))
    # zero, both sides of where the series hands over, and far away
    seam = 1e-2 / frequencies[[0, 15, 31]]
    d = torch.cat([torch.tensor([0.0, 1e-8, 0.74, 1.5, 12.0, 300.0]), 0.999 * seam, 1.001 * seam])
    features = sinc_features(d.double().view(3, 4), frequencies)
    assert features.shape == (3, 4, 32)
    expected = np.sinc(d.double().view(3, 4, 1).numpy() * frequencies.numpy() / np.pi)
    assert np.allclose(features.numpy(), expected, rtol=0, atol=1e-14)
    assert (sinc_features(torch.zeros(1).double(), frequencies) == 1).all()


def test_sinc_features_are_flat_at_zero() -> None:
    """First derivative 0, second -ω²/3: finite, though sin(x)/x itself is 0/0 there."""
    frequencies = rotary_frequencies(8, torch.zeros(1, dtype=torch.float64))
    for index, frequency in enumerate(frequencies):
        d = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        value = sinc_features(d, frequencies)[0, index]
        (first,) = torch.autograd.grad(value, d, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), d)
        assert first.item() == 0
        assert second.item() == pytest.approx(-(frequency.item() ** 2) / 3, rel=1e-12)


def test_sinc_features_can_be_differentiated_twice() -> None:
    frequencies = rotary_frequencies(6, torch.zeros(1, dtype=torch.float64))
    d = torch.tensor([0.02, 0.3, 1.1, 7.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: sinc_features(x, frequencies), (d,))
    assert torch.autograd.gradgradcheck(lambda x: sinc_features(x, frequencies), (d,))


def test_sinc_is_a_rotary_phase_averaged_over_directions() -> None:
    """Mean of cos(ω n·r) over 200 000 directions n: within five standard errors."""
    generator = torch.Generator().manual_seed(0)
    n = torch.randn(200_000, 3, generator=generator, dtype=torch.float64)
    n /= n.norm(dim=1, keepdim=True)
    r = torch.tensor([0.8, -1.9, 1.3], dtype=torch.float64)
    frequencies = torch.tensor([0.1, 0.7, 1.9, 5.0], dtype=torch.float64)
    phases = torch.cos((n @ r).unsqueeze(1) * frequencies)  # (200000, 4)
    error = phases.std(0) / len(n) ** 0.5
    difference = phases.mean(0) - sinc_features(r.norm(), frequencies)
    assert (difference.abs() < 5 * error).all()
    assert (error < 2e-3).all()
