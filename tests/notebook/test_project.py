"""The starting point of the course's project: three rows, an error for each seed."""

from __future__ import annotations

import re

import pytest

from notebooks import project


def test_it_prints_a_row_for_each_variant_and_an_error_for_each_seed(capsys):
    assert project.main(["--steps", "2", "--seeds", "0", "3", "--structures", "30"]) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0][2:] for line in table[1:]] == list(project.VARIANTS)
    assert len(project.VARIANTS) == 3
    for line in table[1:]:
        energies, forces = (re.findall(r"\d+", cell) for cell in line.split(" | ")[2:])
        assert len(energies) == len(forces) == 2
        assert energies[0] != energies[1], "two seeds gave one model"


def test_the_rows_are_different_models():
    configs = [project.SMALL.replace(**changes) for changes in project.VARIANTS.values()]
    assert len({repr(config) for config in configs}) == 3


@pytest.mark.parametrize("word", ["seed", "control", "points"])
def test_the_rubric_is_in_the_page_for_teachers(word):
    page = (project.Path(project.__file__).parents[1] / "docs" / "teaching.md").read_text("utf-8")
    assert word in page[page.index("## The project") :]
