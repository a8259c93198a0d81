"""How near the bundled models are to their labels: the card and the page of accuracy say so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from allscaip_lite import cli
from allscaip_lite.checkpoints.native import load_model, read_card
from allscaip_lite.data.aselmdb import Dataset
from allscaip_lite.evaluation import errors as evaluation

ROOT = Path(__file__).resolve().parents[2]


def test_lite_is_nearer_to_its_labels_than_gfn2_xtb_and_its_card_says_how_near():
    folder = ROOT / "data" / "omol-mini"
    model = load_model("lite", device="cpu").requires_grad_(False)
    for name, share in (("larger", 0.65), ("test", 0.8)):
        data = Dataset(folder / f"{name}.aselmdb")
        errors = [(w.xtb[1] - w.forces).ravel() for w in evaluation.describe(data)]
        found = evaluation.evaluate(model, data)
        assert found["force_mae"] < share * 1e3 * np.abs(np.concatenate(errors)).mean(), name
    # `found` is that of the test set now, on which the card was measured
    for name in ("energy_mae", "force_mae"):
        assert found[name] == pytest.approx(read_card("lite")["errors"]["all"][name], rel=0.01)


def test_the_tables_of_the_accuracy_page_are_those_of_the_command(
    capsys: pytest.CaptureFixture[str],
):
    page = (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8")

    def columns(lines: str, head: str) -> dict[str, list[float]]:
        table = lines[lines.index(head) :].partition("\n\n")[0].splitlines()[2:]
        rows = [line.strip("| ").split(" | ") for line in table]
        return {row[0]: [np.nan if n == "–" else float(n) for n in row[1:]] for row in rows}

    larger = str(ROOT / "data" / "omol-mini" / "larger.aselmdb")
    command = ["evaluate", "lite", larger, "--compare", "lite-local", "lite-xtb"]
    assert cli.main([*command, "--by", "molecule", "--device", "cpu"]) == 0
    printed = columns(capsys.readouterr().out, "| molecule |")
    written = columns(page, "| molecule |")
    assert printed.keys() == written.keys() and len(printed) == 9
    for molecule, numbers in printed.items():
        assert written[molecule] == pytest.approx(numbers, abs=1.01, nan_ok=True), molecule

    # of the larger table what needs no model: a card keeps what was measured
    described = evaluation.describe(Dataset(ROOT / "data" / "omol-mini" / "test.aselmdb"))
    domain = evaluation.GROUPS["domain"]
    xtb = evaluation.by_group(described, evaluation.xtb_residuals(described), domain)
    measured = {0: read_card("lite")["errors"], 1: read_card("lite-local")["errors"], 3: xtb}
    for group, numbers in columns(page, "| domain |").items():
        for column, rows in measured.items():
            errors = [rows[group]["force_mae"], rows[group]["energy_mae"]]
            assert [numbers[1 + column], numbers[5 + column]] == pytest.approx(errors, abs=0.51)
