"""How far a model is from its labels: `allscaip-lite evaluate`.

In: a model and a data set in OMol25's format. Out: mean absolute (MAE) and root mean square (RMSE)
errors of the energy in meV/atom, of force components in meV/Å, and, where there are such labels, of
the stress in bar, overall and by domain, element, charge, multiplicity, molecule and size, of one
model or of several side by side; pictures of them; and the predictions themselves, in the format of
OMol25's leaderboard.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from ase import units
from ase.data import chemical_symbols
from torch import Tensor
from tqdm import tqdm

from allscaip_lite.checkpoints import load_model, read_card, save_model
from allscaip_lite.data.aselmdb import SLOW, Dataset, LabelledData
from allscaip_lite.data.batches import fill_batches, in_order
from allscaip_lite.data.checks import agreement
from allscaip_lite.electrons import Assumptions, charge_and_spin, say_assumptions
from allscaip_lite.errors import DataError, InputError
from allscaip_lite.files import atomic_write, check_writable, locked_file
from allscaip_lite.kernels import add_kernels_option
from allscaip_lite.machine import usable_device
from allscaip_lite.model import AllScAIP, check_model
from allscaip_lite.structures import in_own_numbers
from allscaip_lite.tables import markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Residuals(NamedTuple):
    """Predicted minus labelled, of S structures: energies (S,) in meV/atom, forces, S of (n, 3), in
    meV/Å, and stresses (S, 3, 3) in bar, not a number where a structure or the model has none.
    deviations: the model's own standard deviations of the energies, (S,) in meV/atom, if it has
    such.
    """

    energies: Tensor
    forces: list[Tensor]
    stresses: Tensor
    deviations: Tensor | None = None


@torch.no_grad()
@in_own_numbers
def residuals(model: AllScAIP, data: LabelledData, progress: bool = False) -> Residuals:
    """Errors of every structure of a data set, in its order; the model evaluates afterwards."""
    check_model(model)
    model.eval()
    energies, forces, stresses, deviations = [], [], [], []
    with tqdm(total=len(data), unit="structures", disable=not progress) as bar:
        for batch in in_order(data, 400):
            hidden: list[Tensor] = []
            with model.operations.threads(len(batch.structures.positions)):
                energy, force, stress = model(batch.structures, False, hidden=hidden)
            natoms = batch.structures.natoms
            energies.append(1e3 * (energy.cpu() - batch.energy) / natoms)
            forces.extend((1e3 * (force.cpu().double() - batch.forces)).split(natoms.tolist()))
            missing = torch.full_like(batch.stress, torch.nan)
            stress = missing if stress is None else stress.cpu() - batch.stress
            stresses.append(stress.double() / units.bar)
            if model.posterior is not None:
                deviation = model.energy_uncertainty(batch.structures, *hidden).cpu()
                deviations.append(1e3 * deviation / natoms)
            bar.update(len(natoms))
    doubts = torch.cat(deviations) if deviations else None
    return Residuals(torch.cat(energies), forces, torch.cat(stresses), doubts)


def summary(found: Residuals) -> dict[str, float]:
    """MAE and RMSE in the units of `Residuals`, and the number of structures.

    Of stresses, where there are any, the MAE of the components and of the pressure; of the model's
    own standard deviations, their mean.
    """
    flat = torch.cat([force.flatten() for force in found.forces])
    row = {
        "structures": len(found.energies),
        "energy_mae": found.energies.abs().mean().item(),
        "energy_rmse": found.energies.square().mean().sqrt().item(),
        "force_mae": flat.abs().mean().item(),
        "force_rmse": flat.square().mean().sqrt().item(),
    }
    if found.deviations is not None:
        row["deviation"] = found.deviations.mean().item()
    known = found.stresses[found.stresses.isfinite().all(2).all(1)]
    if len(known):
        row["stress_mae"] = known.abs().mean().item()
        row["pressure_mae"] = (known.diagonal(dim1=1, dim2=2).mean(1)).abs().mean().item()
    return row


def evaluate(model: AllScAIP, data: LabelledData) -> dict[str, float]:
    """`summary` of a whole data set."""
    return summary(residuals(model, data))


def outside_of_training(model: AllScAIP, data: LabelledData) -> dict[str, int]:
    """How many structures have something that the model did not see in training, by kind."""
    counts: dict[str, int] = {}
    if model.seen is not None:
        for batch in in_order(data, 1000):
            for _, kind, _ in model.seen.outside(batch.structures):
                counts[kind] = counts.get(kind, 0) + 1
    return counts


# --- By groups -------------------------------------------------------------------------------


Rows = dict[str, dict[str, float]]  # a `summary` of each group, by its name


class Description(NamedTuple):
    """What a structure is, and its labels: energy in eV, forces (n, 3) in eV/Å."""

    domain: str
    source: str
    molecule: str  # SMILES, with a dot between two that are not bound, where it is kept
    charge: int
    multiplicity: int
    numbers: np.ndarray
    energy: float
    forces: np.ndarray
    xtb: tuple[float, np.ndarray] | None  # GFN2-xTB's own energy and forces, where they are kept


def describe(data: Dataset) -> list[Description]:
    """Of every structure of a labelled data set, in its order."""
    found = []
    assumed: Assumptions = {}
    for index in tqdm(range(len(data)), desc="looking at the data", delay=SLOW, leave=False):
        atoms = data[index]
        charge, spin = charge_and_spin(atoms, f"structure {index}", assumed=assumed)
        info, labels = atoms.info, atoms.calc.results
        xtb = (info["xtb_energy"], info["xtb_forces"]) if "xtb_energy" in info else None
        found.append(
            Description(
                str(info.get("data_id", "unknown")),
                str(info.get("source", index)),
                str(info.get("molecule", "unknown")),
                charge,
                spin,
                atoms.numbers,
                float(labels["energy"]),
                np.asarray(labels["forces"]),
                xtb,
            )
        )
    say_assumptions(assumed)
    return found


SIZES = (1, 4, 8, 12, 16, 24, 32, 48, 64, 100, 200, 350)  # atoms: where one bin of sizes ends
GROUPS: dict[str, Callable[[Description], str | int]] = {
    "domain": lambda what: what.domain,
    "charge": lambda what: what.charge,
    "multiplicity": lambda what: what.multiplicity,
    "molecule": lambda what: f"`{what.molecule}`",  # brackets would be links in markdown
    "atoms": lambda what: _bin(len(what.numbers)),
}


def containing(smiles: str) -> Callable[[Description], str]:
    """A key for `by_group`: whether this is one of the molecules of a structure."""
    return lambda what: f"{'with' if smiles in what.molecule.split('.') else 'without'} `{smiles}`"


def _bin(size: int) -> int:
    """The smallest number of `SIZES` that is not below a size, or the size itself."""
    return next((limit for limit in SIZES if size <= limit), size)


def by_group(
    described: Sequence[Description], found: Residuals, key: Callable[[Description], str | int]
) -> Rows:
    """`summary` by groups: a row for each value of `key`, in order, and the row `all`.

    `found` are the residuals of the structures, in the same order; `key` says the group of one, as
    those of `GROUPS` do.
    """
    groups: dict[str | int, list[int]] = {}
    for index, what in enumerate(described):
        groups.setdefault(key(what), []).append(index)
    rows = {str(name): summary(_chosen(found, groups[name])) for name in sorted(groups)}
    return {**rows, "all": summary(found)}


def by_element(described: Sequence[Description], found: Residuals) -> Rows:
    """`summary` by element: energies of the structures that contain it, forces on its atoms."""
    rows = {}
    for number in sorted({int(z) for what in described for z in what.numbers}):
        members = [i for i, what in enumerate(described) if number in what.numbers]
        forces = [found.forces[i][torch.as_tensor(described[i].numbers == number)] for i in members]
        chosen = _chosen(found, members)._replace(forces=forces)
        rows[chemical_symbols[number]] = summary(chosen)
    return {**rows, "all": summary(found)}


def _chosen(found: Residuals, members: list[int]) -> Residuals:
    forces = [found.forces[i] for i in members]
    doubts = None if found.deviations is None else found.deviations[members]
    return Residuals(found.energies[members], forces, found.stresses[members], doubts)


def rank_correlation(found: Residuals) -> float:
    """Spearman's, of the model's own deviations of energies and their errors, both an atom: 1 where
    a structure with a larger deviation always has the larger error, 0 where they have nothing to do
    with each other.
    """
    from scipy.stats import spearmanr

    assert found.deviations is not None
    return float(spearmanr(found.deviations, found.energies.abs()).statistic)


# --- Levels of theory ------------------------------------------------------------------------


def fit_references(described: Sequence[Description], found: Residuals) -> Residuals:
    """The residuals after a least-squares energy of each element and of a charge is taken off.

    Two levels of theory differ by a constant for each element, and for each electron that is taken
    away, above all: without it, nothing can be said of how well the one follows the other.
    Raises DataError where there are fewer structures than elements.
    """
    natoms = torch.tensor([len(what.numbers) for what in described], dtype=torch.float64)
    largest = max(int(what.numbers.max()) for what in described)
    counts = torch.stack(
        [torch.bincount(torch.as_tensor(w.numbers), minlength=largest + 1) for w in described]
    ).double()
    counts = counts[:, counts.any(0)]
    if len(described) <= counts.shape[1] + 1:
        raise DataError(
            f"{len(described)} structures of {counts.shape[1]} elements: too few to fit an energy "
            "of each element and of a charge"
        )
    charges = torch.tensor([[what.charge] for what in described], dtype=torch.float64)
    counts = torch.cat([counts, charges], dim=1)
    total = found.energies.double() * natoms  # meV a structure
    shift = torch.linalg.lstsq(counts / natoms[:, None], total / natoms, driver="gelsd").solution
    return found._replace(energies=(total - counts @ shift) / natoms)


def xtb_residuals(described: Sequence[Description]) -> Residuals:
    """GFN2-xTB's own errors against the labels, of data that keep `xtb_energy` and `xtb_forces`,
    after `fit_references`. Raises DataError for other data.
    """
    return fit_references(described, _xtb_unfitted(described))


def _xtb_unfitted(described: Sequence[Description]) -> Residuals:
    kept = [(w, *w.xtb) for w in described if w.xtb is not None]
    if len(kept) < len(described):
        raise DataError("not every structure keeps xtb_energy and xtb_forces")
    energies = [1e3 * (energy - w.energy) / len(w.numbers) for w, energy, _ in kept]
    forces = [torch.as_tensor(1e3 * (force - w.forces)) for w, _, force in kept]
    none = torch.full((len(described), 3, 3), torch.nan)
    return Residuals(torch.tensor(energies), forces, none)


ANOTHER_LEVEL = 1000.0  # meV/atom, the median error above which energies have another zero
ABSURD = 5.0  # eV/atom, or of the model's own unit: twice the worst on labels of its own level
MIN_STRUCTURES = 100  # below it, what a fit of references leaves says little


def check_zero(missing: Tensor, model: AllScAIP) -> None:
    """Raise `DataError` where labels minus a model's energies, (S,) eV/atom, are absurd."""
    mean = float(missing.abs().mean())
    if mean > ABSURD * max(1.0, float(model.energy_scale)):
        raise DataError(
            f"the labels are {mean:,.0f} eV/atom away from the model's energies, in the mean of "
            f"{len(missing)} structures: are they of another level of theory, of several, or in "
            "another unit? `allscaip-lite train --from MODEL` without --keep-references (in "
            "Python, shift_references) moves a model to the level of theory of its data"
        )


def _on_one_zero(described: Sequence[Description], found: Residuals) -> tuple[Residuals, bool]:
    """`fit_references` where energies are of another level of theory, and whether that was done;
    without energies (not a number) where there are not `MIN_STRUCTURES` structures for it.
    """
    if found.energies.abs().median() <= ANOTHER_LEVEL:
        return found, False
    if len(described) < MIN_STRUCTURES:
        return found._replace(energies=torch.full_like(found.energies, torch.nan)), False
    return fit_references(described, found), True


# --- Tables, pictures, files -----------------------------------------------------------------

COLUMNS = {
    "energy_mae": "energy MAE",
    "energy_rmse": "RMSE (meV/atom)",
    "deviation": "its own deviation",
    "force_mae": "force MAE",
    "force_rmse": "RMSE (meV/Å)",
    "stress_mae": "stress MAE",
    "pressure_mae": "pressure MAE (bar)",
}


def table(rows: Rows, head: str = "domain") -> str:
    """A Markdown table of `by_group`; a group without stresses has dashes there."""
    columns = [name for name in COLUMNS if any(name in row for row in rows.values())]
    return markdown_table(
        [head, "structures", *(COLUMNS[name] for name in columns)],
        (
            [name, row["structures"], *(_shown(row.get(column), 1) for column in columns)]
            for name, row in rows.items()
        ),
    )


def side_by_side(models: dict[str, Rows], head: str = "domain") -> str:
    """A Markdown table of the MAEs of several models, each with its rows of `by_group`; a dash
    where there is none.
    """
    names, first = list(models), next(iter(models.values()))
    lines = []
    for group, row in first.items():
        errors = [
            rows[group][kind] for kind in ("force_mae", "energy_mae") for rows in models.values()
        ]
        lines.append([group, row["structures"], *(_shown(error, 0) for error in errors)])
    forces, energies = list(names), list(names)
    forces[0] = f"force MAE (meV/Å): {names[0]}"
    energies[0] = f"energy MAE (meV/atom): {names[0]}"
    return markdown_table([head, "structures", *forces, *energies], lines)


def _shown(value: float | None, digits: int) -> str:
    return "–" if value is None or np.isnan(value) else f"{value:.{digits}f}"


def plot_errors(described: Sequence[Description], found: Residuals) -> Figure:
    """Four panels: energies and forces predicted against labelled, error against size, by domain.

    Energies without what a least-squares fit by element and charge explains (of the labels), in
    eV/atom.
    """
    from matplotlib.figure import Figure

    sizes = np.array([len(what.numbers) for what in described])
    labels = torch.tensor([1e3 * w.energy / len(w.numbers) for w in described], dtype=torch.float64)
    try:
        centred = fit_references(described, found._replace(energies=labels)).energies / 1e3
    except DataError:  # a handful of structures
        centred = (labels - labels.mean()) / 1e3
    figure = Figure(figsize=(11, 8.5), layout="constrained")
    (energy, force), (size, domain) = figure.subplots(2, 2)
    truth = centred.numpy()
    _parity(energy, truth, truth + found.energies.numpy() / 1e3, "energy − elements (eV/atom)")
    flat = np.concatenate([what.forces.ravel() for what in described])
    error = torch.cat([part.flatten() for part in found.forces]).numpy() / 1e3
    _parity(force, flat, flat + error, "force component (eV/Å)")

    each = np.array([part.abs().mean().item() for part in found.forces])
    size.scatter(sizes, each, s=8, color="0.6", label="one structure, forces")
    limits = sorted({_bin(n) for n in sizes})
    middles = [each[[_bin(n) == limit for n in sizes]] for limit in limits]
    centres = [sizes[[_bin(n) == limit for n in sizes]].mean() for limit in limits]
    size.plot(centres, [part.mean() for part in middles], "o-", color="#d55e00", label="mean")
    size.set(xlabel="atoms", ylabel="force MAE (meV/Å)", yscale="log")
    size.legend()

    rows = by_group(described, found, GROUPS["domain"])
    names = list(rows)[::-1]
    domain.barh(names, [rows[name]["force_mae"] for name in names], color="#0072b2")
    domain.set(xlabel="force MAE (meV/Å)")
    domain.margins(x=0.14)
    for index, name in enumerate(names):
        text = f" {rows[name]['force_mae']:.0f} ({rows[name]['structures']})"
        domain.text(rows[name]["force_mae"], index, text, va="center", fontsize="small")
    return figure


def _parity(axes: Any, truth: np.ndarray, predicted: np.ndarray, name: str) -> None:
    ends = [min(truth.min(), predicted.min()), max(truth.max(), predicted.max())]
    axes.plot(ends, ends, color="0.6", linewidth=1)
    if len(truth) > 2000:
        axes.hexbin(truth, predicted, gridsize=80, bins="log", mincnt=1, cmap="viridis")
    else:
        axes.scatter(truth, predicted, s=8, color="#d55e00")
    axes.set(xlabel=f"labelled {name}", ylabel=f"predicted {name}")


def write_predictions(model: AllScAIP, data: Dataset, file: Path) -> None:
    """Predictions as OMol25's leaderboard takes them: a `.npz` with `ids` (each structure's
    `source`), `energy` (S,) eV, `forces` (all atoms, 3) eV/Å and `natoms` (S,); of structures with
    or without labels (`Dataset(..., labelled=False)`).
    """
    ids, results = [], []
    with tqdm(total=len(data), unit="structures") as bar:
        for members in fill_batches(data.natoms, 400):
            structures = [data[index] for index in members]
            ids += [str(a.info.get("source", i)) for a, i in zip(structures, members, strict=True)]
            results += model.predict(structures, outside_training="ignore")
            bar.update(len(members))
    arrays: dict[str, Any] = {
        "ids": np.array(ids),
        "energy": np.array([result.energy for result in results]),
        "forces": np.concatenate([result.forces for result in results]).astype(np.float32),
        "natoms": data.natoms,
    }
    with atomic_write(file) as unfinished:
        np.savez_compressed(unfinished, **arrays)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `allscaip-lite evaluate`."""
    parser.add_argument("model", help="a name such as lite, or a file (.safetensors or .pt)")
    parser.add_argument("data", type=Path, nargs="+", help=".aselmdb files, or folders of them")
    parser.add_argument("--device", help="default: a CUDA GPU where there is one")
    add_kernels_option(parser)
    parser.add_argument(
        "--by",
        nargs="+",
        default=["domain"],
        choices=[*GROUPS, "element"],
        help="tables by these (default: domain)",
    )
    parser.add_argument(
        "--containing",
        metavar="SMILES",
        help="one table more: structures with this molecule, and without it",
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        default=[],
        metavar="MODEL",
        help="mean absolute errors of these models, and of GFN2-xTB where the data keep it, in the "
        "same tables; energies of another level of theory after --fit-references",
    )
    parser.add_argument("--plots", type=Path, metavar="FILE", help="write a picture (.png, .pdf)")
    parser.add_argument(
        "--predictions",
        type=Path,
        metavar="FILE",
        help="write the predictions (.npz), in the format of OMol25's leaderboard; alone with "
        "--unlabelled",
    )
    parser.add_argument(
        "--unlabelled", action="store_true", help="the data have no labels: predictions only"
    )
    parser.add_argument(
        "--fit-references",
        action="store_true",
        help="for labels of another level of theory: take off an energy of each element and of a "
        "unit of charge first",
    )
    parser.add_argument(
        "--save", type=Path, help="write the model here, with the errors in its card (.safetensors)"
    )
    parser.add_argument("--note", default="", help="a line for that card: how it was trained")


def _tables(
    args: argparse.Namespace, described: Sequence[Description]
) -> list[tuple[str, Callable[[Residuals], Rows]]]:
    """The head of each table that the arguments ask for, and the function that makes its rows."""
    tables: list[tuple[str, Callable[[Residuals], Rows]]] = []
    for group in args.by:
        if group == "element":
            tables.append((group, partial(by_element, described)))
        else:
            head = "up to so many atoms" if group == "atoms" else group
            tables.append((head, partial(by_group, described, key=GROUPS[group])))
    if args.containing:
        key = containing(args.containing)
        if len({key(what) for what in described}) < 2:
            molecules = sorted({what.molecule for what in described})
            raise InputError(
                f"--containing {args.containing}: all structures or none; molecules here are "
                f"{', '.join(molecules[:8])}{', ...' if len(molecules) > 8 else ''}"
            )
        tables.append(("molecules", partial(by_group, described, key=key)))
    return tables


def run(args: argparse.Namespace) -> None:
    """`allscaip-lite evaluate`."""
    kinds = {"plots": (".png", ".pdf", ".svg"), "predictions": (".npz",), "save": (".safetensors",)}
    for option, suffixes in kinds.items():
        file = getattr(args, option)
        if file and (file.suffix not in suffixes or not file.resolve().parent.is_dir()):
            raise InputError(
                f"--{option} {file}: give a file {' or '.join(suffixes)} in a folder that exists"
            )
        if file:
            check_writable(file)
    if args.save and args.fit_references:
        raise InputError(
            "--save writes the errors of the model as it is: leave out --fit-references"
        )
    if args.compare and args.unlabelled:
        raise InputError("--compare is for errors: leave out --unlabelled")
    with locked_file(args.save) if args.save else nullcontext():
        _run(args)


def _run(args: argparse.Namespace) -> None:
    device = usable_device(args.device)

    def load(name: str) -> AllScAIP:
        return load_model(name, device=device, kernels=args.kernels).requires_grad_(False)

    model = load(args.model)
    others = {name: load(name) for name in args.compare}
    if args.unlabelled:
        if not args.predictions:
            raise InputError("--unlabelled: say where to, with --predictions FILE.npz")
        write_predictions(model, Dataset(args.data, labelled=False), args.predictions)
        print(f"written: {args.predictions}")
        return
    data = Dataset(args.data)
    described = describe(data)
    tables = _tables(args, described)
    keep_xtb = all(what.xtb is not None for what in described)
    found = residuals(model, data, progress=True)
    if args.fit_references:
        found = fit_references(described, found)
    if args.compare:
        models: dict[str, tuple[Residuals, bool]] = {args.model: (found, args.fit_references)}
        for name, other in others.items():
            models[name] = _on_one_zero(described, residuals(other, data, progress=True))
        if keep_xtb:
            models["GFN2-xTB"] = _on_one_zero(described, _xtb_unfitted(described))
        for head, rows_of in tables:
            rows = {name: rows_of(errors) for name, (errors, _) in models.items()}
            print(side_by_side(rows, head), end="\n\n")
        if fitted := [name for name, (_, fitted) in models.items() if fitted]:
            print(f"Energies after a fit of elements and charge: {', '.join(fitted)}.")
    else:
        for head, rows_of in tables:
            print(table(rows_of(found), head), end="\n\n")
        if keep_xtb and len(described) >= MIN_STRUCTURES:
            print("GFN2-xTB itself, on the same structures, after a fit of elements and charge:")
            of_xtb = by_group(described, xtb_residuals(described), GROUPS["domain"])
            print(table(of_xtb), end="\n\n")
    if outside := outside_of_training(model, data):
        listed = ", ".join(f"{kind} {count}" for kind, count in outside.items())
        print(f"Structures outside of what {args.model} saw in training: {listed}.")
    if found.deviations is not None and len(described) > 2:
        print(
            "The model's own deviations rank the errors of its energies with a correlation of "
            f"{rank_correlation(found):.2f} (Spearman; 1: perfectly, 0: not at all)."
        )
    if not args.fit_references and found.energies.abs().median() > ANOTHER_LEVEL:
        print(
            "Energies are off by more than 1 eV/atom: labels of another level of theory? "
            "--fit-references takes off what is a constant of each element and of a charge."
        )
    labels = 1e3 * np.concatenate([what.forces for what in described])
    factor, fit = agreement(np.concatenate(found.forces) + labels, labels)
    if abs(fit) > 0.9 and not 0.5 < factor < 2:
        print(
            f"The model's forces are {factor:.3g} times the labels: are these gradients, or not in "
            "eV/Å (1 hartree/bohr is 51.4221 eV/Å)?"
        )
    if args.plots:
        with atomic_write(args.plots) as unfinished:
            plot_errors(described, found).savefig(unfinished, dpi=150)
        print(f"written: {args.plots}")
    if args.predictions:
        write_predictions(model, data, args.predictions)
        print(f"written: {args.predictions}")
    if args.save:
        card: dict[str, Any] = {
            **read_card(args.model),
            "errors": by_group(described, found, GROUPS["domain"]),
            "errors_on": ", ".join(path.name for path in args.data),
            "units": "energy meV/atom, forces meV/Å and stress bar (components)",
            "measured_with": f"torch {torch.__version__}, {platform.machine()}, {device}",
        }
        if args.note:
            card["trained"] = args.note
        save_model(model, args.save, card)
        print(f"written: {args.save}")
