"""The queue: whatever stops it, the same call goes on, loses one job at most, does none twice."""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from allscaip_lite.data.aselmdb import Dataset, checksum
from allscaip_lite.errors import RunError
from allscaip_lite.files import locked, unfinished_folder
from allscaip_lite.labels import LabelError, queue
from allscaip_lite.labels.queue import Job, collect, run_jobs, stored

JOBS = [
    *(Job(f"H2 {length}", f"job{length}", "train", length) for length in (0.6, 0.7, 0.8, 0.9)),
    Job("H2 1.0", "job1.0", "val", 1.0),
    Job("no length", "job0", "train", 0.0),
    Job("H2 1.1", "job1.1", "test", 1.1),
]
FOLDER = Path(__file__).parent
SCRIPT = """
import sys
import test_queue
from allscaip_lite.labels.queue import run_jobs
if __name__ == "__main__":
    work = getattr(test_queue, sys.argv[3])
    run_jobs(sys.argv[1], test_queue.JOBS, work, workers=int(sys.argv[2]))
"""
# Ctrl-C is heard where these tests run in the background too, which starts them deaf to it
NOTED_SCRIPT = """
import signal
import sys
from pathlib import Path
from test_queue import noted, noted_jobs
from allscaip_lite.labels.queue import run_jobs
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run_jobs(sys.argv[1], noted_jobs(Path(sys.argv[1])), noted, workers=sys.argv[2])
"""


def label(length: float) -> list[Atoms]:
    """H2 of some length; of none, an error."""
    if not length:
        raise LabelError("nothing to label")
    pair = Atoms("H2", [[0, 0, 0], [0, 0, length]], info={"label": "a method, version 2"})
    pair.calc = SinglePointCalculator(pair, energy=-length, forces=np.zeros((2, 3)))
    return [pair]


def label_two(length: float) -> list[Atoms]:
    """No end after the first two: a run is in its middle, however busy the machine is."""
    if length > 0.75:
        time.sleep(600)
    return label(length)


def kill_itself(length: float) -> list[Atoms]:
    if length == 0.8:
        time.sleep(0.5)  # until the next job waits at this worker
        os.kill(os.getpid(), signal.SIGKILL)
    return label(length)


def no_disk(length: float) -> list[Atoms]:
    raise OSError("no space left on device")


def noted_jobs(folder: Path) -> list[Job]:
    return [Job(f"H2 {i}", f"noted{i}", "train", (folder, 0.5 + i / 100)) for i in range(8)]


def noted(task: tuple[Path, float]) -> list[Atoms]:
    """After the first two, only once the file `.go` is there."""
    folder, length = task
    with folder.with_suffix(".log").open("a") as log:
        log.write(f"{length}\n")
    while length > 0.515 and not folder.with_suffix(".go").exists():
        time.sleep(0.01)
    return label(length)


def noted_with_a_kill(task: tuple[Path, float]) -> list[Atoms]:
    """The worker that has the third job first is killed when those before it are stored."""
    folder, length = task
    folder.with_suffix(".go").touch()
    structures = noted(task)
    if length == 0.52 and begun(folder)["0.52"] == 1:
        while not all((folder / f"noted{i}.aselmdb").exists() for i in range(2)):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return structures


def begun(folder: Path) -> Counter[str]:
    """How many times each job was begun."""
    return Counter(folder.with_suffix(".log").read_text().split())


def nothing(length: float) -> list[Atoms]:
    return []


def start(
    folder: Path, workers: int | str = 1, script: str = SCRIPT, work: str = "label"
) -> subprocess.Popen:
    arguments = [sys.executable, "-c", script, str(folder), str(workers), work]
    path = os.pathsep.join(filter(None, [str(FOLDER), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        arguments,
        env=os.environ | {"PYTHONPATH": path},
        cwd=FOLDER.parents[1],
        start_new_session=True,
        stderr=subprocess.PIPE,
    )


def lengths(data: Path) -> list[float]:
    return [round(atoms.get_distance(0, 1), 6) for atoms in Dataset(data)]


@pytest.mark.slow
def test_a_killed_run_goes_on_and_two_runs_share_the_work(tmp_path):
    store = tmp_path / "jobs"
    process = start(store, workers=2, work="label_two")
    while not list(store.glob("*.aselmdb")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.kill()  # the parent alone: its workers stop by themselves
    process.communicate()
    first = {path.name: path.stat().st_mtime_ns for path in store.glob("*.aselmdb")}
    assert 0 < len(first) < 6

    crews = [start(store) for _ in range(2)]
    for crew in crews:
        words = crew.communicate()[1].decode()
        assert crew.returncode == 0, words
    assert {path.stem for path in store.glob("*.failed")} == {"job0"}
    assert len(list(store.glob("*.aselmdb"))) == 6
    assert not list(store.glob("*.claim")) and not list(store.glob("*.partial"))
    for name, written in first.items():
        assert (store / name).stat().st_mtime_ns == written, "a job was done twice"


def test_collecting_writes_what_is_there_and_what_failed(tmp_path, capsys):
    store = tmp_path / "jobs"
    collect(store, JOBS, tmp_path)  # of a folder that is not there
    assert "7 of 7 jobs are not done" in capsys.readouterr().err
    run_jobs(store, JOBS[:2], label)
    collect(store, JOBS, tmp_path)
    assert lengths(tmp_path / "train.aselmdb") == [0.6, 0.7]
    assert not (tmp_path / "val.aselmdb").exists()
    assert "5 of 7 jobs are not done: another run" in capsys.readouterr().err

    (store / f"{JOBS[0].file}.failed").write_text("both")  # of another version of the method
    collect(store, JOBS, tmp_path)
    assert "5 of 7 jobs are not done" in capsys.readouterr().err
    (store / f"{JOBS[0].file}.failed").unlink()

    run_jobs(store, JOBS, label, workers=2)
    assert "7 of 7 jobs, 1 failed" in capsys.readouterr().err
    found = collect(store, JOBS, tmp_path)
    printed = capsys.readouterr()
    assert printed.out == "train: 4 structures\nval: 1 structures\ntest: 1 structures\n"
    assert "1 of 7 jobs failed" in printed.err and "not done" not in printed.err
    assert {split: len(structures) for split, structures in found.items()} == {
        "train": 4,
        "val": 1,
        "test": 1,
    }
    assert lengths(tmp_path / "train.aselmdb") == [0.6, 0.7, 0.8, 0.9]  # in the order of the jobs
    assert Dataset(tmp_path / "val.aselmdb")[0].info["entry"] == "H2 1.0"
    failed = json.loads((tmp_path / "failed.json").read_text())
    assert failed == {"no length": "LabelError: nothing to label"}
    sums = json.loads((tmp_path / "checksums.json").read_text())
    assert sums["train"] == checksum(Dataset(tmp_path / "train.aselmdb"))
    assert stored(store, JOBS[5]) == [] and len(stored(store, JOBS[0])) == 1


def test_runs_in_one_folder_collect_one_after_the_other(tmp_path, monkeypatch):
    store = tmp_path / "jobs"
    run_jobs(store, JOBS[:2], label)
    monkeypatch.setattr(queue, "COLLECTING", 0.1)
    with locked(tmp_path, ".collect.lock"), pytest.raises(RunError, match="another process"):
        collect(store, JOBS, tmp_path)
    monkeypatch.undo()
    others = [threading.Thread(target=collect, args=(store, JOBS, tmp_path)) for _ in range(4)]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert lengths(tmp_path / "train.aselmdb") == [0.6, 0.7]
    names = ["checksums.json", "failed.json", "jobs", "train.aselmdb"]
    assert sorted(os.listdir(tmp_path)) == names, "a lock or a part of a file is left"


def test_a_result_that_is_damaged_is_named_and_can_be_made_again(tmp_path):
    job = Job("pair", "job", "train", 0.7)
    (tmp_path / "job.aselmdb").write_bytes(b"cut")
    with pytest.raises(
        LabelError, match=r"job\.aselmdb.*remove .*job\.aselmdb, and its job is done"
    ):
        collect(tmp_path, [job], tmp_path / "out")


def test_a_job_without_structures_has_failed(tmp_path):
    run_jobs(tmp_path, JOBS[:1], nothing)
    collect(tmp_path, JOBS[:1], tmp_path)
    assert "no usable structure" in (tmp_path / "failed.json").read_text()


def test_a_worker_that_is_killed_loses_one_job(tmp_path):
    with pytest.raises(RunError, match="exit status -9"):
        run_jobs(tmp_path, JOBS[:4], kill_itself)
    assert {path.stem for path in tmp_path.glob("*.aselmdb")} == {"job0.6", "job0.7"}
    run_jobs(tmp_path, JOBS[:4], label)
    assert len(list(tmp_path.glob("*.aselmdb"))) == 4
    assert not list(tmp_path.glob("*.claim"))


def test_ctrl_c_ends_the_workers_and_keeps_what_is_done(tmp_path, monkeypatch):
    def interrupted(sentinels: list, timeout: float) -> None:
        if list(tmp_path.glob("*.aselmdb")):
            raise KeyboardInterrupt
        time.sleep(0.01)

    monkeypatch.setattr(queue, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_jobs(tmp_path, JOBS, label_two)
    assert 0 < len(list(tmp_path.glob("*.aselmdb"))) < 6
    assert not multiprocessing.active_children()


def test_an_error_that_is_no_job_s_own_ends_the_run(tmp_path, capfd):
    with pytest.raises(RunError, match="a worker died"):
        run_jobs(tmp_path, JOBS[:2], no_disk)
    said = capfd.readouterr().err
    assert "no space left" in said and "Traceback" not in said
    assert not list(tmp_path.glob("*.failed"))


def test_what_a_killed_worker_left_is_cleared_but_not_what_another_run_uses(tmp_path):
    run_jobs(tmp_path, JOBS[:1], label)
    for job in JOBS[:2]:
        (tmp_path / f"{job.file}.claim").touch()
        unfinished_folder(tmp_path / f"{job.file}.aselmdb").mkdir()
    run_jobs(tmp_path, JOBS[:1], label)
    done, other = (job.file for job in JOBS[:2])
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {f"{done}.aselmdb", f"{other}.claim", f".{other}.aselmdb.partial"}


def test_a_data_set_that_was_collected_is_taken_over(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    run_jobs(first / "jobs", JOBS[:3], label)
    collect(first / "jobs", JOBS[:3], first)
    more = {JOBS[4].name: label(1.0)}
    take_over = importlib.import_module("data.xtb.sets").take_over
    assert take_over(second / "jobs", JOBS, first, "a method", more) == 4
    assert take_over(second / "jobs", JOBS, first, "a method") == 0, "what is there stays"
    collect(second / "jobs", JOBS, second)
    sums = [json.loads((folder / "checksums.json").read_text()) for folder in (first, second)]
    assert sums[0]["train"] == sums[1]["train"]

    with pytest.raises(LabelError, match="no labels for this queue"):
        take_over(second / "jobs", JOBS, first, "another method")
    with pytest.raises(FileNotFoundError, match="--known takes the folder"):
        take_over(second / "jobs", JOBS, tmp_path / "none", "a method")


def test_a_folder_holds_one_plan(tmp_path):
    store_plan = importlib.import_module("data.xtb.sets").store_plan
    store_plan(tmp_path, {"seed": 0})
    store_plan(tmp_path, {"seed": 0})
    with pytest.raises(LabelError, match="another data set"):
        store_plan(tmp_path, {"seed": 1})


def wait_long(task: str) -> list[Atoms]:
    Path(task).write_text(str(os.getpid()))
    time.sleep(600)
    return []


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    """In the middle of a job, which may take hours."""
    program = (
        "import sys\nfrom test_queue import wait_long\n"
        "from allscaip_lite.labels.queue import Job, run_jobs\n"
        "if __name__ == '__main__':\n"
        "    run_jobs(sys.argv[1], [Job('a', 'a', 'train', sys.argv[2])], wait_long)\n"
    )
    (tmp_path / "run.py").write_text(program)
    mark = tmp_path / "pid"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "run.py", tmp_path / "jobs", mark],
        env={**os.environ, "PYTHONPATH": path},
    )
    while not (mark.exists() and mark.read_text()):
        assert parent.poll() is None
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    worker = int(mark.read_text())
    for _ in range(300):
        if not Path(f"/proc/{worker}").exists() or "Z" in Path(f"/proc/{worker}/stat").read_text():
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    raise AssertionError("the worker outlived its parent")


class Interrupting:
    """Ctrl-C comes while it is destroyed, where Python prints an error and goes on."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)
        time.sleep(0)


@pytest.fixture
def pythons_own_handler() -> Iterator[None]:
    """Of SIGINT, which other tests, and what they start in this process, may have replaced."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_is_not_lost_in_a_destructor(pythons_own_handler: None) -> None:
    with queue._interrupts_noted() as stop:
        Interrupting()
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):  # the second time, at once
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# --- A Dask cluster -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two workers, each a process of one thread; a new one takes the place of one that dies."""
    distributed = pytest.importorskip("distributed")
    options = {"threads_per_worker": 1, "dashboard_address": ":0"}
    with distributed.LocalCluster(n_workers=2, **options) as cluster:
        yield cluster


def test_a_dask_cluster_makes_the_same_files(tmp_path, cluster, capsys):
    for folder, workers in (("here", 1), ("there", cluster.scheduler_address)):
        run_jobs(tmp_path / folder / "jobs", JOBS, label, workers)
        collect(tmp_path / folder / "jobs", JOBS, tmp_path / folder)
    assert "7 of 7 jobs, 1 failed, 2 workers" in capsys.readouterr().err
    for name in ("checksums.json", "failed.json"):
        here, there = (json.loads((tmp_path / f / name).read_text()) for f in ("here", "there"))
        assert here and here == there
    names = [sorted(os.listdir(tmp_path / folder / "jobs")) for folder in ("here", "there")]
    assert names[0] == names[1], "a lock is left"


def test_a_dask_worker_that_is_killed_loses_one_job(tmp_path, cluster):
    folder = tmp_path / "jobs"
    run_jobs(folder, noted_jobs(folder), noted_with_a_kill, cluster.scheduler_address)
    assert len(list(folder.glob("*.aselmdb"))) == 8
    twice = [length for length, times in begun(folder).items() if times > 1]
    assert twice == ["0.52"] and begun(folder).total() == 9


def test_a_job_that_kills_every_dask_worker_is_named_and_the_others_done(tmp_path, cluster):
    """Dask blames a job that only waited at these workers too: it is tried once more, alone."""
    with pytest.raises(RunError, match="every worker that tried H2 0.8 died"):
        run_jobs(tmp_path, JOBS, kill_itself, cluster.scheduler_address)
    assert len(list(tmp_path.glob("*.aselmdb"))) == 5
    assert {path.stem for path in tmp_path.glob("*.failed")} == {"job0"}


def test_runs_share_a_dask_cluster_and_go_on_there(tmp_path, cluster):
    """Two at once; before them one that Ctrl-C stopped: it loses the jobs that it had sent, one for
    each of the two workers and one that waited there.
    """
    folder, file = tmp_path / "jobs", tmp_path / "scheduler.json"
    file.write_text(json.dumps({"address": cluster.scheduler_address}))
    run = start(folder, str(file), NOTED_SCRIPT)
    while not list(folder.glob("*.aselmdb")):
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    run.communicate()
    first = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.aselmdb")}
    assert 0 < len(first) < 3
    folder.with_suffix(".go").touch()

    runs = [start(folder, str(file), NOTED_SCRIPT) for _ in range(2)]
    for run in runs:
        words = run.communicate()[1].decode()
        assert run.returncode == 0, words
    assert len(list(folder.glob("*.aselmdb"))) == 8
    for name, written in first.items():
        assert (folder / name).stat().st_mtime_ns == written, "a job was done twice"
    counts = begun(folder)
    assert len(counts) == 8 and counts.total() <= 8 + 3


def test_an_error_that_is_no_job_s_own_ends_a_run_on_dask(tmp_path, cluster):
    with pytest.raises(OSError, match="no space left"):
        run_jobs(tmp_path, JOBS, no_disk, cluster.scheduler_address)
    assert not list(tmp_path.glob("*.failed"))
    run_jobs(tmp_path, JOBS, label, cluster.scheduler_address)  # no claim is left


def test_a_dask_scheduler_that_ends_or_has_workers_of_many_threads_or_is_none(tmp_path):
    distributed = pytest.importorskip("distributed")
    options = {"n_workers": 1, "dashboard_address": ":0"}
    with (
        distributed.LocalCluster(threads_per_worker=2, **options) as cluster,
        pytest.raises(RunError, match="has 2 threads.*--nthreads 1"),
    ):
        run_jobs(tmp_path, JOBS, label, cluster.scheduler_address)
    with pytest.raises(RunError, match="no Dask scheduler answers at nowhere: missing port"):
        run_jobs(tmp_path, JOBS, label, "nowhere")
    cluster = distributed.LocalCluster(threads_per_worker=1, **options)

    def close_after_the_first() -> None:
        while not list((tmp_path / "jobs").glob("*.aselmdb")):
            time.sleep(0.01)
        cluster.close()

    threading.Thread(target=close_after_the_first, daemon=True).start()
    with pytest.raises(RunError, match="has ended; the same command goes on"):
        run_jobs(tmp_path / "jobs", noted_jobs(tmp_path), noted, cluster.scheduler_address)
    assert 0 < len(list((tmp_path / "jobs").glob("*.aselmdb"))) < 8


def test_one_option_or_the_other_says_who_works():
    parser = argparse.ArgumentParser()
    queue.add_workers(parser)
    assert parser.parse_args([]).workers == 1
    assert parser.parse_args(["--workers", "3"]).workers == 3
    assert parser.parse_args(["--scheduler", "tcp://host:8786"]).workers == "tcp://host:8786"
    with pytest.raises(SystemExit):
        parser.parse_args(["--workers", "3", "--scheduler", "tcp://host:8786"])
