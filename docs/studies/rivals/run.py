"""Error against structures, size and throughput: AllScAIP in five forms, eSEN and SchNet.

In: a folder of `.aselmdb` files with labels of GFN2-xTB. Out: a file of results, and a page's
tables of all files of results in its folder:

    python docs/studies/rivals/run.py --page docs/studies/rivals/README.md

A cell is a model, its size, a number of structures and a seed. Each is trained by the package's own
loop, to the end of its schedule, for the steps that fit into the same seconds of the processor
(`--speed` times them), and kept as soon as it is done. eSEN is the backbone of fairchem-core,
SchNet that of torch_geometric: an adapter gives either the references, the forces and the loop of
AllScAIP. Without these packages their cells are missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from ase import Atoms, units
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary
from ase.md.verlet import VelocityVerlet
from scipy.spatial.transform import Rotation
from scipy.stats import linregress
from torch import Tensor, nn

from allscaip_lite import AllScAIP, AllScAIPCalculator, AllScAIPConfig
from allscaip_lite.cli import run_script
from allscaip_lite.data.aselmdb import Dataset, Subset, evenly_spaced
from allscaip_lite.errors import StructureError
from allscaip_lite.evaluation.errors import residuals, summary
from allscaip_lite.files import store_text
from allscaip_lite.kernels import choose
from allscaip_lite.machine import processor_name
from allscaip_lite.neighbors import candidate_pairs
from allscaip_lite.notebook.lessons import SMALL
from allscaip_lite.notebook.plots import LINES, STYLE
from allscaip_lite.operations import PLAIN
from allscaip_lite.structures import Structures
from allscaip_lite.tables import markdown_table
from allscaip_lite.training.loop import Stage, fit_units, train
from docs.studies.report import insert_table, save_figure

HERE = Path(__file__).parent
ETHANOL = HERE.parents[2] / "data" / "xtb" / "ethanol"
CUTOFF = 6.0  # Å, of all models
BETWEEN = ("dimers", "dimers_grid", "hydrates", "water_clusters")  # of data/xtb: several molecules
WIDTHS = {"narrow": 0.5, "usual": 1.0, "wide": 2.0}

# --- The models ------------------------------------------------------------------------------


class Placebo(AllScAIP):
    """AllScAIP whose node attention ends at the cutoff: as many weights, and no longer reach."""

    def biases(self, systems: Any, distances: Any, operations: Any) -> Sequence[Any]:
        """Of each block, -inf for atoms farther apart than the cutoff."""
        far = torch.zeros_like(distances).masked_fill(distances > CUTOFF, -torch.inf)  # (B, n, n)
        return [bias + far[:, None] for bias in super().biases(systems, distances, PLAIN)]


class Rival(AllScAIP):
    """Another network in the place of the blocks; references, units and forces are AllScAIP's.

    network: structures → (N, 1), a number for each atom, in units of `energy_scale`.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__(AllScAIPConfig(hidden_size=1, num_layers=1, num_heads=1, cutoff=CUTOFF,
                                        angular_channels=None))  # fmt: skip
        self.input, self.energy_head, self.blocks = nn.Identity(), nn.Identity(), nn.ModuleList()
        self.network = network

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def features(self, structures: Structures, *others: Any, **named: Any) -> Tensor:
        """(N, 1)."""
        return self.network(structures)

    def _atomic(self, nodes: Tensor, *others: Any) -> Tensor:
        return nodes.squeeze(1)


def edges(structures: Structures) -> Tensor:
    """(2, E): the pairs of atoms within the cutoff, in both directions, of molecules."""
    first, second, _ = candidate_pairs(structures, CUTOFF)
    return torch.cat([torch.stack([first, second]), torch.stack([second, first])], dim=1)


class Esen(nn.Module):
    """Two layers of eSEN (fairchem-core) with degrees 0 to 2."""

    def __init__(self, width: float) -> None:
        from fairchem.core.models.uma.escn_md import eSCNMDBackbone

        super().__init__()
        size = round(32 * width)
        self.backbone = eSCNMDBackbone(
            sphere_channels=size, hidden_channels=size, edge_channels=size, num_layers=2,
            lmax=2, mmax=2, cutoff=CUTOFF, num_distance_basis=64, ff_type="spectral",
            otf_graph=False, direct_forces=False, regress_stress=False, always_use_pbc=False,
            use_dataset_embedding=False,
        )  # fmt: skip
        self.head = nn.Sequential(nn.Linear(size, size), nn.SiLU(), nn.Linear(size, 1))

    def forward(self, structures: Structures) -> Tensor:
        """(N, 1)."""
        from fairchem.core.datasets.atomic_data import AtomicData

        pairs, count = edges(structures), len(structures)
        atoms = torch.zeros_like(structures.atomic_numbers)
        of_pair = structures.system[pairs[0]]
        data = AtomicData(
            structures.positions, structures.atomic_numbers, structures.cell, structures.pbc,
            structures.natoms, pairs, structures.positions.new_zeros(pairs.shape[1], 3),
            torch.bincount(of_pair, minlength=count), structures.charge, structures.spin,
            atoms, atoms, batch=structures.system, sid=[""] * count,
        )  # fmt: skip
        return self.head(self.backbone(data)["node_embedding"][:, 0])


class Neighbours(nn.Module):
    """Of SchNet: hands over the pairs (2, E) and their distances (E,) Å, which are set before."""

    pairs: Tensor
    distances: Tensor

    def forward(self, *_: Tensor) -> tuple[Tensor, Tensor]:
        return self.pairs, self.distances


class Schnet(nn.Module):
    """SchNet (torch_geometric), three blocks. It reads distances, and neither charge nor spin."""

    def __init__(self, width: float) -> None:
        from torch_geometric.nn.models import SchNet

        super().__init__()
        size = round(64 * width)
        self.network = SchNet(
            size, size, num_interactions=3, num_gaussians=50, cutoff=CUTOFF,
            interaction_graph=Neighbours(),
        )  # fmt: skip
        for block in self.network.interactions:
            del block.mlp  # a second name of `block.conv.nn`

    def forward(self, structures: Structures) -> Tensor:
        """(N, 1)."""
        pairs, positions = edges(structures), structures.positions
        graph = self.network.interaction_graph
        vectors = positions[pairs[0]] - positions[pairs[1]]
        graph.pairs, graph.distances = pairs, torch.linalg.vector_norm(vectors, dim=1)
        own = torch.arange(len(positions), device=positions.device)  # each atom its own sum
        return self.network(structures.atomic_numbers, positions, own)


def transformer(width: float, kind: type[AllScAIP] = AllScAIP, **changes: Any) -> AllScAIP:
    """AllScAIP of the lessons' size times `width`."""
    channels = tuple(round(width * channels) for channels in SMALL.angular_channels or ())
    return kind(
        SMALL.replace(
            **{
                "hidden_size": round(64 * width),
                "angular_channels": channels,
                "cutoff": CUTOFF,
                "bond_order_softness": 0.03,
                "conservative": True,
            }
            | changes
        )
    )


class Model(NamedTuple):
    """How a model is made, of a width; and its learning rate, the best of a few that were tried."""

    make: Callable[[float], AllScAIP]
    rate: float


MODELS = {
    "AllScAIP": Model(lambda width: transformer(width, direction_degree=5), 1e-2),
    "invariant": Model(transformer, 1e-2),
    "invariant, attention within 6 Å": Model(lambda width: transformer(width, Placebo), 1e-2),
    "invariant, no node attention": Model(
        lambda width: transformer(width, node_attention=False), 1e-2
    ),
    "invariant, no node attention, no angles": Model(
        lambda width: transformer(width, node_attention=False, angular_channels=None), 1e-2
    ),
    "SchNet": Model(lambda width: Rival(Schnet(width)), 1e-2),
    "eSEN": Model(lambda width: Rival(Esen(width)), 3e-3),
}
NEEDED = {"eSEN": "fairchem", "SchNet": "torch_geometric"}
AVAILABLE = [
    name for name in MODELS if name not in NEEDED or importlib.util.find_spec(NEEDED[name])
]
COMPARED = ("invariant", "invariant, no node attention", "SchNet", "eSEN")  # in three widths

# --- A cell ----------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, default=ETHANOL, help="folder of the data set")
    parser.add_argument("--structures", type=int, nargs="+", default=[20, 50, 200])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--seconds", type=float, default=40, help="of training, for each")
    parser.add_argument("--drift-ps", type=float, default=2.0, help="ps of dynamics, for the drift")
    parser.add_argument("--models", nargs="+", default=AVAILABLE, choices=AVAILABLE)
    parser.add_argument("--widths", nargs="+", default=list(WIDTHS), choices=WIDTHS)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "ethanol.json")
    parser.add_argument("--speed", action="store_true", help="time the models anew, first")
    parser.add_argument("--page", type=Path, help="write the tables into this page")


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # less than 1e-38 is 0: some processors are slow below
    found = {"cells": [], "speeds": {}}
    if args.out.exists():
        found = json.loads(args.out.read_text(encoding="utf-8"))
    test = "test" if (args.data / "test.aselmdb").exists() else "val"
    data, held = (neutral(Dataset(args.data / f"{part}.aselmdb")) for part in ("train", test))
    most = max(args.structures)
    grid = [(n, name, "usual") for n in sorted(args.structures) for name in args.models]
    others = [width for width in args.widths if width != "usual"]
    grid += [(most, name, w) for name in args.models if name in COMPARED for w in others]
    done = [row["cell"] for row in found["cells"]]
    cells = [[name, w, n, seed, args.seconds] for seed in args.seeds for n, name, w in grid]
    left = [cell for cell in cells if cell not in done]
    if args.speed or not all(speed(found, *cell[:2], "step") for cell in left):
        found["machine"] = {"processor": processor_name(), "torch": torch.__version__, "threads": 1}
        for name, timed in throughput(data, held, args.models, args.widths).items():
            found["speeds"].setdefault(name, {}).update(timed)
        store_text(args.out, json.dumps(found, indent=1) + "\n")
    for cell in left:
        name, width, structures, seed, seconds = cell
        steps = max(1, round(seconds / speed(found, name, width, "step")))
        print(*cell, f"{steps} steps", flush=True)
        row = measure(data, held, name, width, structures, seed, steps, args.drift_ps)
        found["cells"].append({"cell": cell} | row)
        store_text(args.out, json.dumps(found, indent=1) + "\n")
        print(row, flush=True)
    if args.page:
        texts = []
        for file in sorted(args.out.parent.glob("*.json")):
            found = json.loads(file.read_text(encoding="utf-8"))
            draw(found, args.page.with_name(f"{file.stem}.png"))
            picture = f"![Error against structures and throughput]({file.stem}.png)"
            tables = [f"### {file.stem.capitalize()}", picture, table(found), exponents(found)]
            texts.append("\n\n".join(filter(None, tables)))
        insert_table(args.page, "\n\n".join(texts))


def speed(found: dict[str, Any], name: str, width: str, kind: str) -> float:
    """Of a model and width: seconds of a step ("step"), atoms a second ("atoms"); 0: not timed."""
    return float(found["speeds"].get(name, {}).get(width, {}).get(kind, 0.0))


def neutral(data: Dataset) -> Subset:
    """The neutral structures without unpaired electrons, in an order drawn at random.

    SchNet knows of no other.
    """
    order = np.random.default_rng(0).permutation(len(data))
    states = [(data[int(i)].info["charge"], data[int(i)].info["spin"]) for i in order]
    return Subset(data, order[[state == (0, 1) for state in states]])


def fit(data: Subset, name: str, width: str, seed: int, steps: int) -> AllScAIP:
    """A model of `MODELS`, trained."""
    torch.manual_seed(seed)
    model = MODELS[name].make(WIDTHS[width])
    references, unit = fit_units(data, model.config.max_num_elements)
    model.element_references.copy_(references)
    model.energy_scale.fill_(unit)
    model.force_scale.fill_(unit)
    stage = Stage(
        "conservative",
        steps=steps,
        learning_rate=MODELS[name].rate / WIDTHS[width],
        energy_weight=10,
        force_weight=20,
        warmup=0.05,
        ema_decay=0.98,
        muon=1,
    )
    with tempfile.TemporaryDirectory() as folder:
        few = Subset(data, np.arange(5))
        options: dict[str, Any] = {"max_atoms": 90, "validate_every": 10**6, "save_every": 10**6}
        model = train(model, [stage], data, few, Path(folder) / "run", seed=seed, **options)
    model.operations = choose()  # the fastest, as `load_model` chooses
    return model.requires_grad_(False)


def measure(
    data: Subset,
    held: Subset,
    name: str,
    width: str,
    structures: int,
    seed: int,
    steps: int,
    drift_ps: float,
) -> dict[str, Any]:
    """Train one model on some structures, and its errors on the others; the drift is left out where
    `drift_ps` is 0.
    """
    begin = time.process_time()
    model = fit(Subset(data, np.arange(structures)), name, width, seed, steps)
    spent = time.process_time() - begin
    frames = [held[index] for index in range(len(held))]
    errors = residuals(model, held)
    mean = summary(errors)
    several = np.array([atoms.info.get("data_id") in BETWEEN for atoms in frames])
    some = evenly_spaced(len(frames), 10)
    row = {
        "parameters": model.num_parameters,
        "steps": steps,
        "seconds": spent,
        "forces": mean["force_mae"],  # meV/Å
        "energy": mean["energy_mae"],  # meV/atom
        "rotation": float(np.mean([spread(model, frames[i]) for i in some])),
    }
    if several.any():
        chosen = torch.cat(list(itertools.compress(errors.forces, several)))
        row["between"] = chosen.abs().mean().item()
    if drift_ps:
        row["drift"] = drift(model, smallest_of(frames, 9), drift_ps)
    return row


def smallest_of(frames: Sequence[Atoms], least: int) -> Atoms:
    """The first structure of the fewest atoms that are at least so many."""
    return min((atoms for atoms in frames if len(atoms) >= least), key=len)


def spread(model: AllScAIP, atoms: Atoms) -> float:
    """Standard deviation of the energy over 20 random orientations, meV/atom."""
    turned = []
    for rotation in Rotation.random(20, random_state=0):
        moved = atoms.copy()
        moved.positions = rotation.apply(atoms.positions)
        turned.append(moved)
    energies = [result.energy for result in model.predict(turned, outside_training="ignore")]
    return float(1e3 * np.std(energies) / len(atoms))


def drift(model: AllScAIP, atoms: Atoms, ps: float) -> float | None:
    """Slope of the total energy from 300 K, 0.5 fs a step, meV/atom/ps; None where it breaks."""
    atoms = atoms.copy()
    atoms.calc = AllScAIPCalculator(model, outside_training="ignore")
    rng = np.random.default_rng(0)
    MaxwellBoltzmannDistribution(atoms, temperature_K=300, rng=rng)
    Stationary(atoms)
    run, totals = VelocityVerlet(atoms, 0.5 * units.fs), []
    run.attach(lambda: totals.append(atoms.get_total_energy()), interval=10)
    try:
        run.run(round(2000 * ps))
    except StructureError:  # atoms that fly apart
        return None
    if not np.isfinite(totals).all() or np.ptp(totals) > len(atoms):
        return None
    times = np.arange(len(totals)) * 10 * 0.5e-3  # ps
    return float(1e3 * np.polyfit(times, totals, 1)[0] / len(atoms))


def throughput(
    data: Subset, held: Subset, names: Sequence[str], widths: Sequence[str]
) -> dict[str, dict[str, dict[str, float]]]:
    """Of each model and width: seconds of a step of training, and atoms a second.

    The latter of energies and forces of twenty molecules in a call. All models in turn, by the
    clock of the processor. Weights do not change it: they are random.
    """
    frames = [held[index] for index in range(20)]
    few = Subset(data, np.arange(200))
    keys = [(n, w) for n in names for w in widths if w == "usual" or n in COMPARED]
    models = {key: fit(few, *key, 0, 1) for key in keys}  # the first call imports and compiles
    steps: dict[tuple[str, str], list[float]] = {key: [] for key in keys}
    calls: dict[tuple[str, str], list[float]] = {key: [] for key in keys}
    for _ in range(3):
        for key, model in models.items():
            clock = [time.process_time()]
            for count in (3, 33):
                fit(few, *key, 0, count)
                clock.append(time.process_time())
            steps[key].append((clock[2] - 2 * clock[1] + clock[0]) / 30)
            for _ in range(4):
                clock.append(time.process_time())
                model.predict(frames, outside_training="ignore")
                calls[key].append(time.process_time() - clock[-1])
    atoms = sum(map(len, frames))
    found: dict[str, dict[str, dict[str, float]]] = {}
    for (name, width), times in steps.items():
        rate = atoms / float(np.median(calls[name, width]))
        found.setdefault(name, {})[width] = {"step": float(np.median(times)), "atoms": rate}
    return found


# --- The table -------------------------------------------------------------------------------


def table(found: dict[str, Any]) -> str:
    """Means over the seeds, of the forces also the lowest and the highest."""
    columns: dict[str, Callable[[list[dict[str, Any]]], str]] = {
        "steps": lambda cells: f"{np.mean(of(cells, 'steps')):,.0f}",
        "forces, meV/Å": lambda cells: f"{np.mean(of(cells, 'forces')):.0f}{span(cells)}",
        "of several molecules": lambda cells: f"{np.mean(of(cells, 'between')):.0f}",
        "energy, meV/atom": lambda cells: f"{np.mean(of(cells, 'energy')):.1f}",
        "spread over rotations, meV/atom": lambda cells: f"{np.mean(of(cells, 'rotation')):.3f}",
        "drift, meV/atom/ps": lambda cells: worst(of(cells, "drift")),
    }
    if not any("between" in row for row in found["cells"]):
        del columns["of several molecules"]
    kinds: dict[tuple[int, int, int], list[dict[str, Any]]] = {}
    for row in found["cells"]:
        name, width, structures = row["cell"][:3]
        place = (list(MODELS).index(name), structures, list(WIDTHS).index(width))
        kinds.setdefault(place, []).append(row)
    rows = []
    for _, cells in sorted(kinds.items()):
        name, width, structures = cells[0]["cell"][:3]
        atoms = speed(found, name, width, "atoms")
        row = [name, f"{structures:,}", f"{cells[0]['parameters']:,}"]
        row += [write(cells) for write in columns.values()]
        rows.append([*row, f"{atoms:,.0f}" if atoms else ""])
    head = ["model", "structures", "parameters", *columns, "atoms/s"]
    return markdown_table(head, rows, "l" + "r" * (len(head) - 1))


def of(cells: Sequence[dict[str, Any]], key: str) -> list[Any]:
    """What was measured of some cells; not of all was everything."""
    return [row[key] for row in cells if key in row]


def span(cells: Sequence[dict[str, Any]]) -> str:
    """Lowest and highest error of the forces, where there are several seeds."""
    forces = of(cells, "forces")
    return f" ({min(forces):.0f}–{max(forces):.0f})" if len(forces) > 1 else ""


def worst(drifts: Sequence[float | None]) -> str:
    """The largest drift of the seeds whose drift was measured."""
    if None in drifts:
        return "unstable"
    return f"{max(abs(drift) for drift in drifts if drift is not None):.3f}" if drifts else ""


def exponents(found: dict[str, Any]) -> str:
    """Of a power law through the force errors of each model, with the standard error of the fit."""
    rows = []
    for name in MODELS:
        cells = [row for row in found["cells"] if row["cell"][:2] == [name, "usual"]]
        sizes = np.log([row["cell"][2] for row in cells])
        if len(set(sizes)) > 2:
            line = linregress(sizes, np.log([row["forces"] for row in cells]))
            rows.append([name, len(cells), f"{line.slope:.2f} ± {line.stderr:.2f}"])
    head = ["model", "cells", "exponent of the force error"]
    return markdown_table(head, rows, "lrr") if rows else ""


def draw(found: dict[str, Any], file: Path) -> None:
    """Error against structures, and, with the most structures, against throughput."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    sizes = sorted({row["cell"][2] for row in found["cells"]})
    most = sizes[-1]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 4))
        left, right = figure.subplots(1, 2, sharey=True)
        for name, line in zip(MODELS, LINES, strict=True):
            own = [row for row in found["cells"] if row["cell"][0] == name]
            if not own:
                continue
            counts = sorted({row["cell"][2] for row in own if row["cell"][1] == "usual"})
            means = [mean_error(own, "usual", count) for count in counts]
            left.loglog(counts, means, **line, label=name)
            widths = [
                w for w in WIDTHS if cells_of(own, w, most) and speed(found, name, w, "atoms")
            ]
            speeds = [speed(found, name, width, "atoms") for width in widths]
            right.loglog(speeds, [mean_error(own, width, most) for width in widths], **line)
        left.set_xticks(sizes, [f"{count:,}" for count in sizes])
        left.set(xlabel="structures to train on", ylabel="force error, meV/Å")
        right.set(xlabel="atoms per second, one core", title=f"{most:,} structures, all widths")
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
        save_figure(figure, file)


def cells_of(rows: Sequence[dict[str, Any]], width: str, count: int) -> list[dict[str, Any]]:
    """The cells of a model, one for each seed."""
    return [row for row in rows if row["cell"][1:3] == [width, count]]


def mean_error(rows: Sequence[dict[str, Any]], width: str, count: int) -> float:
    """Mean force error over the seeds, meV/Å."""
    return float(np.mean(of(cells_of(rows, width, count), "forces")))


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
