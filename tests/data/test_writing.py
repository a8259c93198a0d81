"""Files are whole or not there, and a lock has one holder."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from allscaip_lite import cli, files
from allscaip_lite.data.batches import fill_batches
from allscaip_lite.errors import RunError
from allscaip_lite.files import (
    atomic_write,
    check_writable,
    differing,
    locked,
    locked_file,
    store_text,
    try_lock,
)
from allscaip_lite.tables import markdown_table


def test_a_write_that_fails_leaves_the_file_of_before(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    store_text(file, "before")
    with pytest.raises(KeyboardInterrupt), atomic_write(file) as partial:
        assert (partial.name, partial.exists()) == (file.name, False)
        partial.write_text("half")
        assert file.read_text() == "before"
        raise KeyboardInterrupt
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),  # of a write, which names no file
        RuntimeError("I/O error: No space left on device (os error 28)"),  # of safetensors
    ],
)
def test_a_full_disk_is_said_with_the_file_and_what_is_kept(
    tmp_path: Path, error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.txt"
    store_text(file, "before")

    def fail(args: object) -> None:
        with atomic_write(file):
            raise error

    stopped = "the same command starts again"
    assert cli.run_script(lambda parser: None, fail, "make.py", "", stopped, []) == 2
    said = capsys.readouterr().err
    assert said == f"make.py: {file}: No space left on device: free some space; {stopped}\n"
    assert file.read_text() == "before" and list(tmp_path.iterdir()) == [file]


def test_a_folder_in_the_place_of_a_file_is_said_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="it is a folder"), locked_file(tmp_path):
        pytest.fail("the work began")
    with pytest.raises(IsADirectoryError, match="it is a folder"), atomic_write(tmp_path):
        pytest.fail("the work began")


def test_a_file_does_not_take_the_place_of_a_device(tmp_path: Path) -> None:
    """Root could lose /dev/null."""
    os.mkfifo(tmp_path / "a")
    (tmp_path / "b").symlink_to("/dev/null")
    for name in ("a", "b"):
        with pytest.raises(FileExistsError, match="a device or a pipe"):
            store_text(tmp_path / name, "new")
        assert not (tmp_path / name).is_file()


def test_a_read_only_folder_is_said_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(files.os, "access", lambda path, mode: asked.append(path))
    for write in (atomic_write, locked_file):
        with pytest.raises(PermissionError, match="read-only"), write(tmp_path / "new" / "a.txt"):
            pytest.fail("the work began")
    assert asked == [tmp_path, tmp_path] and not list(tmp_path.iterdir())


def test_a_lock_that_cannot_be_made_is_said_with_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / ".lock").mkdir(parents=True)

    def run(args: object) -> None:
        with locked(tmp_path / "run"):
            pytest.fail("the work began")

    assert cli.run_script(lambda parser: None, run, "make.py", "", "", []) == 2
    assert capsys.readouterr().err == f"make.py: {tmp_path / 'run'}: Is a directory\n"


def test_a_file_in_the_place_of_a_folder_is_said_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(NotADirectoryError, match="a is no folder"):
        check_writable(tmp_path / "a" / "b.txt")


def test_what_a_killed_process_left_is_in_nobodys_way(tmp_path: Path) -> None:
    file = tmp_path / "new" / "a.txt"
    program = (
        "import os, sys\n"
        "from allscaip_lite.files import atomic_write\n"
        "with atomic_write(sys.argv[1]) as partial:\n"
        "    partial.write_text('half')\n"
        "    os._exit(1)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(file)], check=False)
    assert not file.exists() and list(file.parent.iterdir())
    store_text(file, "whole")
    assert file.read_text() == "whole"
    assert list(file.parent.iterdir()) == [file]


def test_a_lock_has_one_holder_at_a_time(tmp_path: Path) -> None:
    with try_lock(tmp_path / "lock") as first:
        with try_lock(tmp_path / "lock") as second:
            assert (first, second) == (True, False)
        with try_lock(tmp_path / "other") as other:
            assert other
    with try_lock(tmp_path / "lock") as again:
        assert again


def test_two_that_write_one_file_spoil_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second waits, then says so; the first one's file is whole."""
    file = tmp_path / "a.txt"
    monkeypatch.setattr(files, "WAIT", 0.2)
    with atomic_write(file) as partial:
        partial.write_text("first, ")
        with pytest.raises(RunError, match=f"another process works on {file}: wait for it"):
            store_text(file, "second")
        with partial.open("a") as stream:
            stream.write("and whole")
    assert file.read_text() == "first, and whole"
    store_text(file, "third")
    assert file.read_text() == "third" and list(tmp_path.iterdir()) == [file]


def test_who_waits_for_a_lock_gets_it(tmp_path: Path) -> None:
    order = []

    def second() -> None:
        with locked_file(tmp_path / "a.txt", wait=60):
            order.append("second")

    with locked_file(tmp_path / "a.txt"):
        waiting = threading.Thread(target=second)
        waiting.start()
        with pytest.raises(RunError, match="works on .*a.txt"), locked_file(tmp_path / "a.txt"):
            pass
        order.append("first")
    waiting.join()
    assert order == ["first", "second"] and not list(tmp_path.iterdir())


def test_a_lock_without_fcntl_is_that_of_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = []

    def locking(file: int, mode: int, count: int) -> None:
        if held:
            raise PermissionError
        held.append((mode, count))

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))
    with locked(tmp_path / "run"):
        assert held == [(2, 1)]
        with pytest.raises(RunError, match="another process works in"), locked(tmp_path / "run"):
            pass


def test_plans_differ_in_what_one_lacks_too() -> None:
    one, other = {"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 3, "d": 4}
    assert differing(one, other) == ["b", "c", "d"]
    assert differing(one, other, but=["c"]) == ["b", "d"]


def test_batches_are_filled_in_order_and_a_large_structure_is_alone() -> None:
    natoms = [3, 4, 3, 20, 1, 9, 1]
    assert list(fill_batches(natoms, 10)) == [[0, 1, 2], [3], [4, 5], [6]]
    assert list(fill_batches(natoms, 10, [6, 5, 0])) == [[6, 5], [0]]
    assert list(fill_batches([20, 1], 10)) == [[0], [1]]
    assert list(fill_batches([], 10)) == []


def test_a_table_in_markdown() -> None:
    text = "| | n |\n|---|---:|\n| a | 1 |\n| b | 2 |"
    assert markdown_table(["", "n"], [["a", 1], ["b", 2]]) == text
    assert markdown_table(["x", "y"], [], align="rl") == "| x | y |\n|---:|---|"
