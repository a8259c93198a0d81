"""What git keeps: notebooks without outputs, no machine's paths, weights and sample data."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def git(*arguments: str) -> list[str]:
    """Lines that a git command prints in the repository; skips outside a checkout."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return run.stdout.splitlines()


def repository_files() -> list[Path]:
    """Files that are, or could be, committed."""
    names = git("ls-files", "--cached", "--others", "--exclude-standard")
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def test_committed_notebooks_carry_no_outputs():
    # The index is read, not the working tree: whoever runs a notebook may also run the tests.
    dirty = []
    for name in git("ls-files", "*.ipynb"):
        notebook = json.loads("\n".join(git("show", f":{name}")))
        code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        if any(cell["outputs"] or cell["execution_count"] is not None for cell in code):
            dirty.append(name)
    assert not dirty, f"clear the outputs of {dirty} before committing"


def test_no_file_mentions_a_machine_or_a_registry():
    slash = "/"  # kept apart, so that this file passes its own test
    machine = rf"(?<![\w.~}}-]){slash}(?:work|root|home|Users|opt){slash}\w"
    registry = r"pypi\.(?:org|python)|pythonhosted\.|registry\.npmjs|download\.pytorch"
    pattern = re.compile(rf"{machine}|{registry}")
    found = []
    for path in repository_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # weights and data
        for number, line in enumerate(text.splitlines(), start=1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert not found, "\n".join(found)


def test_weights_and_sample_data_are_not_ignored_by_git():
    committed = ["allscaip_lite/weights/lite.safetensors", "data/sample/train.aselmdb"]
    made = ["data/generated/train.aselmdb", "runs/first/state.pt"]
    # With these options every path is answered by one line, which starts with "::" for no rule.
    lines = git("check-ignore", "--no-index", "--verbose", "--non-matching", *committed, *made)
    # A rule that begins with ! takes back an earlier one.
    ignored = [line.split("\t")[1] for line in lines if not re.match(r"::|[^:]*:\d+:!", line)]
    assert ignored == made
