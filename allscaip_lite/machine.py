"""What a result is computed on: names of processors, and how many threads are worth using.

PyTorch starts one thread for each core. They wait for each other in a loop at the end of every
operation: on a few atoms that takes longer than the work, and on a machine whose cores are busy it
takes many times longer.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from allscaip_lite.errors import InputError

ATOMS_PER_THREAD = 50  # fewer are not worth a thread (measured: docs/speed.md)
STARTED_WITH = torch.get_num_threads()
THREADS_OF_USER = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # environment variables
MALLOC_TRIM_THRESHOLD, MALLOC_MMAP_THRESHOLD = -1, -3  # parameters of mallopt, from malloc.h
KEPT_MEMORY = 2**30  # bytes that stay free at the end of the heap
MAPPED_ALONE = 2**25  # bytes of a block that is given back; older glibc takes no more
PERIOD = 0.5  # s of work over which the load of other programs is averaged

if hasattr(os, "register_at_fork"):  # a forked process has no threads, and would wait for them
    os.register_at_fork(after_in_child=functools.partial(torch.set_num_threads, 1))


def processor_name() -> str:
    """What the maker calls this processor, where the system tells; else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


@functools.cache
def keep_freed_memory() -> None:
    """Let this process keep memory that was freed, for the tensors of the next call.

    The C library of Linux (glibc) gives large blocks back to the system, which has to clear them
    before they are used again: an eighth of the time of a small call (docs/speed.md). The settings
    are of the whole process. Where the user has chosen, by `GLIBC_TUNABLES` or a variable
    `MALLOC_…_`, and on other systems, nothing changes.
    """
    chosen = any(name.startswith("MALLOC_") for name in os.environ)
    if platform.libc_ver()[0] == "glibc" and not chosen and "GLIBC_TUNABLES" not in os.environ:
        library = ctypes.CDLL(None)
        library.mallopt(MALLOC_TRIM_THRESHOLD, KEPT_MEMORY)
        library.mallopt(MALLOC_MMAP_THRESHOLD, MAPPED_ALONE)


@contextmanager
def threads_for(atoms: int) -> Iterator[None]:
    """Within it, PyTorch uses as many threads as the work on a batch of so many atoms deserves.

    That is one for `ATOMS_PER_THREAD` atoms, and no more than there are idle cores. Where the user
    has chosen, by `OMP_NUM_THREADS`, `MKL_NUM_THREADS` or `torch.set_num_threads`, nothing changes.
    """
    before = torch.get_num_threads()
    chosen = before != STARTED_WITH or any(name in os.environ for name in THREADS_OF_USER)
    worth = max(1, atoms // ATOMS_PER_THREAD)
    if chosen or before == 1:
        yield
    elif worth == 1:
        with _threads(1, before):
            yield
    else:
        idle = max(1, int(_cores() - OTHERS.found + 0.3))
        with OTHERS.watched(), _threads(min(before, worth, idle), before):
            yield


@contextmanager
def _threads(number: int, before: int) -> Iterator[None]:
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity else os.cpu_count() or 1


class OtherPrograms:
    """How many cores other programs use while this one works.

    Programs of low priority do not count. Linux only: elsewhere it is 0.

    found: cores, averaged over the last `PERIOD` of work; at first, of this moment.
    """

    def __init__(self) -> None:
        self.found = max(0.0, _running() - 1)
        self.sums = [0.0, 0.0]  # s of work, and of the other programs meanwhile

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within it the work is done."""
        started, others = time.monotonic(), _busy() - time.process_time()
        try:
            yield
        finally:
            self.sums[0] += time.monotonic() - started
            self.sums[1] += _busy() - time.process_time() - others
            if self.sums[0] > PERIOD:
                self.found = max(0.0, self.sums[1] / self.sums[0])
                self.sums = [0.0, 0.0]


def _running() -> int:
    """Threads that run or wait for a core, this one among them."""
    try:
        return int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0])
    except (OSError, ValueError):
        return 1


def _busy() -> float:
    """s that all cores together have worked since the start, on what is not of low priority."""
    try:
        user, _, system = Path("/proc/stat").read_text().split(maxsplit=4)[1:4]
    except (OSError, ValueError):
        return 0.0
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


OTHERS = OtherPrograms()


def usable_device(name: torch.device | str | None = None) -> torch.device:
    """The device of a name such as cpu, cuda or cuda:1; `InputError` for one that is not here.

    Without a name it is a CUDA GPU where there is one, else the CPU.
    """
    try:
        if name is None:
            name = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(name)
        torch.empty(1, device=device).tolist()
    except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:  # in many words
        here = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise InputError(
            f"device {str(name)!r} is not here, or PyTorch cannot use it: there is "
            f"{', '.join(here)}"
        ) from error
    return device
