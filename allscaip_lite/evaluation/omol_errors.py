"""The errors that OMol25's evaluations count, of results against results.

In: two trees of results of one task (see `leaderboard`), a reference and a prediction. Out:
OMol25's errors under its names, energies in meV, forces in meV/Å, RMSD in Å. Definitions:
fairchem's module `evaluator` (fairchem-data-omol 0.1.2); D. S. Levine et al., arXiv:2505.08762.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from ase.build import minimize_rotation_and_translation
from scipy.optimize import linear_sum_assignment

from allscaip_lite.errors import DataError
from allscaip_lite.tables import markdown_table

Keys = tuple[str, ...]  # that lead to a structure, from the outside in
Tree = dict[str, Any]


class Error(NamedTuple):
    """Predicted minus reference: energy in meV, forces (N, 3) in meV/Å."""

    energy: float
    forces: np.ndarray

    def minus(self, other: Error) -> Error:
        return Error(self.energy - other.energy, self.forces - other.forces)


def metrics(task: str, reference: Tree, predicted: Tree) -> dict[str, float]:
    """OMol25's errors of a task, under its names: energies in meV, forces in meV/Å, RMSD in Å.

    Results are as `read` gives them; systems that only the predictions have are left out. Raises
    DataError where they lack a system of the reference.
    """
    check_systems(reference, [path for path, _ in _leaves(predicted)])
    try:
        found = METRICS[task](reference, predicted)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"these are no results of {task} that can be compared ({type(error).__name__}: {error})"
        ) from error
    return {name: float(value) for name, value in found.items()}


def check_systems(reference: Tree, known: Collection[Keys]) -> None:
    """Raises DataError where the reference has a structure that is not among `known`."""
    known = set(known)
    missing = [" / ".join(path) for path, _ in _leaves(reference) if path not in known]
    if missing:
        raise DataError(
            f"{len(missing)} structures of the reference are not in the inputs: "
            f"{', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}"
        )


def _leaves(tree: Any, path: Keys = ()) -> Iterator[tuple[Keys, Tree]]:
    if not isinstance(tree, dict):
        raise DataError(f"no results at {' / '.join(path) or 'all'}: give a file of results")
    if {"energy", "final"} & tree.keys():
        yield path, tree
        return
    for key, value in tree.items():
        yield from _leaves(value, (*path, str(key)))


def _error(reference: Tree, predicted: Tree) -> Error:
    """Of a single point, or of the end of a relaxation, whose forces say nothing."""
    if "final" in reference:
        return Error(1e3 * (_end(predicted) - _end(reference)), np.zeros(0))
    forces = np.subtract(predicted["forces"], reference["forces"])
    return Error(1e3 * (predicted["energy"] - reference["energy"]), 1e3 * forces)


def _errors(reference: Tree, predicted: Tree) -> dict[Keys, Error]:
    found = dict(_leaves(predicted))
    return {path: _error(truth, found[path]) for path, truth in _leaves(reference)}


def _end(result: Tree) -> float:
    return float(result["final"]["energy"])


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _mae(errors: Iterable[Error]) -> float:
    """Of energies; none count as zero, as OMol25 counts them."""
    energies = [abs(error.energy) for error in errors]
    return float(np.mean(energies)) if energies else 0.0


def _force_mae(errors: Iterable[Error]) -> float:
    return float(np.abs(np.concatenate([error.forces.ravel() for error in errors])).mean())


def _rmsd(reference: Tree, predicted: Tree) -> float:
    """Å, between the ends of two relaxations, one laid onto the other."""
    truth, moved = reference["final"]["atoms"], predicted["final"]["atoms"].copy()
    minimize_rotation_and_translation(truth, moved)
    return float(np.sqrt(((truth.positions - moved.positions) ** 2).sum(axis=1).mean()))


def _conformer_errors(reference: Tree, predicted: Tree) -> dict[str, float]:
    """Conformers are paired by RMSD, and their energies held against the truth's lowest."""
    distances, differences = [], []
    for family, members in reference.items():
        truth, others = list(members.values()), list(predicted[family].values())
        cost = np.array([[_rmsd(one, other) for other in others] for one in truth])
        rows, columns = linear_sum_assignment(cost)
        distances.append(cost[rows, columns].mean())
        errors = [_error(truth[i], others[j]) for i, j in zip(rows, columns, strict=True)]
        lowest = min(range(len(truth)), key=lambda i: _end(truth[i]))
        rest = [error for i, error in enumerate(errors) if i != lowest]
        differences.append(_mae(error.minus(errors[lowest]) for error in rest))
    return {"deltaE_mae": _mean(differences), "ensemble_rmsd": _mean(distances)}


def _protonation_errors(reference: Tree, predicted: Tree) -> dict[str, float]:
    """Between states whose charges differ by one; a state's name ends in _charge_spin."""
    distances, differences = [], []
    for name, states in reference.items():
        error = {state: _error(states[state], predicted[name][state]) for state in states}
        pairs = [
            error[one].minus(error[other])
            for one, other in combinations(states, 2)
            if abs(int(one.split("_")[-2]) - int(other.split("_")[-2])) == 1
        ]
        differences.append(_mae(pairs))
        distances.append(_mean(_rmsd(states[s], predicted[name][s]) for s in states))
    return {"deltaE_mae": _mean(differences), "rmsd": _mean(distances)}


def _state_errors(systems: Sequence[tuple[Error, Sequence[Error]]]) -> dict[str, float]:
    """Of systems in one state that the others are held against, and in those others."""
    changes = [[one.minus(base) for one in others] for base, others in systems]
    return {
        "energy_mae": _mean(_mae([base, *others]) for base, others in systems),
        "forces_mae": _force_mae(e for base, others in systems for e in (base, *others)),
        "deltaE_mae": _mean(_mae(change) for change in changes),
        "deltaF_mae": _force_mae(one for change in changes for one in change),
    }


def _ieea_errors(reference: Tree, predicted: Tree) -> dict[str, float]:
    """Against the middle one of three charges, which has one spin."""
    systems = []
    for name, charges in reference.items():
        errors = _errors(charges, predicted[name])
        low, middle, high = sorted({int(charge) for charge, _ in errors})
        (base,) = (error for (charge, _), error in errors.items() if int(charge) == middle)
        if high - low != 2:
            raise DataError(f"charges {low}, {middle}, {high} of {name} do not differ by one")
        rest = [error for (charge, _), error in errors.items() if int(charge) != middle]
        systems.append((base, rest))
    return _state_errors(systems)


def _spin_gap_errors(reference: Tree, predicted: Tree) -> dict[str, float]:
    """Against the highest spin."""
    systems = []
    for name, spins in reference.items():
        errors = {int(spin): e for (spin,), e in _errors(spins, predicted[name]).items()}
        base = errors.pop(max(errors))
        systems.append((base, list(errors.values())))
    return _state_errors(systems)


def _ligand_pocket_errors(reference: Tree, predicted: Tree) -> dict[str, float]:
    """Of all three, and of the complex less its two parts, whose atoms are found by position."""
    every: list[Error] = []
    interactions = []
    for name, parts in reference.items():
        errors = {part: _error(parts[part], predicted[name][part]) for part in parts}
        every += errors.values()
        whole = parts["ligand_pocket"]["atoms"]
        place = {(atom.number, *atom.position): atom.index for atom in whole}
        energy, forces = errors["ligand_pocket"].energy, errors["ligand_pocket"].forces.copy()
        for part in ("ligand", "pocket"):
            energy -= errors[part].energy
            atoms = parts[part]["atoms"]
            rows = [place[(atom.number, *atom.position)] for atom in atoms]
            forces[rows] -= errors[part].forces
        interactions.append(Error(energy, forces))
    return {
        "energy_mae": _mae(every),
        "forces_mae": _force_mae(every),
        "interaction_energy_mae": _mae(interactions),
        "interaction_forces_mae": _force_mae(interactions),
    }


def _ligand_strain_errors(reference: Tree, predicted: Tree) -> dict[str, float]:
    """The bound ligand's energy above the lowest conformer's, which each chooses for itself."""
    strains, distances = [], []
    for name in reference:
        truth, found = reference[name], predicted[name]
        lowest = [min(one["gas_phase"].values(), key=_end) for one in (truth, found)]
        strain = found["bioactive"]["energy"] - truth["bioactive"]["energy"]
        strains.append(1e3 * abs(strain - _end(lowest[1]) + _end(lowest[0])))
        distances.append(_rmsd(*lowest))
    return {"strain_energy_mae": _mean(strains), "global_min_rmsd": _mean(distances)}


def _distance_errors(reference: Tree, predicted: Tree) -> dict[str, float]:
    """Along a curve, against its lowest point at short range (at long range if it has no other).

    As OMol25 counts: the sum of the curves' own MAE over the number of all their points.
    """
    sums = {f"{where}_dd{what}_mae": 0.0 for where in ("sr", "lr") for what in "EF"}
    points = {"sr": 0, "lr": 0}
    curves = [(kind, name) for kind, systems in reference.items() for name in systems]
    for kind, name in curves:
        truth = reference[kind][name]
        errors = {p: _error(truth[p], predicted[kind][name][p]) for p in truth}
        ranges = {"sr": [p for p in truth if "short_range" in p]}
        ranges["lr"] = [p for p in truth if p not in ranges["sr"]]
        lowest = min(ranges["sr"] or ranges["lr"], key=lambda p: truth[p]["energy"])
        for where, chosen in ranges.items():
            changes = [errors[p].minus(errors[lowest]) for p in chosen if p != lowest]
            if changes:
                points[where] += len(chosen)
                sums[f"{where}_ddE_mae"] += _mae(changes)
                sums[f"{where}_ddF_mae"] += 3 * _force_mae(changes)  # of an atom, not a component
    return {name: value / points[name[:2]] for name, value in sums.items() if points[name[:2]]}


def _single_point_errors(reference: Tree, predicted: Tree) -> dict[str, float]:
    errors = list(_errors(reference, predicted).values())
    return {
        "energy_mae": _mae(errors),
        "energy_per_atom_mae": _mean(abs(e.energy) / len(e.forces) for e in errors),
        "forces_mae": _force_mae(errors),
    }


def table(found: dict[str, float]) -> str:
    """A Markdown table of `metrics`."""
    rows = []
    for name, value in found.items():
        if "rmsd" in name:
            unit = "Å"
        elif "forces" in name or "F_" in name:
            unit = "meV/Å"
        else:
            unit = "meV/atom" if "per_atom" in name else "meV"
        rows.append([name, f"{value:.3f}", unit])
    return markdown_table(["error", "value", "unit"], rows, align="lrl")


METRICS: dict[str, Callable[[Tree, Tree], dict[str, float]]] = {
    "conformers": _conformer_errors,
    "protonation": _protonation_errors,
    "ieea": _ieea_errors,
    "spin_gap": _spin_gap_errors,
    "ligand_pocket": _ligand_pocket_errors,
    "ligand_strain": _ligand_strain_errors,
    "distance_scaling": _distance_errors,
    "singlepoint": _single_point_errors,
}
