"""ωB97M-V/def2-TZVPD, OMol25's level of theory: labels by PySCF, and a queue that runs for days.

Comes in: `ase.Atoms` with charge and spin multiplicity in `atoms.info`. Goes out: the same with
energy (eV) and forces (eV/Å) and OMol25's metadata, first one file a structure in `folder/jobs`,
then, collected, `{train,val,test}.aselmdb` and the energies of the free atoms, `references.json`.

ωB97M-V: N. Mardirossian, M. Head-Gordon, J. Chem. Phys. 144, 214110 (2016). PySCF: Q. Sun et al.,
J. Chem. Phys. 153, 024109 (2020). OMol25 used ORCA: D. S. Levine et al., arXiv:2505.08762.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import ase.io
import numpy as np
from ase import Atoms, units
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import atomic_numbers

from allscaip_lite.data.aselmdb import SPLITS, Dataset, checksum, write_aselmdb
from allscaip_lite.errors import DataError
from allscaip_lite.files import store_text, unfinished_folder
from allscaip_lite.labels.workers import ignore_interrupt, one_thread_each
from allscaip_lite.structures import charge_and_spin

# --- One label -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Level:
    """A level of theory and its numerical settings; the default is what `data dft` labels with."""

    functional: str = "wb97m_v"
    basis: str = "def2-tzvpd"
    grid: int = 3  # PySCF's levels; of the functional ...
    nonlocal_grid: int = 1  # ... and of VV10
    convergence: float = 1e-8  # hartree between the last two cycles


OMOL25 = Level()

# Where an SCF starts, and what a triplet is judged by: a fifth of the cost of a cycle.
COARSE = Level(grid=1, nonlocal_grid=0, convergence=1e-6)

# A closed-shell singlet with a smaller HOMO–LUMO gap (eV) and a triplet less than this above it
# (eV) is also tried as a broken-symmetry one: diradicals and bonds that break.
SMALL_GAP = 11.0
LOW_TRIPLET = 2.5
LOWER = 1e-6  # hartree by which a state must be lower to be taken instead
HEAVIEST = 36  # krypton: from there on the basis is made for effective core potentials
MAX_NET_FORCE = 0.02  # eV/Å: more says that something went wrong


class LabelFailed(RuntimeError):
    """A structure without a label: its SCF does not converge, or charge and spin are wrong."""


def label(atoms: Atoms, level: Level = OMOL25) -> Atoms:
    """The structure with energy (eV), forces (N, 3) (eV/Å) and metadata, by density-fitted DFT.

    Charge and spin multiplicity come from `atoms.info["charge"]` and `["spin"]`. Singlets are
    restricted; where gap and triplet are low, an unrestricted, broken-symmetry solution is sought
    too, and the lower state is kept. Other multiplicities are unrestricted. An SCF that does not
    converge is tried again with a level shift, then with a second-order solver.

    `info` of the result is that of `atoms` and: num_atoms, num_electrons, num_basis_functions,
    composition, unrestricted, s_squared and its deviation s_squared_dev, homo_energy and
    homo_lumo_gap (eV; one of a restricted state, else alpha and beta), nl_energy (VV10's, eV),
    mulliken_charges, mulliken_spins, lowdin_charges, lowdin_spins (N,), dipole (3,) (e Å, about the
    centre of nuclear charge), n_scf_steps, seconds, warnings, label.
    Raises LabelFailed.
    """
    from pyscf import gto, lib

    from allscaip_lite.labels.faster_pyscf import products_by_numpy
    from allscaip_lite.labels.vv10 import compiled_vv10

    if atoms.numbers.max() > HEAVIEST:
        heavy = atoms.symbols[int(atoms.numbers.argmax())]
        raise LabelFailed(f"{heavy} needs a core potential, and elements beyond Kr are not done")
    started = time.process_time()
    lib.num_threads(1)  # sums in one order: the same label every time, and fastest on few cores
    charge, spin = int(atoms.info["charge"]), int(atoms.info["spin"])
    try:
        molecule = gto.M(
            atom=list(zip(atoms.symbols, atoms.positions, strict=True)),
            basis=level.basis,
            charge=charge,
            spin=spin - 1,  # PySCF counts unpaired electrons
            unit="Angstrom",
            verbose=0,
            max_memory=3000,
        )
    except RuntimeError as error:
        raise LabelFailed(f"charge {charge}, multiplicity {spin}: {error}") from error
    with compiled_vv10(), products_by_numpy(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PySCF's, on its own future
        state = _ground_state(molecule, spin, level)
        forces = np.zeros((1, 3))  # a free atom's, which PySCF's grid response cannot do
        if molecule.natm > 1:
            gradient = state.nuc_grad_method()
            gradient.grid_response = True
            forces = -gradient.kernel() * (units.Hartree / units.Bohr)
        properties = _properties(state, spin)
    net = np.abs(forces.sum(axis=0)).max()
    if not (np.isfinite(forces).all() and net < MAX_NET_FORCE):
        raise LabelFailed(f"the forces sum up to {net:.3f} eV/Å")
    labelled = Atoms(atoms.numbers, atoms.positions)
    labelled.info = dict(atoms.info) | properties
    labelled.info |= {
        "num_atoms": len(atoms),
        "num_electrons": int(molecule.nelectron),
        "num_basis_functions": int(molecule.nao),
        "composition": labelled.get_chemical_formula("hill"),
        "seconds": round(time.process_time() - started, 1),
        "label": f"{level.functional}/{level.basis} (PySCF {version('pyscf')})",
    }
    energy = float(state.e_tot) * units.Hartree
    labelled.calc = SinglePointCalculator(labelled, energy=energy, forces=forces)
    return labelled


def _ground_state(molecule, spin: int, level: Level):
    """The converged PySCF object of the lowest state found."""
    from pyscf import dft

    if molecule.natm == 1:
        # A shell that is partly filled has many solutions; starts differ in which one they reach.
        found = []
        for guess in ("minao", "atom", "huckel", "1e"):
            state = _method(dft.UKS, molecule, level)
            state.init_guess = guess
            try:
                found.append(_converged(state))
            except LabelFailed:
                continue
        if not found:
            raise LabelFailed("the SCF of the atom did not converge")
        return min(found, key=lambda state: state.e_tot)
    if spin > 1:
        return _in_two_steps(dft.UKS, molecule, level)
    try:
        restricted = _in_two_steps(dft.RKS, molecule, level)
    except LabelFailed:
        return _in_two_steps(dft.UKS, molecule, level)
    if _gaps(restricted)[0] > SMALL_GAP or molecule.nelectron < 2:
        return restricted
    try:
        density = _diradical(restricted, level)
        broken = None if density is None else _converged(_method(dft.UKS, molecule, level), density)
    except LabelFailed:
        return restricted
    return broken if broken and broken.e_tot < restricted.e_tot - LOWER else restricted


def _in_two_steps(kind, molecule, level: Level):
    """The converged state, by way of one on coarse grids, whose result is a good start."""
    coarse = _method(kind, molecule, _coarse(level))
    coarse.kernel()
    state = _method(kind, molecule, level, coarse.with_df)
    return _converged(state, coarse.make_rdm1() if coarse.converged else None)


def _coarse(level: Level) -> Level:
    return replace(COARSE, functional=level.functional, basis=level.basis)


def _method(kind, molecule, level: Level, integrals=None):
    """`integrals`: `with_df` of another state of these atoms in this basis, to be used again."""
    from allscaip_lite.labels.faster_pyscf import SmallBlocks

    state = kind(molecule, xc=level.functional).density_fit()
    state._numint = SmallBlocks()
    if integrals is not None:
        state.with_df = integrals
    state.grids.level = level.grid
    state.nlcgrids.level = level.nonlocal_grid
    state.conv_tol = level.convergence
    state.max_cycle = 60
    return state


def _converged(state, density=None):
    """`state` after its SCF, which gets two more chances; LabelFailed after the last."""
    state.kernel(density)
    state.attempts = 1
    if not state.converged:
        state.level_shift, state.damp, state.max_cycle = 0.3, 0.3, 150
        state.kernel(state.make_rdm1())
        state.level_shift = state.damp = 0
        state.attempts = 2
    if not state.converged:
        second = state.newton()
        second.max_cycle = 20  # each has many small steps inside: more take a quarter of an hour
        second.kernel(state.mo_coeff, state.mo_occ)
        for name in ("converged", "e_tot", "mo_coeff", "mo_occ", "mo_energy"):
            setattr(state, name, getattr(second, name))
        state.attempts = 3
    if not (state.converged and np.isfinite(state.e_tot)):
        raise LabelFailed("the SCF did not converge, nor with level shift, nor in second order")
    return state


def _diradical(restricted, level: Level) -> np.ndarray | None:
    """Alpha and beta densities (2, B, B) to start a broken-symmetry singlet from, made of the
    triplet: its two unpaired electrons, each in one of (a ± b)/√2 of their orbitals a and b, one
    up and one down. None if the triplet is far above the singlet: then there is none to find."""
    from pyscf import dft

    rough = replace(_coarse(level), convergence=1e-4)
    low = _method(dft.RKS, restricted.mol, rough, restricted.with_df)
    low = _converged(low, restricted.make_rdm1())
    molecule = restricted.mol.copy()
    molecule.spin = 2
    triplet = _method(dft.UKS, molecule, rough, restricted.with_df)
    orbitals = np.arange(restricted.mo_occ.size)
    promoted = [(orbitals < count).astype(float) for count in molecule.nelec]
    triplet = _converged(triplet, triplet.make_rdm1([restricted.mo_coeff] * 2, promoted))
    if (triplet.e_tot - low.e_tot) * units.Hartree > LOW_TRIPLET:
        return None
    alpha, beta = (
        orbitals[:, filled > 0]
        for orbitals, filled in zip(triplet.mo_coeff, triplet.mo_occ, strict=True)
    )
    # Alpha orbitals sorted by how far the beta ones span them too: the last two are unpaired.
    mixing = np.linalg.svd(alpha.T @ molecule.intor("int1e_ovlp") @ beta)[0]
    *paired, a, b = (alpha @ mixing).T
    shared = np.einsum("ki,kj->ij", paired, paired) if paired else 0.0
    unpaired = ((a + sign * b) / np.sqrt(2) for sign in (1.0, -1.0))
    return np.array([shared + np.outer(orbital, orbital) for orbital in unpaired])


def _channels(state) -> list[tuple[np.ndarray, np.ndarray]]:
    """Orbital energies (eV) and which are filled: of both spins, or of alpha and beta."""
    energies = np.atleast_2d(state.mo_energy) * units.Hartree
    return list(zip(energies, np.atleast_2d(state.mo_occ) > 0, strict=True))


def _gaps(state) -> list[float]:
    return [
        float(energy[~full].min() - energy[full].max()) if full.any() and not full.all() else np.inf
        for energy, full in _channels(state)
    ]


def _properties(state, spin: int) -> dict:
    """What OMol25 tells of a calculation, where PySCF has it."""
    molecule = state.mol
    density = state.make_rdm1()
    unrestricted = density.ndim == 3
    total = density.sum(axis=0) if unrestricted else density
    difference = density[0] - density[1] if unrestricted else np.zeros_like(total)
    s_squared = float(state.spin_square()[0]) if unrestricted else 0.0
    expected = (spin**2 - 1) / 4
    overlap = molecule.intor("int1e_ovlp")
    values, vectors = np.linalg.eigh(overlap)
    root = (vectors * np.sqrt(values)) @ vectors.T
    owner = np.repeat(np.arange(molecule.natm), np.diff(molecule.aoslice_by_atom()[:, 2:]).ravel())

    def by_atom(population: np.ndarray) -> np.ndarray:
        return np.bincount(owner, population, molecule.natm)

    nuclei = molecule.atom_charges()
    charges, spins = {}, {}
    for name, matrices in (
        ("mulliken", (total @ overlap, difference @ overlap)),
        ("lowdin", (root @ total @ root, root @ difference @ root)),
    ):
        charges[f"{name}_charges"] = np.round(nuclei - by_atom(np.diag(matrices[0])), 6)
        spins[f"{name}_spins"] = np.round(by_atom(np.diag(matrices[1])), 6)
    centre = nuclei @ molecule.atom_coords() / nuclei.sum()
    with molecule.with_common_orig(centre):
        electrons = np.einsum("xij,ji->x", molecule.intor("int1e_r"), total)
    homo = [float(energy[full].max()) for energy, full in _channels(state) if full.any()]
    grid = state.nlcgrids
    _, nonlocal_energy, _ = state._numint.nr_nlc_vxc(molecule, grid, state.xc, total)
    doubtful = []
    if abs(s_squared - expected) > 0.1 * (1 + expected):
        doubtful.append(f"spin contamination: S² is {s_squared:.3f}, not {expected:.3f}")
    if state.attempts > 1:
        doubtful.append(f"the SCF converged at attempt {state.attempts}")
    return (
        charges
        | spins
        | {
            "unrestricted": unrestricted,
            "s_squared": round(s_squared, 6),
            "s_squared_dev": round(s_squared - expected, 6),
            "homo_energy": [round(energy, 6) for energy in homo],
            "homo_lumo_gap": [round(gap, 6) for gap in _gaps(state) if np.isfinite(gap)],
            "nl_energy": float(nonlocal_energy) * units.Hartree,
            "dipole": np.round(-electrons * units.Bohr, 6),
            "n_scf_steps": int(state.cycles),
            "warnings": doubtful,
        }
    )


# --- The queue -------------------------------------------------------------------------------


class Entry(Protocol):
    """What is labelled in one go: `structures` of one name, told apart from all others by it."""

    @property
    def name(self) -> str: ...

    @property
    def split(self) -> str: ...

    def structures(self) -> list[Atoms]: ...


def label_all(
    folder: str | os.PathLike, entries: Sequence[Entry], level: Level = OMOL25, workers: int = 1
) -> None:
    """Label the structures of all entries, one file an entry in `folder/jobs`.

    A run that was stopped, even killed, goes on from there; several may run at once, in one folder
    and on one machine, and share the work. An entry that fails leaves a `.failed` file with the
    reason and is not tried again until that file is deleted. Each worker is a new process, so a
    script that calls this needs the usual `if __name__ == "__main__"`.
    Raises RuntimeError if a worker dies.
    """
    store = Path(folder) / "jobs"
    store.mkdir(parents=True, exist_ok=True)
    stems = [job_file(folder, entry, level) for entry in entries]
    one_thread_each()
    context = multiprocessing.get_context("spawn")
    arguments = (list(entries), stems, level)
    crew = [context.Process(target=_work, args=arguments, daemon=True) for _ in range(workers)]
    started = time.monotonic()
    before = sum(map(is_done, stems))
    for process in crew:
        process.start()
    try:
        while any(process.is_alive() for process in crew):
            for process in crew:
                process.join(30 / workers)
            _progress(stems, before, time.monotonic() - started)
    finally:
        for process in crew:
            process.terminate()
    if any(process.exitcode for process in crew):
        codes = ", ".join(str(process.exitcode) for process in crew)
        raise RuntimeError(
            f"a worker died (exit status {codes}; −9 is often too little memory); "
            "the same command goes on from here"
        )
    for stem in filter(is_done, stems):  # what workers left that were killed just after a label
        stem.with_suffix(".claim").unlink(missing_ok=True)
        shutil.rmtree(unfinished_folder(stem.with_suffix(".aselmdb")), ignore_errors=True)


def job_file(folder: str | os.PathLike, entry: Entry, level: Level = OMOL25) -> Path:
    """Where an entry's result is, without the suffix: `.aselmdb` labelled, `.failed` the reason."""
    name = json.dumps([entry.name, asdict(level)])
    return Path(folder) / "jobs" / hashlib.sha256(name.encode()).hexdigest()[:20]


def is_done(stem: Path) -> bool:
    """Whether an entry was labelled, or failed for good."""
    return stem.with_suffix(".aselmdb").exists() or stem.with_suffix(".failed").exists()


def _progress(stems: Sequence[Path], before: int, seconds: float) -> None:
    done = sum(map(is_done, stems))
    failed = sum(stem.with_suffix(".failed").exists() for stem in stems)
    left = "?"
    if done > before:
        left = f"{seconds / (done - before) * (len(stems) - done) / 3600:.1f}"
    live = sys.stderr.isatty() and done < len(stems)
    print(
        f"\r{done} of {len(stems)} ({failed} failed), {left} h left ",
        end="" if live else "\n",
        file=sys.stderr,
        flush=True,
    )


def _work(entries: Sequence[Entry], stems: Sequence[Path], level: Level) -> None:
    ignore_interrupt()
    parent = os.getppid()
    for entry, stem in zip(entries, stems, strict=True):
        if os.getppid() != parent:
            return  # the parent was killed
        if is_done(stem):
            continue
        with _claimed(stem) as mine:
            if mine and not is_done(stem):
                _do(entry, stem, level)


@contextmanager
def _claimed(stem: Path) -> Iterator[bool]:
    """Whether this process alone may work on an entry. The claim is a lock, not the file itself:
    the system lets go of it when the process ends, however it ends."""
    path = stem.with_suffix(".claim")
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
        if is_done(stem):
            path.unlink(missing_ok=True)


def _do(entry: Entry, stem: Path, level: Level) -> None:
    try:
        labelled = [label(atoms, level) for atoms in entry.structures()]
        if not labelled:
            raise LabelFailed("no usable structure was made")
        write_aselmdb(stem.with_suffix(".aselmdb"), labelled)
    except (ArithmeticError, RuntimeError, ValueError) as error:
        # One odd structure must not end a run of days; a full disk or a missing library does.
        store_text(stem.with_suffix(".failed"), f"{entry.name}\n{type(error).__name__}: {error}\n")


# --- The data set ----------------------------------------------------------------------------


def collect(
    folder: str | os.PathLike, entries: Sequence[Entry], level: Level = OMOL25
) -> dict[str, int]:
    """Write `{train,val,test}.aselmdb` of what is labelled so far; how many structures of each.

    Beside them: `references.json`, the energies of the free atoms (eV) that are labelled;
    `failed.json`, the entries that failed and why; `checksums.json`, one of each split.
    The order is that of the entries, so the same labels yield the same files.
    """
    folder = Path(folder)
    found: dict[str, list[Atoms]] = {split: [] for split in SPLITS}
    references, failed = {}, {}
    for entry in entries:
        stem = job_file(folder, entry, level)
        if stem.with_suffix(".failed").exists():
            failed[entry.name] = stem.with_suffix(".failed").read_text().partition("\n")[2].strip()
        if not stem.with_suffix(".aselmdb").exists():
            continue
        for atoms in Dataset(stem.with_suffix(".aselmdb")):
            if isinstance(entry, FreeAtom):
                references[entry.element] = atoms.get_potential_energy()
            else:
                atoms.info["entry"] = entry.name
                found.setdefault(entry.split, []).append(atoms)
    checksums = {}
    for split, structures in found.items():
        if structures:
            write_aselmdb(folder / f"{split}.aselmdb", structures, overwrite=True)
            checksums[split] = checksum(structures)
    ordered = sorted(references, key=atomic_numbers.get)
    references = {element: references[element] for element in ordered}
    for name, table in (
        ("references", references),
        ("failed", failed),
        ("checksums", checksums),
    ):
        store_text(folder / f"{name}.json", json.dumps(table, indent=1))
    return {split: len(structures) for split, structures in found.items()}


def take_over(
    folder: str | os.PathLike,
    entries: Sequence[Entry],
    known: str | os.PathLike,
    level: Level = OMOL25,
) -> int:
    """Put the labels of a data set that `collect` wrote into a queue; how many entries it spares.

    `known` is the folder of the set. What the queue has already stays as it is.
    Raises FileNotFoundError if there is no set, ValueError if it is of another level of theory.
    """
    known, store = Path(known), Path(folder) / "jobs"
    found: dict[str, list[Atoms]] = {}
    for path in (known / f"{split}.aselmdb" for split in SPLITS):
        for atoms in Dataset(path) if path.exists() else ():
            theirs = atoms.info.get("label", "nobody knows what")
            if not theirs.startswith(f"{level.functional}/{level.basis} "):
                raise ValueError(f"{path} is labelled by {theirs}: no labels for this queue")
            name = atoms.info.get("entry") or atoms.info["source"]
            found.setdefault(name, []).append(atoms)
    if not found:
        raise FileNotFoundError(
            f"{known} has no train, val or test.aselmdb: --known takes the folder of a data set "
            "that this command collected"
        )
    references = known / "references.json"
    if references.exists():
        for element, energy in json.loads(references.read_text()).items():
            atom = FreeAtom(element).structures()[0]
            atom.calc = SinglePointCalculator(atom, energy=energy, forces=np.zeros((1, 3)))
            found[FreeAtom(element).name] = [atom]
    store.mkdir(parents=True, exist_ok=True)
    spared = 0
    for entry in entries:
        stem = job_file(folder, entry, level)
        if entry.name in found and not is_done(stem):
            write_aselmdb(stem.with_suffix(".aselmdb"), found[entry.name])
            spared += 1
    return spared


# --- Free atoms ------------------------------------------------------------------------------

# Multiplicities of the ground states of the neutral atoms.
GROUND_STATES = {
    "H": 2, "Li": 2, "B": 2, "C": 3, "N": 4, "O": 3, "F": 2, "Na": 2, "Mg": 1, "Si": 3, "P": 4,
    "S": 3, "Cl": 2, "K": 2, "Ca": 1, "Zn": 1, "Br": 2,
}  # fmt: skip


@dataclass(frozen=True)
class FreeAtom:
    """The entry of one free, neutral atom in its ground state."""

    element: str

    @property
    def name(self) -> str:
        return f"free atom {self.element}"

    @property
    def split(self) -> str:
        return ""  # belongs to none: its energy is a reference

    def structures(self) -> list[Atoms]:
        info = {"charge": 0, "spin": GROUND_STATES[self.element], "data_id": "free_atoms"}
        return [Atoms(self.element, [[0.0, 0.0, 0.0]], info=info)]


# --- One's own structures --------------------------------------------------------------------


@dataclass(frozen=True)
class Given:
    """The entry of one structure of a file, charge and spin in its `info`."""

    atoms: Atoms

    @property
    def name(self) -> str:
        atoms = self.atoms
        what = [atoms.numbers.tolist(), atoms.positions.round(8).tolist()]
        what += [atoms.info["charge"], atoms.info["spin"]]
        return f"{atoms.symbols} {hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]}"

    @property
    def split(self) -> str:
        return "labelled"

    def structures(self) -> list[Atoms]:
        """The structure with GFN2-xTB's energy (eV) and forces (eV/Å) in `info`, if it has any."""
        from allscaip_lite.labels.xtb import results_of

        atoms = self.atoms.copy()
        if xtb := results_of(atoms):
            atoms.info |= {"xtb_energy": xtb["energy"], "xtb_forces": xtb["forces"]}
        return [atoms]


def read_given(files: Sequence[str | os.PathLike]) -> list[Given]:
    """The structures of files, `.aselmdb` or what ASE reads; their labels, if any, are left.

    Charge and multiplicity are those of `info`, else neutral and the lowest. Raises
    FileNotFoundError, DataError for a structure that is periodic, and StructureError for one whose
    multiplicity its electrons forbid.
    """
    found = []
    for file in map(Path, files):
        if not file.exists():
            raise FileNotFoundError(f"{file}: no such file")
        lmdb = file.suffix == ".aselmdb"
        for index, atoms in enumerate(
            Dataset(file, labelled=False) if lmdb else ase.io.iread(file, index=":")
        ):
            where = f"{file}, structure {index} ({atoms.symbols})"
            if atoms.pbc.any():
                raise DataError(f"{where} is periodic: only molecules can be labelled")
            charge, spin = charge_and_spin(atoms, where)
            if not spin:
                raise DataError(f"{where} states a multiplicity of 0: give the right one")
            kept = {key: atoms.info[key] for key in ("data_id", "molecule") if key in atoms.info}
            bare = Atoms(atoms.numbers, atoms.positions)
            bare.info = {"data_id": file.stem} | kept | {"charge": charge, "spin": spin}
            bare.info["source"] = str(atoms.info.get("source", where))
            bare.info["reference_source"] = "allscaip-lite data dft"
            found.append(Given(bare))
    return found


# --- The command -----------------------------------------------------------------------------


KNOWN = "folder of a set this command made: its labels are taken, not made again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `allscaip-lite data dft`."""
    parser.add_argument("--out", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--workers", type=int, default=1, help="processes, one core each")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other structures")
    parser.add_argument(
        "--structures",
        nargs="+",
        metavar="FILE",
        help="label these, .aselmdb or what ASE reads, and no others; into labelled.aselmdb",
    )
    parser.add_argument("--known", type=Path, help=KNOWN)
    parser.add_argument(
        "--collect",
        action="store_true",
        help="label nothing: write the data set of what is labelled so far, and what failed",
    )


def run(args: argparse.Namespace) -> int:
    """`allscaip-lite data dft`: label, or go on labelling, and collect; the exit status."""
    from allscaip_lite.labels import omol_mini

    if args.structures:
        entries: list[Entry] = [*read_given(args.structures)]
    else:
        entries = [FreeAtom(element) for element in GROUND_STATES]
        entries += omol_mini.plan(args.seed)
    if args.known:
        print(f"{take_over(args.out, entries, args.known)} entries taken from {args.known}")
    if not args.collect:
        label_all(args.out, entries, workers=args.workers)
    for split, count in collect(args.out, entries).items():
        if count or not args.structures:
            print(f"{split}: {count} structures")
    return 0


if __name__ == "__main__":
    command = argparse.ArgumentParser(prog="allscaip-lite data dft", description=__doc__)
    add_arguments(command)
    sys.exit(run(command.parse_args()))
