"""A queue of jobs that can be stopped at any time and goes on where it was.

In: jobs, and a function that turns the task of a job into labelled structures. Out: one file for
each job in the queue's folder, and `collect` writes the data set from them: `train.aselmdb`, ...,
`failed.json` and `checksums.json`.

A job that is done is not done again. A process that is killed loses the job it was working on and
nothing else. Several runs may share one folder of one machine. The workers are processes of this
machine, or those of a Dask cluster, which need not see the folder: results come back from there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ase import Atoms
from tqdm import tqdm

from allscaip_lite.data.aselmdb import SPLITS, Dataset, checksum, write_aselmdb
from allscaip_lite.errors import DataError, RunError
from allscaip_lite.files import locked, store_text, try_lock, unfinished_folder
from allscaip_lite.labels import LabelError

Work = Callable[[Any], list[Atoms]]
Notes = Generator[str, None, None]
Workers = int | str  # processes here, or the scheduler of a Dask cluster: its address or its file
COLLECTING = 600.0  # seconds, for another run that writes the data set
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Job:
    """One entry of a queue.

    Attributes:
        name: What the job is called in `failed.json` and in `info["entry"]` of its structures.
        file: Name of its result in the queue's folder, without the suffix.
        split: The file that its structures are collected into, such as "train".
        task: What the working function gets; it must pickle.
    """

    name: str
    file: str
    split: str
    task: Any


def add_workers(parser: argparse.ArgumentParser) -> None:
    """The options `--workers` and `--scheduler`, either of which is `args.workers`."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--workers", type=int, default=1, help="processes of this machine, one core each"
    )
    group.add_argument(
        "--scheduler",
        dest="workers",
        default=argparse.SUPPRESS,
        metavar="ADDRESS",
        help="instead, the workers of a Dask cluster: the address of its scheduler, such as "
        "tcp://HOST:8786, or its scheduler file",
    )


def run_jobs(
    folder: str | os.PathLike[str], jobs: Sequence[Job], work: Work, workers: Workers = 1
) -> None:
    """Do all jobs that are not done yet, and show how many are.

    `work(job.task)` returns the labelled structures, which go to `{job.file}.aselmdb`. A job that
    fails leaves `{job.file}.failed` with the reason, and is not tried again until that file is
    deleted. Ctrl-C ends the run; the same call goes on from there.

    The workers have one thread each, since sums over threads come out in any order and the same job
    shall give the same numbers. Those of this machine are new processes, and a script that calls
    this needs the usual `if __name__ == "__main__"`. Those of a Dask cluster come and go while the
    run lasts; when one dies, another does its job again.

    Args:
        folder: Where the results are kept; several runs may use it at once.
        jobs: What there is to do.
        work: Makes the structures of one job; a function of a module, so that it pickles.
        workers: Number of processes, or the address of a Dask scheduler, or its scheduler file.

    Raises:
        RunError: A worker died, there is none, or no scheduler answers.
    """
    if isinstance(workers, int) and workers < 1:
        raise RunError(f"{workers} workers do no job: give 1 or more")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    every = 1 if sys.stderr.isatty() else 30  # seconds
    layout = "{n_fmt} of {total_fmt} jobs{postfix} {bar:20} {elapsed}, {remaining} left"
    done = _count(folder, jobs)[0]
    if isinstance(workers, int):
        progress = _by_processes(folder, jobs, work, workers)
    else:
        progress = _by_dask(folder, jobs, work, workers)
    with (
        tqdm(total=len(jobs), initial=done, bar_format=layout, mininterval=every) as bar,
        closing(progress),
    ):
        for note in progress:
            done, failed = _count(folder, jobs)
            notes = [f"{failed} failed" if failed else "", note]
            bar.set_postfix_str(", ".join(filter(None, notes)), refresh=False)
            bar.update(done - bar.n)
        bar.refresh()
    for job in jobs:
        stem = folder / job.file
        if is_done(stem):
            _path(stem, "claim").unlink(missing_ok=True)
            shutil.rmtree(unfinished_folder(_path(stem, "aselmdb")), ignore_errors=True)


def _by_processes(folder: Path, jobs: Sequence[Job], work: Work, workers: int) -> Notes:
    """Do the jobs in processes of this machine; now and then, an empty note."""
    # for the processes that start from here on: numerical libraries read it at import
    os.environ |= dict.fromkeys(THREADS, "1")
    context = multiprocessing.get_context("spawn")
    arguments = (folder, list(jobs), work)
    crew = [context.Process(target=_do_all, args=arguments, daemon=True) for _ in range(workers)]
    try:
        for process in crew:
            process.start()
        while any(process.is_alive() for process in crew):
            wait([process.sentinel for process in crew if process.is_alive()], timeout=1)
            yield ""
    finally:
        for process in crew:
            if process.is_alive():
                process.terminate()
                process.join()
    if any(process.exitcode for process in crew):
        codes = ", ".join(str(process.exitcode) for process in crew)
        raise RunError(
            f"a worker died (exit status {codes}: its message is above, or -9, often too "
            "little memory); the same command goes on from here"
        )


def _by_dask(folder: Path, jobs: Sequence[Job], work: Work, scheduler: str) -> Notes:
    """Have the workers of a Dask cluster do the jobs; now and then, a note how many there are.

    This process claims a job before it sends it, and stores what comes back. It sends few more jobs
    than there are workers: these keep none of them busy, but tell an adaptive cluster to grow.
    """
    import distributed
    from distributed.comm.core import CommClosedError

    place = "scheduler_file" if Path(scheduler).is_file() else "address"
    try:
        client = distributed.Client(**{place: scheduler})
    except (OSError, ValueError) as error:
        raise RunError(f"no Dask scheduler answers at {scheduler}: {error}") from error
    sent: dict[distributed.Future[Any], tuple[Job, ExitStack]] = {}
    left, noted = _claimed(folder, jobs), 0.0
    suspects: list[Job] = []  # their workers died: of them, or of another job there
    alone: list[Job] = []  # so they are tried again, one at a time
    killed: list[str] = []
    with client, _interrupts_noted() as stop:
        try:
            while not stop.is_set():
                threads = client.nthreads().values()
                if (most := max(threads, default=1)) > 1:
                    raise RunError(
                        f"a Dask worker at {scheduler} has {most} threads, and each job needs a "
                        "process: start workers with --nthreads 1, and --nworkers for more"
                    )
                room = len(threads) + len(threads) // 4 + 1 - len(sent)
                more = list(itertools.islice(left, max(0, room)))
                if not sent and not more:
                    more = list(itertools.islice(_claimed(folder, suspects), 1))
                    alone += [job for job, _ in more]
                    suspects = [job for job in suspects if job not in alone]
                for job, claim in more:
                    sent[client.submit(work, job.task, pure=False)] = job, claim
                if not sent:
                    break
                with suppress(TimeoutError):
                    distributed.wait(list(sent), timeout=1, return_when="FIRST_COMPLETED")
                for future in [future for future in sent if future.done()]:
                    job, claim = sent.pop(future)
                    with claim:
                        try:
                            _do(job, folder / job.file, lambda _: future.result())
                        except distributed.KilledWorker:
                            killed.append(job.name) if job in alone else suspects.append(job)
                    future.release()  # or a worker that dies with it has it computed again
                if not sent or time.monotonic() > noted + 1:  # to count takes as long as to store
                    yield f"{len(threads)} workers"
                    noted = time.monotonic()
        except (CancelledError, CommClosedError) as error:
            raise RunError(
                f"the Dask scheduler at {scheduler} has ended; the same command goes on from here"
            ) from error
        finally:
            for _, claim in sent.values():
                claim.close()
    if stop.is_set():
        raise KeyboardInterrupt
    if killed:
        raise RunError(
            f"every worker that tried {', '.join(killed)} died, often of too little memory; "
            "the same command tries again"
        )


@contextmanager
def _interrupts_noted() -> Iterator[threading.Event]:
    """Ctrl-C sets an event, and stops at once when it comes again. Python would raise it wherever
    the process is, and where that is a destructor of Dask's it would only be printed.
    """
    stop = threading.Event()

    def note(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stop.set()

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield stop
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _path(stem: Path, kind: str) -> Path:
    """A job's file of a kind: aselmdb (its result), failed (the reason), claim (a lock)."""
    return stem.with_name(f"{stem.name}.{kind}")


def is_done(stem: Path) -> bool:
    """Whether a job, whose files in the queue's folder begin with `stem`, is done or has failed."""
    return _path(stem, "aselmdb").exists() or _path(stem, "failed").exists()


def _count(folder: Path, jobs: Sequence[Job]) -> tuple[int, int]:
    """How many jobs are done, and how many of these have failed; none where there is no folder."""
    names = set(os.listdir(folder)) if folder.exists() else set()
    failed = {job.file for job in jobs if f"{job.file}.failed" in names}
    return len(failed | {job.file for job in jobs if f"{job.file}.aselmdb" in names}), len(failed)


def _do_all(folder: Path, jobs: Sequence[Job], work: Work) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    try:
        for job, claim in _claimed(folder, jobs):
            with claim:
                _do(job, folder / job.file, work)
    except OSError as error:  # a full disk, a folder that is read-only
        sys.exit(str(error))


def _claimed(folder: Path, jobs: Sequence[Job]) -> Iterator[tuple[Job, ExitStack]]:
    """The jobs that are not done and that nobody works on, each with its lock, to be closed."""
    for job in jobs:
        stem = folder / job.file
        if is_done(stem):
            continue
        with ExitStack() as claim:
            if claim.enter_context(try_lock(_path(stem, "claim"))) and not is_done(stem):
                yield job, claim.pop_all()


def end_with_parent() -> None:
    """End this process as soon as the one that started it by `multiprocessing` does, however."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch(sentinel: int) -> None:
        wait([sentinel])  # a pipe, which the system closes
        os._exit(1)

    threading.Thread(target=watch, args=(parent.sentinel,), daemon=True).start()


def _do(job: Job, stem: Path, work: Work) -> None:
    try:
        structures = work(job.task)
        if not structures:
            raise LabelError("no usable structure was made")
        write_aselmdb(_path(stem, "aselmdb"), structures)
    except (ArithmeticError, RuntimeError, ValueError) as error:
        # One odd structure must not end a run of days; a full disk or a missing library does.
        store_text(_path(stem, "failed"), f"{job.name}\n{type(error).__name__}: {error}\n")


def collect(
    folder: str | os.PathLike[str],
    jobs: Sequence[Job],
    out: str | os.PathLike[str],
    splits: Sequence[str] = SPLITS,
    files: Mapping[str, Path] = MappingProxyType({}),
) -> dict[str, list[Atoms]]:
    """Write `{split}.aselmdb` of the jobs that are done so far, and print how many structures.

    Beside them: `failed.json`, the jobs that failed and why, and `checksums.json`, one for each
    split, by which two runs are compared. The order is that of the jobs, so the same results give
    the same files. Of several runs in one folder each waits for the one that collects.

    Args:
        folder: The queue's folder, as `run_jobs` had it.
        jobs: The jobs, those of the given splits and others.
        out: Folder of the data set.
        splits: Which splits are written.
        files: What they are written to, where it is not `{split}.aselmdb` in `out`.

    Returns:
        The structures of each split; `info["entry"]` is the name of their job.
    """
    with locked(out, ".collect.lock", wait=COLLECTING):
        return _collect(Path(folder), jobs, Path(out), splits, files)


def _collect(
    folder: Path, jobs: Sequence[Job], out: Path, splits: Sequence[str], files: Mapping[str, Path]
) -> dict[str, list[Atoms]]:
    found: dict[str, list[Atoms]] = {split: [] for split in splits}
    labels: Counter[str] = Counter()
    failed, checksums = {}, {}
    for job in jobs:
        stem = folder / job.file
        if _path(stem, "failed").exists():
            text = _path(stem, "failed").read_text()
            failed[job.name] = (text.partition("\n")[2] or text).strip()
        elif job.split in found:
            for atoms in stored(folder, job):
                atoms.info["entry"] = job.name
                labels[atoms.info.get("label", "an unknown method")] += 1
                found[job.split].append(atoms)
    for split, structures in found.items():
        if structures:
            file = files.get(split, out / f"{split}.aselmdb")
            write_aselmdb(file, structures, overwrite=True)
            checksums[split] = checksum(structures)
        print(f"{split}: {len(structures)} structures")
    store_text(out / "failed.json", json.dumps(failed, indent=1))
    store_text(out / "checksums.json", json.dumps(checksums, indent=1))
    if left := len(jobs) - _count(folder, jobs)[0]:
        print(
            f"{left} of {len(jobs)} jobs are not done: another run has them, or stopped there",
            file=sys.stderr,
        )
    if failed:
        message = f"{len(failed)} of {len(jobs)} jobs failed: see {out / 'failed.json'}"
        print(message, file=sys.stderr)
    if len(labels) > 1:
        listed = ", ".join(f"{label} ({count})" for label, count in labels.items())
        print(f"labels of several methods or versions in one set: {listed}", file=sys.stderr)
    return found


def stored(folder: str | os.PathLike[str], job: Job) -> list[Atoms]:
    """The structures of one job; none if it is not done or has failed."""
    path = Path(folder) / f"{job.file}.aselmdb"
    if not path.exists():
        return []
    try:
        data = Dataset(path)
        return [data[index] for index in range(len(data))]
    except DataError as error:
        raise LabelError(f"{error}; or remove {path}, and its job is done again") from error
