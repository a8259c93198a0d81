"""The benchmark measures what it says: the cluster, the two sides, the table."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from allscaip_lite.labels.spcfw import water_cluster
from docs.studies.speed.run import main


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


def test_bench_alone_writes_rows_and_the_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = tmp_path / "rows.json"
    assert main(["--alone", "--atoms", "6", "--rounds", "2", "--json", str(rows)]) == 0
    written = json.loads(rows.read_text())
    (row,) = written["rows"]
    assert row["atoms"] == 6
    assert row["allscaip-lite s"] > 0 and row["allscaip-lite GiB"] > 0
    assert "torch" in written["machine"]
    assert "| 6 |" in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("fairchem") is None, reason="needs fairchem-core")
def test_bench_beside_fairchem_agrees_with_it(tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    assert main(["--atoms", "9", "--rounds", "1", "--json", str(rows)]) == 0
    (row,) = json.loads(rows.read_text())["rows"]
    assert row["energy difference eV/atom"] < 2e-5
    assert row["force difference / largest force"] < 2e-4
    assert row["speed ratio"] == pytest.approx(row["fairchem s"] / row["allscaip-lite s"])


def test_bench_of_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both sides of a batch of whole clusters, and how they compare."""
    sides = ["--compile"] if shutil.which("cc") else []
    rows = tmp_path / "rows.json"
    asked = ["--training", "--atoms", "50", "--rounds", "2", "--json", str(rows), *sides]
    assert main(asked) == 0
    (row,) = json.loads(rows.read_text())
    assert row["atoms"] == 42
    assert len(row) == 2 + len(sides)
    assert all(len(times) == 2 and min(times) > 0 for name, times in row.items() if name != "atoms")
    shown = capsys.readouterr().out
    assert "| 42 | " in shown and ("times" in shown) == bool(sides)
