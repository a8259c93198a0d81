"""Training: the loss, the schedule, the batches, and a resume to the same numbers."""

from __future__ import annotations

import contextlib
import functools
import json
import operator
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.lj import LennardJones
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import atomic_numbers

from allscaip_lite import AllScAIP, AllScAIPConfig, cli, load_model, structures_from_atoms
from allscaip_lite.applicability import Seen
from allscaip_lite.config import PRESETS
from allscaip_lite.data.aselmdb import DataError, Dataset, Mixture, Subset, write_aselmdb
from allscaip_lite.data.batches import Batch, Batches, collate, in_order
from allscaip_lite.errors import InputError, RunError, StructureWarning
from allscaip_lite.evaluation.errors import evaluate
from allscaip_lite.kernels import compiled
from allscaip_lite.kernels.padded import Size
from allscaip_lite.model import Prediction
from allscaip_lite.training import loop as training
from allscaip_lite.training.loop import (
    Stage,
    conservative_stage,
    direct_stage,
    fit_units,
    hold_out,
    loss,
    make_optimizers,
    set_rate,
    shift_references,
    start_stage,
    train,
)

SAMPLE = Path(__file__).resolve().parents[2] / "data" / "xtb"
SMALL = AllScAIPConfig(
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    angular_channels=(4, 4),
    num_distance_basis=32,
    conservative=False,
)


@pytest.fixture(scope="module")
def data() -> Dataset:
    return Dataset(SAMPLE / "val.aselmdb")


@pytest.fixture(scope="module")
def twenty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty structures of the training sample, as a file of their own."""
    sample, path = Dataset(SAMPLE / "train.aselmdb"), tmp_path_factory.mktemp("data")
    write_aselmdb(path / "twenty.aselmdb", (sample[i] for i in range(0, 400, 20)))
    return path / "twenty.aselmdb"


def small_model(data: Dataset, **changes: object) -> AllScAIP:
    torch.manual_seed(0)
    model = AllScAIP(SMALL.replace(**changes))
    references, rms = fit_units(data, SMALL.max_num_elements)
    model.element_references.copy_(references)
    model.energy_scale.fill_(rms)
    model.force_scale.fill_(rms)
    return model


@pytest.mark.parametrize(
    "change", [{"learning_rate": 0.0}, {"learning_rate": np.nan}, {"force_weight": -1.0}]
)
def test_a_stage_that_learns_nothing_is_refused(change: dict) -> None:
    with pytest.raises(RunError, match=f"{next(iter(change))} .* of the direct stage: give"):
        replace(training.direct_stage(10), **change)
    with pytest.raises(RunError, match="all weights of the direct stage are 0"):
        replace(training.direct_stage(10), energy_weight=0, force_weight=0)


def test_loss_by_hand(data: Dataset) -> None:
    model = small_model(data)
    batch = collate([data[0], data[1]])
    off = torch.zeros_like(batch.forces)
    off[:, 0] = 0.3
    natoms = batch.structures.natoms
    prediction = Prediction(batch.energy + 0.5 * natoms, batch.forces + off, None)
    rms = float(model.energy_scale)
    value = loss(prediction, batch, model, conservative_stage(10, weights=(40, 20)))
    assert float(value) == pytest.approx(40 * 0.5 / rms + 20 * 0.3 / rms, rel=1e-5)


def test_schedule_warms_up_and_falls_to_one_percent() -> None:
    stage = direct_stage(1000, 1e-3)
    rates = np.array([stage.learning_rate_at(step) for step in range(1000)])
    assert rates[0] == pytest.approx(1e-3 / 20)
    assert rates.argmax() in (19, 20) and rates.max() == pytest.approx(1e-3)
    assert (np.diff(rates[20:]) < 0).all()
    assert rates[-1] == pytest.approx(1e-5, rel=0.01)
    np.testing.assert_allclose(rates[:20], 1e-3 * np.arange(1, 21) / 20)
    middle = stage.learning_rate_at(20 + 980 // 2)
    assert middle == pytest.approx((1e-3 + 1e-5) / 2)  # half of the cosine
    assert stage.learning_rate_at(1000) == stage.learning_rate_at(2000) == pytest.approx(1e-5)


def test_schedule_of_very_short_stages() -> None:
    for steps in (1, 2, 3):
        rates = [direct_stage(steps, 1e-3).learning_rate_at(step) for step in range(steps)]
        assert rates[0] == pytest.approx(1e-3) and min(rates) > 0


def test_only_matrices_decay(data: Dataset) -> None:
    model = small_model(data)
    (optimizer,) = make_optimizers(model, direct_stage(10))
    decayed, kept = optimizer.param_groups
    assert decayed["weight_decay"] > 0 and kept["weight_decay"] == 0
    assert all(weight.ndim == 2 for weight in decayed["params"])
    ids = {id(weight) for weight in kept["params"]}
    assert id(model.input.atom_embedding.weight) in ids
    assert id(model.blocks[0].scale["source"]) in ids


def test_muon_turns_the_matrices_of_the_blocks_and_adamw_the_rest(data: Dataset) -> None:
    model, stage = small_model(data), replace(direct_stage(10, 1e-3), muon=4.0)
    adamw, muon = make_optimizers(model, stage)
    (turned,) = muon.param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(parameter)] for parameter in turned["params"]}
    assert "blocks.0.source_attention.query.weight" in found and all("blocks." in n for n in found)
    others = [names[id(p)] for group in adamw.param_groups for p in group["params"]]
    assert not found & set(others) and len(found) + len(others) == len(names)
    set_rate([adamw, muon], 1e-3)
    assert turned["lr"] == pytest.approx(4e-3)
    assert all(group["lr"] == 1e-3 for group in adamw.param_groups)


def test_units_recover_known_references() -> None:
    """Energies made of one number an element, and forces of a known size."""
    random, expected = np.random.default_rng(0), {1: -13.6, 6: -1029.1, 8: -2043.2}
    systems = []
    for size in range(3, 15):
        atoms = Atoms(random.choice([1, 6, 8], size))
        energy = sum(expected[z] for z in atoms.numbers)
        forces = np.full((size, 3), 2.0 if size % 2 else 1.0)
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
        systems.append(atoms)
    references, rms = fit_units(systems, 20)
    assert references.dtype == torch.float64 and references.shape == (20,)
    for number, reference in enumerate(references.tolist()):
        assert reference == pytest.approx(expected.get(number, 0.0), abs=1e-3)
    odd = sum(size for size in range(3, 15) if size % 2)
    even = sum(size for size in range(3, 15) if not size % 2)
    assert rms == pytest.approx(np.sqrt((4 * odd + even) / (odd + even)))
    _, two = fit_units(systems, 20, limit=2)  # the first and the last: 3 and 14 atoms
    assert two == pytest.approx(np.sqrt((4 * 3 + 14) / 17))


def test_units_of_elements_that_always_occur_together(data: Dataset) -> None:
    """Water alone cannot tell oxygen from hydrogen; their sum is right, and both are finite."""
    water = molecule("H2O")
    water.calc = SinglePointCalculator(water, energy=-2080.0, forces=np.ones((3, 3)))
    references, _ = fit_units([water, water], 10)
    assert references.isfinite().all()
    assert float(references[water.numbers].sum()) == pytest.approx(-2080.0, abs=1e-2)


# --- batches ------------------------------------------------------------------------------------


def epochs_of(batches: list[Batches], data: Dataset) -> list[list[float]]:
    """The energies of two epochs, as ranks that take turns meet them."""
    epochs, number = [[], []], 0
    for energies in epochs:
        while len(energies) < len(data):
            batch = batches[number % len(batches)][number // len(batches)]
            assert 0 < int(batch.structures.natoms.sum()) <= batches[0].max_atoms
            energies.extend(batch.energy.tolist())
            number += 1
    return epochs


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_epoch_holds_every_structure_once(data: Dataset, world_size: int) -> None:
    """Each of two epochs, in another order; no two ranks share a structure."""
    ranks = range(world_size)
    batches = [Batches(data, 60, 3, rank=r, world_size=world_size, rotate=False) for r in ranks]
    first, second = epochs_of(batches, data)
    expected = sorted(data[i].get_potential_energy() for i in range(len(data)))
    assert sorted(first) == sorted(second) == pytest.approx(expected, abs=0)
    assert first != second


def assert_same(a: object, b: object) -> None:
    torch.testing.assert_close(a.energy, b.energy, rtol=0, atol=0)
    torch.testing.assert_close(a.forces, b.forces, rtol=0, atol=0)
    torch.testing.assert_close(a.structures.positions, b.structures.positions, rtol=0, atol=0)


def test_batches_depend_on_their_number_and_the_seed_alone(data: Dataset) -> None:
    """Read backwards, across epochs, in another object; another seed gives other batches."""
    batches, again = Batches(data, 60, 3), Batches(data, 60, 3)
    for number in (60, 30, 2, 0, 45):
        assert_same(batches[number], again[number])
    for number in (0, 2, 30, 45, 60):
        assert_same(batches[number], again[number])
    assert Batches(data, 60, 4)[0].energy.tolist() != batches[0].energy.tolist()


def test_resumed_and_distributed_batches_are_the_same_ones(data: Dataset) -> None:
    whole = Batches(data, max_atoms=60, seed=3)
    resumed = Batches(data, max_atoms=60, seed=3, first=5, count=3)
    assert len(resumed) == 3
    for index in range(3):
        assert_same(resumed[index], whole[5 + index])
    for index in (3, -1):
        with pytest.raises(IndexError):
            resumed[index]
    ranks = [Batches(data, 60, 3, first=2, rank=r, world_size=2) for r in (0, 1)]
    for step in range(3):
        for r in (0, 1):
            assert_same(ranks[r][step], whole[2 * (2 + step) + r])


def test_a_mixture_gives_each_set_its_share(data: Dataset) -> None:
    """Over two epochs: the shares asked for, of a small set each structure as often as any other,
    give or take one, and the same batches again from the middle."""
    few, many = Subset(data, np.arange(10)), Subset(data, np.arange(10, len(data)))
    mixture = Mixture([few, many], [0.4, 0.6])
    assert len(mixture) == len(data) and mixture.natoms.tolist() == data.natoms.tolist()
    energies = [data[i].get_potential_energy() for i in range(len(data))]
    assert [mixture[i].get_potential_energy() for i in range(len(data))] == energies
    epochs = [mixture.epoch(3, number) for number in (0, 1, 2)]
    seen = np.bincount(np.concatenate(epochs), minlength=len(data))
    assert abs(seen[:10].sum() / seen.sum() - 0.4) < 0.01
    assert np.ptp(seen[:10]) <= 1 and np.ptp(seen[10:]) <= 1
    assert not np.array_equal(epochs[0], epochs[1])
    assert sorted(epochs[0]) != epochs[0].tolist()  # shuffled
    whole, resumed = Batches(mixture, 60, 3), Batches(mixture, 60, 3, first=40)
    assert_same(whole[45], resumed[5])


@pytest.mark.parametrize("shares", [(0.5,), (0.5, 0.6), (1.0, 0.0)])
def test_shares_that_are_none_are_refused(data: Dataset, shares: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="one for each"):
        Mixture([data, data], shares)


def test_in_order_is_the_data_once(data: Dataset) -> None:
    limit = int(data.natoms.max()) - 1  # the largest comes alone
    batches = list(in_order(data, limit))
    sizes = [batch.structures.natoms.tolist() for batch in batches]
    assert functools.reduce(operator.iadd, sizes, []) == data.natoms.tolist()
    assert all(sum(size) <= limit or len(size) == 1 for size in sizes)
    assert any(len(size) > 1 for size in sizes)
    energies = torch.cat([batch.energy for batch in batches]).tolist()
    assert energies == [data[i].get_potential_energy() for i in range(len(data))]


def test_a_structure_too_large_says_what_to_do(data: Dataset) -> None:
    with pytest.raises(DataError, match="--max-atoms"):
        Batches(data, max_atoms=2, seed=0)


def test_random_rotations_turn_forces_with_positions() -> None:
    """A pair potential gives the turned structures the turned forces, in a crystal too."""
    structures = [molecule("C2H6"), bulk("Ar", "fcc", a=2.2, cubic=True) * (2, 2, 2)]
    for atoms in structures:
        atoms.rattle(0.1, seed=1)
        atoms.info.update(charge=0, spin=1)
        labels = atoms.copy()
        labels.calc = LennardJones(sigma=1.0, rc=2.5, smooth=True)
        energy, forces = labels.get_potential_energy(), labels.get_forces()
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
    before = [atoms.positions.copy() for atoms in structures]
    plain, turned = collate(structures), collate(structures, rotation_seed=7)
    assert_same(turned, collate(structures, rotation_seed=7))
    assert torch.equal(turned.energy, plain.energy)
    rotations = []
    for index, part in enumerate(turned.structures.positions.split([8, 32])):
        atoms = structures[index]
        again = Atoms(atoms.numbers, part.numpy(), pbc=atoms.pbc)
        again.set_cell(turned.structures.cell[index].numpy())
        again.calc = LennardJones(sigma=1.0, rc=2.5, smooth=True)
        size = np.abs(atoms.get_forces()).max()
        forces = turned.forces.split([8, 32])[index].numpy()
        np.testing.assert_allclose(again.get_forces() / size, forces / size, atol=1e-4)
        old = plain.structures.positions.split([8, 32])[index].numpy()
        rotation = np.linalg.lstsq(old - old.mean(0), part.numpy() - part.numpy().mean(0))[0]
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-4)
        assert np.linalg.det(rotation) == pytest.approx(1, abs=1e-4)  # no reflection
        rotations.append(rotation)
        np.testing.assert_array_equal(atoms.positions, before[index])  # the data stay
    assert np.abs(rotations[0] - rotations[1]).max() > 0.1
    assert np.abs(rotations[0] - np.eye(3)).max() > 0.1


def test_stress_in_the_loss() -> None:
    """Of the structures that have one, times volume over atoms; turned with its structure."""
    argon = bulk("Ar", "fcc", a=5.0, cubic=True)
    argon.rattle(0.1, seed=1)
    stress = np.array([1, 2, 3, 0.4, 0.5, 0.6]) * 1e-2  # eV/Å³
    labels = {"energy": 0.0, "forces": np.zeros((4, 3))}
    argon.calc = SinglePointCalculator(argon, **labels, stress=stress)
    lone = Atoms("Ar", cell=[9, 9, 9])  # not periodic: what programs call its stress is none
    lone.calc = SinglePointCalculator(lone, energy=0.0, forces=np.zeros((1, 3)), stress=np.ones(6))
    for atoms in (argon, lone):
        atoms.info.update(charge=0, spin=1)
    model = AllScAIP(SMALL.replace(conservative=True, stress=True))
    model.energy_scale.fill_(0.5)
    stage = conservative_stage(1, stress_weight=7.0)
    turned, plain = collate([argon, lone], rotation_seed=3), collate([argon, lone])
    assert turned.stress[1].isnan().all()
    for batch in (plain, turned):
        predicted = model(batch.structures, create_graph=True)
        without = loss(predicted, batch, model, conservative_stage(1))
        value = loss(predicted, batch, model, stage)
        error = np.linalg.norm((predicted.stress - batch.stress)[0].detach().numpy())
        expected = 7 * error * 5.0**3 / 4 / 0.5
        assert float(value - without) == pytest.approx(expected, rel=1e-4)
        value.backward()
        assert all(w.grad is None or w.grad.isfinite().all() for w in model.parameters())
    eigenvalues = [torch.linalg.eigvalsh(batch.stress[0]) for batch in (plain, turned)]
    torch.testing.assert_close(*eigenvalues, atol=1e-6, rtol=1e-4)
    assert not torch.allclose(plain.stress[0], turned.stress[0], atol=1e-3)


def _pair(data: Dataset, **info: object) -> Atoms:
    """Two molecules of a data set 12 Å apart, with a label and what its `info` is to have."""
    first, second = data[0], data[1]
    moved = second.copy()
    moved.positions += first.positions.max(0) - second.positions.min(0) + 12.0
    both = first + moved
    charges = [atoms.info["charge"] for atoms in (first, second)]
    both.info = {"charge": sum(charges), "spin": 1, **info}
    both.calc = SinglePointCalculator(both, energy=-100.0, forces=np.zeros((len(both), 3)))
    return both


def _parts(data: Dataset) -> list[list[int]]:
    return [[len(a), a.info["charge"], a.info["spin"]] for a in (data[0], data[1])]


def test_interactions_are_compared_with_those_of_the_molecules_alone(data: Dataset) -> None:
    """Of the structures that have fragments, and turned with them."""
    pair = _pair(data, fragments=_parts(data), interaction_energy=0.7)
    model = small_model(data, conservative=True)
    stage = conservative_stage(1, interaction_weight=7.0)
    losses = []
    for seed in (None, 3):
        batch = collate([data[2], pair], seed, fragments=True)
        assert batch.fragments.whole.tolist() == [1, 1]
        predicted = model(batch.structures, create_graph=True)
        without = loss(predicted, batch, model, conservative_stage(1))
        losses.append(loss(predicted, batch, model, stage) - without)
        alone = model(batch.fragments.structures).energy
        between = float((predicted.energy[1] - alone.sum()).detach())
        expected = 7 * abs(between - 0.7) / len(pair) / float(model.energy_scale)
        assert float(losses[-1]) == pytest.approx(expected, rel=1e-4)
    molecules = model.predict([data[0], data[1]], outside_training="ignore")
    plain = model(collate([pair], fragments=True).fragments.structures).energy
    np.testing.assert_allclose(plain.detach(), [one.energy for one in molecules], atol=1e-4)
    gradients = torch.autograd.grad(losses[0], model.parameters(), allow_unused=True)
    found = [g for g in gradients if g is not None]
    assert all(g.isfinite().all() for g in found) and any(g.abs().max() > 0 for g in found)
    assert collate([data[0], data[1]], fragments=True).fragments is None
    pair.info["fragments"] = "a user's own words"
    assert collate([data[0], pair]).fragments is None


def test_training_on_interactions_makes_molecules_far_apart_a_sum(
    data: Dataset, tmp_path: Path
) -> None:
    pair = _pair(data, fragments=_parts(data), interaction_energy=0.0)
    stage = replace(conservative_stage(40, 3e-3, (0, 0), interaction_weight=1.0), ema_decay=0.5)
    model, off = small_model(data, conservative=True), []
    for _ in range(2):
        whole, *alone = model.predict([pair, data[0], data[1]], outside_training="ignore")
        off.append(abs(whole.energy - sum(one.energy for one in alone)))
        if len(off) == 1:
            pair.calc.results["energy"] = sum(one.energy for one in alone)
            write_aselmdb(tmp_path / "pairs.aselmdb", [pair])
            pairs = Dataset(tmp_path / "pairs.aselmdb")
            model = train(model, [stage], pairs, pairs, tmp_path / "run", max_atoms=200)
    assert off[1] < off[0] / 5


@pytest.mark.parametrize(
    ("info", "words"),
    [
        ({"fragments": [[3, 0]]}, "interaction_energy"),
        ({"fragments": [[3, 0]], "interaction_energy": 0.0}, "charge, multiplicity"),
        ({"fragments": [[3, 0, 1]], "interaction_energy": 0.0}, "`fragments` have 3 atoms"),
        ({"fragments": 3, "interaction_energy": 0.0}, "charge, multiplicity"),
    ],
)
def test_fragments_that_are_none_are_refused(
    data: Dataset, info: dict[str, object], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        collate([data[2], _pair(data, **info)], fragments=True)


def test_an_interaction_weight_that_meets_no_fragments_is_refused(
    data: Dataset, tmp_path: Path
) -> None:
    model = small_model(data, conservative=True)
    with pytest.raises(RunError, match="interaction weight 5, but no training structure"):
        train(model, [conservative_stage(1, interaction_weight=5.0)], data, data, tmp_path)


# --- stages -------------------------------------------------------------------------------------


def test_stages_hand_over_the_backbone(data: Dataset) -> None:
    model = small_model(data)
    changed = start_stage(model, conservative_stage(5))
    assert changed.config.conservative and not hasattr(changed, "force_head")
    for name, weight in changed.state_dict().items():
        torch.testing.assert_close(weight, model.state_dict()[name], rtol=0, atol=0)


def test_a_stage_trains_what_the_model_lets_it_train(data: Dataset) -> None:
    """Fixed residual scales stay fixed, in the stage that changes the heads and in the other."""
    model = small_model(data, residual_scaling=False)
    for stage in (direct_stage(2), conservative_stage(2)):
        started = start_stage(model, stage)
        scales = [block.scale[name] for block in started.blocks for name in block.scale]
        assert len(scales) == 10 and not any(scale.requires_grad for scale in scales)
        assert started.blocks[0].source_attention.query.weight.requires_grad


def run(
    data: Dataset,
    folder: Path,
    steps: tuple[int, int] = (9, 5),
    muon: float = 0.0,
    **changes: object,
) -> AllScAIP:
    stages = [direct_stage(steps[0]), conservative_stage(steps[1])]
    return train(
        small_model(data, **changes),
        [replace(stage, muon=muon) for stage in stages],
        data,
        data,
        folder,
        max_atoms=40,
        validate_every=100,
        save_every=2,
    )


def assert_same_weights(a: AllScAIP, b: AllScAIP) -> None:
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, weight in a.state_dict().items():
        torch.testing.assert_close(b.state_dict()[name], weight, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    "mode", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_modes_of_the_caller_do_not_change_a_training(
    data: Dataset, tmp_path: Path, mode: Callable[[], contextlib.AbstractContextManager]
) -> None:
    expected = run(data, tmp_path / "outside", (2, 2))
    with mode():
        found = run(data, tmp_path / "inside", (2, 2))
    assert_same_weights(found, expected)


def test_training_is_the_recipe_by_hand(data: Dataset, tmp_path: Path) -> None:
    """Batches, learning rates, clipping and the average of the weights, in a loop of their own."""
    stage = Stage("direct", 6, 1e-2, energy_weight=3, force_weight=5, clip=2.0, ema_decay=0.3)
    trained = train(small_model(data).double(), [stage], data, data, tmp_path, max_atoms=40, seed=5)

    model = small_model(data).double().train()
    (optimizer,), batches = make_optimizers(model, stage), Batches(data, 40, 5)
    average, clipped = None, 0
    for step in range(6):
        value = loss(model(batches[step].structures), batches[step], model, stage)
        optimizer.zero_grad()
        value.backward()
        clipped += float(torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)) > 2.0
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate_at(step)
        optimizer.step()
        now = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        decay = min(0.3, (1 + step) / (10 + step)) if step else 0.0  # 2/11, 3/12, ... up to 0.3
        average = {k: decay * (average or now)[k] + (1 - decay) * now[k] for k in now}
    assert clipped, "nothing was clipped: choose a smaller limit"
    assert not trained.training
    for name, weight in trained.named_parameters():
        # a key's bias shifts a row's logits alike: its gradient is rounding that Adam blows up
        if not name.endswith("key.bias"):
            torch.testing.assert_close(weight.detach(), average[name], rtol=1e-5, atol=1e-8)
    saved = load_model(tmp_path / "direct.safetensors", device="cpu")
    assert_same_weights(saved, trained)


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_compiled_training_reaches_the_same_weights(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the kernels are what does it."""
    calls = []
    make = compiled.Rows.make
    monkeypatch.setattr(compiled.Rows, "make", lambda *a: calls.append(1) or make(*a))
    ends = []
    for kernels in ("plain", "c"):
        model = small_model(data, conservative=True).double()
        stages = [conservative_stage(3, 1e-3)]
        some, folder = Subset(data, range(12)), tmp_path / kernels
        model = train(model, stages, some, some, folder, max_atoms=60, kernels=kernels)
        assert bool(calls) == (kernels == "c")
        ends.append(dict(model.named_parameters()))
    for name, weight in ends[0].items():
        if not name.endswith("key.bias"):  # its gradient is rounding that Adam blows up
            torch.testing.assert_close(ends[1][name], weight, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["direct", "conservative"])
def test_recorded_training_reaches_the_same_weights(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Padded steps, which a GPU would record, and one batch that does not fit."""
    values, ends = [], []
    for record in (False, True):
        model = small_model(data, conservative=kind == "conservative").double()
        stage = conservative_stage(6, 1e-3) if kind == "conservative" else direct_stage(6, 1e-3)
        some, folder = Subset(data, range(12)), tmp_path / str(record)
        monkeypatch.setattr(training, "can_record", lambda *_, answer=record: answer)
        call, batch_size = training.RecordedLoss.__call__, training.batch_size

        def watched(self: training.RecordedLoss, batch: Batch, call=call) -> float | None:
            values.append(call(self, batch))
            return values[-1]

        def tight(*arguments: Any, batch_size=batch_size) -> Size:
            size = batch_size(*arguments)
            sizes = [len(b.energy) for b in (Batches(some, 40, 0)[i] for i in range(6))]
            return replace(size, systems=max(sizes) - 1)

        with monkeypatch.context() as patch:
            patch.setattr(training.RecordedLoss, "__call__", watched)
            patch.setattr(training, "batch_size", tight)
            model = train(model, [stage], some, some, folder, max_atoms=40)
        ends.append(dict(model.named_parameters()))
    assert len(values) == 6 and 0 < values.count(None) < 6
    for name, weight in ends[0].items():
        if not name.endswith("key.bias"):  # its gradient is rounding that Adam blows up
            torch.testing.assert_close(ends[1][name], weight, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("dropout", "muon"), [(0.0, 0.0), (0.2, 0.0), (0.0, 3.0)])
def test_an_interrupted_run_goes_on_to_the_same_numbers(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dropout: float, muon: float
) -> None:
    changes = {"ffn_dropout": dropout, "attention_dropout": dropout, "muon": muon}
    whole = run(data, tmp_path / "whole", **changes)
    get = Batches.__getitem__
    stops = {(5, False), (3, True)}  # once in the direct stage, once in the conservative one
    began = []

    def interrupted(self: Batches, index: int):  # type: ignore[no-untyped-def]
        if index == 0:
            began.append((self.first, self.seed == 1))
        place = (self.first + index, self.seed == 1)
        if place in stops:
            stops.remove(place)
            raise KeyboardInterrupt
        return get(self, index)

    monkeypatch.setattr(Batches, "__getitem__", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path / "stopped", **changes)
    resumed = run(data, tmp_path / "stopped", **changes)
    assert not stops
    assert began == [(0, False), (4, False), (0, True), (2, True)]  # from the last saved state
    assert_same_weights(whole, resumed)
    assert load_model(tmp_path / "stopped" / "conservative.safetensors").config.conservative


def test_a_finished_run_is_not_repeated(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = run(data, tmp_path, (2, 1))
    log = (tmp_path / "log.jsonl").read_text()
    monkeypatch.setattr(Batches, "__getitem__", lambda *_: pytest.fail("a batch was asked for"))
    assert_same_weights(finished, run(data, tmp_path, (2, 1)))
    assert (tmp_path / "log.jsonl").read_text() == log


def test_other_settings_do_not_mix_in_one_folder(data: Dataset, tmp_path: Path) -> None:
    """Other stages, and another model, be it of the same shapes."""
    run(data, tmp_path, (2, 1))
    kept = (tmp_path / "state.pt").read_bytes()
    with pytest.raises(RunError, match=r"other settings \(stages\): give another --out"):
        run(data, tmp_path, (3, 1))
    for changes in ({"k": 5}, {"num_layers": 1}):
        with pytest.raises(RunError, match="other settings"):
            run(data, tmp_path, (2, 1), **changes)
    assert (tmp_path / "state.pt").read_bytes() == kept


def test_other_data_and_another_start_do_not_mix_in_one_folder(
    data: Dataset, tmp_path: Path
) -> None:
    run(data, tmp_path, (2, 1))
    fewer = Subset(data, np.arange(len(data) - 1))
    with pytest.raises(RunError, match=r"other settings \(training data, "):
        run(fewer, tmp_path, (2, 1))
    stages = [direct_stage(2), conservative_stage(1)]
    options = {"max_atoms": 40, "validate_every": 100}
    train(small_model(data), stages, data, data, tmp_path / "a", **options)
    other = small_model(data)
    with torch.no_grad():
        other.energy_head.contract.bias += 1e-6
    with pytest.raises(RunError, match=r"other settings \(weights at the start\)"):
        train(other, stages, data, data, tmp_path / "a", **options)


@pytest.mark.parametrize("change", ["energy", "forces", "charge", "positions"])
def test_corrected_labels_do_not_mix_with_old_ones(
    twenty: Path, tmp_path: Path, change: str
) -> None:
    """Nor does the folder return the model of the old labels."""
    old = Dataset(twenty)
    train(small_model(old), [direct_stage(1)], old, old, tmp_path / "run", max_atoms=60)
    frames = [old[index] for index in range(len(old))]
    if change in ("energy", "forces"):
        frames[7].calc.results[change] = frames[7].calc.results[change] + 1e-3
    elif change == "charge":
        frames[7].info["charge"] -= 2
    else:
        frames[7].positions[0] += 1e-3
        frames[7].calc = SinglePointCalculator(frames[7], **frames[7].calc.results)
    write_aselmdb(tmp_path / "new.aselmdb", frames)
    new = Dataset(tmp_path / "new.aselmdb")
    with pytest.raises(RunError, match=r"other settings \(training data\)"):
        train(small_model(old), [direct_stage(1)], new, old, tmp_path / "run", max_atoms=60)


def test_the_gradient_is_clipped_as_a_whole_whoever_takes_the_step(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Muon's matrices count in the norm too, and a gradient that is not finite is seen there."""
    seen = []
    clip = torch.nn.utils.clip_grad_norm_

    def watched(parameters, *arguments):
        parameters = list(parameters)
        seen.append(len(parameters))
        return clip(parameters, *arguments)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watched)
    model = run(data, tmp_path, (2, 1), muon=3.0)
    direct = sum(1 for _ in start_stage(model, direct_stage(1)).parameters())
    assert seen == [direct, direct, sum(1 for _ in model.parameters())]


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["model"],
        lambda state: None,
        lambda state: {**state, "stage": 0, "model": {}},
        lambda state: {**state, "stage": 0, "optimizers": []},
        lambda state: {**state, "stage": 7},  # which would skip all stages
        lambda state: {**state, "step": -1},
    ],
)
def test_a_state_of_something_else_is_said(
    data: Dataset, tmp_path: Path, change: Callable[[Any], Any]
) -> None:
    run(data, tmp_path, (1, 1))
    (tmp_path / "state.before.pt").unlink(missing_ok=True)
    file = tmp_path / "state.pt"
    torch.save(change(torch.load(file, weights_only=True)), file)
    with pytest.raises(RunError, match="state.pt is (not the state of this run|damaged)") as said:
        run(data, tmp_path, (1, 1))
    assert "\n" not in str(said.value)


def test_a_folder_without_its_state_is_not_written_over(data: Dataset, tmp_path: Path) -> None:
    """But for the lines of a run that was stopped before its first state, which come anew."""
    options = {"max_atoms": 40, "validate_every": 1}

    def stop(stage: Stage, step: int, value: float) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(small_model(data), [direct_stage(2)], data, data, tmp_path, watch=stop, **options)
    train(small_model(data), [direct_stage(2)], data, data, tmp_path, **options)
    log = tmp_path / "log.jsonl"
    assert len(log.read_text().splitlines()) == 2
    (tmp_path / "state.pt").unlink()
    for present in ("direct.safetensors", "log.jsonl"):
        with pytest.raises(RunError, match=rf"{present} is there, but no state\.pt"):
            train(small_model(data), [direct_stage(2)], data, data, tmp_path, **options)
        (tmp_path / "direct.safetensors").unlink(missing_ok=True)
        log.write_text("another program's")
    assert log.read_text() == "another program's"


def test_a_loss_that_explodes_stops_the_run(data: Dataset, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"not finite at step \d+: lower the learning rate"):
        train(
            small_model(data),
            [direct_stage(50, 1e30)],
            data,
            data,
            tmp_path,
            max_atoms=40,
            save_every=1,
        )
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["step"] >= 1 and not (tmp_path / "direct.safetensors").exists()


def test_a_trained_model_knows_what_it_saw(twenty: Path, tmp_path: Path) -> None:
    """In memory and in its file, after a stop too."""
    data = Dataset(twenty)
    expected = Seen()
    for index in range(len(data)):
        expected.add(structures_from_atoms(data[index]))

    def stop(stage: Stage, step: int, value: float) -> None:
        if step == 2:
            raise KeyboardInterrupt

    options = {"max_atoms": 60, "save_every": 1, "validate_every": 9}
    with pytest.raises(KeyboardInterrupt):
        train(small_model(data), [direct_stage(9)], data, data, tmp_path, watch=stop, **options)
    model = train(small_model(data), [direct_stage(9)], data, data, tmp_path, **options)
    saved = load_model(tmp_path / "direct.safetensors")
    for found in (model.seen, saved.seen):
        assert found is not None
        kept, wanted = found.to_dict(), expected.to_dict()
        for name in ("closest", "farthest"):  # of structures in float32
            assert kept.pop(name) == pytest.approx(wanted.pop(name), abs=1e-3)
        assert kept == wanted


@pytest.mark.parametrize(("node_attention", "atoms"), [(True, 24), (False, None)])
def test_a_larger_cell_is_only_new_to_a_trained_model_with_node_attention(
    tmp_path: Path, node_attention: bool, atoms: int | None
) -> None:
    crystals = Dataset(SAMPLE.parent / "crystals" / "val.aselmdb")
    model = small_model(crystals, node_attention=node_attention)
    # a batch has all structures
    model = train(model, [direct_stage(1)], crystals, crystals, tmp_path, max_atoms=1000)
    saved = load_model(tmp_path / "direct.safetensors")
    for found in (model.seen, saved.seen):
        assert found is not None and found.atoms == atoms and found.kinds == {"periodic systems"}


def test_training_says_which_charges_it_assumes(twenty: Path, tmp_path: Path) -> None:
    known = Dataset(twenty)
    frames = [known[index] for index in range(3)]
    del frames[1].info["charge"]
    write_aselmdb(tmp_path / "bare.aselmdb", frames)
    data = Dataset(tmp_path / "bare.aselmdb")
    with pytest.warns(StructureWarning, match="no charge in atoms.info") as warned:
        train(small_model(known), [direct_stage(2)], data, data, tmp_path / "run", max_atoms=200)
    assert len([one for one in warned if one.category is StructureWarning]) == 1


def test_a_stress_weight_that_meets_no_stress_is_refused(data: Dataset, tmp_path: Path) -> None:
    model = small_model(data, conservative=True)
    with pytest.raises(RunError, match="stress weight 100, but no training structure is peri"):
        train(model, [conservative_stage(1, stress_weight=100.0)], data, data, tmp_path)
    direct = replace(direct_stage(1), stress_weight=1.0)
    with pytest.raises(RunError, match="has no stress in the stage 'direct'"):
        train(small_model(data), [direct], data, data, tmp_path)


def test_training_lowers_the_errors(twenty: Path, tmp_path: Path) -> None:
    """Both stages, on 20 structures: the log's losses and errors fall."""
    data = Dataset(twenty)
    stages = [direct_stage(60, 3e-3), conservative_stage(60, 3e-3, (10, 10))]
    stages = [replace(stage, ema_decay=0.9) for stage in stages]
    model = small_model(data)
    train(model, stages, data, data, tmp_path, max_atoms=120, validate_every=15)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [
        (stage, step) for stage in ("direct", "conservative") for step in (15, 30, 45, 60)
    ]
    for stage in (lines[:4], lines[4:]):
        assert stage[-1]["loss"] < 0.9 * stage[0]["loss"]
        assert stage[-1]["force_mae"] < stage[0]["force_mae"]


# --- the command --------------------------------------------------------------------------------


def command(data: Path, out: Path, *steps: int) -> list[str]:
    arguments = ["train", "--data", str(data), "--val", str(data), "--out", str(out)]
    arguments += ["--max-atoms", "60", "--accelerator", "cpu"]
    direct, conservative = map(str, steps)
    return [*arguments, "--direct-steps", direct, "--conservative-steps", conservative]


def test_the_command_trains(
    twenty: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both stages, then the second stage once more from the model of the first."""
    monkeypatch.setitem(PRESETS, "lite", SMALL)
    assert cli.main(command(twenty, tmp_path / "both", 3, 2)) == 0
    said, noted = capsys.readouterr()
    assert f"{twenty}: given more than once, to train on or to validate" in noted
    assert "20 structures to train on, 20 to validate" in said
    assert "direct 3/3" in said and "conservative 2/2" in said
    assert (tmp_path / "both" / "log.jsonl").read_text().count("\n") == 2
    direct = load_model(tmp_path / "both" / "direct.safetensors")
    assert not direct.config.conservative
    references, rms = fit_units(Dataset(twenty), SMALL.max_num_elements)
    assert torch.equal(direct.element_references, references)
    assert float(direct.energy_scale) == float(direct.force_scale) == pytest.approx(rms)

    again = command(twenty, tmp_path / "second", 0, 2)
    start = str(tmp_path / "both" / "direct.safetensors")
    same = ["--from", start, "--keep-references", "--conservative-rate", "1e-9", "--muon"]
    assert cli.main([*again, *same]) == 0
    tuned = load_model(tmp_path / "second" / "conservative.safetensors")
    assert tuned.config.conservative
    for name, weight in tuned.state_dict().items():  # nearly no learning: the same backbone
        torch.testing.assert_close(weight, direct.state_dict()[name], rtol=0, atol=1e-7)


def test_the_command_trains_on_a_mixture(
    twenty: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRESETS, "lite", SMALL)
    val = str(SAMPLE / "val.aselmdb")
    both = ["train", "--data", str(twenty), val, "--out", str(tmp_path), "--max-atoms", "40"]
    both += ["--direct-steps", "1", "--conservative-steps", "0", "--shares"]
    assert cli.main([*both, "0.3", "0.7", "--val", val]) == 0
    assert "110 structures to train on" in capsys.readouterr().out
    assert cli.main([*both, "0.5", "0.5", "--val", val]) == 2  # the folder has another mixture
    assert "shares" in capsys.readouterr().err
    assert cli.main([*both, "0.3", "0.7"]) == 2
    assert "--shares needs --val" in capsys.readouterr().err


def moved_labels(twenty: Path, file: Path) -> dict[str, float]:
    """The twenty with other zeros of energy, and by how much each element's is other."""
    zeros = {"H": 5.0, "C": -900.0, "N": -1300.0, "O": -1900.0}
    structures = []
    for atoms in Dataset(twenty):
        labels = dict(atoms.calc.results)
        labels["energy"] += sum(zeros.get(symbol, 0.0) for symbol in atoms.symbols)
        atoms.calc = SinglePointCalculator(atoms, **labels)
        structures.append(atoms)
    write_aselmdb(file, structures)
    return zeros


def test_references_follow_another_price_of_an_electron(data: Dataset, tmp_path: Path) -> None:
    model = start_stage(small_model(data), conservative_stage(1)).eval()
    structures = []
    charges = {"H2O": 0, "NH3": 1, "CH4": -1, "CH3OH": 2, "H2O2": 0, "HCN": 1}
    for name, charge in charges.items():
        atoms = molecule(name)
        atoms.info |= {"charge": charge, "spin": 1 + charge % 2}
        answer = model.predict(atoms)
        energy = answer.energy - 4.7 * charge + 3.0 * list(atoms.symbols).count("O")
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=answer.forces)
        structures.append(atoms)
    write_aselmdb(tmp_path / "ions.aselmdb", structures)
    ions = Dataset(tmp_path / "ions.aselmdb")
    moved = shift_references(model, ions)
    assert float(moved[-1]) == float(model.charge_reference) == pytest.approx(-4.7, abs=1e-3)
    assert float(moved[8]) == pytest.approx(3.0, abs=1e-3)
    for atoms in ions:
        error = model.predict(atoms).energy - atoms.get_potential_energy()
        assert error == pytest.approx(0.0, abs=1e-3)


def test_references_follow_another_level_of_theory(
    twenty: Path, data: Dataset, tmp_path: Path
) -> None:
    zeros = moved_labels(twenty, tmp_path / "moved.aselmdb")
    model = start_stage(small_model(data), conservative_stage(1)).eval()
    twin = start_stage(small_model(data), conservative_stage(1)).eval()
    same = shift_references(twin, Dataset(twenty))
    before = model.element_references.clone()
    moved = shift_references(model, Dataset(tmp_path / "moved.aselmdb"))
    torch.testing.assert_close(model.element_references, before + moved[:-1])
    assert model.charge_reference == moved[-1]
    numbers = [atomic_numbers[symbol] for symbol in zeros]
    present = torch.tensor([*numbers, 99, 100])  # 100 is the charge
    expected = torch.tensor([*zeros.values(), 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close((moved - same)[present], expected, rtol=0, atol=2e-2)


def test_fine_tuning_one_s_own_data_with_three_options(
    twenty: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No validation set, no stages, another zero of energy: the command finds its way."""
    monkeypatch.setitem(PRESETS, "lite", SMALL)
    assert cli.main(command(twenty, tmp_path / "first", 0, 4)) == 0
    start = tmp_path / "first" / "conservative.safetensors"
    moved_labels(twenty, tmp_path / "moved.aselmdb")
    mine = ["train", "--from", str(start), "--data", str(tmp_path / "moved.aselmdb")]
    where = ["--out", str(tmp_path / "mine"), "--conservative-steps", "2"]
    assert cli.main([*mine, *where, "--max-atoms", "60", "--accelerator", "cpu"]) == 0
    said, noted = capsys.readouterr()
    assert "18 structures to train on, 2 to validate" in said
    assert "moved.aselmdb: given more than once" not in noted
    assert "energy of an atom, moved to fit the data (eV): H " in said
    assert "conservative 2/2" in said and "direct" not in said.partition("18 structures")[2]
    tuned = load_model(tmp_path / "mine" / "conservative.safetensors")
    before = evaluate(load_model(start), Dataset(tmp_path / "moved.aselmdb"))
    after = evaluate(tuned, Dataset(tmp_path / "moved.aselmdb"))
    assert after["energy_mae"] < 0.01 * before["energy_mae"]


def test_labels_of_another_zero_do_not_train_in_silence(
    twenty: Path, data: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Neither a whole set of them nor one among others; what was begun on them is not kept."""
    moved_labels(twenty, tmp_path / "moved.aselmdb")
    moved, stages = Dataset(tmp_path / "moved.aselmdb"), [conservative_stage(1)]
    model = start_stage(small_model(data), stages[0])
    for wrong in (moved, Dataset([SAMPLE / "val.aselmdb", tmp_path / "moved.aselmdb"])):
        with pytest.raises(DataError, match=r"the labels are [\d,]+ eV/atom away from the model's"):
            train(model, stages, wrong, data, tmp_path / "run", max_atoms=60)
    shift_references(model, moved)
    train(model, stages, moved, moved, tmp_path / "run", max_atoms=60)

    kept = [*command(tmp_path / "moved.aselmdb", tmp_path / "command", 0, 1), "--keep-references"]
    assert cli.main([*kept, "--from", "lite-xtb"]) == 2
    assert "without --keep-references" in capsys.readouterr().err


def test_a_part_can_be_taken_out_of_a_model_and_none_put_in(
    twenty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(PRESETS, "lite", SMALL)
    assert cli.main(command(twenty, tmp_path / "whole", 0, 1)) == 0
    whole = tmp_path / "whole" / "conservative.safetensors"
    on = ["--keep-references", "--conservative-rate", "1e-9"]
    without = ["--from", str(whole), "--set", "node_attention=false", *on]
    assert cli.main([*command(twenty, tmp_path / "local", 0, 1), *without]) == 0
    local = load_model(tmp_path / "local" / "conservative.safetensors")
    weights = load_model(whole).state_dict()
    assert not local.config.node_attention and len(local.state_dict()) < len(weights)
    for name, weight in local.state_dict().items():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=1e-7)
    back = ["--from", str(tmp_path / "local" / "conservative.safetensors"), *on]
    for change in ("node_attention=true", "ffn_ratio=3"):
        wrong = [*command(twenty, tmp_path / "back", 0, 1), *back, "--set", change]
        assert cli.main(wrong) == 2
        assert "has no weights for" in capsys.readouterr().err


def test_what_is_held_out_is_not_trained_on(data: Dataset) -> None:
    training, validation = hold_out(data, seed=3)
    assert len(training) + len(validation) == len(data) and len(validation) == round(len(data) / 10)
    assert not set(training.indices) & set(validation.indices)
    assert (training.natoms == [len(training[i]) for i in range(len(training))]).all()
    again, other = hold_out(data, seed=3)[1], hold_out(data, seed=4)[1]
    assert (again.indices == validation.indices).all()
    assert (other.indices != validation.indices).any()


def test_the_command_changes_the_preset(
    twenty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(PRESETS, "lite", SMALL)
    changes = ["node_attention=false", "activation=relu", "cutoff=5", "angular_channels=null"]
    options = [part for change in changes for part in ("--set", change)]
    assert cli.main([*command(twenty, tmp_path / "run", 0, 1), *options]) == 0
    config = load_model(tmp_path / "run" / "conservative.safetensors").config
    assert (config.node_attention, config.activation, config.cutoff) == (False, "relu", 5)
    assert config.angular_channels is None and config.hidden_size == SMALL.hidden_size
    for wrong, message in (
        ("depth=3", "NAME=VALUE with a NAME among hidden_size"),
        ("num_layers", "NAME=VALUE"),
        ("num_layers=many", "is not a whole number"),
        ("activation=tanh", "'tanh' is not one of"),
    ):
        assert cli.main([*command(twenty, tmp_path / "wrong", 0, 1), "--set", wrong]) == 2
        assert message in capsys.readouterr().err


def test_the_command_explains(
    twenty: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRESETS, "lite", SMALL)
    for arguments, message in (
        (command(twenty, tmp_path, 0, 0), "nothing to train: give --direct-steps"),
        ([*command(twenty, tmp_path, 1, 0), "--max-atoms", "2"], "does not fit into batches of 2"),
        (command(tmp_path / "missing.aselmdb", tmp_path, 1, 0), "missing.aselmdb"),
        ([*command(twenty, tmp_path, 1, 0), "--accelerator", "tpu"], "tpu --devices 1 is not poss"),
    ):
        assert cli.main(arguments) == 2
        assert message in capsys.readouterr().err


def test_two_processes_train_together(twenty: Path, tmp_path: Path) -> None:
    """More than one step of each stage: the second is where unequal gradients show."""
    arguments = command(twenty, tmp_path / "run", 2, 2) + ["--devices", "2", "--preset", "lite"]
    done = subprocess.run(
        [sys.executable, "-m", "allscaip_lite.cli", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("conservative 2/2") == 1  # one of them speaks
    assert (tmp_path / "run" / "log.jsonl").read_text().count("\n") == 2
    assert load_model(tmp_path / "run" / "conservative.safetensors").config.conservative


def test_a_run_of_two_processes_that_loses_one_goes_on_to_the_same_numbers(
    twenty: Path, tmp_path: Path
) -> None:
    """Two processes as Slurm starts them. One is killed: the other ends, and both start again."""
    small = ["hidden_size=16", "num_layers=2", "num_heads=2", "angular_channels=[4,4]"]
    options = [part for change in small for part in ("--set", change)]
    options += ["--max-atoms", "40", "--save-every", "5", "--accelerator", "cpu", "--devices", "2"]

    def begin(folder: Path, rank: int, port: int) -> subprocess.Popen:
        slurm = {"JOB_ID": 1, "JOB_NAME": "train", "NODELIST": "127.0.0.1", "NODEID": 0}
        slurm |= {"NTASKS": 2, "NTASKS_PER_NODE": 2, "NNODES": 1, "PROCID": rank, "LOCALID": rank}
        environment = {f"SLURM_{name}": str(value) for name, value in slurm.items()}
        return subprocess.Popen(
            [sys.executable, "-m", "allscaip_lite.cli", *command(twenty, folder, 0, 60), *options],
            env={**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(port), **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def both(*folders: Path) -> list[subprocess.Popen]:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        return [begin(folder, rank, port) for rank, folder in enumerate(folders)]

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for process in both(whole, whole):
        errors = process.communicate(timeout=300)[1]
        assert process.returncode == 0, errors[-2000:]

    first, second = both(broken, broken)
    while not (broken / "state.pt").exists():
        assert second.poll() is None, second.stderr.read()
        time.sleep(0.01)
    second.kill()
    first.communicate(timeout=300)
    second.communicate(timeout=300)
    assert first.returncode and not (broken / "conservative.safetensors").exists()

    # a node that does not see the folder begins anew, which would spoil the weights of all
    apart = both(broken, tmp_path / "other")
    errors = apart[1].communicate(timeout=300)[1]
    apart[0].kill()
    apart[0].communicate()
    assert "all nodes have to share --out" in errors

    for process in both(broken, broken):
        errors = process.communicate(timeout=300)[1]
        assert process.returncode == 0, errors[-2000:]
    weights = [
        load_model(folder / "conservative.safetensors").state_dict() for folder in (whole, broken)
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_stopped_run_has_the_log_of_one_that_was_not(twenty: Path, tmp_path: Path) -> None:
    """The same lines with the same mean losses, once each, where it stopped between checkpoints
    and where the log was lost; and where the last checkpoint is damaged, with a word."""
    data = Dataset(twenty)
    options = {"max_atoms": 60, "save_every": 3, "validate_every": 4}

    def lines(folder: Path) -> list[dict[str, float]]:
        found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if k != "seconds_per_step"} for line in found]

    def stop(stage: Stage, step: int, value: float) -> None:
        if step == 9:
            raise KeyboardInterrupt

    train(small_model(data), [direct_stage(10)], data, data, tmp_path / "whole", **options)
    for case in ("as it is", "log lost", "state damaged"):
        folder = tmp_path / case
        with pytest.raises(KeyboardInterrupt):
            train(small_model(data), [direct_stage(10)], data, data, folder, watch=stop, **options)
        if case == "log lost":
            (folder / "log.jsonl").unlink()
        expected = contextlib.nullcontext()
        if case == "state damaged":
            content = bytearray((folder / "state.pt").read_bytes())
            content[len(content) // 2] ^= 1
            (folder / "state.pt").write_bytes(content)
            expected = pytest.warns(UserWarning, match=r"state.pt is damaged.*the state before it")
        with expected:
            train(small_model(data), [direct_stage(10)], data, data, folder, **options)
        assert lines(folder) == lines(tmp_path / "whole")
