"""Time and peak memory against the number of atoms, for each size of the model, beside fairchem's.

In: sizes of water clusters, models, kinds of forces, sides (`plain`, `torch`, `c`, `cuda-graphs`,
`fairchem`), a device. Out: a JSON file of results, and a page with tables made of it. Each cell (a
model, a kind of forces, a side, a number of atoms) is measured in a process of its own, with a
limit on time, and kept: the same command goes on where it stopped. Where a cell fails or is too
slow, larger ones are left out. The weights are random; time and memory do not depend on them.

eSEN, the rival of the paper, comes from fairchem-core alone, in the two sizes of OMol25's models.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from allscaip_lite import model as model_module
from allscaip_lite.calculator import AllScAIPCalculator
from allscaip_lite.checkpoints.official import save_official
from allscaip_lite.cli import run_script
from allscaip_lite.config import PRESETS
from allscaip_lite.errors import InputError
from allscaip_lite.files import store_text
from allscaip_lite.machine import processor_name
from allscaip_lite.model import AllScAIP
from allscaip_lite.notebook.plots import LINES, STYLE
from allscaip_lite.tables import markdown_table
from data.water.boxes import water_cluster
from docs.studies.report import insert_table, peak_memory, save_figure

HERE = Path(__file__).parent
FAIRCHEM = "fairchem"
SIDES = ("plain", "torch", "c", "cuda-graphs", FAIRCHEM)
FORCES = ("conservative", "direct")
# layers and largest degree of eSEN for OMol25 (arXiv 2505.08762): 6.3 and 50.7 million parameters
ESEN = {"eSEN-sm": (4, 2), "eSEN-md": (10, 4)}
MODELS = (*PRESETS, *ESEN)
NS_PER_DAY = 86_400 * 1e-6  # of one step of 1 fs in 1 s

Cell = tuple[str, str, str, int]  # model, forces, side, atoms


# --- One cell, in a process of its own --------------------------------------------------------


def timed(
    function: Callable[..., Any], times: list[float], args: argparse.Namespace
) -> Callable[..., Any]:
    """The same function, which notes how many s each call takes.

    One thread of a shared machine waits for others: there it is the time that it has worked.
    """
    clock = time.process_time if works_alone(args) else time.perf_counter

    def call(*arguments: Any, **named: Any) -> Any:
        synchronize(args.device)
        begin = clock()
        found = function(*arguments, **named)
        synchronize(args.device)
        times.append(clock() - begin)
        return found

    return call


def works_alone(args: argparse.Namespace) -> bool:
    """Whether the time of the processor is what the work takes, however busy the machine."""
    return args.shared and args.device == "cpu" and args.threads == 1


def synchronize(device: str) -> None:
    """Wait until a GPU has done what it was asked for."""
    if device == "cuda":
        torch.cuda.synchronize()


def calculator(args: argparse.Namespace, graph_times: list[float]) -> Any:
    """The ASE calculator of a side, which notes how long its graphs take."""
    name, forces, side, _ = args.cell
    checkpoint, device = args.checkpoint, args.device
    if name in ESEN:
        return esen(*ESEN[name], forces, args, graph_times)
    if side == FAIRCHEM:
        from fairchem.core import FAIRChemCalculator
        from fairchem.core.units.mlip_unit import load_predict_unit

        unit = load_predict_unit(str(checkpoint), device=device)
        for module in unit.model.modules():
            if hasattr(module, "data_preprocess"):
                module.data_preprocess = timed(module.data_preprocess, graph_times, args)
        return FAIRChemCalculator(unit, task_name="omol")
    if side != "cuda-graphs":  # where the graph is a part of what is recorded
        model_module.build_graph = timed(model_module.build_graph, graph_times, args)
    return AllScAIPCalculator(checkpoint, device, kernels=side)


def esen(
    layers: int, degree: int, forces: str, args: argparse.Namespace, graph_times: list[float]
) -> Any:
    """An ASE calculator of eSEN with random weights, which notes how long its graphs take."""
    from ase.calculators.calculator import Calculator
    from fairchem.core.datasets.atomic_data import AtomicData
    from fairchem.core.models.uma import escn_md

    torch.manual_seed(0)
    direct = forces == "direct"
    backbone = escn_md.eSCNMDBackbone(
        sphere_channels=128, hidden_channels=128, edge_channels=128, num_layers=layers,
        lmax=degree, mmax=2, cutoff=6.0, num_distance_basis=64, ff_type="spectral",
        otf_graph=True, direct_forces=direct, regress_stress=False, always_use_pbc=False,
        use_dataset_embedding=False,
    )  # fmt: skip
    if direct:
        heads = [escn_md.MLP_Energy_Head(backbone), escn_md.Linear_Force_Head(backbone)]
    else:
        heads = [escn_md.MLP_EFS_Head(backbone, wrap_property=False)]
    for module in (backbone, *heads):
        module.to(args.device).eval().requires_grad_(False)
    backbone._generate_graph = timed(backbone._generate_graph, graph_times, args)

    class Esen(Calculator):  # type: ignore[misc]
        implemented_properties = ("energy", "forces")

        def calculate(self, atoms: Any = None, *_: Any) -> None:
            batch = AtomicData.from_ase(atoms, task_name="omol").to(args.device)
            batch.charge, batch.spin = (torch.tensor([atoms.info[key]]).to(args.device)
                                        for key in ("charge", "spin"))  # fmt: skip
            with torch.set_grad_enabled(not direct):
                states = backbone(batch)
                found = [head(batch, states) for head in heads]
            answer = {key: value for part in found for key, value in part.items()}
            self.results = {"energy": float(answer["energy"].sum())}
            self.results["forces"] = answer["forces"].detach().cpu().numpy()

    return Esen()


def checkpoint_of(name: str, forces: str, folder: Path) -> Path:
    """A file with random weights, which all sides read; written when it is first asked for."""
    path = folder / f"{name}-{forces}.pt"
    if not path.exists() and name not in ESEN:
        # the official format does not know the smooth order
        order = {"smooth_bond_order": False, "bond_order_softness": 0.0}
        changes = {"conservative": forces == "conservative", "stress": False, **order}
        torch.manual_seed(0)
        config = PRESETS[name].replace(max_num_elements=100, **changes)
        save_official(AllScAIP(config).eval(), path)
    return path


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of energy and forces, medians; GiB; s of the graph where it can be told."""
    cluster, graph_times = water_cluster(args.cell[3] // 3), []
    cluster.info.update(charge=0, spin=1)
    cluster.calc = calculator(args, graph_times)
    start, random, times = cluster.positions.copy(), np.random.default_rng(1), []
    for _ in range(1 + args.rounds):
        # every call sees new positions, so that neighbours are searched again
        cluster.positions = start + random.normal(scale=1e-3, size=start.shape)
        timed(cluster.get_forces, times, args)()
    of_graph = statistics.median(graph_times[1:]) if len(graph_times) > 1 else None
    return {
        "seconds": statistics.median(times[1:]),
        "fastest": min(times[1:]),
        "graph": of_graph,
        "memory": peak_memory(args.device),
    }


def in_process(cell: Cell, checkpoint: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What `measure` finds in a process of its own; `failed` says why there is nothing."""
    command = [sys.executable, __file__, "--cell", json.dumps(cell), "--device", args.device]
    command += ["--threads", str(args.threads), *["--shared"] * args.shared]
    command += ["--rounds", str(args.rounds), "--checkpoint", str(checkpoint)]
    threads = {name: str(args.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    paths = os.pathsep.join(filter(None, [str(HERE.parents[2]), os.environ.get("PYTHONPATH")]))
    environment = os.environ | threads | {"PYTHONPATH": paths}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=args.limit,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"more than {args.limit:g} s"}
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["nothing was said"]
        killed = done.returncode < 0
        return {"failed": f"killed by signal {-done.returncode}" if killed else said[-1][:200]}
    return json.loads(done.stdout.strip().splitlines()[-1])


# --- All of them ------------------------------------------------------------------------------


def cells(args: argparse.Namespace) -> Iterator[Cell]:
    """All cells that are asked for; sides of the same size follow each other."""
    return itertools.chain.from_iterable(
        ((name, forces, side, atoms) for side in args.sides if side == FAIRCHEM or name in PRESETS)
        for name, forces, atoms in itertools.product(args.models, args.forces, sorted(args.atoms))
    )


def too_large(cell: Cell, results: Sequence[dict[str, Any]]) -> bool:
    """Whether a smaller cell of the same line has failed."""
    return any(
        "failed" in row and row["cell"][:3] == list(cell[:3]) and row["cell"][3] < cell[3]
        for row in results
    )


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """What the numbers are measured on."""
    on_gpu = args.device == "cuda"
    found = {
        "device": torch.cuda.get_device_name() if on_gpu else processor_name(),
        "threads": args.threads,
        "clock": "of the processor" if works_alone(args) else "on the wall",
        "shared": args.shared,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if FAIRCHEM in args.sides:
        found["fairchem-core"] = metadata.version("fairchem-core")
    return found


def exponent(rows: Sequence[dict[str, Any]]) -> float | None:
    """p of time ~ atoms^p between the two largest sizes of one line; None of fewer than two."""
    times = sorted((row["cell"][3], row["seconds"]) for row in rows if "seconds" in row)
    if len(times) < 2:
        return None
    (small, before), (large, after) = times[-2:]
    return math.log(after / before) / math.log(large / small)


def crossing(rows: Sequence[dict[str, Any]]) -> float | None:
    """Atoms at which a N² is as large as b N, of t = a N² + b N by least squares of t / N."""
    points = [(row["cell"][3], row["seconds"]) for row in rows if "seconds" in row]
    points = [(n, t) for n, t in points if n >= 150]  # below, a call costs more than its atoms
    if len(points) < 3:
        return None
    atoms, times = np.array(points).T
    square, linear = np.polyfit(atoms, times / atoms, 1)
    return float(linear / square) if square > 0 and linear > 0 else None


def tables(results: Sequence[dict[str, Any]]) -> str:
    """The page's tables: every cell, and how each line grows."""
    order = [*MODELS, *FORCES, *SIDES]

    def place(row: dict[str, Any]) -> tuple[int, ...]:
        name, forces, side, atoms = row["cell"]
        return (order.index(name), order.index(forces), atoms, order.index(side))

    lines, growth = [], []
    for row in sorted(results, key=place):
        name, forces, side, atoms = row["cell"]
        if "failed" in row:
            lines.append([name, forces, str(atoms), side, *["–"] * 5, row["failed"]])
            continue
        seconds, graph = row["seconds"], row["graph"]
        alone = "–" if graph is None else f"{seconds - graph:.3g}"
        speed = f"{atoms / seconds:.3g}", f"{NS_PER_DAY / seconds:.2g}"
        lines.append(
            [
                name,
                forces,
                str(atoms),
                side,
                f"{seconds:.3g}",
                alone,
                *speed,
                f"{row['memory']:.2f}",
            ]
            + [""]
        )
    head = [
        "model",
        "forces",
        "atoms",
        "side",
        "s",
        "s without graph",
        "atoms/s",
        "ns/day",
        "GiB",
        "",
    ]
    parts = [markdown_table(head, lines, align="llrlrrrrrl")]
    for line, rows in lines_of(results).items():
        power, where = exponent(rows), crossing(rows)
        if power is not None:
            growth.append([*line, f"{power:.2f}", "–" if where is None else f"{where:.0f}"])
    if growth:
        head = [
            "model",
            "forces",
            "side",
            "p of time ~ atoms^p, last two sizes",
            "atoms where N² takes over",
        ]
        parts.append(markdown_table(head, growth, align="lllrr"))
    about = dict.fromkeys(
        ", ".join(
            f"{value}" if key == "device" else f"{key} {value}"
            for key, value in row["machine"].items()
            if key != "shared"
        )
        + (", a machine that other programs used too" if row["machine"]["shared"] else "")
        for row in results
    )
    return "\n\n".join([*parts, *(f"{line}." for line in about)])


def draw(results: Sequence[dict[str, Any]], file: Path) -> None:
    """Throughput and memory against the number of atoms; dashed lines are fairchem's."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 6.5))
        axes = figure.subplots(2, 2, sharex=True, sharey="row")
        for (name, forces, side), rows in lines_of(results).items():
            color, marker = (LINES[MODELS.index(name)][key] for key in ("color", "marker"))
            dashes = "--" if side == FAIRCHEM else "-"
            label = f"{name}, fairchem" if side == FAIRCHEM else name
            atoms = np.array([row["cell"][3] for row in rows])
            heights = (
                atoms / np.array([row["seconds"] for row in rows]),
                [row["memory"] for row in rows],
            )
            for row, height in enumerate(heights):
                panel = axes[row, FORCES.index(forces)]
                panel.loglog(atoms, height, dashes, color=color, marker=marker, label=label)
        for panel, forces in zip(axes[0], FORCES, strict=True):
            panel.set_title(f"{forces} forces")
        for panel in axes[1]:
            panel.set_xlabel("atoms of water")
        axes[0, 0].set_ylabel("atoms per second")
        axes[1, 0].set_ylabel("peak memory, GiB")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center")
        save_figure(figure, file)


def lines_of(
    results: Sequence[dict[str, Any]],
) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """Of each model, kind of forces and side what was measured, from few atoms to many."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in sorted(results, key=lambda row: row["cell"][3]):
        if "seconds" in row:
            found.setdefault(tuple(row["cell"][:3]), []).append(row)
    return dict(sorted(found.items(), key=lambda item: (MODELS.index(item[0][0]), item[0][2])))


# --- The command ------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("--atoms", type=int, nargs="+", default=[63, 189, 600, 1500, 3000, 9999])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--forces", nargs="+", choices=FORCES, default=list(FORCES))
    parser.add_argument("--sides", nargs="+", choices=SIDES, help="default: the fastest, fairchem")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="timed calls of each cell, after one")
    parser.add_argument("--limit", type=float, default=600.0, help="s for a cell, loading included")
    parser.add_argument("--shared", action="store_true", help="other programs use the machine too")
    parser.add_argument("--json", type=Path, help="results (default: results/DEVICE.json)")
    parser.add_argument("--page", type=Path, help="put figure and tables of --json there")
    parser.add_argument("--again", action="store_true", help="measure also what is there")
    parser.add_argument("--cell", type=json.loads, help=argparse.SUPPRESS)  # a measured process
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)


def check_arguments(args: argparse.Namespace) -> None:
    """Raises `InputError` for what cannot be measured, before anything is."""
    if min(args.atoms) < 3:
        raise InputError("--atoms: the smallest cluster is one water molecule, 3 atoms")
    if args.rounds < 1 or args.threads < 1 or args.limit <= 0:
        raise InputError("--rounds and --threads must be at least 1, and --limit above 0")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch sees no CUDA GPU here")
    if args.sides and FAIRCHEM in args.sides and importlib.util.find_spec("fairchem") is None:
        raise InputError("fairchem is not installed: pip install 'allscaip-lite[parity]'")


def run(args: argparse.Namespace) -> int:
    """Measure what is missing, keep it, write the page; the exit status is 0."""
    check_arguments(args)
    if args.cell:
        answers = os.fdopen(os.dup(1), "w")  # libraries may print to standard output
        os.dup2(2, 1)
        print(json.dumps(measure(args)), file=answers, flush=True)
        return 0
    if not args.sides:
        args.sides = ["cuda-graphs" if args.device == "cuda" else "c"]
        args.sides += [FAIRCHEM] if importlib.util.find_spec("fairchem") else []
    path = args.json or HERE / "results" / f"{args.device}.json"
    results = json.loads(path.read_text()) if path.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        for cell in cells(args):
            there = [row for row in results if row["cell"] == list(cell)]
            if (there and not args.again) or too_large(cell, results):
                continue
            found = in_process(cell, checkpoint_of(*cell[:2], Path(folder)), args)
            results = [row for row in results if row not in there]
            results.append({"cell": list(cell), **found, "machine": machine(args)})
            store_text(path, "[\n" + ",\n".join(json.dumps(row) for row in results) + "\n]\n")
            print(
                *cell, {key: value for key, value in found.items() if value is not None}, flush=True
            )
    if args.page:
        draw(results, args.page.with_name(f"{path.stem}.png"))
        insert_table(args.page, f"![Time and memory]({path.stem}.png)\n\n{tables(results)}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command; `argv` defaults to the arguments of the process."""
    return run_script(
        add_arguments,
        run,
        script="docs/studies/scaling/run.py",
        description=__doc__,
        stopped="the cells that were measured are kept; the same command goes on",
        argv=argv,
    )


if __name__ == "__main__":
    sys.exit(main())
