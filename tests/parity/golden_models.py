"""Small models whose weights follow from their official names: the same without fairchem.

In: a name of `MODELS`. Out: an `AllScAIP`. The weights are drawn with NumPy's `RandomState`, whose
streams are the same in every version, from a seed that is the checksum of fairchem's name of the
weight. So they stay where they are when this package renames its own.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import torch

from allscaip_lite import AllScAIP, AllScAIPConfig
from allscaip_lite.checkpoints.official import official_names

FOLDER = Path(__file__).parent / "golden"
STRUCTURES = FOLDER / "structures.extxyz"
ANSWERS = FOLDER / "answers.json"
OFFICIAL = FOLDER / "official.pt"  # written by fairchem, read here

_SMALL = AllScAIPConfig(
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    max_num_elements=40,
    k=12,
    num_distance_basis=64,
    angular_channels=(5, 4, 1, 3, 3),
    num_rotary_frequencies=16,
)
MODELS = {
    "conservative": _SMALL,
    "direct": _SMALL.replace(conservative=False, stress=False, k=30),
    "no encodings": _SMALL.replace(angular_channels=None, rotary=False, k=20, cutoff=5.0),
}
# the prefixes that `save_official` gives to the heads
_HEADS = {name: f"output_heads.{name}_head.head" for name in ("energy", "forces")}


def _center_and_width(name: str, shape: torch.Size) -> tuple[float, float]:
    """Of the uniform distribution of a weight: every bias, scale and norm has a visible effect."""
    if name.endswith("res_scale"):
        return 0.4, 0.2
    if "norm" in name and name.endswith("weight"):
        return 1.0, 0.4
    if name.endswith("bias"):
        return 0.0, 0.4
    if name.endswith("radial_weight"):
        return 0.0, 0.9
    if "embedding" in name and name.endswith(("rand_emb.weight", "atomic_embedding.weight")):
        return 0.0, 1.2
    return 0.0, (3 / shape[-1]) ** 0.5  # variance one over the number of inputs


def golden_model(name: str, dtype: torch.dtype = torch.float64) -> AllScAIP:
    """One of `MODELS`, in evaluation mode; its weights are numbers that float32 holds."""
    model = AllScAIP(MODELS[name])
    state = model.state_dict()
    for ours, official in official_names(model, _HEADS).items():
        shape = state[ours].shape
        center, width = _center_and_width(official, shape)
        draws = np.random.RandomState(zlib.crc32(f"{name}/{official}".encode()))
        values = draws.uniform(center - width, center + width, shape)
        state[ours].copy_(torch.as_tensor(values))
    with torch.no_grad():
        model.energy_scale.fill_(1.4)
        model.energy_mean.fill_(-0.25)
        model.force_scale.fill_(1.4 if model.config.conservative else 2.5)
        atomic_numbers = torch.arange(model.config.max_num_elements, dtype=torch.float64)
        model.element_references.copy_(-3.0 * atomic_numbers)
    return model.to(dtype).eval()
