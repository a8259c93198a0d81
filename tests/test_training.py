"""Training: the loss, the schedule, the batches, and a resume to the same numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from allscaip_lite import AllScAIP, AllScAIPConfig, cli, load_model
from allscaip_lite.batches import Batches, collate
from allscaip_lite.data import DataError, Dataset
from allscaip_lite.model import Prediction
from allscaip_lite.training import (
    TrainingError,
    conservative_stage,
    direct_stage,
    fit_units,
    loss,
    make_optimizer,
    start_stage,
    train,
)

SAMPLE = Path(__file__).resolve().parents[1] / "data" / "xtb"
SMALL = AllScAIPConfig(
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    angular_channels=(4, 4),
    num_distance_basis=32,
    conservative=False,
)


@pytest.fixture(scope="module")
def data() -> Dataset:
    return Dataset(SAMPLE / "val.aselmdb")


def small_model(data: Dataset) -> AllScAIP:
    torch.manual_seed(0)
    model = AllScAIP(SMALL)
    references, rms = fit_units(data, SMALL.max_num_elements)
    model.element_references.copy_(references)
    model.energy_scale.fill_(rms)
    model.force_scale.fill_(rms)
    return model


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


def test_only_matrices_decay(data: Dataset) -> None:
    model = small_model(data)
    decayed, kept = make_optimizer(model, direct_stage(10)).param_groups
    assert decayed["weight_decay"] > 0 and kept["weight_decay"] == 0
    assert all(weight.ndim == 2 for weight in decayed["params"])
    ids = {id(weight) for weight in kept["params"]}
    assert id(model.input.atom_embedding.weight) in ids
    assert id(model.blocks[0].scale["source"]) in ids


def test_units_recover_known_references(data: Dataset) -> None:
    references, rms = fit_units(data, 100)
    residuals = []
    for i in range(len(data)):
        energy = data[i].get_potential_energy() - float(references[data[i].numbers].sum())
        residuals.append(energy / len(data[i]))
    raw = [data[i].get_potential_energy() / len(data[i]) for i in range(len(data))]
    assert np.std(residuals) < 0.05 * np.std(raw)
    forces = np.concatenate([data[i].get_forces().ravel() for i in range(len(data))])
    assert rms == pytest.approx(np.sqrt((forces**2).mean()))


def test_an_epoch_holds_every_structure_once(data: Dataset) -> None:
    batches = Batches(data, max_atoms=60, seed=3, rotate=False)
    energies, number = [], 0
    while len(energies) < len(data):
        batch = batches[number]
        assert int(batch.structures.natoms.sum()) <= 60
        energies.extend(batch.energy.tolist())
        number += 1
    expected = [data[i].get_potential_energy() for i in range(len(data))]
    assert sorted(energies) == pytest.approx(sorted(expected))
    again = Batches(data, max_atoms=60, seed=3, rotate=False)
    torch.testing.assert_close(again[2].energy, batches[2].energy, rtol=0, atol=0)
    other = Batches(data, max_atoms=60, seed=4, rotate=False)
    assert other[0].energy.tolist() != batches[0].energy.tolist()


def test_resumed_and_distributed_batches_are_the_same_ones(data: Dataset) -> None:
    whole = Batches(data, max_atoms=60, seed=3)
    resumed = Batches(data, max_atoms=60, seed=3, first=5)
    torch.testing.assert_close(resumed[1].forces, whole[6].forces, rtol=0, atol=0)
    ranks = [Batches(data, max_atoms=60, seed=3, rank=r, world_size=2) for r in (0, 1)]
    for step in range(3):
        for r in (0, 1):
            torch.testing.assert_close(ranks[r][step].forces, whole[2 * step + r].forces)


def test_a_structure_too_large_says_what_to_do(data: Dataset) -> None:
    with pytest.raises(DataError, match="--max-atoms"):
        Batches(data, max_atoms=2, seed=0)


def test_random_rotations_turn_forces_with_positions(data: Dataset) -> None:
    plain, turned = collate([data[0]]), collate([data[0]], rotation_seed=7)
    a, b = plain.structures.positions, turned.structures.positions
    assert not torch.allclose(a, b)
    torch.testing.assert_close(torch.cdist(a, a), torch.cdist(b, b), atol=1e-4, rtol=1e-4)
    centred = [x - x.mean(0) for x in (a, b)]
    torch.testing.assert_close(
        centred[0] @ plain.forces.T, centred[1] @ turned.forces.T, atol=1e-3, rtol=1e-3
    )


def test_stages_hand_over_the_backbone(data: Dataset) -> None:
    model = small_model(data)
    changed = start_stage(model, conservative_stage(5))
    assert changed.config.conservative and not hasattr(changed, "force_head")
    for name, weight in changed.state_dict().items():
        torch.testing.assert_close(weight, model.state_dict()[name], rtol=0, atol=0)


def run(data: Dataset, folder: Path, steps: tuple[int, int] = (9, 5)) -> AllScAIP:
    return train(
        small_model(data),
        [direct_stage(steps[0]), conservative_stage(steps[1])],
        data,
        data,
        folder,
        max_atoms=40,
        validate_every=100,
        save_every=2,
    )


def test_an_interrupted_run_goes_on_to_the_same_numbers(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(data, tmp_path / "whole")
    get = Batches.__getitem__
    stops = {(5, False), (3, True)}  # once in the direct stage, once in the conservative one

    def interrupted(self: Batches, index: int):  # type: ignore[no-untyped-def]
        place = (self.first + index, self.seed == 1)
        if place in stops:
            stops.remove(place)
            raise KeyboardInterrupt
        return get(self, index)

    monkeypatch.setattr(Batches, "__getitem__", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path / "stopped")
    resumed = run(data, tmp_path / "stopped")
    assert not stops
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], weight, rtol=0, atol=0)
    assert load_model(tmp_path / "stopped" / "conservative.safetensors").config.conservative


def test_other_settings_do_not_mix_in_one_folder(data: Dataset, tmp_path: Path) -> None:
    run(data, tmp_path, (2, 1))
    with pytest.raises(TrainingError, match="other settings"):
        run(data, tmp_path, (3, 1))


def test_the_command_trains(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["train", "--data", str(SAMPLE / "val.aselmdb"), "--val", str(SAMPLE / "val.aselmdb")]
    command += ["--out", str(tmp_path), "--max-atoms", "40", "--accelerator", "cpu"]
    command += ["--direct-steps", "0", "--conservative-steps", "2"]
    assert cli.main(command) == 0
    assert "conservative 2/2" in capsys.readouterr().out
    assert (tmp_path / "conservative.safetensors").exists()
    assert (tmp_path / "log.jsonl").read_text().count("\n") == 1


def test_training_lowers_the_loss(data: Dataset) -> None:
    model = start_stage(small_model(data), conservative_stage(1)).train()
    batch = collate([data[i] for i in range(6)])
    stage = conservative_stage(40, 3e-3, (10, 10))
    optimizer = make_optimizer(model, stage)
    losses = []
    for _ in range(40):
        value = loss(model(batch.structures), batch, model, stage)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.8 * losses[0]
