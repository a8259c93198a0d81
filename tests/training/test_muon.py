"""Muon on a CPU against PyTorch's, and against the singular values it is about."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from allscaip_lite.training.muon import Muon, orthogonalized

SETTINGS = ((3.4445, -4.7750, 2.0315), 5, 1e-7)


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (32, 32), (1, 7)])
def test_singular_values_come_near_one_and_directions_stay(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    inside = left.T @ orthogonalized(matrix, *SETTINGS) @ right.T
    assert ((inside.diagonal() > 0.65) & (inside.diagonal() < 1.25)).all()
    assert (inside - inside.diagonal().diag()).abs().max() < 1e-9


def test_a_gradient_of_zeros_moves_nothing() -> None:
    assert (orthogonalized(torch.zeros(3, 5), *SETTINGS) == 0).all()


@pytest.mark.parametrize("nesterov", [True, False])
def test_the_steps_are_pytorchs(nesterov: bool) -> None:
    """Up to the rounding of bfloat16, with momentum, decay and its rule for sizes."""
    settings = {"weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw", "nesterov": nesterov}
    torch.manual_seed(0)
    start, gradients = torch.randn(20, 48), torch.randn(4, 20, 48)
    ends = []
    for kind in (Muon, torch.optim.Muon):
        weight = nn.Parameter(start.clone())
        optimizer = kind([weight], lr=0.02, **settings)
        for weight.grad in gradients:
            optimizer.step()
        ends.append(weight.detach() - start)
    assert ends[0].dtype == torch.float32
    assert (ends[0] - ends[1]).norm() < 0.02 * ends[1].norm()
    assert not torch.equal(*ends)
