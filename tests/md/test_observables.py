"""Observables of systems whose answer is known, and error bars that say how far they are off."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from ase import units
from ase.io.trajectory import Trajectory

pytest.importorskip("MDAnalysis")

from allscaip_lite.errors import RunError
from allscaip_lite.md.dynamics import Settings, run_md
from allscaip_lite.md.observables import (
    Estimate,
    RadialDistribution,
    Run,
    block_average,
    correlation_time,
    energy_drift,
    make_universe,
    mean_squared_displacement,
    radial_distribution,
    read_run,
    self_diffusion,
    size_correction,
    temperatures_by_motion,
)
from allscaip_lite.spcfw import SPCFw
from data.water.boxes import molecules, water_box
from docs.studies.water.run import (
    closest_contact,
    dielectric_constant,
    first_peak,
    heat_of_vaporization,
    pairs_by_structure,
    per_mole,
    rdf_at_first_peak,
    reweighted_difference,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def cubes(edge: float, frames: int) -> np.ndarray:
    return np.broadcast_to(np.eye(3) * edge, (frames, 3, 3))


# --- error bars ---------------------------------------------------------------------------------


def correlated(length: int, memory: float, seed: int) -> np.ndarray:
    """An autoregressive series of variance 1 whose correlation falls as memory^lag."""
    noise = np.random.default_rng(seed).normal(size=length) * np.sqrt(1 - memory**2)
    series = np.zeros(length)
    series[0] = noise[0] / np.sqrt(1 - memory**2)
    for step in range(1, length):
        series[step] = memory * series[step - 1] + noise[step]
    return series


def test_the_correlation_time_of_an_autoregressive_series_is_known():
    # ½ + Σ a^k = ½ + a / (1 - a)
    assert correlation_time(correlated(200_000, 0.9, 0)) == pytest.approx(9.5, rel=0.08)
    assert correlation_time(correlated(100_000, 0.0, 0)) == pytest.approx(0.5, abs=0.03)
    assert correlation_time(np.ones(100)) == 0.5


def test_block_errors_are_as_large_as_the_scatter_of_repeated_runs():
    runs = [block_average(correlated(5000, 0.9, seed), blocks=10) for seed in range(60)]
    scatter = np.std([run.value for run in runs])
    assert scatter == pytest.approx(np.sqrt(2 * 9.5 / 5000), rel=0.25)
    assert np.sqrt(np.mean([run.error**2 for run in runs])) == pytest.approx(scatter, rel=0.25)


def test_single_values_as_blocks_would_make_the_error_too_small():
    naive = block_average(correlated(5000, 0.9, 1), blocks=5000).error
    honest = block_average(correlated(5000, 0.9, 1), blocks=10).error
    assert naive < honest / 2


def test_the_mean_of_blocks_is_exact_where_they_fill_the_series():
    assert block_average(np.arange(10.0), blocks=5).value == 4.5
    assert block_average(np.arange(11.0), blocks=5).value == 5.5  # without the oldest value
    with pytest.raises(RunError, match="too few for 5 blocks"):
        block_average([1.0, 2.0])


def test_a_mean_less_the_reweighted_one_of_normal_values_is_known():
    """Weights exp(a x) move the mean of a normal distribution by a times its variance."""
    temperature, kT = 300.0, units.kB * 300.0
    off = []
    for seed in range(40):
        series = 0.97 + 0.04 * correlated(2000, 0.9, seed)
        noise = np.random.default_rng(100 + seed).normal(size=2000)  # of no consequence
        excess = kT * (7.0 * (series - 0.97) + 0.5 * noise + 3.0)
        found = reweighted_difference(series, excess, temperature)
        off.append((found.value + 7.0 * 0.04**2) / found.error)
        assert found.error < 0.5 * 0.04 * np.sqrt(19 / 2000)  # what two means of their own have
    assert abs(np.mean(off)) < 0.6 and 0.7 < np.std(off) < 1.8
    constant = reweighted_difference(series, np.ones(2000), temperature)
    assert constant == pytest.approx((0, 0), abs=1e-12)
    lower = reweighted_difference(series, excess, temperature, reference=series - 5)
    assert lower == pytest.approx((found.value + 5, found.error))


def test_too_few_values_or_too_different_models_are_not_reweighted():
    series = np.random.default_rng(0).normal(size=200)
    with pytest.raises(RunError, match="too far from one another"):
        reweighted_difference(series, 0.3 * series, 300.0)
    with pytest.raises(RunError, match="too few for 10 blocks"):
        reweighted_difference(series[:9], np.zeros(9), 300.0)


# --- structure ----------------------------------------------------------------------------------


def ideal_gas(atoms: int, edge: float, frames: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(0, edge, (frames, atoms, 3))


def test_an_ideal_gas_has_no_structure():
    universe = make_universe([18] * 100, ideal_gas(100, 20.0, 300), cubes(20.0, 300), 1.0)
    pairs = radial_distribution(universe, "Ar", "Ar", width=0.5)
    assert pairs.r[0] == pytest.approx(0.25) and pairs.r[-1] == pytest.approx(9.75)
    assert pairs.g[3:] == pytest.approx(np.ones(17), abs=0.05)
    deviations = (pairs.g - 1)[3:] / pairs.error[3:]
    assert 0.5 < np.sqrt(np.mean(deviations**2)) < 2.5  # of Student's t with five blocks


def test_an_ideal_gas_in_a_skewed_turned_cell_has_none_either():
    rng = np.random.default_rng(1)
    cell = np.array([[14.0, 3.0, -2.0], [-4.0, 13.0, 2.0], [1.0, -3.0, 15.0]])
    positions = rng.uniform(-1, 2, (300, 80, 3)) @ cell
    universe = make_universe([18] * 80, positions, np.broadcast_to(cell, (300, 3, 3)), 1.0)
    pairs = radial_distribution(universe, "Ar", "Ar", width=0.5)
    assert pairs.g[3:] == pytest.approx(np.ones(len(pairs.g) - 3), abs=0.08)


def test_pairs_inside_a_molecule_do_not_count():
    rng = np.random.default_rng(0)
    waters, edge, frames = 40, 20.0, 200
    placed = np.stack([molecules(rng, waters) for _ in range(frames)])
    placed = placed + rng.uniform(0, edge, (frames, waters, 1, 3))
    universe = make_universe(
        [8, 1, 1] * waters, placed.reshape(frames, -1, 3), cubes(edge, frames), 1
    )
    for first, second in ("OO", "OH", "HH"):
        pairs = radial_distribution(universe, first, second, width=0.5)
        assert pairs.g[2:] == pytest.approx(np.ones(len(pairs.g) - 2), abs=0.15)
        assert pairs.g[:4] == pytest.approx(np.ones(4), abs=0.8)  # where the bonds would be


def test_a_perfect_lattice_has_its_shells():
    edge, per_edge = 3.0, 6
    grid = np.stack(np.meshgrid(*[np.arange(per_edge)] * 3, indexing="ij"), axis=-1)
    positions = np.tile(grid.reshape(1, -1, 3) * edge, (5, 1, 1))
    universe = make_universe([8] * 216, positions, cubes(edge * per_edge, 5), 1.0)
    pairs = radial_distribution(universe, width=0.1)
    shells = pairs.g * 4 / 3 * np.pi * ((pairs.r + 0.05) ** 3 - (pairs.r - 0.05) ** 3) * 215 / 18**3
    for distance, number in ((3.0, 6), (3 * 2**0.5, 12), (3 * 3**0.5, 8), (6.0, 6), (5.6, 0)):
        near = abs(pairs.r - distance) < 0.16
        assert shells[near].sum() == pytest.approx(number, rel=1e-6)
    assert pairs.error == pytest.approx(np.zeros(len(pairs.r)), abs=1e-9)


def test_the_closest_contact_is_between_molecules_and_across_the_boundary():
    rng = np.random.default_rng(0)
    one, two = molecules(rng, 2)
    two = two - two[1]  # its first hydrogen at the origin
    gap = np.array([0.0, 0.0, 0.7])
    edge = 15.0
    placed = np.stack([one, two + one[2] + gap + [edge, 0, 0]]).reshape(1, 6, 3)
    universe = make_universe([8, 1, 1, 8, 1, 1], np.repeat(placed, 5, 0), cubes(edge, 5), 1.0)
    within = np.linalg.norm(one[1] - one[2])
    across = [placed[0, i] - placed[0, j] for i in (1, 2) for j in (4, 5)]
    shortest = min(np.linalg.norm(d - edge * np.rint(d / edge)) for d in across)
    found = closest_contact(universe)
    assert found.value == pytest.approx(shortest, abs=1e-5) and found.value < 0.701 < within
    with pytest.raises(RunError, match="no O-O pair"):
        far = make_universe(
            [8, 1, 1, 8, 1, 1],
            np.repeat(placed + [[[0, 0, 0]] * 3 + [[0, 0, 7]] * 3], 5, 0),
            cubes(20.0, 5),
            1.0,
        )
        closest_contact(far, "O")


def test_the_reach_ends_at_half_the_box():
    universe = make_universe([18] * 20, ideal_gas(20, 9.0, 5), cubes(9.0, 5), 1.0)
    assert radial_distribution(universe, "Ar", "Ar").r[-1] < 4.5
    with pytest.raises(RunError, match="beyond half the box"):
        radial_distribution(universe, "Ar", "Ar", reach=5.0)
    with pytest.raises(RunError, match="no pairs O-O"):
        radial_distribution(universe)
    vacuum = make_universe([18] * 20, ideal_gas(20, 9.0, 5), None, 1.0)
    with pytest.raises(RunError, match="periodic"):
        radial_distribution(vacuum, "Ar", "Ar")


def test_the_first_peak_is_found_between_bins():
    r = np.arange(0.025, 6, 0.05)
    error = np.full_like(r, 0.02)

    def curve(distance):
        return 2 * np.exp(-(((distance - 2.776) / 0.3) ** 2)) + 2.5 * np.exp(
            -(((distance - 4.5) / 0.5) ** 2)
        )

    position, height = first_peak(RadialDistribution(r, curve(r), error))
    assert position.value == pytest.approx(2.776, abs=1e-3)
    assert height.value == pytest.approx(2.0, abs=0.01) and height.error == 0.02
    # the position's error is what noise in the bins does to it
    rng = np.random.default_rng(0)
    noisy = []
    for _ in range(300):
        shaken = curve(r) + 0.003 * rng.normal(size=len(r))
        noisy.append(first_peak(RadialDistribution(r, shaken, error))[0].value)
    small = first_peak(RadialDistribution(r, curve(r), 0.003 * np.ones_like(r)))[0]
    assert np.std(noisy) == pytest.approx(small.error, rel=0.3)
    with pytest.raises(RunError, match="no peak"):
        first_peak(RadialDistribution(r, np.ones_like(r), error))


def test_structures_by_themselves_add_up_to_the_whole_run():
    positions = ideal_gas(40, 10.0, 30)
    positions[:, 20:] = positions[:, :20] + [2.1, 0, 0]  # pairs that stay together
    universe = make_universe([18] * 40, positions, cubes(10.0, 30), 0.1)
    whole = radial_distribution(universe, "Ar", "Ar", width=0.2)
    r, g = pairs_by_structure(universe, "Ar", "Ar", width=0.2)
    assert r == pytest.approx(whole.r) and g.mean(0) == pytest.approx(whole.g)
    heights = rdf_at_first_peak(g)
    assert heights.shape == (30,)
    assert heights.mean() == pytest.approx(first_peak(whole)[1].value)


# --- motion -------------------------------------------------------------------------------------


def walk(frames: int, atoms: int, diffusion: float, spacing: float, seed: int = 0) -> np.ndarray:
    """A random walk with a diffusion coefficient in Å²/ps, frames `spacing` ps apart."""
    steps = np.random.default_rng(seed).normal(size=(frames, atoms, 3))
    return np.cumsum(steps * np.sqrt(2 * diffusion * spacing), axis=0)


def test_a_random_walk_has_its_diffusion_coefficient():
    universe = make_universe([8] * 60, walk(1500, 60, 0.23, 0.1), None, 0.1)
    found = self_diffusion(universe, window=(1.0, 5.0))
    # 1 Å²/ps = 10 × 1e-9 m²/s; taking away the drift takes a 60th
    assert abs(found.value - 2.3 * 59 / 60) < 4 * found.error
    assert found.error < 0.15


def test_a_common_drift_is_no_diffusion():
    moving = walk(400, 40, 0.2, 0.1)
    drift = np.arange(400)[:, None, None] * np.array([0.3, -0.2, 0.1])
    still = self_diffusion(make_universe([8] * 40, moving, None, 0.1), window=(1, 4))
    pushed = self_diffusion(make_universe([8] * 40, moving + drift, None, 0.1), window=(1, 4))
    assert pushed.value == pytest.approx(still.value, rel=1e-3)


def test_atoms_that_fly_straight_are_displaced_by_the_square_of_time():
    velocities = np.random.default_rng(0).normal(size=(1, 50, 3))
    velocities -= velocities.mean(1, keepdims=True)
    positions = np.arange(100)[:, None, None] * 0.1 * velocities
    lags, squares = mean_squared_displacement(make_universe([8] * 50, positions, None, 0.1))
    expected = (velocities**2).sum(2).mean() * lags**2
    assert squares == pytest.approx(expected, rel=1e-4)


def test_too_short_a_run_for_the_window_is_refused():
    universe = make_universe([8] * 10, walk(200, 10, 0.2, 0.1), None, 0.1)
    with pytest.raises(RunError, match="too short for lags up to 10 ps"):
        self_diffusion(universe)


def test_the_size_correction_is_yeh_and_hummer_s():
    # water at 298.15 K, 0.89 mPa s, a box of 20 Å: 2.837297 kT / (6 π η L)
    expected = 2.837297 * 1.380649e-23 * 298.15 / (6 * np.pi * 0.89e-3 * 20e-10) / 1e-9
    assert size_correction(298.15, 20.0, 0.89) == pytest.approx(expected)
    assert expected == pytest.approx(0.348, abs=0.001)
    assert size_correction(298.15, 40.0, 0.89) == pytest.approx(expected / 2)


# --- energies -----------------------------------------------------------------------------------


def test_the_heat_of_vaporisation_is_its_definition():
    kilojoule = units.kJ / units.mol
    rt = 8.314462618e-3 * 298.15
    liquid = per_mole(Estimate(-42.0 * kilojoule, 0.3 * kilojoule))
    strained = heat_of_vaporization(liquid, Estimate(1.5 * rt, 0.4), 298.15)
    rigid = heat_of_vaporization(liquid, Estimate(0.0, 0.0), 298.15)
    assert rigid.value == pytest.approx(42 + rt, rel=1e-6)
    assert strained.value - rigid.value == pytest.approx(3.718, abs=1e-3)
    assert (rigid.error, strained.error) == pytest.approx((0.3, 0.5))


def run_of(log: dict, universe=None, **settings) -> Run:
    columns = {name: np.asarray(values, float) for name, values in log.items()}
    return Run(columns, {"ensemble": "nve", "temperature": 300.0, **settings}, universe)


def test_a_known_drift_is_found():
    times = np.arange(0, 10, 0.01)
    noise = np.random.default_rng(0).normal(size=1000) * 1e-3
    universe = make_universe([8] * 20, np.zeros((2, 20, 3)), None, 1.0)
    energies = 5.0 + 20 * 0.3e-3 * times + noise  # 0.3 meV/atom/ps
    found = energy_drift(run_of({"time_ps": times, "conserved_eV": energies}, universe))
    assert found.value == pytest.approx(0.3, abs=3 * found.error)
    assert 0 < found.error < 0.01


def test_free_dipoles_have_the_dielectric_constant_of_their_density():
    """Molecules that turn at random do not know of each other: ε = 1 + 4π n μ² / (3 k T)."""
    rng = np.random.default_rng(0)
    waters, frames, edge = 20, 4000, 20.0
    placed = np.stack([molecules(rng, waters) for _ in range(frames)])
    placed = placed + rng.uniform(0, edge, (1, waters, 1, 3))
    dipole = np.einsum("a,fwac->fwc", [-0.82, 0.41, 0.41], placed)
    moment = np.linalg.norm(dipole[0, 0])
    assert moment == pytest.approx(2 * 0.41 * 1.012 * np.cos(np.deg2rad(113.24 / 2)))
    universe = make_universe(
        [8, 1, 1] * waters, placed.reshape(frames, -1, 3), cubes(edge, frames), 1.0
    )
    found = dielectric_constant(run_of({}, universe))
    strength = waters * moment**2 * units.Hartree * units.Bohr / (edge**3 * units.kB * 300)
    assert found.value - 1 == pytest.approx(4 * np.pi / 3 * strength, rel=0.05)
    assert abs(found.value - 1 - 4 * np.pi / 3 * strength) < 4 * found.error


# --- runs ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A short run of the teacher at constant volume."""
    root = tmp_path_factory.mktemp("runs")
    box = water_box(8, 0.9, seed=1)
    settings = Settings(duration=400.0, timestep=1.0, save_every=5.0, log_every=5.0, relax=50)
    run_md(box, SPCFw(), settings, root / "nvt", progress=False)
    return root


def test_a_run_is_read_without_its_beginning(folders):
    whole, late = read_run(folders / "nvt"), read_run(folders / "nvt", skip=0.1)
    assert len(whole.log["step"]) == 81 and len(whole.universe.trajectory) == 81
    assert len(late.log["step"]) == 61 and len(late.universe.trajectory) == 61
    assert late.log["time_ps"][0] == pytest.approx(0.1)
    assert late.molecules == 8
    with pytest.raises(RunError, match="ends before 9 ps"):
        read_run(folders / "nvt", skip=9)
    with pytest.raises(FileNotFoundError):
        read_run(folders / "absent")


def test_a_wrapped_box_is_the_same_liquid(folders, tmp_path):
    """Hydrogens on the other side of the box are brought back to their oxygens."""
    shutil.copytree(folders / "nvt", tmp_path / "wrapped")
    with Trajectory(folders / "nvt" / "trajectory.traj") as trajectory:
        frames = [*trajectory]
    with Trajectory(tmp_path / "wrapped" / "trajectory.traj", "w") as trajectory:
        broken = np.floor(frames[0].get_scaled_positions(wrap=False)) @ frames[0].cell.array
        assert np.any(broken[1::3] != broken[::3])
        for frame in frames:
            frame.positions -= broken
            trajectory.write(frame)
    whole, wrapped = (
        (dielectric_constant(read_run(folder)).value, temperatures_by_motion(folder)[1].value)
        for folder in (folders / "nvt", tmp_path / "wrapped")
    )
    assert wrapped == pytest.approx(whole, rel=1e-4)


def test_chains_leave_the_bonds_of_a_relaxed_start_cold_and_noise_does_not(tmp_path):
    """Half of what bonds get as motion goes into stretching them, and little comes back."""
    box = water_box(8, 0.9, seed=1)
    found = {}
    for thermostat in ("nose-hoover", "langevin"):
        settings = Settings(
            thermostat=thermostat, duration=1500.0, timestep=1.0, save_every=5.0, relax=100
        )
        run_md(box, SPCFw(), settings, tmp_path / thermostat, progress=False)
        found[thermostat] = temperatures_by_motion(tmp_path / thermostat, skip=0.5)
    centres, bonds = found["nose-hoover"]
    assert bonds.value < 0.6 * centres.value
    centres, bonds = found["langevin"]
    assert abs(bonds.value - centres.value) < 4 * np.hypot(bonds.error, centres.error) + 15
    assert bonds.value == pytest.approx(300, abs=75)


def test_temperatures_by_motion_are_those_of_known_velocities(tmp_path):
    """Velocities drawn at 400 K, and the same without any motion inside the molecules."""
    box = water_box(64, 1.0, seed=0)
    mass = box.get_masses()[:, None]
    rng = np.random.default_rng(0)
    drawn = rng.normal(size=(len(box), 3)) * np.sqrt(mass * units.kB * 400)
    drawn -= mass * drawn.sum(0) / mass.sum()
    settings = Settings(ensemble="nve", temperature=None, duration=1.0, save_every=1.0, log_every=1)
    for name, momenta in (
        ("all", drawn),
        ("rigid", mass * np.repeat(drawn.reshape(-1, 3, 3).sum(1) / mass[:3].sum(), 3, axis=0)),
    ):
        start = box.copy()
        start.set_momenta(momenta)
        run_md(start, SPCFw(), settings, tmp_path / name, progress=False)
        with Trajectory(tmp_path / name / "trajectory.traj", "r") as frames:
            first = frames[0]
        with Trajectory(tmp_path / name / "trajectory.traj", "w") as frames:
            frames.write(first)  # as drawn
        centres, bonds = temperatures_by_motion(tmp_path / name, blocks=1)
        assert centres.value == pytest.approx(400, rel=0.25)
        assert bonds.value == pytest.approx(400 if name == "all" else 0, rel=0.25, abs=1e-9)
