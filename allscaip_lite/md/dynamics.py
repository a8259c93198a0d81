"""Molecular dynamics as a user runs it: `allscaip-lite md`.

In: a structure, any ASE calculator, and `Settings`. Out: a folder with a trajectory, a log and a
state from which the same run goes on, to the same numbers. Integrators and barostats are ASE's:
velocity Verlet; Nosé–Hoover chains with the isotropic barostat of Martyna, Tobias and Klein
(J. Chem. Phys. 101, 4177, 1994); or Langevin's noise in the order BAOAB (Leimkuhler and Matthews,
J. Chem. Phys. 138, 174102, 2013), on the box's volume too at constant pressure (Quigley and
Probert, J. Chem. Phys. 120, 11432, 2004). Times are in fs unless a name says otherwise.

A folder holds `settings.json`, `trajectory.traj` (ASE's format: positions, momenta, energy),
`log.csv` (columns LOG_COLUMNS), `state.npz` and `state.before.npz` (the state and the one before
it), and, if a run exploded, `exploded.extxyz`.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import hashlib
import json
import math
import os
import re
import sys
import time
import tomllib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, NoReturn

import ase.io
import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator, CalculatorError
from ase.io.trajectory import Trajectory
from ase.md.langevinbaoab import LangevinBAOAB
from ase.md.nose_hoover_chain import IsotropicMTKNPT, NoseHooverChainNVT
from ase.md.velocitydistribution import Stationary
from ase.md.verlet import VelocityVerlet
from ase.optimize import FIRE
from tqdm import tqdm

from allscaip_lite.calculator import AllScAIPCalculator, check_calculator
from allscaip_lite.cli import Parser
from allscaip_lite.data.reading import read_structure
from allscaip_lite.electrons import state_charge_and_spin, stated_charge_and_spin
from allscaip_lite.errors import WAYS, RunError, StructureError, StructureWarning, check_kind
from allscaip_lite.files import (
    alone,
    atomic_write,
    differing,
    fingerprint,
    read_state,
    restoring,
    store_state,
    store_text,
)
from allscaip_lite.kernels import add_kernels_option
from allscaip_lite.structures import check_masses, check_structure

ENSEMBLES = ("nve", "nvt", "npt")
THERMOSTATS = ("nose-hoover", "langevin")
TIMES = ("duration", "timestep", "save_every", "log_every", "thermostat_time", "barostat_time")
LOG_COLUMNS = (
    "step time_ps potential_eV kinetic_eV conserved_eV temperature_K pressure_bar volume_A3 "
    "density_g_cm3"
).split()
GRAM_PER_CM3 = units.kg / 1000 * 1e-24  # in atomic masses per Å³
Integrator = VelocityVerlet | LangevinBAOAB | NoseHooverChainNVT | IsotropicMTKNPT
# What an integrator remembers from step to step besides the atoms themselves.
MEMORY: dict[type[Integrator], tuple[str, ...]] = {
    VelocityVerlet: (),
    LangevinBAOAB: ("p_eps", "force_eps"),  # of the volume; and the state of its random numbers
    NoseHooverChainNVT: ("_q", "_p", "_thermostat._eta", "_thermostat._p_eta"),
    IsotropicMTKNPT: tuple(
        "_q _p _eps _p_eps _cell0 _volume0 _thermostat._eta _thermostat._p_eta _barostat._xi "
        "_barostat._p_xi".split()
    ),
}


class Explosion(RunError):
    """A run whose atoms flew apart; everything up to that step is on disk."""


@dataclass(frozen=True)
class Settings:
    """What fixes a run. Raises RunError for values that contradict each other.

    duration, timestep, save_every, log_every, thermostat_time, barostat_time in fs; temperature in
    K (starting temperature in NVE; None there: the velocities of the structure); pressure in bar;
    relax: at most so many steps of minimisation first. The run stops as exploded above
    `hottest` K.
    """

    ensemble: str = "nvt"
    duration: float = 10_000.0
    temperature: float | None = 300.0
    pressure: float = 1.0
    timestep: float = 0.5
    thermostat: str = "nose-hoover"
    thermostat_time: float = 100.0
    barostat_time: float = 1000.0
    save_every: float = 100.0
    log_every: float = 10.0
    relax: int = 0
    seed: int = 0
    hottest: float = 5000.0

    def __post_init__(self) -> None:
        if self.ensemble not in ENSEMBLES:
            raise RunError(f"ensemble {self.ensemble!r} is not one of {', '.join(ENSEMBLES)}")
        if self.thermostat not in THERMOSTATS:
            raise RunError(f"thermostat {self.thermostat!r} is not one of {', '.join(THERMOSTATS)}")
        if self.ensemble != "nve" and self.temperature is None:
            raise RunError(f"{self.ensemble} needs a temperature")
        for field in dataclasses.fields(self):
            value, text = getattr(self, field.name), isinstance(field.default, str)
            number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
            if not (text or number or (value is None and field.name == "temperature")):
                raise RunError(f"{field.name} {value!r} is no number: fs, K, bar or steps")
        for name in (*TIMES, "hottest"):
            if not 0 < getattr(self, name) < math.inf:
                raise RunError(f"{name} {getattr(self, name)} must be positive, and finite")
        for name in ("seed", "relax"):
            value = getattr(self, name)
            if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 0:
                raise RunError(f"{name} {value!r} is not a whole number, 0 or more")
        if not math.isfinite(self.pressure):
            raise RunError(f"pressure {self.pressure} is not finite")
        if self.temperature is not None and not 0 <= self.temperature < self.hottest:
            raise RunError(f"temperature {self.temperature} K must be between 0 and {self.hottest}")
        if self.temperature == 0 and self.ensemble != "nve":
            raise RunError("a thermostat needs a temperature above 0 K: choose nve, or a low one")
        for name in ("duration", "save_every", "log_every"):
            steps = getattr(self, name) / self.timestep
            if abs(steps - round(steps)) > 1e-6 * steps or round(steps) < 1:
                raise RunError(
                    f"{name} {getattr(self, name):g} fs is not a multiple of the timestep, "
                    f"{self.timestep:g} fs"
                )

    def steps(self, name: str) -> int:
        """The time of that name in steps."""
        return round(getattr(self, name) / self.timestep)


@alone
def run_md(
    atoms: Atoms,
    calculator: Calculator,
    settings: Settings,
    folder: str | os.PathLike[str],
    label: str = "",
    progress: bool = True,
) -> Atoms:
    """Run molecular dynamics in a folder, or continue the run that it holds.

    Where the folder holds a state, the run continues from there, and trajectory and log become what
    an uninterrupted run writes. A longer `duration` prolongs a finished run.

    Args:
        atoms: the start; it stays as it is.
        calculator: gives energy and forces, and the stress for npt.
        settings: what fixes the run.
        folder: of the run; one with another label, model, structure, other masses or settings is
            refused.
        label: the calculator's name.
        progress: whether to show a progress bar.

    Returns:
        The structure at the end of the run.

    Raises:
        RunError: for a run that cannot start, a folder where another process works, and files of
            the run that are damaged.
        Explosion: for energy or forces that are not finite, a temperature above `settings.hottest`,
            or a volume that has changed threefold.
    """
    folder = Path(folder)
    _check(atoms, calculator, settings)
    plan = {
        **dataclasses.asdict(settings),
        "model": label,
        "calculator": _calculator_fingerprint(calculator),
        "masses": fingerprint([np.round(atoms.get_masses(), 9)]),
        "elements": atoms.numbers.tolist(),
        "structure": _fingerprint(atoms),
    }
    plan["charge"], plan["spin"] = stated_charge_and_spin(atoms)
    state = _claim(folder, plan)

    moving = atoms.copy()
    moving.calc = calculator
    generator = np.random.default_rng(settings.seed)
    if state is None:
        try:
            _start(moving, settings, generator)
        except (StructureError, CalculatorError) as error:  # while it was minimised
            raise _explosion(str(error), 0, moving, settings, folder) from error
    else:
        with restoring(folder / "state.npz"):
            moving.set_cell(state["cell"])
            moving.set_positions(state["positions"])
            moving.set_momenta(state["momenta"])
    integrator = make_integrator(moving, settings, generator)
    frames, seconds = 0, 0.0
    if state is not None:
        with restoring(folder / "state.npz"):
            integrator.nsteps = int(state["step"])
            for name in _memory(integrator):
                _set(integrator, name, state[name])
            generator.bit_generator.state = json.loads(str(state["random"]))
            frames, seconds = int(state["frames"]), float(state["seconds"])
    written = _Written(folder)
    with restoring(folder / "state.npz"):
        written.resume(state, frames, atoms)
    _simulate(integrator, settings, generator, folder, written, seconds, progress)
    return moving


def make_integrator(atoms: Atoms, settings: Settings, generator: np.random.Generator) -> Integrator:
    """ASE's integrator for the settings.

    Langevin's leaves structures at the temperature whatever the step, for harmonic vibrations
    exactly; velocities at the end of a step are those of a colder one, by (ω Δt)²/4 of it.

    ASE counts 3N degrees of freedom in its Nosé–Hoover chains, but three of them, the motion of the
    centre of mass, are and stay at rest: so the rest would come out hotter by 3N/(3N-3), and the
    chain's target is lower by as much.
    """
    step = settings.timestep * units.fs
    if settings.ensemble == "nve":
        return VelocityVerlet(atoms, step)
    assert settings.temperature is not None  # Settings sees to it
    damping = settings.thermostat_time * units.fs
    if settings.thermostat == "langevin":
        volume: dict[str, Any] = {}
        if settings.ensemble == "npt":
            period = settings.barostat_time * units.fs
            # as heavy as Martyna, Tobias and Klein's
            mass = 3 * (len(atoms) + 1) * units.kB * settings.temperature * period**2
            outer = -settings.pressure * units.bar
            volume = {"externalstress": outer, "hydrostatic": True, "P_tau": period, "P_mass": mass}
        return LangevinBAOAB(
            atoms, step, temperature_K=settings.temperature, T_tau=damping, rng=generator, **volume
        )
    target = settings.temperature * _freedom(atoms, settings) / (3 * len(atoms))
    if settings.ensemble == "nvt":
        return NoseHooverChainNVT(atoms, step, temperature_K=target, tdamp=damping)
    return IsotropicMTKNPT(
        atoms,
        step,
        temperature_K=target,
        pressure_au=settings.pressure * units.bar,
        tdamp=damping,
        pdamp=settings.barostat_time * units.fs,
    )


def _memory(integrator: Integrator) -> tuple[str, ...]:
    """Those of MEMORY that this integrator has; at constant volume no volume moves."""
    names = MEMORY[type(integrator)]
    return tuple(name for name in names if hasattr(integrator, name.partition(".")[0]))


def _freedom(atoms: Atoms, settings: Settings) -> int:
    """Degrees of freedom that share the temperature: Langevin's noise moves the whole as well."""
    whole = settings.ensemble != "nve" and settings.thermostat == "langevin"
    return max(1, 3 * len(atoms) - (0 if whole else 3))


def _check(atoms: Atoms, calculator: Calculator, settings: Settings) -> None:
    check_kind(settings, Settings, "Settings, such as Settings(ensemble='nve')")
    check_kind(atoms, Atoms, "an ase.Atoms")
    check_calculator(calculator)
    if len(atoms) < 2:
        raise RunError("a single atom has no dynamics: give a structure with more")
    check_masses(atoms)
    if not np.isfinite(atoms.get_momenta()).all():
        raise RunError("the structure has velocities that are not finite: remove its momenta")
    if atoms.constraints:
        raise RunError("the structure has constraints, which are not supported: remove them first")
    if settings.ensemble == "npt" and not (atoms.pbc.all() and atoms.cell.rank == 3):
        raise RunError("npt needs a cell that is periodic in all directions: set it, or choose nvt")
    if settings.ensemble == "nve" and settings.temperature is None and not atoms.has("momenta"):
        raise RunError("the structure has no velocities: give a temperature to draw them")
    probe = atoms.copy()
    probe.calc = calculator
    try:
        probe.get_forces()
        if settings.ensemble == "npt":
            probe.get_stress()
    except NotImplementedError as error:
        raise RunError(f"{settings.ensemble} is not possible: {error}") from error


def _start(atoms: Atoms, settings: Settings, generator: np.random.Generator) -> None:
    """Minimise if asked, and give velocities to a structure that has none, or that is at rest where
    a temperature is asked for.
    """
    if settings.relax:
        FIRE(atoms, logfile=None).run(fmax=0.5, steps=settings.relax)
    if settings.temperature is not None and not atoms.get_momenta().any():
        if unread := [name for name in atoms.arrays if re.match("velo?", name, re.IGNORECASE)]:
            warnings.warn(
                f"{atoms.get_chemical_formula()}: its array {unread[0]!r} is not read, and "
                "velocities are drawn: give them as momenta, atoms.set_velocities(…), Å in ASE's "
                "unit of time, 10.18 fs",
                StructureWarning,
                stacklevel=3,
            )
        spread = np.sqrt(atoms.get_masses() * units.kB * settings.temperature)  # Maxwell–Boltzmann
        atoms.set_momenta(generator.normal(size=(len(atoms), 3)) * spread[:, None])
        Stationary(atoms, preserve_temperature=False)
        kinetic = atoms.get_kinetic_energy()
        if kinetic > 0:  # a small system's random temperature is far from the one asked for
            wanted = (3 * len(atoms) - 3) / 2 * units.kB * settings.temperature
            atoms.set_momenta(atoms.get_momenta() * np.sqrt(wanted / kinetic))
    elif settings.ensemble == "nve" or settings.thermostat != "langevin":
        Stationary(atoms, preserve_temperature=False)


# --- The run ---------------------------------------------------------------------------------


def _simulate(
    integrator: Integrator,
    settings: Settings,
    generator: np.random.Generator,
    folder: Path,
    written: _Written,
    seconds: float,
    progress: bool,
) -> None:
    atoms, last = integrator.atoms, settings.steps("duration")
    save_every, log_every = settings.steps("save_every"), settings.steps("log_every")
    first, volume = integrator.nsteps, atoms.cell.volume
    started = time.monotonic() - seconds
    file = folder / "trajectory.traj"
    trajectory = Trajectory(file, "a", properties=["energy"])
    waiting = 1 if sys.stderr.isatty() else 30  # seconds between updates of the progress bar
    with (
        trajectory,
        (folder / "log.csv").open("a", newline="") as log,
        tqdm(
            total=last,
            initial=first,
            unit="step",
            disable=not progress,
            mininterval=waiting,
            maxinterval=waiting,
            miniters=1,
        ) as bar,
    ):
        writer = csv.writer(log)

        def record(step: int) -> None:
            nonlocal seconds
            _stop_if_exploded(integrator, volume, settings, folder)
            if step % log_every == 0:
                row = _measure(integrator, settings)
                writer.writerow(row.values())
                log.flush()
                pace = step / max(time.monotonic() - started, 1e-9)
                note = f"{pace * settings.timestep * 86_400e-6:.3g} ns/day"
                note += f", {row['temperature_K']:.0f} K"
                if settings.ensemble == "npt":
                    note += f", {row['density_g_cm3']:.3f} g/cm³"
                bar.set_postfix_str(note, refresh=False)
            if step % save_every == 0:
                trajectory.write(atoms)
                written.add(atoms)
            if step % save_every == 0 or step == last:
                seconds = time.monotonic() - started
                written.save_state(integrator, generator, seconds)

        try:
            if first == 0 and written.frames == 0:
                record(0)
            while integrator.nsteps < last:
                integrator.step()
                integrator.nsteps += 1
                record(integrator.nsteps)
                bar.update()
        except Exception as error:
            lost = not (np.isfinite(atoms.positions).all() and np.isfinite(atoms.cell.array).all())
            if isinstance(error, Explosion) or not (
                lost or isinstance(error, (StructureError, CalculatorError))
            ):
                raise
            # atoms on one spot, or nowhere: the calculator saw it first
            raise _explosion(str(error), integrator.nsteps + 1, atoms, settings, folder) from error


def _measure(integrator: Integrator, settings: Settings) -> dict[str, Any]:
    """One line of the log; cells without meaning are empty."""
    atoms = integrator.atoms
    potential, kinetic = atoms.get_potential_energy(), atoms.get_kinetic_energy()
    conserved: float | str = float(potential + kinetic)
    if isinstance(integrator, LangevinBAOAB):
        conserved = ""  # noise conserves nothing
    elif hasattr(integrator, "get_conserved_energy"):
        try:
            conserved = float(integrator.get_conserved_energy())
        except NotImplementedError:
            conserved = ""  # ASE's chains ask the calculator for a free energy
    row: dict[str, Any] = dict.fromkeys(LOG_COLUMNS, "")
    row |= {
        "step": integrator.nsteps,
        "time_ps": round(integrator.nsteps * settings.timestep / 1000, 9),
        "potential_eV": float(potential),
        "kinetic_eV": float(kinetic),
        "conserved_eV": conserved,
        "temperature_K": _temperature(atoms, settings),
    }
    if atoms.pbc.all() and atoms.cell.rank == 3:
        row["volume_A3"] = float(atoms.cell.volume)
        row["density_g_cm3"] = float(atoms.get_masses().sum() / atoms.cell.volume / GRAM_PER_CM3)
        try:
            stress = atoms.get_stress(include_ideal_gas=True)
            row["pressure_bar"] = float(-stress[:3].mean() / units.bar)
        except NotImplementedError:
            pass  # a model without stress
    return row


def _temperature(atoms: Atoms, settings: Settings) -> float:
    return float(2 * atoms.get_kinetic_energy() / (_freedom(atoms, settings) * units.kB))


def _stop_if_exploded(
    integrator: Integrator, volume: float, settings: Settings, folder: Path
) -> None:
    atoms = integrator.atoms
    temperature, expansion = _temperature(atoms, settings), 1.0
    if atoms.cell.rank == 3:
        expansion = atoms.cell.volume / volume
    forces = atoms.get_forces()
    if not (np.isfinite(atoms.get_potential_energy()) and np.isfinite(forces).all()):
        reason = "energy or forces are not finite"
    elif not temperature <= settings.hottest:
        reason = f"the temperature is {temperature:.0f} K"
    elif not 1 / 3 < expansion < 3:
        reason = f"the volume has changed {expansion:.2g}-fold"
    else:
        return
    raise _explosion(reason, integrator.nsteps, atoms, settings, folder)


def _explosion(reason: str, step: int, atoms: Atoms, settings: Settings, folder: Path) -> Explosion:
    final = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    stated = zip(("charge", "spin"), stated_charge_and_spin(atoms), strict=True)
    final.info = {name: value for name, value in stated if value is not None}
    with atomic_write(folder / "exploded.extxyz") as partial:
        ase.io.write(partial, final)
    return Explosion(
        f"the run exploded at step {step} ({step * settings.timestep / 1000:g} ps): {reason}. "
        f"Up to there all is kept in {folder}, the last structure as exploded.extxyz. Start in "
        f"another folder with a smaller timestep than {settings.timestep:g} fs, with relax, or "
        "with a model that knows such structures"
    )


# --- Files -----------------------------------------------------------------------------------


def _fingerprint(atoms: Atoms) -> str:
    """The same for the same start: positions, velocities, cell and boundaries."""
    numbers = (atoms.positions, atoms.cell.array, atoms.get_momenta())
    return fingerprint([atoms.pbc, *(np.round(array, 9) + 0.0 for array in numbers)])  # no -0


def _calculator_fingerprint(calculator: Calculator) -> str:
    """The same for the same energies: weights of a model, or kind and parameters of another."""
    model: Any = getattr(calculator, "model", None)
    if hasattr(model, "state_dict"):
        config = json.dumps(model.config.to_dict(), sort_keys=True)
        weights = [value.detach().cpu().numpy() for value in model.state_dict().values()]
        return fingerprint([np.array(config), *weights])
    parameters = getattr(calculator, "parameters", {})
    told = json.dumps(dict(parameters), sort_keys=True, default=repr)
    return f"{type(calculator).__name__} {fingerprint([np.array(told)])}"


def _claim(folder: Path, plan: dict[str, Any]) -> dict[str, np.ndarray] | None:
    """The state in the folder if it is of the same run; the folder is ours afterwards."""
    listing, state = folder / "settings.json", read_state(folder / "state.npz", _arrays)
    log, trajectory = folder / "log.csv", folder / "trajectory.traj"
    if not listing.exists() and (state is not None or log.exists() or trajectory.exists()):
        raise _not_as_written(listing)  # of which run they are, nothing else says
    if state is None and log.exists() and len(log.read_bytes().splitlines()) > 2:
        raise _not_as_written(folder / "state.npz")  # saved at the first line and later
    if listing.exists():
        known = read_settings(folder)
        # what a run of another version did not write down is not held against it
        if changed := differing(plan, known, but=["duration", *(plan.keys() ^ known.keys())]):
            raise RunError(
                f"{folder} holds a run with another {', '.join(changed)}: choose another folder"
            )
        if state is not None and plan["duration"] < known["duration"]:
            raise RunError(
                f"{folder} holds a longer run, {known['duration'] / 1000:g} ps: give that duration "
                "or more, or choose another folder"
            )
    store_text(listing, json.dumps(plan, indent=1))
    return state


def _arrays(file: Path) -> dict[str, np.ndarray]:
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def _set(integrator: Integrator, name: str, value: np.ndarray) -> None:
    owner, _, attribute = name.rpartition(".")
    plain = value.item() if value.ndim == 0 else value
    setattr(attrgetter(owner)(integrator) if owner else integrator, attribute, plain)


class _Written:
    """What a run has written so far: structures, bytes of the log, and their checksums."""

    def __init__(self, folder: Path) -> None:
        self.trajectory, self.log = folder / "trajectory.traj", folder / "log.csv"
        self.frames, self.log_bytes = 0, 0
        self.of_frames, self.of_log = hashlib.sha256(), hashlib.sha256()

    def add(self, atoms: Atoms) -> None:
        """Count a structure that was written to the trajectory."""
        self.frames += 1
        energy = np.float64(atoms.get_potential_energy())
        for array in (atoms.positions, atoms.get_momenta(), atoms.cell.array, energy):
            self.of_frames.update(np.ascontiguousarray(array, dtype="<f8").tobytes())

    def summary(self) -> dict[str, int | str]:
        """The numbers and checksums, for the run's state."""
        with self.log.open("rb") as stream:
            stream.seek(self.log_bytes)
            new = stream.read()
        self.log_bytes += len(new)
        self.of_log.update(new)
        return {
            "frames": self.frames,
            "frames_sha256": self.of_frames.hexdigest(),
            "log_bytes": self.log_bytes,
            "log_sha256": self.of_log.hexdigest(),
        }

    def save_state(
        self, integrator: Integrator, generator: np.random.Generator, seconds: float
    ) -> None:
        """All from which the run goes on, `seconds` that it took so far among it."""
        atoms = integrator.atoms
        arrays = {
            "step": integrator.nsteps,
            **self.summary(),
            "seconds": seconds,
            "positions": atoms.positions,
            "momenta": atoms.get_momenta(),
            "cell": atoms.cell.array,
            "random": json.dumps(generator.bit_generator.state),
            **{name: attrgetter(name)(integrator) for name in _memory(integrator)},
        }
        with store_state(self.trajectory.with_name("state.npz")) as partial:
            np.savez(partial, **arrays)

    def resume(self, state: Mapping[str, np.ndarray] | None, frames: int, start: Atoms) -> None:
        """Bring trajectory and log back to what they were when the state was saved.

        What was written later is cut off. Raises RunError where they are not what was written.
        """
        content = (",".join(LOG_COLUMNS) + "\r\n").encode()  # as the csv module ends lines
        self._resume_trajectory(frames, str(state["frames_sha256"]) if state else "", start)
        if state:
            content = self.log.read_bytes() if self.log.exists() else b""
            content = content[: int(state["log_bytes"])]
            if hashlib.sha256(content).hexdigest() != str(state["log_sha256"]):
                raise _not_as_written(self.log)
        with atomic_write(self.log) as partial:
            partial.write_bytes(content)
        self.summary()

    def _resume_trajectory(self, frames: int, checksum: str, start: Atoms) -> None:
        if not frames:
            self.trajectory.unlink(missing_ok=True)
            return
        try:
            with Trajectory(self.trajectory) as known:
                count = len(known)
                kept = [known[index] for index in range(min(count, frames))]
            for atoms in kept:
                self.add(atoms)
                if [*atoms.numbers, *atoms.pbc] != [*start.numbers, *start.pbc]:
                    raise ValueError("its atoms are others")
        except Exception as error:  # ASE's reader fails in many ways on what is cut or changed
            raise _not_as_written(self.trajectory) from error
        if count < frames or self.of_frames.hexdigest() != checksum:
            raise _not_as_written(self.trajectory)
        if count == frames:
            return
        with (
            atomic_write(self.trajectory) as partial,
            Trajectory(partial, "w", properties=["energy"]) as shorter,
        ):
            for atoms in kept:
                shorter.write(atoms)


def _not_as_written(file: Path) -> RunError:
    what = (
        "is not as the run left it (cut short, changed or broken)" if file.exists() else "is gone"
    )
    return RunError(
        f"{file} {what}: bring it back, choose another folder, or remove this one and start again"
    )


def read_settings(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What fixed the run in a folder, as `Settings` and more; RunError where it is damaged."""
    listing = Path(folder) / "settings.json"
    try:
        known = json.loads(listing.read_text())
        return known | {name: float(known[name]) for name in ("duration", "save_every")}
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"{listing} is damaged ({error}): remove {folder} and start again"
        ) from error


def read_log(folder: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The columns of a run's `log.csv` (names: LOG_COLUMNS) as arrays; empty cells are nan.

    Raises RunError where it is damaged.
    """
    file = Path(folder) / "log.csv"
    with file.open(newline="") as stream:
        try:
            rows = list(csv.DictReader(stream))
            return {name: np.array([float(r[name] or "nan") for r in rows]) for name in LOG_COLUMNS}
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            raise RunError(f"{file} is damaged ({error}): bring it back as it was") from error


# --- The command -----------------------------------------------------------------------------


def femtoseconds(text: str) -> float:
    """A time such as "10ps", "0.5 fs" or "1ns" in fs, as a `type` of argparse."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*(fs|ps|ns)\s*", text)
    if not match:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a time: write a number and fs, ps or ns, such as 10ps"
        )
    return float(match[1]) * {"fs": 1.0, "ps": 1e3, "ns": 1e6}[match[2]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `allscaip-lite md`; those that are not given stay None."""
    defaults = Settings()
    parser.description = (
        "Molecular dynamics. The same command continues a run that was stopped, or prolongs it "
        "to a longer --time. An input file (TOML) has these options as its keys, for example: "
        'structure = "box.extxyz", model = "lite", ensemble = "npt", temperature = 300, '
        'time = "100ps". Options of the command line have precedence.'
    )
    parser.add_argument("structure", help="a structure file that ASE reads, or an input (.toml)")
    parser.add_argument("--out", type=Path, help="folder of the run (default: runs/md)")
    parser.add_argument("--model", help="a name, a file, or spcfw (default: lite)")
    parser.add_argument("--ensemble", choices=ENSEMBLES, help=f"default: {defaults.ensemble}")
    parser.add_argument("--temperature", type=float, metavar="K", help="default: 300")
    parser.add_argument("--pressure", type=float, metavar="BAR", help="default: 1")
    for name in TIMES:
        parser.add_argument(
            "--time" if name == "duration" else f"--{name.replace('_', '-')}",
            dest=name,
            type=femtoseconds,
            metavar="TIME",
            help=f"such as 10ps or 0.5fs (default: {getattr(defaults, name):g}fs)",
        )
    parser.add_argument("--thermostat", choices=THERMOSTATS, help="default: nose-hoover")
    parser.add_argument("--relax", type=int, metavar="STEPS", help="minimise first, up to so many")
    parser.add_argument("--hottest", type=float, metavar="K", help="stop above (default: 5000)")
    parser.add_argument("--charge", type=int, help="default: the structure's own")
    parser.add_argument("--spin", type=int, help="multiplicity; default: the structure's own")
    parser.add_argument("--seed", type=int, help="of velocities and noise (default: 0)")
    parser.add_argument(
        "--outside-training",
        choices=WAYS,
        help="where a structure has what the model did not see in training (default: warn)",
    )
    parser.add_argument("--device", help="cpu or cuda (default: a GPU where there is one)")
    add_kernels_option(parser, default=None)


class _InputParser(Parser):
    """Reads options from a file; a mistake is a RunError."""

    def error(self, message: str) -> NoReturn:
        raise RunError(f"{self.prog}: {message}")


def read_input(file: Path) -> dict[str, Any]:
    """The options in an input file (TOML), as on the command line; the structure may be missing.

    Raises RunError for a key that does not exist and a value that is not one.
    """
    try:
        content = tomllib.loads(file.read_text("utf-8-sig"))
    except ValueError as error:  # TOML's, or bytes that are no text
        raise RunError(f"{file} is not an input in TOML: {error}") from error
    structure = content.pop("structure", None)
    where = str(file.parent / str(structure)) if structure else ""
    parser = _InputParser(prog=str(file), add_help=False, allow_abbrev=False)
    add_arguments(parser)
    options = [f"--{key.replace('_', '-')}={value}" for key, value in content.items()]
    return _given(parser.parse_args([where, *options]))


def _given(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(args).items() if value is not None}


def run(args: argparse.Namespace) -> int:
    """`allscaip-lite md`: start a run or continue it; the exit status."""
    given = _given(args)
    if args.structure.endswith(".toml"):
        del given["structure"]
        given = read_input(Path(args.structure)) | given
    names = [field.name for field in dataclasses.fields(Settings) if field.name in given]
    settings = Settings(**{name: given[name] for name in names})
    where = given["structure"]
    if not where:
        raise RunError(f'{args.structure} names no structure: add structure = "box.extxyz"')
    atoms = read_structure(where)
    charge, spin = stated_charge_and_spin(atoms, where)
    state_charge_and_spin(atoms, given.get("charge", charge), given.get("spin", spin))
    check_structure(atoms, where)
    model = given.get("model", "lite")
    if model == "spcfw":
        from allscaip_lite.spcfw import SPCFw

        calculator: Calculator = SPCFw()
    else:
        options = {name: given[name] for name in ("kernels", "outside_training") if name in given}
        calculator = AllScAIPCalculator(model, given.get("device"), **options)
    folder = given.get("out", Path("runs/md"))
    final = run_md(atoms, calculator, settings, folder, label=model)
    print(
        f"{settings.duration / 1000:g} ps of {final.get_chemical_formula()} in {folder}: "
        "trajectory.traj, log.csv",
        file=sys.stderr,
    )
    return 0
