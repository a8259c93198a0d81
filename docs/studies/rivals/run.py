"""Error against structures and throughput, for AllScAIP, eSEN and an invariant network.

In: the snapshots of ethanol in `data/xtb/ethanol`. Out: a file of results, and a page's table:

    python docs/studies/rivals/run.py --page docs/studies/rivals/README.md

A cell is a model, a number of structures and a seed. Each is trained for the same seconds of the
processor, to the end of its schedule, and kept as soon as it is done. The invariant network and the
loop that trains it are those of lesson 15, whose cells are read from there, so that there is one of
each. eSEN is the backbone of fairchem-core (the extra `parity`) in the same loop; without that
package its cells are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
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
from torch import Tensor

from allscaip_lite import AllScAIPConfig
from allscaip_lite.cli import run_script
from allscaip_lite.data.aselmdb import Dataset, Subset
from allscaip_lite.files import store_text
from allscaip_lite.kernels import choose
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
    parser.add_argument("--speed", action="store_true", help="time energies and forces anew, first")
    parser.add_argument("--page", type=Path, help="write the table into this page")


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    found = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else []
    done = [row["cell"] for row in found]
    if args.speed:
        store_text(args.out.with_name("speed.json"), json.dumps(throughput(), indent=1) + "\n")
    grid = [(n, name, seed) for seed in args.seeds for n in args.structures for name in AVAILABLE]
    for structures, name, seed in grid:
        cell = [name, structures, seed, args.seconds]
        if cell in done:
            continue
        found.append(measure(name, structures, seed, args.seconds))
        store_text(args.out, json.dumps(found, indent=1) + "\n")
        print(found[-1], flush=True)
    if args.page:
        speeds = json.loads(args.out.with_name("speed.json").read_text(encoding="utf-8"))
        insert_table(args.page, table(found, speeds))


def measure(name: str, structures: int, seed: int, seconds: float) -> dict[str, Any]:
    """Train one model on some structures, and its errors on the others."""
    whole = Dataset(ROOT / "data" / "xtb" / "ethanol" / "train.aselmdb")
    data = Subset(whole, np.arange(0, len(whole), len(whole) // structures))
    fit = MODELS[name]
    fit(data, seed, 1)  # the first call imports and compiles
    clock = [time.process_time()]
    fit(data, seed, 3)
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


def throughput() -> dict[str, float]:
    """Atoms a second: energies and forces of twenty molecules in a call, all models in turn."""
    data, held = (
        Dataset(ROOT / "data" / "xtb" / "ethanol" / f"{part}.aselmdb") for part in ("train", "val")
    )
    twenty = [held[index] for index in range(20)]
    few = Subset(data, np.arange(20))
    calls = {name: MODELS[name](few, 0, 1)[0] for name in AVAILABLE}
    seconds: dict[str, list[float]] = {name: [] for name in AVAILABLE}
    for _ in range(9):
        for name, call in calls.items():
            begin = time.process_time()
            call(twenty)
            seconds[name].append(time.process_time() - begin)
    return {name: 20 * len(twenty[0]) / float(np.median(s[2:])) for name, s in seconds.items()}


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
    model.operations = choose()  # the fastest, as `load_model` chooses

    def predict(frames: Sequence[Atoms]) -> tuple[np.ndarray, np.ndarray]:
        results = model.predict(list(frames), outside_training="ignore")
        return np.array([r.energy for r in results]), np.array([r.forces for r in results])

    return predict, model.num_parameters


def _network(data: Subset, seed: int, steps: int, **network: Any) -> tuple[Predict, int]:
    """Train a network in the loop of lesson 15, by default the one that is written there."""
    scope: dict[str, Any] = {"np": np, "torch": torch, "F": torch.nn.functional}
    for cell in json.loads(LESSON.read_text(encoding="utf-8"))["cells"]:
        if cell["id"] in ("rivals-network", "rivals-train"):
            exec("".join(cell["source"]), scope)  # noqa: S102 -- code of this repository
    trained = scope["train_rival"](data, steps, seed, **network)
    call = {"network": network["network"]} if network else {}

    def predict(frames: Sequence[Atoms]) -> tuple[np.ndarray, np.ndarray]:
        positions = torch.tensor(np.array([atoms.positions for atoms in frames])).float()
        numbers = torch.tensor(frames[0].numbers)
        energies, forces = scope["rival_predict"](trained, numbers, positions, **call)
        return energies.numpy(), forces.numpy()

    return predict, sum(part.numel() for parts in trained[0].values() for part in parts)


def _esen(data: Subset, seed: int, steps: int) -> tuple[Predict, int]:
    """Two layers of eSEN with 32 channels of degree 0 to 2, and forces from the energy."""
    from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch
    from fairchem.core.models.uma.escn_md import MLP_EFS_Head, eSCNMDBackbone

    torch.manual_seed(seed)
    backbone = eSCNMDBackbone(
        sphere_channels=32, hidden_channels=32, edge_channels=32, num_layers=2,
        lmax=2, mmax=2, cutoff=6.0, num_distance_basis=64, ff_type="spectral", otf_graph=True,
        direct_forces=False, always_use_pbc=False, use_dataset_embedding=False,
    )  # fmt: skip
    head = MLP_EFS_Head(backbone, wrap_property=False)

    def network(weights: Any, numbers: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        info = {"charge": 0, "spin": 1}
        structures = [Atoms(numbers.numpy(), one.numpy(), info=info) for one in positions]
        options: dict[str, Any] = {"task_name": "omol", "r_data_keys": ["charge", "spin"]}
        batch = atomicdata_list_to_batch([AtomicData.from_ase(s, **options) for s in structures])
        found = head(batch, backbone(batch))
        return found["energy"], found["forces"].view_as(positions)

    weights = {"all": [*backbone.parameters(), *head.parameters()]}
    found = _network(data, seed, steps, network=network, weights=weights, rate=ESEN_RATE)
    head.eval()  # no second derivatives from here on
    return found


ESEN_RATE = 3e-3  # the best of 1e-3, 3e-3 and 1e-2
MODELS: dict[str, Callable[[Subset, int, int], tuple[Predict, int]]] = {
    "AllScAIP": partial(_allscaip, SMALL.replace(direction_degree=5)),
    "AllScAIP without directions": partial(_allscaip, SMALL),
    "invariant network": _network,
    "eSEN": _esen,
}
HAS_FAIRCHEM = importlib.util.find_spec("fairchem") is not None
AVAILABLE = [name for name in MODELS if name != "eSEN" or HAS_FAIRCHEM]


def table(found: Sequence[dict[str, Any]], speeds: dict[str, float]) -> str:
    """Means over the seeds, the lowest and highest of the forces, and atoms a second by model."""
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
                    f"{speeds[name]:,.0f}" if name in speeds else "",
                ]
            )
    head = ["model", "structures", "parameters", "steps", "forces, meV/Å", "energy, meV/atom"]
    return markdown_table([*head, "spread over rotations, meV/atom", "atoms/s"], rows)


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
