"""Files with random changes: each is read, or refused by an error that names it; none ends a
process, fills the memory or takes for ever."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator

from allscaip_lite.checkpoints import load_model, save_model
from allscaip_lite.checkpoints.official import save_official
from allscaip_lite.config import AllScAIPConfig
from allscaip_lite.data.aselmdb import Dataset, write_aselmdb
from allscaip_lite.errors import InputError
from allscaip_lite.model import AllScAIP

MUTATIONS = 60  # of each kind of file
SECONDS = 20  # of the processor, for one file
MEMORY = 1 << 30  # bytes more than the process has


def labelled(number: int) -> Atoms:
    atoms = molecule("CH3OH", info={"charge": 0, "spin": 1, "list": [1, 2.5, "text", number]})
    atoms.calc = SinglePointCalculator(atoms, energy=-float(number), forces=np.zeros((6, 3)))
    return atoms


def read_all(file: Path) -> object:
    if file.suffix in (".pt", ".safetensors"):
        return load_model(file, kernels="plain")
    return [Dataset(file).natoms, list(Dataset(file))]


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """With bytes changed, a part cut out, doubled or moved; mostly where it is not zero."""
    changed = bytearray(content)
    filled = np.flatnonzero(np.frombuffer(content, np.uint8))
    for _ in range(int(rng.integers(1, 6))):
        start = int(rng.choice(filled)) % len(changed)
        stop = min(len(changed), start + int(rng.integers(1, 65)))
        part = bytes(changed[start:stop])
        match int(rng.integers(0, 6)):
            case 0 | 1:
                changed[start] ^= 1 << int(rng.integers(0, 8))
            case 2:
                changed[start] = int(rng.choice([0, 1, 127, 128, 255]))
            case 3:
                changed[start:stop] = b""
            case 4:
                changed[start:start] = part
            case 5:
                where = int(rng.choice(filled)) % len(changed)
                changed[where : where + len(part)] = part
    return bytes(changed)


def try_in_a_process(file: Path) -> str:
    """How reading the file ends: "" for read or refused, else what went wrong."""
    child = os.fork()
    if child == 0:
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            read_all(file)
        except InputError as error:
            os._exit(0 if file.name in str(error) else 2)
        except BaseException:
            os._exit(3)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        return signal.Signals(-code).name
    return {0: "", 2: "an error that does not name the file"}.get(code, "a traceback")


def make(folder: Path) -> list[Path]:
    """A small file of each kind that is right."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_distance_basis": 8}
    config = AllScAIPConfig(angular_channels=(4, 2, 2), num_rotary_frequencies=4, **size)
    structures = [labelled(number) for number in range(3)]
    write_aselmdb(folder / "a.aselmdb", structures)
    save_official(AllScAIP(config), folder / "a.pt")
    save_model(AllScAIP(config), folder / "a.safetensors", {"data": ["text", 1]})
    return [folder / f"a.{suffix}" for suffix in ("aselmdb", "pt", "safetensors")]


def main(folder: Path) -> None:
    """Print a line for each mutation that ends in another way than it should."""
    for file in make(folder):
        content = file.read_bytes()
        if failure := try_in_a_process(file):
            print(f"{file.name} as it was written: {failure}")
        for seed in range(MUTATIONS):
            file.write_bytes(mutated(content, np.random.default_rng([seed, len(file.suffix)])))
            if failure := try_in_a_process(file):
                print(f"{file.name}, seed {seed}: {failure}")
    print("done")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_change_of_a_file_does_harm(tmp_path: Path) -> None:
    # in a process of one thread, whose forks are safe
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "done\n", done.stdout + done.stderr


if __name__ == "__main__":
    main(Path(sys.argv[1]))
