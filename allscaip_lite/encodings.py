"""Geometry as numbers a transformer can read (paper sections 3.2 and 3.3).

In: distances and directions of the graph. Out: radial bases, spherical harmonics, Steinhardt
bond-orientational order, the Legendre matrices of the angular encoding (LAE), and the sinc
features of the Euclidean rotary encoding (ERoPE). Pure functions, no weights.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from allscaip_lite.graph import Graph

# ERoPE's wavelengths run from 120 Å down to 1/4 Å: frequencies in 1/Å
LOWEST_FREQUENCY = math.pi / (4 * 30.0)
HIGHEST_FREQUENCY = math.pi / 0.25


def radial_basis(distances: Tensor, kind: str, cutoff: float, size: int) -> Tensor:
    """(E,) Å → (E, size): one of the reference's bases without weights.

    `gaussian`: exp(-½ (d-c)²/(2Δ)²), centres c evenly on [0, cutoff], Δ their spacing.
    `sigmoid`: σ(2(d-c)/Δ). `linear_sigmoid`: that plus 0.002 (d-c)/Δ.
    """
    centers = torch.linspace(0, cutoff, size, dtype=distances.dtype, device=distances.device)
    offset = (distances.unsqueeze(1) - centers) * ((size - 1) / cutoff)  # (E, size) in spacings
    if kind == "gaussian":
        # beyond exp(-80) stands no information, but subnormal numbers, which are slow
        return torch.exp(-(offset * offset / 8).clamp(max=80))
    step = torch.sigmoid(2 * offset)
    return step if kind == "sigmoid" else step + 0.002 * offset


def spherical_harmonics(directions: Tensor, degree: int) -> Tensor:
    """(E, 3) unit vectors → (E, (degree+1)²): real Y_lm for l = 0 .. degree.

    e3nn's convention: y is the polar axis, m runs from -l to l, `component` normalisation
    (Σ_m Y_lm² = 2l+1). Zero vectors are not accepted here: for them only Y_00 = 1 survives.
    """
    x, y, z = directions.unbind(1)
    # cosines and sines of mφ times sinθ^m, as real and imaginary parts of (z + ix)^m
    cosine, sine = [torch.ones_like(x)], [torch.zeros_like(x)]
    for _ in range(degree):
        c, s = cosine[-1], sine[-1]
        cosine.append(c * z - s * x)
        sine.append(c * x + s * z)
    # associated Legendre functions of y, each divided by sinθ^m
    legendre: dict[tuple[int, int], Tensor] = {}
    for m in range(degree + 1):
        legendre[m, m] = torch.full_like(y, math.prod(range(1, 2 * m, 2)))
        if m < degree:
            legendre[m + 1, m] = (2 * m + 1) * y * legendre[m, m]
        for l in range(m + 2, degree + 1):
            legendre[l, m] = (
                (2 * l - 1) * y * legendre[l - 1, m] - (l + m - 1) * legendre[l - 2, m]
            ) / (l - m)
    columns = []
    for l in range(degree + 1):
        for m in range(-l, l + 1):
            a = abs(m)
            norm = math.sqrt((2 * l + 1) * math.factorial(l - a) / math.factorial(l + a))
            angular = sine[a] if m < 0 else cosine[a]
            norm *= math.sqrt(2) if m else 1
            columns.append(norm * legendre[l, a] * angular)
    return torch.stack(columns, dim=1)


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


def bond_orientational_order(legendre: Tensor, weights: Tensor, degree: int) -> Tensor:
    """(N, degree+1): Steinhardt's q_l of each atom, from its row's Legendre matrices.

    By the addition theorem Σ_m (mean_e Y_lm/√(2l+1))² is the mean of P_l(cos θ) over all pairs of
    edges of the row, so no harmonics are needed. weights (N, K) weigh the mean: the reference's
    are 1 for every edge, the self-edge too. The square is held above 1e-6, as in the reference.
    """
    pairs = (weights.unsqueeze(1) @ legendre[:degree] @ weights.unsqueeze(2)).flatten(1)  # (l, N)
    order = (pairs.T / weights.sum(1, keepdim=True) ** 2).clamp(min=1e-6).sqrt()
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
