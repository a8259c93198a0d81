"""What experiments measure, out of the folders that `allscaip_lite.md.dynamics` writes.

In: runs of water (atoms as O, H, H). Out: radial distribution functions, self-diffusion, energy
drift and temperatures, each with an error bar from block averages. Radial distributions and mean
squared displacements are MDAnalysis' (Michaud-Agrawal et al., J. Comput. Chem. 32, 2319, 2011).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from ase import Atoms, units
from ase.cell import Cell
from ase.data import chemical_symbols
from ase.io.trajectory import Trajectory

from allscaip_lite.errors import RunError
from allscaip_lite.md.dynamics import read_log, read_settings
from allscaip_lite.spcfw import CHARGES, are_waters

if TYPE_CHECKING:
    from MDAnalysis import Universe

YEH_HUMMER = 2.837297  # of a cubic box

# Of liquid water at 298.15 K and 1 bar, and where each is from.
EXPERIMENT = {
    "density_g_cm3": (0.997, "Wagner and Pruss, J. Phys. Chem. Ref. Data 31, 387, 2002"),
    "vaporisation_kJ_mol": (43.99, "Wagner and Pruss, J. Phys. Chem. Ref. Data 31, 387, 2002"),
    "diffusion_1e-9_m2_s": (2.30, "Holz, Heil and Sacco, Phys. Chem. Chem. Phys. 2, 4740, 2000"),
    "dielectric": (78.4, "Fernandez et al., J. Phys. Chem. Ref. Data 26, 1125, 1997"),
    "OO_peak_A": (2.80, "Skinner et al., J. Chem. Phys. 138, 074506, 2013"),
    "OO_height": (2.57, "Skinner et al., J. Chem. Phys. 138, 074506, 2013"),
    "viscosity_mPa_s": (0.890, "Huber et al., J. Phys. Chem. Ref. Data 38, 101, 2009"),
}


class Estimate(NamedTuple):
    """A value and its standard error, in the same unit."""

    value: float
    error: float


class RadialDistribution(NamedTuple):
    """g(r) with its standard errors; r in Å, the middles of bins; all of shape (bins,)."""

    r: np.ndarray
    g: np.ndarray
    error: np.ndarray


# --- Error bars ------------------------------------------------------------------------------


def block_average(series: Sequence[float] | np.ndarray, blocks: int = 5) -> Estimate:
    """Mean of a series in time, its error from the scatter of the means of `blocks` equal blocks.

    The error is right where a block is much longer than `correlation_time`. Values left over at the
    beginning are dropped. Raises RunError for a series shorter than the blocks' number.
    """
    return scatter([part.mean() for part in blocks_of(np.asarray(series, float), blocks)])


def correlation_time(series: Sequence[float] | np.ndarray) -> float:
    """Integrated autocorrelation time of a series, in its steps; ½ of uncorrelated values.

    Summed up to the first lag that is five times the sum so far (Sokal's window).
    """
    values = np.asarray(series, float)
    values = values - values.mean()
    if not values.any():
        return 0.5
    spectrum = np.abs(np.fft.rfft(values, 2 * len(values))) ** 2
    correlation = np.fft.irfft(spectrum)[: len(values)]
    correlation /= correlation[0]
    sums = 0.5 + np.cumsum(correlation[1:])  # sums[i]: up to lag i + 1
    window = np.arange(1, len(values)) >= 5 * sums
    return float(sums[np.argmax(window)] if window.any() else sums[-1])


def blocks_of(series: np.ndarray, blocks: int) -> list[np.ndarray]:
    """A series in equal parts; values left over at the beginning are dropped."""
    length = len(series) // blocks
    if length < 1:
        raise RunError(
            f"{len(series)} values are too few for {blocks} blocks: run longer, or skip less"
        )
    return np.split(series[len(series) - blocks * length :], blocks)


def scatter(means: Sequence[float]) -> Estimate:
    """The mean of values that are independent, and its standard error."""
    values = np.asarray(means, float)
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return Estimate(float(values.mean()), float(error))


def average(series: Sequence[float] | np.ndarray, blocks: int = 5) -> Estimate:
    """Mean of a series, its error the larger of two: from block means, and from the correlation.

    In a run of few correlation times each of the two may by chance come out too small.
    """
    series = np.asarray(series, float)
    by_blocks = block_average(series, blocks)
    steps = max(0.5, correlation_time(series))
    by_correlation = series.std() * np.sqrt(2 * steps / len(series))
    return Estimate(by_blocks.value, float(max(by_blocks.error, by_correlation)))


# --- Runs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run after its equilibration: log (columns of `md.LOG_COLUMNS`), settings, structures.

    universe is MDAnalysis': positions in Å as they moved, never wrapped, time in ps.
    """

    log: dict[str, np.ndarray]
    settings: dict[str, Any]
    universe: Universe

    @property
    def molecules(self) -> int:
        return len(self.universe.residues)


def read_run(folder: str | Path, skip: float = 0.0) -> Run:
    """A folder of `allscaip_lite.md.dynamics` without its first `skip` ps.

    Raises FileNotFoundError where there is no run, RunError where nothing is left.
    """
    settings, log = read_settings(folder), read_log(folder)
    late = log["time_ps"] >= skip - 1e-9
    frames = list(_frames(folder, settings, skip))
    if not frames or not late.any():
        raise RunError(f"{folder} ends before {skip:g} ps: skip less, or prolong the run")
    return Run(
        log={name: column[late] for name, column in log.items()},
        settings=settings,
        universe=make_universe(
            frames[0].numbers,
            np.stack([frame.positions for frame in frames]),
            np.stack([frame.cell.array for frame in frames]) if frames[0].pbc.all() else None,
            settings["save_every"] / 1000,
        ),
    )


def _frames(folder: str | Path, settings: Mapping[str, Any], skip: float) -> Iterator[Atoms]:
    """The structures of a run without its first `skip` ps, waters in whole molecules."""
    with Trajectory(Path(folder) / "trajectory.traj") as trajectory:
        first = int(np.ceil(1000 * skip / settings["save_every"] - 1e-9))
        for index in range(first, len(trajectory)):
            yield make_whole(trajectory[index])


def make_whole(atoms: Atoms) -> Atoms:
    """Waters (atoms as O, H, H) in a periodic box, each hydrogen next to its own oxygen.

    A box that was wrapped has some on its other side. Anything else is returned as it is.
    """
    if not (are_waters(atoms.numbers) and atoms.pbc.all() and atoms.cell.rank == 3):
        return atoms
    whole = atoms.copy()
    positions = atoms.positions.reshape(-1, 3, 3)  # (W, 3 atoms, 3)
    away = (positions - positions[:, :1]) @ np.linalg.inv(atoms.cell.array)
    whole.positions -= (np.rint(away) @ atoms.cell.array).reshape(-1, 3)
    return whole


def make_universe(
    numbers: np.ndarray, positions: np.ndarray, cells: np.ndarray | None, spacing: float
) -> Universe:
    """Structures as an MDAnalysis universe, one residue a water (or an atom of anything else).

    Args:
        numbers: atomic numbers (N,).
        positions: (T, N, 3) Å.
        cells: (T, 3, 3) Å, or None.
        spacing: of the frames in ps.
    """
    import MDAnalysis

    numbers = np.asarray(numbers)
    size = 3 if are_waters(numbers) else 1
    count = len(numbers) // size
    universe = MDAnalysis.Universe.empty(
        len(numbers), count, atom_resindex=np.repeat(np.arange(count), size), trajectory=False
    )
    universe.add_TopologyAttr("names", [chemical_symbols[number] for number in numbers])
    if size == 3:
        oxygens = 3 * np.arange(count)
        bonds = np.concatenate([[(o, o + 1), (o, o + 2)] for o in oxygens]).tolist()
        universe.add_TopologyAttr("charges", np.tile(CHARGES, count))
        universe.add_TopologyAttr("bonds", [tuple(bond) for bond in bonds])
    dimensions = None
    if cells is not None:
        # MDAnalysis knows lengths and angles alone: the first vector along x, the second in xy
        standard = [Cell(cell).standard_form() for cell in cells]
        positions = np.stack([x @ q.T for x, (_, q) in zip(positions, standard, strict=True)])
        dimensions = np.stack([form.cellpar() for form, _ in standard])
    universe.load_new(positions.astype(np.float32), order="fac", dimensions=dimensions, dt=spacing)
    return universe


# --- Thermodynamics --------------------------------------------------------------------------


def energy_drift(run: Run) -> Estimate:
    """Slope of the conserved energy in meV/atom/ps, by a straight line through ten block means."""
    return drift(run.log, len(run.universe.atoms))


def drift(log: Mapping[str, np.ndarray], natoms: int) -> Estimate:
    """`energy_drift` of a log (`md.read_log`)."""
    from scipy.stats import linregress

    times = [part.mean() for part in blocks_of(log["time_ps"], 10)]
    energies = [part.mean() for part in blocks_of(log["conserved_eV"], 10)]
    line = linregress(times, energies)
    factor = 1000 / natoms
    return Estimate(float(line.slope * factor), float(line.stderr * factor))


def temperatures_by_motion(
    folder: str | Path, skip: float = 0.0, blocks: int = 5
) -> tuple[Estimate, Estimate]:
    """Temperatures in K of the molecules' centres, and of relative motion along the O-H bonds.

    By equipartition both are the run's own. Stiff bonds trade energy with the liquid over tens of
    ps: a chain of Nosé and Hoover, which sees the sum alone, leaves them as cold as a minimised
    start made them, and the rest too hot. Langevin's noise (`thermostat="langevin"`) removes that;
    its velocities along a bond come out colder than the structure by (ω Δt)²/4, an eighth at 1 fs.

    The first `skip` ps are left out; errors are from the scatter of `blocks`. Raises RunError for a
    run of something else than waters, or one that is too short.
    """
    centres, bonds = [], []
    for frame in _frames(folder, read_settings(folder), skip):
        if not are_waters(frame.numbers):
            raise RunError(f"{folder} is no run of waters, atoms as O, H, H")
        mass = frame.get_masses()[:3]
        velocities = frame.get_velocities()
        velocities -= frame.get_momenta().sum(0) / frame.get_masses().sum()
        velocities = velocities.reshape(-1, 3, 3)  # (W, 3 atoms, 3)
        whole = np.einsum("a,wax->wx", mass, velocities) / mass.sum()
        freedom = max(1, 3 * len(whole) - 3)  # the centre of all is taken as at rest
        centres.append(mass.sum() * (whole**2).sum() / freedom / units.kB)
        positions = frame.positions.reshape(-1, 3, 3)
        arms = positions[:, 1:] - positions[:, :1]  # (W, 2, 3); molecules are whole
        arms /= np.linalg.norm(arms, axis=2, keepdims=True)
        speed = ((velocities[:, 1:] - velocities[:, :1]) * arms).sum(2)
        bonds.append(mass[0] * mass[1] / (mass[0] + mass[1]) * (speed**2).mean() / units.kB)
    return block_average(centres, blocks), block_average(bonds, blocks)


# --- Structure -------------------------------------------------------------------------------


def radial_distribution(
    universe: Universe,
    first: str = "O",
    second: str = "O",
    reach: float | None = None,
    width: float = 0.05,
    blocks: int = 5,
) -> RadialDistribution:
    """g(r) between atoms of two elements in different molecules.

    Args:
        universe: the run, see `make_universe`.
        first: one element.
        second: the other, or the same.
        reach: up to where, in Å; by default, and at most, half the narrowest width of the box,
            beyond which not every pair is seen.
        width: of a bin, in Å.
        blocks: of the run, from whose scatter the errors are.

    Raises:
        RunError: for a run without such pairs or without a box, and for a reach that is too long.
    """
    frames = blocks_of(np.arange(len(universe.trajectory)), blocks)
    r, parts = radial_histograms(universe, first, second, reach, width, frames)
    error = np.std(parts, axis=0, ddof=1) / np.sqrt(blocks) if blocks > 1 else np.nan * parts[0]
    return RadialDistribution(r, np.mean(parts, axis=0), error)


def radial_histograms(
    universe: Universe,
    first: str,
    second: str,
    reach: float | None,
    width: float,
    parts: Iterable[np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """r (bins,) and g (parts, bins), each part the structures of these numbers together."""
    from MDAnalysis.analysis.rdf import InterRDF

    groups = [universe.select_atoms(f"name {element}") for element in (first, second)]
    if not all(len(group) for group in groups):
        raise RunError(f"no pairs {first}-{second} in this run")
    if universe.trajectory.ts.dimensions is None:
        raise RunError("a radial distribution needs a periodic box")
    widest = min(_half_width(frame.triclinic_dimensions) for frame in universe.trajectory)
    reach = widest if reach is None else reach
    if reach > widest:
        raise RunError(f"reach {reach:g} Å is beyond half the box: {widest:.2f} Å at most")
    exclusion = tuple(len(group) // len(universe.residues) for group in groups)
    bins = max(1, int(reach / width))
    found = []
    for part in parts:
        pairs = InterRDF(
            *groups, nbins=bins, range=(0.0, bins * width), exclusion_block=exclusion
        ).run(frames=part)
        found.append(pairs.results.rdf)
    return pairs.results.bins, np.array(found)


def _half_width(cell: np.ndarray) -> float:
    return float(0.5 / np.linalg.norm(np.linalg.inv(cell), axis=0).max())


# --- Motion ----------------------------------------------------------------------------------


def mean_squared_displacement(
    universe: Universe, frames: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Lags in ps and mean squared displacements of oxygens in Å², over all origins in time.

    The drift of all atoms together is taken away first. `frames` are indices of the structures that
    are used, evenly spaced; by default all.
    """
    import MDAnalysis
    from MDAnalysis.analysis.msd import EinsteinMSD

    frames = np.arange(len(universe.trajectory)) if frames is None else frames
    group = universe.select_atoms("name O")
    everything = universe.trajectory.timeseries(order="fac")[frames]  # (T, N, 3)
    positions = everything[:, group.indices] - everything.mean(axis=1, keepdims=True)
    still = MDAnalysis.Universe.empty(len(group), trajectory=False)
    still.load_new(positions.astype(np.float32), order="fac", dt=universe.trajectory.dt)
    result = EinsteinMSD(still, fft=False).run().results
    return np.arange(len(frames)) * universe.trajectory.dt, result.timeseries


def self_diffusion(
    universe: Universe, window: tuple[float, float] = (2.0, 10.0), blocks: int = 5
) -> Estimate:
    """Self-diffusion coefficient of oxygens in 1e-9 m²/s, a sixth of the slope of the displacement.

    Take NVE or NVT runs: a barostat rescales paths. Langevin's friction slows molecules down: with
    a time constant of 1 ps those of water by 2 %, of 0.1 ps by 15 %. See `size_correction`.

    The line is fitted over lags in `window` (ps), past the ballistic start. The error is from the
    scatter of blocks, each one and a half times as long as the longest lag at least; else RunError.
    """
    values = []
    for part in blocks_of(np.arange(len(universe.trajectory)), blocks):
        length = (len(part) - 1) * universe.trajectory.dt
        if length < 1.5 * window[1]:
            raise RunError(
                f"a block of {length:g} ps is too short for lags up to {window[1]:g} ps: run "
                "longer, or take fewer blocks or an earlier window"
            )
        lags, squares = mean_squared_displacement(universe, part)
        inside = (lags >= window[0]) & (lags <= window[1])
        values.append(np.polyfit(lags[inside], squares[inside], 1)[0] / 6)
    return scatter([10 * value for value in values])  # 1 Å²/ps = 1e-8 m²/s


def size_correction(temperature: float, edge: float, viscosity: float) -> float:
    """What a cubic periodic box takes from the diffusion coefficient, in 1e-9 m²/s.

    2.837 kT / (6πηL) (Yeh and Hummer, J. Phys. Chem. B 108, 15873, 2004), to be added to the result
    of `self_diffusion`; T in K, the edge L in Å, the liquid's viscosity η in mPa s.
    """
    boltzmann = 1.380649e-23  # J/K
    correction = YEH_HUMMER * boltzmann * temperature
    correction /= 6 * np.pi * viscosity * 1e-3 * edge * 1e-10
    return correction * 1e9
