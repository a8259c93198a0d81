"""The model's physics, in float64: symmetries, derivatives, batches, options.

Weights are random in every term (`conftest.make_model`), so that nothing here holds by chance.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.geometry.minkowski_reduction import minkowski_reduce
from torch import Tensor

from allscaip_lite import PRESETS, AllScAIP, AllScAIPConfig, Result, StructureError
from allscaip_lite.checkpoints import load_model, save_model, save_official
from allscaip_lite.data.batches import in_order
from allscaip_lite.graph import build_graph
from allscaip_lite.kernels import choose
from allscaip_lite.model import UNITS, similar_sizes
from allscaip_lite.structures import Structures, structures_from_atoms
from allscaip_lite.tasks.relax import relax

ModelMaker = Callable[..., AllScAIP]


# --- structures and finite differences ----------------------------------------------------------


def neutral(atoms: Atoms, charge: int = 0, spin: int | None = None) -> Atoms:
    electrons = int(atoms.numbers.sum()) - charge
    atoms.info.update(charge=charge, spin=spin or 1 + electrons % 2)
    return atoms


def rattled(name: str, charge: int = 0, spin: int | None = None) -> Atoms:
    atoms = neutral(molecule(name), charge, spin)
    atoms.rattle(0.05, seed=1)
    return atoms


def energy_of(model: AllScAIP, structures: Structures) -> float:
    with torch.no_grad():
        return float(model(structures, create_graph=False).energy.sum())


def moved(atoms: Atoms, step: np.ndarray) -> Structures:
    """The structure with its positions shifted by (N, 3) Å."""
    shifted = atoms.copy()
    shifted.positions += step
    return structures_from_atoms(shifted, torch.float64)


def slope(model: AllScAIP, atoms: Atoms, direction: np.ndarray, step: float = 1e-5) -> float:
    """dE/ds along (N, 3), by the five-point formula."""
    e = {n: energy_of(model, moved(atoms, n * step * direction)) for n in (-2, -1, 1, 2)}
    return (e[-2] - 8 * e[-1] + 8 * e[1] - e[2]) / (12 * step)


def assert_forces_are_slopes(model: AllScAIP, atoms: Atoms, seeds: int = 2) -> None:
    """Along random directions in which every coordinate of every atom takes part."""
    forces = model.predict(atoms).forces
    assert np.abs(forces).max() > 1e-2  # else there is nothing to compare
    for seed in range(seeds):
        direction = np.random.default_rng(seed).normal(size=forces.shape)
        expected = -(forces * direction).sum()
        assert slope(model, atoms, direction) == pytest.approx(expected, rel=1e-6, abs=1e-7)


def assert_same(left: Result, right: Result, tolerance: float = 1e-10) -> None:
    assert left.energy == pytest.approx(right.energy, rel=0, abs=tolerance)
    np.testing.assert_allclose(left.forces, right.forces, rtol=0, atol=tolerance)
    assert (left.stress is None) == (right.stress is None)
    if left.stress is not None:
        np.testing.assert_allclose(left.stress, right.stress, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def model(make_model: ModelMaker) -> AllScAIP:
    """Conservative, both encodings, float64. Do not change it."""
    return make_model()


# --- batches ------------------------------------------------------------------------------------


def test_alone_and_in_any_batch(
    model: AllScAIP, cluster: Atoms, crystal: Atoms, slab: Atoms
) -> None:
    """Molecules, ions, a lone atom and periodic structures, in three orders and company."""
    alone = [
        cluster,
        neutral(Atoms("Na"), charge=1),
        crystal,
        rattled("H2O"),
        slab,
        rattled("CH3CH2OH", charge=1),
    ]
    single = [model.predict(atoms) for atoms in alone]
    for order in ([0, 1, 2, 3, 4, 5], [5, 2, 0, 4, 1, 3], [3, 3, 1], [2, 4]):
        together = model.predict([alone[i] for i in order])
        assert len(together) == len(order)
        for index, result in zip(order, together, strict=True):
            assert_same(result, single[index])


def test_one_structure_answers_like_a_list_of_it(model: AllScAIP) -> None:
    atoms = rattled("H2O")
    alone, (listed,) = model.predict(atoms), model.predict([atoms])
    assert isinstance(alone.energy, float)
    assert alone.forces.shape == (3, 3) and alone.forces.dtype == np.float64
    assert alone.stress is None
    assert_same(alone, listed, 0)


def test_an_argument_of_another_kind_is_said_with_what_to_give(
    model: AllScAIP, cluster: Atoms, tmp_path: Path
) -> None:
    for ask in (model, model.atomic_energies, model.last_layer_inputs):
        with pytest.raises(TypeError, match=r"model.predict takes atoms\), not a 'Atoms' object"):
            ask(cluster)
    for save in (save_model, save_official):
        with pytest.raises(TypeError, match="such as load_model\\('lite'\\), not 'lite'"):
            save("lite", tmp_path / "m.safetensors")
    with pytest.raises(TypeError, match="not 'lite'"):
        AllScAIP("lite")
    with pytest.raises(TypeError, match="give a data set: .*, not 'train.aselmdb'"):
        next(in_order("train.aselmdb", 10))
    with pytest.raises(TypeError, match="AllScAIPCalculator.*, not a 'AllScAIP' object"):
        relax(cluster, model)


def test_stress_only_where_there_is_a_volume(model: AllScAIP, crystal: Atoms) -> None:
    wire = neutral(Atoms("CO", [(0, 0, 0), (1.2, 0.3, 0)], cell=(3, 0, 0), pbc=(1, 0, 0)))
    results = model.predict([rattled("H2O"), crystal, wire])
    assert [result.stress is None for result in results] == [True, False, True]
    assert results[1].stress.shape == (3, 3)


def test_no_structures(model: AllScAIP) -> None:
    with pytest.raises(StructureError, match="no structures"):
        model.predict([])


# --- symmetries ---------------------------------------------------------------------------------


def test_permutation_of_the_atoms_permutes_the_forces(
    model: AllScAIP, cluster: Atoms, crystal: Atoms
) -> None:
    for atoms in (cluster, crystal):
        order = np.random.default_rng(0).permutation(len(atoms))
        before, after = model.predict([atoms, atoms[order]])
        assert after.energy == pytest.approx(before.energy, abs=1e-10)
        np.testing.assert_allclose(after.forces, before.forces[order], atol=1e-10)


def test_translation_changes_nothing(model: AllScAIP, cluster: Atoms, slab: Atoms) -> None:
    for atoms in (cluster, slab):
        shifted = atoms.copy()
        shifted.positions += (123.4, -56.7, 0.89)
        assert_same(*model.predict([atoms, shifted]), tolerance=1e-9)


def test_forces_add_up_to_zero(model: AllScAIP, cluster: Atoms, crystal: Atoms) -> None:
    """What translation invariance means for a gradient; torques do not vanish, see rotation."""
    for result in model.predict([cluster, crystal]):
        np.testing.assert_allclose(result.forces.sum(0), 0, atol=1e-10)


def test_inference_mode_changes_nothing(
    make_model: ModelMaker, cluster: Atoms, tmp_path: Path
) -> None:
    """Forces are gradients, which that mode forbids: the model leaves it."""
    path = save_model(make_model(), tmp_path / "model.safetensors")
    outside = load_model(path).predict(cluster)
    with torch.inference_mode():
        inside = load_model(path)
        assert_same(outside, inside.predict(cluster))
        found = inside(structures_from_atoms(cluster, torch.float64), create_graph=False)
    assert_same(outside, inside.predict(cluster))
    np.testing.assert_allclose(found.forces, outside.forces, atol=1e-10)


@pytest.mark.parametrize("kernels", ["plain", "torch", "auto"])
def test_autocast_and_a_default_device_change_nothing(
    make_model: ModelMaker, cluster: Atoms, crystal: Atoms, tmp_path: Path, kernels: str
) -> None:
    """Autocast has 8 bits, too few for an energy; another default device would hold no numbers."""
    path = save_model(make_model(torch.float32), tmp_path / "model.safetensors")
    outside = load_model(path, kernels=kernels)
    expected = outside.predict([cluster, crystal])
    structures = structures_from_atoms([cluster, crystal])
    shares = outside.atomic_energies(structures)
    for mode in (torch.autocast("cpu", torch.bfloat16), torch.device("meta")):
        with mode:
            for model in (outside, load_model(path, kernels=kernels)):
                for result, other in zip(model.predict([cluster, crystal]), expected, strict=True):
                    assert_same(result, other, tolerance=0)
                assert torch.equal(model.atomic_energies(structures), shares)


def test_predicting_leaves_the_weights_as_they_are(make_model: ModelMaker, cluster: Atoms) -> None:
    """Another thread may train meanwhile: at no moment do they stop asking for gradients."""
    model = make_model()
    asked = []
    model.input.register_forward_hook(
        lambda *_: asked.extend(weight.requires_grad for weight in model.parameters())
    )
    model.predict(cluster)
    assert asked and all(asked)
    model.requires_grad_(False)
    model.predict(cluster)
    assert not any(weight.requires_grad for weight in model.parameters())


def test_wrap_through_the_periodic_cell_changes_nothing(
    model: AllScAIP, crystal: Atoms, slab: Atoms
) -> None:
    for atoms, images in ((crystal, (1, -2, 3)), (slab, (-1, 2, 0))):
        wrapped = atoms.copy()
        wrapped.positions[2] += np.array(images) @ atoms.cell.array
        wrapped.positions[:1] -= atoms.cell.array[0]
        assert_same(*model.predict([atoms, wrapped]))
        tidy = atoms.copy()
        tidy.wrap()
        assert_same(*model.predict([atoms, tidy]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forces_of_a_perfect_crystal_are_not_one_sided(
    make_model: ModelMaker, dtype: torch.dtype
) -> None:
    """Atoms half a lattice vector apart have several nearest images, and all of them pull."""
    model = make_model(dtype=dtype)
    crystal = neutral(bulk("NaCl", "rocksalt", a=5.6, cubic=True))
    moved = crystal.copy()
    moved.positions += np.random.default_rng(2).integers(-3, 4, (8, 3)) @ crystal.cell.array + 0.1
    assert_same(
        *model.predict([crystal, moved]), tolerance=1e-4 if dtype == torch.float32 else 1e-8
    )
    if dtype == torch.float64:
        direction = np.random.default_rng(0).normal(size=(8, 3))
        expected = -(model.predict(crystal).forces * direction).sum()
        assert slope(model, crystal, direction) == pytest.approx(expected, abs=1e-4)


def test_another_choice_of_lattice_vectors_changes_nothing(model: AllScAIP, crystal: Atoms) -> None:
    skewed = crystal.copy()
    a, b, c = crystal.cell.array
    skewed.set_cell([a, b - 2 * a, c + a + b])
    reduced = crystal.copy()
    reduced.set_cell(minkowski_reduce(crystal.cell)[0])
    assert_same(*model.predict([crystal, skewed]))
    assert_same(*model.predict([crystal, reduced]))


def rotated(atoms: Atoms) -> tuple[Atoms, np.ndarray]:
    """The structure turned by 50° about an odd axis, and the matrix that turns row vectors."""
    turned = atoms.copy()
    turned.set_cell(np.eye(3))  # a cell that turns along tells the matrix
    turned.rotate(50, (1, -2, 0.5), rotate_cell=True)
    matrix = turned.cell.array.copy()
    turned.set_cell(None)
    return turned, matrix


def test_rotation_changes_the_energy_a_little(model: AllScAIP, cluster: Atoms) -> None:
    """Invariance is learned: with random weights the energy moves, and moves by little."""
    turned, _ = rotated(cluster)
    before, after = model.predict([cluster, turned])
    change = abs(after.energy - before.energy) / len(cluster)
    assert 1e-4 < change < 0.3  # eV/atom


def test_rotation_enters_by_the_edge_directions_alone(
    make_model: ModelMaker, cluster: Atoms
) -> None:
    """Without harmonics of degree 1 and more in the edges the model is exactly invariant."""
    model = make_model()
    with torch.no_grad():
        model.input.edge_attributes.weight[:, model.config.num_distance_basis + 1 :] = 0
    turned, matrix = rotated(cluster)
    before, after = model.predict([cluster, turned])
    assert after.energy == pytest.approx(before.energy, abs=1e-10)
    np.testing.assert_allclose(after.forces, before.forces @ matrix, atol=1e-10)


# --- forces and stress are derivatives ----------------------------------------------------------


def test_forces_are_the_slopes_of_the_energy(
    model: AllScAIP, cluster: Atoms, crystal: Atoms, slab: Atoms
) -> None:
    ion = rattled("CH3CH2OH", charge=-1)
    for atoms in (cluster, crystal, slab, rattled("H2O"), ion):
        assert_forces_are_slopes(model, atoms)


def test_every_force_component_is_a_slope(model: AllScAIP) -> None:
    atoms = rattled("H2O")
    forces = model.predict(atoms).forces
    for index in np.ndindex(3, 3):
        direction = np.zeros((3, 3))
        direction[index] = 1
        assert slope(model, atoms, direction) == pytest.approx(-forces[index], abs=1e-8)


def strain_slope(model: AllScAIP, atoms: Atoms, i: int, j: int, step: float = 1e-5) -> float:
    """dE/dε_ij of a symmetric strain, by central differences."""
    energies = []
    for sign in (1, -1):
        strain = np.zeros((3, 3))
        strain[i, j] += sign * step / 2
        strain[j, i] += sign * step / 2
        strained = atoms.copy()
        strained.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
        energies.append(energy_of(model, structures_from_atoms(strained, torch.float64)))
    return (energies[0] - energies[1]) / (2 * step)


@pytest.mark.parametrize("name", ["crystal", "slab", "wire", "one atom"])
def test_stress_is_the_slope_over_strain(
    model: AllScAIP, request: pytest.FixtureRequest, name: str
) -> None:
    if name == "one atom":  # its only neighbours are its own images
        atoms = neutral(bulk("Cu", "fcc", a=3.3))
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + 0.03 * np.arange(9).reshape(3, 3) / 9))
    else:
        atoms = request.getfixturevalue("slab" if name == "wire" else name).copy()
    if name == "wire":
        atoms.pbc = (False, True, False)
    stress = model.predict(atoms).stress
    assert np.abs(stress).max() > 1e-4
    np.testing.assert_allclose(stress, stress.T, atol=1e-14)
    expected = np.array([[strain_slope(model, atoms, i, j) for j in range(3)] for i in range(3)])
    np.testing.assert_allclose(stress, expected / atoms.get_volume(), rtol=1e-6, atol=1e-9)


# --- where an edge enters, where neighbours swap ------------------------------------------------


def walk(atoms: Atoms, index: int, direction: np.ndarray) -> Callable[[float], Atoms]:
    """s Å → the structure with one atom moved that far."""
    unit = direction / np.linalg.norm(direction)

    def at(s: float) -> Atoms:
        there = atoms.copy()
        there.positions[index] += s * unit
        return there

    return at


def bisect(fingerprint: Callable[[float], object], low: float, high: float) -> tuple[float, float]:
    """The two neighbouring places between which the fingerprint changes."""
    before = fingerprint(low)
    assert fingerprint(high) != before
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if fingerprint(middle) == before else (low, middle)
    return low, high


def first_change(fingerprint: Callable[[float], object]) -> tuple[float, float]:
    places = np.linspace(0, 0.8, 33)
    for low, high in pairwise(places):
        if fingerprint(low) != fingerprint(high):
            return bisect(fingerprint, float(low), float(high))
    raise AssertionError("nothing changes along this path: choose another")


def edges_of(model: AllScAIP, atoms: Atoms) -> frozenset[tuple[int, int]]:
    graph = build_graph(structures_from_atoms(atoms, torch.float64), model.config)
    return frozenset(zip(graph.source.tolist(), graph.target.tolist(), strict=True))


def order_of(atoms: Atoms, center: int) -> tuple[int, ...]:
    """The atoms around one of them, the nearest first."""
    return tuple(np.argsort(atoms.get_distances(center, range(len(atoms))), kind="stable"))


def slope_along(model: AllScAIP, at: Callable[[float], Atoms], s: float, step: float) -> float:
    before, after = (structures_from_atoms(at(x), torch.float64) for x in (s - step, s + step))
    return (energy_of(model, after) - energy_of(model, before)) / (2 * step)


def force_along(model: AllScAIP, at: Callable[[float], Atoms], s: float) -> float:
    """dE/ds by the forces."""
    direction = at(1.0).positions - at(0.0).positions
    return -float((model.predict(at(s)).forces * direction).sum())


MOVER, PATH = 2, np.array([0.4, -0.8, 0.5])


def test_smooth_where_an_edge_enters_or_leaves(make_model: ModelMaker, cluster: Atoms) -> None:
    """Edges come and go with weight zero: through them the energy has slope and no step.

    All but the bond-orientational order, whose mean counts every edge alike; it is off here, and
    has the next test to itself.
    """
    model = make_model()
    with torch.no_grad():
        model.input.bond_order.weight.zero_()
    at = walk(cluster, MOVER, PATH)
    low, high = first_change(lambda s: edges_of(model, at(s)))
    assert len(edges_of(model, at(low)) ^ edges_of(model, at(high))) == 2  # one pair, both ways
    before, after = model.predict([at(low), at(high)])
    assert after.energy == pytest.approx(before.energy, abs=1e-12)
    np.testing.assert_allclose(after.forces, before.forces, atol=1e-10)
    assert slope_along(model, at, low, 1e-5) == pytest.approx(force_along(model, at, low), abs=1e-8)


def test_bond_order_makes_a_step_where_an_edge_enters(model: AllScAIP, cluster: Atoms) -> None:
    """A property of the published model: its Steinhardt mean is over edges, not over weights.

    So a fading edge still counts fully until it is gone. The forces are right on either side.
    """
    at = walk(cluster, MOVER, PATH)
    low, high = first_change(lambda s: edges_of(model, at(s)))
    before, after = model.predict([at(low), at(high)])
    step = abs(after.energy - before.energy)
    assert 1e-3 < step < 0.5
    for s in (low - 1e-4, high + 1e-4):
        assert slope_along(model, at, s, 1e-5) == pytest.approx(force_along(model, at, s), abs=1e-8)


@pytest.mark.parametrize("truncated_rank", [True, False])
def test_smooth_where_neighbours_swap_rank(
    make_model: ModelMaker, cluster: Atoms, truncated_rank: bool
) -> None:
    """And hard ranks make a step there, under the very same weights."""
    model = make_model(truncated_rank=truncated_rank)
    hard = make_model(soft_rank=False)
    at = walk(cluster, MOVER, PATH)
    low, high = first_change(lambda s: order_of(at(s), 6))
    assert edges_of(model, at(low)) == edges_of(model, at(high))
    before, after = model.predict([at(low), at(high)])
    assert after.energy == pytest.approx(before.energy, abs=1e-12)
    np.testing.assert_allclose(after.forces, before.forces, atol=1e-10)
    assert slope_along(model, at, low, 1e-5) == pytest.approx(force_along(model, at, low), abs=1e-8)
    before, after = hard.predict([at(low), at(high)])
    assert abs(after.energy - before.energy) > 1e-3


# --- far away, alone, in a box ------------------------------------------------------------------


def test_one_atom_alone(model: AllScAIP) -> None:
    """It attends to itself: an energy of its own by element and charge, and no force."""
    systems = [
        neutral(Atoms("Na")),
        neutral(Atoms("Na", [(7.0, -8.0, 9.0)])),
        neutral(Atoms("Na"), charge=1),
        neutral(Atoms("K")),
    ]
    here, there, ion, other = model.predict(systems)
    assert np.isfinite(here.energy)
    np.testing.assert_allclose(here.forces, np.zeros((1, 3)), atol=0)
    assert there.energy == pytest.approx(here.energy, abs=1e-12)
    assert abs(ion.energy - here.energy) > 1e-3
    assert abs(other.energy - here.energy) > 1e-3


def test_a_molecule_needs_no_box(model: AllScAIP, cluster: Atoms) -> None:
    for atoms in (cluster, rattled("H2O"), neutral(Atoms("He"))):
        boxed = atoms.copy()
        boxed.set_cell([120.0] * 3)
        boxed.center()
        boxed.pbc = True
        alone, inside = model.predict([atoms, boxed])
        assert inside.energy == pytest.approx(alone.energy, abs=1e-10)
        np.testing.assert_allclose(inside.forces, alone.forces, atol=1e-10)


def test_a_cell_without_periodic_directions_is_ignored(model: AllScAIP, cluster: Atoms) -> None:
    boxed = cluster.copy()
    boxed.set_cell([(3, 0, 0), (0, 3, 0), (3, 3, 0)])  # too small, and flat
    assert_same(*model.predict([cluster, boxed]))


@pytest.mark.parametrize(
    ("options", "adds_up", "sees_distance"),
    [
        ({"node_attention": False}, True, False),
        ({"rotary": False}, False, False),
        ({}, False, True),
    ],
    ids=["no node attention", "node attention", "ERoPE"],
)
def test_what_far_fragments_know_of_each_other(
    make_model: ModelMaker, options: dict, adds_up: bool, sees_distance: bool
) -> None:
    """Beyond the graph: nothing, then that the other is there, then how far away it is."""
    model = make_model(**options)
    left, right = rattled("H2O"), rattled("CH4")
    right.positions += (9.0, 0.5, -0.3)
    near, far = left + right, left + right
    far.positions[3:] += (3.0, 0.0, 0.0)
    left, right, near, far = model.predict([left, right, neutral(near), neutral(far)])
    apart = left.energy + right.energy - float(model.energy_mean)  # once a system
    assert (abs(near.energy - apart) < 1e-9) == adds_up
    assert (abs(near.energy - far.energy) > 1e-6) == sees_distance
    pull = np.abs(near.forces[:3].sum(0)).max()
    assert (pull > 1e-6) == sees_distance


# --- charge, spin, units ------------------------------------------------------------------------


def test_charge_and_multiplicity_change_the_energy(model: AllScAIP) -> None:
    states = [(0, 1), (0, 3), (1, 2), (-1, 2), (2, 1)]
    results = model.predict([rattled("C6H6", charge, spin) for charge, spin in states])
    energies = sorted(result.energy for result in results)
    assert min(high - low for low, high in pairwise(energies)) > 1e-4


def test_energy_is_scaled_output_plus_references(
    make_model: ModelMaker, cluster: Atoms, crystal: Atoms
) -> None:
    """E = scale·Ê + mean + Σ references + charge; forces and stress know the scale alone."""
    model = make_model()
    ion = cluster.copy()
    ion.info["charge"] = -2
    batch = [cluster, crystal, ion]
    before = model.predict(batch)
    references = model.element_references.clone()
    model.energy_scale.mul_(2)
    model.force_scale.mul_(2)
    model.energy_mean.fill_(11.0)
    model.element_references.copy_(torch.linspace(-5e4, 0, len(references)).double())
    model.charge_reference.fill_(7.0)
    for atoms, old, new in zip(batch, before, model.predict(batch), strict=True):
        output = old.energy + 0.3 - float(references[atoms.numbers].sum())
        expected = 2 * output + 11 + float(model.element_references[atoms.numbers].sum())
        expected += 7 * atoms.info.get("charge", 0)
        assert new.energy == pytest.approx(expected, rel=0, abs=1e-9)
        np.testing.assert_allclose(new.forces, 2 * old.forces, atol=1e-10)
        assert new.stress is None or np.allclose(new.stress, 2 * old.stress, rtol=0, atol=1e-10)


def test_normaliser_and_references_stay_in_float64(make_model: ModelMaker) -> None:
    model = make_model()
    exact = model.element_references.clone()
    model.float()
    assert model.dtype == torch.float32
    assert torch.equal(model.element_references, exact)  # not rounded, not even for a moment
    for name in UNITS:
        assert getattr(model, name).dtype == torch.float64
        assert name in model.state_dict()


def test_float32_is_float64_rounded(make_model: ModelMaker, cluster: Atoms, crystal: Atoms) -> None:
    single, double = make_model(torch.float32), make_model()
    batch = [cluster, crystal, rattled("H2O")]
    for rough, exact in zip(single.predict(batch), double.predict(batch), strict=True):
        assert rough.energy == pytest.approx(exact.energy, abs=2e-4)
        np.testing.assert_allclose(rough.forces, exact.forces, atol=5e-4)
        assert not np.array_equal(rough.forces, exact.forces)


# --- training mode ------------------------------------------------------------------------------


def test_training_mode_gives_the_same_numbers(
    make_model: ModelMaker, cluster: Atoms, crystal: Atoms
) -> None:
    """Operations that can be differentiated twice in training, and the faster ones of inference."""
    model = make_model()
    model.operations = choose("torch", "cpu", torch.float64)
    assert model.operations.twice_differentiable is not model.operations
    structures = structures_from_atoms([cluster, crystal, rattled("H2O")], torch.float64)
    inference = model(structures)
    training = model.train()(structures)
    assert not inference.energy.requires_grad and not inference.forces.requires_grad
    assert training.energy.requires_grad and training.forces.requires_grad
    torch.testing.assert_close(training.energy.detach(), inference.energy, rtol=0, atol=1e-10)
    torch.testing.assert_close(training.forces.detach(), inference.forces, rtol=0, atol=1e-10)
    torch.testing.assert_close(training.stress[1].detach(), inference.stress[1], rtol=0, atol=1e-10)


def force_loss(model: AllScAIP, structures: Structures, weights: Tensor) -> Tensor:
    """A number that depends on energy and on every force component."""
    prediction = model(structures, create_graph=True)
    return prediction.energy.sum() + (prediction.forces * weights).sum()


def unread(model: AllScAIP) -> set[str]:
    """The weights that work on the edges of the last block, which nobody reads."""
    last = f"blocks.{model.config.num_layers - 1}."
    names = (last + "edge_ffn.", last + "scale.edge_ffn")
    return {name for name, _ in model.named_parameters() if name.startswith(names)}


@pytest.mark.slow
def test_weights_learn_from_forces(make_model: ModelMaker) -> None:
    """d(energy + forces)/d(weights), the second derivative, against finite differences."""
    model = make_model().train()
    structures = structures_from_atoms([rattled("CH3CH2OH"), rattled("H2O")], torch.float64)
    weights = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    force_loss(model, structures, weights).backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert idle == unread(model)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        original, step, losses = parameter.detach().clone(), 1e-5, []
        with torch.no_grad():
            for sign in (1, -1):
                parameter.copy_(original + sign * step * direction)
                losses.append(float(force_loss(model, structures, weights)))
            parameter.copy_(original)
        expected = (losses[0] - losses[1]) / (2 * step)
        found = float((parameter.grad * direction).sum())
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-7), name


def test_dropout_acts_in_training_only(make_model: ModelMaker, cluster: Atoms) -> None:
    structures = structures_from_atoms(cluster, torch.float64)
    plain = make_model()(structures)
    for dropout in ({"attention_dropout": 0.3}, {"ffn_dropout": 0.3}):
        for direct in (False, True):
            model = make_model(**dropout, conservative=not direct)
            torch.testing.assert_close(model(structures).energy, model(structures).energy)
            if not direct:
                torch.testing.assert_close(model(structures).energy, plain.energy)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                first, second = (model.train()(structures) for _ in range(2))
            assert abs(float((first.energy - second.energy).detach())) > 1e-4
            assert not torch.allclose(first.forces, second.forces)


# --- direct forces ------------------------------------------------------------------------------


def test_direct_forces_come_from_their_own_head(
    make_model: ModelMaker, cluster: Atoms, crystal: Atoms
) -> None:
    model = make_model(conservative=False)
    before = model.predict([cluster, crystal])
    assert all(result.stress is None for result in before)
    direction = np.random.default_rng(0).normal(size=(len(cluster), 3))
    work = (before[0].forces * direction).sum()
    assert abs(slope(model, cluster, direction) + work) > 1e-2  # not a gradient
    with torch.no_grad():
        model.force_head.contract.weight.mul_(-1)
        model.force_head.contract.bias.mul_(-1)
    for old, new in zip(before, model.predict([cluster, crystal]), strict=True):
        assert new.energy == old.energy
        np.testing.assert_allclose(new.forces, -old.forces, atol=1e-12)


def test_direct_model_learns_from_both_heads(make_model: ModelMaker, cluster: Atoms) -> None:
    model = make_model(conservative=False).train()
    prediction = model(structures_from_atoms(cluster, torch.float64))
    (prediction.energy.sum() + prediction.forces.square().sum()).backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert idle == unread(model)


# --- options ------------------------------------------------------------------------------------

OPTIONS = {
    "no node attention": {"node_attention": False},
    "no ERoPE": {"rotary": False},
    "no LAE": {"angular_channels": None},
    "LAE, l = 0 only": {"angular_channels": (16,)},
    "LAE with gaps": {"angular_channels": (4, 0, 6, 0, 6)},
    "LAE beyond the bond order": {"angular_channels": (4, 4, 4, 4), "bond_order_degree": 2},
    "neither encoding": {"rotary": False, "angular_channels": None},
    "hard ranking": {"soft_rank": False},
    "full ranking": {"truncated_rank": False},
    "sigmoid": {"distance_basis": "sigmoid"},
    "linear sigmoid": {"distance_basis": "linear_sigmoid"},
    "silu": {"distance_basis": "silu"},
    "layer norm": {"normalization": "layer"},
    "no norm": {"normalization": "none"},
    "squared relu": {"activation": "squared_relu"},
    "leaky relu": {"activation": "leaky_relu"},
    "relu": {"activation": "relu"},
    "smelu": {"activation": "smelu"},
    "star relu": {"activation": "star_relu"},
    "no residual scaling": {"residual_scaling": False},
    "wide FFN": {"ffn_ratio": 3},
    "one layer, one head": {"num_layers": 1, "num_heads": 1, "angular_channels": (16, 16)},
    "fixed slots": {"max_neighbors": 40},
    "few neighbours": {"k": 3, "cutoff": 3.0},
    "all neighbours": {"k": 60, "cutoff": 9.0},
    "other degrees": {"direction_degree": 2, "bond_order_degree": 4},
    "no stress": {"stress": False},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option(make_model: ModelMaker, cluster: Atoms, crystal: Atoms, name: str) -> None:
    """Builds, and its forces are slopes of its energy, in inference and in training."""
    model = make_model(**OPTIONS[name])
    model.operations = choose("torch", "cpu", torch.float64)
    assert_forces_are_slopes(model, cluster, seeds=1)
    structures = structures_from_atoms([cluster, crystal], torch.float64)
    inference, training = model(structures), model.train()(structures)
    torch.testing.assert_close(training.forces.detach(), inference.forces, rtol=1e-9, atol=1e-9)
    assert (inference.stress is None) == (name == "no stress")
    training.forces.square().sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)


SAME_WEIGHTS = [
    "hard ranking", "full ranking", "sigmoid", "linear sigmoid", "squared relu", "leaky relu",
    "relu", "smelu", "star relu", "few neighbours", "all neighbours", "no LAE", "LAE, l = 0 only",
    "LAE with gaps",
]  # fmt: skip


@pytest.mark.parametrize("name", SAME_WEIGHTS)
def test_options_without_weights_of_their_own_change_the_energy(
    model: AllScAIP, make_model: ModelMaker, cluster: Atoms, name: str
) -> None:
    other = make_model(**OPTIONS[name])
    other.load_state_dict(model.state_dict())
    assert abs(other.predict(cluster).energy - model.predict(cluster).energy) > 1e-4


def test_lae_of_degree_zero_is_no_lae(make_model: ModelMaker, cluster: Atoms) -> None:
    without, degree_zero = make_model(angular_channels=None), make_model(angular_channels=(16,))
    assert_same(without.predict(cluster), degree_zero.predict(cluster))


def test_fixed_slots_change_nothing_while_they_suffice(
    make_model: ModelMaker, cluster: Atoms, crystal: Atoms
) -> None:
    free, fixed = make_model(), make_model(max_neighbors=40)
    batch = [cluster, crystal, neutral(Atoms("He"))]
    for left, right in zip(free.predict(batch), fixed.predict(batch), strict=True):
        assert_same(left, right)


def test_residual_scales_start_at_one_over_the_depth() -> None:
    config = AllScAIPConfig(hidden_size=32, num_layers=3, angular_channels=None)
    for scale in AllScAIP(config).blocks[0].scale.values():
        assert scale.item() == pytest.approx(1 / 3) and scale.requires_grad
    for scale in AllScAIP(config.replace(residual_scaling=False)).blocks[0].scale.values():
        assert scale.item() == 1 and not scale.requires_grad


@pytest.mark.parametrize(
    ("name", "millions", "tolerance"),
    [
        ("lite", 1.5, 0.34),
        ("35M", 35, 0.05),
        ("85M", 85, 0.05),
        ("180M", 180, 0.05),
        ("1B", 1000, 0.05),
    ],
)
def test_presets_have_the_size_of_their_name(name: str, millions: float, tolerance: float) -> None:
    with torch.device("meta"):
        model = AllScAIP(PRESETS[name])
    assert model.num_parameters == pytest.approx(1e6 * millions, rel=tolerance)


# --- configuration ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "not a multiple of num_heads"),
        ({"angular_channels": (5, 4, 1, 3)}, "add up to 13, but a head has 16"),
        ({"distance_basis": "bessel"}, "'bessel' is not one of"),
        ({"normalization": "batch"}, "'batch' is not one of"),
        ({"activation": "tanh"}, "'tanh' is not one of"),
        ({"k": 0}, "k 0 is outside"),
        ({"cutoff": -1.0}, "cutoff -1.0 is outside"),
        ({"cutoff": float("nan")}, "cutoff nan is outside"),
        ({"cutoff": "6"}, "cutoff '6' is not a number"),
        ({"num_layers": 10**7}, "num_layers 10000000 is outside"),
        ({"num_layers": 2.0}, "num_layers 2.0 is not a whole number"),
        ({"num_layers": True}, "num_layers True is not a whole number"),
        ({"num_layers": None}, "num_layers None is not a whole number"),
        ({"num_layers": 500, "hidden_size": 16_384}, "more than fits into a memory"),
        ({"max_neighbors": -4}, "max_neighbors -4 is outside"),
        ({"max_neighbors": 10**9}, "max_neighbors 1000000000 is outside"),
        ({"angular_channels": (36, -4)}, "not negative"),
        ({"angular_channels": (16.0, 16.0)}, "whole"),
        ({"angular_channels": "ab"}, "not a list of channels"),
        ({"angular_channels": (1,) * 32}, "not a list of channels"),
        ({"direction_degree": -1}, "direction_degree -1 is outside"),
        ({"soft_rank": "no"}, "soft_rank 'no' is neither True nor False"),
        ({"conservative": 1}, "conservative 1 is neither True nor False"),
        ({"activation": ["gelu"]}, "is not one of"),
        ({"ffn_dropout": 1.5}, "ffn_dropout 1.5 is outside"),
        ({"rank_width": 0}, "rank_width 0 is outside"),
    ],
)
def test_contradictions_in_a_configuration(
    small_config: AllScAIPConfig, changes: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        small_config.replace(**changes)


def test_configuration_survives_a_dictionary(small_config: AllScAIPConfig) -> None:
    values = small_config.to_dict()
    assert AllScAIPConfig.from_dict(values) == small_config
    assert AllScAIPConfig.from_dict({**values, "angular_channels": [5, 4, 1, 3, 3]}) == small_config
    with pytest.raises(ValueError, match="unknown configuration keys.*'cutof'"):
        AllScAIPConfig.from_dict({**values, "cutof": 5.0})


def test_very_different_sizes_are_computed_in_groups(make_model: Callable[..., AllScAIP]) -> None:
    """And their results come in the order of the structures."""
    assert similar_sizes([30, 40, 30, 45]) == [[0, 1, 2, 3]]  # a little padding does no harm
    groups = similar_sizes([3, 600, 5, *[3] * 50, 500])
    assert groups == [[0, *range(2, 53)], [1, 53]]
    model = make_model()
    chain = Atoms("H80", [[0.9 * i, 0.1 * (i % 2), 0] for i in range(80)])
    structures = [molecule("H2O"), chain, molecule("CH4"), *[molecule("H2")] * 20]
    for atoms in structures:
        atoms.info = {"charge": 0, "spin": 1}
    assert len(similar_sizes([len(atoms) for atoms in structures])) == 2
    small = [atoms for atoms in structures if atoms is not chain]
    assert similar_sizes([len(atoms) for atoms in small]) == [list(range(22))]  # of short ones
    for batch in (structures, small):
        for atoms, result in zip(batch, model.predict(batch), strict=True):
            assert len(result.forces) == len(atoms)
            assert result.energy == pytest.approx(model.predict(atoms).energy, rel=1e-6)
