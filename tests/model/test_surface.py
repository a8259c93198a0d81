"""The energy along a path: smooth where neighbours swap rank and where edges come and go.

An atom walks through the cluster; bisection finds the places where the graph changes, down to
1e-11 Å. Energies in eV, in float64, with every weight random.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk

from allscaip_lite import AllScAIP
from allscaip_lite.graph import build_graph
from allscaip_lite.structures import structures_from_atoms

ModelMaker = Callable[..., AllScAIP]
Places = list[tuple[float, float]]

WALKER, DIRECTION = 5, np.array([1.0, 0.4, -0.3]) / np.linalg.norm([1.0, 0.4, -0.3])


def walk(atoms: Atoms, s: float) -> Atoms:
    """The structure after the walker's first s Å."""
    there = atoms.copy()
    there.positions[WALKER] += s * DIRECTION
    return there


def changes(atoms: Atoms, observe: Callable[[Atoms], object], length: float) -> Places:
    """Both sides of every place on the path where what is observed changes."""
    seen = [(s, observe(walk(atoms, s))) for s in np.linspace(0, length, 41).tolist()]
    found = []
    for (low, before), (high, after) in pairwise(seen):
        if before == after:
            continue
        while high - low > 1e-11:
            middle = (low + high) / 2
            if observe(walk(atoms, middle)) == before:
                low = middle
            else:
                high = middle
        found.append((low, high))
    assert len(found) >= 4, "too little happens along this path: choose another"
    return found


def edges_of(model: AllScAIP) -> Callable[[Atoms], frozenset[tuple[int, int]]]:
    def observe(atoms: Atoms) -> frozenset[tuple[int, int]]:
        graph = build_graph(structures_from_atoms(atoms, torch.float64), model.config)
        return frozenset(zip(graph.source.tolist(), graph.target.tolist(), strict=True))

    return observe


def orders_of(atoms: Atoms) -> bytes:
    """Around every atom all the others, the nearest first."""
    return atoms.get_all_distances().argsort(axis=1, kind="stable").tobytes()


def steps(model: AllScAIP, atoms: Atoms, places: Places) -> np.ndarray:
    """eV by which the energy differs between the two sides of each place."""
    results = model.predict([walk(atoms, s) for place in places for s in place])
    energies = np.array([result.energy for result in results]).reshape(-1, 2)
    return np.abs(energies[:, 1] - energies[:, 0])


def slope_errors(model: AllScAIP, atoms: Atoms, places: list[float]) -> np.ndarray:
    """eV/Å between the walker's force and the energy's central difference."""
    step = 1e-5
    results = model.predict([walk(atoms, s + d) for s in places for d in (-step, 0, step)])
    before, here, after = results[::3], results[1::3], results[2::3]
    slopes = [(b.energy - a.energy) / (2 * step) for a, b in zip(before, after, strict=True)]
    forces = [result.forces[WALKER] @ DIRECTION for result in here]
    return np.abs(np.array(slopes) + forces)


@pytest.mark.parametrize("truncated_rank", [True, False])
def test_neighbours_swap_rank_smoothly(
    make_model: ModelMaker, cluster: Atoms, truncated_rank: bool
) -> None:
    """At every swap of the path; with hard ranks the same weights make steps."""
    soft, hard = make_model(truncated_rank=truncated_rank), make_model(soft_rank=False)
    places = changes(cluster, orders_of, 0.3)
    assert steps(soft, cluster, places).max() < 1e-9
    assert slope_errors(soft, cluster, [low for low, _ in places]).max() < 2e-7
    assert steps(hard, cluster, places).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("truncated_rank", [True, False])
def test_edges_come_and_go_smoothly_but_for_the_bond_order(
    make_model: ModelMaker, cluster: Atoms, truncated_rank: bool
) -> None:
    """At every entry and exit of the path; with hard ranks the same weights make steps.

    The bond-orientational order is off: its mean counts a fading edge in full until it is gone.
    """
    soft, hard = make_model(truncated_rank=truncated_rank), make_model(soft_rank=False)
    for model in (soft, hard):
        torch.nn.init.zeros_(model.input.bond_order.weight)
    places = changes(cluster, edges_of(soft), 4.0)
    assert steps(soft, cluster, places).max() < 1e-9
    assert slope_errors(soft, cluster, [low for low, _ in places]).max() < 2e-7
    assert steps(hard, cluster, changes(cluster, edges_of(hard), 4.0)).max() > 1e-4


@pytest.mark.slow
def test_smooth_bond_order_leaves_no_step(make_model: ModelMaker, cluster: Atoms) -> None:
    """With the whole model at work; the same weights make steps with the reference's order."""
    smooth, plain = make_model(smooth_bond_order=True), make_model()
    places = changes(cluster, edges_of(smooth), 4.0)
    assert steps(smooth, cluster, places).max() < 1e-9
    assert slope_errors(smooth, cluster, [low for low, _ in places]).max() < 2e-7
    assert steps(plain, cluster, places).max() > 1e-4


@pytest.mark.parametrize("softness", [0.0, 0.03])
def test_soft_bond_order_leaves_no_kink_in_a_crystal(
    make_model: ModelMaker, softness: float
) -> None:
    """The force constant of a phonon, by displacements of 0.002 and 0.006 Å, of copper."""
    model = make_model(smooth_bond_order=True, bond_order_softness=softness)
    crystal = bulk("Cu", "fcc", a=3.6, cubic=True)
    crystal.info.update(charge=0, spin=1)
    layer = crystal.positions[:, 2] > 0.1
    constants = []
    for shift in (0.002, 0.006):
        moved = crystal.copy()
        moved.positions[layer, 0] += shift
        forces = model(structures_from_atoms(moved, torch.float64)).forces
        constants.append(forces[layer, 0].mean().item() / shift)
    small, large = constants
    assert (abs(small / large - 1) < 0.1) == (softness > 0)


@pytest.mark.slow
def test_forces_are_right_on_both_sides_of_every_entry(
    make_model: ModelMaker, cluster: Atoms
) -> None:
    """The bond-orientational order takes part again: a step in between, but right slopes."""
    model = make_model()
    places = changes(cluster, edges_of(model), 4.0)
    sides = [s for low, high in places for s in (low - 2e-5, high + 2e-5)]
    assert slope_errors(model, cluster, sides).max() < 2e-7
