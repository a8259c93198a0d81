"""What a model saw and how sure it is, made after training from its data."""

from __future__ import annotations

import copy
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from ase import Atoms

from allscaip_lite import AllScAIP, AllScAIPConfig, cli, load_model, save_model
from allscaip_lite.data.aselmdb import Dataset
from allscaip_lite.data.batches import collate
from allscaip_lite.errors import InputError
from allscaip_lite.evaluation.errors import rank_correlation, residuals
from allscaip_lite.files import locked_file
from allscaip_lite.training.calibrate import calibrate, energy_rows
from allscaip_lite.training.loop import shift_references
from allscaip_lite.training.refit import refit

SAMPLE = Path(__file__).resolve().parents[2] / "data" / "xtb"
SMALL = AllScAIPConfig(hidden_size=16, num_heads=1, num_layers=1, angular_channels=(8, 8))


@pytest.fixture(scope="module")
def data() -> Dataset:
    return Dataset(SAMPLE / "val.aselmdb")


@pytest.fixture(scope="module")
def model(data: Dataset) -> AllScAIP:
    torch.manual_seed(0)
    model = AllScAIP(SMALL).double().eval()
    shift_references(model, data)
    return model


def test_rows_are_derivatives_by_the_last_layer(model: AllScAIP, data: Dataset) -> None:
    batch = collate([data[0], data[1]])
    layer = model.energy_head.contract
    energy = model.in_electronvolts(
        model.energy_head(model.features(batch.structures.to(dtype=torch.float64))).squeeze(1),
        batch.structures,
    )
    expected = [
        torch.cat(
            [g.flatten() for g in torch.autograd.grad(e, layer.parameters(), retain_graph=True)]
        )
        for e in energy
    ]
    rows = model.last_layer_inputs(batch.structures)
    torch.testing.assert_close(rows, torch.stack(expected), rtol=1e-9, atol=1e-9)


def test_deviations_are_those_of_linear_regression(
    model: AllScAIP, data: Dataset, tmp_path: Path
) -> None:
    made = calibrate(model, data, progress=False)
    assert made.seen is not None and made.seen.atoms == data.natoms.max()
    rows, missing = energy_rows(model, data)
    noise = missing.square().mean()
    inverse = torch.linalg.pinv(rows.T @ rows, hermitian=True, rtol=1e-14)
    atoms = data[3]
    row = rows[3] * len(atoms)
    (result,) = made.predict([atoms], uncertainty=True)
    # the ridge takes off a little where the data say little
    assert result.uncertainty == pytest.approx(float((noise * row @ inverse @ row).sqrt()), rel=0.2)
    kept = load_model(save_model(made, tmp_path / "a.safetensors"))
    (again,) = kept.predict([atoms], uncertainty=True)
    assert again.uncertainty == pytest.approx(result.uncertainty, rel=1e-3)
    assert kept.predict([atoms])[0].uncertainty is None
    with mock.patch.object(
        AllScAIP, "features", autospec=True, side_effect=AllScAIP.features
    ) as run:
        made.predict([atoms], uncertainty=True)
        assert run.call_count == 1  # for both


def test_an_unknown_element_is_less_certain_and_the_size_is_that_of_real_errors(
    model: AllScAIP, data: Dataset
) -> None:
    made = calibrate(model, data, data, progress=False)
    rows, missing = energy_rows(made, data)
    assert made.posterior is not None
    deviations = torch.linalg.vector_norm(rows @ made.posterior, dim=1)
    assert (missing / deviations).square().mean() == pytest.approx(1.0, rel=1e-6)
    water = Atoms("OH2", [(0, 0, 0), (0.96, 0, 0), (-0.24, 0.93, 0)], info={"charge": 0, "spin": 1})
    strange = water.copy()
    strange.symbols[0] = "Te"
    known, unknown = made.predict([water, strange], outside_training="ignore", uncertainty=True)
    assert unknown.uncertainty > known.uncertainty


@pytest.mark.parametrize("name", ["lite-water", "lite-water-local"])
def test_deviations_of_the_water_models_have_the_size_of_their_errors(name: str) -> None:
    """Of boxes, clusters and molecules that neither training nor calibration had."""
    found = residuals(load_model(name), Dataset(SAMPLE.parent / "water" / "test.aselmdb"))
    assert found.deviations is not None
    scaled = (found.energies / found.deviations).square().mean().sqrt()
    assert 0.5 < scaled < 2 and rank_correlation(found) > 0.2


def test_a_larger_cell_is_only_new_to_a_model_with_node_attention(model: AllScAIP) -> None:
    crystals = Dataset(SAMPLE.parent / "crystals" / "val.aselmdb")
    for attention, atoms in ((True, 24), (False, None)):
        other = AllScAIP(model.config.replace(node_attention=attention))
        seen = calibrate(other, crystals, structures=0, progress=False).seen
        assert seen is not None and seen.atoms == atoms and seen.kinds == {"periodic systems"}


def test_labels_of_another_zero_are_refused(model: AllScAIP, data: Dataset) -> None:
    other = copy.deepcopy(model)
    other.element_references += 30.0
    for work in (calibrate, refit):
        with pytest.raises(InputError, match="labels are 30 eV/atom away from the model's energ"):
            work(other, data, progress=False)


def test_too_few_structures_and_models_without(model: AllScAIP, data: Dataset) -> None:
    with pytest.raises(InputError, match="20 structures are too few for 33 weights"):
        calibrate(model, data, structures=20, progress=False)
    with pytest.raises(InputError, match="no uncertainty: `allscaip-lite calibrate`"):
        model.predict([data[0]], uncertainty=True)


def test_the_command_and_the_column_of_evaluate(
    model: AllScAIP, data: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(model.float(), tmp_path / "plain.safetensors", {"note": "kept"})
    more = tmp_path / "more.json"
    more.write_text('{"elements": ["Xe"], "atoms": 77}')
    file, out = str(SAMPLE / "val.aselmdb"), str(tmp_path / "made.safetensors")
    command = ["calibrate", str(tmp_path / "plain.safetensors"), "--data", file, "--val", file]
    command += ["--out", out, "--also-seen", str(more), "--device", "cpu"]
    with locked_file(out):
        assert cli.main(command) == 2
    assert f"another process works on {out}" in capsys.readouterr().err
    assert cli.main(command) == 0
    assert "atoms: 77" in capsys.readouterr().out
    made, plain = load_model(out), load_model(tmp_path / "plain.safetensors")
    assert made.seen is not None and {"Xe", "H"} <= (made.seen.elements or set())
    for name, value in plain.state_dict().items():
        np.testing.assert_array_equal(made.state_dict()[name], value)
    assert cli.main(["evaluate", out, file, "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "its own deviation" in said and "rank the errors" in said
