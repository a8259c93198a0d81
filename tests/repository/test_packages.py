"""What the source and binary distributions hold; hatchling builds them, without a network."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from allscaip_lite import __version__

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def build(kind: str, folder: Path) -> Path:
    """The file of a distribution, `sdist` or `wheel`, built into a folder."""
    pytest.importorskip("hatchling", reason="needs hatchling: pip install hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "--target", kind, "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)
    [file] = folder.iterdir()
    return file


def test_the_source_distribution_holds_what_git_keeps(tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    kept = {name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()}
    with tarfile.open(build("sdist", tmp_path)) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert not kept - held


def test_the_wheel_works_alone(tmp_path):
    with zipfile.ZipFile(build("wheel", tmp_path / "dist")) as archive:
        folders = {name.partition("/")[0] for name in archive.namelist()}
        assert folders == {"allscaip_lite", f"allscaip_lite-{__version__}.dist-info"}
        archive.extractall(tmp_path / "site")
    code = (
        "import allscaip_lite; from ase.build import molecule; print(allscaip_lite.__file__); "
        "print(allscaip_lite.load_model('lite').predict([molecule('H2O')])[0].energy)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=True,
    )
    file, energy = run.stdout.split()
    assert Path(file).is_relative_to(tmp_path)
    assert float(energy) < 0
