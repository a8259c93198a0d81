"""The reference implementation as an oracle: official-format checkpoints with random weights.

In: architecture options in the reference's own spelling. Out: a `.pt` file as fairchem writes it
(an `MLIPInferenceCheckpoint`), fairchem's ASE calculator for it, and fairchem's energies, forces
and stresses in float32 or float64. Needs `fairchem-core==2.24.0`; used by the parity tests and,
as a script, to make a file by hand:

    python tests/parity/reference.py out.pt --layers 4 --hidden 128 --heads 4 --direct
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import ase
import hydra
import numpy as np
import torch
from fairchem.core import FAIRChemCalculator
from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch
from fairchem.core.models.allscaip import AllScAIP as reference_model
from fairchem.core.models.allscaip.utils import allscaip_radius_graph as reference_graph
from fairchem.core.models.allscaip.utils import data_preprocess as reference_preprocess
from fairchem.core.units.mlip_unit import MLIPPredictUnit
from fairchem.core.units.mlip_unit.api.inference import (
    InferenceSettings,
    MLIPInferenceCheckpoint,
)
from omegaconf import OmegaConf

MODEL = "fairchem.core.models.allscaip.AllScAIP."
UNIT = "fairchem.core.units.mlip_unit.mlip_unit."
NORMALIZATION = "fairchem.core.modules.normalization."
SINGLE_HEAD = "fairchem.core.models.uma.escn_moe.DatasetSpecificSingleHeadWrapper"
RMSD = 1.433569  # eV, the normaliser of the OMol25 models


@dataclass(frozen=True)
class Reference:
    """Of B systems: energies (B,) eV, forces [(n, 3)] eV/Å, and stresses [(3, 3)] eV/Å³ or None."""

    energies: np.ndarray
    forces: list[np.ndarray]
    stresses: list[np.ndarray] | None


def frequency_list(head_size: int) -> list[int]:
    """Channels of each degree l = 0..4 that add up to `head_size`, shared out as 5:2:1:3:5."""
    shares = np.array([5, 2, 1, 3, 5])
    counts = head_size * shares // shares.sum()
    counts[0] += head_size - counts.sum()
    return [int(count) for count in counts]


def backbone_config(
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    direct: bool = False,
    stress: bool = False,
    **options: object,
) -> dict[str, object]:
    """The `backbone` part of an official `model_config`; `options` are the reference's own keys."""
    config: dict[str, object] = {
        "model": MODEL + "AllScAIPBackbone",
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "direct_forces": direct,
        "regress_forces": True,
        "regress_stress": stress,
        "use_compile": False,
        "use_padding": False,
        "dataset_list": ["omol"],
        "use_node_path": True,
        "use_freq_mask": True,
        "use_sincx_mask": True,
        "max_num_elements": 110,
        "max_batch_size": 96,
        "max_atoms": 400,
        "max_radius": 6.0,
        "knn_k": 30,
        "knn_soft": True,
        "knn_sigmoid_scale": 0.2,
        "knn_lse_scale": 0.1,
        "knn_use_low_mem": True,
        "knn_pad_size": 50,
        "atten_name": "math",
        "atten_num_heads": num_heads,
        "freequency_list": frequency_list(hidden_size // num_heads),
    }
    return config | options


def heads_config(direct: bool) -> dict[str, object]:
    """The `heads` part: two plain heads for direct forces, one wrapped head for conservative."""
    if direct:
        return {
            "oc20_energy": {"module": MODEL + "AllScAIPEnergyHead"},
            "forces": {"module": MODEL + "AllScAIPDirectForceHead"},
        }
    return {
        "energyandforcehead": {
            "module": SINGLE_HEAD,
            "head_cls": MODEL + "AllScAIPGradientEnergyForceStressHead",
            "head_kwargs": {"wrap_property": False},
            "dataset_names": ["omol"],
        }
    }


def tasks_config(
    direct: bool,
    stress: bool = False,
    energy_mean: float = 0.0,
    energy_rmsd: float = RMSD,
    force_rmsd: float = RMSD,
) -> list[dict[str, object]]:
    """The tasks: the name and normaliser of each output, and the energy's element references."""
    generator = np.random.default_rng(7)
    references = [0.0, *(-13.6 * np.arange(1, 110) ** 2.1 + generator.normal(size=109)).tolist()]
    names = {"energy": "oc20_energy", "forces": "forces"} if direct else {}
    kinds = {
        "energy": ("system", [1], energy_mean, energy_rmsd),
        "forces": ("atom", [3], 0.0, force_rmsd),
        "stress": ("system", [1, 9], 0.0, energy_rmsd),
    }
    tasks = []
    for kind in ("energy", "forces", "stress") if stress else ("energy", "forces"):
        level, dimension, mean, rmsd = kinds[kind]
        task: dict[str, object] = {
            "_target_": UNIT + "Task",
            "name": names.get(kind, f"omol_{kind}"),
            "level": level,
            "property": kind,
            "loss_fn": {
                "_target_": "fairchem.core.modules.loss.DDPMTLoss",
                "loss_fn": {"_target_": "fairchem.core.modules.loss.MAELoss"},
                "coefficient": 10,
            },
            "out_spec": {"dim": dimension, "dtype": "float32"},
            "normalizer": {
                "_target_": NORMALIZATION + "normalizer.Normalizer",
                "mean": mean,
                "rmsd": rmsd,
            },
            "datasets": ["omol"],
            "metrics": ["mae"],
        }
        if kind == "energy":
            task["element_references"] = {
                "_target_": NORMALIZATION + "element_references.ElementReferences",
                "element_references": {"_target_": "torch.DoubleTensor", "_args_": [references]},
            }
        tasks.append(task)
    return tasks


def randomise(model: torch.nn.Module, seed: int, gain: float = 1.0) -> None:
    """Draw every parameter anew, so that no bias, scale or mixing weight is silent in a test."""
    generator = torch.Generator().manual_seed(seed)

    def normal(parameter: torch.Tensor, scale: float) -> torch.Tensor:
        return scale * torch.randn(parameter.shape, generator=generator)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("res_scale"):
                if parameter.requires_grad:  # fixed at one where residual scaling is off
                    parameter.copy_(0.4 + normal(parameter, 0.1))
            elif name.endswith("radial_weight"):
                parameter.copy_(normal(parameter, 0.5))
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(1.0 + normal(parameter, 0.2))
            elif name.endswith("bias"):
                parameter.copy_(normal(parameter, 0.2))
            elif "embedding" in name and parameter.shape[0] in (101, 110, 201):
                parameter.copy_(normal(parameter, 0.7))
            else:
                parameter.copy_(normal(parameter, gain * parameter.shape[-1] ** -0.5))


def make_checkpoint(
    path: str | Path,
    *,
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 4,
    direct: bool = False,
    stress: bool = False,
    seed: int = 0,
    gain: float = 1.0,
    omegaconf: bool = False,
    energy_mean: float = 0.0,
    energy_rmsd: float = RMSD,
    force_rmsd: float = RMSD,
    **options: object,
) -> Path:
    """Write an official-format checkpoint with random weights and return its path.

    `options` are backbone keys in the reference's spelling (`knn_k`, `use_freq_mask`,
    `use_sincx_mask`, `use_node_path`, `normalization`, `activation`, `distance_function`, …).
    With `omegaconf` the configurations are OmegaConf containers, as training writes them.
    The plain weights differ from the EMA weights: only a reader that takes the EMA is right.
    """
    backbone = backbone_config(hidden_size, num_layers, num_heads, direct, stress, **options)
    model_config: dict[str, object] = {
        "_target_": "fairchem.core.models.base.HydraModel",
        "backbone": backbone,
        "heads": heads_config(direct),
        "pass_through_head_outputs": not direct,
    }
    tasks: object = tasks_config(direct, stress, energy_mean, energy_rmsd, force_rmsd)
    model = hydra.utils.instantiate(copy.deepcopy(model_config))
    randomise(model, seed, gain)
    averaged = {f"module.{name}": value.clone() for name, value in model.state_dict().items()}
    randomise(model, seed + 1)
    path = Path(path)
    torch.save(
        MLIPInferenceCheckpoint(
            model_config=OmegaConf.create(model_config) if omegaconf else model_config,
            model_state_dict={name: value.clone() for name, value in model.state_dict().items()},
            ema_state_dict={"n_averaged": torch.tensor(1), **averaged},
            tasks_config=OmegaConf.create(tasks) if omegaconf else tasks,
        ),
        path,
    )
    return path


def load_unit(
    path: str | Path, dtype: torch.dtype = torch.float32, slots: int | None = None
) -> MLIPPredictUnit:
    """fairchem's predict unit for a checkpoint, on the CPU.

    With `slots` the reference pads as in compiled training: rows of that many slots, and batches
    of `max_atoms` atoms. (Its inference settings switch padding off, whatever is asked for.)
    """
    logging.getLogger().setLevel(logging.ERROR)
    settings = InferenceSettings(base_precision_dtype=dtype, activation_checkpointing=False)
    unit = MLIPPredictUnit(str(path), device="cpu", inference_settings=settings)
    if slots is not None:
        backbone = unit.model.module.backbone
        backbone.global_cfg.use_padding = True
        backbone.molecular_graph_cfg.knn_pad_size = slots
    return unit


def load_calculator(path: str | Path) -> FAIRChemCalculator:
    """fairchem's ASE calculator for a checkpoint, float32 on the CPU."""
    return FAIRChemCalculator(load_unit(path), task_name="omol")


class _DoubleTorch:
    """The torch namespace, except that `float32` means float64.

    The reference casts to `torch.float32` in a few places whatever its dtype is; seen through
    this namespace the same code runs in float64 throughout.
    """

    float32 = torch.float64

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)


@contextlib.contextmanager
def _computing_in(dtype: torch.dtype) -> Iterator[None]:
    """Let the reference's modules compute in `dtype`, casts and default dtype included."""
    modules = (reference_model, reference_preprocess, reference_graph)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    if dtype == torch.float64:
        for module in modules:
            module.torch = _DoubleTorch()
    try:
        yield
    finally:
        torch.set_default_dtype(previous)
        for module in modules:
            module.torch = torch


@contextlib.contextmanager
def fixed_silu_basis(weight: torch.Tensor, bias: torch.Tensor) -> Iterator[None]:
    """Give the reference's SiLU distance basis these weights (K, 2) and (K,).

    The reference draws them at random at every call, so by itself it is no function at all.
    """
    smearing = reference_preprocess.SiLUSmearing

    def fixed(*arguments: object, **options: object) -> torch.nn.Module:
        basis = smearing(*arguments, **options)
        with torch.no_grad():
            basis.fc1.weight.copy_(weight)
            basis.fc1.bias.copy_(bias)
        return basis.requires_grad_(False)

    reference_preprocess.SiLUSmearing = fixed
    try:
        yield
    finally:
        reference_preprocess.SiLUSmearing = smearing


def predict(unit: MLIPPredictUnit, systems: Sequence[ase.Atoms]) -> Reference:
    """fairchem's answer for a batch of structures, in the dtype of the predict unit."""
    dtype = unit.inference_settings.base_precision_dtype
    with _computing_in(dtype):
        batch = atomicdata_list_to_batch(
            [
                AtomicData.from_ase(
                    atoms,
                    task_name="omol",
                    r_edges=False,
                    r_data_keys=["spin", "charge"],
                    target_dtype=dtype,
                )
                for atoms in systems
            ]
        )
        output = unit.predict(batch)
    counts = np.cumsum([len(atoms) for atoms in systems])[:-1]
    stress = output.get("stress")
    if stress is not None:
        stress = list(stress.detach().double().numpy().reshape(-1, 3, 3))
    return Reference(
        energies=output["energy"].detach().double().numpy().reshape(-1),
        forces=np.split(output["forces"].detach().double().numpy(), counts),
        stresses=stress,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Write an official-format random checkpoint.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--hidden", type=int, default=128, help="hidden size")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--k", type=int, default=30, help="knn_k")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gain", type=float, default=1.0, help="scale of the random matrices")
    parser.add_argument("--direct", action="store_true", help="direct forces")
    parser.add_argument("--stress", action="store_true", help="conservative forces and stress")
    parser.add_argument("--no-lae", action="store_true", help="no Legendre angular encoding")
    parser.add_argument("--no-erope", action="store_true", help="no Euclidean rotary encoding")
    parser.add_argument("--no-node-attention", action="store_true")
    parser.add_argument("--omegaconf", action="store_true", help="configs as OmegaConf containers")
    arguments = parser.parse_args()
    make_checkpoint(
        arguments.path,
        hidden_size=arguments.hidden,
        num_layers=arguments.layers,
        num_heads=arguments.heads,
        direct=arguments.direct,
        stress=arguments.stress,
        seed=arguments.seed,
        gain=arguments.gain,
        omegaconf=arguments.omegaconf,
        knn_k=arguments.k,
        use_freq_mask=not arguments.no_lae,
        use_sincx_mask=not arguments.no_erope,
        use_node_path=not arguments.no_node_attention,
    )


if __name__ == "__main__":
    main()
