"""Which part of the model helps with what: training of models that differ in one thing.

In: a data set, and a `Study`: which models, how long they train, what is measured. Out: a table
(JSON) of all trainings, with the machine and the versions, which lesson 08 draws. The studies
`ions`, `pairs` and `chain` ask what carries long range; `table` asks how errors on molecules that
were never trained on depend on node attention, LAE, ERoPE, the amount of data and the size of the
model (as the paper does, arXiv 2603.06567).

A cell of the table is one training. Each is stored when it is done, so a study can run in pieces.
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
from allscaip_lite.files import alone, store_text
from allscaip_lite.kernels import add_kernels_option
from allscaip_lite.machine import processor_name, usable_device
from allscaip_lite.model import AllScAIP
from allscaip_lite.tables import markdown_table
from allscaip_lite.training.loop import Stage, fresh_model, train
from data.long_range.curves import (
    errors_by_gap,
    rounded,
    separation_curves,
    tail_exponent,
    tail_misfit,
)

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
    """The cells of a table, and what all of them share.

    Distances are in Å. Errors are binned by gap at `bins`, exponents of tails fitted inside
    `window`. Forces of a `conservative` model are gradients of its energy from the start; another
    model has a direct force head.
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
        """All cells, seed by seed: the first ones are a complete study of fewer seeds."""
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
    """That many structures, or all: the first of a shuffle.

    A larger set of the same seed contains the smaller ones.
    """
    if structures is None or structures >= len(data):
        return InMemory(data)
    return InMemory(data, np.random.default_rng([seed, 88]).permutation(len(data))[:structures])


def run_cell(
    study: Study, cell: Cell, data: Path, folder: Path, kernels: str = "auto"
) -> dict[str, Any]:
    """Train one cell and measure it, or go on with it.

    Args:
        study: what all cells share.
        cell: which model, data and seed.
        data: a folder with `{train,val,test}.aselmdb`, and `curves.aselmdb` if there are curves.
        folder: keeps the state of the training, and the weights.
        kernels: see `allscaip_lite.kernels`.

    Returns:
        The cell's row of the table.
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
    """Atoms per second of each kind of model (`Cell.kind`), for energies and forces.

    Medians over `rounds` calls on the first batch of the test set, with random weights. The models
    take turns, so that other load on the machine slows all of them alike.
    """
    kinds = {cell.kind: study.config(cell) for cell in study.cells()}
    models = {kind: AllScAIP(config).eval() for kind, config in kinds.items()}
    device = usable_device()
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


@alone
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
    """Run the cells that are not done yet, and store each; a stopped cell goes on.

    Args:
        study: the cells, and how they train.
        data: folder of the data set.
        folder: of the runs.
        results: the table to write after every cell. Cells that it has already are not run.
        cells: patterns of names, as in "rotary-*-seed0".
        hours: after these no cell starts.
        kernels: see `allscaip_lite.kernels`.

    Returns:
        The table, see `collect`.

    Raises:
        InputError: where `folder` or `results` holds another study or other data, or no cell has
            such a name.
    """
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
    started = time.monotonic()
    for finished, cell in enumerate(waiting):
        elapsed = (time.monotonic() - started) / 3600
        if elapsed >= hours:
            print(f"{hours:g} hours are over: {len(waiting) - finished} cells wait", flush=True)
            break
        number = len(wanted) - len(waiting) + finished + 1
        print(f"{cell.name}: {number} of {len(wanted)}", flush=True)
        row = run_cell(study, cell, data, folder / cell.name, kernels)
        store_text(folder / f"{cell.name}.json", json.dumps(row))
        pace = (time.monotonic() - started) / (finished + 1)
        whole = row["errors"]["all"]
        print(
            f"{cell.name}: energy {whole['energy_mae']:.1f} meV, forces {whole['force_mae']:.1f} "
            f"meV/Å; {pace * (len(waiting) - finished - 1) / 60:.0f} min left",
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
    """Put the cells of a results file where `run_study` looks for them."""
    table = json.loads(results.read_text())
    settings = json.loads(json.dumps(asdict(Study()))) | table["study"]  # from before a setting
    if plan != {"study": settings, "models": table["models"], "data": table["data"]}:
        raise InputError(f"{results} is of another study or other data: give another --results")
    for row in table["cells"]:
        file = folder / f"{row['name']}.json"
        if not file.exists():
            store_text(file, json.dumps({k: v for k, v in row.items() if k != "name"}))


def collect(study: Study, data: Path, folder: Path) -> dict[str, Any]:
    """The table: settings, data, machine, the true curves, and a row for each cell that is done."""
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
    """Sizes and checksums of the data files, to tell data sets apart."""
    found = {}
    for split in ("train", "test"):
        structures = Dataset(data / f"{split}.aselmdb")
        sample = (structures[i] for i in range(0, len(structures), max(1, len(structures) // 200)))
        found[split] = {"structures": len(structures), "checksum": checksum(sample)[:16]}
    return found


def machine() -> dict[str, str | int]:
    """Processor, threads, accelerator and versions."""
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
    """Store a table as JSON, with each cell on a line of its own."""
    head = {key: value for key, value in table.items() if key != "cells"}
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    cells = ",\n".join(json.dumps(row) for row in table["cells"])
    path.parent.mkdir(parents=True, exist_ok=True)
    store_text(path, "{\n" + ",\n".join(lines) + f',\n"cells": [\n{cells}\n]\n}}\n')


def to_markdown(table: Mapping[str, Any]) -> str:
    """The errors of a study, means over seeds (smallest–largest).

    Of one amount of data: energy MAE in meV a structure / force MAE in meV/Å, by variant and
    `data_id`. Of several: force MAE in meV/Å / energy MAE in meV/atom of all structures, by variant
    and amount.
    """
    if len({row["structures"] for row in table["cells"]}) > 1:
        return _by_amount(table)
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in table["cells"]:
        variant = row["name"].split("-")[0]
        key = variant, "yes" if row["angular"] else "no", row["size"], row["structures"]
        groups.setdefault(key, []).append(row["errors"])
    kinds = [name for name in table["cells"][0]["errors"] if not name[0].isdigit()]
    lines = []
    for key, seeds in groups.items():
        cells = []
        for kind in kinds:
            energy = _mean_and_range([found[kind]["energy_mae"] for found in seeds])
            force = statistics.mean(found[kind]["force_mae"] for found in seeds)
            cells.append(f"{energy} / {force:.0f}")
        lines.append([*key, len(seeds), *cells])
    head = ["variant", "LAE", "size", "structures", "seeds", *kinds]
    return markdown_table(head, lines, align="lllrr" + "r" * len(kinds))


def tails_to_markdown(table: Mapping[str, Any]) -> str:
    """Tails by curve, steepest first: the true exponent, and misfits in meV.

    `tail_misfit` of a constant (flat), and of the models, means over seeds (smallest–largest).
    """
    window = tuple(table["study"]["window"])
    kinds: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for row in table["cells"]:
        kinds.setdefault((row["name"].split("-")[0], row["angular"]), []).append(row["curves"])
    names = [f"{variant}{', LAE' if angular else ''}" for variant, angular in kinds]
    lines = []
    for curve, truth in table["truth"].items():
        distance, energy = truth["distance"], truth["energy"]
        if max(distance) < window[1]:
            continue  # opposite ions that are neutral atoms further out
        flat = tail_misfit(distance, [0.0] * len(energy), energy, window)
        cells = [curve, f"{tail_exponent(distance, energy, window):.1f}", f"{flat:.0f}"]
        for seeds in kinds.values():
            misfits = [
                tail_misfit(distance, curves[curve]["energy"], energy, window) for curves in seeds
            ]
            cells.append(_mean_and_range(misfits))
        lines.append((-flat, cells))
    return markdown_table(
        ["curve", "exponent", "flat", *names], [cells for _, cells in sorted(lines)]
    )


def _by_amount(table: Mapping[str, Any]) -> str:
    groups: dict[tuple[str, ...], dict[int, list[dict[str, float]]]] = {}
    for row in table["cells"]:
        cell = Cell(*(row[name] for name in ("node_attention", "rotary", "angular", "size")))
        key = cell.variant, "yes" if cell.angular else "no", cell.size, cell.kind
        of_amount = groups.setdefault(key, {}).setdefault(row["structures"], [])
        of_amount.append(row["errors"]["all"])
    amounts = sorted({amount for found in groups.values() for amount in found})
    speeds = table.get("throughput", {})
    lines = []
    for (*names, kind), found in sorted(groups.items(), key=lambda item: item[0][2] != "small"):
        cells = []
        for amount in amounts:
            forces = [row["force_mae"] for row in found.get(amount, [])]
            energies = [row["energy_mae_per_atom"] for row in found.get(amount, [])]
            known = forces and f"{_mean_and_range(forces)} / {statistics.mean(energies):.1f}"
            cells.append(known or "–")
        speed = f"{speeds[kind]:.0f}" if kind in speeds else "–"
        lines.append([*names, *cells, speed])
    head = ["variant", "LAE", "size", *map(str, amounts), "atoms/s"]
    return markdown_table(head, lines, align="lll" + "r" * (len(amounts) + 1))


def _mean_and_range(values: Sequence[float]) -> str:
    """As in "15 (10–20)", without the range where it does not show."""
    least, most = f"{min(values):.0f}", f"{max(values):.0f}"
    spread = f" ({least}–{most})" if least != most else ""
    return f"{statistics.mean(values):.0f}{spread}"


# --- The command -----------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("study", choices=sorted(STUDIES))
    parser.add_argument("--data", type=Path, help="folder of the data set")
    parser.add_argument("--out", type=Path, help="run folder")
    parser.add_argument(
        "--results", type=Path, help="the table, such as docs/studies/ablation/results/ions.json"
    )
    parser.add_argument(
        "--hours", type=float, default=float("inf"), help="start no training after these"
    )
    parser.add_argument(
        "--cells", nargs="+", default=["*"], metavar="PATTERN", help="as in 'rotary-*-seed0'"
    )
    add_kernels_option(parser)
    parser.add_argument("--show", action="store_true", help="only print the table --results holds")
    parser.add_argument("--list", action="store_true", help="only say which cells are done")


def run(args: argparse.Namespace) -> int:
    """Run a study, or go on with it, or show its table; the exit status."""
    study = STUDIES[args.study]
    if args.show:
        if args.results is None or not args.results.is_file():
            raise InputError(
                "--show needs a table, as in --results docs/studies/ablation/results/ions.json"
            )
        table = json.loads(args.results.read_text())
        print(f"{table['done']}\n\n{to_markdown(table)}")
        if args.study in ("ions", "pairs"):  # of a chain, longer means other atoms
            print(f"\n{tails_to_markdown(table)}")
        return 0
    if args.data is None or args.out is None:
        raise InputError("give the folder of the data, --data, and that of the runs, --out")
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
    """The command; `argv` defaults to the arguments of the process."""
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
