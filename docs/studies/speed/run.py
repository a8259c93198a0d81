"""`python docs/studies/speed/run.py`: time and memory of the model, beside fairchem's calculator; of training.

In: sizes of water clusters, a preset or the small benchmark model, a device. Out: a table. All
sides read the same official-format file with random weights. Each has a process of its own for
each size, so that peak memory is its own, and they take turns, so that a noisy machine disturbs
all alike.
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
from collections import defaultdict
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.calculators.singlepoint import SinglePointCalculator

from allscaip_lite.calculator import AllScAIPCalculator
from allscaip_lite.checkpoints.native import load_model
from allscaip_lite.checkpoints.official import save_official
from allscaip_lite.cli import run_script
from allscaip_lite.config import PRESETS, AllScAIPConfig
from allscaip_lite.data.batches import collate
from allscaip_lite.errors import InputError
from allscaip_lite.kernels import choose
from allscaip_lite.labels.spcfw import water_cluster
from allscaip_lite.machine import processor_name
from allscaip_lite.model import AllScAIP
from allscaip_lite.training.loop import (
    RecordedLoss,
    batch_size,
    conservative_stage,
    loss,
    make_optimizers,
)

BENCHMARK = AllScAIPConfig()  # hidden 128, 4 blocks, 4 heads, both encodings, k = 30
OURS, COMPILED, THEIRS = SIDES = ("allscaip-lite", "compiled", "fairchem")
WARM_UP = 2  # calls before timing


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
    """The ASE calculator that is measured as `side`."""
    if side == THEIRS:
        from fairchem.core import FAIRChemCalculator
        from fairchem.core.units.mlip_unit import load_predict_unit

        unit = load_predict_unit(checkpoint, device=device)
        return FAIRChemCalculator(unit, task_name="omol")
    return AllScAIPCalculator(load_model(checkpoint), device, kernels=kernels_of(side, device))


def kernels_of(side: str, device: str) -> str:
    """What `kernels` is called for the two sides of this package."""
    if side == COMPILED:
        return "c" if device == "cpu" else "cuda-graphs"
    return "torch"


def peak_memory(device: str) -> float:
    """GiB: the most this process held in memory, or on a GPU the most PyTorch allocated."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status")
    if status.exists():
        # not ru_maxrss: on Linux that starts at the peak of the process that started this one
        (line,) = [s for s in status.read_text().splitlines() if s.startswith("VmHWM")]
        return int(line.split()[1]) / 2**20
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def serve(side: str, checkpoint: str, molecules: int, device: str, threads: int) -> None:
    """The measured process: one timed call for each line it reads, a JSON line for each."""
    answers = os.fdopen(os.dup(1), "w")  # libraries may print to standard output
    os.dup2(2, 1)
    torch.set_num_threads(threads)
    cluster = water_cluster(molecules)
    start = cluster.positions.copy()
    begin = time.perf_counter()
    cluster.calc = calculator(side, checkpoint, device)
    start_up = time.perf_counter() - begin  # with the compilation, where there is one
    loaded = peak_memory(device)
    random = np.random.default_rng(1)  # the same positions on all sides
    for _ in sys.stdin:
        # every call sees new positions, so nothing is cached and neighbours are searched again
        cluster.positions = start + random.normal(scale=1e-3, size=start.shape)
        begin = time.perf_counter()
        forces = cluster.get_forces()
        energy = cluster.get_potential_energy()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        answer = {"seconds": seconds, "memory": peak_memory(device), "loaded": loaded}
        answer["start up"] = start_up
        answer |= {"energy": float(energy), "forces": forces.tolist()}
        print(json.dumps(answer), file=answers, flush=True)


class Side:
    """One measured process, asked for one call at a time.

    `ask` raises `RuntimeError` with the last line the process wrote, if it has ended.
    """

    def __init__(self, side: str, checkpoint: Path, molecules: int, args: argparse.Namespace):
        command = [sys.executable, str(Path(__file__).resolve()), "--serve", side]
        command += ["--checkpoint", str(checkpoint), "--atoms", str(3 * molecules)]
        command += ["--device", args.device, "--threads", str(args.threads)]
        environment = {name: str(args.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        if side == COMPILED:  # an empty cache, so that start-up time is that of a first start
            cache = tempfile.mkdtemp(prefix="compiled-", dir=checkpoint.parent)
            environment["XDG_CACHE_HOME"] = cache
        # a file, for a pipe that nobody reads would fill and block
        self.printed = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if args.verbose else self.printed,
            text=True,
            env={**os.environ, **environment},
        )

    def ask(self) -> dict[str, Any]:
        """Seconds, GiB, energy in eV and forces (N, 3) in eV/Å of one call."""
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self.process.wait()
            self.printed.seek(0)
            lines = self.printed.read().strip().splitlines() or [f"exit status {status}"]
            raise RuntimeError(lines[-1])
        return json.loads(line)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.printed.close()


def measure(molecules: int, sides: list[str], checkpoint: Path, args: argparse.Namespace) -> dict:
    """One row of the table: seconds (median of the rounds), GiB, ratios, largest differences.

    A side that fails, for lack of memory say, leaves its columns out and its reason in `failed`.
    """
    running: dict[str, Side] = {}
    calls: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    failed: dict[str, str] = {}

    def ask(side: str) -> None:
        if side not in failed:
            try:
                calls[side].append(running[side].ask())
            except RuntimeError as error:
                failed[side] = str(error)

    try:
        for side in sides:  # one after the other: start-up of one must not disturb another's
            running[side] = Side(side, checkpoint, molecules, args)
            for _ in range(WARM_UP):
                ask(side)
        for _ in range(args.rounds):
            for side in sides:
                ask(side)
    finally:
        for process in running.values():
            process.close()
    row = {"atoms": 3 * molecules, **compare({s: calls[s] for s in sides if s not in failed})}
    return row | {"failed": failed} if failed else row


def compare(calls: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The numbers of a row from the answers of each side, warm-up first."""
    row: dict[str, Any] = {}
    times = {side: [c["seconds"] for c in calls[side][WARM_UP:]] for side in calls}
    for side, answers in calls.items():
        row[f"{side} s"] = statistics.median(times[side])
        row[f"{side} spread s"] = max(times[side]) - min(times[side])
        row[f"{side} GiB"] = answers[-1]["memory"]
        row[f"{side} GiB before the first call"] = answers[0]["loaded"]
    if COMPILED in calls:
        first = calls[COMPILED][0]
        row["compiled start s"] = first["start up"] + first["seconds"]
    if THEIRS in calls:
        for side, prefix in ((OURS, ""), (COMPILED, "compiled ")):
            if side in calls:
                ratios = [b / a for a, b in zip(times[side], times[THEIRS], strict=True)]
                row[f"{prefix}speed ratio"] = statistics.median(ratios)
                row[f"{prefix}memory ratio"] = row[f"{side} GiB"] / row[f"{THEIRS} GiB"]
    if len(calls) > 1:
        *sides, reference = calls  # fairchem is last, if it is there; else compiled against eager
        energies, forces = [], []
        for side in sides:
            for ours, theirs in zip(calls[side], calls[reference], strict=True):
                expected = np.array(theirs["forces"])  # (N, 3)
                difference = np.abs(np.array(ours["forces"]) - expected).max()
                forces.append(difference / np.abs(expected).max())
                energies.append(abs(ours["energy"] - theirs["energy"]) / len(expected))
        row["energy difference eV/atom"] = max(energies)
        row["force difference / largest force"] = max(forces)
    return row


COLUMNS = {
    "atoms": "{:d}",
    "allscaip-lite s": "{:.3f}",
    "compiled s": "{:.3f}",
    "fairchem s": "{:.3f}",
    "speed ratio": "{:.1f}",
    "compiled speed ratio": "{:.1f}",
    "compiled start s": "{:.1f}",
    "allscaip-lite GiB": "{:.2f}",
    "compiled GiB": "{:.2f}",
    "fairchem GiB": "{:.2f}",
    "memory ratio": "{:.2f}",
    "compiled memory ratio": "{:.2f}",
    "energy difference eV/atom": "{:.0e}",
    "force difference / largest force": "{:.0e}",
}


def columns_of(sides: list[str]) -> list[str]:
    """The columns that a run with these sides can fill."""
    names = []
    for name in COLUMNS:
        measured = any(name.startswith(side) for side in sides)
        compared = ("ratio" in name and THEIRS in sides) or ("difference" in name and sides[1:])
        if name.startswith(COMPILED) and COMPILED not in sides:
            continue
        if name == "atoms" or compared or (measured and "ratio" not in name):
            names.append(name)
    return names


def table(rows: list[dict], columns: list[str]) -> str:
    """A markdown table of the rows that `measure` makes; a side that failed leaves dashes."""

    def cell(row: dict, name: str) -> str:
        if name not in row:
            return "–"
        shown = COLUMNS[name].format(row[name])
        spread = row.get(name.removesuffix(" s") + " spread s") if name.endswith(" s") else None
        return shown if spread is None else f"{shown} ± {spread / 2:.3f}"

    lines = ["| " + " | ".join(columns) + " |", "|" + "---:|" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(cell(row, name) for name in columns) + " |")
    return "\n".join(lines)


def exponents(rows: list[dict], sides: list[str]) -> dict[str, float]:
    """p of time ~ atoms^p for each side, between its two largest sizes."""
    found = {}
    for side in sides:
        times = {row["atoms"]: row[f"{side} s"] for row in rows if f"{side} s" in row}
        if len(times) > 1:
            small, large = sorted(times)[-2:]
            found[side] = math.log(times[large] / times[small]) / math.log(large / small)
    return found


def machine(args: argparse.Namespace) -> str:
    """What the numbers were measured on, in a line."""
    parts = [processor_name(), f"{args.threads} thread(s)"]
    if args.device == "cuda":
        parts.append(torch.cuda.get_device_name())
    parts += [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    if args.sides[-1] == THEIRS:
        parts.append(f"fairchem-core {metadata.version('fairchem-core')}")
    return ", ".join(parts)


def notes(rows: list[dict], args: argparse.Namespace) -> str:
    """What a reader of the table must know: the machine, what was measured, how it grows."""
    model = f"preset {args.preset}" if args.preset else "hidden 128, 4 blocks, 4 heads"
    memory = "PyTorch's allocations on the GPU" if args.device == "cuda" else "the whole process"
    described = (
        f"Water clusters, {model}, conservative forces. Seconds for energy and forces: the median "
        f"of {args.rounds} calls ± half their range. Memory: the peak of {memory}."
    )
    if COMPILED in args.sides:
        described += " Compiled start: loading, compiling and the first call, with an empty cache."
        if args.device == "cuda":
            described += " Compiled is recorded, and its list of pairs serves for all calls."
    lines = [machine(args), described]
    lines += [f"{side}: time ~ atoms^{p:.2f}" for side, p in exponents(rows, args.sides).items()]
    for row in rows:
        for side, reason in row.get("failed", {}).items():
            lines.append(f"{side} failed at {row['atoms']} atoms: {reason}")
    return "\n\n".join(lines)


def write(rows: list[dict], args: argparse.Namespace) -> None:
    """The rows so far, as `--json` and `--markdown` ask."""
    if args.json:
        content = {"machine": machine(args), "exponents": exponents(rows, args.sides), "rows": rows}
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    if args.markdown:
        args.markdown.write_text(f"{table(rows, columns_of(args.sides))}\n\n{notes(rows, args)}\n")


# What an operator does, by a part of its name; the first that fits. The rest is elementwise.
KINDS = {
    "neighbour search": ("vesin", "sort", "topk", "cdist", "nonzero"),
    "attention kernels": ("scaled_dot_product", "flash_attention", "efficient_attention"),
    "matrix products": ("::mm", "::bmm", "addmm", "addbmm", "baddbmm", "::mv", "linear"),
    "gathers, scatters": ("index", "gather", "scatter", "embedding", "::take"),
    "copies, fills": ("copy_", "::cat", "zero_", "fill_", "::empty", "::clone", "resize_"),
    "norms, softmax": ("norm", "softmax"),
    "Python of our own kernels": ("Fused", "_RotaryMix", "_Symmetric", "_Folded"),
    "sums": ("::sum", "::mean", "cumsum", "::max", "::amax"),
}


def kind_of(operator: str) -> str:
    """The group of an operator such as `aten::addmm`."""
    for kind, parts in KINDS.items():
        if any(part in operator for part in parts):
            return kind
    return "elementwise, other"


def profile(molecules: int, checkpoint: Path, args: argparse.Namespace) -> str:
    """Where our time goes in one call: kinds of operators, forward and backward, then the top 12.

    Each operator counts with its own time, without that of the operators it calls. On a GPU it is
    the time of its kernels.
    """
    torch.set_num_threads(args.threads)
    cluster = water_cluster(molecules)
    model = load_model(checkpoint).to(args.device).requires_grad_(False)
    for _ in range(WARM_UP):
        model.predict(cluster)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if args.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as recorded:
        model.predict(cluster)
    kinds: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])  # forward, backward
    operators: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    calls: dict[str, int] = defaultdict(int)
    for event in recorded.events():
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # a GPU kernel; the operator that started it has its time
        on_gpu = args.device == "cuda"
        time_us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        ancestor, backward = event, False
        while ancestor is not None and not backward:
            backward = ancestor.name.startswith("autograd::engine::evaluate_function")
            ancestor = ancestor.cpu_parent
        calls[event.name] += 1
        for name, sums in ((kind_of(event.name), kinds), (event.name, operators)):
            sums[name][backward] += time_us / 1000
    total = sum(map(sum, kinds.values()))

    def lines(sums: dict[str, list[float]], limit: int) -> list[str]:
        top = sorted(sums.items(), key=lambda item: -sum(item[1]))[:limit]
        shown = [
            f"{name[:40]:40s}{forward:10.1f}{backward:10.1f}{(forward + backward) / total:8.0%}"
            for name, (forward, backward) in top
        ]
        counts = [f"{calls[name]:8d}" if name in calls else "" for name, _ in top]
        return [line + count for line, count in zip(shown, counts, strict=True)]

    title = (
        f"{'one call, ' + str(3 * molecules) + ' atoms, ms':40s}{'forward':>10s}{'backward':>10s}"
    )
    title += f"{'share':>8s}{'calls':>8s}"
    return "\n".join([title, *lines(kinds, len(kinds)), "", *lines(operators, 12)])


TRAINED = 7  # molecules of a structure in `training_seconds`


def training_seconds(atoms: int, config: AllScAIPConfig, args: argparse.Namespace) -> dict:
    """Seconds of a step of conservative training, for each side the times of its rounds.

    A batch of clusters of seven waters, of `atoms` atoms or a few less: forward, the loss on
    energies and forces, its derivatives, the optimiser. Both sides in this process, in turn; on a
    GPU the compiled one is recorded.
    """
    torch.set_num_threads(args.threads)
    clusters = [water_cluster(TRAINED, seed) for seed in range(max(1, atoms // (3 * TRAINED)))]
    for cluster in clusters:
        zeros = np.zeros((len(cluster), 3))
        cluster.calc = SinglePointCalculator(cluster, energy=0.0, forces=zeros)
    batch = collate(clusters)
    model = random_model(config.replace(conservative=True)).to(args.device).train()
    stage, recorded = conservative_stage(1), None
    (optimizer,) = make_optimizers(model, stage)
    if args.device == "cuda" and args.compile:
        natoms = batch.structures.natoms.numpy()
        recorded = RecordedLoss(model, stage, batch_size(natoms, int(natoms.sum()), config))
        batch = batch.padded_to(recorded.size, config.reach)
    batch = batch.to(torch.device(args.device))
    sides = [side for side in args.sides if side != THEIRS]
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(WARM_UP + args.rounds):
        for side in sides:
            model.operations = choose(kernels_of(side, args.device), args.device)
            started = time.perf_counter()
            if recorded and side == COMPILED:
                recorded(batch)
            else:
                value = loss(model(batch.structures), batch, model, stage)
                optimizer.zero_grad()
                value.backward()
            optimizer.step()
            if args.device == "cuda":
                torch.cuda.synchronize()
            if number >= WARM_UP:
                seconds[side].append(time.perf_counter() - started)
    return {"atoms": sum(map(len, clusters)), **seconds}


def training_table(rows: list[dict]) -> str:
    """Markdown: the median of each side's rounds, and how many times as fast compiled is."""
    sides = [name for name in rows[0] if name != "atoms"]
    lines = ["| atoms of a batch | " + " | ".join(f"{side}, s a step" for side in sides) + " |"]
    lines[0] += " times |" if len(sides) > 1 else ""
    lines.append("|" + "---:|" * (lines[0].count("|") - 1))
    for row in rows:
        medians = [statistics.median(row[side]) for side in sides]
        cells = [str(row["atoms"]), *(f"{median:.3f}" for median in medians)]
        if len(sides) > 1:
            ratios = [a / b for a, b in zip(*(row[side] for side in sides), strict=True)]
            cells.append(f"{statistics.median(ratios):.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--atoms", type=int, nargs="+", default=[63, 189, 600])
    parser.add_argument("--preset", choices=sorted(PRESETS), help="default: hidden 128, 4 blocks")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each side")
    parser.add_argument("--compile", action="store_true", help="also measure the compiled model")
    parser.add_argument("--alone", action="store_true", help="without fairchem")
    parser.add_argument(
        "--training", action="store_true", help="measure steps of training, without fairchem"
    )
    parser.add_argument("--profile", action="store_true", help="also print where time goes")
    parser.add_argument("--json", type=Path, help="write the rows here, after each size")
    parser.add_argument("--markdown", type=Path, help="write the table here, after each size")
    parser.add_argument("--verbose", action="store_true", help="show what the processes print")
    parser.add_argument("--serve", choices=SIDES, help=argparse.SUPPRESS)  # a measured process
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)


def check_arguments(args: argparse.Namespace) -> None:
    """Raises `InputError` for what cannot be measured, before anything is."""
    if min(args.atoms) < 3:
        raise InputError("--atoms: the smallest cluster is one water molecule, 3 atoms")
    if args.rounds < 1 or args.threads < 1:
        raise InputError("--rounds and --threads must be at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch sees no CUDA GPU here")


def run(args: argparse.Namespace) -> int:
    """`python docs/studies/speed/run.py`; 1 if a measurement of this package's own failed."""
    if args.serve:
        molecules = args.atoms[0] // 3
        serve(args.serve, args.checkpoint, molecules, args.device, args.threads)
        return 0
    check_arguments(args)
    args.sides = [OURS, COMPILED] if args.compile else [OURS]
    config = PRESETS[args.preset] if args.preset else BENCHMARK
    if args.training:
        steps = [training_seconds(atoms, config, args) for atoms in args.atoms]
        print(f"{machine(args)}\n\n{training_table(steps)}")
        if args.json:
            args.json.write_text(json.dumps(steps))
        if args.markdown:
            args.markdown.write_text(f"{training_table(steps)}\n\n{machine(args)}\n")
        return 0
    if not args.alone and importlib.util.find_spec("fairchem") is None:
        print("fairchem is skipped, it is not installed: pip install 'allscaip-lite[parity]'")
    elif not args.alone:
        args.sides.append(THEIRS)
    print(machine(args), flush=True)
    rows: list[dict] = []
    molecules = list(dict.fromkeys(round(atoms / 3) for atoms in args.atoms))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "benchmark.pt"
        save_official(random_model(config.replace(max_num_elements=100, stress=False)), checkpoint)
        for count in molecules:
            rows.append(measure(count, args.sides, checkpoint, args))
            shown = table(rows, columns_of(args.sides)).splitlines()
            print("\n".join(shown if len(rows) == 1 else shown[-1:]), flush=True)
            write(rows, args)
        print("\n" + notes(rows, args).split("\n\n", 1)[1])
        if args.profile:
            print("\n" + profile(molecules[-1], checkpoint, args))
    return int(any(side != THEIRS for row in rows for side in row.get("failed", {})))


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(
        add_arguments,
        run,
        script="docs/studies/speed/run.py",
        description=__doc__,
        stopped="what --json and --markdown wrote is kept; the same command starts again",
        argv=argv,
    )


if __name__ == "__main__":
    sys.exit(main())
