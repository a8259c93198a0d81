"""The speed study measures what it says: the cluster, the sides, the table."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from data.water.boxes import water_cluster
from docs.studies.report import MARKS
from docs.studies.speed.run import compare, main, table


def test_water_clusters_have_the_density_of_the_liquid_and_no_contacts() -> None:
    cluster = water_cluster(200)
    assert cluster.get_chemical_formula() == "H400O200"
    oxygens = cluster.positions[cluster.numbers == 8]
    inside = np.linalg.norm(oxygens - oxygens.mean(0), axis=1) < 8.0
    # molecules within 8 Å of the middle, well inside the ball, against 0.0334 per Å³
    assert inside.sum() == pytest.approx(0.0334 * 4 / 3 * np.pi * 8.0**3, rel=0.1)
    distances = cluster.get_all_distances()
    distances[np.diag_indices(len(cluster))] = np.inf
    molecule = np.arange(len(cluster)) // 3
    between = distances[molecule[:, None] != molecule]
    assert between.min() > 1.5
    bonds = [distances[i, i + h] for i in range(0, len(cluster), 3) for h in (1, 2)]
    np.testing.assert_allclose(bonds, 0.96, atol=1e-9)


def test_the_same_cluster_every_time() -> None:
    first, second = water_cluster(5), water_cluster(5)
    np.testing.assert_array_equal(first.positions, second.positions)


def test_every_side_is_measured_and_compared_in_one_run(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows, page = tmp_path / "rows.json", tmp_path / "page.md"
    page.write_text("\n".join(["Before", *MARKS, "After"]))
    sides = ["plain", "torch", *(["c"] if shutil.which("cc") else [])]
    asked = ["--sides", *sides, "--atoms", "6", "--rounds", "2", "--json", str(rows)]
    assert main([*asked, "--page", str(page)]) == 0
    written = json.loads(rows.read_text())
    assert [row["side"] for row in written["rows"]] == sides
    assert "torch" in written["machine"]
    for row in written["rows"]:
        assert row["atoms"] == 6 and row["seconds"] > 0 and row["memory"] > 0
        assert set(row["times_as_fast_as"]) == set(sides) - {row["side"]}
    for row in written["rows"][1:]:
        assert row["energy_difference"] < 2e-5 and row["force_difference"] < 2e-4
    assert "| 6 | torch |" in capsys.readouterr().out
    text = page.read_text()
    assert text.startswith("Before\n") and text.endswith("After") and "| 6 | plain |" in text


def test_ratios_are_of_calls_in_the_same_round() -> None:
    def calls(*seconds: float) -> list[dict]:
        common = {"memory": 1.0, "loaded": 0.5, "start up": 3.0, "energy": -1.0}
        return [{"seconds": s, "forces": [[0.0, 1.0, 2.0]], **common} for s in seconds]

    fast, slow = calls(9, 9, 1, 2, 1), calls(9, 9, 4, 6, 9)
    slow[3]["forces"] = [[0.0, 1.0, 1.5]]
    rows = {row["side"]: row for row in compare({"c": fast, "fairchem": slow})}
    assert rows["c"]["times_as_fast_as"] == {"fairchem": 4.0}  # of 4, 3 and 9
    assert rows["c"]["seconds"] == 1 and rows["c"]["start"] == 12
    assert rows["c"]["energy_difference"] == 0
    assert rows["c"]["force_difference"] == pytest.approx(0.5 / 1.5)
    assert "force_difference" not in rows["fairchem"]
    failed = {"side": "torch", "atoms": 3, "failed": "out of memory"}
    text = table([{"atoms": 3, **rows["c"]}, failed], ["c", "torch", "fairchem"])
    first, second = text.splitlines()[2:]
    assert first.startswith("| 3 | c | 1.000 ± 0.500 | – | – | 4.00 | 1.00 | 12.0 |")
    assert second == "| 3 | torch |" + " – |" * 8


@pytest.mark.skipif(importlib.util.find_spec("fairchem") is None, reason="needs fairchem-core")
def test_the_answers_are_those_of_fairchem(tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    asked = ["--sides", "torch", "fairchem", "--atoms", "9", "--rounds", "1", "--json", str(rows)]
    assert main(asked) == 0
    ours, theirs = json.loads(rows.read_text())["rows"]
    assert ours["energy_difference"] < 2e-5
    assert ours["force_difference"] < 2e-4
    ratio = theirs["seconds"] / ours["seconds"]
    assert ours["times_as_fast_as"]["fairchem"] == pytest.approx(ratio)


def test_steps_of_training_of_each_side(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sides = ["torch", *(["c"] if shutil.which("cc") else [])]
    rows = tmp_path / "rows.json"
    asked = ["--training", "--atoms", "50", "--rounds", "2", "--json", str(rows), "--sides", *sides]
    assert main(asked) == 0
    (row,) = json.loads(rows.read_text())
    assert row.pop("atoms") == 42  # whole clusters
    assert list(row) == sides
    assert all(len(times) == 2 and min(times) > 0 for times in row.values())
    assert "| 42 | " in capsys.readouterr().out


def test_what_cannot_be_measured_is_refused(capsys: pytest.CaptureFixture) -> None:
    assert main(["--atoms", "2"]) == 2
    assert "one water molecule" in capsys.readouterr().err
    assert main(["--rounds", "0"]) == 2


def test_the_page_has_the_table_of_the_results() -> None:
    folder = Path(__file__).resolve().parents[2] / "docs" / "studies" / "speed"
    rows = json.loads((folder / "results" / "cpu.json").read_text())["rows"]
    assert (
        table(rows, list(dict.fromkeys(row["side"] for row in rows)))
        in (folder / "README.md").read_text()
    )
