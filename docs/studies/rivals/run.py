"""Error against the number of structures, for AllScAIP and an exactly invariant network.

In: the snapshots of ethanol in `data/xtb/ethanol`. Out: a file of results, and a page's table:

    python docs/studies/rivals/run.py --page docs/studies/rivals/README.md

A cell is a model, a number of structures and a seed. Each is trained for the same seconds of the
processor, to the end of its schedule, and kept as soon as it is done. The invariant network is the
one that lesson 15 writes; its cells are read from there, so that there is one of it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from scipy.spatial.transform import Rotation

from allscaip_lite import AllScAIPConfig
from allscaip_lite.cli import run_script
from allscaip_lite.data.aselmdb import Dataset, Subset
from allscaip_lite.files import store_text
from allscaip_lite.machine import processor_name
from allscaip_lite.notebook.lessons import SMALL
from allscaip_lite.tables import insert_table, markdown_table
from allscaip_lite.training.loop import Stage, fresh_model, train

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
LESSON = ROOT / "notebooks" / "15_rivals_and_scaling.ipynb"
Predict = Callable[[Sequence[Atoms]], tuple[np.ndarray, np.ndarray]]  # eV (S,), eV/Å (S, N, 3)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--structures", type=int, nargs="+", default=[20, 50, 200])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--seconds", type=float, default=40, help="of training, for each")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "cpu.json")
    parser.add_argument("--page", type=Path, help="write the table into this page")


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    found = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else []
    done = [row["cell"] for row in found]
    for seed in args.seeds:
        for structures in args.structures:
            for name in MODELS:
                cell = [name, structures, seed, args.seconds]
                if cell not in done:
                    found.append(measure(name, structures, seed, args.seconds))
                    store_text(args.out, json.dumps(found, indent=1) + "\n")
                    print(found[-1], flush=True)
    if args.page:
        insert_table(args.page, table(found))


def measure(name: str, structures: int, seed: int, seconds: float) -> dict[str, Any]:
    """Train one model on some structures, and its errors on the others."""
    whole = Dataset(ROOT / "data" / "xtb" / "ethanol" / "train.aselmdb")
    data = Subset(whole, np.arange(0, len(whole), len(whole) // structures))
    fit = MODELS[name]
    clock = [time.process_time()]
    fit(data, seed, 3)  # the first call compiles
    clock.append(time.process_time())
    fit(data, seed, 13)
    a_step = (time.process_time() - 2 * clock[1] + clock[0]) / 10
    steps = max(20, round(seconds / max(a_step, 1e-4)))
    begin = time.process_time()
    predict, parameters = fit(data, seed, steps)
    spent = time.process_time() - begin

    held = Dataset(ROOT / "data" / "xtb" / "ethanol" / "val.aselmdb")
    frames = [held[index] for index in range(len(held))]
    energies, forces = predict(frames)
    true = np.array([atoms.get_potential_energy() for atoms in frames])
    pull = np.array([atoms.get_forces() for atoms in frames])
    turned = []
    for rotation in Rotation.random(30, random_state=0):
        moved = frames[0].copy()
        moved.positions = rotation.apply(frames[0].positions)
        turned.append(moved)
    return {
        "cell": [name, structures, seed, seconds],
        "parameters": parameters,
        "steps": steps,
        "seconds": spent,
        "forces": float(1e3 * np.abs(forces - pull).mean()),  # meV/Å
        "energy": float(1e3 * np.abs(energies - true).mean() / len(frames[0])),  # meV/atom
        "rotation": float(1e3 * predict(turned)[0].std() / len(frames[0])),  # meV/atom
        "machine": {"processor": processor_name(), "torch": torch.__version__, "threads": 1},
    }


def _allscaip(config: AllScAIPConfig, data: Subset, seed: int, steps: int) -> tuple[Predict, int]:
    stage = Stage(
        "conservative",
        steps=steps,
        learning_rate=1e-2,
        energy_weight=10,
        force_weight=20,
        warmup=0.05,
        ema_decay=0.98,
        muon=1,
    )
    start = fresh_model(config, data, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        few = Subset(data, np.arange(5))
        options: dict[str, Any] = {"max_atoms": 90, "validate_every": 10**6, "save_every": 10**6}
        model = train(start, [stage], data, few, Path(folder) / "run", seed=seed, **options)

    def predict(frames: Sequence[Atoms]) -> tuple[np.ndarray, np.ndarray]:
        results = model.predict(list(frames), outside_training="ignore")
        return np.array([r.energy for r in results]), np.array([r.forces for r in results])

    return predict, model.num_parameters


def _network(data: Subset, seed: int, steps: int) -> tuple[Predict, int]:
    scope: dict[str, Any] = {"np": np, "torch": torch, "F": torch.nn.functional}
    for cell in json.loads(LESSON.read_text(encoding="utf-8"))["cells"]:
        if cell["id"] in ("rivals-network", "rivals-train"):
            exec("".join(cell["source"]), scope)  # noqa: S102 -- code of this repository
    trained = scope["train_rival"](data, steps, seed)

    def predict(frames: Sequence[Atoms]) -> tuple[np.ndarray, np.ndarray]:
        positions = torch.tensor(np.array([atoms.positions for atoms in frames])).float()
        numbers = torch.tensor(frames[0].numbers)
        energies, forces = scope["rival_predict"](trained, numbers, positions)
        return energies.numpy(), forces.numpy()

    return predict, sum(part.numel() for parts in trained[0].values() for part in parts)


MODELS: dict[str, Callable[[Subset, int, int], tuple[Predict, int]]] = {
    "AllScAIP": partial(_allscaip, SMALL.replace(direction_degree=5)),
    "AllScAIP without directions": partial(_allscaip, SMALL),
    "invariant network": _network,
}


def table(found: Sequence[dict[str, Any]]) -> str:
    """Means over the seeds, and the lowest and highest of the forces."""
    rows = []
    for name in MODELS:
        for structures in sorted({row["cell"][1] for row in found}):
            cells = [row for row in found if row["cell"][:2] == [name, structures]]
            if not cells:
                continue
            mean = {
                key: np.mean([row[key] for row in cells])
                for key in ("steps", "forces", "energy", "rotation")
            }
            low, high = (pick(row["forces"] for row in cells) for pick in (min, max))
            rows.append(
                [
                    name,
                    str(structures),
                    f"{cells[0]['parameters']:,}",
                    f"{mean['steps']:.0f}",
                    f"{mean['forces']:.0f} ({low:.0f}–{high:.0f})",
                    f"{mean['energy']:.1f}",
                    f"{mean['rotation']:.3f}",
                ]
            )
    head = ["model", "structures", "parameters", "steps", "forces, meV/Å", "energy, meV/atom"]
    return markdown_table([*head, "spread over rotations, meV/atom"], rows)


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(
        add_arguments,
        run,
        script="docs/studies/rivals/run.py",
        description=__doc__,
        stopped="the same command goes on from here",
        argv=argv,
    )


if __name__ == "__main__":
    sys.exit(main())
