"""Dynamics conserves what it should, goes on where it was killed, and says what is wrong."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import molecule
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT
from ase.io import write
from ase.io.trajectory import Trajectory
from ase.lattice.cubic import FaceCenteredCubic
from ase.neighborlist import neighbor_list
from ase.stress import full_3x3_to_voigt_6_stress

from allscaip_lite import AllScAIPCalculator, cli, load_model
from allscaip_lite.errors import RunError, StructureError
from allscaip_lite.files import locked
from allscaip_lite.md import dynamics as md
from allscaip_lite.md.dynamics import (
    Explosion,
    Settings,
    femtoseconds,
    read_log,
    run_md,
)


class Springs(Calculator):
    """Anharmonic springs between the nearest neighbours of a crystal, with stress."""

    implemented_properties = ["energy", "free_energy", "forces", "stress"]

    def __init__(self) -> None:
        super().__init__()
        ideal = FaceCenteredCubic("Cu", size=(2, 2, 2))
        self.i, self.j, self.shift = neighbor_list("ijS", ideal, 2.8)
        self.length = ideal.cell[0, 0] / np.sqrt(8)

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        moved = atoms.positions[self.j] + self.shift @ atoms.cell.array
        vectors = moved - atoms.positions[self.i]
        lengths = np.linalg.norm(vectors, axis=1)
        stretch = lengths - self.length
        # each spring stands twice in the list
        slope = (2.0 * stretch - 3.0 * stretch**2 + 4.0 * stretch**3) / 2
        energy = (stretch**2 - stretch**3 + stretch**4).sum() / 2
        pull = (slope / lengths)[:, None] * vectors
        forces = np.zeros((len(atoms), 3))
        np.add.at(forces, self.i, pull)
        np.add.at(forces, self.j, -pull)
        stress = vectors.T @ pull / atoms.cell.volume
        self.results = {
            "energy": float(energy),
            "free_energy": float(energy),
            "forces": forces,
            "stress": full_3x3_to_voigt_6_stress(stress),
        }


def copper() -> Atoms:
    """32 atoms, in a crystal."""
    atoms = FaceCenteredCubic("Cu", size=(2, 2, 2))
    atoms.rattle(0.05, seed=0)
    return atoms


def short(**changes) -> Settings:
    base = {"duration": 60.0, "timestep": 2.0, "save_every": 10.0, "log_every": 4.0}
    return Settings(**{**base, **changes})


def frames(folder: Path) -> list[tuple[bytes, ...]]:
    with Trajectory(folder / "trajectory.traj") as trajectory:
        return [
            (a.positions.tobytes(), a.get_momenta().tobytes(), a.cell.array.tobytes())
            for a in trajectory
        ]


KINDS = [
    {"ensemble": "nve"},
    {"ensemble": "nvt"},
    {"ensemble": "nvt", "thermostat": "langevin"},
    {"ensemble": "npt", "pressure": 1000.0},
    {"ensemble": "npt", "pressure": 1000.0, "thermostat": "langevin"},
]


# --- physics ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[1], KINDS[3]])
def test_the_conserved_energy_is_conserved(tmp_path, kind):
    settings = short(duration=1000.0, timestep=1.0, log_every=10.0, **kind)
    run_md(copper(), Springs(), settings, tmp_path, progress=False)
    log = read_log(tmp_path)
    assert np.ptp(log["conserved_eV"]) < 1e-2 * np.ptp(log["potential_eV"])


def test_half_the_timestep_conserves_four_times_as_well(tmp_path):
    spread = []
    for step in (4.0, 2.0):
        settings = short(
            ensemble="nve", duration=400.0, timestep=step, save_every=100.0, log_every=step
        )
        run_md(copper(), Springs(), settings, tmp_path / str(step), progress=False)
        spread.append(read_log(tmp_path / str(step))["conserved_eV"].std())
    assert spread[0] / spread[1] == pytest.approx(4, rel=0.25)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_the_mean_temperature_is_the_one_asked_for(tmp_path, kind):
    settings = short(
        duration=12_000.0,
        timestep=4.0,
        save_every=4000.0,
        log_every=20.0,
        temperature=400.0,
        thermostat_time=50.0,
        barostat_time=400.0,
        **kind,
    )
    run_md(copper(), Springs(), settings, tmp_path, progress=False)
    late = read_log(tmp_path)["time_ps"] > 1
    temperatures = read_log(tmp_path)["temperature_K"][late]
    assert temperatures.mean() == pytest.approx(400, rel=0.04)
    # of a canonical ensemble: variance of the temperature 2T²/(3N - 3)
    assert temperatures.std() == pytest.approx(400 * np.sqrt(2 / 93), rel=0.35)
    if kind["ensemble"] == "npt":
        assert read_log(tmp_path)["pressure_bar"][late].mean() == pytest.approx(1000, abs=1000)
        assert np.ptp(read_log(tmp_path)["volume_A3"][late]) > 1


class Sites(Calculator):
    """Each atom is bound to its own site by a spring, and to no other atom; without a stress."""

    implemented_properties = ["energy", "free_energy", "forces", "stress"]

    def __init__(self, sites: np.ndarray, stiffness: float) -> None:
        super().__init__()
        self.sites, self.stiffness = sites, stiffness

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        away = atoms.positions - self.sites
        energy = self.stiffness / 2 * (away**2).sum()
        self.results = {"energy": energy, "free_energy": energy, "stress": np.zeros(6)}
        self.results["forces"] = -self.stiffness * away


def test_langevin_leaves_structures_at_the_temperature_even_with_a_long_step(tmp_path):
    """BAOAB: ⟨potential⟩ = kT/2 a direction, ⟨kinetic⟩ less by (ω Δt)²/4, with ω Δt = 1."""
    atoms = Atoms("Cu100", positions=np.random.default_rng(0).normal(size=(100, 3)))
    frequency = 1 / (5.0 * units.fs)
    bound = Sites(atoms.positions.copy(), atoms.get_masses()[0] * frequency**2)
    settings = short(
        thermostat="langevin",
        thermostat_time=20.0,
        timestep=5.0,
        duration=5_000.0,
        log_every=5.0,
        save_every=5_000.0,
    )
    run_md(atoms, bound, settings, tmp_path, progress=False)
    log, half = read_log(tmp_path), 300 * units.kB / 2 * 300  # 300 directions at 300 K
    assert log["potential_eV"][20:].mean() == pytest.approx(half, rel=0.02)
    assert log["kinetic_eV"][20:].mean() == pytest.approx(0.75 * half, rel=0.02)


def test_langevin_s_barostat_gives_an_ideal_gas_its_volume(tmp_path):
    """⟨V⟩ = (N + 1) kT/p, and a standard deviation of √(N + 1) kT/p."""
    atoms = Atoms("Ar60", cell=[30.0] * 3, pbc=True)
    volume = units.kB * 300 / (900 * units.bar)  # of an atom
    atoms.set_cell([(61 * volume) ** (1 / 3)] * 3)
    atoms.positions = np.random.default_rng(0).uniform(size=(60, 3)) * atoms.cell.lengths()
    settings = short(
        ensemble="npt",
        thermostat="langevin",
        pressure=900.0,
        thermostat_time=200.0,
        barostat_time=200.0,
        timestep=10.0,
        duration=60_000.0,
        log_every=50.0,
        save_every=20_000.0,
    )
    run_md(atoms, Sites(0.0, 0.0), settings, tmp_path, progress=False)
    volumes = read_log(tmp_path)["volume_A3"][40:]
    assert volumes.mean() == pytest.approx(61 * volume, rel=0.03)
    assert volumes.std() == pytest.approx(np.sqrt(61) * volume, rel=0.25)


def test_velocities_start_at_the_temperature_and_rest_as_a_whole(tmp_path):
    final = run_md(copper(), Springs(), short(), tmp_path, progress=False)
    assert read_log(tmp_path)["temperature_K"][0] == pytest.approx(300)
    assert np.abs(final.get_momenta().sum(0)).max() < 1e-8
    with Trajectory(tmp_path / "trajectory.traj") as trajectory:
        first = trajectory[0]
        assert len(trajectory) == 7
        assert first.get_potential_energy() == pytest.approx(read_log(tmp_path)["potential_eV"][0])


def test_velocities_of_the_structure_are_kept(tmp_path):
    atoms = copper()
    generator = np.random.default_rng(1)
    momenta = generator.normal(size=(32, 3))
    atoms.set_momenta(momenta - momenta.mean(0))
    run_md(atoms, Springs(), short(ensemble="nve"), tmp_path, progress=False)
    with Trajectory(tmp_path / "trajectory.traj") as trajectory:
        assert trajectory[0].get_momenta() == pytest.approx(atoms.get_momenta(), abs=1e-12)


@pytest.mark.parametrize("name", ["momenta", "velo"])
def test_velocities_of_a_structure_at_rest_are_drawn(tmp_path, name):
    """A minimised structure may have velocities of 0; other programs call them otherwise."""
    atoms = copper()
    atoms.arrays[name] = np.full((32, 3), float(name == "velo"))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        run_md(atoms, Springs(), short(ensemble="nve"), tmp_path, progress=False)
    assert read_log(tmp_path)["temperature_K"][0] == pytest.approx(300)
    said = [str(one.message) for one in warned]
    assert any("'velo' is not read" in text for text in said) == (name == "velo")


def test_relaxing_comes_first(tmp_path):
    before = copper()
    before.calc = Springs()
    run_md(copper(), Springs(), short(relax=20), tmp_path, progress=False)
    assert read_log(tmp_path)["potential_eV"][0] < before.get_potential_energy() / 2


def test_the_model_runs_a_molecule(tmp_path, make_model):
    atoms = molecule("H2O", info={"charge": 0, "spin": 1})
    settings = short(ensemble="nve", duration=4.0, timestep=0.5, save_every=1.0, log_every=1.0)
    run_md(atoms, AllScAIPCalculator(make_model()), settings, tmp_path, progress=False)
    log = read_log(tmp_path)
    assert np.isnan(log["volume_A3"]).all() and np.isnan(log["pressure_bar"]).all()
    assert np.ptp(log["conserved_eV"]) < 0.05 * np.ptp(log["potential_eV"])


# --- stop and go on -----------------------------------------------------------------------------


class Interrupted(Springs):
    """Springs until Ctrl-C at the n-th call."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls = calls

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        self.calls -= 1
        if self.calls == 0:
            raise KeyboardInterrupt
        super().calculate(atoms, properties, system_changes)


Interrupted.__name__ = "Springs"  # by which a run knows its calculator


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_to_the_same_bits(tmp_path, kind):
    settings = short(**kind)
    run_md(copper(), Springs(), settings, tmp_path / "whole", progress=False)
    with pytest.raises(KeyboardInterrupt):
        run_md(copper(), Interrupted(20), settings, tmp_path / "cut", progress=False)
    assert 0 < len(frames(tmp_path / "cut")) < 7
    run_md(copper(), Springs(), settings, tmp_path / "cut", progress=False)
    assert frames(tmp_path / "cut") == frames(tmp_path / "whole")
    logs = [(tmp_path / name / "log.csv").read_bytes() for name in ("cut", "whole")]
    assert logs[0] == logs[1]


def test_what_was_written_after_the_state_is_written_anew(tmp_path):
    settings = short()
    run_md(copper(), Springs(), settings, tmp_path / "whole", progress=False)
    run_md(copper(), Springs(), short(duration=40.0), tmp_path / "cut", progress=False)
    state = (tmp_path / "cut" / "state.npz").read_bytes()
    run_md(copper(), Springs(), settings, tmp_path / "cut", progress=False)
    (tmp_path / "cut" / "state.npz").write_bytes(state)  # as if killed just before it was saved
    with (tmp_path / "cut" / "log.csv").open("a") as log:
        log.write("30,0.06")  # and in the middle of a line
    run_md(copper(), Springs(), settings, tmp_path / "cut", progress=False)
    assert frames(tmp_path / "cut") == frames(tmp_path / "whole")
    logs = [(tmp_path / name / "log.csv").read_bytes() for name in ("cut", "whole")]
    assert logs[0] == logs[1]


def test_a_finished_run_can_be_prolonged_but_not_changed(tmp_path):
    run_md(copper(), Springs(), short(), tmp_path / "whole", progress=False)
    run_md(copper(), Springs(), short(duration=20.0), tmp_path / "parts", progress=False)
    run_md(copper(), Springs(), short(), tmp_path / "parts", progress=False)
    assert frames(tmp_path / "parts") == frames(tmp_path / "whole")
    with pytest.raises(RunError, match="another temperature"):
        run_md(copper(), Springs(), short(temperature=310.0), tmp_path / "whole", progress=False)
    with pytest.raises(RunError, match="longer run"):
        run_md(copper(), Springs(), short(duration=20.0), tmp_path / "whole", progress=False)
    with pytest.raises(RunError, match="another model"):
        run_md(copper(), Springs(), short(), tmp_path / "whole", label="other", progress=False)
    (tmp_path / "whole" / "trajectory.traj").unlink()
    with pytest.raises(RunError, match="start again"):
        run_md(copper(), Springs(), short(duration=80.0), tmp_path / "whole", progress=False)


def test_a_folder_belongs_to_one_structure_charge_and_spin(tmp_path):
    run_md(copper(), Springs(), short(duration=20.0), tmp_path, progress=False)
    other = copper()
    other.positions[3, 1] += 0.01
    charged, moving = copper(), copper()
    charged.info["charge"] = 1
    moving.set_momenta(np.random.default_rng(0).normal(size=(32, 3)))
    heavy = copper()
    heavy.set_masses(2 * heavy.get_masses())
    for atoms, words in (
        (other, "structure"),
        (charged, "charge"),
        (moving, "structure"),
        (heavy, "masses"),
    ):
        with pytest.raises(RunError, match=f"another {words}: choose another folder"):
            run_md(atoms, Springs(), short(), tmp_path, progress=False)
    with pytest.raises(RunError, match="another calculator: choose another folder"):
        run_md(copper(), EMT(), short(), tmp_path, progress=False)
    run_md(copper(), Springs(), short(), tmp_path, progress=False)


def test_other_weights_under_the_same_name_do_not_go_on(tmp_path):
    water = molecule("H2O", info={"charge": 0, "spin": 1})
    model = load_model("lite")
    settings = Settings(duration=1.0, timestep=0.5, save_every=0.5, log_every=0.5)
    run_md(water, AllScAIPCalculator(model), settings, tmp_path, "mine", progress=False)
    with torch.no_grad():
        model.energy_head.contract.bias += 1e-6
    with pytest.raises(RunError, match="another calculator: choose"):
        run_md(water, AllScAIPCalculator(model), settings, tmp_path, "mine", progress=False)


def test_a_killed_command_goes_on_to_the_same_bits(tmp_path):
    from data.water.boxes import water_box

    write(tmp_path / "box.extxyz", water_box(4, 0.5, seed=1))
    (tmp_path / "input.toml").write_text(
        'structure = "box.extxyz"\nmodel = "spcfw"\nensemble = "npt"\ntime = "40fs"\n'
        'save-every = "2fs"\nlog-every = "1fs"\nrelax = 20\n'
    )

    def command(out: str) -> list[str]:
        options = ["md", str(tmp_path / "input.toml"), "--out", str(tmp_path / out)]
        return [sys.executable, "-m", "allscaip_lite.cli", *options]

    done = subprocess.run(command("whole"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ns/day" in done.stderr and "H8O4" in done.stderr
    process = subprocess.Popen(command("cut"), stderr=subprocess.DEVNULL)
    while not (tmp_path / "cut" / "state.npz").exists() and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run(command("cut"), check=True, capture_output=True)
    assert frames(tmp_path / "cut") == frames(tmp_path / "whole")
    assert len(frames(tmp_path / "cut")) == 21


# --- explosions and mistakes --------------------------------------------------------------------


class Faulty(Springs):
    """Springs whose forces turn into something else after some calls."""

    def __init__(self, calls: int, factor: float) -> None:
        super().__init__()
        self.calls, self.factor = calls, factor

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        self.calls -= 1
        if self.calls < 0:
            self.results["forces"] = self.results["forces"] * self.factor


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "factor, words", [(np.nan, "not finite"), (np.inf, "not finite"), (3000.0, "temperature is")]
)
def test_an_explosion_stops_with_a_word_and_loses_nothing(tmp_path, factor, words):
    with pytest.raises(Explosion, match=words) as raised:
        run_md(copper(), Faulty(20, factor), short(), tmp_path, progress=False)
    assert "smaller timestep" in str(raised.value)
    run_md(copper(), Springs(), short(), tmp_path / "sound", progress=False)
    kept, sound = frames(tmp_path), frames(tmp_path / "sound")
    assert 3 <= len(kept) < 7 and kept == sound[: len(kept)]
    assert len(read_log(tmp_path)["step"]) >= 9
    assert (tmp_path / "exploded.extxyz").exists()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_kill_leaves_no_half_of_the_last_structure(tmp_path, monkeypatch):
    def half(file, atoms):
        Path(file).write_text("8\n")
        raise KeyboardInterrupt

    monkeypatch.setattr(md.ase.io, "write", half)
    with pytest.raises(KeyboardInterrupt):
        run_md(copper(), Faulty(20, np.nan), short(), tmp_path, progress=False)
    assert not (tmp_path / "exploded.extxyz").exists()


@pytest.mark.parametrize("change", [{"temperature": "300"}, {"duration": None}, {"relax": True}])
def test_a_setting_that_is_no_number_is_named(change):
    with pytest.raises(RunError, match=rf"{next(iter(change))} .* is no"):
        Settings(**change)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_box_that_bursts_is_an_explosion(tmp_path):
    class Bursting(Springs):
        def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
            super().calculate(atoms, properties, system_changes)
            self.results["forces"] = 0 * self.results["forces"]
            self.results["stress"] = -np.array([1, 1, 1, 0, 0, 0]) * 3.0

    settings = short(ensemble="npt", duration=600.0, barostat_time=50.0)
    with pytest.raises(Explosion, match="volume|temperature"):
        run_md(copper(), Bursting(), settings, tmp_path, progress=False)


def test_atoms_on_one_spot_end_the_run_with_the_calculator_s_words(
    tmp_path, make_model, make_colliding
):
    atoms = molecule("H2O", info={"charge": 0, "spin": 1})
    settings = short(ensemble="nve", timestep=0.5, save_every=1.0, log_every=1.0, duration=10.0)
    with pytest.raises(Explosion, match="exploded at step"):
        run_md(atoms, make_colliding(make_model(), 5), settings, tmp_path, progress=False)
    assert len(frames(tmp_path)) > 1


def test_a_minimisation_that_fails_is_an_explosion_too(tmp_path, make_model, make_colliding):
    atoms = molecule("H2O", info={"charge": 0, "spin": 1})
    atoms.rattle(0.2, seed=0)
    with pytest.raises(Explosion, match="exploded at step 0"):
        run_md(atoms, make_colliding(make_model(), 3), short(relax=20), tmp_path, progress=False)
    assert (tmp_path / "exploded.extxyz").exists()


class Stressless(Calculator):
    implemented_properties = ["energy", "forces"]

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        self.results = {"energy": 0.0, "forces": np.zeros((len(atoms), 3))}


def test_constant_pressure_needs_a_stress_and_a_cell(tmp_path):
    with pytest.raises(RunError, match="npt is not possible"):
        run_md(copper(), Stressless(), short(ensemble="npt"), tmp_path, progress=False)
    with pytest.raises(RunError, match="periodic in all directions"):
        run_md(molecule("H2O"), Stressless(), short(ensemble="npt"), tmp_path, progress=False)
    run_md(copper(), Stressless(), short(ensemble="nvt"), tmp_path, progress=False)
    assert np.isnan(read_log(tmp_path)["conserved_eV"]).all()  # it has no free energy either
    assert np.isnan(read_log(tmp_path)["pressure_bar"]).all()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"ensemble": "nph"}, "not one of nve, nvt, npt"),
        ({"thermostat": "berendsen"}, "not one of nose-hoover, langevin"),
        ({"temperature": None}, "needs a temperature"),
        ({"timestep": -1.0}, "must be positive"),
        ({"save_every": 3.0}, "save_every 3 fs is not a multiple of the timestep, 2 fs"),
        ({"temperature": 9000.0}, "between 0 and"),
        ({"temperature": 0.0}, "above 0 K"),
        ({"thermostat_time": 0.0}, "thermostat_time 0.0 must be positive"),
        ({"ensemble": "npt", "barostat_time": 0.0}, "barostat_time 0.0 must be positive"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, words):
    with pytest.raises(RunError, match=words):
        short(**changes)


@pytest.mark.parametrize(
    "text, fs", [("10ps", 1e4), ("0.5 fs", 0.5), ("1e-3ns", 1e3), (" 2 ps ", 2e3)]
)
def test_times_have_units(text, fs):
    assert femtoseconds(text) == pytest.approx(fs)


@pytest.mark.parametrize("text", ["10", "ps", "10 s", "1.2.3ps"])
def test_a_time_without_its_unit_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="such as 10ps"):
        femtoseconds(text)


def test_options_beside_an_input_count_more(tmp_path, monkeypatch, capsys):
    write(tmp_path / "cu.extxyz", copper())
    file = tmp_path / "input.toml"
    text = 'structure = "cu.extxyz"\ntemperature = 500\ntime = "20fs"\nmodel = "lite"\n'
    file.write_text(text, encoding="utf-8-sig")  # as editors of Windows do
    seen = {}

    def catch(atoms, calculator, settings, folder, label):
        seen.update(settings=settings, folder=folder, label=label, info=atoms.info)
        return atoms

    monkeypatch.setattr(md, "run_md", catch)
    options = ["md", str(file), "--temperature", "400", "--timestep", "1fs", "--charge", "1"]
    assert cli.main([*options, "--out", str(tmp_path / "run"), "--save-every", "5fs"]) == 0
    assert seen["settings"].temperature == 400 and seen["settings"].duration == 20
    assert seen["settings"].timestep == 1 and seen["settings"].save_every == 5
    assert seen["folder"] == tmp_path / "run" and seen["label"] == "lite"
    assert seen["info"]["charge"] == 1


@pytest.mark.parametrize(
    "text, words",
    [
        ("structure = ", "not an input in TOML"),
        ("temprature = 3\n", "unrecognized arguments: --temprature=3"),
        ('temperature = "hot"\n', "invalid float value: 'hot'"),
        ('structure = ["w.xyz"]\n', "no such file"),
        ("relax = 1.5\n", "--relax: invalid int value: '1.5'"),
        ("charge = true\n", "--charge: invalid int value: 'True'"),
        ("kernels = true\n", "--kernels: invalid choice: 'True'"),
        ("seed = -1\n", "seed -1 is not a whole number, 0 or more"),
        ("temperature = inf\n", "--temperature: inf is not finite"),
        ("temperature = 6000\n", "must be between"),
        ("pressure = nan\n", "--pressure: nan is not finite"),
        ('time = "10"\n', "write a number and fs, ps or ns"),
        ("temperature = 3\n", "names no structure"),
        ('structure = ""\n', "names no structure"),
        ('structure = "absent.xyz"\n', "absent.xyz"),
    ],
)
def test_a_mistake_in_the_input_is_one_clear_line(tmp_path, capsys, text, words):
    (tmp_path / "input.toml").write_text(text)
    assert cli.main(["md", str(tmp_path / "input.toml")]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


# --- many boxes ---------------------------------------------------------------------------------


def test_torch_sim_sees_the_same_model(make_model, crystal, cluster):
    torch_sim = pytest.importorskip("torch_sim")
    import torch

    from allscaip_lite.md.torchsim import TorchSimModel

    model = make_model()
    second = crystal.copy()
    second.set_cell(second.cell.array * 1.1, scale_atoms=True)
    for batch in ([crystal, second], [cluster, cluster[:4]]):
        state = torch_sim.io.atoms_to_state(batch, torch.device("cpu"), torch.float64)
        found = TorchSimModel(model)(state)
        for index, atoms in enumerate(batch):
            alone = atoms.copy()
            electrons = int(alone.numbers.sum())
            alone.info = {"charge": 0, "spin": 1 + electrons % 2}
            alone.calc = AllScAIPCalculator(model)
            assert float(found["energy"][index]) == pytest.approx(alone.get_potential_energy())
            mine = found["forces"][state.system_idx == index].numpy()
            assert mine == pytest.approx(alone.get_forces(), abs=1e-8)
            if alone.pbc.any():
                stress = alone.get_stress(voigt=False)
                assert found["stress"][index].numpy() == pytest.approx(stress, abs=1e-9)


def test_torch_sim_compares_whatever_comes_with_what_training_saw(make_model, crystal, cluster):
    torch_sim = pytest.importorskip("torch_sim")
    import torch

    from allscaip_lite.applicability import Seen
    from allscaip_lite.md.torchsim import TorchSimModel

    model = make_model()
    model.seen = Seen.from_dict({"atoms": 4})
    ours = TorchSimModel(model, charge=0)

    def said(*batch):
        state = torch_sim.io.atoms_to_state(list(batch), torch.device("cpu"), torch.float64)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ours(state)
        return [str(one.message) for one in caught]

    assert said(cluster[:4]) == []
    assert any("seen: at most 4" in text for text in said(cluster))
    assert said(cluster) == said(cluster[:4]) == said(cluster) == []  # it was said


@pytest.mark.parametrize(
    "name, place, value, message",
    [
        ("positions", (0, 0), np.nan, "positions of atoms .0. are not finite"),
        ("positions", (0, 0), 1e7, "the model's numbers tell positions apart up to"),
        ("cell", (0, 0, 0), np.nan, "the cell is not finite"),
        ("cell", (0, 0), 0.0, "zero or flat"),
        ("atomic_numbers", 0, 0, "structure 0 .*: X is outside this model's table"),
        ("atomic_numbers", 0, 120, "120 is outside this model's table"),
    ],
)
def test_torch_sim_gets_no_number_for_what_is_no_structure(
    make_model, crystal, cluster, name, place, value, message
):
    """Neither at the first step nor later, where a run has gone astray."""
    torch_sim = pytest.importorskip("torch_sim")
    import torch

    from allscaip_lite.md.torchsim import TorchSimModel

    atoms = crystal if name == "cell" else cluster
    ours = TorchSimModel(make_model(), charge=0)
    state = torch_sim.io.atoms_to_state([atoms], torch.device("cpu"), torch.float64)
    before = ours(state)["energy"]
    wrong = state.clone()
    getattr(wrong, name)[place] = value
    for model in (ours, TorchSimModel(make_model(), charge=0)):
        with pytest.raises(StructureError, match=message):
            model(wrong)
    assert ours(state)["energy"] == before


@pytest.mark.parametrize(
    "charge, multiplicity, message",
    [
        (1.5, None, "not a whole number"),
        (500, None, "charge .500 is outside"),
        (30, None, "fewer than no electrons"),
        (0, 2, "do not allow it"),
    ],
)
def test_torch_sim_reads_charges_as_everything_does(make_model, charge, multiplicity, message):
    torch_sim = pytest.importorskip("torch_sim")
    import torch

    from allscaip_lite.md.torchsim import TorchSimModel

    water = molecule("H2O")
    state = torch_sim.io.atoms_to_state([water], torch.device("cpu"), torch.float64)
    with pytest.raises(StructureError, match=message):
        TorchSimModel(make_model(), charge=charge, multiplicity=multiplicity)(state)
    water.info = {"charge": -1, "spin": 2}
    expected = make_model().predict(water).energy
    for given in ("-1", -0.9999, np.array(-1)):
        found = TorchSimModel(make_model(), charge=given)(state)
        assert float(found["energy"]) == pytest.approx(expected)


def test_torch_sim_accepts_the_model(make_model):
    pytest.importorskip("torch_sim")
    import torch
    from torch_sim.models.interface import validate_model_outputs

    from allscaip_lite.md.torchsim import TorchSimModel

    validate_model_outputs(TorchSimModel(make_model()), torch.device("cpu"), torch.float64)


def test_settings_are_kept_beside_the_run(tmp_path):
    run_md(copper(), Springs(), short(), tmp_path, label="springs", progress=False)
    kept = json.loads((tmp_path / "settings.json").read_text())
    assert kept["model"] == "springs" and kept["temperature"] == 300
    assert set(read_log(tmp_path)) == set(md.LOG_COLUMNS)
    assert np.isfinite(read_log(tmp_path)["pressure_bar"]).all()


def test_damaged_settings_and_logs_are_named(tmp_path):
    for text in ("{", "[1]", '{"duration": "long", "save_every": 1}'):
        (tmp_path / "settings.json").write_text(text)
        with pytest.raises(RunError, match=r"settings\.json is damaged"):
            md.read_settings(tmp_path)
    for text in ("step,time_ps\n0,0\n", ",".join(md.LOG_COLUMNS) + "\n0,x,0,0,0,0,0,0,0\n"):
        (tmp_path / "log.csv").write_text(text)
        with pytest.raises(RunError, match=r"log\.csv is damaged"):
            read_log(tmp_path)


def test_two_runs_do_not_share_a_folder(tmp_path):
    with locked(tmp_path / "run"), pytest.raises(RunError, match="another process works in"):
        run_md(copper(), EMT(), short(), tmp_path / "run", progress=False)
    run_md(copper(), EMT(), short(), tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / ".lock").exists()


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("trajectory.traj", lambda content: content[: len(content) // 2], "cut short"),
        ("trajectory.traj", lambda content: content.replace(content[-2000:-1992], b"12345678"), ""),
        ("trajectory.traj", lambda content: content.replace(b"\x1d\0\0", b"\x2f\0\0"), ""),
        ("trajectory.traj", None, "is gone"),
        ("log.csv", lambda content: content.replace(b"1", b"2", 1), "changed"),
        ("log.csv", None, "is gone"),
        ("settings.json", None, "is gone"),
        ("settings.json", lambda content: content[:-20], "is damaged"),
        ("settings.json", lambda content: b"[]", "is damaged"),
    ],
)
def test_files_of_a_run_that_changed_are_not_run_on_into(tmp_path, name, damage, words):
    run_md(copper(), EMT(), short(), tmp_path, progress=False)
    file = tmp_path / name
    content = file.read_bytes()
    file.unlink()
    if damage:
        file.write_bytes(damage(content))
    longer = dataclasses.replace(short(), duration=2 * short().duration)
    with pytest.raises(RunError, match=f"{name}.*{words}"):
        run_md(copper(), EMT(), longer, tmp_path, progress=False)
    file.write_bytes(content)
    run_md(copper(), EMT(), longer, tmp_path, progress=False)


@pytest.mark.parametrize("name", ["trajectory.traj", "log.csv"])
def test_files_of_something_else_are_not_written_over(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(RunError, match="settings.json is gone: .* choose another folder"):
        run_md(copper(), EMT(), short(), tmp_path, progress=False)
    assert (tmp_path / name).read_text() == "mine"


def test_a_run_without_its_state_does_not_start_again(tmp_path):
    run_md(copper(), EMT(), short(), tmp_path, progress=False)
    for state in tmp_path.glob("state*.npz"):
        state.unlink()
    with pytest.raises(RunError, match="state.npz is gone"):
        run_md(copper(), EMT(), short(), tmp_path, progress=False)
    (tmp_path / "log.csv").write_text("step\n0\n")  # as if killed before the first state
    run_md(copper(), EMT(), short(), tmp_path, progress=False)


def test_a_damaged_state_falls_back_on_the_one_before(tmp_path):
    longer = dataclasses.replace(short(), duration=2 * short().duration)
    run_md(copper(), EMT(), longer, tmp_path / "whole", progress=False)
    run_md(copper(), EMT(), short(), tmp_path / "run", progress=False)
    file = tmp_path / "run" / "state.npz"
    content = bytearray(file.read_bytes())
    content[content.index(b"positions.npy") + 200] ^= 1
    file.write_bytes(content)
    with pytest.warns(UserWarning, match=r"state.npz is damaged.*the state before it"):
        run_md(copper(), EMT(), longer, tmp_path / "run", progress=False)
    assert frames(tmp_path / "run") == frames(tmp_path / "whole")
    logs = [(tmp_path / name / "log.csv").read_text() for name in ("run", "whole")]
    assert logs[0] == logs[1]
    for name in ("state.npz", "state.before.npz"):
        (tmp_path / "run" / name).write_bytes(b"PK")
    with pytest.raises(RunError, match="none before it is there"):
        run_md(copper(), EMT(), longer, tmp_path / "run", progress=False)
    whole = dict(np.load(tmp_path / "whole" / "state.npz"))
    for change in ({"cell": None}, {"positions": np.zeros((2, 3))}, {"random": "no table"}):
        kept = {name: value for name, value in (whole | change).items() if value is not None}
        np.savez(tmp_path / "whole" / "state.npz", **kept)
        with pytest.raises(RunError, match="whole/state.npz is not the state of this run"):
            run_md(copper(), EMT(), longer, tmp_path / "whole", progress=False)
