"""`allscaip-lite bench`: time and memory of the model, beside fairchem's calculator.

In: sizes of water clusters, a preset or the small benchmark model, a device. Out: a table. Both
sides read the same official-format file with random weights. Each has a process of its own, so
that peak memory is its own, and they take turns, so that a noisy machine disturbs both alike.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from scipy.spatial.transform import Rotation

from allscaip_lite.checkpoint import load_model
from allscaip_lite.config import PRESETS, AllScAIPConfig
from allscaip_lite.model import AllScAIP
from allscaip_lite.official import save_official

WATERS_PER_CUBIC_ANGSTROM = 0.0334  # 0.997 g/cm³
BENCHMARK = AllScAIPConfig()  # hidden 128, 4 blocks, 4 heads, both encodings, k = 30
SIDES = ("allscaip-lite", "fairchem")


def water_cluster(molecules: int, seed: int = 0) -> Atoms:
    """A ball of water molecules at the density of the liquid, neutral singlet; positions in Å.

    Molecules stand near the points of a cubic lattice nearest to its middle, turned at random;
    hydrogens of neighbours stay more than 1 Å apart.
    """
    random = np.random.default_rng(seed)
    spacing = WATERS_PER_CUBIC_ANGSTROM ** (-1 / 3)
    side = math.ceil(1.5 * molecules ** (1 / 3)) + 2
    points = np.stack(np.meshgrid(*[np.arange(side) - side / 2] * 3), -1).reshape(-1, 3)
    points = points[np.argsort(np.linalg.norm(points, axis=1), kind="stable")][:molecules]
    angle = math.radians(104.5) / 2
    hydrogens = 0.96 * np.array(
        [[math.sin(angle), 0, math.cos(angle)], [-math.sin(angle), 0, math.cos(angle)]]
    )
    positions: list[np.ndarray] = []
    for point in points * spacing:
        placed = np.reshape(positions, (-1, 3))
        for _ in range(1000):
            oxygen = point + random.normal(scale=0.1, size=3)
            molecule = np.vstack([oxygen, oxygen + Rotation.random(rng=random).apply(hydrogens)])
            gaps = np.linalg.norm(placed[:, None] - molecule, axis=-1)
            if gaps.size == 0 or gaps.min() > 1.5:
                break
        positions.extend(molecule)
    cluster = Atoms("OH2" * molecules, positions=positions)
    cluster.info.update(charge=0, spin=1)
    return cluster


def random_model(config: AllScAIPConfig, seed: int = 0) -> AllScAIP:
    """A model with random weights, biases included, in the units of OMol25."""
    torch.manual_seed(seed)
    model = AllScAIP(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.energy_scale.fill_(1.433569)
    model.force_scale.fill_(1.433569)
    return model.eval()


def calculator(side: str, checkpoint: str, device: str) -> Any:
    if side == "fairchem":
        from fairchem.core import FAIRChemCalculator
        from fairchem.core.units.mlip_unit import load_predict_unit

        unit = load_predict_unit(checkpoint, device=device)
        return FAIRChemCalculator(unit, task_name="omol")
    from allscaip_lite.calculator import AllScAIPCalculator

    return AllScAIPCalculator(load_model(checkpoint), device=device)


def serve(side: str, checkpoint: str, molecules: int, device: str, threads: int) -> None:
    """The measured process: one timed call for each line it reads, a JSON line for each."""
    torch.set_num_threads(threads)
    cluster = water_cluster(molecules)
    start = cluster.positions.copy()
    cluster.calc = calculator(side, checkpoint, device)
    random = np.random.default_rng(1)
    answers = os.fdopen(os.dup(1), "w")  # libraries may print to standard output
    os.dup2(2, 1)
    for line in sys.stdin:
        # every call sees new positions, so nothing is cached and neighbours are searched again
        moved = 0.0 if line.strip() == "check" else random.normal(scale=1e-3, size=start.shape)
        cluster.positions = start + moved
        begin = time.perf_counter()
        forces = cluster.get_forces()
        energy = cluster.get_potential_energy()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GiB
        if device == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**30
        answer = {"seconds": seconds, "memory": peak}
        if line.strip() == "check":
            answer |= {"energy": float(energy), "forces": forces.tolist()}
        print(json.dumps(answer), file=answers, flush=True)


class Side:
    """One measured process, asked for one call at a time."""

    def __init__(self, side: str, checkpoint: Path, molecules: int, args: argparse.Namespace):
        command = [sys.executable, "-m", "allscaip_lite.benchmark", "--serve", side]
        command += ["--checkpoint", str(checkpoint), "--atoms", str(3 * molecules)]
        command += ["--device", args.device, "--threads", str(args.threads)]
        threads = {"OMP_NUM_THREADS": str(args.threads), "MKL_NUM_THREADS": str(args.threads)}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if not args.verbose else None,
            text=True,
            env={**os.environ, **threads},
        )

    def ask(self, what: str) -> dict[str, Any]:
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            error = (self.process.communicate()[1] or "").strip().splitlines()[-1:]
            raise RuntimeError(f"a measured process ended: {' '.join(error)} (see --verbose)")
        return json.loads(line)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def measure(molecules: int, sides: list[str], checkpoint: Path, args: argparse.Namespace) -> dict:
    """One row of the table: seconds (median of the rounds), GiB, differences."""
    row: dict[str, Any] = {"atoms": 3 * molecules}
    running: dict[str, Side] = {}
    try:
        checks = {}
        for side in sides:
            running[side] = Side(side, checkpoint, molecules, args)
            checks[side] = running[side].ask("check")  # the first call also warms up
        times: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(args.rounds):
            for side in sides:
                answer = running[side].ask("time")
                times[side].append(answer["seconds"])
                row[f"{side} GiB"] = answer["memory"]
        for side in sides:
            row[f"{side} s"] = statistics.median(times[side])
            row[f"{side} spread s"] = max(times[side]) - min(times[side])
    finally:
        for process in running.values():
            process.close()
    if len(sides) == 2:
        ours, theirs = (checks[side] for side in SIDES)
        ratios = [b / a for a, b in zip(times[SIDES[0]], times[SIDES[1]], strict=True)]
        row["speed ratio"] = statistics.median(ratios)
        row["memory ratio"] = row["allscaip-lite GiB"] / row["fairchem GiB"]
        row["energy difference eV/atom"] = abs(ours["energy"] - theirs["energy"]) / (3 * molecules)
        forces = np.array(theirs["forces"])
        difference = np.abs(np.array(ours["forces"]) - forces).max()
        row["force difference / largest force"] = difference / np.abs(forces).max()
    return row


COLUMNS = {
    "atoms": "{:d}",
    "allscaip-lite s": "{:.3f}",
    "fairchem s": "{:.3f}",
    "speed ratio": "{:.1f}",
    "allscaip-lite GiB": "{:.2f}",
    "fairchem GiB": "{:.2f}",
    "memory ratio": "{:.2f}",
    "energy difference eV/atom": "{:.0e}",
    "force difference / largest force": "{:.0e}",
}


def table(rows: list[dict]) -> str:
    """A markdown table of the rows that `measure` makes."""
    columns = [name for name in COLUMNS if name in rows[0]]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---:|" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(COLUMNS[c].format(row[c]) for c in columns) + " |")
    return "\n".join(lines)


def machine(args: argparse.Namespace) -> str:
    """What the numbers were measured on, in a line."""
    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [s for s in information.read_text().splitlines() if s.startswith("model name")]
        processor = names[0].split(":", 1)[1].strip() if names else processor
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{args.threads} thread(s)"
    return f"{processor}, {device}, Python {platform.python_version()}, torch {torch.__version__}"


def profile(molecules: int, checkpoint: Path, args: argparse.Namespace) -> str:
    """Where our time goes: operators by their own time, of one call."""
    torch.set_num_threads(args.threads)
    cluster = water_cluster(molecules)
    model = load_model(checkpoint).to(args.device).requires_grad_(False)
    model.predict(cluster)
    activities = [torch.profiler.ProfilerActivity.CPU]
    key = "self_cpu_time_total"
    if args.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        key = "self_cuda_time_total"
    with torch.profiler.profile(activities=activities) as recorded:
        model.predict(cluster)
    return recorded.key_averages().table(sort_by=key, row_limit=15, max_name_column_width=40)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--atoms", type=int, nargs="+", default=[63, 189, 600])
    parser.add_argument("--preset", choices=sorted(PRESETS), help="default: hidden 128, 4 blocks")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each side")
    parser.add_argument("--alone", action="store_true", help="without fairchem")
    parser.add_argument("--profile", action="store_true", help="also print where time goes")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--verbose", action="store_true", help="show what the processes print")


def run(args: argparse.Namespace) -> None:
    """`allscaip-lite bench`."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no CUDA GPU here")
    sides = list(SIDES)
    if args.alone or importlib.util.find_spec("fairchem") is None:
        sides = sides[:1]
        if not args.alone:
            print("fairchem is not installed: pip install 'allscaip-lite[parity]' to compare")
    print(machine(args), flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "benchmark.pt"
        config = PRESETS[args.preset] if args.preset else BENCHMARK
        save_official(random_model(config.replace(max_num_elements=100, stress=False)), checkpoint)
        for atoms in args.atoms:
            rows.append(measure(max(1, round(atoms / 3)), sides, checkpoint, args))
            shown = table(rows).splitlines()
            print("\n".join(shown if len(rows) == 1 else shown[-1:]), flush=True)
        if args.profile:
            print(profile(max(1, round(args.atoms[-1] / 3)), checkpoint, args))
    if len(rows) > 1:
        sizes, seconds = ([row[key] for row in rows[-2:]] for key in ("atoms", f"{sides[0]} s"))
        exponent = math.log(seconds[1] / seconds[0]) / math.log(sizes[1] / sizes[0])
        print(f"time grows as atoms^{exponent:.2f} between the last two sizes")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(args), "rows": rows}, indent=1) + "\n")
    if args.markdown:
        args.markdown.write_text(f"{table(rows)}\n\n{machine(args)}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    parser.add_argument("--serve", choices=SIDES)
    parser.add_argument("--checkpoint")
    arguments = parser.parse_args()
    if arguments.serve:
        molecules = arguments.atoms[0] // 3
        serve(
            arguments.serve, arguments.checkpoint, molecules, arguments.device, arguments.threads
        )
    else:
        run(arguments)
