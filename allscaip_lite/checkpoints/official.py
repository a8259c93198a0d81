"""The official checkpoints: fairchem's names, options and units, and ours.

In: a `.pt` file as fairchem writes it for inference, a `torch.save` pickle of
`MLIPInferenceCheckpoint`. Out: our configuration and weights; and the way back. Files are read by
`unpickler`, which runs no code of theirs, and written without fairchem.
"""

from __future__ import annotations

import io
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from allscaip_lite.checkpoints.unpickler import (
    CHECKPOINT_CLASS,
    CHECKPOINT_MODULE,
    Record,
    read_torch_file,
    to_plain,
)
from allscaip_lite.config import AllScAIPConfig
from allscaip_lite.errors import CheckpointError, InputError
from allscaip_lite.model import UNITS, AllScAIP, check_model


def check_weights(expected: Mapping[str, Tensor], found: Mapping[str, object], source: str) -> None:
    """Raise `CheckpointError`, naming them, for tensors missing, left over or misshapen."""
    complaints = []
    for complaint, names in (
        (f"{source} lacks", expected.keys() - found.keys()),
        ("its configuration does not know", found.keys() - expected.keys()),
    ):
        if names:
            some = ", ".join(sorted(names)[:8]) + (" …" if len(names) > 8 else "")
            complaints.append(f"{complaint} {len(names)} tensors: {some}")
    if complaints:
        raise CheckpointError("weights and configuration misfit: " + "; ".join(complaints))
    for name, value in expected.items():
        other = found[name]
        if not isinstance(other, Tensor) or other.shape != value.shape:
            shape = tuple(other.shape) if isinstance(other, Tensor) else type(other).__name__
            raise CheckpointError(
                f"{source}: {name} has shape {shape}, and its configuration asks for "
                f"{tuple(value.shape)}"
            )


def check_numbers(state: Mapping[str, Tensor], source: str) -> None:
    """Raise `CheckpointError`, naming it, for a weight that is no finite floating-point number."""
    for name, value in state.items():
        if not value.is_floating_point():
            kind = str(value.dtype).removeprefix("torch.")
            raise CheckpointError(f"{source}: {name} holds numbers of type {kind}, not weights")
        if not bool(value.isfinite().all()):
            raise CheckpointError(f"{source}: {name} holds numbers that are not finite")
        if name in UNITS and name.endswith("scale") and not bool(value > 0):
            raise CheckpointError(f"{source}: {name} is {float(value):g}, and must be positive")


# --- the official names of weights ------------------------------------------------------------

_INPUT, _BLOCK = "backbone.input_block.", "backbone.transformer_blocks.{i}."
_NEIGHBORHOOD = f"{_BLOCK}neighborhood_attention."
_PROJECTIONS = {
    "query": "attn_in_proj_q",
    "key": "attn_in_proj_k",
    "value": "attn_in_proj_v",
    "output": "attn_out_proj",
}
_FEED_FORWARD = {"norm": "ffn_norm", "expand": "ffn.0.0", "contract": "ffn.1.0"}


def _within(ours: str, official: str, parts: Mapping[str, str]) -> dict[str, str]:
    return {f"{ours}.{part}": f"{official}.{name}" for part, name in parts.items()}


# Our module or parameter → its official name. {i} is the block, {energy} and {forces} the heads.
OFFICIAL_NAMES = {
    "input.atom_embedding": f"{_INPUT}atomic_embedding",
    "input.charge_embedding": f"{_INPUT}charge_embedding.rand_emb",
    "input.spin_embedding": f"{_INPUT}spin_embedding.rand_emb",
    "input.charge_spin": f"{_INPUT}charge_spin_linear.0",
    "input.bond_order": f"{_INPUT}node_direction_embedding.0",
    "input.norm": f"{_INPUT}node_norm",
    "input.node": f"{_INPUT}node_linear.0",
    "input.edge_attributes": f"{_INPUT}edge_attr_linear.0",
    "input.edge": f"{_INPUT}edge_feature_linear.0",
    "blocks.{i}.source_norm": f"{_NEIGHBORHOOD}src_attn_norm",
    "blocks.{i}.destination_norm": f"{_NEIGHBORHOOD}dst_attn_norm",
    "blocks.{i}.node_norm": f"{_BLOCK}node_attention.node_norm",
    "blocks.{i}.rotary_weight": f"{_BLOCK}node_attention.radial_weight",
    **_within("blocks.{i}.source_attention", f"{_NEIGHBORHOOD}src_attn", _PROJECTIONS),
    **_within("blocks.{i}.destination_attention", f"{_NEIGHBORHOOD}dst_attn", _PROJECTIONS),
    **_within("blocks.{i}.node_attention", f"{_BLOCK}node_attention", _PROJECTIONS),
    **_within("blocks.{i}.edge_ffn", f"{_BLOCK}edge_ffn", _FEED_FORWARD),
    **_within("blocks.{i}.node_ffn", f"{_BLOCK}node_ffn", _FEED_FORWARD),
    "blocks.{i}.scale.source": f"{_NEIGHBORHOOD}src_attn_res_scale",
    "blocks.{i}.scale.destination": f"{_NEIGHBORHOOD}dst_attn_res_scale",
    "blocks.{i}.scale.node": f"{_BLOCK}node_attention.node_attn_res_scale",
    "blocks.{i}.scale.edge_ffn": f"{_BLOCK}edge_ffn.ffn_res_scale",
    "blocks.{i}.scale.node_ffn": f"{_BLOCK}node_ffn.ffn_res_scale",
    "energy_head.norm": "{energy}.node_norm",
    "energy_head.expand": "{energy}.energy_ffn.0.0",
    "energy_head.contract": "{energy}.energy_ffn.1.0",
    "force_head.norm": "{forces}.node_norm",
    "force_head.expand": "{forces}.force_ffn.0.0",
    "force_head.contract": "{forces}.force_ffn.1.0",
}


def official_names(model: AllScAIP, heads: Mapping[str, str]) -> dict[str, str]:
    """Our state-dict names → official ones. `heads` are the prefixes of "energy" and "forces".

    Left out is what an official file does not hold as weights: the units, and the SiLU basis.
    """
    names = {}
    for ours in model.state_dict():
        block = re.match(r"blocks\.(\d+)\.", ours)
        general = f"blocks.{{i}}.{ours[block.end() :]}" if block else ours
        parent, _, leaf = general.rpartition(".")
        if general in OFFICIAL_NAMES:
            official = OFFICIAL_NAMES[general]
        elif parent in OFFICIAL_NAMES:
            official = f"{OFFICIAL_NAMES[parent]}.{leaf}"
        elif ours in UNITS or parent == "input.distance_basis":
            continue
        else:
            raise KeyError(f"no official name for {ours}")
        names[ours] = official.format(i=block[1] if block else "", **heads)
    return names


# --- the official configuration ---------------------------------------------------------------


@dataclass(frozen=True)
class _Option:
    """An official backbone option that is a field of `AllScAIPConfig`, perhaps translated."""

    official: str
    ours: str
    default: Any = None  # the reference's; None: the option is required
    to_ours: Callable[[Any], Any] = lambda value: value
    to_official: Callable[[Any], Any] = lambda value: value


def _negated(value: Any) -> Any:
    return not value if isinstance(value, bool) else value  # which the configuration refuses


_DEGREE = (lambda size: size - 1, lambda degree: degree + 1)  # sizes count the degree 0
_NORMALIZATIONS = {"rmsnorm": "rms", "layernorm": "layer", "skip": "none"}
_OFFICIAL_NORMALIZATIONS = {ours: official for official, ours in _NORMALIZATIONS.items()}
_OPTIONS = (
    _Option("hidden_size", "hidden_size"),
    _Option("num_layers", "num_layers"),
    _Option("atten_num_heads", "num_heads"),
    _Option("max_num_elements", "max_num_elements"),
    _Option("max_radius", "cutoff", None, float),
    _Option("knn_k", "k"),
    _Option("knn_soft", "soft_rank", True),
    _Option("knn_use_low_mem", "truncated_rank", True),
    _Option("knn_sigmoid_scale", "rank_width", 0.2, float),
    _Option("knn_lse_scale", "envelope_temperature", 0.1, float),
    _Option("distance_function", "distance_basis", "gaussian"),
    _Option("edge_distance_expansion_size", "num_distance_basis", 512),
    _Option("edge_direction_expansion_size", "direction_degree", 6, *_DEGREE),
    _Option("node_direction_expansion_size", "bond_order_degree", 10, *_DEGREE),
    _Option("use_node_path", "node_attention", True),
    _Option("use_sincx_mask", "rotary", True),
    _Option("attn_num_freq", "num_rotary_frequencies", 32),
    _Option("activation", "activation", "gelu"),
    _Option(
        "normalization",
        "normalization",
        "rmsnorm",
        lambda name: _NORMALIZATIONS.get(name, name),
        _OFFICIAL_NORMALIZATIONS.__getitem__,
    ),
    _Option("use_residual_scaling", "residual_scaling", True),
    _Option("ffn_hidden_layer_multiplier", "ffn_ratio", 2),
    _Option("atten_dropout", "attention_dropout", 0.0, float),
    _Option("mlp_dropout", "ffn_dropout", 0.0, float),
    _Option("direct_forces", "conservative", None, _negated, _negated),
    _Option("regress_stress", "stress", False),
)
# Options of the reference that this package has one answer to.
_FIXED = {"use_envelope": True, "energy_reduce": "sum"}
# Options that change how numbers are computed, not which; and some that the reference ignores but
# its training configurations write.
_INERT = frozenset(
    "model regress_forces use_compile use_padding dataset_list single_system_no_padding max_atoms "
    "max_batch_size knn_pad_size use_chunked_graph graph_chunk_size preprocess_on_cpu atten_name "
    "float32_matmul_precision use_pbc use_pbc_single otf_graph cutoff_radius max_neighbors "
    "max_neighbors_pad_size".split()
)
_BACKBONES = ("AllScAIPBackbone", "AllScAIP_backbone")
_HEADS = {
    "AllScAIPEnergyHead": "energy",
    "AllScAIP_energy_head": "energy",
    "AllScAIPGradientEnergyForceStressHead": "energy",
    "AllScAIP_grad_energy_force_stress_head": "energy",
    "AllScAIPDirectForceHead": "forces",
    "AllScAIP_direct_force_head": "forces",
}
_WRAPPERS = ("DatasetSpecificSingleHeadWrapper",)


def config_from_official(backbone: Mapping[str, Any]) -> AllScAIPConfig:
    """Our configuration for an official `model_config["backbone"]`.

    Raises `CheckpointError` for options that are missing, unknown or out of reach here.
    """
    model = str(backbone.get("model", "")).rpartition(".")[2]
    if model not in _BACKBONES:
        raise CheckpointError(f"its backbone is {model or 'not named'}, not AllScAIP")
    values: dict[str, Any] = {}
    known = {option.official for option in _OPTIONS} | _FIXED.keys() | _INERT
    known |= {"use_freq_mask", "freequency_list", "output_hidden_layer_multiplier"}
    unknown = sorted(key for key in backbone.keys() - known if backbone[key])  # switched on
    if unknown:
        raise CheckpointError(
            f"its configuration has options that this package does not know: {', '.join(unknown)}"
        )
    for option in _OPTIONS:
        value = backbone.get(option.official, option.default)
        if value is None:
            raise CheckpointError(f"its configuration lacks {option.official}")
        values[option.ours] = option.to_ours(value)
    for key, only in _FIXED.items():
        if backbone.get(key, only) != only:
            raise CheckpointError(f"{key} = {backbone[key]!r}: only {only!r} is known here")
    if values["ffn_ratio"] != backbone.get("output_hidden_layer_multiplier", 2):
        raise CheckpointError(
            "ffn_hidden_layer_multiplier and output_hidden_layer_multiplier differ: not known here"
        )
    channels = backbone.get("freequency_list", (20, 10, 4, 10, 20))
    values["angular_channels"] = tuple(channels) if backbone.get("use_freq_mask", True) else None
    try:
        return AllScAIPConfig(**values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"its configuration is not possible: {error}") from error


def config_to_official(config: AllScAIPConfig) -> dict[str, Any]:
    """The official `model_config["backbone"]` of a configuration; inverse of the above.

    Raises `InputError` for what the reference cannot do.
    """
    if config.smooth_bond_order or config.bond_order_softness:
        raise InputError(
            "smooth_bond_order and bond_order_softness are this package's own, the reference would "
            "give other numbers: to export a model, train it with smooth_bond_order=False and "
            "bond_order_softness=0"
        )
    backbone = {
        "model": "fairchem.core.models.allscaip.AllScAIP.AllScAIPBackbone",
        "regress_forces": True,
        "use_compile": False,
        "use_padding": False,
        "dataset_list": ["omol"],
        "max_atoms": 400,
        "max_batch_size": 96,
        # as soft ranks share places among equal distances, a row can be longer than k
        "knn_pad_size": config.max_neighbors or 2 * config.k,
        "atten_name": "math" if config.conservative else "memory_efficient",
        "output_hidden_layer_multiplier": config.ffn_ratio,
        "use_freq_mask": config.angular_channels is not None,
        **({"freequency_list": list(config.angular_channels)} if config.angular_channels else {}),
    }
    return backbone | {
        option.official: option.to_official(getattr(config, option.ours)) for option in _OPTIONS
    }


def _head_prefixes(heads: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Where the weights of the "energy" and "forces" heads are."""
    prefixes: dict[str, str] = {}
    for name, head in heads.items():
        kind = str(head.get("module", "")).rpartition(".")[2]
        prefix = f"output_heads.{name}"
        if "head_cls" in head and kind in _WRAPPERS:
            kind, prefix = str(head["head_cls"]).rpartition(".")[2], f"{prefix}.head"
        if kind not in _HEADS:
            raise CheckpointError(f"its head {name} is a {kind or '?'}: not known here")
        if _HEADS[kind] in prefixes:
            raise CheckpointError(f"it has two heads for {_HEADS[kind]}: not known here")
        prefixes[_HEADS[kind]] = prefix
    if "energy" not in prefixes:
        raise CheckpointError("it has no energy head")
    return prefixes


# --- the official tasks: units and element references -----------------------------------------


def _units_from_tasks(tasks: object, config: AllScAIPConfig) -> dict[str, Tensor]:
    """Scales, mean and element references out of `tasks_config`."""
    if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        raise CheckpointError("its tasks_config is not a list of tasks")
    datasets = sorted({name for task in tasks for name in task.get("datasets", ())})
    if len(datasets) > 1 and "omol" not in datasets:
        raise CheckpointError(f"it is made for several data sets: {', '.join(datasets)}")
    dataset = "omol" if "omol" in datasets else (datasets or [None])[0]
    chosen = {
        task["property"]: task for task in tasks if dataset in (task.get("datasets") or [dataset])
    }
    if "energy" not in chosen:
        raise CheckpointError("none of its tasks is the energy")
    means, scales = {}, {}
    for name, task in chosen.items():
        normalizer = task.get("normalizer") or {}
        try:
            means[name], scales[name] = float(normalizer["mean"]), float(normalizer["rmsd"])
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(
                f"the normaliser of its {name} is not a mean and an rmsd: {normalizer}"
            ) from None
    if means.get("forces") or means.get("stress"):
        raise CheckpointError("its forces or stresses have a mean other than zero")
    if config.stress and scales.get("stress", scales["energy"]) != scales["energy"]:
        raise CheckpointError("its stress is not in the units of its energy")
    references = torch.zeros(config.max_num_elements, dtype=torch.float64)
    values = _reference_values(chosen["energy"].get("element_references"))[: len(references)]
    references[: len(values)] = values
    return {
        "energy_scale": torch.tensor(scales["energy"], dtype=torch.float64),
        "energy_mean": torch.tensor(means["energy"], dtype=torch.float64),
        "force_scale": torch.tensor(scales.get("forces", scales["energy"]), dtype=torch.float64),
        "element_references": references,
        "charge_reference": torch.zeros((), dtype=torch.float64),  # it has none
    }


def _reference_values(node: Any) -> Tensor:
    """The list of energies (by atomic number) in a task's `element_references`."""
    kind = torch.float64
    while isinstance(node, dict):
        if str(node.get("_target_", "")).endswith("FloatTensor"):
            kind = torch.float32
        node = node["_args_"][0] if node.get("_args_") else node.get("element_references", ())
    if node is None:
        return torch.zeros(0, dtype=torch.float64)
    if isinstance(node, Tensor):
        return node.double()
    try:
        return torch.tensor(list(node), dtype=kind).double()
    except (TypeError, ValueError):
        raise CheckpointError("its element references are not a list of energies") from None


def _tasks_for(model: AllScAIP) -> list[dict[str, Any]]:
    unit = "fairchem.core.units.mlip_unit.mlip_unit."
    normalization = "fairchem.core.modules.normalization."
    outputs = [
        ("energy", "system", [1], float(model.energy_mean), float(model.energy_scale)),
        ("forces", "atom", [3], 0.0, float(model.force_scale)),
    ]
    if model.config.conservative and model.config.stress:
        outputs.append(("stress", "system", [1, 9], 0.0, float(model.energy_scale)))
    tasks = [
        {
            "_target_": f"{unit}Task",
            "name": f"omol_{name}",
            "level": level,
            "property": name,
            "out_spec": {"dim": shape, "dtype": "float32"},
            "normalizer": {
                "_target_": f"{normalization}normalizer.Normalizer",
                "mean": mean,
                "rmsd": rmsd,
            },
            "datasets": ["omol"],
        }
        for name, level, shape, mean, rmsd in outputs
    ]
    tasks[0]["element_references"] = {
        "_target_": f"{normalization}element_references.ElementReferences",
        "element_references": {
            "_target_": "torch.DoubleTensor",
            "_args_": [model.element_references.tolist()],
        },
    }
    return tasks


# --- official files ---------------------------------------------------------------------------


def read_official(path: str | Path) -> tuple[AllScAIPConfig, dict[str, Tensor]]:
    """Configuration and state dict, in our names, of an official file; its EMA weights.

    Raises `CheckpointError` for a file that is not understood, naming what, and
    `UnsafeCheckpointError` for a pickle that contains more than data.
    """
    path = Path(path)
    checkpoint = read_torch_file(path)
    if not isinstance(checkpoint, Record) or not checkpoint.class_name.endswith(CHECKPOINT_CLASS):
        kind = type(checkpoint).__name__
        raise CheckpointError(
            f"{path.name} holds a {kind}, not the {CHECKPOINT_CLASS} that fairchem writes"
        )
    try:
        return _from_record(checkpoint, path.name, path.stat().st_size)
    except CheckpointError as error:
        raise CheckpointError(f"{path.name}: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path.name} is damaged, or not from fairchem ({type(error).__name__}: {error})"
        ) from error


def _from_record(
    checkpoint: Record, source: str, size: int
) -> tuple[AllScAIPConfig, dict[str, Tensor]]:
    """Configuration and weights of a file of `size` bytes that messages call `source`."""
    model_config, tasks = to_plain(checkpoint.model_config), to_plain(checkpoint.tasks_config)
    if not isinstance(model_config, dict) or not {"backbone", "heads"} <= model_config.keys():
        raise CheckpointError("its model_config has no backbone and heads")
    config = config_from_official(model_config["backbone"])
    heads = _head_prefixes(model_config["heads"])
    if not config.conservative and "forces" not in heads:
        raise CheckpointError("it is a model of direct forces without a force head")
    weights = {
        re.sub(r"^(module\.)+", "", name): value
        for name, value in checkpoint.ema_state_dict.items()
        if name != "n_averaged"
    }
    with torch.device("meta"):
        skeleton = AllScAIP(config)
    names, expected = official_names(skeleton, heads), skeleton.state_dict()
    check_weights({official: expected[ours] for ours, official in names.items()}, weights, source)
    state = {ours: weights[official] for ours, official in names.items()}
    if sum(value.nbytes for value in state.values()) > size:  # one storage, again and again
        raise CheckpointError("its weights are larger than the file")
    state = {name: value.clone() for name, value in state.items()}
    state |= _units_from_tasks(tasks, config)
    if config.distance_basis == "silu":
        warnings.warn(
            "the reference draws the weights of its SiLU distance basis anew at every call and "
            "stores none: this model has drawn its own, once",
            stacklevel=4,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            basis = nn.Linear(2, config.num_distance_basis)
        dtype = state["input.atom_embedding.weight"].dtype
        state |= {f"input.distance_basis.{k}": v.to(dtype) for k, v in basis.state_dict().items()}
    return config, state


def save_official(model: AllScAIP, path: str | Path) -> Path:
    """Write a model as fairchem writes its checkpoints for inference; fairchem is not needed.

    `FAIRChemCalculator.from_model_checkpoint(path, task_name="omol")` loads the file and gives the
    same numbers. Raises `InputError` for the SiLU distance basis, whose weights the official format
    has no place for, and for the smooth bond-orientational order, unknown to the reference.
    """
    check_model(model)
    config = model.config
    if config.distance_basis == "silu":
        raise InputError(
            "the official format has no place for the weights of the SiLU distance basis"
        )
    if model.charge_reference != 0:
        raise InputError(
            "the official format has no place for the energy of a unit of charge, "
            f"{float(model.charge_reference):.3f} eV: model.charge_reference.zero_() takes it off, "
            "and off the energy of every ion"
        )
    allscaip = "fairchem.core.models.allscaip.AllScAIP."
    heads: dict[str, dict[str, Any]] = {}
    prefixes: dict[str, str] = {}
    classes = {"energy": "AllScAIPEnergyHead", "forces": "AllScAIPDirectForceHead"}
    if config.conservative:
        classes = {"energy": "AllScAIPGradientEnergyForceStressHead"}
    for output, head in classes.items():
        heads[f"{output}_head"] = {
            "module": "fairchem.core.models.uma.escn_moe.DatasetSpecificSingleHeadWrapper",
            "head_cls": allscaip + head,
            "head_kwargs": {"wrap_property": False} if config.conservative else {},
            "dataset_names": ["omol"],
        }
        prefixes[output] = f"output_heads.{output}_head.head"
    state = model.state_dict()
    weights = {
        official: state[ours].detach().cpu()
        for ours, official in official_names(model, prefixes).items()
    }
    fields = {
        "model_config": {
            "_target_": "fairchem.core.models.base.HydraModel",
            "backbone": config_to_official(config),
            "heads": heads,
            "pass_through_head_outputs": True,
        },
        "model_state_dict": weights,
        "ema_state_dict": {
            "n_averaged": torch.tensor(1),
            **{f"module.{name}": value for name, value in weights.items()},
        },
        "tasks_config": _tasks_for(model),
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _save_as_dataclass(fields, CHECKPOINT_MODULE, CHECKPOINT_CLASS, path)
    return path


def _save_as_dataclass(fields: dict[str, Any], module: str, name: str, path: Path) -> None:
    """`torch.save` of an object of a class that is named, not imported, with these fields.

    A pickle is a little program; around the one that makes the dictionary of fields go the
    instructions "make an object of this class" before it and "give it this state" after it.
    """
    buffer = io.BytesIO()
    torch.save(fields, buffer, pickle_protocol=2)
    with zipfile.ZipFile(buffer) as saved, zipfile.ZipFile(path, "w") as archive:
        for entry in saved.namelist():
            content = saved.read(entry)
            if entry.endswith("/data.pkl"):
                header, body = content[:2], content[2:-1]  # between PROTO 2 and STOP
                make = pickle.GLOBAL + f"{module}\n{name}\n".encode()
                make += pickle.EMPTY_TUPLE + pickle.NEWOBJ
                content = header + make + body + pickle.BUILD + pickle.STOP
            archive.writestr(entry, content)
