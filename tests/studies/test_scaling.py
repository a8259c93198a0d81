"""The scaling study measures each cell once, goes on where it stopped, and makes its page."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from data.water.boxes import water_cluster
from docs.studies.scaling import run as study

MACHINE = {"device": "a processor", "threads": 1, "clock": "on the wall", "shared": False}


def row(atoms: int, side: str = "c", **found: Any) -> dict[str, Any]:
    found = found or {"seconds": atoms / 100, "fastest": 0.1, "graph": 0.05, "memory": 1.0}
    return {"cell": ["lite", "direct", side, atoms], **found, "machine": MACHINE}


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_a_cell_is_measured_once_and_kept(tmp_path: Path) -> None:
    results, page = tmp_path / "cpu.json", tmp_path / "page.md"
    command = ["--models", "lite", "--forces", "conservative", "--sides", "c", "--rounds", "1"]
    command += ["--json", str(results), "--page", str(page), "--atoms"]
    assert study.main([*command, "3"]) == 0
    (first,) = json.loads(results.read_text())
    assert first["cell"] == ["lite", "conservative", "c", 3]
    assert 0 < first["graph"] < first["seconds"] < 60 and 0.1 < first["memory"] < 4
    first["seconds"] = 1234.0
    results.write_text(json.dumps([first]))
    assert study.main([*command, "3"]) == 0  # nothing is left to do but the page
    assert json.loads(results.read_text()) == [first]
    assert "| lite | conservative | 3 | c | 1.23e+03 |" in page.read_text()
    assert page.with_name("cpu.png").exists()


def test_a_cell_that_is_too_slow_says_so_and_larger_ones_are_left_out(tmp_path: Path) -> None:
    results = tmp_path / "cpu.json"
    command = ["--models", "lite", "--forces", "direct", "--sides", "plain", "--limit", "0.01"]
    assert study.main([*command, "--atoms", "6", "3", "--json", str(results)]) == 0
    (found,) = json.loads(results.read_text())
    assert found["cell"][3] == 3 and found["failed"] == "more than 0.01 s"
    assert study.too_large(("lite", "direct", "plain", 6), [found])
    assert not study.too_large(("lite", "conservative", "plain", 6), [found])


def test_tables_tell_throughput_growth_and_where_the_square_takes_over() -> None:
    square = [
        row(n, seconds=n / 100 + n * n / 1e5, graph=0.0, memory=2.0) for n in (200, 600, 2000)
    ]
    assert study.crossing(square) == pytest.approx(1000)
    assert study.crossing(square[:2]) is None
    assert study.exponent([row(100), row(1000)]) == pytest.approx(1.0)
    shown = study.tables([row(600), row(63), row(63, "fairchem", failed="no memory")])
    lines = shown.splitlines()
    assert "| lite | direct | 63 | c | 0.63 | 0.58 | 100 | 0.14 | 1.00 | |" in lines
    assert any("fairchem" in line and "no memory" in line for line in lines)
    assert [line.split(" | ")[2] for line in lines[2:5]] == ["63", "63", "600"]
    assert "| lite | direct | c | 1.00 | – |" in lines


def test_mistakes_are_said_before_anything_is_measured() -> None:
    for arguments in (["--atoms", "2"], ["--rounds", "0"], ["--limit", "0"]):
        assert study.main(arguments) == 2


def test_the_clock_of_a_shared_machine() -> None:
    """Time of the processor, but only where it is the time that the work takes."""
    for shared, device, threads in ((True, "cpu", 1), (False, "cpu", 1), (True, "cpu", 2)):
        args = argparse.Namespace(shared=shared, device=device, threads=threads)
        assert study.works_alone(args) == (shared and threads == 1)


@pytest.mark.parametrize("forces", study.FORCES)
def test_esen_gives_an_energy_and_forces_and_notes_its_graphs(forces: str) -> None:
    pytest.importorskip("fairchem.core")
    args = argparse.Namespace(device="cpu", shared=False, threads=1)
    waters, graphs, step = water_cluster(3), [], 1e-2
    waters.info.update(charge=0, spin=1)
    waters.calc = study.esen(1, 2, forces, args, graphs)
    found = waters.get_forces()[4, 1]
    energies = []
    for shift in (step, -2 * step):
        waters.positions[4, 1] += shift
        energies.append(waters.get_potential_energy())
    slope = (energies[1] - energies[0]) / (2 * step)
    assert len(graphs) == 3
    assert (abs(found - slope) < 0.03 * abs(slope)) == (forces == "conservative")  # float32


def test_only_one_side_measures_esen() -> None:
    args = argparse.Namespace(
        models=["lite", "eSEN-sm"], forces=["direct"], atoms=[3], sides=["c", "fairchem"]
    )
    assert [cell[::2] for cell in study.cells(args)] == [
        ("lite", "c"),
        ("lite", "fairchem"),
        ("eSEN-sm", "fairchem"),
    ]
