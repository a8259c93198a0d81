"""The padded forms against the model itself; where there is a CUDA GPU, recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.md.verlet import VelocityVerlet
from torch.utils._python_dispatch import TorchDispatchMode

from allscaip_lite import AllScAIP, AllScAIPCalculator
from allscaip_lite.errors import KernelError
from allscaip_lite.kernels import choose, cuda_graphs
from allscaip_lite.kernels.cuda_graphs import RecordedModel
from allscaip_lite.kernels.padded import (
    PaddedBatch,
    Size,
    pad,
    padded_prediction,
)
from allscaip_lite.neighbors import candidate_pairs
from allscaip_lite.structures import Structures, structures_from_atoms
from data.water.boxes import water_box

ModelMaker = Callable[..., AllScAIP]
KINDS: dict[str, dict[str, Any]] = {
    "both encodings": {},
    "without LAE": {"angular_channels": None},
    "without ERoPE": {"rotary": False},
    "without node attention": {"node_attention": False},
    "smooth bond order": {"smooth_bond_order": True, "normalization": "layer"},
    "direct forces": {"conservative": False},
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, make_model: ModelMaker) -> AllScAIP:
    model = make_model(**KINDS[request.param]).to(DEVICE)
    model.operations = choose("torch", DEVICE, torch.float64)
    return model


def molecules() -> list[Atoms]:
    """Of several sizes, the smallest alone with its atoms beyond the cutoff."""
    found = [molecule(name) for name in ("CH3CH2OH", "C6H6", "H2O", "CH3COOH", "H2")]
    for index, atoms in enumerate(found):
        atoms.rattle(0.05, seed=index)
        atoms.info |= {"charge": 0, "spin": 1}
    found[-1].set_distance(0, 1, 9.0)
    found[2].info |= {"charge": 1, "spin": 2}
    return found


def water(tilted: bool = False, waters: int = 10) -> Atoms:
    """A box that is smaller than the reach of the model, so that atoms meet their own images."""
    box = water_box(waters, 0.9, 0)
    if tilted:
        cell = box.cell.array.copy()
        cell[1] += 0.6 * cell[0]
        cell[2] += 1.7 * cell[0] - 0.8 * cell[1]
        box.set_cell(cell)
    box.info |= {"charge": 0, "spin": 1}
    return box


def as_batch(atoms: list[Atoms], model: AllScAIP, size: Size) -> tuple[Structures, PaddedBatch]:
    structures = structures_from_atoms(atoms, torch.float64)
    padded = pad(structures, candidate_pairs(structures, model.config.reach + 1), size)
    return structures.to(model.device), padded.to(model.device)


def assert_same(ours: Any, theirs: Any, atol: float = 1e-11) -> None:
    for mine, its in zip(ours, theirs, strict=True):
        assert (mine is None) == (its is None)
        if its is not None:
            assert torch.allclose(mine[: len(its)], its, rtol=1e-9, atol=atol)


@pytest.mark.parametrize("create_graph", [False, True])
def test_padded_molecules_give_what_the_model_gives(model: AllScAIP, create_graph: bool) -> None:
    structures, padded = as_batch(molecules(), model, Size(60, 9, 12, 300, 16))
    prediction, overflow = padded_prediction(model, padded, Size(60, 9, 12, 300, 16), create_graph)
    theirs = model(structures, create_graph=create_graph)
    assert int(overflow) == 0
    assert_same(prediction, theirs)


@pytest.mark.parametrize("tilted", [False, True])
def test_periodic_boxes_beside_each_other(model: AllScAIP, tilted: bool) -> None:
    boxes = [water(tilted), water(tilted, waters=12)]
    size = Size(70, 4, 36, 20_000, 24)
    structures, padded = as_batch(boxes, model, size)
    prediction, overflow = padded_prediction(model, padded, size)
    assert int(overflow) == 0
    assert_same(prediction, model(structures, create_graph=False))


def test_equally_near_images_in_padded_form(model: AllScAIP) -> None:
    crystal = bulk("NaCl", "rocksalt", a=5.6, cubic=True)
    crystal.info.update(charge=0, spin=1)
    size = Size(20, 3, 10, 20_000, 40)
    structures, padded = as_batch([crystal], model, size)
    prediction, overflow = padded_prediction(model, padded, size)
    assert int(overflow) == 0
    assert_same(prediction, model(structures, create_graph=False), atol=1e-8)


def test_gradients_of_the_weights(make_model: ModelMaker) -> None:
    """Of energies and forces, as training takes them; padding adds nothing."""
    model = make_model().to(DEVICE)
    size = Size(60, 9, 12, 300, 16)
    structures, padded = as_batch(molecules(), model, size)
    found = []
    for prediction in (
        padded_prediction(model, padded, size, create_graph=True)[0],
        model(structures, create_graph=True),
    ):
        energy = prediction.energy[: len(structures)]
        forces = prediction.forces[: len(structures.positions)]
        value = energy.abs().sum() + forces.square().sum()
        found.append(torch.autograd.grad(value, list(model.parameters()), materialize_grads=True))
    largest = max(float(gradient.abs().max()) for gradient in found[1])
    for mine, its in zip(*found, strict=True):
        assert torch.allclose(mine, its, rtol=1e-8, atol=1e-11 * largest)


def test_edges_without_a_slot_are_counted(make_model: ModelMaker) -> None:
    model = make_model().to(DEVICE)
    _, padded = as_batch(molecules(), model, Size(60, 9, 12, 300, 8))
    assert int(padded_prediction(model, padded, Size(60, 9, 12, 300, 8))[1]) > 0


class NoQuestions(TorchDispatchMode):
    """Refuses what a GPU could not record: values asked for, sizes that depend on values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__.split(".")[0]
        asks = name in ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "unique")
        asks |= name.startswith(("linalg_inv", "linalg_det", "linalg_lu", "_linalg_det"))
        asks |= name == "repeat_interleave" and kwargs.get("output_size") is None
        if name.startswith("index") and len(args) > 1 and isinstance(args[1], (list, tuple)):
            asks |= any(index is not None and index.dtype == torch.bool for index in args[1])
        assert not asks, f"{func} asks the device"
        return func(*args, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("periodic", [False, True])
def test_nothing_is_asked_of_the_device(model: AllScAIP, periodic: bool) -> None:
    size = Size(70, 9, 36, 20_000, 24)
    _, padded = as_batch([water()] if periodic else molecules(), model, size)
    for create_graph in (False, True):
        padded_prediction(model, padded, size, create_graph)  # tables are made once
        with NoQuestions():
            prediction, _ = padded_prediction(model, padded, size, create_graph)
            if create_graph:
                (prediction.energy.sum() + prediction.forces.square().sum()).backward()


@pytest.mark.slow
def test_dynamics_are_the_models(make_model: ModelMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a short skin, so that lists are made anew, and a cell that breathes."""
    monkeypatch.setattr(cuda_graphs, "SKIN", 0.4)
    model = make_model().to(DEVICE)
    ends, lists = [], []
    for use in (False, True):
        box = water()
        calculator = AllScAIPCalculator(model, kernels="torch")
        if use:
            calculator.recorded = RecordedModel(calculator.model)
            prepare = calculator.recorded._prepare
            monkeypatch.setattr(
                calculator.recorded, "_prepare", lambda *a, f=prepare: lists.append(1) or f(*a)
            )
        box.calc = calculator
        box.set_momenta(np.random.default_rng(0).normal(scale=0.3, size=(len(box), 3)))
        dynamics = VelocityVerlet(box, 0.5 * units.fs)
        for step in range(12):
            dynamics.run(1)
            if step % 3 == 0:
                box.set_cell(box.cell * 1.002, scale_atoms=True)
        ends.append((box.get_potential_energy(), box.get_forces(), box.get_stress()))
    for mine, its in zip(*ends, strict=True):
        assert np.allclose(mine, its, rtol=1e-8, atol=1e-10)
    assert 1 < len(lists) < 12


def test_other_structures_and_denser_ones(make_model: ModelMaker) -> None:
    """Another composition, more pairs, more neighbours than there was room for."""
    model = make_model().to(DEVICE)
    recording = RecordedModel(model)
    for atoms in (water(), *molecules()):
        expected = model.predict(atoms)
        result = model.predict(atoms, recording)
        assert abs(result.energy - expected.energy) < 1e-9
        assert np.allclose(result.forces, expected.forces, atol=1e-9)
    thin = water()
    thin.set_cell(thin.cell * 4, scale_atoms=True)
    for atoms in (thin, water()):
        assert np.allclose(
            model.predict(atoms, recording).forces, model.predict(atoms).forces, atol=1e-9
        )


def test_charge_is_read_with_every_step(make_model: ModelMaker) -> None:
    model = make_model().to(DEVICE)
    recording = RecordedModel(model)
    atoms = molecules()[0]
    before = model.predict(atoms, recording).energy
    atoms.info |= {"charge": 2}
    after = model.predict(atoms, recording).energy
    assert after != before
    assert abs(after - model.predict(atoms).energy) < 1e-9


def test_what_cannot_be_padded_is_refused(make_model: ModelMaker) -> None:
    slab = water()
    slab.pbc = [True, True, False]
    with pytest.raises(KernelError, match="some directions"):
        make_model().predict(slab, RecordedModel(make_model()))
    with pytest.raises(KernelError, match="soft_rank"):
        make_model(soft_rank=False).predict(water(), RecordedModel(make_model(soft_rank=False)))


def test_a_patient_recording_waits_and_falls_back(
    make_model: ModelMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It records what is asked for again and again, and answers for what cannot be padded."""
    model = make_model().to(DEVICE)
    recording, recorded = RecordedModel(model, patient=True), []
    call = recording._recorded
    monkeypatch.setattr(recording, "_recorded", lambda s: recorded.append(len(s)) or call(s))
    slab = water()
    slab.pbc = [True, True, False]
    for atoms in (molecules()[0], slab):
        recorded.clear()
        expected = model.predict(atoms)
        for repeat in range(1, cuda_graphs.PATIENCE + 3):
            found = model.predict(atoms, recording)
            assert found.energy == pytest.approx(expected.energy, abs=1e-9)
            assert np.allclose(found.forces, expected.forces, rtol=0, atol=1e-9)
            assert len(recorded) == max(0, repeat - cuda_graphs.PATIENCE)
