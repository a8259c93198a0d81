"""One protocol of molecular dynamics for every model of liquid water.

In: the teacher (`spcfw`) or a model. Out: one small JSON file with what experiments measure, made
in the same way whatever the model is, so that the files can be compared line by line:

    python docs/studies/water/run.py run lite-water --out FILE.json
    python docs/studies/water/run.py table FILE.json OTHER.json --out docs/studies/water/README.md

A run has stages, each a folder of `allscaip_lite.md.dynamics`. The teacher prepares a box, always the same,
and the model equilibrates it; from there start, apart from one another, constant pressure (density,
heat of vaporisation), constant volume (structure, diffusion, dielectric constant) and constant
energy (drift); and one molecule moves in vacuum. A stopped run goes on; longer times prolong it.
Runs with other seeds, on as many cores as there are, are independent of one another: tables count
all of one model as one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms, units
from ase.calculators.calculator import Calculator
from ase.io.trajectory import Trajectory
from tqdm import tqdm

from allscaip_lite import __version__
from allscaip_lite.cli import run_script
from allscaip_lite.data.aselmdb import evenly_spaced
from allscaip_lite.errors import RunError
from allscaip_lite.files import differing, store_text
from allscaip_lite.kernels import add_kernels_option
from allscaip_lite.labels.spcfw import SPCFw, molecules, water_box
from allscaip_lite.machine import device_name, processor_name
from allscaip_lite.md.dynamics import (
    Explosion,
    Settings,
    femtoseconds,
    is_finished,
    read_log,
    run_md,
)
from allscaip_lite.md.observables import (
    EXPERIMENT,
    Estimate,
    Run,
    average,
    closest_contact,
    correlation_time,
    dielectric_constant,
    energy_drift,
    first_peak,
    jackknife,
    make_universe,
    make_whole,
    pairs_by_structure,
    per_mole,
    radial_distribution,
    rdf_at_first_peak,
    read_run,
    reweighted_difference,
    self_diffusion,
    size_correction,
    temperatures_by_motion,
)
from allscaip_lite.md.water_results import (
    DIFFERENCES,
    PRODUCTION,
    TARGETS,
    TEACHER,
    add_vaporization,
    read_results,
    verdict,
)

DIFFUSION_WINDOW = (1.0, 3.0)  # ps, of lags: the same for short and for long runs
DIFFUSION_BLOCK = 5.0  # ps
POINTS = 300  # values kept of a series
ASKED_EVERY = 0.5  # ps between structures of the teacher's run that a model is asked about
ASKED = "asked_{}.npz"  # what it said of those of a stage
PACKAGES = ("torch", "numpy", "ase", "MDAnalysis")
MACHINES = "machines.json"  # what the stages of a folder ran on


@dataclass(frozen=True)
class Protocol:
    """What is the same for all models. Times in fs, temperature in K, pressure in bar.

    density (g/cm³) is that of the stages at constant volume, for every model. warming_time is the
    thermostat's in prepare and equilibrate, thermostat_time in npt and nvt. The first `settle` fs
    at constant pressure, where the box finds its size, are not counted. npt, nvt, nve and gas may
    grow from call to call; what else is changed needs another folder.
    """

    waters: int = 32
    density: float = 0.997
    temperature: float = 298.15
    pressure: float = 1.0
    timestep: float = 1.0
    warming_time: float = 100.0
    thermostat_time: float = 1_000.0
    barostat_time: float = 500.0
    gas_friction_time: float = 50.0
    seed: int = 0
    prepare: float = 10_000.0
    equilibrate: float = 1_000.0
    settle: float = 1_000.0
    npt: float = 10_000.0
    nvt: float = 10_000.0
    nve: float = 5_000.0
    gas: float = 10_000.0

    def settings(self, stage: str) -> Settings:
        """The run of a stage; RunError where a time is no multiple of the timestep."""
        common: dict[str, Any] = {
            "duration": getattr(self, stage),
            "temperature": self.temperature,
            "pressure": self.pressure,
            "timestep": self.timestep,
            "thermostat_time": self.thermostat_time,
            "barostat_time": self.barostat_time,
            "save_every": 40.0,
            "log_every": 10.0,
            "seed": self.seed,
        }
        # Bonds hardly share their energy with what is slow: chains, which see the sum alone, would
        # keep vibrations as hot or cold as they start for tens of ps. Noise reaches each.
        if stage != "nve":
            common["thermostat"] = "langevin"
        if stage in ("prepare", "equilibrate"):
            common["thermostat_time"] = self.warming_time
            return Settings(relax=200 if stage == "prepare" else 0, **common)
        if stage == "gas":
            common["thermostat_time"] = self.gas_friction_time
            return Settings(relax=50, **common)
        return Settings(ensemble=stage, **common)


OPTIONS = ("waters", "seed", "prepare", "equilibrate", *PRODUCTION)  # of the command


# --- Running ---------------------------------------------------------------------------------


def run_protocol(
    calculator: Calculator,
    protocol: Protocol,
    folder: str | os.PathLike,
    name: str,
    stages: Sequence[str] = PRODUCTION,
    progress: bool = True,
) -> dict[str, str]:
    """Run `stages` in `folder`, or go on with them; what exploded, by stage, with the reason.

    What they start from is run before them. An exploded stage ends there, and the others still run;
    in the box none can without its equilibration. Raises RunError for a folder of another protocol
    or name, and for a model that cannot run a stage (no stress, no constant pressure).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder / "protocol.json", protocol, name)
    exploded: dict[str, str] = {}

    def stage(what: str, atoms: Atoms, by: Calculator, label: str) -> Atoms | None:
        if progress:
            print(f"{name}: {what}, {getattr(protocol, what) / 1000:g} ps", file=sys.stderr)
        settings = protocol.settings(what)
        if not is_finished(folder / what, settings):
            _note_machine(folder / MACHINES, what, by)
        try:
            return run_md(atoms, by, settings, folder / what, label, progress)
        except Explosion as error:
            exploded[what] = str(error).split(". Up to there")[0]
            return None

    if "gas" in stages:
        single = Atoms("OH2", molecules(np.random.default_rng(protocol.seed), 1)[0])
        single.info |= {"charge": 0, "spin": 1}
        stage("gas", single, calculator, name)
    boxed = [what for what in PRODUCTION if what in stages and what != "gas"]
    if boxed:
        box = water_box(protocol.waters, protocol.density, protocol.seed)
        box.info |= {"charge": 0, "spin": 1}
        prepared = stage("prepare", box, SPCFw(), TEACHER)
        start = prepared and stage("equilibrate", prepared, calculator, name)
        if start:
            for what in boxed:
                stage(what, start, calculator, name)
    return exploded


def _claim(listing: Path, protocol: Protocol, name: str) -> None:
    plan = {"name": name, **dataclasses.asdict(protocol)}
    if listing.exists():
        known = json.loads(listing.read_text())
        if changed := differing(plan, known, but=PRODUCTION):
            raise RunError(
                f"{listing.parent} holds a protocol with another {', '.join(changed)}: choose "
                "another folder"
            )
    store_text(listing, json.dumps(plan, indent=1))


def _note_machine(listing: Path, stage: str, calculator: Calculator) -> None:
    """Adds what a stage is about to run on to what it has run on."""
    known = json.loads(listing.read_text()) if listing.exists() else {}
    model = getattr(calculator, "model", None)
    name = processor_name() if model is None else device_name(model.device)
    if name not in known.setdefault(stage, []):
        known[stage].append(name)
        store_text(listing, json.dumps(known, indent=1))


# --- Reading ---------------------------------------------------------------------------------


def collect(folder: str | os.PathLike) -> dict[str, Any]:
    """Every observable of the stages in `folder`, ready for JSON; estimates are [value, error].

    Absent is what no stage gives yet: a stage that has not run, exploded at once, or is too short.
    The folder may be one that is still being written.
    """
    folder = Path(folder)
    plan = json.loads((folder / "protocol.json").read_text())
    name = plan.pop("name")
    settle = plan["settle"] / 1000
    temperature = plan["temperature"]
    found: dict[str, Estimate] = {}
    result: dict[str, Any] = {
        "name": name,
        "protocol": {key: value for key, value in plan.items() if key not in PRODUCTION},
        "lengths_ps": {},
        "hours": {},
        "observables": found,
        "correlation_ps": {},
        "distributions": {},
        "series": {},
        "exploded": [
            stage
            for stage in ("equilibrate", *PRODUCTION)
            if (folder / stage / "exploded.extxyz").exists()
        ],
        "machine": machine(),
    }
    if (folder / MACHINES).exists():  # where the stages ran, which need not be here
        result["machine"]["stages"] = json.loads((folder / MACHINES).read_text())
    runs: dict[str, Run] = {}
    for what in ("gas", "equilibrate", "npt", "nvt", "nve"):
        try:
            runs[what] = read_run(folder / what, settle if what == "npt" else 0.0)
        except (FileNotFoundError, RunError):
            continue
        result["lengths_ps"][what] = round(float(runs[what].log["time_ps"][-1]), 6)
        with np.load(folder / what / "state.npz") as state:
            result["hours"][what] = round(float(state["seconds"]) / 3600, 4)

    def keep(key: str, measure: Any, *arguments: Any, **options: Any) -> None:
        try:
            found[key] = measure(*arguments, **options)
        except RunError:
            pass  # too short for this one

    if "gas" in runs:
        gas = runs["gas"].log["potential_eV"][10:]  # of 10 fs each; it starts at rest
        keep("gas_energy_kJ_mol", lambda: per_mole(average(gas)))
    if "npt" in runs:
        run = runs["npt"]
        potential = run.log["potential_eV"] / run.molecules
        keep("density_g_cm3", average, run.log["density_g_cm3"])
        keep("temperature_npt_K", average, run.log["temperature_K"])
        keep("liquid_energy_kJ_mol", lambda: per_mole(average(potential)))
        add_vaporization(found, temperature)
        if name != TEACHER:
            beside = beside_teacher(folder / "npt")
            settled = beside["time_ps"] >= settle
            density, excess = (beside[key][settled] for key in ("density_g_cm3", "potential_eV"))
            keep("density_beside_g_cm3", reweighted_difference, density, excess, temperature)
            volume = beside["volume_A3"][settled]
            keep("excess_pressure_bar", jackknife, _as_pressure, volume, excess)
            result["series"]["beside"] = _at_points(
                {key: beside[key][settled] for key in ("time_ps", "density_g_cm3", "potential_eV")}
            )
        result["correlation_ps"]["density"] = _correlation(run, run.log["density_g_cm3"])
        result["series"]["npt"] = _thinned(run, "density_g_cm3", "temperature_K", "potential_eV")
    # Negative ones: this way round, the teacher's mean is taken from the model's.
    if asked := _read_asked(folder, "npt"):
        excess = asked["potential_eV"]
        keep(
            "density_asked_g_cm3",
            reweighted_difference,
            -asked["density_g_cm3"],
            -excess,
            temperature,
        )
    if asked := _read_asked(folder, "nvt"):
        excess, pressure = asked["potential_eV"], asked["pressure_bar"]
        options = {"reference": -(pressure + asked["excess_bar"])}
        keep(
            "pressure_asked_bar", reweighted_difference, -pressure, -excess, temperature, **options
        )
        heights = rdf_at_first_peak(asked["g_OO"])
        keep("OO_height_asked", reweighted_difference, -heights, -excess, temperature)
    if "nvt" in runs:
        run = runs["nvt"]
        keep("temperature_nvt_K", average, run.log["temperature_K"])
        try:
            motions = temperatures_by_motion(folder / "nvt")
            found["temperature_centres_K"], found["temperature_bonds_K"] = motions
        except RunError:
            pass
        if np.isfinite(run.log["pressure_bar"]).all():
            keep("pressure_nvt_bar", average, run.log["pressure_bar"])
            if name != TEACHER:
                beside = beside_teacher(folder / "nvt")
                keep("pressure_beside_bar", average, beside["pressure_bar"])
                excess, ours = beside["potential_eV"], beside["model_bar"]
                keep("energy_beside_kJ_mol", lambda: per_mole(average(excess / run.molecules)))
                options = {"reference": ours - beside["pressure_bar"]}
                keep(
                    "pressure_weighted_bar",
                    reweighted_difference,
                    ours,
                    excess,
                    temperature,
                    **options,
                )
                heights = rdf_at_first_peak(pairs_by_structure(run.universe)[1])
                read = beside["number"] < len(heights)  # the run may have gone on since
                heights, excess = heights[beside["number"][read]], excess[read]
                keep("OO_height_beside", reweighted_difference, heights, excess, temperature)
        for first, second in ("OO", "OH", "HH"):
            try:
                pairs = radial_distribution(run.universe, first, second)
                result["distributions"][first + second] = {
                    key: np.round(column, 4).tolist() for key, column in pairs._asdict().items()
                }
                if first == second == "O":
                    found["OO_peak_A"], found["OO_height"] = first_peak(pairs)
            except RunError:
                pass  # too short, or without a peak
        keep("HH_closest_A", closest_contact, run.universe)
        length = float(run.log["time_ps"][-1])
        blocks = int(length / DIFFUSION_BLOCK)
        if blocks >= 2:
            options = {"window": DIFFUSION_WINDOW, "blocks": blocks}
            keep("diffusion_box_1e-9_m2_s", self_diffusion, run.universe, **options)
        if "diffusion_box_1e-9_m2_s" in found:
            plain = found["diffusion_box_1e-9_m2_s"]
            edge = float(run.log["volume_A3"][0]) ** (1 / 3)
            viscosity = EXPERIMENT["viscosity_mPa_s"][0]
            added = size_correction(temperature, edge, viscosity)
            found["diffusion_1e-9_m2_s"] = Estimate(plain.value + added, plain.error)
        keep("dielectric", dielectric_constant, run)
        result["correlation_ps"]["dipole"] = _correlation(run, _dipole(run), run.universe)
        result["series"]["nvt"] = _thinned(run, "temperature_K", "potential_eV")
    if "nve" in runs:
        run = runs["nve"]
        if np.isfinite(run.log["pressure_bar"]).all():
            keep("pressure_nve_bar", average, run.log["pressure_bar"])
        keep("drift_meV_atom_ps", energy_drift, run)
        keep("temperature_nve_K", average, run.log["temperature_K"])
        result["series"]["nve"] = _thinned(run, "conserved_eV", "temperature_K")
    return result


def _logged(folder: Path, trajectory: Any, log: dict[str, np.ndarray]) -> dict[int, int]:
    """Of each saved structure of a run that the log has too, the row there."""
    plan = json.loads((folder / "settings.json").read_text())
    every = round(plan["save_every"] / plan["timestep"])
    row = {step: index for index, step in enumerate(log["step"].astype(int))}
    numbers = range(len(trajectory))
    return {number: row[number * every] for number in numbers if number * every in row}


def beside_teacher(folder: str | os.PathLike) -> dict[str, np.ndarray]:
    """Model less teacher on the very structures of a run, each (frames,).

    `pressure_bar`, and `potential_eV` of the whole box; and of the log there `time_ps`,
    `volume_A3`, `density_g_cm3`, and as `model_bar` the model's pressure; `number` counts the
    structures of the trajectory. What structures have in common cancels, so short runs give sharp
    means.
    """
    folder = Path(folder)
    log = read_log(folder)
    pressures, energies = [], []
    with Trajectory(folder / "trajectory.traj") as trajectory:
        rows = _logged(folder, trajectory, log)
        for number, row in rows.items():
            frame = trajectory[number]
            frame.calc = SPCFw()
            pressure = -frame.get_stress(include_ideal_gas=True)[:3].mean() / units.bar
            pressures.append(log["pressure_bar"][row] - pressure)
            energies.append(log["potential_eV"][row] - frame.get_potential_energy())
    there = [*rows.values()]
    found = {name: log[name][there] for name in ("time_ps", "volume_A3", "density_g_cm3")}
    found |= {"model_bar": log["pressure_bar"][there], "number": np.array([*rows])}
    return found | {"pressure_bar": np.array(pressures), "potential_eV": np.array(energies)}


def ask_model(
    calculator: Calculator,
    folder: str | os.PathLike,
    teachers: Sequence[str | os.PathLike],
    progress: bool = True,
) -> None:
    """Ask a model about the structures of the teacher's npt and nvt runs, for `collect`.

    folder: the model's, which keeps the answers; teachers: folders of the same protocol, of which
    each has one of the two stages or both. Raises RunError for others.
    """
    folder = Path(folder)
    mine = json.loads((folder / "protocol.json").read_text())
    for teacher in map(Path, teachers):
        plan = json.loads((teacher / "protocol.json").read_text())
        if plan["name"] != TEACHER:
            raise RunError(f"{teacher} is a run of {plan['name']}, not of {TEACHER}")
        if changed := differing(plan, mine, but=["name", "seed", *PRODUCTION]):
            raise RunError(f"{teacher} is a run with another {', '.join(changed)}")
    answered = False
    for stage, settle in (("npt", mine["settle"] / 1000), ("nvt", 0.0)):
        runs = [Path(teacher) / stage for teacher in teachers]
        answers: dict[str, list] = {}
        chosen: list[Atoms] = []
        for run in (run for run in runs if (run / "trajectory.traj").exists()):
            for frame, answer in _ask(calculator, run, settle, progress):
                chosen.append(make_whole(frame))
                for key, value in answer.items():
                    answers.setdefault(key, []).append(value)
        if not chosen:
            continue
        answered = True
        if stage == "nvt":
            universe = make_universe(
                chosen[0].numbers,
                np.stack([frame.positions for frame in chosen]),
                np.stack([frame.cell.array for frame in chosen]),
                ASKED_EVERY,
            )
            answers["g_OO"] = pairs_by_structure(universe)[1]
        np.savez(folder / ASKED.format(stage), **answers)
    if not answered:
        raise RunError(f"no npt or nvt run in {', '.join(map(str, teachers))}")


def _ask(
    calculator: Calculator, run: Path, settle: float, progress: bool
) -> Iterator[tuple[Atoms, dict[str, float]]]:
    """Structures of the teacher's run every `ASKED_EVERY` ps, and what a model says of each."""
    log, last = read_log(run), -math.inf
    with Trajectory(run / "trajectory.traj") as trajectory:
        rows = _logged(run, trajectory, log)
        for number, row in tqdm(rows.items(), desc=str(run), disable=not progress):
            answer = {key: log[key][row] for key in ("time_ps", "density_g_cm3", "pressure_bar")}
            if answer["time_ps"] < settle or answer["time_ps"] < last + ASKED_EVERY - 1e-6:
                continue
            last, frame = answer["time_ps"], trajectory[number]
            frame.info |= {"charge": 0, "spin": 1}
            frame.calc = calculator
            stress = frame.get_stress(include_ideal_gas=True)
            answer["excess_bar"] = -stress[:3].mean() / units.bar - answer["pressure_bar"]
            answer["potential_eV"] = frame.get_potential_energy() - log["potential_eV"][row]
            yield frame, answer


def _read_asked(folder: Path, stage: str) -> dict[str, np.ndarray]:
    """What `ask_model` kept of a stage; nothing where it was not asked."""
    file = folder / ASKED.format(stage)
    if not file.exists():
        return {}
    with np.load(file) as asked:
        return dict(asked)


def _as_pressure(volume: np.ndarray, excess: np.ndarray) -> float:
    """-dU/dV in bar of energies in eV that change with the volume in Å³, by a straight line."""
    return float(-np.polyfit(volume, excess, 1)[0] / units.bar)


def _dipole(run: Run) -> np.ndarray:
    """One component of the box's dipole in e Å, (T,); molecules are whole."""
    positions = run.universe.trajectory.timeseries(order="fac")
    return positions[:, :, 0] @ run.universe.atoms.charges


def _correlation(run: Run, series: np.ndarray, universe: Any = None) -> float:
    """Correlation time in ps of a series of the log, or of the universe's structures."""
    spacing = universe.trajectory.dt if universe else run.settings["log_every"] / 1000
    return float(f"{correlation_time(series) * spacing:.3g}")


def _thinned(run: Run, *names: str) -> dict[str, list[float]]:
    return _at_points({name: run.log[name] for name in ("time_ps", *names)})


def _at_points(series: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """Series of one length, at `POINTS` of their times at most."""
    chosen = evenly_spaced(len(series["time_ps"]), POINTS)
    return {
        name: [float(f"{value:.7g}") for value in values[chosen]] for name, values in series.items()
    }


def machine() -> dict[str, Any]:
    """Processor, cores, threads that were used, and versions."""
    versions = {"python": platform.python_version(), "allscaip-lite": __version__}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            pass
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


# --- Comparing -------------------------------------------------------------------------------

MARKS = ("<!-- made by docs/studies/water/run.py table -->", "<!-- end -->")
ROWS = {  # observable: what the table calls it, with its unit
    "density_g_cm3": "density, g/cm³",
    "density_beside_g_cm3": "density less the teacher's, its own run weighted, g/cm³",
    "density_asked_g_cm3": "the same, the teacher's run weighted, g/cm³",
    "vaporisation_kJ_mol": "heat of vaporisation, kJ/mol",
    "vaporisation_unstrained_kJ_mol": "the same, vapour at rest, kJ/mol",
    "gas_energy_kJ_mol": "energy of a molecule in vacuum, kJ/mol",
    "liquid_energy_kJ_mol": "energy of a molecule in the liquid, kJ/mol",
    "pressure_nvt_bar": "pressure at 0.997 g/cm³, bar",
    "pressure_nve_bar": "the same at constant energy, bar",
    "pressure_weighted_bar": "its pressure less the teacher's, its own run weighted, bar",
    "pressure_asked_bar": "the same, the teacher's run weighted, bar",
    "pressure_beside_bar": "pressure less the teacher's on its structures, bar",
    "energy_beside_kJ_mol": "energy less the teacher's on its structures, kJ/mol",
    "excess_pressure_bar": "how that changes with the volume at 1 bar, as a pressure, bar",
    "OO_peak_A": "first peak of g_OO at, Å",
    "OO_height": "its height",
    "OO_height_beside": "its height less the teacher's, its own run weighted",
    "OO_height_asked": "the same, the teacher's run weighted",
    "HH_closest_A": "closest hydrogens of two molecules, Å",
    "diffusion_box_1e-9_m2_s": "self-diffusion in the box, 1e-9 m²/s",
    "diffusion_1e-9_m2_s": "self-diffusion, corrected for its size, 1e-9 m²/s",
    "dielectric": "dielectric constant",
    "drift_meV_atom_ps": "drift of the energy, meV/atom/ps",
    "temperature_centres_K": "temperature of the molecules' centres, K",
    "temperature_bonds_K": "temperature along the bonds, K",
}


def write_number(estimate: Estimate) -> str:
    """Value and error, to the digits that the error leaves: 0.997 ± 0.012."""
    value, error = estimate
    if not (math.isfinite(error) and error > 0):
        return f"{value:.3g}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def compare(results: Sequence[dict[str, Any]]) -> str:
    """Tables in Markdown: observables, distances to the targets, lengths and hours.

    The teacher, if it is among the results, is last, as `read_results` puts it.
    """
    names = [_title(result["name"]) for result in results]
    lines = [_row(["", *names, "experiment"]), _row(["---", *["---:"] * (len(names) + 1)])]
    for key, title in ROWS.items():
        cells = [
            write_number(result["observables"][key]) if key in result["observables"] else "–"
            for result in results
        ]
        known = f"{EXPERIMENT[key][0]:g}" if key in EXPERIMENT else ""
        if any(cell != "–" for cell in cells):
            lines.append(_row([title, *cells, known]))

    if results[-1]["name"] == TEACHER and len(results) > 1:
        teacher, models = results[-1]["observables"], results[:-1]
        lines += ["", _row(["from the teacher", "target", *names[:-1]])]
        lines.append(_row(["---", "---:", *["---:"] * len(models)]))
        for key, target in TARGETS.items():
            scale, unit = (100, " %") if target.relative else (1, "")
            cells = []
            for result in models:
                if key in result["observables"] and (of := DIFFERENCES.get(key, key)) in teacher:
                    away, error, word = verdict(key, result["observables"][key], teacher[of])
                    number = write_number(Estimate(scale * away, scale * error))
                    cells.append(f"{number}{unit}: {word}")
                else:
                    cells.append("–")
            lines.append(_row([ROWS[key], f"{scale * target.amount:g}{unit}", *cells]))

    lines += ["", _row(["picoseconds (hours)", *names]), _row(["---", *["---:"] * len(names)])]
    for stage in PRODUCTION:
        cells = [
            f"{result['lengths_ps'][stage]:g} ({result['hours'][stage]:.2f})"
            if stage in result["lengths_ps"]
            else "–"
            for result in results
        ]
        lines.append(_row([stage, *cells]))
    for result in results:
        for stage in result.get("exploded", ()):
            reached = result["lengths_ps"].get(stage, 0)
            lines += ["", f"{_title(result['name'])}: {stage} exploded after {reached:g} ps."]
    return "\n".join(lines) + "\n"


def _title(name: str) -> str:
    return "teacher, SPC/Fw" if name == TEACHER else f"`{name}`"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def insert_table(page: Path, table: str) -> None:
    """Put the table into a page, between its two marks; what stands around them stays.

    A new page gets nothing but the table. Raises RunError for a page without marks.
    """
    text = page.read_text() if page.exists() else "\n".join(MARKS) + "\n"
    begin, end = (text.find(mark) for mark in MARKS)
    if begin < 0 or end < begin:
        raise RunError(
            f"{page} has no place for a table: write the lines {MARKS[0]} and {MARKS[1]} into it"
        )
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(f"{text[: begin + len(MARKS[0])]}\n\n{table}\n{text[end:]}")


# --- The command -----------------------------------------------------------------------------


def _make_calculator(model: str, kernels: str) -> Calculator:
    if model == TEACHER:
        return SPCFw()
    from allscaip_lite.calculator import AllScAIPCalculator

    return AllScAIPCalculator(model, kernels=kernels)


def _run(args: argparse.Namespace) -> int:
    chosen = {key: getattr(args, key) for key in OPTIONS}
    protocol = Protocol(**{key: value for key, value in chosen.items() if value is not None})
    name = args.name or Path(args.model).stem
    place = f"{name}-{args.seed}" if args.seed else name
    folder = args.folder or Path("runs/observables") / place
    exploded: dict[str, str] = {}
    if not args.collect:
        calculator = _make_calculator(args.model, args.kernels)
        exploded = run_protocol(calculator, protocol, folder, name, args.stages, not args.quiet)
    if args.teacher:
        calculator = _make_calculator(args.model, args.kernels)
        ask_model(calculator, folder, args.teacher, not args.quiet)
    result = collect(folder)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(_compact(result))
    for key, estimate in result["observables"].items():
        known = EXPERIMENT.get(key)
        beside = f"   experiment {known[0]:g}" if known else ""
        print(f"{key:32s} {estimate.value:10.4g} ± {estimate.error:.2g}{beside}")
    for stage, reason in exploded.items():
        print(f"{stage}: {reason}")
    return 0


def _table(args: argparse.Namespace) -> int:
    insert_table(args.out, compare(read_results(args.files)))
    return 0


def _compact(result: dict[str, Any]) -> str:
    """JSON in lines that a person can read, long lists in one line each."""
    text = json.dumps(result, indent=1)
    lines, inside = [], 0
    for line in text.splitlines():
        bare = line.strip()
        if inside and lines:
            lines[-1] += bare + (" " if bare.endswith(",") else "")
        else:
            lines.append(line)
        inside += bare.endswith("[") - bare.startswith("]")
    return "\n".join(line.rstrip() for line in lines) + "\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="run the protocol, or go on with it")
    run.set_defaults(command=_run)
    run.add_argument("model", help=f"a name, a file, or {TEACHER}")
    run.add_argument("--out", type=Path, required=True, help="the .json to write")
    run.add_argument("--name", help="what the files call the model (default: from its name)")
    run.add_argument("--folder", type=Path, help="of the runs (default: runs/observables/NAME)")
    run.add_argument("--seed", type=int, help="another one, another run (default: 0)")
    run.add_argument("--waters", type=int, help="molecules in the box (default: 32)")
    for stage in ("prepare", "equilibrate", *PRODUCTION):
        default = getattr(Protocol, stage) / 1000
        run.add_argument(
            f"--{stage}", type=femtoseconds, metavar="TIME", help=f"default: {default:g}ps"
        )
    run.add_argument(
        "--stages", nargs="+", choices=PRODUCTION, default=PRODUCTION, help="default: all"
    )
    add_kernels_option(run)
    run.add_argument(
        "--collect", action="store_true", help="only write what the folder holds by now"
    )
    run.add_argument(
        "--teacher",
        type=Path,
        nargs="+",
        metavar="FOLDER",
        help="also ask the model about the structures of the teacher's runs in these folders",
    )
    run.add_argument("--quiet", action="store_true", help="without progress")
    table = commands.add_parser("table", help="compare what was run, in Markdown")
    table.set_defaults(command=_table)
    table.add_argument("files", type=Path, nargs="+", help="what `run` wrote")
    table.add_argument("--out", type=Path, required=True, help="the page that has the table")


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(
        add_arguments,
        lambda args: args.command(args),
        script="docs/studies/water/run.py",
        description=__doc__,
        stopped="the same command goes on from here",
        argv=argv,
    )


if __name__ == "__main__":
    sys.exit(main())
