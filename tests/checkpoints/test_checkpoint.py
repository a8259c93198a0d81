"""Files: ours and the official ones, hostile ones, and the model hub (a stand-in for it)."""

from __future__ import annotations

import contextlib
import copy
import functools
import http.server
import importlib
import io
import json
import os
import pickle
import posix
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ase.io
import huggingface_hub
import numpy as np
import pytest
import torch
from ase.build import molecule
from safetensors.torch import load_file, save_file

from allscaip_lite import cli
from allscaip_lite.checkpoints import (
    bundled_models,
    load_model,
    official,
    read_card,
    save_model,
    save_official,
    unpickler,
)
from allscaip_lite.checkpoints.native import OFFICIAL_FILES, download_official
from allscaip_lite.checkpoints.official import (
    config_from_official,
    config_to_official,
    official_names,
)
from allscaip_lite.checkpoints.unpickler import (
    CHECKPOINT_CLASS,
    CHECKPOINT_MODULE,
    Record,
    read_torch_file,
    to_plain,
)
from allscaip_lite.config import PRESETS, AllScAIPConfig
from allscaip_lite.errors import CheckpointError, InputError, UnsafeCheckpointError
from allscaip_lite.model import UNITS, AllScAIP

TINY = AllScAIPConfig(
    hidden_size=16, num_layers=1, num_heads=2, angular_channels=(3, 2, 1, 1, 1), k=8
)
VARIANTS = {
    "default": TINY,
    "direct": TINY.replace(conservative=False, num_layers=2),
    "no encodings": TINY.replace(angular_channels=None, rotary=False, stress=False),
    "no node attention": TINY.replace(node_attention=False, normalization="none"),
    "options": TINY.replace(
        normalization="layer",
        activation="smelu",
        distance_basis="linear_sigmoid",
        num_distance_basis=32,
        soft_rank=False,
        truncated_rank=False,
        rank_width=0.3,
        envelope_temperature=0.05,
        cutoff=5.0,
        direction_degree=3,
        bond_order_degree=6,
        num_rotary_frequencies=8,
        residual_scaling=False,
        ffn_ratio=3,
        attention_dropout=0.1,
        ffn_dropout=0.2,
    ),
}


def random_model(config: AllScAIPConfig = TINY) -> AllScAIP:
    torch.manual_seed(1)
    model = AllScAIP(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
        model.energy_scale.fill_(1.4)
        model.energy_mean.fill_(0.25)
        model.force_scale.fill_(1.4 if config.conservative else 2.0)
        model.element_references.copy_(-13.6 * torch.arange(config.max_num_elements) ** 2.1)
    return model.eval()


def ethanol():
    atoms = molecule("CH3CH2OH")
    atoms.info.update(charge=0, spin=1)
    return atoms


def assert_same_model(one: AllScAIP, other: AllScAIP) -> None:
    assert one.config == other.config
    theirs = other.state_dict()
    for name, value in one.state_dict().items():
        assert torch.equal(value, theirs[name]) and value.dtype == theirs[name].dtype, name
    for (name, value), mine in zip(other.named_parameters(), one.parameters(), strict=True):
        assert value.requires_grad == mine.requires_grad, name
    # in float64 and by the same operations: float32 differs in its last digits from one to another,
    # and with the alignment of the weights in memory
    doubled = [copy.deepcopy(model).double() for model in (one, other)]
    doubled[1].operations = doubled[0].operations
    (a,), (b,) = (model.predict([ethanol()]) for model in doubled)
    assert a.energy == pytest.approx(b.energy, rel=1e-12)
    np.testing.assert_allclose(a.forces, b.forces, rtol=1e-9, atol=1e-9)


# --- our files --------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_safetensors_there_and_back(tmp_path: Path, variant: str) -> None:
    model = random_model(VARIANTS[variant])
    card = {"data": "none", "errors": {"energy": [0.1, 2]}}
    path = save_model(model, tmp_path / "new" / "model.safetensors", card)
    loaded = load_model(path)
    assert not loaded.training
    assert_same_model(model, loaded)
    assert read_card(path) == card


def test_silu_basis_is_kept(tmp_path: Path) -> None:
    model = random_model(TINY.replace(distance_basis="silu"))
    assert_same_model(model, load_model(save_model(model, tmp_path / "m.safetensors")))


def test_energy_of_charge_is_kept(tmp_path: Path) -> None:
    model = random_model()
    model.charge_reference.fill_(-4.7)
    assert_same_model(model, load_model(save_model(model, tmp_path / "m.safetensors")))


def test_load_as_another_dtype_keeps_the_references_exact(tmp_path: Path) -> None:
    model = random_model()
    path = save_model(model, tmp_path / "m.safetensors")
    double = load_model(str(path), device="cpu", dtype=torch.float64)
    assert double.dtype == torch.float64 and load_model(path).dtype == torch.float32
    for kind in (torch.float16, torch.bfloat16, torch.int8, "float32"):
        with pytest.raises(InputError, match=f"number type {kind}: .*need torch.float32"):
            load_model(path, dtype=kind)
    with pytest.raises(InputError, match=r"number type torch\.bfloat16"):
        double.bfloat16().predict(molecule("H2O"))
    for loaded in (double, double.float()):
        assert torch.equal(loaded.element_references, model.element_references)


def test_loading_draws_no_random_numbers(tmp_path: Path) -> None:
    path = save_model(random_model(), tmp_path / "m.safetensors")
    torch.manual_seed(5)
    load_model(path)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert drawn == torch.rand(1)


def rewrite(path: Path, change: Callable[[dict, dict], None]) -> Path:
    """The same `.safetensors` file with its tensors and metadata changed."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    change(state, metadata)
    save_file(state, path, metadata)
    return path


def _config(metadata: dict, **changes: object) -> None:
    metadata["config"] = json.dumps(json.loads(metadata["config"]) | changes)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda state, meta: state.pop("input.norm.weight"), r"lacks 1 tensors: input\.norm\.w"),
        (lambda state, meta: state.update(extra=torch.ones(1)), "does not know 1 tensors: extra"),
        (lambda state, meta: state.update({"input.norm.weight": torch.ones(3)}), r"shape \(3,\)"),
        (lambda state, meta: meta.update(format="other"), "no allscaip-lite model"),
        (lambda state, meta: meta.update(format_version="99"), "newer version"),
        (lambda state, meta: _config(meta, wings=2), "wings"),
        (lambda state, meta: _config(meta, hidden_size=7), "multiple"),
        (lambda state, meta: meta.update(seen="[1]"), "what was seen is a list"),
        (lambda state, meta: meta.update(seen='{"elements": ["Qq"]}'), "elements of what was seen"),
        (lambda state, meta: meta.update(seen='{"atoms": "many"}'), "atoms of what was seen"),
        (lambda state, meta: meta.update(seen='{"atoms": -1}'), "atoms of what was seen is -1"),
        (lambda state, meta: meta.update(seen='{"closest": NaN}'), "closest of what was seen"),
        (lambda state, meta: meta.update(seen='{"charges": [true]}'), "charges of what was seen"),
        (lambda state, meta: meta.update(seen='{"kinds": ["all"]}'), "kinds of what was seen"),
    ],
)
def test_wrong_safetensors(tmp_path: Path, change: Callable, complaint: str) -> None:
    path = rewrite(save_model(random_model(), tmp_path / "m.safetensors"), change)
    with pytest.raises(CheckpointError, match=complaint):
        load_model(path)


def test_damaged_safetensors(tmp_path: Path) -> None:
    path = save_model(random_model(), tmp_path / "m.safetensors")
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(CheckpointError, match="damaged"):
        load_model(path)


def test_save_model_wants_a_safetensors_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="safetensors"):
        save_model(random_model(), tmp_path / "m.pt")


# --- names ------------------------------------------------------------------------------------


def test_bundled_models_load() -> None:
    for name in bundled_models():
        assert load_model(name).predict([ethanol()])[0].forces.shape == (9, 3)
        assert isinstance(read_card(name), dict)


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(InputError, match="allscaip-md-conserving-all-omol"):
        load_model("allscaip-md-conservative-omol")
    with pytest.raises(InputError, match="Did you mean"):
        load_model("xyzzy")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file"):
        load_model(tmp_path / "nothing.safetensors")
    with pytest.raises(FileNotFoundError, match="no file ~no-such-user/"):
        load_model("~no-such-user/a.safetensors")
    with pytest.raises(FileNotFoundError, match=r"load_model\('allscaip-md-direct-all-omol'\)"):
        load_model(tmp_path / "AllScAIP-OMol102M-md-d.pt")
    with pytest.raises(IsADirectoryError, match="folder"):
        load_model(tmp_path)


# --- official files ---------------------------------------------------------------------------


EXPORTED = [c.replace(smooth_bond_order=False, bond_order_softness=0.0) for c in PRESETS.values()]


@pytest.mark.parametrize("config", [*VARIANTS.values(), *EXPORTED])
def test_configuration_there_and_back(config: AllScAIPConfig) -> None:
    options = config_to_official(config)
    assert config_from_official(options) == config
    assert json.loads(json.dumps(options)) == options  # plain values only


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_weight_has_its_own_official_name(variant: str) -> None:
    model = random_model(VARIANTS[variant])
    names = official_names(model, {"energy": "E", "forces": "F"})
    assert names.keys() == model.state_dict().keys() - set(UNITS)
    assert len(set(names.values())) == len(names)
    assert not any("{" in name for name in names.values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_official_file_there_and_back(tmp_path: Path, variant: str) -> None:
    model = random_model(VARIANTS[variant])
    loaded = load_model(save_official(model, tmp_path / "official.pt"))
    assert_same_model(model, loaded)


@pytest.mark.slow
def test_official_files_need_no_fairchem(tmp_path: Path) -> None:
    """Written and read in a process where fairchem and OmegaConf cannot be imported."""
    ours, theirs = tmp_path / "m.safetensors", tmp_path / "m.pt"
    model = random_model()
    save_model(model, ours)
    program = f"""
import sys
sys.modules["fairchem"] = sys.modules["omegaconf"] = sys.modules["hydra"] = None
from allscaip_lite.checkpoints import load_model, save_official
save_official(load_model({str(ours)!r}), {str(theirs)!r})
load_model({str(theirs)!r})
"""
    subprocess.run(
        [sys.executable, "-c", program], check=True, cwd=Path(__file__).resolve().parents[2]
    )
    assert_same_model(model, load_model(theirs))


def test_official_file_is_what_torch_expects(tmp_path: Path) -> None:
    """`torch.load` finds the dataclass by its module's name, and gives it all four fields."""
    path = save_official(random_model(), tmp_path / "m.pt")
    with zipfile.ZipFile(path) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("data.pkl"))
        program = archive.read(name)
    assert b"cfairchem.core.units.mlip_unit.api.inference\nMLIPInferenceCheckpoint\n" in program
    stand_in = type("MLIPInferenceCheckpoint", (), {})
    with torch.serialization.safe_globals(
        [(stand_in, "fairchem.core.units.mlip_unit.api.inference.MLIPInferenceCheckpoint")]
    ):
        found = torch.load(path, weights_only=True)
    assert isinstance(found, stand_in)
    fields = {"model_config", "model_state_dict", "ema_state_dict", "tasks_config"}
    assert set(vars(found)) == fields


def change_official(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Rewrite an official file with its four fields changed."""
    fields = dict(read_torch_file(path).attributes)
    change(fields)
    official._save_as_dataclass(fields, CHECKPOINT_MODULE, CHECKPOINT_CLASS, path)
    return path


def _backbone(fields: dict, **changes: object) -> None:
    fields["model_config"]["backbone"].update(changes)


def _energy_task(fields: dict, **changes: object) -> None:
    fields["tasks_config"][0].update(changes)


WRONG_OFFICIAL = {
    "missing weight": (
        lambda f: f["ema_state_dict"].pop("module.backbone.input_block.node_norm.weight"),
        r"lacks 1 tensors: backbone\.input_block\.node_norm\.weight",
    ),
    "unknown weight": (
        lambda f: f["ema_state_dict"].update({"module.backbone.extra": torch.ones(1)}),
        r"does not know 1 tensors: backbone\.extra",
    ),
    "shape": (
        lambda f: f["ema_state_dict"].update(
            {"module.backbone.input_block.node_norm.weight": torch.ones(2)}
        ),
        r"node_norm\.weight has shape \(2,\)",
    ),
    "another model": (lambda f: _backbone(f, model="a.b.eSCNMDBackbone"), "eSCNMDBackbone"),
    "unknown option": (lambda f: _backbone(f, use_wings=True), "does not know: use_wings"),
    "missing option": (lambda f: f["model_config"]["backbone"].pop("knn_k"), "lacks knn_k"),
    "unsupported value": (lambda f: _backbone(f, energy_reduce="mean"), "energy_reduce"),
    "unknown value": (lambda f: _backbone(f, activation="mish"), "mish"),
    "unknown norm": (lambda f: _backbone(f, normalization="batch"), "batch"),
    "ffn ratios": (lambda f: _backbone(f, output_hidden_layer_multiplier=4), "differ"),
    "unknown head": (
        lambda f: f["model_config"]["heads"].update(dipole={"module": "x.DipoleHead"}),
        "DipoleHead",
    ),
    "two heads": (
        lambda f: f["model_config"]["heads"].update(e={"module": "x.AllScAIPEnergyHead"}),
        "two heads for energy",
    ),
    "no heads": (lambda f: f["model_config"].pop("heads"), "no backbone and heads"),
    "no force head": (lambda f: _backbone(f, direct_forces=True), "without a force head"),
    "no EMA": (lambda f: f.pop("ema_state_dict"), "ema_state_dict"),
    "no energy task": (lambda f: f["tasks_config"].pop(0), "none of its tasks is the energy"),
    "tasks": (lambda f: f.update(tasks_config=3), "not a list of tasks"),
    "data sets": (
        lambda f: [t.update(datasets=["oc20", "omat"]) for t in f["tasks_config"]],
        "several data sets: oc20, omat",
    ),
    "normaliser": (lambda f: _energy_task(f, normalizer={"file": "x.pt"}), "normaliser"),
    "references": (lambda f: _energy_task(f, element_references="none"), "element references"),
    "forces with a mean": (
        lambda f: f["tasks_config"][1]["normalizer"].update(mean=1.0),
        "mean other than zero",
    ),
    "stress in other units": (
        lambda f: f["tasks_config"][2]["normalizer"].update(rmsd=9.0),
        "not in the units of its energy",
    ),
}


@pytest.mark.parametrize("case", WRONG_OFFICIAL)
def test_wrong_official_file(tmp_path: Path, case: str) -> None:
    change, complaint = WRONG_OFFICIAL[case]
    path = change_official(save_official(random_model(), tmp_path / "m.pt"), change)
    with pytest.raises(CheckpointError, match=complaint):
        load_model(path)


def test_harmless_extras_of_official_files(tmp_path: Path) -> None:
    """Options that are off or only steer the computation, several data sets, plain heads."""

    def change(fields: dict[str, Any]) -> None:
        _backbone(fields, use_wings=False, cpu_notes=None, use_pbc=True, graph_chunk_size=9)
        for task in fields["tasks_config"]:
            task["datasets"] = ["oc20", "omol"]
        heads = fields["model_config"]["heads"]
        (name,) = heads
        heads[name] = {"module": heads[name]["head_cls"]}
        fields["ema_state_dict"] = {
            f"module.{key.replace('.head.', '.')}": value
            for key, value in fields["ema_state_dict"].items()
            if key != "n_averaged"
        }

    model = random_model()
    path = change_official(save_official(model, tmp_path / "m.pt"), change)
    assert_same_model(model, load_model(path))


def test_ema_weights_are_taken(tmp_path: Path) -> None:
    def change(fields: dict[str, Any]) -> None:
        fields["model_state_dict"] = {k: v + 1 for k, v in fields["model_state_dict"].items()}

    model = random_model()
    path = change_official(save_official(model, tmp_path / "m.pt"), change)
    assert_same_model(model, load_model(path))


def test_energy_of_charge_cannot_be_official(tmp_path: Path) -> None:
    model = random_model()
    model.charge_reference.fill_(-4.7)
    with pytest.raises(InputError, match=r"-4\.700 eV: model\.charge_reference\.zero_\(\)"):
        save_official(model, tmp_path / "m.pt")
    model.charge_reference.zero_()
    assert_same_model(model, load_model(save_official(model, tmp_path / "m.pt")))


def test_silu_basis_cannot_be_official(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="SiLU"):
        save_official(random_model(TINY.replace(distance_basis="silu")), tmp_path / "m.pt")


@pytest.mark.parametrize("own", [{"smooth_bond_order": True}, {"bond_order_softness": 0.03}])
def test_own_bond_order_cannot_be_official(tmp_path: Path, own: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="smooth_bond_order=False and bond_order_softness=0"):
        save_official(random_model(TINY.replace(**own)), tmp_path / "m.pt")
    assert not (tmp_path / "m.pt").exists()


@pytest.mark.parametrize("content", [{"state_dict": {}}, torch.ones(2), [1, 2]])
def test_other_pickles_are_no_checkpoints(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="MLIPInferenceCheckpoint"):
        load_model(tmp_path / "m.pt")


# --- reading pickles --------------------------------------------------------------------------


def test_tensors_of_all_kinds(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.float32)
    content = {
        "part": base[4:16].view(3, 4),
        "transposed": base.view(4, 6).t(),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 5),
        "parameter": torch.nn.Parameter(torch.randn(2)),
        "nested": [(1, 2.5, None, True, {"x"}), torch.ones(2, dtype=torch.float64)],
        "size": torch.Size([2, 3]),
        **{name: torch.ones(3).to(getattr(torch, name)) for name in ("bfloat16", "half", "bool")},
    }
    torch.save(content, tmp_path / "m.pt")
    found = read_torch_file(tmp_path / "m.pt")
    assert found.keys() == content.keys()
    assert found["nested"][0] == content["nested"][0]
    for name, value in content.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[name], value) and found[name].dtype == value.dtype


def test_omegaconf_containers(tmp_path: Path) -> None:
    """References between values are followed, as OmegaConf does, without OmegaConf."""
    omegaconf = pytest.importorskip("omegaconf")
    whole = omegaconf.OmegaConf.create(
        {
            "atoms": 3,
            "part": {
                "absolute": "${atoms}",
                "sibling": "${.absolute}",
                "upwards": "${..atoms}",
                "item": ["${part.list[1]}", None, 2.5],
                "list": [5, 6],
                "text": "plain",
            },
            "whole_part": "${part}",
        }
    )
    for content in (whole, whole.part):
        torch.save(content, tmp_path / "m.pt")
        expected = omegaconf.OmegaConf.to_container(content, resolve=True)
        found = read_torch_file(tmp_path / "m.pt")
        assert isinstance(found, Record)
        assert to_plain(found) == expected


def test_references_in_a_circle(tmp_path: Path) -> None:
    omegaconf = pytest.importorskip("omegaconf")
    torch.save(omegaconf.OmegaConf.create({"a": "${b}", "b": "${a}"}), tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="refers to itself"):
        to_plain(read_torch_file(tmp_path / "m.pt"))


class Call:
    """Pickles to the instruction "call this with these arguments"."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.instruction = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.instruction

    def __call__(self) -> None:
        """Pickle only checks that what is to be called is callable."""


def _marker_bomb(marker: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save(Call(os.system, f"touch {marker}"), buffer)
    return buffer.getvalue()


# Each would create the marker file if it were run; the name is what the refusal must mention.
HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "os.system": (lambda m: Call(os.system, f"touch {m}"), f"{posix.system.__module__}.system"),
    "eval": (lambda m: Call(eval, f"open({str(m)!r}, 'w')"), "eval"),
    "exec": (lambda m: Call(exec, f"open({str(m)!r}, 'w')"), "exec"),
    "open": (lambda m: Call(open, str(m), "w"), "open"),
    "Popen": (lambda m: Call(subprocess.Popen, ["touch", str(m)]), r"\.Popen"),
    "getattr chain": (
        lambda m: Call(Call(getattr, Call(importlib.import_module, "os"), "system"), f"touch {m}"),
        "getattr",
    ),
    "map over exec": (lambda m: Call(list, Call(map, exec, [f"open({str(m)!r}, 'w')"])), "map"),
    "torch.load": (
        lambda m: Call(torch.storage._load_from_bytes, _marker_bomb(m)),
        "torch.storage._load_from_bytes",
    ),
    "pickle.loads": (lambda m: Call(pickle.loads, pickle.dumps(Call(open, str(m), "w"))), "loads"),
    "path": (lambda m: Call(Path.touch, m), "getattr|pathlib|Path"),
    "inside a list": (lambda m: [1, {"a": (Call(os.system, f"touch {m}"),)}], "system"),
    "as a default factory": (
        lambda m: Call(__import__("collections").defaultdict, Call(eval, f"open({str(m)!r}, 'w')")),
        "eval",
    ),
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("payload", HOSTILE)
def test_hostile_pickle_is_refused(tmp_path: Path, payload: str, protocol: int) -> None:
    make, name = HOSTILE[payload]
    marker, path = tmp_path / "marker", tmp_path / "m.pt"
    torch.save({"weights": torch.ones(2), "bomb": make(marker)}, path, pickle_protocol=protocol)
    with pytest.raises(UnsafeCheckpointError, match=name if protocol == 2 else "protocol 4") as no:
        load_model(path)
    assert "m.pt was refused" in str(no.value)
    assert not marker.exists()
    with contextlib.suppress(TypeError):  # where the result of the call is used for something
        opened = torch.load(path, weights_only=False)  # the payload is live: torch.load runs it
        if isinstance(opened["bomb"], subprocess.Popen):
            opened["bomb"].wait()
    assert marker.exists()


def test_hostile_checkpoint_that_looks_right(tmp_path: Path) -> None:
    """The bomb hides in the state of a field that the reader would never look at."""
    marker = tmp_path / "marker"

    def change(fields: dict[str, Any]) -> None:
        fields["notes"] = Call(os.system, f"touch {marker}")

    path = change_official(save_official(random_model(), tmp_path / "m.pt"), change)
    with pytest.raises(UnsafeCheckpointError, match="system"):
        load_model(path)
    assert not marker.exists()


def write_program(path: Path, program: bytes) -> Path:
    """A torch file whose pickle is this program, written by hand."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", sys.byteorder)
        archive.writestr("archive/data/0", b"\0" * 8)
    return path


@pytest.mark.parametrize(
    ("program", "error"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", UnsafeCheckpointError),
        (b"(S'true'\nios\nsystem\n.", UnsafeCheckpointError),  # INST
        (b"\x80\x04\x8c\x08builtins\x8c\x0ddict.fromkeys\x93.", UnsafeCheckpointError),
        (b"\x80\x04\x8c\x0dallscaip_lite\x8c\x08AllScAIP\x93.", UnsafeCheckpointError),
        (b"ctorch\nload\n.", UnsafeCheckpointError),
        (b"ctorch\nFloatStorage.__reduce__\n.", UnsafeCheckpointError),
        (b"\x82\x01.", UnsafeCheckpointError),  # an extension code
        (b"P0\n.", UnsafeCheckpointError),  # a persistent name that is no storage
        (b"garbage", CheckpointError),
        (b"", CheckpointError),
    ],
)
def test_handwritten_pickles(tmp_path: Path, program: bytes, error: type[Exception]) -> None:
    with pytest.raises(error) as raised:
        read_torch_file(write_program(tmp_path / "m.pt", program))
    assert raised.type is error


def shared_lists(depth: int) -> bytes:
    """A list that holds the one before twice, and so on: 2**depth texts if it is copied."""
    program = b"]"
    for number in range(depth):
        put, get = (code + bytes([number]) for code in (b"q", b"h"))
        program += put + b"](" + get * 2 + b"e"
    return program


COPIES = b"](" + b"N" * 5000 + b"eq\0](" + b"cbuiltins\nlist\n(h\0tR" * 200 + b"e"


@pytest.mark.parametrize(
    ("program", "complaint"),
    [
        (b"}" + b")" + b"\x85" * 100_000 + b"Ns", "more than 50,000 tuples"),  # to be hashed
        (b"}]q\0(" + b"]cbuiltins\ntuple\n(h\0tRa" * 300 + b"tRNs", "calls builtins.tuple"),
        (b"N" * (5 << 20), "larger than 4 MB"),
        (b"\x8b" + (1 << 20).to_bytes(4, "little") + b"\1" * (1 << 20), "operand 139"),  # a long
        (b"cbuiltins\nstr\n(" + shared_lists(60) + b"tR", "calls builtins.str"),
        (COPIES, "calls builtins.list"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_small_files_cannot_ask_for_much(tmp_path: Path, program: bytes, complaint: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^m\.pt.*(?:{complaint})"):
        read_torch_file(write_program(tmp_path / "m.pt", b"\x80\x02" + program + b"."))


def test_a_configuration_of_shared_lists_is_not_copied_for_ever(tmp_path: Path) -> None:
    path = write_program(tmp_path / "m.pt", b"\x80\x02" + shared_lists(60) + b".")
    with pytest.raises(CheckpointError, match="more than 100,000 values in a configuration"):
        to_plain(read_torch_file(path))


def test_a_flipped_bit_in_the_weights_is_found(tmp_path: Path) -> None:
    path = save_model(AllScAIP(TINY), tmp_path / "m.safetensors")
    load_model(path)
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="m.safetensors is damaged: .* another checksum"):
        load_model(path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), "integer", "scale"])
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, bad: float | str) -> None:
    model = AllScAIP(TINY)
    state = model.state_dict()
    if bad == "scale":
        model.energy_scale.fill_(0.0)
    elif bad == "integer":
        weight = model.blocks[0].node_norm
        weight.weight = torch.nn.Parameter(weight.weight.int(), requires_grad=False)
    else:
        state["blocks.0.edge_ffn.expand.weight"][0, 0] = bad
    path = save_model(model, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="m.safetensors: .*(not finite|int32|positive)"):
        load_model(path)


def test_a_model_is_for_all_who_may_read_its_folder(tmp_path: Path) -> None:
    path = save_model(AllScAIP(TINY), tmp_path / "m.safetensors")
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", "cuda:x", "", 99, 1.5])
def test_a_device_that_is_not_here_is_an_input_error(tmp_path: Path, device: object) -> None:
    path = save_model(AllScAIP(TINY), tmp_path / "m.safetensors")
    with pytest.raises(InputError, match=f"device '{device}' is not here.*there is cpu"):
        load_model(path, device=device)


def test_what_is_no_model_says_so(tmp_path: Path) -> None:
    for content, words in ((b"", "it is empty"), (b"3\n\nO 0 0 0", "it is not a zip file")):
        (tmp_path / "w.xyz").write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"w\.xyz is no model: {words}"):
            load_model(tmp_path / "w.xyz")


def test_names_do_not_steer_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor do they end a command where the terminal cannot show them."""
    hostile = "\x1b[2Jgone\x07\u202e"
    card = {"note": hostile, hostile: {"\x07": [1.0, hostile]}}
    path = save_model(AllScAIP(TINY), tmp_path / "m.safetensors", card)
    water = molecule("H2O", info={hostile + "charge": 1})
    ase.io.write(tmp_path / f"{hostile}.traj", water)
    assert cli.main(["info", str(path)]) == 0
    assert cli.main(["predict", str(tmp_path / f"{hostile}.traj"), "--model", str(path)]) == 0
    assert cli.main(["info", f"{hostile}\udcff"]) == 2
    printed = "".join(capsys.readouterr())
    assert not any(c in printed for c in "\x1b\x07\u202e\udcff")
    assert printed.count(r"\x1b[2Jgone\x07\u202e") >= 7 and r"\udcff" in printed
    screen = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr("sys.stdout", screen)
    assert cli.main(["predict", str(tmp_path / f"{hostile}.traj"), "--model", str(path)]) == 0
    screen.flush()
    assert rb"force (eV/\xc5)" in screen.buffer.getvalue()


def test_classes_of_the_file_cannot_reach_ours(tmp_path: Path) -> None:
    """Setting attributes on a class that the file names changes nothing beyond that file."""
    program = (
        b"comegaconf.nodes\nAnyNode\n"  # the class itself, not an object of it
        b"(N}X\x0a\x00\x00\x00class_nameX\x05\x00\x00\x00stuff\x73tb."  # BUILD with (None, {…})
    )
    with pytest.raises(CheckpointError):
        read_torch_file(write_program(tmp_path / "m.pt", program))
    assert Record.class_name == ""
    program = b"comegaconf.nodes\nAnyNode\n)\x81}X\x04\x00\x00\x00_valK\x07sb."
    assert to_plain(read_torch_file(write_program(tmp_path / "m.pt", program))) == 7


def test_storages_that_lie(tmp_path: Path) -> None:
    """Sizes beyond what the file holds are refused, not read or allocated."""

    def change(fields: dict[str, Any]) -> None:
        for name, value in fields["ema_state_dict"].items():
            fields["ema_state_dict"][name] = torch.zeros(()).expand(value.shape)
        fields["model_state_dict"] = {}

    large = random_model(TINY.replace(hidden_size=128, angular_channels=None))
    path = change_official(save_official(large, tmp_path / "m.pt"), change)
    with pytest.raises(CheckpointError, match="larger than the file"):
        load_model(path)
    torch.save(torch.ones(8), path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    for kind, size, complaint in (
        (zipfile.ZIP_DEFLATED, 32, "compressed"),
        (zipfile.ZIP_STORED, 8, "damaged"),
    ):
        with zipfile.ZipFile(path, "w", kind) as archive:
            for name, content in entries.items():
                archive.writestr(name, content[:size] if name.endswith("/data/0") else content)
        with pytest.raises(CheckpointError, match=complaint):
            read_torch_file(path)


def test_files_that_are_no_torch_files(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(pickle.dumps({"old": "format"}))
    with pytest.raises(CheckpointError, match="not a zip file of torch.save"):
        load_model(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match="not of torch.save"):
        load_model(path)
    with zipfile.ZipFile(write_program(path, b"."), "a") as archive:
        archive.writestr("other/data.pkl", b".")
    with pytest.raises(CheckpointError, match="not of torch.save"):
        load_model(path)


# --- the model hub ----------------------------------------------------------------------------

CONSERVING = "allscaip-md-conserving-all-omol"
COMMIT = "0123456789" * 4


class Hub(http.server.ThreadingHTTPServer):
    """Answers like the model hub does for one gated file; `mood` says how."""

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.content, self.mood, self.requests = content, "open", []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class HubHandler(http.server.BaseHTTPRequestHandler):
    server: Hub
    refusals = {
        "gated, no token": (401, "GatedRepo"),
        "gated, no access": (403, "GatedRepo"),
        "unknown token": (401, "RepoNotFound"),
        "moved": (404, "EntryNotFound"),
        "broken": (500, ""),
    }

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        self.server.requests.append((self.command, self.path))
        if self.server.mood == "hangs up":
            self.close_connection = True
            return
        status, code = self.refusals.get(self.server.mood, (200, ""))
        expected = f"/facebook/OMol25/resolve/main/{OFFICIAL_FILES[CONSERVING]}"
        if status == 200 and self.path != expected:
            status, code = 404, "EntryNotFound"
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", '"abc"')
        content = self.server.content if status == 200 else b""
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


def ask(monkeypatch: pytest.MonkeyPatch, endpoint: str, cache: Path) -> None:
    """The hub's client asks there, and keeps files here."""
    place = {"endpoint": endpoint, "cache_dir": cache}
    asked = functools.partial(huggingface_hub.hf_hub_download, **place)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", asked)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    content = save_official(random_model(), tmp_path / "hub.pt").read_bytes()
    server = Hub(content)
    ask(monkeypatch, server.endpoint, tmp_path / "cache")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def _no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def test_download_is_cached(hub: Hub) -> None:
    path = download_official(CONSERVING)
    assert path.read_bytes() == hub.content
    assert_same_model(random_model(), load_model(path))
    fetched = [command for command, _ in hub.requests].count("GET")
    assert fetched == 1
    assert download_official(CONSERVING) == path
    assert [command for command, _ in hub.requests].count("GET") == fetched
    hub.mood = "broken"  # what is in the cache needs no hub
    assert download_official(CONSERVING) == path


@pytest.mark.parametrize(
    ("mood", "token", "advice"),
    [
        ("gated, no token", None, "no token was found.*licence.*hf auth login"),
        ("gated, no access", "hf_stranger", "no access.*Ask for it"),
        ("unknown token", "hf_expired", "token is missing, wrong or expired.*hf auth login"),
        ("moved", "hf_friend", "has no file.*download it"),
    ],
)
def test_refusals_say_what_to_do(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, mood: str, token: str, advice: str
) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    hub.mood = mood
    with pytest.raises(InputError, match=advice):
        download_official(CONSERVING)


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the hub's client tries several times
    with socket.socket() as unused:  # nobody listens there
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        ask(monkeypatch, endpoint, tmp_path / "cache")
        with pytest.raises(InputError, match="cannot be reached.*OMol102M-md-cons.pt"):
            download_official(CONSERVING)


def test_connection_breaks_off(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.mood = "hangs up"
    with pytest.raises(InputError, match="Check the network"):
        download_official(CONSERVING)


@pytest.mark.slow
def test_load_model_by_official_name(hub: Hub, tmp_path: Path) -> None:
    """The whole way in a fresh process, with progress on the terminal."""
    saved = tmp_path / "m.safetensors"
    program = f"""
from allscaip_lite.checkpoints import load_model, save_model
save_model(load_model({CONSERVING!r}), {str(saved)!r})
"""
    environment = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
    environment["TQDM_POSITION"] = "-1"  # show the progress although this is no terminal
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert "100%" in done.stderr
    assert_same_model(random_model(), load_model(saved))


def test_nothing_that_runs_is_in_the_vocabulary() -> None:
    names = "eval exec open getattr setattr __import__ type object map compile".split()
    assert not {f"{module}.{name}" for module in ("builtins", "__builtin__") for name in names} & {
        *unpickler.RECORDS
    }
