"""The water benchmark: observables of liquid water, by the same simulations for every model.

In: the teacher (`spcfw`) or a model. Out: one small JSON file for each run with what experiments
measure, so that models can be compared with each other, with the teacher and with experiment:

    python docs/studies/water/run.py run lite-water --out FILE.json
    python docs/studies/water/run.py table FILE.json OTHER.json --out docs/studies/water/README.md

A run has stages, each a folder of `allscaip_lite.md.dynamics`. The teacher prepares a box, always
the same, and the model equilibrates it. From there start, independently, constant pressure
(density, heat of vaporisation), constant volume (structure, diffusion, dielectric constant) and
constant energy (drift). One molecule moves in vacuum. A stopped run goes on; longer times prolong
it. Runs with other seeds are independent, and can run at the same time; tables pool all runs of one
model.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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
from allscaip_lite.files import alone, differing, read_state, store_text
from allscaip_lite.kernels import add_kernels_option
from allscaip_lite.machine import processor_name
from allscaip_lite.md.dynamics import (
    Explosion,
    Settings,
    femtoseconds,
    read_log,
    run_md,
)
from allscaip_lite.md.observables import (
    EXPERIMENT,
    Estimate,
    RadialDistribution,
    Run,
    average,
    block_average,
    blocks_of,
    correlation_time,
    energy_drift,
    make_universe,
    make_whole,
    radial_distribution,
    radial_histograms,
    read_run,
    scatter,
    self_diffusion,
    size_correction,
    temperatures_by_motion,
)
from allscaip_lite.spcfw import SPCFw
from allscaip_lite.tables import markdown_table
from data.water.boxes import molecules, water_box
from docs.studies.report import insert_table

if TYPE_CHECKING:
    from MDAnalysis import Universe

TEACHER = "spcfw"
PRODUCTION = ("gas", "npt", "nvt", "nve")  # the stages that are measured, in the order they run in
KJ_PER_MOL = units.kJ / units.mol
DIFFUSION_WINDOW = (1.0, 3.0)  # ps, of lags: the same for short and for long runs
DIFFUSION_BLOCK = 5.0  # ps
POINTS = 300  # values kept of a series
TEACHER_FRAMES_EVERY = 0.5  # ps between frames of the teacher's runs that a model labels
TEACHER_FRAMES = "asked_{}.npz"  # its labels of those of a stage
PACKAGES = ("torch", "numpy", "ase", "MDAnalysis")
MACHINES = "machines.json"  # what the stages of a folder ran on


@dataclass(frozen=True)
class WaterBenchmark:
    """What is the same for all models. Times in fs, temperature in K, pressure in bar.

    `density` (g/cm³) is that of the stages at constant volume, for every model. `warming_time` is
    the thermostat's time in prepare and equilibrate, `thermostat_time` that in npt and nvt. The
    first `settle` fs at constant pressure, where the box finds its size, are not counted. Stages in
    `PRODUCTION` may become longer from call to call; another change needs another folder.
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
        """Of a stage. Raises `RunError` where a time is no multiple of the timestep."""
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
        # Bonds exchange little energy with slow motions. Nosé-Hoover chains control the total only,
        # and would leave vibrations hotter or colder for tens of ps; noise acts on each atom.
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


@alone
def run_water_benchmark(
    calculator: Calculator,
    benchmark: WaterBenchmark,
    folder: str | os.PathLike,
    name: str,
    stages: Sequence[str] = PRODUCTION,
    progress: bool = True,
) -> dict[str, str]:
    """Run stages, or go on with them; what they start from is run before them.

    A stage that explodes ends there, and the others still run; without the equilibration no stage
    in the box can.

    Args:
        calculator: the model's, or the teacher's.
        benchmark: the settings of all stages.
        folder: of the run, with a subfolder for each stage.
        name: what the files call the model.
        stages: which of `PRODUCTION` to run.
        progress: whether to show progress.

    Returns:
        The stages that exploded, each with the reason.

    Raises:
        RunError: for a folder of other settings or of another name, and for a model that cannot run
            a stage (without a stress no constant pressure).
    """
    folder = Path(folder)
    _claim(folder / "protocol.json", benchmark, name)
    exploded: dict[str, str] = {}

    def stage(what: str, atoms: Atoms, by: Calculator, label: str) -> Atoms | None:
        if progress:
            print(f"{name}: {what}, {getattr(benchmark, what) / 1000:g} ps", file=sys.stderr)
        settings = benchmark.settings(what)
        if _progress_of(folder / what)[0] < settings.steps("duration"):
            _note_machine(folder / MACHINES, what, by)
        try:
            return run_md(atoms, by, settings, folder / what, label, progress)
        except Explosion as error:
            exploded[what] = str(error).split(". Up to there")[0]
            return None

    if "gas" in stages:
        single = Atoms("OH2", molecules(np.random.default_rng(benchmark.seed), 1)[0])
        single.info |= {"charge": 0, "spin": 1}
        stage("gas", single, calculator, name)
    boxed = [what for what in PRODUCTION if what in stages and what != "gas"]
    if boxed:
        box = water_box(benchmark.waters, benchmark.density, benchmark.seed)
        box.info |= {"charge": 0, "spin": 1}
        prepared = stage("prepare", box, SPCFw(), TEACHER)
        start = prepared and stage("equilibrate", prepared, calculator, name)
        if start:
            for what in boxed:
                stage(what, start, calculator, name)
    return exploded


def _progress_of(folder: Path) -> tuple[int, float]:
    """How many steps the run in a folder has done, and the hours that it took; 0, 0.0 before it
    has saved any. Raises RunError where its state is damaged.
    """
    state = read_state(folder / "state.npz", lambda file: dict(np.load(file)))
    return (0, 0.0) if state is None else (int(state["step"]), float(state["seconds"]) / 3600)


def _claim(listing: Path, benchmark: WaterBenchmark, name: str) -> None:
    """Write the settings of a folder; `RunError` where it has others."""
    plan = {"name": name, **dataclasses.asdict(benchmark)}
    if listing.exists():
        known = json.loads(listing.read_text())
        if changed := differing(plan, known, but=PRODUCTION):
            raise RunError(
                f"{listing.parent} holds a run with another {', '.join(changed)}: choose "
                "another folder"
            )
    store_text(listing, json.dumps(plan, indent=1))


def _note_machine(listing: Path, stage: str, calculator: Calculator) -> None:
    """Add the machine that a stage is about to run on to the list of those it has run on."""
    known = json.loads(listing.read_text()) if listing.exists() else {}
    model = getattr(calculator, "model", None)
    on_gpu = model is not None and model.device.type == "cuda"
    name = torch.cuda.get_device_name(model.device) if on_gpu else processor_name()
    if name not in known.setdefault(stage, []):
        known[stage].append(name)
        store_text(listing, json.dumps(known, indent=1))


# --- Reading ---------------------------------------------------------------------------------


def collect(folder: str | os.PathLike) -> dict[str, Any]:
    """Every observable of the stages in `folder`, ready for JSON; estimates are [value, error].

    What no stage gives yet is absent: the stage has not run, exploded at once, or is too short. The
    folder may be one that is still being written.
    """
    folder = Path(folder)
    plan = json.loads((folder / "protocol.json").read_text())
    name = plan.pop("name")
    settle, temperature = plan["settle"] / 1000, plan["temperature"]
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
        result["hours"][what] = round(_progress_of(folder / what)[1], 4)

    is_model = name != TEACHER
    if "gas" in runs:
        gas = runs["gas"].log["potential_eV"][10:]  # of 10 fs each; it starts at rest
        _keep(found, "gas_energy_kJ_mol", lambda: per_mole(average(gas)))
    if "npt" in runs:
        _collect_npt(result, runs["npt"], folder / "npt", settle, temperature, is_model)
    _collect_teacher_frames(found, folder, temperature)
    if "nvt" in runs:
        _collect_nvt(result, runs["nvt"], folder / "nvt", temperature, is_model)
    if "nve" in runs:
        run = runs["nve"]
        if np.isfinite(run.log["pressure_bar"]).all():
            _keep(found, "pressure_nve_bar", average, run.log["pressure_bar"])
        _keep(found, "drift_meV_atom_ps", energy_drift, run)
        _keep(found, "temperature_nve_K", average, run.log["temperature_K"])
        result["series"]["nve"] = _thinned(run, "conserved_eV", "temperature_K")
    return result


def jackknife(
    statistic: Callable[..., float], *series: Sequence[float] | np.ndarray, blocks: int = 10
) -> Estimate:
    """A statistic of series (T,) that belong together, its error from leaving out blocks in turn.

    The error holds where blocks are longer than the memory of the series. Raises RunError
    for fewer values than blocks.
    """
    parts = blocks_of(np.stack([np.asarray(part, float) for part in series], axis=1), blocks)

    def value(parts: Sequence[np.ndarray]) -> float:
        return statistic(*np.concatenate(parts).T)

    without = [value(parts[:b] + parts[b + 1 :]) for b in range(blocks)]
    return Estimate(value(parts), float(np.std(without) * np.sqrt(blocks - 1)))


def first_peak(distribution: RadialDistribution) -> tuple[Estimate, Estimate]:
    """Position (Å) and height of the first peak of g(r), of a parabola through its three bins.

    The height's error is that of its bin; the position's follows from the errors of the three.
    """
    g = distribution.g
    top, offset = peak_bin(g)
    left, middle, right = g[top - 1 : top + 2]
    width = distribution.r[1] - distribution.r[0]
    bend = left - 2 * middle + right  # < 0 at a peak
    # d offset / d(left, middle, right)
    slopes = np.array([0.5 - offset, 2 * offset, -0.5 - offset]) / bend
    uncertainty = float(np.hypot.reduce(slopes * distribution.error[top - 1 : top + 2])) * width
    height = middle - 0.25 * (left - right) * offset
    return (
        Estimate(float(distribution.r[top] + offset * width), uncertainty),
        Estimate(float(height), float(distribution.error[top])),
    )


def peak_bin(g: np.ndarray) -> tuple[int, float]:
    """The bin of the first peak, and how far from its middle a parabola puts it, in bins."""
    from scipy.signal import find_peaks

    found, _ = find_peaks(g, prominence=0.2 * g.max())
    if not len(found):
        raise RunError("g(r) has no peak: the run is too short, or the box too narrow")
    top = int(found[0])
    left, middle, right = g[top - 1 : top + 2]
    return top, float(0.5 * (left - right) / (left - 2 * middle + right))


def dielectric_constant(run: Run, blocks: int = 5) -> Estimate:
    """Static dielectric constant from fluctuations of the box's dipole, SPC/Fw's charges assumed.

    For Ewald sums, or a model taught by them, in conducting surroundings. The dipole relaxes over
    some 10 ps: its fluctuations take nanoseconds to converge, so beware of the error of short runs.
    """
    from MDAnalysis.analysis.dielectric import DielectricConstant

    temperature = run.settings["temperature"]
    values = []
    for part in blocks_of(np.arange(len(run.universe.trajectory)), blocks):
        # whole already: molecules are followed, never wrapped
        fluctuation = DielectricConstant(
            run.universe.atoms, temperature=temperature, make_whole=False
        )
        values.append(fluctuation.run(frames=part).results)
    # the mean dipole is known to be zero, so it is not taken from each short block
    strength = [result.M2.sum() for result in values]
    volume = np.mean([frame.volume for frame in run.universe.trajectory])
    factor = 4 * np.pi / 3 * units.Hartree * units.Bohr / (volume * units.kB * temperature)
    return scatter([1 + factor * m2 for m2 in strength])


def reweighted_difference(
    series: Sequence[float] | np.ndarray,
    excess: Sequence[float] | np.ndarray,
    temperature: float,
    blocks: int = 10,
    reference: Sequence[float] | np.ndarray | None = None,
) -> Estimate:
    """A model's mean minus that of its reference, both from the model's run alone.

    The run visits a structure too often by a factor exp(-excess/kT), so with weights exp(excess/kT)
    it is a run of the reference (Torrie and Valleau, J. Comput. Phys. 23, 187, 1977). Chance
    fluctuations that the two means have in common cancel.

    Args:
        series: any observable (T,).
        excess: the model's energy minus the reference's of these structures (T,), of the whole
            system in eV.
        temperature: in K.
        blocks: for the error, which is `jackknife`'s.
        reference: what the reference says of the observable on the same structures (T,), where that
            is something else (a pressure, say); by default `series`.

    Raises:
        RunError: for fewer values than blocks, and where less than a twentieth of the
            structures carry all the weight: then the two ensembles overlap too little.
    """
    series, excess = np.asarray(series, float), np.asarray(excess, float)
    weights = np.exp((excess - excess.max()) / (units.kB * temperature))
    share = weights.sum() ** 2 / (weights**2).sum() / len(weights)
    if share < 0.05:
        raise RunError(
            f"the weights rest on {100 * share:.1f} % of the structures: the two models' ensembles "
            "are too far from one another to be compared in this way"
        )

    def difference(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> float:
        return float(x.mean() - (w * y).sum() / w.sum())

    other = series if reference is None else np.asarray(reference, float)
    return jackknife(difference, series, other, weights, blocks=blocks)


def closest_contact(universe: Universe, element: str = "H", blocks: int = 5) -> Estimate:
    """The shortest distance in Å of two atoms of an element in different molecules, mean over time.

    It finds what g(r) shows as a small bump, and averages of errors not at all: pairs that a model
    lets come too close, where it was never taught. Beyond 4 Å a pair does not count.

    Args:
        universe: the run, see `make_universe`.
        element: of both atoms.
        blocks: of the run, from whose scatter the error is.

    Raises:
        RunError: for a structure without a pair that counts.
    """
    from MDAnalysis.lib.distances import self_capped_distance

    group = universe.select_atoms(f"name {element}")
    shortest = []
    for frame in universe.trajectory:
        pairs, distances = self_capped_distance(group.positions, 4.0, box=frame.dimensions)
        apart = group.resindices[pairs[:, 0]] != group.resindices[pairs[:, 1]]
        if not apart.any():
            raise RunError(f"no {element}-{element} pair of two molecules within 4 Å")
        shortest.append(distances[apart].min())
    return block_average(shortest, blocks)


def pairs_by_structure(
    universe: Universe, first: str = "O", second: str = "O", width: float = 0.05
) -> tuple[np.ndarray, np.ndarray]:
    """g(r) of every structure by itself.

    Args:
        universe: as for `radial_distribution`, and so are the others.
        first: one element.
        second: the other, or the same.
        width: of a bin, in Å.

    Returns:
        r (bins,) in Å, g (T, bins).
    """
    each = np.arange(len(universe.trajectory))[:, None]
    return radial_histograms(universe, first, second, None, width, each)


def rdf_at_first_peak(g: np.ndarray) -> np.ndarray:
    """g(r) of every structure (T,) at the place where the mean of g (T, bins) has its first peak.

    By the parabola through three bins there, so that the mean is `first_peak`'s height.
    """
    top, offset = peak_bin(g.mean(0))
    left, middle, right = g[:, top - 1 : top + 2].T
    return middle + offset * (right - left) / 2 + offset**2 * (left - 2 * middle + right) / 2


def _keep(found: dict[str, Estimate], key: str, measure: Any, *args: Any, **options: Any) -> None:
    """Put an observable into `found`, if the run is long enough for it."""
    with contextlib.suppress(RunError):
        found[key] = measure(*args, **options)


def _collect_npt(
    result: dict[str, Any],
    run: Run,
    folder: Path,
    settle: float,
    temperature: float,
    is_model: bool,
) -> None:
    """Add the observables at constant pressure to `result`."""
    found, log = result["observables"], run.log
    _keep(found, "density_g_cm3", average, log["density_g_cm3"])
    _keep(found, "temperature_npt_K", average, log["temperature_K"])
    potential = log["potential_eV"] / run.molecules
    _keep(found, "liquid_energy_kJ_mol", lambda: per_mole(average(potential)))
    add_vaporization(found, temperature)
    if is_model:
        own = on_own_frames(folder)
        own = {key: values[own["time_ps"] >= settle] for key, values in own.items()}
        density, excess = own["density_g_cm3"], own["potential_eV"]
        _keep(found, "density_beside_g_cm3", reweighted_difference, density, excess, temperature)
        _keep(found, "excess_pressure_bar", jackknife, _slope_as_pressure, own["volume_A3"], excess)
        result["series"]["beside"] = _at_points(
            {key: own[key] for key in ("time_ps", "density_g_cm3", "potential_eV")}
        )
    result["correlation_ps"]["density"] = _correlation(run, log["density_g_cm3"])
    result["series"]["npt"] = _thinned(run, "density_g_cm3", "temperature_K", "potential_eV")


def _collect_teacher_frames(found: dict[str, Estimate], folder: Path, temperature: float) -> None:
    """Add what `on_teacher_frames` gives, each the model's mean minus the teacher's.

    `reweighted_difference` gives the run's own mean, here the teacher's, minus the other, so both
    observable and energy difference change their sign.
    """
    if labels := _read_teacher_frames(folder, "npt"):
        density, excess = labels["density_g_cm3"], labels["potential_eV"]
        _keep(found, "density_asked_g_cm3", reweighted_difference, -density, -excess, temperature)
    if labels := _read_teacher_frames(folder, "nvt"):
        excess, pressure = labels["potential_eV"], labels["pressure_bar"]
        _keep(
            found,
            "pressure_asked_bar",
            reweighted_difference,
            -pressure,
            -excess,
            temperature,
            reference=-(pressure + labels["excess_bar"]),
        )
        heights = rdf_at_first_peak(labels["g_OO"])
        _keep(found, "OO_height_asked", reweighted_difference, -heights, -excess, temperature)


def _collect_nvt(
    result: dict[str, Any], run: Run, folder: Path, temperature: float, is_model: bool
) -> None:
    """Add the observables at constant volume to `result`."""
    found, log = result["observables"], run.log
    _keep(found, "temperature_nvt_K", average, log["temperature_K"])
    with contextlib.suppress(RunError):
        motions = temperatures_by_motion(folder)
        found["temperature_centres_K"], found["temperature_bonds_K"] = motions
    if np.isfinite(log["pressure_bar"]).all():
        _keep(found, "pressure_nvt_bar", average, log["pressure_bar"])
        if is_model:
            _collect_own_frames(found, run, folder, temperature)
    for first, second in ("OO", "OH", "HH"):
        with contextlib.suppress(RunError):  # too short, or without a peak
            pairs = radial_distribution(run.universe, first, second)
            result["distributions"][first + second] = {
                key: np.round(column, 4).tolist() for key, column in pairs._asdict().items()
            }
            if first == second == "O":
                found["OO_peak_A"], found["OO_height"] = first_peak(pairs)
    _keep(found, "HH_closest_A", closest_contact, run.universe)
    blocks = int(float(log["time_ps"][-1]) / DIFFUSION_BLOCK)
    if blocks >= 2:
        options = {"window": DIFFUSION_WINDOW, "blocks": blocks}
        _keep(found, "diffusion_box_1e-9_m2_s", self_diffusion, run.universe, **options)
    if "diffusion_box_1e-9_m2_s" in found:
        in_box = found["diffusion_box_1e-9_m2_s"]
        edge = float(log["volume_A3"][0]) ** (1 / 3)
        added = size_correction(temperature, edge, EXPERIMENT["viscosity_mPa_s"][0])
        found["diffusion_1e-9_m2_s"] = Estimate(in_box.value + added, in_box.error)
    _keep(found, "dielectric", dielectric_constant, run)
    result["correlation_ps"]["dipole"] = _correlation(run, _dipole(run), run.universe)
    result["series"]["nvt"] = _thinned(run, "temperature_K", "potential_eV")


def _collect_own_frames(
    found: dict[str, Estimate], run: Run, folder: Path, temperature: float
) -> None:
    """Add a model's differences from the teacher on the frames of its own nvt run."""
    own = on_own_frames(folder)
    excess, pressure = own["potential_eV"], own["model_bar"]
    _keep(found, "pressure_beside_bar", average, own["pressure_bar"])
    _keep(found, "energy_beside_kJ_mol", lambda: per_mole(average(excess / run.molecules)))
    _keep(
        found,
        "pressure_weighted_bar",
        reweighted_difference,
        pressure,
        excess,
        temperature,
        reference=pressure - own["pressure_bar"],
    )
    heights = rdf_at_first_peak(pairs_by_structure(run.universe)[1])
    known = own["number"] < len(heights)  # the run may have gone on since
    heights, excess = heights[own["number"][known]], excess[known]
    _keep(found, "OO_height_beside", reweighted_difference, heights, excess, temperature)


def _logged(folder: Path, trajectory: Any, log: dict[str, np.ndarray]) -> dict[int, int]:
    """The rows of the log at the saved frames of a run, by the number of the frame."""
    plan = json.loads((folder / "settings.json").read_text())
    every = round(plan["save_every"] / plan["timestep"])
    row = {step: index for index, step in enumerate(log["step"].astype(int))}
    numbers = range(len(trajectory))
    return {number: row[number * every] for number in numbers if number * every in row}


def on_own_frames(folder: str | os.PathLike) -> dict[str, np.ndarray]:
    """Model minus teacher on the frames of a model's run; what frames have in common cancels.

    Returns:
        Arrays (frames,): the differences `pressure_bar`, and `potential_eV` of the whole box; from
        the log `time_ps`, `volume_A3`, `density_g_cm3`, and as `model_bar` the model's pressure;
        `number`, which frame of the trajectory it is.
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


def on_teacher_frames(
    calculator: Calculator,
    folder: str | os.PathLike,
    teachers: Sequence[str | os.PathLike],
    progress: bool = True,
) -> None:
    """Label frames of the teacher's npt and nvt runs with a model, for `collect`.

    Args:
        calculator: the model's.
        folder: the model's, which keeps the labels.
        teachers: folders of the teacher's runs with the same settings, each with one of the two
            stages or both.
        progress: whether to show a progress bar.

    Raises:
        RunError: for folders of another model, of other settings, or without either stage.
    """
    folder = Path(folder)
    mine = json.loads((folder / "protocol.json").read_text())
    for teacher in map(Path, teachers):
        plan = json.loads((teacher / "protocol.json").read_text())
        if plan["name"] != TEACHER:
            raise RunError(f"{teacher} is a run of {plan['name']}, not of {TEACHER}")
        if changed := differing(plan, mine, but=["name", "seed", *PRODUCTION]):
            raise RunError(f"{teacher} is a run with another {', '.join(changed)}")
    labelled = False
    for stage, settle in (("npt", mine["settle"] / 1000), ("nvt", 0.0)):
        labels: dict[str, list[Any]] = {}
        chosen: list[Atoms] = []
        for run in (Path(teacher) / stage for teacher in teachers):
            if not (run / "trajectory.traj").exists():
                continue
            for frame, label in _label_frames(calculator, run, settle, progress):
                chosen.append(make_whole(frame))
                for key, value in label.items():
                    labels.setdefault(key, []).append(value)
        if not chosen:
            continue
        labelled = True
        if stage == "nvt":
            universe = make_universe(
                chosen[0].numbers,
                np.stack([frame.positions for frame in chosen]),
                np.stack([frame.cell.array for frame in chosen]),
                TEACHER_FRAMES_EVERY,
            )
            labels["g_OO"] = list(pairs_by_structure(universe)[1])
        np.savez(folder / TEACHER_FRAMES.format(stage), **labels)
    if not labelled:
        raise RunError(f"no npt or nvt run in {', '.join(map(str, teachers))}")


def _label_frames(
    calculator: Calculator, run: Path, settle: float, progress: bool
) -> Iterator[tuple[Atoms, dict[str, float]]]:
    """Frames of the teacher's run every `TEACHER_FRAMES_EVERY` ps, and a model's labels of each."""
    log, last = read_log(run), -math.inf
    with Trajectory(run / "trajectory.traj") as trajectory:
        rows = _logged(run, trajectory, log)
        for number, row in tqdm(rows.items(), desc=str(run), disable=not progress):
            label = {key: log[key][row] for key in ("time_ps", "density_g_cm3", "pressure_bar")}
            if label["time_ps"] < max(settle, last + TEACHER_FRAMES_EVERY - 1e-6):
                continue
            last, frame = label["time_ps"], trajectory[number]
            frame.info |= {"charge": 0, "spin": 1}
            frame.calc = calculator
            stress = frame.get_stress(include_ideal_gas=True)
            label["excess_bar"] = -stress[:3].mean() / units.bar - label["pressure_bar"]
            label["potential_eV"] = frame.get_potential_energy() - log["potential_eV"][row]
            yield frame, label


def _read_teacher_frames(folder: Path, stage: str) -> dict[str, np.ndarray]:
    """What `on_teacher_frames` kept of a stage; empty where it did not run."""
    file = folder / TEACHER_FRAMES.format(stage)
    if not file.exists():
        return {}
    with np.load(file) as labels:
        return dict(labels)


def _slope_as_pressure(volume: np.ndarray, excess: np.ndarray) -> float:
    """-dU/dV in bar from a straight line, of energies in eV and volumes in Å³."""
    return float(-np.polyfit(volume, excess, 1)[0] / units.bar)


def _dipole(run: Run) -> np.ndarray:
    """The x component of the box's dipole in e Å, (T,); molecules are whole."""
    positions = run.universe.trajectory.timeseries(order="fac")
    return positions[:, :, 0] @ run.universe.atoms.charges


def _correlation(run: Run, series: np.ndarray, universe: Any = None) -> float:
    """Correlation time in ps of a series from the log, or from the frames of a universe."""
    spacing = universe.trajectory.dt if universe else run.settings["log_every"] / 1000
    return float(f"{correlation_time(series) * spacing:.3g}")


def _thinned(run: Run, *names: str) -> dict[str, list[float]]:
    return _at_points({name: run.log[name] for name in ("time_ps", *names)})


def _at_points(series: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """Series of one length, evenly thinned to at most `POINTS` values."""
    chosen = evenly_spaced(len(series["time_ps"]), POINTS)
    return {
        name: [float(f"{value:.7g}") for value in values[chosen]] for name, values in series.items()
    }


def machine() -> dict[str, Any]:
    """Processor, cores, threads that were used, and versions."""
    versions = {"python": platform.python_version(), "allscaip-lite": __version__}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


# --- Comparing -------------------------------------------------------------------------------

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

ROWS = {  # observable: what the table calls it, with its unit
    "density_g_cm3": "density, g/cm³",
    "density_beside_g_cm3": "density minus teacher's, own run reweighted, g/cm³",
    "density_asked_g_cm3": "density minus teacher's, teacher's run reweighted, g/cm³",
    "vaporisation_kJ_mol": "heat of vaporisation, kJ/mol",
    "vaporisation_unstrained_kJ_mol": "heat of vaporisation to a vapour at rest, kJ/mol",
    "gas_energy_kJ_mol": "energy of a molecule in vacuum, kJ/mol",
    "liquid_energy_kJ_mol": "energy of a molecule in the liquid, kJ/mol",
    "pressure_nvt_bar": "pressure in nvt at 0.997 g/cm³, bar",
    "pressure_nve_bar": "pressure in nve at 0.997 g/cm³, bar",
    "pressure_weighted_bar": "pressure minus teacher's, own run reweighted, bar",
    "pressure_asked_bar": "pressure minus teacher's, teacher's run reweighted, bar",
    "pressure_beside_bar": "pressure minus teacher's on the same frames, bar",
    "energy_beside_kJ_mol": "energy minus teacher's on the same frames, kJ/mol",
    "excess_pressure_bar": "−d(energy minus teacher's)/dV in npt, bar",
    "OO_peak_A": "position of the first peak of g_OO, Å",
    "OO_height": "height of the first peak of g_OO",
    "OO_height_beside": "height minus teacher's, own run reweighted",
    "OO_height_asked": "height minus teacher's, teacher's run reweighted",
    "HH_closest_A": "closest hydrogens of two molecules, Å",
    "diffusion_box_1e-9_m2_s": "self-diffusion in the box, 1e-9 m²/s",
    "diffusion_1e-9_m2_s": "self-diffusion, corrected for the size of the box, 1e-9 m²/s",
    "dielectric": "dielectric constant",
    "drift_meV_atom_ps": "drift of the energy, meV/atom/ps",
    "temperature_centres_K": "temperature of the molecules' centres, K",
    "temperature_bonds_K": "temperature along the bonds, K",
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


def heat_of_vaporization(liquid: Estimate, gas: Estimate, temperature: float) -> Estimate:
    """ΔH_vap = ⟨E_gas⟩ - ⟨E_liquid⟩ + RT in kJ/mol, of potential energies a molecule in kJ/mol.

    RT is the gas' pV; the liquid's pV (0.002 kJ/mol) is left out, and kinetic energies are
    classical and cancel. No quantum correction is added.

    ⟨E_gas⟩ contains a flexible molecule's mean strain energy, for three classical vibrations 3/2 RT
    or 3.7 kJ/mol. With zero in its place, a vapour of molecules at rest, the result is lower by as
    much; the value usually quoted for SPC/Fw is near that.
    """
    work = units.kB * temperature / KJ_PER_MOL  # RT
    error = float(np.hypot(gas.error, liquid.error))
    return Estimate(gas.value - liquid.value + work, error)


def per_mole(energy: Estimate) -> Estimate:
    """kJ/mol from eV."""
    return Estimate(energy.value / KJ_PER_MOL, energy.error / KJ_PER_MOL)


def add_vaporization(found: dict[str, Estimate], temperature: float) -> None:
    """Add the heats of vaporization that follow from the energies in `found`."""
    liquid, gas = (found.get(f"{state}_energy_kJ_mol") for state in ("liquid", "gas"))
    if liquid and gas:
        found["vaporisation_kJ_mol"] = heat_of_vaporization(liquid, gas, temperature)
    if liquid:
        found["vaporisation_unstrained_kJ_mol"] = heat_of_vaporization(
            liquid, Estimate(0.0, 0.0), temperature
        )


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
    lines = []
    for key, title in ROWS.items():
        cells = [
            write_number(result["observables"][key]) if key in result["observables"] else "–"
            for result in results
        ]
        known = f"{EXPERIMENT[key][0]:g}" if key in EXPERIMENT else ""
        if any(cell != "–" for cell in cells):
            lines.append([title, *cells, known])
    tables = [markdown_table(["", *names, "experiment"], lines)]
    if results[-1]["name"] == TEACHER and len(results) > 1:
        found = [_distances(model, results[-1]["observables"]) for model in results[:-1]]
        lines = [_judged(key, found) for key in TARGETS]
        tables.append(markdown_table(["distance from the teacher", "target", *names[:-1]], lines))
    lines = [
        [
            stage,
            *(
                f"{result['lengths_ps'][stage]:g} ({result['hours'][stage]:.2f})"
                if stage in result["lengths_ps"]
                else "–"
                for result in results
            ),
        ]
        for stage in PRODUCTION
    ]
    tables.append(markdown_table(["picoseconds (hours)", *names], lines))
    for result in results:
        for stage in result.get("exploded", ()):
            reached = result["lengths_ps"].get(stage, 0)
            tables.append(f"{_title(result['name'])}: {stage} exploded after {reached:g} ps.")
    return "\n\n".join(tables)


def pooled_file(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Results, targets and the distances of each model, for lesson 10."""
    *models, teacher = results
    return {
        "targets": {key: target._asdict() for key, target in TARGETS.items()},
        "distances": {model["name"]: _distances(model, teacher["observables"]) for model in models},
        "results": {result["name"]: result for result in results},
    }


def _distances(model: dict[str, Any], teacher: dict[str, Estimate]) -> dict[str, Any]:
    """(distance, error, word) of each target that can be judged."""
    return {
        key: verdict(key, model["observables"][key], teacher[of])
        for key in TARGETS
        if key in model["observables"] and (of := DIFFERENCES.get(key, key)) in teacher
    }


def _judged(key: str, distances: Sequence[dict[str, Any]]) -> list[str]:
    """A row of the table of distances: observable, target, distance and verdict of each model."""
    target = TARGETS[key]
    scale, unit = (100, " %") if target.relative else (1, "")
    cells = []
    for found in distances:
        if key in found:
            away, error, word = found[key]
            number = write_number(Estimate(scale * away, scale * error))
            cells.append(f"{number}{unit}: {word}")
        else:
            cells.append("–")
    return [ROWS[key], f"{scale * target.amount:g}{unit}", *cells]


def _title(name: str) -> str:
    return "teacher, SPC/Fw" if name == TEACHER else f"`{name}`"


# --- The command -----------------------------------------------------------------------------


def _make_calculator(model: str, kernels: str) -> Calculator:
    if model == TEACHER:
        return SPCFw()
    from allscaip_lite.calculator import AllScAIPCalculator

    return AllScAIPCalculator(model, kernels=kernels)


def _run(args: argparse.Namespace) -> int:
    """`run`: run the stages, collect and write the results."""
    chosen = {key: getattr(args, key) for key in OPTIONS}
    benchmark = WaterBenchmark(**{key: value for key, value in chosen.items() if value is not None})
    name = args.name or Path(args.model).stem
    place = f"{name}-{args.seed}" if args.seed else name
    folder = args.folder or Path("runs/observables") / place
    exploded: dict[str, str] = {}
    if not args.collect:
        calculator = _make_calculator(args.model, args.kernels)
        exploded = run_water_benchmark(
            calculator, benchmark, folder, name, args.stages, not args.quiet
        )
    if args.teacher:
        calculator = _make_calculator(args.model, args.kernels)
        on_teacher_frames(calculator, folder, args.teacher, not args.quiet)
    result = collect(folder)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    store_text(args.out, _compact(result))
    for key, estimate in result["observables"].items():
        known = EXPERIMENT.get(key)
        experiment = f"   experiment {known[0]:g}" if known else ""
        print(f"{key:32s} {estimate.value:10.4g} ± {estimate.error:.2g}{experiment}")
    for stage, reason in exploded.items():
        print(f"{stage}: {reason}")
    return 0


def _table(args: argparse.Namespace) -> int:
    """`table`: compare results, in a page, and write what is pooled where lesson 10 reads it."""
    results = read_results(args.files)
    insert_table(args.out, compare(results))
    if args.pooled:
        store_text(args.pooled, _compact(pooled_file(results)))
    return 0


def _compact(result: dict[str, Any]) -> str:
    """JSON with a line for each entry and for each list."""
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
    """The arguments of the command."""
    commands = parser.add_subparsers(required=True)
    run = commands.add_parser("run", help="run the benchmark, or go on with it")
    run.set_defaults(command=_run)
    run.add_argument("model", help=f"a name, a file, or {TEACHER}")
    run.add_argument("--out", type=Path, required=True, help="the .json to write")
    run.add_argument("--name", help="what the files call the model (default: from its name)")
    run.add_argument("--folder", type=Path, help="of the runs (default: runs/observables/NAME)")
    run.add_argument("--seed", type=int, help="another seed, an independent run (default: 0)")
    run.add_argument("--waters", type=int, help="molecules in the box (default: 32)")
    for stage in ("prepare", "equilibrate", *PRODUCTION):
        default = getattr(WaterBenchmark, stage) / 1000
        run.add_argument(
            f"--{stage}", type=femtoseconds, metavar="TIME", help=f"default: {default:g}ps"
        )
    run.add_argument(
        "--stages", nargs="+", choices=PRODUCTION, default=PRODUCTION, help="default: all"
    )
    add_kernels_option(run)
    run.add_argument(
        "--collect",
        action="store_true",
        help="run nothing, write the results of what the folder has",
    )
    run.add_argument(
        "--teacher",
        type=Path,
        nargs="+",
        metavar="FOLDER",
        help="also label frames of the teacher's runs in these folders with the model",
    )
    run.add_argument("--quiet", action="store_true", help="without progress")
    table = commands.add_parser("table", help="put tables of results into a page")
    table.set_defaults(command=_table)
    table.add_argument("files", type=Path, nargs="+", help="files that `run` wrote")
    table.add_argument("--out", type=Path, required=True, help="the page that has the table")
    table.add_argument("--pooled", type=Path, metavar="FILE", help="write pooled results, a .json")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; `argv` defaults to the arguments of the process."""
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
