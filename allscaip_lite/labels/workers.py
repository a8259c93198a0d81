"""Long lists of small jobs on many cores: `in_processes`.

In: a function and its tasks, which must pickle. Out: its results, in the order of the tasks. The
workers are new processes of one thread each: sums over threads come out in any order, and the same
job shall give the same numbers; the numerical libraries read that when they are loaded.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def in_processes(
    work: Callable[[Task], Result], tasks: Sequence[Task], workers: int
) -> Iterator[Result]:
    """`work(task)` of each task, in `workers` processes. Ctrl-C is left to the parent: a worker
    finishes its job. A script that calls this needs the usual `if __name__ == "__main__"`."""
    one_thread_each()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=ignore_interrupt) as pool:
        yield from pool.map(work, tasks)


def one_thread_each() -> None:
    """For the processes that are started from here on."""
    os.environ |= dict.fromkeys(THREADS, "1")


def ignore_interrupt() -> None:
    """Ctrl-C reaches the whole group of processes; the parent alone says what to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
