"""Geometry as numbers a transformer can read (paper sections 3.2 and 3.3).

In: distances and directions of the graph. Out: radial bases, spherical harmonics, Steinhardt
bond-orientational order, the Legendre matrices of the angular encoding (LAE), and the sinc
features of the Euclidean rotary encoding (ERoPE). Pure functions, no weights.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

from allscaip_lite.graph import Graph

# ERoPE's wavelengths run from 120 Å down to 1/4 Å: frequencies in 1/Å
LOWEST_FREQUENCY = math.pi / (4 * 30.0)
HIGHEST_FREQUENCY = math.pi / 0.25


def radial_basis(distances: Tensor, kind: str, cutoff: float, size: int) -> Tensor:
    """One of the reference's bases without weights; centres c evenly on [0, cutoff], Δ apart.

    `gaussian`: exp(-½ (d-c)²/(2Δ)²). `sigmoid`: σ(2(d-c)/Δ). `linear_sigmoid`: that plus
    0.002 (d-c)/Δ.

    Args:
        distances: d, (E,) Å.
        kind: which of the three.
        cutoff: the last centre, Å.
        size: how many centres.

    Returns:
        (E, size).
    """
    centers, spacing = radial_centers(cutoff, size, distances)
    if kind == "gaussian":
        return gaussian_basis(distances, centers, spacing)
    offset = (distances.unsqueeze(1) - centers) / spacing  # (E, size) in spacings
    step = torch.sigmoid(2 * offset)
    return step if kind == "sigmoid" else step + 0.002 * offset


def radial_centers(cutoff: float, size: int, like: Tensor) -> tuple[Tensor, float]:
    """(size,) Å, evenly on [0, cutoff], and their spacing in Å."""
    centers = torch.linspace(0, cutoff, size, dtype=like.dtype, device=like.device)
    return centers, cutoff / (size - 1)


def gaussian_basis(distances: Tensor, centers: Tensor, spacing: float) -> Tensor:
    """(E,), (C,) Å → (E, C): exp(-½ (d-c)²/(2Δ)²), Δ the spacing of the centres."""
    offset = (distances.unsqueeze(1) - centers) / spacing  # (E, C) in spacings
    return torch.exp(-offset.square() / 8)


def spherical_harmonics(directions: Tensor, degree: int) -> Tensor:
    """(E, 3) unit vectors → (E, (degree+1)²): real Y_lm for l = 0 .. degree.

    e3nn's convention: y is the polar axis, m runs from -l to l, `component` normalisation
    (Σ_m Y_lm² = 2l+1). Zero vectors are not accepted here: for them only Y_00 = 1 survives.
    """
    x, y, z = directions.unbind(1)
    heights, circle = [torch.ones_like(y)], [torch.ones_like(torch.complex(z, x))]
    for _ in range(degree):
        heights.append(heights[-1] * y)  # y^k
        circle.append(circle[-1] * torch.complex(z, x))  # sinθ^m (cos mφ + i sin mφ)
    polar, around = _harmonic_tables(degree, directions.dtype, directions.device)
    parts = torch.view_as_real(torch.stack(circle, dim=1)).flatten(1)  # (E, 2(degree+1))
    return (torch.stack(heights, dim=1) @ polar) * (parts @ around)


@functools.cache
def _harmonic_tables(
    degree: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """What each Y_lm takes of y^k, (degree+1, (degree+1)²): the |m|-th derivative of P_l,
    normalised; and of the circle's parts, (2(degree+1), (degree+1)²): one of them.
    """
    count = (degree + 1) ** 2
    polar, around = np.zeros((degree + 1, count)), np.zeros((2 * degree + 2, count))
    for l in range(degree + 1):
        legendre = np.polynomial.Legendre.basis(l).convert(kind=np.polynomial.Polynomial)
        for m in range(-l, l + 1):
            column, a = l * l + l + m, abs(m)
            norm = math.sqrt((2 * l + 1) * math.factorial(l - a) / math.factorial(l + a))
            slope = np.asarray(legendre.deriv(a).coef, dtype=float)
            polar[: len(slope), column] = norm * slope * (math.sqrt(2) if m else 1)
            around[2 * a + (m < 0), column] = 1
    first, second = (torch.as_tensor(t, dtype=dtype, device=device) for t in (polar, around))
    return first, second


def legendre_polynomials(cosine: Tensor, degree: int) -> list[Tensor]:
    """P_0 .. P_degree of any tensor of cosines, by Bonnet's recursion."""
    polynomials = [torch.ones_like(cosine), cosine]
    for l in range(1, degree):
        polynomials.append(
            ((2 * l + 1) * cosine * polynomials[l] - l * polynomials[l - 1]) / (l + 1)
        )
    return polynomials[: degree + 1]


def slot_legendre(graph: Graph, degree: int) -> Tensor:
    """(degree, N, K, K): P_l(cos θ) between the edges of each row, l = 1 .. degree.

    Zero wherever a slot has no direction (self-edge, empty), as Y_lm(0) = 0 asks for. The same
    matrices serve the destination layout: reversing both edges keeps the angle between them.
    """
    directions = graph.slot_directions
    cosine = torch.bmm(directions, directions.transpose(1, 2))  # (N, K, K)
    if degree < 1:
        return cosine.new_zeros(0, *cosine.shape)
    has_direction = graph.log_weight.isfinite()  # (N, K)
    has_direction[:, 0] = False
    both = (has_direction.unsqueeze(2) & has_direction.unsqueeze(1)).to(cosine.dtype)
    return torch.stack([p * both for p in legendre_polynomials(cosine, degree)[1:]])


def pair_sums(legendre: Tensor, weights: Tensor) -> Tensor:
    """(l, N, K, K), (N, K) → (N, l): Σ_ef w_e w_f P_l(cos θ) over each row's pairs of edges."""
    return (weights.unsqueeze(1) @ legendre @ weights.unsqueeze(2)).flatten(1).T


def bond_orientational_order(sums: Tensor, weights: Tensor, softness: float = 0.0) -> Tensor:
    """(N, l), (N, K) → (N, l+1): Steinhardt's q_l of each atom, q_0 too, from its `pair_sums`.

    By the addition theorem Σ_m (mean_e Y_lm/√(2l+1))² is the mean of P_l(cos θ) over all pairs of
    edges of the row, so no harmonics are needed. In the reference each edge weighs 1, the self-edge
    too. The square is held above 1e-6, as in the reference.

    Symmetry makes many q_l of a perfect crystal 0. Around it they grow like the length of a vector,
    with a kink, and so does the energy: the crystal has imaginary phonons. √(q² + δ²) with the
    softness δ above 0 has no kink.
    """
    squared = sums / weights.sum(1, keepdim=True) ** 2
    squared = squared.clamp(min=0.0) + softness**2 if softness else squared.clamp(min=1e-6)
    order = squared.sqrt()
    return torch.cat([torch.ones_like(order[:, :1]), order], dim=1)


def rotary_frequencies(size: int, like: Tensor) -> Tensor:
    """(size,) 1/Å, evenly in the logarithm."""
    return torch.logspace(
        math.log10(LOWEST_FREQUENCY),
        math.log10(HIGHEST_FREQUENCY),
        size,
        dtype=like.dtype,
        device=like.device,
    )


def sinc_features(distances: Tensor, frequencies: Tensor) -> Tensor:
    """(...,) Å → (..., F): sin(ωd)/(ωd), a rotary phase averaged over all directions.

    Below 1e-2 the Taylor series stands in, so that value and derivatives stay exact at d = 0.
    """
    phase = distances.unsqueeze(-1) * frequencies
    small = phase.abs() < 1e-2
    squared = torch.where(small, phase, 0.0).square()
    series = 1 - squared / 6 * (1 - squared / 20 * (1 - squared / 42))
    safe = torch.where(small, 1.0, phase)
    return torch.where(small, series, torch.sin(safe) / safe)
