"""What a model learned of energies that reach beyond its cutoff.

In: a model, and structures of two groups of atoms at known distances. Out: errors by the gap
between the groups, curves of energy and force along the distance, and how the energy falls off.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from scipy.optimize import minimize_scalar

from allscaip_lite.data.aselmdb import InMemory
from allscaip_lite.errors import DataError
from allscaip_lite.evaluation.errors import residuals
from allscaip_lite.model import AllScAIP


def errors_by_gap(
    model: AllScAIP, test: InMemory, bins: Sequence[float]
) -> dict[str, dict[str, float]]:
    """Mean absolute errors of a test set, of its parts by `data_id`, and by gap.

    Args:
        model: any.
        test: structures with labels; `info["gap"]`, in Å, where they have one.
        bins: ends of the intervals of gaps in Å; a part is named by its two ends, as in "4-8".

    Returns:
        For each part its number of structures, `energy_mae` in meV a structure,
        `energy_mae_per_atom` in meV, and `force_mae` in meV/Å.
    """
    found = residuals(model, test)
    natoms = test.natoms
    energies = found.energies.abs().double().numpy()
    forces = [force.abs().mean().item() for force in found.forces]
    groups: dict[str, list[int]] = {"all": list(range(len(test)))}
    for index, atoms in enumerate(test.structures):
        groups.setdefault(str(atoms.info.get("data_id", "unknown")), []).append(index)
        gap = atoms.info.get("gap")
        for low, high in itertools.pairwise(bins):
            if gap is not None and low <= gap < high:
                groups.setdefault(f"{low:g}-{high:g}", []).append(index)
    rows = {}
    for name, members in groups.items():
        of_atoms = natoms[members]
        rows[name] = {
            "structures": len(members),
            "energy_mae": rounded(np.mean(energies[members] * of_atoms)),
            "energy_mae_per_atom": rounded(np.mean(energies[members])),
            "force_mae": rounded(np.average([forces[i] for i in members], weights=of_atoms)),
        }
    return rows


def separation_curves(
    model: AllScAIP | None, curves: InMemory
) -> dict[str, dict[str, list[float]]]:
    """Energy and force of two groups of atoms at many distances, of a model or (None) the labels.

    The structures' `info` says which curve they belong to (`source`), the distance of the groups in
    Å, which atoms are one of them (`probe`), and the direction in which that one is moved away
    (`axis`). For each curve there are lists of `distance` in Å, `energy` in eV and `force` in eV/Å:
    that on the probe along the axis, positive where the two groups repel.

    Raises DataError where a structure lacks one of the four.
    """
    found: dict[str, dict[str, list[float]]] = {}
    structures = curves.structures
    for atoms in structures:
        if not {"axis", "probe", "distance", "source"} <= atoms.info.keys():
            raise DataError(
                f"{atoms.symbols}: a curve needs info axis, probe, distance and source; make the "
                "data with `python data/long_range/make.py`"
            )
    if model is None:
        values = [(atoms.get_potential_energy(), atoms.get_forces()) for atoms in structures]
    else:
        results = [
            result
            for first in range(0, len(structures), 64)
            for result in model.predict(structures[first : first + 64])
        ]
        values = [(result.energy, result.forces) for result in results]
    for atoms, (energy, forces) in zip(structures, values, strict=True):
        push = float(forces[atoms.info["probe"]].sum(0) @ np.array(atoms.info["axis"]))
        empty: dict[str, list[float]] = {"distance": [], "energy": [], "force": []}
        curve = found.setdefault(atoms.info["source"], empty)
        curve["distance"].append(round(float(atoms.info["distance"]), 3))
        curve["energy"].append(round(float(energy), 4))
        curve["force"].append(round(push, 5))
    return found


def tail_exponent(
    distance: Sequence[float], energy: Sequence[float], window: tuple[float, float]
) -> float:
    """n of the best a + b / rⁿ, by least squares inside `window` (Å), between 0.2 and 8.

    Coulomb's law has 1, an ion and a dipole 2, two dipoles 3. Not a number where the energy does
    not change inside the window, as in a model whose cutoff is shorter.
    """
    inside = _inside(distance, window)
    r, e = np.asarray(distance, float)[inside] / window[0], np.asarray(energy, float)[inside]
    if len(r) < 4 or np.ptp(e) < 1e-4:
        return float("nan")

    def misfit(n: float) -> float:
        basis = np.stack([np.ones_like(r), r**-n], axis=1)
        return float(((basis @ np.linalg.lstsq(basis, e)[0] - e) ** 2).sum())

    grid = np.arange(0.2, 8.01, 0.1)
    best = grid[np.argmin([misfit(n) for n in grid])]
    bounds = max(0.2, best - 0.1), min(8.0, best + 0.1)
    return float(minimize_scalar(misfit, bounds=bounds, method="bounded").x)


def tail_misfit(
    distance: Sequence[float],
    energy: Sequence[float],
    truth: Sequence[float],
    window: tuple[float, float],
) -> float:
    """How much a curve's shape differs from the true one inside `window` (Å), in meV.

    The mean absolute difference of the two, each minus its mean there. A constant has the mean
    absolute deviation of the truth itself.
    """
    shape = (np.asarray(energy) - np.asarray(truth))[_inside(distance, window)]
    return float(1000 * np.abs(shape - shape.mean()).mean())


def _inside(distance: Sequence[float], window: tuple[float, float]) -> np.ndarray:
    """Which distances lie inside the window, both ends included."""
    return (np.asarray(distance) >= window[0]) & (np.asarray(distance) <= window[1])


def rounded(value: float) -> float:
    """To five digits, for result files."""
    return float(f"{value:.5g}")
