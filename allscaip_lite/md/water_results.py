"""Results of the water benchmark: reading, pooling over seeds, and judging against the teacher.

In: the JSON files that `docs/studies/water/run.py` writes, one for each run. Out: one result for
each model, its estimates with errors, and how far each is from the teacher's.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from allscaip_lite.errors import RunError
from allscaip_lite.files import differing
from allscaip_lite.md.observables import Estimate, heat_of_vaporization

TEACHER = "spcfw"
PRODUCTION = ("gas", "npt", "nvt", "nve")  # the stages that are measured, in the order they run in
STAGE_OF = {  # the stage that an observable is measured in; the others in nvt
    "temperature_npt_K": "npt",
    "temperature_nve_K": "nve",
    "density_g_cm3": "npt",
    "density_beside_g_cm3": "npt",
    "density_asked_g_cm3": "npt",
    "excess_pressure_bar": "npt",
    "liquid_energy_kJ_mol": "npt",
    "vaporisation_kJ_mol": "npt",
    "vaporisation_unstrained_kJ_mol": "npt",
    "gas_energy_kJ_mol": "gas",
    "drift_meV_atom_ps": "nve",
    "pressure_nve_bar": "nve",
}


class Target(NamedTuple):
    """How far a model may be from its teacher: a share of the teacher's value, or an amount.

    A drift is measured from zero.
    """

    amount: float
    relative: bool


TARGETS = {
    "density_g_cm3": Target(0.02, True),
    "density_beside_g_cm3": Target(0.02, True),
    "density_asked_g_cm3": Target(0.02, True),
    "vaporisation_kJ_mol": Target(0.03, True),
    "OO_peak_A": Target(0.05, False),
    "OO_height": Target(0.05, True),
    "OO_height_beside": Target(0.05, True),
    "OO_height_asked": Target(0.05, True),
    "drift_meV_atom_ps": Target(0.05, False),
}

# Differences between a model and its teacher, and the observable that each is a difference of.
DIFFERENCES = {
    "density_beside_g_cm3": "density_g_cm3",
    "density_asked_g_cm3": "density_g_cm3",
    "OO_height_beside": "OO_height",
    "OO_height_asked": "OO_height",
}


def read_results(files: Sequence[str | os.PathLike[str]]) -> list[dict[str, Any]]:
    """Result files, those of one model pooled; in the order of the names, teacher last.

    Raises RunError for files of different settings, which cannot be compared.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    results = [read_result(file) for file in files]
    for file, result in zip(files, results, strict=True):
        if changed := differing(result["protocol"], results[0]["protocol"], but=["seed"]):
            raise RunError(
                f"{file} was made with another {', '.join(changed)} than {files[0]}: "
                "run one of them again, or leave it out"
            )
        found.setdefault(result["name"], []).append(result)
    return [pool(found[name]) for name in sorted(found, key=lambda name: (name == TEACHER, name))]


def read_result(file: str | os.PathLike[str]) -> dict[str, Any]:
    """A result file, its estimates as `Estimate`. Raises RunError for another file."""
    found = json.loads(Path(file).read_text())
    try:
        found["observables"] = {
            key: Estimate(*(math.nan if x is None else x for x in pair))
            for key, pair in found["observables"].items()
        }
    except (KeyError, TypeError) as error:
        raise RunError(f"{file} is no result of the water benchmark") from error
    return found


def pool(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Runs of one model with different seeds as one result; lengths and hours are sums.

    Estimates and distributions are means weighted by the lengths of the stage they are from, heats
    of vaporization follow from such means, series are those of the longest run.

    Raises:
        RunError: for runs of different models or settings, or with the same seed, which
            would count one run twice.
    """
    if len(results) == 1:
        return results[0]
    plans = [{"name": result["name"], **result["protocol"]} for result in results]
    seeds = [plan.pop("seed") for plan in plans]
    if any(plan != plans[0] for plan in plans) or len({*seeds}) < len(seeds):
        raise RunError(
            f"runs of {plans[0]['name']} with seeds {', '.join(map(str, seeds))} cannot be "
            "pooled: they need the same settings and different seeds"
        )

    def weighted(having: Sequence[dict[str, Any]], stage: str, parts: Sequence[Any]) -> np.ndarray:
        """Mean of what each result has; the last row of a part is its standard errors."""
        lengths = np.array([result["lengths_ps"][stage] for result in having])
        shares = (lengths / lengths.sum())[:, None, None]
        values = np.array([np.reshape(part, (len(part), -1)) for part in parts])
        mean = (shares * values).sum(0)
        mean[-1] = np.sqrt(((shares * values)[:, -1] ** 2).sum(0))
        return mean

    pooled: dict[str, Any] = {**results[0], "observables": {}, "distributions": {}}
    for name in ("lengths_ps", "hours"):
        stages = [stage for stage in PRODUCTION if any(stage in result[name] for result in results)]
        pooled[name] = {
            stage: round(sum(result[name].get(stage, 0) for result in results), 6)
            for stage in stages
        }
    for key in dict.fromkeys(key for result in results for key in result["observables"]):
        having = [result for result in results if key in result["observables"]]
        estimates = [result["observables"][key] for result in having]
        mean = weighted(having, STAGE_OF.get(key, "nvt"), estimates)
        pooled["observables"][key] = Estimate(*map(float, mean[:, 0]))
    if "liquid_energy_kJ_mol" in pooled["observables"]:  # of all runs, as the energies are
        add_vaporization(pooled["observables"], results[0]["protocol"]["temperature"])
    for pair in ("OO", "OH", "HH"):
        having = [result for result in results if pair in result["distributions"]]
        if having:
            tables = [result["distributions"][pair] for result in having]
            mean = weighted(having, "nvt", [list(table.values()) for table in tables])
            pooled["distributions"][pair] = dict(zip(tables[0], mean.tolist(), strict=True))
    for name, stage_of in (
        ("series", {**{stage: stage for stage in PRODUCTION}, "beside": "npt"}),
        ("correlation_ps", {"density": "npt", "dipole": "nvt"}),
    ):
        pooled[name] = {}
        for key, stage in stage_of.items():
            having = [result for result in results if key in result[name]]
            if having:
                longest = max(having, key=lambda result: result["lengths_ps"][stage])
                pooled[name][key] = longest[name][key]
    pooled["exploded"] = sorted({stage for result in results for stage in result["exploded"]})
    return pooled


def verdict(key: str, model: Estimate, teacher: Estimate) -> tuple[float, float, str]:
    """How far a model is from its teacher, the standard error of that, and a word.

    Args:
        key: an observable that has a target.
        model: of the model; where `key` is one of `DIFFERENCES`, the difference itself.
        teacher: of the teacher, for one of `DIFFERENCES` of the observable that it belongs to.

    Returns:
        Distance and error, as a share of the teacher's value or as an amount, whichever the target
        is; and `met`, `missed`, or `open` where one standard error reaches across the target.
    """
    target = TARGETS[key]
    if key.startswith("drift"):
        teacher = Estimate(0.0, 0.0)
    if key in DIFFERENCES:
        distance, error = model
    else:
        distance, error = (model.value - teacher.value, math.hypot(model.error, teacher.error))
    if target.relative:
        distance, error = distance / teacher.value, error / abs(teacher.value)
    if abs(abs(distance) - target.amount) < error:
        return distance, error, "open"
    return distance, error, "met" if abs(distance) <= target.amount else "missed"


def add_vaporization(found: dict[str, Estimate], temperature: float) -> None:
    """Add the heats of vaporization that follow from the energies in `found`."""
    liquid, gas = (found.get(f"{state}_energy_kJ_mol") for state in ("liquid", "gas"))
    if liquid and gas:
        found["vaporisation_kJ_mol"] = heat_of_vaporization(liquid, gas, temperature)
    if liquid:
        found["vaporisation_unstrained_kJ_mol"] = heat_of_vaporization(
            liquid, Estimate(0.0, 0.0), temperature
        )
