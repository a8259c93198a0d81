"""Whether molecules hold together in dynamics, and keep their energy when they are rotated.

In: a model, and a data set from which molecules are chosen, of sizes spread evenly. Each is relaxed
and equilibrated with the model, and then moves at constant energy. Out: whether a bond broke or
formed, the drift of the energy, which is near zero for conservative forces, and how much the energy
of a structure changes with its orientation: the model learns invariance under rotation, it is not
built in.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from threading import Condition
from typing import Any, TypeVar

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.data import covalent_radii
from ase.io.trajectory import Trajectory
from scipy.sparse.csgraph import connected_components
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from allscaip_lite.calculator import AllScAIPCalculator
from allscaip_lite.cli import run_script
from allscaip_lite.data.aselmdb import Dataset
from allscaip_lite.errors import InputError
from allscaip_lite.files import locked, store_text
from allscaip_lite.kernels import add_kernels_option
from allscaip_lite.labels.queue import end_with_parent
from allscaip_lite.machine import THREADS_OF_USER, processor_name
from allscaip_lite.md.dynamics import Explosion, Settings, read_log, run_md
from allscaip_lite.md.observables import drift
from allscaip_lite.model import AllScAIP, Result
from allscaip_lite.tables import markdown_table

BONDED = 1.25  # closer than this times the sum of covalent radii at the start: a bond
BROKEN = 1.5  # a bond longer than this times its first length: far beyond vibrations at 300 K
FORMED = 0.9  # a pair closer than this times the sum of covalent radii: a new bond


@dataclass(frozen=True)
class Trial:
    """What is done with each molecule. Times in fs, temperature in K, sizes in atoms."""

    molecules: int = 10
    smallest: int = 9
    largest: int = 40
    temperature: float = 300.0
    timestep: float = 0.5
    warming: float = 1_000.0
    duration: float = 20_000.0
    rotations: int = 32
    seed: int = 0

    def equilibration(self) -> Settings:
        """From a minimum of the model's energy, with a thermostat that acts on every atom."""
        return Settings(
            ensemble="nvt",
            thermostat="langevin",
            thermostat_time=100.0,
            duration=self.warming,
            temperature=self.temperature,
            timestep=self.timestep,
            relax=200,
            seed=self.seed,
        )

    def production(self) -> Settings:
        """At constant energy."""
        return replace(self.equilibration(), ensemble="nve", duration=self.duration, relax=0)


# --- Runs side by side -----------------------------------------------------------------------
# Each runs in a thread of its own and, wherever it asks for forces, waits until all others ask too;
# then the model is called once, for all. A small molecule leaves most of a GPU idle, and some of a
# CPU.

Outcome = TypeVar("Outcome")


def side_by_side(
    calculator: AllScAIPCalculator,
    works: Sequence[Callable[[Calculator], Outcome]],
    tick: Callable[[int], None] = lambda runs: None,
) -> list[Outcome]:
    """Call all functions at once, each with a calculator of its own.

    A structure that the model has no answer for, such as atoms on one spot, is an error in its own
    run alone. An error that a run does not catch, and Ctrl-C, stop the others by a `CancelledError`
    where they next ask for forces, and are raised here.

    Args:
        calculator: whose model gives all answers.
        works: the functions.
        tick: called after each call of the model with the number of runs that it answered.

    Returns:
        What the functions returned, in order.
    """
    requests = _Requests(len(works))

    def go(number: int) -> Outcome:
        try:
            return works[number](_OneOfSeveral(calculator, requests, number))
        except BaseException:
            requests.failed = True
            raise
        finally:
            requests.leave(number)

    with ThreadPoolExecutor(max(1, len(works))) as pool:
        futures = [pool.submit(go, number) for number in range(len(works))]
        try:
            while batch := requests.next_batch():
                requests.answer(_answers(calculator, batch))
                tick(len(batch))
        finally:
            requests.stop()
    errors = [error for future in futures if (error := future.exception())]
    for error in sorted(errors, key=lambda error: isinstance(error, CancelledError)):
        raise error
    return [future.result() for future in futures]


Answer = Result | Exception


def _answers(calculator: AllScAIPCalculator, batch: dict[int, Atoms]) -> dict[int, Answer]:
    try:
        results = calculator.model.predict(
            list(batch.values()), calculator.recorded, calculator.outside_training
        )
        return dict(zip(batch, results, strict=True))
    except ValueError as error:  # one of the structures has no answer: find out which
        if len(batch) == 1:
            return dict.fromkeys(batch, error)
        answers: dict[int, Answer] = {}
        for number, atoms in batch.items():
            answers |= _answers(calculator, {number: atoms})
        return answers


class _Requests:
    """Structures that the runs' threads wait for the answers of."""

    def __init__(self, runs: int) -> None:
        self.running = set(range(runs))
        self.waiting: dict[int, Atoms] = {}
        self.answers: dict[int, Answer] = {}
        self.failed = self.stopped = False
        self.changed = Condition()

    def wait_for_answer(self, number: int, atoms: Atoms) -> Result:
        """Of run `number`: hand in a structure and wait for the result."""
        with self.changed:
            self.waiting[number] = atoms
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.stopped or number in self.answers)
            if self.stopped:
                raise CancelledError("another run failed, or the user pressed Ctrl-C")
            answer = self.answers.pop(number)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def leave(self, number: int) -> None:
        """Of run `number`: it has ended."""
        with self.changed:
            self.running.discard(number)
            self.changed.notify_all()

    def next_batch(self) -> dict[int, Atoms]:
        """The structures of all runs, once each that has not ended waits; none if one failed."""
        with self.changed:
            self.changed.wait_for(lambda: self.failed or self.waiting.keys() == self.running)
            if self.failed:
                return {}
            batch = {number: self.waiting[number] for number in sorted(self.waiting)}
            self.waiting.clear()
        return batch

    def answer(self, answers: dict[int, Answer]) -> None:
        """Hand the answers to the runs, by their numbers."""
        with self.changed:
            self.answers |= answers
            self.changed.notify_all()

    def stop(self) -> None:
        """Raise `CancelledError` in every run that waits or will."""
        with self.changed:
            self.stopped = True
            self.changed.notify_all()


class _OneOfSeveral(AllScAIPCalculator):
    """The calculator of one run, whose structures go to the model with those of the others."""

    def __init__(self, calculator: AllScAIPCalculator, requests: _Requests, number: int) -> None:
        Calculator.__init__(self)
        self.model, self.recorded = calculator.model, calculator.recorded
        self.outside_training = calculator.outside_training
        self.requests, self.number = requests, number

    def answer(self, atoms: Atoms) -> Result:
        """What the model gives, in one call with the structures of the other runs."""
        return self.requests.wait_for_answer(self.number, atoms)


# --- Molecules -------------------------------------------------------------------------------


def choose(data: Dataset, trial: Trial) -> list[Atoms]:
    """Single molecules without unpaired electrons, of sizes spread evenly over the range.

    A structure counts as one molecule if bonds connect all of its atoms, and if its SMILES, where
    `info["molecule"]` has one, has one part. Raises `InputError` where there are too few.
    """
    sizes: dict[str, tuple[int, int]] = {}  # of each formula, the first structure: atoms, index
    for index in np.random.default_rng(trial.seed).permutation(len(data)):
        atoms = data[int(index)]
        fits = trial.smallest <= len(atoms) <= trial.largest and atoms.info.get("spin", 1) == 1
        if fits and not atoms.pbc.any() and _single(atoms):
            sizes.setdefault(atoms.get_chemical_formula(), (len(atoms), int(index)))
    if len(sizes) < trial.molecules:
        raise InputError(
            f"the data have {len(sizes)} molecules of {trial.smallest} to {trial.largest} atoms, "
            f"and {trial.molecules} are asked for: give other data, or ask for fewer (--molecules)"
        )
    left = list(sizes.values())
    chosen = []
    for size in np.linspace(trial.smallest, trial.largest, trial.molecules):
        nearest = min(left, key=lambda entry: abs(entry[0] - size))
        left.remove(nearest)
        chosen.append(data[nearest[1]])
    return chosen


def _reach(atoms: Atoms) -> np.ndarray:
    """Sums of covalent radii (N, N) in Å; infinite on the diagonal, where there is no pair."""
    radii = covalent_radii[atoms.numbers]
    reach = radii[:, None] + radii
    np.fill_diagonal(reach, np.inf)
    return reach


def bonds(atoms: Atoms) -> np.ndarray:
    """Which pairs are bonded, (N, N), by distance."""
    found = atoms.get_all_distances() < BONDED * _reach(atoms)
    np.fill_diagonal(found, False)
    return found


def _single(atoms: Atoms) -> bool:
    named = "." not in str(atoms.info.get("molecule", ""))
    return named and connected_components(bonds(atoms))[0] == 1


def changed_bond(start: Atoms, frame: Atoms) -> str | None:
    """The first bond of `start` that is broken in `frame`, or the first new one; else None."""
    before, after, bonded = start.get_all_distances(), frame.get_all_distances(), bonds(start)
    for what, wrong in (
        ("broken", bonded & (after > BROKEN * before)),
        ("formed", ~bonded & (after < FORMED * _reach(start)) & (before > 0)),
    ):
        pairs = np.argwhere(np.triu(wrong))
        if len(pairs):
            i, j = (int(index) for index in pairs[0])
            one, other = start.symbols[i], start.symbols[j]
            return f"bond {what}: {one}{i}-{other}{j}, {before[i, j]:.2f} → {after[i, j]:.2f} Å"
    return None


# --- Measuring -------------------------------------------------------------------------------


def rotation_errors(model: AllScAIP, atoms: Atoms, rotations: int, seed: int = 0) -> np.ndarray:
    """Energies in random orientations minus their mean, (rotations,), in meV/atom."""
    centred = atoms.positions - atoms.positions.mean(axis=0)
    copies = []
    for rotation in Rotation.random(rotations, rng=np.random.default_rng(seed)):
        copy = atoms.copy()
        copy.positions = rotation.apply(centred)
        copies.append(copy)
    energies = np.array([result.energy for result in model.predict(copies)])
    return 1000 * (energies - energies.mean()) / len(atoms)


def try_molecule(
    calculator: Calculator, atoms: Atoms, trial: Trial, folder: Path, label: str = ""
) -> dict[str, Any]:
    """Equilibrate one molecule and run it, or go on with it; its row, see `run_trial`."""
    atoms = atoms.copy()
    row = {"formula": atoms.get_chemical_formula(), "atoms": len(atoms), "broken": None}
    try:
        warm = run_md(
            atoms, calculator, trial.equilibration(), folder / "warm", label, progress=False
        )
        run_md(warm, calculator, trial.production(), folder / "nve", label, progress=False)
    except Explosion as error:
        row["broken"] = str(error).split(". Up to there")[0]
    frames = []
    if (folder / "warm" / "trajectory.traj").exists():  # not if it broke while it was minimised
        with Trajectory(folder / "warm" / "trajectory.traj") as trajectory:
            frames = [*trajectory]
    if not frames:
        return row
    start = frames[0]
    if (folder / "nve" / "log.csv").exists():
        with Trajectory(folder / "nve" / "trajectory.traj") as trajectory:
            frames += [*trajectory]
        log = read_log(folder / "nve")
        row["picoseconds"] = float(log["time_ps"][-1])
        row["temperature"] = float(log["temperature_K"].mean())
        if row["broken"] is None:
            slope = drift(log, len(atoms))
            row["drift"], row["drift_error"] = slope.value, slope.error
    row["broken"] = row["broken"] or next(
        filter(None, (changed_bond(start, f) for f in frames)), None
    )
    return row


def run_trial(
    model: AllScAIP,
    molecules: Sequence[Atoms],
    trial: Trial,
    folder: Path,
    label: str = "",
    *,
    kernels: str = "auto",
    progress: bool = True,
    line: int | None = None,
    names: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Run all molecules in one batch of the model, or go on with them.

    Args:
        model: with conservative forces.
        molecules: as `choose` gives them.
        trial: what is done with each.
        folder: of the runs, with a subfolder for each molecule.
        label: what the logs call the model.
        kernels: see `allscaip_lite.kernels`.
        progress: whether to show a progress bar.
        line: of the progress bar on the terminal, where there are several.
        names: of the subfolders; by default the numbers of the molecules.

    Returns:
        A row for each molecule: `formula`, `atoms`, `broken` (None, or what happened), `drift` and
        `drift_error` in meV/atom/ps, `temperature` in K, `picoseconds`, `rotation_rms` and
        `rotation_worst` in meV/atom.
    """
    calculator = AllScAIPCalculator(model, kernels=kernels)
    names = names or _names(len(molecules))
    folders = [folder / name for name in names]
    works = [
        partial(try_molecule, atoms=atoms, trial=trial, folder=own, label=label)
        for atoms, own in zip(molecules, folders, strict=True)
    ]
    done = [_steps_done(own, trial) for own in folders]
    total = len(molecules) * round((trial.warming + trial.duration) / trial.timestep)
    with tqdm(
        total=total,
        initial=sum(done),
        unit="steps",
        smoothing=0,
        position=line,
        disable=not progress,
    ) as bar:
        rows = side_by_side(calculator, works, tick=bar.update)
    for row, atoms in zip(rows, molecules, strict=True):
        errors = rotation_errors(calculator.model, atoms, trial.rotations, trial.seed)
        row["rotation_rms"] = float(np.sqrt((errors**2).mean()))
        row["rotation_worst"] = float(np.abs(errors).max())
    return rows


def _names(molecules: int) -> list[str]:
    return [f"{number:02d}" for number in range(molecules)]


def _steps_done(folder: Path, trial: Trial) -> int:
    """How many steps the logs of an earlier run hold."""
    logs = [folder / part for part in ("warm", "nve") if (folder / part / "log.csv").exists()]
    times = [read_log(log)["time_ps"] for log in logs]
    return round(sum(1e3 * float(time[-1]) for time in times if len(time)) / trial.timestep)


def _work(task: tuple[str, str, list[Atoms], Trial, Path, list[str], int]) -> list[dict[str, Any]]:
    from allscaip_lite.checkpoints.native import load_model

    name, kernels, molecules, trial, folder, names, line = task
    model = load_model(name, kernels="plain")  # `run_trial` chooses
    return run_trial(model, molecules, trial, folder, name, kernels=kernels, line=line, names=names)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent alone
    end_with_parent()


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A table in Markdown of the rows."""
    head = ["molecule", "atoms", "bonds", "T (K)", "drift (meV/atom/ps)"]
    head += ["rotated: RMS (meV/atom)", "largest (meV/atom)"]
    lines = [
        [
            row["formula"],
            row["atoms"],
            row["broken"] or "holds",
            f"{row['temperature']:.0f}" if "temperature" in row else "–",
            f"{row['drift']:+.3f} ± {row['drift_error']:.3f}" if "drift" in row else "–",
            f"{row['rotation_rms']:.2f}",
            f"{row['rotation_worst']:.2f}",
        ]
        for row in rows
    ]
    return markdown_table(head, lines, align="lrlrrrr")


# --- The command -----------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    trial = Trial()
    parser.add_argument("model", help="a name such as lite, or a file (.safetensors or .pt)")
    parser.add_argument("data", type=Path, help="structures to choose molecules from (.aselmdb)")
    parser.add_argument("--out", type=Path, required=True, help="run folder")
    parser.add_argument("--molecules", type=int, default=trial.molecules)
    parser.add_argument("--smallest", type=int, default=trial.smallest, help="atoms")
    parser.add_argument("--largest", type=int, default=trial.largest, help="atoms")
    parser.add_argument("--warming", type=float, default=trial.warming, help="fs of equilibration")
    parser.add_argument(
        "--duration", type=float, default=trial.duration, help="fs at constant energy"
    )
    parser.add_argument("--timestep", type=float, default=trial.timestep, help="fs")
    parser.add_argument("--temperature", type=float, default=trial.temperature, help="K")
    add_kernels_option(parser)
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        help="processes that share the molecules; on a CPU one for each core is fastest",
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed, other molecules")


def run(args: argparse.Namespace) -> int:
    """Run or go on, and print the table; the exit status is 0 whether or not a bond breaks."""
    with locked(args.out):
        print(table(_rows(args)))
    return 0


def _rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    given = vars(args).keys() & {field.name for field in fields(Trial)}
    trial = Trial(**{name: getattr(args, name) for name in given})
    molecules = choose(Dataset(args.data), trial)
    names = _names(len(molecules))
    shares = [slice(first, None, args.workers) for first in range(args.workers)]
    tasks = [
        (args.model, args.kernels, molecules[share], trial, args.out, names[share], line)
        for line, share in enumerate(shares)
        if molecules[share]
    ]
    rows: list[dict[str, Any]] = [{}] * len(molecules)
    if len(tasks) == 1:
        tried = [_work(tasks[0])]
    else:
        os.environ |= dict.fromkeys(THREADS_OF_USER, "1")
        pool = ProcessPoolExecutor(
            len(tasks),
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
        )
        with pool:
            tried = list(pool.map(_work, tasks))
    for share, found in zip(shares, tried, strict=False):
        rows[share] = found
    result = {"model": args.model, "trial": asdict(trial), "machine": processor_name()}
    store_text(args.out / "stability.json", json.dumps({**result, "rows": rows}, indent=1))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """The command; `argv` defaults to the arguments of the process."""
    return run_script(
        add_arguments,
        run,
        script="docs/studies/stability/run.py",
        description=__doc__,
        stopped="the same command goes on from here",
        argv=argv,
    )


if __name__ == "__main__":
    sys.exit(main())
