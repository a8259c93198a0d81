"""Ablation: cells differ in one thing; a stopped study goes on to the same table."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

from allscaip_lite.config import AllScAIPConfig
from allscaip_lite.data.aselmdb import Dataset, InMemory
from allscaip_lite.errors import DataError, InputError, RunError
from allscaip_lite.files import locked
from allscaip_lite.training.loop import fresh_model
from data.long_range.curves import (
    errors_by_gap,
    separation_curves,
    tail_exponent,
    tail_misfit,
)
from docs.studies.ablation import run as ablation
from docs.studies.ablation.run import (
    MODELS,
    STUDIES,
    Cell,
    Study,
    choose,
    main,
    run_study,
)

ROOT = Path(__file__).resolve().parents[2]
TINY = Study(structures=(20,), seeds=(0,), steps=3, max_atoms=40, window=(6.0, 20.0))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ions")
    importlib.import_module("data.long_range.make").write_ions(folder, 60, seed=0)
    return folder


def timeless(table: dict) -> dict:
    """A table without what a clock said."""
    cells = [{k: v for k, v in row.items() if k != "seconds"} for row in table["cells"]]
    return {**table, "cells": cells}


# --- cells --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(STUDIES))
def test_a_study_has_every_variant_with_and_without_lae(name):
    study = STUDIES[name]
    cells = study.cells()
    assert len({cell.name for cell in cells}) == len(cells)
    kinds = {(cell.variant, cell.angular) for cell in cells}
    assert kinds == {(v, lae) for v in ("local", "node", "rotary") for lae in (False, True)}
    assert len(cells) == 6 * len(study.sizes) * len(study.structures) * len(study.seeds)
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)


@pytest.mark.parametrize("name", sorted(STUDIES))
def test_the_tables_in_the_repository_are_of_these_studies(name):
    """What the command makes now is what lesson 08 reads."""
    folder = ROOT / "docs" / "studies" / "ablation" / "results"
    table, study = json.loads((folder / f"{name}.json").read_text()), STUDIES[name]
    models = {size: MODELS[size].to_dict() for size in study.sizes}
    now = json.loads(json.dumps({"study": dataclasses.asdict(study), "models": models}))
    defaults = json.loads(json.dumps(dataclasses.asdict(Study())))
    assert defaults | table["study"] == now["study"]  # a table may be older than a setting
    assert table["models"] == now["models"]
    assert {row["name"] for row in table["cells"]} <= {cell.name for cell in study.cells()}


def test_a_cell_s_model_has_what_its_name_says():
    study = STUDIES["table"]
    for cell in study.cells():
        config = study.config(cell)
        assert config.node_attention == (cell.variant != "local")
        assert config.rotary == ("rotary" in cell.name)
        assert (config.angular_channels is not None) == ("-lae-" in cell.name)
        assert config.hidden_size == MODELS[cell.size].hidden_size


def test_smaller_selections_are_inside_larger_ones(data):
    train = Dataset(data / "train.aselmdb")
    few, more = ({a.positions.tobytes() for a in choose(train, n, 7).structures} for n in (5, 20))
    assert len(few) == 5 and len(more) == 20 and few < more
    assert len(choose(train, 16_000, 0)) == len(choose(train, None, 0)) == len(train)


# --- what is measured ---------------------------------------------------------------------------


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
def test_the_exponent_of_a_power_law_is_found(power):
    r = np.arange(2, 30, 0.5)
    assert tail_exponent(r, -4.0 + 7.0 / r**power, (6, 20)) == pytest.approx(power, abs=1e-3)


def test_a_flat_tail_has_no_exponent():
    r = np.arange(2, 30, 0.5)
    assert np.isnan(tail_exponent(r, np.where(r < 5, 1 / r, 0.2), (6, 20)))


def test_the_misfit_of_a_tail_is_its_shape_s_and_no_shift_s():
    distance = np.arange(2.0, 20.5, 0.5)
    truth = 14.4 / distance
    window = (6.0, 20.0)
    assert tail_misfit(distance, truth + 3.0, truth, window) == pytest.approx(0, abs=1e-9)
    inside = truth[distance >= 6]
    spread = 1000 * np.abs(inside - inside.mean()).mean()
    assert tail_misfit(distance, np.zeros_like(truth), truth, window) == pytest.approx(spread)
    near = np.where(distance < 6, 100.0, truth)  # what is outside does not count
    assert tail_misfit(distance, near, truth, window) == pytest.approx(0, abs=1e-9)


def test_tails_are_shown_steepest_first_and_only_where_they_reach(tmp_path, capsys):
    distance = np.arange(2.0, 20.5, 0.5)
    curve = {
        "ions": {"distance": list(distance), "energy": list(14.4 / distance)},
        "weak": {"distance": list(distance), "energy": list(14.4 / distance**2)},
        "short": {"distance": [2.0, 4.0], "energy": [1.0, 0.5]},
    }
    known = {name: {**values, "energy": [0.0] * 37} for name, values in curve.items()}
    whole = {"structures": 5, "energy_mae": 1.0, "force_mae": 1.0}

    def row(name, curves):
        same = {"angular": False, "size": "small", "structures": 9, "errors": {"all": whole}}
        return {"name": name, "curves": curves, **same}

    cells = [row("local-plain-small-seed0", known), row("rotary-plain-small-seed0", curve)]
    study = dataclasses.asdict(STUDIES["ions"])
    table = {"done": "2 of 18 cells", "study": study, "truth": curve, "cells": cells}
    ablation.write_table(table, tmp_path / "a.json")
    assert main(["ions", "--show", "--results", str(tmp_path / "a.json")]) == 0
    text = capsys.readouterr().out
    lines = text[text.index("| curve") :].splitlines()
    assert lines[0] == "| curve | exponent | flat | local | rotary |"
    (ions, weak) = lines[2:]
    flat = tail_misfit(distance, np.zeros(37), 14.4 / distance, (6.0, 20.0))
    assert ions == f"| ions | 1.0 | {flat:.0f} | {flat:.0f} | 0 |"
    assert weak.startswith("| weak | 2.0 |") and weak.endswith("| 0 |")


def test_errors_of_a_model_without_knowledge_are_the_labels(data):
    test = InMemory(Dataset(data / "test.aselmdb"))
    model = fresh_model(MODELS["small"], test, seed=0)
    for name, parameter in model.energy_head.named_parameters():
        if name.startswith("contract"):
            parameter.data.zero_()
    model.element_references.zero_()
    found = errors_by_gap(model, test, (0.0, 8.0, 30.0))
    energies = np.array([atoms.get_potential_energy() for atoms in test.structures])
    gaps = np.array([atoms.info["gap"] for atoms in test.structures])
    assert found["all"]["energy_mae"] == pytest.approx(1e3 * np.abs(energies).mean(), rel=1e-4)
    near = 1e3 * np.abs(energies[gaps < 8]).mean()
    assert found["0-8"]["energy_mae"] == pytest.approx(near, rel=1e-4)
    assert found["0-8"]["structures"] + found["8-30"]["structures"] == len(test)
    forces = np.abs(np.concatenate([atoms.get_forces() for atoms in test.structures])).mean()
    assert found["all"]["force_mae"] == pytest.approx(1e3 * forces, rel=1e-4)


def test_the_push_on_a_pair_is_minus_the_slope_of_its_energy(data):
    truth = separation_curves(None, InMemory(Dataset(data / "curves.aselmdb")))["Na...K"]
    slope = np.gradient(truth["energy"], truth["distance"])
    assert np.allclose(truth["force"][8:-1], -slope[8:-1], atol=5e-3)
    assert truth["distance"][0] == 2.0 and truth["distance"][-1] == 30.0


def test_curves_without_an_axis_are_refused(data):
    plain = Dataset(data / "curves.aselmdb")[0]
    del plain.info["axis"]
    with pytest.raises(DataError, match="long_range/make.py"):
        separation_curves(None, InMemory([plain]))


# --- a study ------------------------------------------------------------------------------------


def test_a_stopped_study_goes_on_to_the_same_table(data, tmp_path, monkeypatch):
    cells = ["local-plain-*", "rotary-lae-*"]
    whole = run_study(TINY, data, tmp_path / "whole", tmp_path / "whole.json", cells=cells)
    assert whole["done"] == "2 of 6 cells"
    assert json.loads((tmp_path / "whole.json").read_text()) == json.loads(json.dumps(whole))

    def interrupted(*args: object, **keywords: object) -> None:
        raise KeyboardInterrupt

    parts = tmp_path / "parts"
    first = run_study(TINY, data, parts, cells=cells[:1])
    assert first["done"] == "1 of 6 cells"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ablation, "errors_by_gap", interrupted)  # trained, not yet measured
        run_study(TINY, data, parts, cells=cells)
    trained = []
    monkeypatch.setattr(
        ablation, "run_cell", lambda *a, done=ablation.run_cell: trained.append(a[1]) or done(*a)
    )
    assert timeless(run_study(TINY, data, parts, cells=cells)) == timeless(whole)
    assert [cell.variant for cell in trained] == ["rotary"]


def test_a_study_goes_on_from_a_table_alone(data, tmp_path):
    table, other = tmp_path / "table.json", tmp_path / "other.json"
    first = run_study(TINY, data, tmp_path / "run", table, cells=["local-plain-*"])
    old = json.loads(table.read_text())
    del old["study"]["muon"]  # written before there was such a setting
    ablation.write_table(old, table)
    again = run_study(TINY, data, tmp_path / "elsewhere", table, cells=["local-*"], hours=0)
    assert timeless(again) == timeless(first)
    ablation.write_table({**old, "data": {}}, other)
    with pytest.raises(InputError, match="give another --results"):
        run_study(TINY, data, tmp_path / "third", other, hours=0)
    assert json.loads(other.read_text())["cells"], "nothing is lost"


def test_no_hours_start_no_cell(data, tmp_path, capsys):
    assert run_study(TINY, data, tmp_path / "run", hours=0)["cells"] == []
    assert "6 cells wait" in capsys.readouterr().out


def test_another_study_does_not_mix_with_the_first(data, tmp_path):
    run_study(TINY, data, tmp_path / "run", hours=0)
    with pytest.raises(InputError, match="another study"):
        run_study(dataclasses.replace(TINY, steps=4), data, tmp_path / "run", hours=0)
    with pytest.raises(InputError, match="no cell is named"):
        run_study(TINY, data, tmp_path / "run", cells=["wide-*"])
    with locked(tmp_path / "run"), pytest.raises(RunError, match="another process works in"):
        run_study(TINY, data, tmp_path / "run", hours=0)


def test_the_table_study_measures_throughput(data, tmp_path):
    study = dataclasses.replace(STUDIES["table"], structures=(10, 20), steps=2, max_atoms=40)
    cells = ["rotary-lae-small-*-seed0", "local-plain-medium-10-seed1"]
    table = run_study(study, data, tmp_path / "run", cells=cells)
    assert [row["structures"] for row in table["cells"]] == [10, 20, 10]
    first = table["cells"][0]
    assert Cell(True, True, True, "small", 10, 0).name == first["name"]
    speeds = table["throughput"]
    assert set(speeds) == {cell.kind for cell in study.cells()} and min(speeds.values()) > 0

    lines = ablation.to_markdown(table).splitlines()
    assert lines[0] == "| variant | LAE | size | 10 | 20 | atoms/s |"
    assert [line.split(" | ")[:3] for line in lines[2:]] == [
        ["| rotary", "yes", "small"],
        ["| local", "no", "medium"],
    ]
    whole = first["errors"]["all"]
    assert f"| {whole['force_mae']:.0f} / {whole['energy_mae_per_atom']:.1f} |" in lines[2]
    assert " | – | " in lines[3]


def test_a_table_is_shown_by_variant_with_the_spread_of_its_seeds(tmp_path, capsys):
    def row(name, energy, force):
        whole = {"structures": 5, "energy_mae": energy, "force_mae": force}
        same = {"angular": True, "size": "small", "structures": 9}
        return {"name": name, **same, "errors": {"all": whole, "0-4": whole}}

    cells = [row("local-lae-small-seed0", 10, 1), row("local-lae-small-seed1", 20, 3)]
    table = {"done": "3 of 18 cells", "cells": [*cells, row("rotary-lae-small-seed0", 4, 5)]}
    ablation.write_table(table, tmp_path / "a.json")
    assert main(["chain", "--show", "--results", str(tmp_path / "a.json")]) == 0
    text = capsys.readouterr().out
    assert "3 of 18 cells" in text
    assert "| local | yes | small | 9 | 2 | 15 (10–20) / 2 |" in text
    assert "| rotary | yes | small | 9 | 1 | 4 / 5 |" in text
    assert main(["ions", "--show"]) == 2
    assert main(["ions"]) == 2
    assert "--data" in capsys.readouterr().err


def test_the_lesson_trains_the_small_model_of_the_studies():
    notebook = json.loads((ROOT / "notebooks" / "08_long_range.ipynb").read_text())
    code = "\n".join("".join(cell["source"]) for cell in notebook["cells"])
    (text,) = re.findall(r"(?ms)^SMALL = (AllScAIPConfig\(.*?^\))", code)
    assert eval(text, {"AllScAIPConfig": AllScAIPConfig}) == MODELS["small"]
