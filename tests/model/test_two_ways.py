"""Two ways to the same numbers: the last block for its atoms or in full, inference and training.

Weights are random in every term (`conftest.make_model`), and all is in float64 unless said.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ase import Atoms
from ase.build import molecule

from allscaip_lite import AllScAIP, AllScAIPConfig
from allscaip_lite.kernels import choose
from allscaip_lite.model import AttentionRecord
from allscaip_lite.operations import PLAIN
from allscaip_lite.structures import structures_from_atoms

ModelMaker = Callable[..., AllScAIP]


def water() -> Atoms:
    atoms = molecule("H2O")
    atoms.info.update(charge=0, spin=1)
    atoms.rattle(0.05, seed=1)
    return atoms


def matrices(model: AllScAIP) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.ndim == 2}


# --- the last block -----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"node_attention": False}, {"angular_channels": None}])
def test_last_block_computes_for_atoms_what_the_whole_block_would(
    make_model: ModelMaker, cluster: Atoms, crystal: Atoms, options: dict
) -> None:
    """With a record every block runs in full, edges too; the atoms' states are the same."""
    model = make_model(**options)
    structures = structures_from_atoms([cluster, crystal], torch.float64)
    record = AttentionRecord()
    with torch.no_grad():
        full = model.features(structures, PLAIN, record)
        for kernels in ("plain", "torch"):
            short = model.features(structures, choose(kernels, "cpu", torch.float64))
            torch.testing.assert_close(short, full, rtol=0, atol=1e-11)
    n, slots = record.geometry.graph.log_weight.shape
    for weights in (*record.source, *record.destination):
        assert weights.shape == (2, n, slots, slots)
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    node_blocks = 0 if "node_attention" in options else 2
    assert [len(record.source), len(record.destination), len(record.node)] == [2, 2, node_blocks]
    for weights in record.node:
        assert weights.shape == (2, 2, len(cluster), len(cluster))
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


# --- inference and training ---------------------------------------------------------------------


def test_inference_keeps_no_graph(make_model: ModelMaker, crystal: Atoms) -> None:
    model = make_model()
    structures = structures_from_atoms(crystal, torch.float64)
    with torch.no_grad():
        quiet = model(structures)
    for prediction in (quiet, model(structures)):
        assert not any(tensor.requires_grad for tensor in prediction)
    assert not structures.positions.requires_grad


@pytest.mark.slow
def test_weights_learn_from_forces_and_stress(make_model: ModelMaker, crystal: Atoms) -> None:
    """Gradients of the weights in training, against differences of what inference gives."""
    model = make_model()
    model.operations = choose("torch", "cpu", torch.float64)
    structures = structures_from_atoms(crystal, torch.float64)

    def loss(create_graph: bool) -> torch.Tensor:
        prediction = model(structures, create_graph=create_graph)
        return 100 * prediction.stress.square().sum() + prediction.forces.square().sum()

    parameters = matrices(model)
    gradients = torch.autograd.grad(loss(True), list(parameters.values()), allow_unused=True)
    generator = torch.Generator().manual_seed(1)
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        if gradient is None:
            continue
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        direction /= direction.norm()
        original, step, losses = parameter.detach().clone(), 1e-5, []
        with torch.no_grad():
            for sign in (1, -1):
                parameter.copy_(original + sign * step * direction)
                losses.append(float(loss(False)))
            parameter.copy_(original)
        expected = (losses[0] - losses[1]) / (2 * step)
        found = float((gradient * direction).sum())
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6), name


def test_molecules_do_not_spoil_a_loss_on_the_stress_of_others(
    make_model: ModelMaker, crystal: Atoms
) -> None:
    """They have no volume to divide by: zero stress, and zero in every gradient, not nan."""
    model = make_model()
    batch = structures_from_atoms([water(), crystal], torch.float64)
    alone = structures_from_atoms(crystal, torch.float64)
    parameters = list(model.parameters())
    together = model(batch, create_graph=True).stress
    assert (together[0] == 0).all()
    found = torch.autograd.grad(together.square().sum(), parameters, allow_unused=True)
    expected = torch.autograd.grad(
        model(alone, create_graph=True).stress.square().sum(), parameters, allow_unused=True
    )
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_direct_model_learns_the_same_by_once_differentiable_kernels(
    make_model: ModelMaker, cluster: Atoms
) -> None:
    """One differentiation is enough for it, so training uses them too."""
    model = make_model(conservative=False)
    structures = structures_from_atoms(cluster, torch.float64)
    parameters = list(model.parameters())
    gradients = []
    for kernels in ("torch", "plain"):
        nodes = model.features(structures, choose(kernels, "cpu", torch.float64))
        loss = model.force_head(nodes).square().sum() + model.energy_head(nodes).sum()
        gradients.append(torch.autograd.grad(loss, parameters, allow_unused=True))
    for fast, plain in zip(*gradients, strict=True):
        assert (fast is None) == (plain is None)
        if plain is not None:
            torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-9)


def test_predicting_leaves_no_trace_on_the_weights() -> None:
    torch.manual_seed(0)
    model = AllScAIP(AllScAIPConfig(num_layers=1))
    model.input.edge.weight.requires_grad_(False)
    asking = [weight.requires_grad for weight in model.parameters()]
    model.predict(molecule("CH4"))
    assert [weight.requires_grad for weight in model.parameters()] == asking
