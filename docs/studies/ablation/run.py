"""Which inductive bias helps whom: `run.py` trains models that differ in one thing.

In: a data set, and a `Study`: which models, how long they train, what is measured. Out: a table
(JSON) of all its cells, with the machine and the versions, from which lesson 08 draws. Studies
`ions`, `pairs` and `chain` ask what carries long range; `table` asks how errors on unseen molecules
depend on node attention, LAE, ERoPE, the amount of data and the model's size (paper,
arXiv 2603.06567, Figure 5).

A cell is one training. Each is stored as soon as it is done, so a study can run in pieces.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import platform
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning_fabric
import numpy as np
import torch

from allscaip_lite import __version__
from allscaip_lite.cli import run_script
from allscaip_lite.config import AllScAIPConfig
from allscaip_lite.data.aselmdb import Dataset, InMemory, checksum
from allscaip_lite.data.batches import in_order
from allscaip_lite.errors import InputError
from allscaip_lite.evaluation.long_range import (
    errors_by_gap,
    rounded,
    separation_curves,
    tail_exponent,
    tail_misfit,
)
from allscaip_lite.files import store_text
from allscaip_lite.kernels import add_kernels_option
from allscaip_lite.machine import processor_name
from allscaip_lite.model import AllScAIP
from allscaip_lite.training.loop import Stage, fresh_model, train

# --- What is compared ------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One training: the parts of the model that are on, its size, its data, its seed."""

    node_attention: bool
    rotary: bool  # ERoPE
    angular: bool  # LAE
    size: str = "small"
    structures: int | None = None  # of the training set, chosen by the seed; None: all
    seed: int = 0

    @property
    def name(self) -> str:
        parts = [self.kind, str(self.structures)] if self.structures else [self.kind]
        return "-".join([*parts, f"seed{self.seed}"])

    @property
    def kind(self) -> str:
        """The model, whatever its data and seed, as in "rotary-lae-small"."""
        return "-".join([self.variant, "lae" if self.angular else "plain", self.size])

    @property
    def variant(self) -> str:
        """local (no node attention), node (without ERoPE) or rotary (with it)."""
        return ("rotary" if self.rotary else "node") if self.node_attention else "local"


VARIANTS = {"local": (False, False), "node": (True, False), "rotary": (True, True)}

MODELS = {
    "small": AllScAIPConfig(
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        cutoff=4.0,
        k=12,
        num_distance_basis=64,
        angular_channels=(5, 3, 1, 2, 5),
        smooth_bond_order=True,
    ),
    "medium": AllScAIPConfig(
        hidden_size=64,
        num_layers=3,
        num_heads=4,
        cutoff=5.0,
        k=16,
        num_distance_basis=128,
        angular_channels=(5, 3, 1, 2, 5),
        smooth_bond_order=True,
    ),
}


@dataclass(frozen=True)
class Study:
    """The cells, and what all of them share. Distances in Å; errors are binned by gap at `bins`.

    `conservative` models train on the gradient of the energy from the start; others have a force
    head of their own. The exponent of a tail is fitted inside `window`.
    """

    sizes: tuple[str, ...] = ("small",)
    structures: tuple[int | None, ...] = (None,)
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 800
    max_atoms: int = 200
    learning_rate: float = 4e-3
    weights: tuple[float, float] = (20.0, 20.0)  # of energy and forces in the loss
    ema_decay: float = 0.99
    muon: float = 0.0  # see `Stage`
    conservative: bool = True
    bins: tuple[float, ...] = (0.0, 4.0, 8.0, 12.0, 16.0, 20.0)
    window: tuple[float, float] = (6.0, 20.0)
    throughput: bool = False

    def cells(self) -> list[Cell]:
        """Seeds come last, so that a part of a study is the whole of a smaller one."""
        return [
            Cell(*VARIANTS[variant], angular, size, structures, seed)
            for seed in self.seeds
            for size in self.sizes
            for structures in self.structures
            for variant in VARIANTS
            for angular in (False, True)
        ]

    def config(self, cell: Cell) -> AllScAIPConfig:
        config = MODELS[cell.size].replace(
            node_attention=cell.node_attention, rotary=cell.rotary, conservative=self.conservative
        )
        return config if cell.angular else config.replace(angular_channels=None)

    def stage(self) -> Stage:
        return Stage(
            "conservative" if self.conservative else "direct",
            self.steps,
            self.learning_rate,
            *self.weights,
            warmup=0.05,
            ema_decay=self.ema_decay,
            muon=self.muon,
        )


STUDIES = {
    "ions": Study(steps=2400, muon=3.0),
    "pairs": Study(steps=1600, muon=3.0, bins=(0.0, 3.0, 6.0, 9.0, 12.0, 15.0), window=(6.0, 15.0)),
    "chain": Study(steps=2400, weights=(200.0, 20.0), muon=3.0, bins=(4.0, 8.0, 12.0, 16.0, 22.0)),
    "table": Study(
        sizes=("small", "medium"),
        structures=(250, 1000, 4000, 16000),
        steps=1200,
        max_atoms=100,
        weights=(10.0, 10.0),
        throughput=True,
        bins=(),
    ),
}


# --- One cell --------------------------------------------------------------------------------


def choose(data: Dataset, structures: int | None, seed: int) -> InMemory:
    """That many structures, or all there are: the first of a shuffle, so a larger set of the same
    seed contains the smaller ones."""
    if structures is None or structures >= len(data):
        return InMemory(data)
    return InMemory(data, np.random.default_rng([seed, 88]).permutation(len(data))[:structures])


def run_cell(
    study: Study, cell: Cell, data: Path, folder: Path, kernels: str = "auto"
) -> dict[str, Any]:
    """Train one cell and measure it; `folder` keeps what it takes to go on, and the weights.

    `data` is a folder with `{train,val,test}.aselmdb`, and `curves.aselmdb` where there are any.
    """
    training_data = choose(Dataset(data / "train.aselmdb"), cell.structures, cell.seed)
    validation = Dataset(data / "val.aselmdb")
    validation = InMemory(validation, range(min(200, len(validation))))
    model = fresh_model(study.config(cell), training_data, cell.seed)
    stage = study.stage()
    started = time.monotonic()
    model = train(
        model,
        [stage],
        training_data,
        validation,
        folder,
        max_atoms=study.max_atoms,
        seed=cell.seed,
        validate_every=max(1, study.steps // 2),
        save_every=200,
        kernels=kernels,
        fabric=lightning_fabric.Fabric(accelerator="auto", devices=1),
    )
    seconds = time.monotonic() - started
    test = InMemory(Dataset(data / "test.aselmdb"))
    row = {
        **asdict(cell),
        "structures": len(training_data),
        "parameters": model.num_parameters,
        "errors": errors_by_gap(model, test, study.bins),
    }
    curves = data / "curves.aselmdb"
    if curves.exists():
        row["curves"] = separation_curves(model, InMemory(Dataset(curves)))
    row["seconds"] = round(seconds, 1)
    return row


@torch.no_grad()
def throughput(study: Study, test: InMemory, rounds: int = 9) -> dict[str, float]:
    """Atoms a second of every kind of model (`Cell.kind`): energies and forces of the first batch
    of the test set, the median of all rounds. Weights do not matter, so they are random. Models
    take turns, so that what else the machine does slows them all alike."""
    kinds = {cell.kind: study.config(cell) for cell in study.cells()}
    models = {kind: AllScAIP(config).eval() for kind, config in kinds.items()}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = next(in_order(test, study.max_atoms)).to(device)
    times: dict[str, list[float]] = {kind: [] for kind in models}
    for _ in range(rounds + 1):  # the first warms up
        for kind, model in models.items():
            started = time.perf_counter()
            model.to(device)(batch.structures, create_graph=False).forces.cpu()
            times[kind].append(time.perf_counter() - started)
    return {
        kind: rounded(len(batch.forces) / statistics.median(taken[1:]))
        for kind, taken in times.items()
    }


# --- All cells -------------------------------------------------------------------------------


def run_study(
    study: Study,
    data: Path,
    folder: Path,
    results: Path | None = None,
    *,
    cells: Sequence[str] = ("*",),
    hours: float = float("inf"),
    kernels: str = "auto",
) -> dict[str, Any]:
    """Run the cells that are not done yet, store each, and return `collect`'s table.

    `cells` are patterns of names, as in "rotary-*-seed0". No cell starts after `hours`; a cell that
    was stopped goes on where it was. `kernels` is `train`'s. The table is written to `results`
    after every cell; cells that it has already are taken from there. Raises InputError where
    `folder` or `results` holds another study or other data, or no cell has such a name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plan = json.dumps({"study": asdict(study), "models": _models(study), "data": _sums(data)})
    stored = folder / "plan.json"
    if stored.exists() and json.loads(stored.read_text()) != json.loads(plan):
        raise InputError(f"{folder} holds another study or other data: give another --out")
    store_text(stored, plan)
    if results is not None and results.exists():
        _take_over(results, json.loads(plan), folder)
    wanted = [c for c in study.cells() if any(fnmatch.fnmatch(c.name, p) for p in cells)]
    if not wanted:
        raise InputError(f"no cell is named {' or '.join(cells)}; {study.cells()[0].name} is")
    waiting = [cell for cell in wanted if not (folder / f"{cell.name}.json").exists()]
    started, finished = time.monotonic(), 0
    for cell in waiting:
        elapsed = (time.monotonic() - started) / 3600
        if elapsed >= hours:
            print(f"{hours:g} hours are over: {len(waiting) - finished} cells wait", flush=True)
            break
        number = len(wanted) - len(waiting) + finished + 1
        print(f"{cell.name}: {number} of {len(wanted)}", flush=True)
        row = run_cell(study, cell, data, folder / cell.name, kernels)
        store_text(folder / f"{cell.name}.json", json.dumps(row))
        finished += 1
        pace = (time.monotonic() - started) / finished
        whole = row["errors"]["all"]
        print(
            f"{cell.name}: energy {whole['energy_mae']:.1f} meV, forces {whole['force_mae']:.1f} "
            f"meV/Å; {pace * (len(waiting) - finished) / 60:.0f} min left",
            flush=True,
        )
        if results is not None:
            write_table(collect(study, data, folder), results)
    if study.throughput:
        test = Dataset(data / "test.aselmdb")
        speeds = throughput(study, InMemory(test, range(min(200, len(test)))))
        store_text(folder / "throughput.json", json.dumps(speeds))
    table = collect(study, data, folder)
    if results is not None:
        write_table(table, results)
    return table


def _take_over(results: Path, plan: Mapping[str, Any], folder: Path) -> None:
    """Put the cells of a table, such as the one in the repository, where `run_study` looks."""
    table = json.loads(results.read_text())
    settings = json.loads(json.dumps(asdict(Study()))) | table["study"]  # it may be older than one
    if plan != {"study": settings, "models": table["models"], "data": table["data"]}:
        raise InputError(f"{results} is of another study or other data: give another --results")
    for row in table["cells"]:
        file = folder / f"{row['name']}.json"
        if not file.exists():
            store_text(file, json.dumps({k: v for k, v in row.items() if k != "name"}))


def collect(study: Study, data: Path, folder: Path) -> dict[str, Any]:
    """The table of all cells that are done: settings, machine, the truth's curves, one row each."""
    rows = []
    for cell in study.cells():
        file = folder / f"{cell.name}.json"
        if file.exists():
            rows.append({"name": cell.name, **json.loads(file.read_text())})
    table: dict[str, Any] = {
        "study": asdict(study),
        "models": _models(study),
        "data": _sums(data),
        "machine": machine(),
        "done": f"{len(rows)} of {len(study.cells())} cells",
    }
    curves = data / "curves.aselmdb"
    if curves.exists():
        table["truth"] = separation_curves(None, InMemory(Dataset(curves)))
    speeds = folder / "throughput.json"
    if speeds.exists():
        table["throughput"] = json.loads(speeds.read_text())  # atoms a second
    return {**table, "cells": rows}


def _models(study: Study) -> dict[str, Any]:
    return {size: MODELS[size].to_dict() for size in study.sizes}


def _sums(data: Path) -> dict[str, Any]:
    """Sizes and checksums of the files, by which one data set is told from another."""
    found = {}
    for split in ("train", "test"):
        structures = Dataset(data / f"{split}.aselmdb")
        sample = (structures[i] for i in range(0, len(structures), max(1, len(structures) // 200)))
        found[split] = {"structures": len(structures), "checksum": checksum(sample)[:16]}
    return found


def machine() -> dict[str, str | int]:
    """What ran: processor, threads, accelerator, versions."""
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "accelerator": accelerator,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "allscaip-lite": __version__,
    }


def write_table(table: Mapping[str, Any], path: Path) -> None:
    """Store a table as JSON, a cell a line, so that a difference can be read."""
    head = {key: value for key, value in table.items() if key != "cells"}
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    cells = ",\n".join(json.dumps(row) for row in table["cells"])
    path.parent.mkdir(parents=True, exist_ok=True)
    store_text(path, "{\n" + ",\n".join(lines) + f',\n"cells": [\n{cells}\n]\n}}\n')


def to_markdown(table: Mapping[str, Any]) -> str:
    """Errors, mean over seeds (smallest–largest). One amount of data: energy MAE in meV a structure
    and force MAE in meV/Å, by variant and `data_id`. Several: force MAE in meV/Å and energy MAE in
    meV/atom of all structures, by variant and amount."""
    if len({row["structures"] for row in table["cells"]}) > 1:
        return _by_amount(table)
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in table["cells"]:
        variant = row["name"].split("-")[0]
        key = variant, "yes" if row["angular"] else "no", row["size"], row["structures"]
        groups.setdefault(key, []).append(row["errors"])
    kinds = [name for name in table["cells"][0]["errors"] if not name[0].isdigit()]
    lines = [
        "| variant | LAE | size | structures | seeds | " + " | ".join(kinds) + " |",
        "|---|---|---|---:|---:|" + "---:|" * len(kinds),
    ]
    for key, seeds in groups.items():
        cells = []
        for kind in kinds:
            energies = [found[kind]["energy_mae"] for found in seeds]
            forces = statistics.mean(found[kind]["force_mae"] for found in seeds)
            spread = f" ({min(energies):.0f}–{max(energies):.0f})" if len(seeds) > 1 else ""
            cells.append(f"{statistics.mean(energies):.0f}{spread} / {forces:.0f}")
        lines.append("| " + " | ".join([*map(str, key), str(len(seeds)), *cells]) + " |")
    return "\n".join(lines)


def tails_to_markdown(table: Mapping[str, Any]) -> str:
    """By curve, the steepest first: exponent of the truth's tail, `tail_misfit` of a flat line, and
    of the models, mean over seeds (smallest–largest), in meV."""
    window = tuple(table["study"]["window"])
    kinds: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for row in table["cells"]:
        kinds.setdefault((row["name"].split("-")[0], row["angular"]), []).append(row["curves"])
    names = [f"{variant}{', LAE' if angular else ''}" for variant, angular in kinds]
    lines = [
        "| curve | exponent | flat | " + " | ".join(names) + " |",
        "|---|---:|---:|" + "---:|" * len(names),
    ]
    found = []
    for curve, truth in table["truth"].items():
        distance, energy = truth["distance"], truth["energy"]
        if max(distance) < window[1]:
            continue  # opposite ions that meet as neutral atoms further out
        flat = tail_misfit(distance, [0.0] * len(energy), energy, window)
        cells = [curve, f"{tail_exponent(distance, energy, window):.1f}", f"{flat:.0f}"]
        for seeds in kinds.values():
            misfits = [
                tail_misfit(distance, curves[curve]["energy"], energy, window) for curves in seeds
            ]
            least, most = f"{min(misfits):.0f}", f"{max(misfits):.0f}"
            spread = f" ({least}–{most})" if least != most else ""
            cells.append(f"{statistics.mean(misfits):.0f}{spread}")
        found.append((-flat, "| " + " | ".join(cells) + " |"))
    return "\n".join([*lines, *(line for _, line in sorted(found))])


def _by_amount(table: Mapping[str, Any]) -> str:
    groups: dict[tuple, dict[int, list[dict[str, float]]]] = {}
    for row in table["cells"]:
        cell = Cell(*(row[name] for name in ("node_attention", "rotary", "angular", "size")))
        key = cell.variant, "yes" if cell.angular else "no", cell.size, cell.kind
        of_amount = groups.setdefault(key, {}).setdefault(row["structures"], [])
        of_amount.append(row["errors"]["all"])
    amounts = sorted({amount for found in groups.values() for amount in found})
    speeds = table.get("throughput", {})
    lines = [
        "| variant | LAE | size | " + " | ".join(map(str, amounts)) + " | atoms/s |",
        "|---|---|---|" + "---:|" * (len(amounts) + 1),
    ]
    for (*head, kind), found in sorted(groups.items(), key=lambda item: item[0][2] != "small"):
        cells = []
        for amount in amounts:
            forces = [row["force_mae"] for row in found.get(amount, [])]
            energies = [row["energy_mae_per_atom"] for row in found.get(amount, [])]
            if not forces:
                cells.append("–")
                continue
            spread = f" ({min(forces):.0f}–{max(forces):.0f})" if len(forces) > 1 else ""
            cells.append(f"{statistics.mean(forces):.0f}{spread} / {statistics.mean(energies):.1f}")
        speed = f"{speeds[kind]:.0f}" if kind in speeds else "–"
        lines.append("| " + " | ".join([*head, *cells, speed]) + " |")
    return "\n".join(lines)


# --- The command -----------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `run.py`."""
    parser.add_argument("study", choices=sorted(STUDIES))
    parser.add_argument("--data", type=Path, help="folder of the data set")
    parser.add_argument("--out", type=Path, help="run folder")
    parser.add_argument(
        "--results", type=Path, help="the table, such as docs/studies/ablation/results/ions.json"
    )
    parser.add_argument("--hours", type=float, default=float("inf"), help="start no cell after")
    parser.add_argument(
        "--cells", nargs="+", default=["*"], metavar="PATTERN", help="as in 'rotary-*-seed0'"
    )
    add_kernels_option(parser)
    parser.add_argument("--show", action="store_true", help="only print the table --results holds")
    parser.add_argument("--list", action="store_true", help="only say which cells are done")


def run(args: argparse.Namespace) -> int:
    """`run.py`: run a study, or go on with it; the exit status."""
    study = STUDIES[args.study]
    if args.show:
        if args.results is None or not args.results.is_file():
            raise InputError(
                "--show: which table? As in --results docs/studies/ablation/results/ions.json"
            )
        table = json.loads(args.results.read_text())
        print(f"{table['done']}\n\n{to_markdown(table)}")
        if args.study in ("ions", "pairs"):  # of a chain, longer means other atoms
            print(f"\n{tails_to_markdown(table)}")
        return 0
    if args.data is None or args.out is None:
        raise InputError("say where the data are, with --data, and the runs, with --out")
    if args.list:
        for cell in study.cells():
            done = (args.out / f"{cell.name}.json").exists()
            print(f"{cell.name}: {'done' if done else 'to do'}")
        return 0
    table = run_study(
        study,
        args.data,
        args.out,
        args.results,
        cells=args.cells,
        hours=args.hours,
        kernels=args.kernels,
    )
    print(table["done"])
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(
        add_arguments,
        run,
        script="docs/studies/ablation/run.py",
        description=__doc__,
        stopped="the same command goes on from the last training that is done",
        argv=argv,
    )


if __name__ == "__main__":
    sys.exit(main())
