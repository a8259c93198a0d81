"""Time and memory of the model's sets of kernels and of fairchem, in one run; steps of training.

In: sizes of water clusters, a preset or the default configuration, a device, the sides to compare
(`plain`, `torch`, `c`, `cuda-graphs`, `fairchem`, each with a number of threads where one is named:
`c:2`, or `c:auto` for what the package chooses). Out: a table. All sides read the same file with
random weights, in the official format. Each side has a process of its own for each size, so that
peak memory is its own. The sides take turns, call by call, so that other load on the machine slows
all of them alike.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
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
from allscaip_lite.errors import InputError, KernelError
from allscaip_lite.files import store_text
from allscaip_lite.kernels import choose
from allscaip_lite.kernels.compiled import load_kernels
from allscaip_lite.machine import THREADS_OF_USER, processor_name
from allscaip_lite.model import AllScAIP
from allscaip_lite.tables import markdown_table
from allscaip_lite.training.loop import (
    RecordedLoss,
    batch_size,
    conservative_stage,
    loss,
    make_optimizers,
)
from data.water.boxes import water_cluster
from docs.studies.report import insert_table, peak_memory

BENCHMARK = AllScAIPConfig()  # hidden 128, 4 blocks, 4 heads, both encodings, k = 30
FAIRCHEM = "fairchem"
SIDES = ("plain", "torch", "c", "cuda-graphs", FAIRCHEM)  # ours are called as `kernels` are
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


def side_and_threads(text: str) -> str:
    """`c`, `c:2` or `c:auto`, checked."""
    side, colon, threads = text.partition(":")
    if side not in SIDES or (colon and threads != "auto" and not threads.isdecimal()):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not one of {', '.join(SIDES)}, with :N or :auto where threads are named"
        )
    return text


def calculator(side: str, checkpoint: str, device: str) -> Any:
    """The ASE calculator that is measured as `side`."""
    if side == FAIRCHEM:
        from fairchem.core import FAIRChemCalculator
        from fairchem.core.units.mlip_unit import load_predict_unit

        unit = load_predict_unit(checkpoint, device=device)
        return FAIRChemCalculator(unit, task_name="omol")
    return AllScAIPCalculator(checkpoint, device, kernels=side)


def serve(side: str, checkpoint: str, molecules: int, device: str) -> None:
    """The measured process: one timed call for each line it reads, a JSON line for each."""
    answers = os.fdopen(os.dup(1), "w")  # libraries may print to standard output
    os.dup2(2, 1)
    cluster = water_cluster(molecules)
    start = cluster.positions.copy()
    begin = time.perf_counter()
    cluster.calc = calculator(side.partition(":")[0], checkpoint, device)
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

    def __init__(
        self, side: str, checkpoint: Path, molecules: int, args: argparse.Namespace
    ) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), "--serve", side]
        command += ["--checkpoint", str(checkpoint), "--atoms", str(3 * molecules)]
        command += ["--device", args.device]
        kernels, _, threads = side.partition(":")
        environment = {**os.environ}
        for name in THREADS_OF_USER:
            environment[name] = threads or str(args.threads)
            if threads == "auto":
                del environment[name]
        if kernels == "c":  # an empty cache, so that start-up time is that of a first start
            cache = tempfile.mkdtemp(prefix="kernels-", dir=checkpoint.parent)
            environment["XDG_CACHE_HOME"] = cache
        # a file, for a pipe that nobody reads would fill and block
        self.printed = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if args.verbose else self.printed,
            text=True,
            env=environment,
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


def measure(
    molecules: int, sides: Sequence[str], checkpoint: Path, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each side at one size, see `compare`.

    A side that fails, for lack of memory say, has a row with the reason in `failed`.
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

    others = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(args.busy)
    ]
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
        for process in others:
            process.kill()
            process.wait()
    found = compare({side: calls[side] for side in sides if side not in failed})
    reasons = [{"side": side, "failed": reason} for side, reason in failed.items()]
    return [{"atoms": 3 * molecules, **row} for row in (*found, *reasons)]


def compare(calls: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each side, from the answers of all sides to the same calls, warm-up first.

    Times are in s, memory in GiB. `times_as_fast_as` has the median ratio to each other side, of
    calls in the same round. Differences are the largest ones to fairchem, or without it to the
    first side: energy in eV/atom, force as a share of the largest force.
    """
    reference = FAIRCHEM if FAIRCHEM in calls else next(iter(calls), None)
    times = {side: [c["seconds"] for c in answers[WARM_UP:]] for side, answers in calls.items()}
    rows = []
    for side, answers in calls.items():
        row: dict[str, Any] = {
            "side": side,
            "seconds": statistics.median(times[side]),
            "spread": max(times[side]) - min(times[side]),
            "start": answers[0]["start up"] + answers[0]["seconds"],
            "memory": answers[-1]["memory"],
            "memory_before": answers[0]["loaded"],
            "times_as_fast_as": {
                other: statistics.median(
                    b / a for a, b in zip(times[side], times[other], strict=True)
                )
                for other in calls
                if other != side
            },
        }
        if side != reference:
            energies, forces = [], []
            for ours, theirs in zip(answers, calls[reference], strict=True):
                expected = np.array(theirs["forces"])  # (N, 3)
                difference = np.abs(np.array(ours["forces"]) - expected).max()
                forces.append(difference / np.abs(expected).max())
                energies.append(abs(ours["energy"] - theirs["energy"]) / len(expected))
            row |= {"energy_difference": max(energies), "force_difference": max(forces)}
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]], sides: Sequence[str]) -> str:
    """A table in Markdown of the rows that `measure` makes; a side that failed has dashes."""

    def cells(row: dict[str, Any]) -> list[str]:
        if "failed" in row:
            return ["–"] * (len(head) - 2)
        ratios = [row["times_as_fast_as"].get(other) for other in sides]
        differences = [row.get(f"{name}_difference") for name in ("energy", "force")]
        return [
            f"{row['seconds']:.3f} ± {row['spread'] / 2:.3f}",
            *("–" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
            f"{row['memory']:.2f}",
            f"{row['start']:.1f}" if "start" in row else "–",
            *("–" if value is None else f"{value:.0e}" for value in differences),
        ]

    head = ["atoms", "side", "s", *(f"× {side}" for side in sides), "GiB", "start, s"]
    head += ["energy, eV/atom", "force, share"]
    lines = [[str(row["atoms"]), row["side"], *cells(row)] for row in rows]
    return markdown_table(head, lines, align="rl" + "r" * (len(head) - 2))


def exponents(rows: Sequence[dict[str, Any]], sides: Sequence[str]) -> dict[str, float]:
    """p of time ~ atoms^p for each side, between its two largest sizes."""
    found = {}
    for side in sides:
        of_side = [row for row in rows if row["side"] == side and "seconds" in row]
        times = {row["atoms"]: row["seconds"] for row in of_side}
        if len(times) > 1:
            small, large = sorted(times)[-2:]
            found[side] = math.log(times[large] / times[small]) / math.log(large / small)
    return found


def machine(args: argparse.Namespace) -> str:
    """What the numbers were measured on, in a line."""
    parts = [processor_name(), f"{args.threads} thread(s)"]
    if args.busy:
        parts.append(f"{args.busy} of {os.cpu_count()} cores busy with another program")
    if args.device == "cuda":
        parts.append(torch.cuda.get_device_name())
    parts += [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    if FAIRCHEM in args.sides:
        parts.append(f"fairchem-core {metadata.version('fairchem-core')}")
    return ", ".join(parts)


def notes(rows: Sequence[dict[str, Any]], args: argparse.Namespace) -> str:
    """What a reader of the table must know: the machine, how time grows, which sides failed."""
    model = f"preset {args.preset}" if args.preset else "hidden 128, 4 blocks, 4 heads"
    powers = [f"{side} ~ atoms^{p:.2f}" for side, p in exponents(rows, args.sides).items()]
    lines = [f"{machine(args)}; {model}; {args.rounds} calls."]
    if powers:
        lines.append(f"Time between the two largest sizes: {', '.join(powers)}.")
    lines += [
        f"{row['side']} failed at {row['atoms']} atoms: {row['failed']}"
        for row in rows
        if "failed" in row
    ]
    return "\n\n".join(lines)


def write(rows: Sequence[dict[str, Any]], args: argparse.Namespace) -> None:
    """The rows so far, as `--json` and `--page` ask."""
    if args.json:
        growth = exponents(rows, args.sides)
        content = {"machine": machine(args), "exponents": growth, "rows": rows}
        store_text(args.json, json.dumps(content, indent=1) + "\n")
    if args.page:
        insert_table(args.page, f"{table(rows, args.sides)}\n\n{notes(rows, args)}")


# What an operator does, by a part of its name; the first that fits. The rest is elementwise.
KINDS = {
    "neighbour search": ("vesin", "sort", "topk", "cdist", "nonzero"),
    "attention kernels": ("scaled_dot_product", "flash_attention", "efficient_attention"),
    "matrix products": ("::mm", "::bmm", "addmm", "addbmm", "baddbmm", "::mv", "linear"),
    "gathers, scatters": ("index", "gather", "scatter", "embedding", "::take"),
    "copies, fills": ("copy_", "::cat", "zero_", "fill_", "::empty", "::clone", "resize_"),
    "norms, softmax": ("norm", "softmax"),
    "Python of our own kernels": ("Fused", "_RotaryMix", "_Mirrored"),
    "sums": ("::sum", "::mean", "cumsum", "::max", "::amax"),
}


def kind_of(operator: str) -> str:
    """The group of an operator such as `aten::addmm`."""
    for kind, parts in KINDS.items():
        if any(part in operator for part in parts):
            return kind
    return "elementwise, other"


def profile(molecules: int, side: str, checkpoint: Path, args: argparse.Namespace) -> str:
    """Where the time of a side goes in one call: kinds of operators, both passes, then the top 12.

    Each operator counts with its own time, without that of the operators it calls. On a GPU it is
    the time of its kernels.
    """
    torch.set_num_threads(args.threads)
    cluster = water_cluster(molecules)
    model = load_model(checkpoint, device=args.device, kernels=side).requires_grad_(False)
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


def training_seconds(
    atoms: int, config: AllScAIPConfig, args: argparse.Namespace
) -> dict[str, Any]:
    """Seconds of a step of conservative training, for each side the times of its rounds.

    A batch of clusters of seven waters, of `atoms` atoms or a few less: forward, the loss on
    energies and forces, its derivatives, the optimiser. All sides in this process, in turn.
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
    if "cuda-graphs" in args.sides:
        natoms = batch.structures.natoms.numpy()
        recorded = RecordedLoss(model, stage, batch_size(natoms, int(natoms.sum()), config))
        batch = batch.padded_to(recorded.size, config.reach)
    batch = batch.to(torch.device(args.device))
    seconds: dict[str, list[float]] = {side: [] for side in args.sides}
    for number in range(WARM_UP + args.rounds):
        for side in args.sides:
            model.operations = choose(side, args.device)
            started = time.perf_counter()
            if recorded and side == "cuda-graphs":
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


def training_table(rows: Sequence[dict[str, Any]]) -> str:
    """The median of each side's rounds, and how many times as fast it is as the first side."""
    first, *others = [name for name in rows[0] if name != "atoms"]
    head = ["atoms", *(f"{side}, s a step" for side in (first, *others))]
    head += [f"{side} × {first}" for side in others]
    lines = []
    for row in rows:
        medians = [f"{statistics.median(row[side]):.3f}" for side in (first, *others)]
        ratios = [
            statistics.median(a / b for a, b in zip(row[first], row[side], strict=True))
            for side in others
        ]
        lines.append([str(row["atoms"]), *medians, *(f"{ratio:.2f}" for ratio in ratios)])
    return markdown_table(head, lines, align="r" * len(head))


# --- The command -----------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("--atoms", type=int, nargs="+", default=[63, 189, 600])
    parser.add_argument(
        "--sides",
        nargs="+",
        type=side_and_threads,
        help=f"what to compare, in this order, of {', '.join(SIDES)} (default: all that run here); "
        "c:2 runs with two threads, c:auto with what the package chooses",
    )
    parser.add_argument("--preset", choices=sorted(PRESETS), help="default: hidden 128, 4 blocks")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1, help="of a side that names none")
    parser.add_argument(
        "--busy", type=int, default=0, metavar="N", help="keep N cores busy with another program"
    )
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each side")
    parser.add_argument(
        "--training", action="store_true", help="measure steps of training, without fairchem"
    )
    parser.add_argument(
        "--profile", action="store_true", help="also print where the time of the first side goes"
    )
    parser.add_argument("--json", type=Path, help="write the rows here, after each size")
    parser.add_argument("--page", type=Path, help="put the table into this page, after each size")
    parser.add_argument("--verbose", action="store_true", help="show what the processes print")
    parser.add_argument("--serve", help=argparse.SUPPRESS)  # a measured process
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)


def sides_here(device: str) -> list[str]:
    """The sides that can run on a device with what is installed."""
    fastest = ["cuda-graphs"] if device == "cuda" else ["c"]
    if device == "cpu":
        try:
            load_kernels(torch.float32)
        except KernelError:  # no C compiler
            fastest = []
    sides = ["plain", "torch", *fastest]
    return [*sides, FAIRCHEM] if importlib.util.find_spec("fairchem") else sides


def check_arguments(args: argparse.Namespace) -> None:
    """Raises `InputError` for what cannot be measured, before anything is."""
    if args.sides and FAIRCHEM in args.sides and importlib.util.find_spec("fairchem") is None:
        raise InputError("fairchem is not installed: pip install 'allscaip-lite[parity]'")
    if min(args.atoms) < 3:
        raise InputError("--atoms: the smallest cluster is one water molecule, 3 atoms")
    if args.rounds < 1 or args.threads < 1:
        raise InputError("--rounds and --threads must be at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch sees no CUDA GPU here")


def run(args: argparse.Namespace) -> int:
    """Measure, print the table; the exit status is 1 if one of this package's sides failed."""
    if args.serve:
        molecules = args.atoms[0] // 3
        serve(args.serve, args.checkpoint, molecules, args.device)
        return 0
    check_arguments(args)
    args.sides = list(dict.fromkeys(args.sides or sides_here(args.device)))
    config = PRESETS[args.preset] if args.preset else BENCHMARK
    if args.training:
        args.sides = [side for side in args.sides if side != FAIRCHEM]
        steps = [training_seconds(atoms, config, args) for atoms in args.atoms]
        print(f"{machine(args)}\n\n{training_table(steps)}")
        if args.json:
            store_text(args.json, json.dumps(steps) + "\n")
        return 0
    print(machine(args), flush=True)
    rows: list[dict[str, Any]] = []
    molecules = list(dict.fromkeys(round(atoms / 3) for atoms in args.atoms))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "benchmark.pt"
        save_official(random_model(config.replace(max_num_elements=100, stress=False)), checkpoint)
        for count in molecules:
            found = measure(count, args.sides, checkpoint, args)
            shown = table(found, args.sides).splitlines()
            print("\n".join(shown[2:] if rows else shown), flush=True)
            rows += found
            write(rows, args)
        print("\n" + notes(rows, args))
        if args.profile:
            print("\n" + profile(molecules[-1], args.sides[0], checkpoint, args))
    return int(any("failed" in row and row["side"] != FAIRCHEM for row in rows))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; `argv` defaults to the arguments of the process."""
    return run_script(
        add_arguments,
        run,
        script="docs/studies/speed/run.py",
        description=__doc__,
        stopped="what --json and --page wrote is kept; the same command starts again",
        argv=argv,
    )


if __name__ == "__main__":
    sys.exit(main())
