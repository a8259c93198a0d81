"""ωB97M-V/def2-TZVPD, OMol25's level of theory: labels by PySCF.

In: `ase.Atoms` with charge and spin multiplicity in `atoms.info`. Out: the same with energy (eV),
forces (eV/Å) and OMol25's metadata.

ωB97M-V: N. Mardirossian, M. Head-Gordon, J. Chem. Phys. 144, 214110 (2016). PySCF: Q. Sun et al.,
J. Chem. Phys. 153, 024109 (2020). OMol25 used ORCA: D. S. Levine et al., arXiv:2505.08762.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
from ase import Atoms, units

from allscaip_lite.electrons import charge_and_spin
from allscaip_lite.errors import StructureError
from allscaip_lite.labels import LabelError, with_labels


@dataclass(frozen=True)
class Level:
    """A level of theory and its numerical settings; the default is that of `data/omol-mini`."""

    functional: str = "wb97m_v"
    basis: str = "def2-tzvpd"
    grid: int = 3  # PySCF's levels; of the functional ...
    nonlocal_grid: int = 1  # ... and of VV10
    convergence: float = 1e-8  # hartree between the last two cycles

    @property
    def name(self) -> str:
        """Functional and basis, as labels say them in `info["label"]`."""
        return f"{self.functional}/{self.basis}"


OMOL25 = Level()

# Where an SCF starts, and what a triplet is judged by: a fifth of the cost of a cycle.
COARSE = Level(grid=1, nonlocal_grid=0, convergence=1e-6)

# A closed-shell singlet with a smaller HOMO–LUMO gap (eV) and a triplet less than this above it
# (eV) is also tried as a broken-symmetry one: diradicals and bonds that break.
SMALL_GAP = 11.0
LOW_TRIPLET = 2.5
LOWER = 1e-6  # hartree by which a state must be lower to be taken instead
CORE, HEAVIEST = 36, 86  # krypton, radon: between them the basis has effective core potentials
MAX_NET_FORCE = 0.02  # eV/Å: more says that something went wrong


def label(atoms: Atoms, level: Level = OMOL25) -> Atoms:
    """The structure with energy (eV), forces (N, 3) (eV/Å) and metadata, by density-fitted DFT.

    From rubidium on the inner electrons are an effective core potential, and the energy is without
    theirs. Charge and spin multiplicity come from `atoms.info["charge"]` and `["spin"]`. Singlets
    are restricted; where gap and triplet are low, an unrestricted, broken-symmetry solution is
    sought too, and the lower state is kept. Other multiplicities are unrestricted. An SCF that does
    not converge is tried again with a level shift, then with a second-order solver.

    `info` of the result is that of `atoms` and: num_atoms, num_electrons, num_basis_functions,
    composition, unrestricted, s_squared and its deviation s_squared_dev, homo_energy and
    homo_lumo_gap (eV; one of a restricted state, else alpha and beta), nl_energy (VV10's, eV),
    mulliken_charges, mulliken_spins, lowdin_charges, lowdin_spins (N,), dipole (3,) (e Å, about the
    centre of nuclear charge), n_scf_steps, seconds, warnings, label.
    Raises LabelError where the SCF does not converge, charge and spin are impossible, or an element
    has no basis.
    """
    from pyscf import gto, lib

    from allscaip_lite.labels.vv10 import compiled_vv10

    if atoms.numbers.max() > HEAVIEST:
        heavy = atoms.symbols[int(atoms.numbers.argmax())]
        raise LabelError(f"{level.basis} has no functions for {heavy}, nor for others beyond Rn")
    started = time.process_time()
    lib.num_threads(1)  # sums in one order: the same label every time, and fastest on few cores
    try:
        charge, spin = charge_and_spin(atoms, atoms.symbols)
    except StructureError as error:
        raise LabelError(str(error)) from error
    try:
        molecule = gto.M(
            atom=list(zip(atoms.symbols, atoms.positions, strict=True)),
            basis=level.basis,
            ecp=dict.fromkeys(atoms.symbols[atoms.numbers > CORE], level.basis),
            charge=charge,
            spin=spin - 1,  # PySCF counts unpaired electrons
            unit="Angstrom",
            verbose=0,
            max_memory=3000,
        )
    except RuntimeError as error:
        raise LabelError(f"charge {charge}, multiplicity {spin}: {error}") from error
    with compiled_vv10(), warnings.catch_warnings():
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
        raise LabelError(f"the forces sum up to {net:.3f} eV/Å")
    return with_labels(
        Atoms(atoms.numbers, atoms.positions, info=atoms.info),
        {"energy": float(state.e_tot) * units.Hartree, "forces": forces},
        f"{level.name} (PySCF {version('pyscf')})",
        charge,
        spin,
        num_basis_functions=int(molecule.nao),
        seconds=round(time.process_time() - started, 1),
        **properties,
    )


def _ground_state(molecule: Any, spin: int, level: Level) -> Any:
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
            except LabelError:
                continue
        if not found:
            raise LabelError("the SCF of the atom did not converge")
        return min(found, key=lambda state: state.e_tot)
    if spin > 1:
        return _in_two_steps(dft.UKS, molecule, level)
    try:
        restricted = _in_two_steps(dft.RKS, molecule, level)
    except LabelError:
        return _in_two_steps(dft.UKS, molecule, level)
    if _gaps(restricted)[0] > SMALL_GAP or molecule.nelectron < 2:
        return restricted
    try:
        density = _diradical(restricted, level)
        broken = None if density is None else _converged(_method(dft.UKS, molecule, level), density)
    except LabelError:
        return restricted
    return broken if broken and broken.e_tot < restricted.e_tot - LOWER else restricted


def _in_two_steps(kind: Any, molecule: Any, level: Level) -> Any:
    """The converged state, by way of one on coarse grids, whose result is a good start."""
    coarse = _method(kind, molecule, _coarse(level))
    coarse.kernel()
    state = _method(kind, molecule, level, coarse.with_df)
    return _converged(state, coarse.make_rdm1() if coarse.converged else None)


def _coarse(level: Level) -> Level:
    return replace(COARSE, functional=level.functional, basis=level.basis)


def _method(kind: Any, molecule: Any, level: Level, integrals: Any = None) -> Any:
    """`integrals`: `with_df` of another state of these atoms in this basis, to be used again."""
    state = kind(molecule, xc=level.functional).density_fit()
    if integrals is not None:
        state.with_df = integrals
    state.grids.level = level.grid
    state.nlcgrids.level = level.nonlocal_grid
    state.conv_tol = level.convergence
    state.max_cycle = 60
    return state


def _converged(state: Any, density: np.ndarray | None = None) -> Any:
    """`state` after its SCF, which gets two more chances; LabelError after the last."""
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
        raise LabelError("the SCF did not converge, nor with level shift, nor in second order")
    return state


def _diradical(restricted: Any, level: Level) -> np.ndarray | None:
    """Alpha and beta densities (2, B, B) to start a broken-symmetry singlet from, made of the
    triplet: its two unpaired electrons, each in one of (a ± b)/√2 of their orbitals a and b, one
    up and one down. None if the triplet is far above the singlet: then there is none to find.
    """
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


def _channels(state: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """Orbital energies (eV) and which are filled: of both spins, or of alpha and beta."""
    energies = np.atleast_2d(state.mo_energy) * units.Hartree
    return list(zip(energies, np.atleast_2d(state.mo_occ) > 0, strict=True))


def _gaps(state: Any) -> list[float]:
    return [
        float(energy[~full].min() - energy[full].max()) if full.any() and not full.all() else np.inf
        for energy, full in _channels(state)
    ]


def _properties(state: Any, spin: int) -> dict[str, Any]:
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


def job_file(name: str) -> str:
    """The file name of a result in a queue: another name or default level, another file."""
    return hashlib.sha256(json.dumps([name, asdict(OMOL25)]).encode()).hexdigest()[:20]
