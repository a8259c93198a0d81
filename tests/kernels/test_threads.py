"""PyTorch uses as many threads as the work is worth, unless the user has chosen."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
from ase.build import molecule

from allscaip_lite import machine
from allscaip_lite.kernels import choose
from allscaip_lite.machine import ATOMS_PER_THREAD, OtherPrograms, threads_for


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of eight cores without other programs, on which the user has chosen nothing."""
    for name in machine.THREADS_OF_USER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(machine, "STARTED_WITH", 8)
    monkeypatch.setattr(machine, "_cores", lambda: 8)
    monkeypatch.setattr(machine.OTHERS, "found", 0.0)
    before = torch.get_num_threads()
    torch.set_num_threads(8)
    yield
    torch.set_num_threads(before)


def threads_within(atoms: int) -> int:
    with threads_for(atoms):
        return torch.get_num_threads()


def test_more_atoms_more_threads(eight: None) -> None:
    sizes = (1, ATOMS_PER_THREAD, 2 * ATOMS_PER_THREAD, 100 * ATOMS_PER_THREAD)
    assert [threads_within(atoms) for atoms in sizes] == [1, 1, 2, 8]
    assert torch.get_num_threads() == 8  # as before


def test_cores_that_others_use_are_left_to_them(
    eight: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = 100 * ATOMS_PER_THREAD
    for busy, expected in ((0.2, 8), (1.0, 7), (6.6, 1), (20.0, 1)):
        monkeypatch.setattr(machine.OTHERS, "found", busy)
        assert threads_within(many) == expected


@pytest.mark.parametrize("way", [*machine.THREADS_OF_USER, "set_num_threads"])
def test_the_choice_of_the_user_stands(
    eight: None, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    if way == "set_num_threads":
        torch.set_num_threads(4)
    else:
        monkeypatch.setenv(way, "8")
    assert threads_within(1) == (4 if way == "set_num_threads" else 8)


def test_predictions_and_only_they_change_the_number(eight: None, make_model) -> None:
    model, seen = make_model(), []
    model.operations = choose("plain")
    model.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    water = molecule("H2O")
    water.info.update(charge=0, spin=1)
    model.predict(water)
    assert seen == [1] and torch.get_num_threads() == 8


def test_load_of_other_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the kernel's counters while we work: the busy time of all cores, less our own."""
    clock = {"now": 0.0, "busy": 0.0, "own": 0.0}
    monkeypatch.setattr(machine.time, "monotonic", lambda: clock["now"])
    monkeypatch.setattr(machine.time, "process_time", lambda: clock["own"])
    monkeypatch.setattr(machine, "_busy", lambda: clock["busy"])
    monkeypatch.setattr(machine, "_running", lambda: 3)
    others = OtherPrograms()
    assert others.found == 2  # three run, one of them this one
    for _ in range(2):
        with others.watched():
            clock["now"] += 0.3
            clock["own"] += 0.2
            clock["busy"] += 0.35
        clock["now"] += 100  # between two pieces of work nothing is measured
        clock["busy"] += 500
    assert others.found == pytest.approx(0.15 / 0.3)


@pytest.mark.skipif(not machine.Path("/proc/stat").exists(), reason="Linux counts so")
def test_the_counters_of_the_kernel_are_read() -> None:
    before, until = machine._busy(), machine.time.process_time() + 0.3
    while machine.time.process_time() < until:
        pass
    assert machine._busy() - before > 0.2
    assert machine._running() >= 1


FORKS = """
import os, torch
from ase import Atoms
from allscaip_lite import load_model
torch.set_num_threads(2)
model = load_model("lite", kernels="torch")
water = Atoms("OH2", [(0, 0, 0), (0.8, 0, 0.6), (-0.8, 0, 0.6)], info={"charge": 0, "spin": 1})
model.predict([water] * 60)
child = os.fork()
model.predict([water] * 60)
if not child:
    os._exit(0)
print("status", os.waitpid(child, 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_process_does_not_wait_for_the_threads_of_its_parent() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", FORKS], stdout=subprocess.PIPE, start_new_session=True
    ) as parent:
        try:
            said = parent.communicate(timeout=300)[0]
        finally:
            with suppress(ProcessLookupError):
                os.killpg(parent.pid, signal.SIGKILL)  # the child too
    assert b"status 0" in said


FAULTS = """
import resource, sys
import torch
from allscaip_lite import kernels

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

kernels.choose("torch")
for _ in range(3):  # ten blocks of 8 MB, all freed in the end
    before = faults()
    blocks = [torch.ones(2**21) for _ in range(10)]
    del blocks
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc")
@pytest.mark.parametrize("chosen", [{}, {"MALLOC_TRIM_THRESHOLD_": "100000"}])
def test_freed_memory_is_kept_unless_the_user_has_chosen(chosen: dict[str, str]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **chosen}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, check=True
    )
    pages = 10 * 2**23 // os.sysconf("SC_PAGE_SIZE")
    assert (int(done.stdout) > pages / 2) == bool(chosen)
