"""The last layer by least squares: what a change of it does, and that the best one is found."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from allscaip_lite import AllScAIP, cli
from allscaip_lite.calculator import AllScAIPCalculator
from allscaip_lite.checkpoints import load_model, save_model
from allscaip_lite.data.aselmdb import Dataset, write_aselmdb
from allscaip_lite.errors import InputError
from allscaip_lite.training.refit import Rows, measure, refit, solve

ModelMaker = Callable[..., AllScAIP]


def labelled(model: AllScAIP, atoms: Atoms) -> Atoms:
    found = atoms.copy()
    found.info |= {"charge": 0, "spin": 1 + int(atoms.numbers.sum()) % 2}
    found.calc = AllScAIPCalculator(model)
    names = ["energy", "forces", *(["stress"] if atoms.pbc.any() else [])]
    results = {name: found.calc.get_property(name, found) for name in names}
    found.calc = SinglePointCalculator(found, **results)
    return found


@pytest.fixture(scope="module")
def structures(cluster: Atoms, crystal: Atoms) -> list[Atoms]:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(70):
        for start in (cluster[:6], crystal):
            moved = start.copy()
            moved.set_cell(moved.cell.array * rng.normal(1, 0.02), scale_atoms=True)
            moved.positions += 0.1 * rng.normal(size=(len(moved), 3))
            found.append(moved)
    return found


def other(model: AllScAIP, size: float = 0.05) -> AllScAIP:
    """The same model with another last layer."""
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in changed.energy_head.contract.parameters():
            weight += size * torch.randn(weight.shape, generator=generator).to(weight)
    return changed


@pytest.mark.parametrize("kernels", ["plain", "c"])
def test_rows_say_what_a_change_of_the_layer_does(
    make_model: ModelMaker, structures: list[Atoms], tmp_path: Path, kernels: str
) -> None:
    if kernels == "c" and not shutil.which("cc"):
        pytest.skip("no C compiler")
    model = make_model()
    changed = other(model)
    data = [labelled(model, atoms) for atoms in structures[:4]]
    write_aselmdb(tmp_path / "some.aselmdb", data)
    before = measure(model, Dataset(tmp_path / "some.aselmdb"), progress=False)
    after = measure(changed, Dataset(tmp_path / "some.aselmdb"), kernels=kernels, progress=False)
    layers = [[*m.energy_head.contract.parameters()] for m in (model, changed)]
    change = torch.cat([(b - a).detach().flatten() for a, b in zip(*layers, strict=True)]).numpy()
    assert [len(rows.missing) for rows in before] == [4, 4, 2]
    for one, two in zip(before, after, strict=True):
        assert one.missing == pytest.approx(np.zeros(len(one.missing)), abs=1e-5)
        assert np.abs(two.missing).min() > 1e-3
        # what the other layer is off by is what going back to the first one adds
        assert two.missing == pytest.approx(-two.features @ change, abs=1e-5)
        assert two.features == pytest.approx(one.features, abs=1e-9)


def test_a_layer_that_was_changed_is_found_again(
    make_model: ModelMaker, structures: list[Atoms], tmp_path: Path
) -> None:
    model = make_model()
    data = [labelled(model, atoms) for atoms in structures]
    write_aselmdb(tmp_path / "train.aselmdb", data[:-20])
    file, out = tmp_path / "changed.safetensors", tmp_path / "out.safetensors"
    save_model(other(model), file, {"trained": "here"})
    asked = ["refit", str(file), "--data", str(tmp_path / "train.aselmdb"), "--out", str(out)]
    assert cli.main(asked) == 0
    changed, found = (
        np.mean([np.abs(result.forces - atoms.get_forces()).mean() for result, atoms in pairs])
        for pairs in (
            zip(load_model(path).predict(data[-20:]), data[-20:], strict=True)
            for path in (file, out)
        )
    )
    assert found < 0.02 * changed


def test_the_least_absolute_errors_do_not_follow_outliers() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(400, 3))
    true = np.array([1.0, -2.0, 0.5])
    missing = features @ true
    missing[::10] += 50.0
    assert solve([(Rows(features, missing), 1.0)]) == pytest.approx(true, abs=1e-3)
    # of two kinds that disagree, the one with more weight has its way
    both = [(Rows(features, features @ true), 1.0), (Rows(features, features @ -true), 3.0)]
    assert solve(both) == pytest.approx(-true, abs=1e-2)


def test_what_cannot_be_fitted_is_refused(make_model: ModelMaker, structures, tmp_path) -> None:
    write_aselmdb(tmp_path / "one.aselmdb", [labelled(make_model(), structures[0])])
    data = Dataset(tmp_path / "one.aselmdb")
    with pytest.raises(InputError, match="1 structures are too few for"):
        refit(make_model(), data)
    with pytest.raises(InputError, match="direct model"):
        refit(make_model(conservative=False), data)
