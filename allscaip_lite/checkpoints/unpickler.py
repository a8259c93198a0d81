"""Reading a `torch.save` file that might be hostile.

In: the path of a zip file as `torch.save` writes it. Out: its content, made of tensors, plain
containers and passive records. A pickle is a program; PyTorch runs it with a vocabulary that can
only build data, to which this module adds names of fairchem and OmegaConf. Nothing that the file
names is imported, so neither need be installed.
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from allscaip_lite.errors import CheckpointError, UnsafeCheckpointError
from allscaip_lite.files import Budget

CHECKPOINT_MODULE = "fairchem.core.units.mlip_unit.api.inference"
CHECKPOINT_CLASS = "MLIPInferenceCheckpoint"
PROGRAM_BYTES = 4 << 20  # of a checkpoint's pickle; weights are outside it
PROGRAM_TUPLES = 50_000  # four a tensor; to hash one of a million levels ends the process
VALUES = 100_000  # of a configuration; the released ones have some hundreds


class Record:
    """An object of a class that is known but not imported: its name and its attributes."""

    class_name = ""

    def __init__(self, *arguments: object) -> None:
        raise UnsafeCheckpointError(f"it calls {self.class_name}")

    def __setstate__(self, state: object) -> None:
        # Dataclasses and OmegaConf nodes keep everything in one dictionary.
        if not isinstance(state, dict):
            raise UnsafeCheckpointError(f"{self.class_name} has an unusual state")
        self.__dict__["attributes"] = dict(state)

    def __getattr__(self, name: str) -> Any:
        # Called only for names that are not set; unpickling asks before `attributes` exists.
        try:
            return self.__dict__["attributes"][name]
        except KeyError:
            raise AttributeError(f"{self.class_name} has no {name!r}") from None


# Classes whose objects, or which themselves, checkpoints contain; OmegaConf notes types of values.
RECORDS = (
    f"{CHECKPOINT_MODULE}.{CHECKPOINT_CLASS}",
    *(
        f"omegaconf.{name}"
        for name in (
            "dictconfig.DictConfig listconfig.ListConfig base.Metadata base.ContainerMetadata "
            "nodes.AnyNode nodes.StringNode nodes.IntegerNode nodes.FloatNode nodes.BooleanNode "
            "nodes.PathNode nodes.BytesNode"
        ).split()
    ),
    *(f"typing.{name}" for name in ("Any", "Union", "Optional", "Dict", "List", "Tuple")),
    *(f"builtins.{name}" for name in "dict list tuple frozenset int float bool str".split()),
)


def _table(*_: object) -> dict[Any, Any]:
    """In place of a table with a default, such as OmegaConf's of what its resolvers found."""
    return {}


def read_torch_file(path: str | Path) -> Any:
    """Read a `torch.save` file without running any code that it carries.

    Returns tensors (on the CPU), plain containers, and a `Record` for each object of the classes
    in `RECORDS`. Raises `UnsafeCheckpointError`, naming it, for any other class or function, and
    `CheckpointError` where the file is no such zip file or is damaged.
    """
    path = Path(path)
    known: list[Any] = [(type(name, (Record,), {"class_name": name}), name) for name in RECORDS]
    try:
        _check_archive(path)
        with torch.serialization.safe_globals([*known, (_table, "collections.defaultdict")]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except zipfile.BadZipFile as error:
        with path.open("rb") as file:
            begun = file.read(2)
        if begun == b"PK":
            raise CheckpointError(
                f"{path.name} is damaged ({error}): download it, or write it, again"
            ) from error
        why = "is not a zip file of torch.save, nor a .safetensors file" if begun else "is empty"
        raise CheckpointError(f"{path.name} is no model: it {why}") from error
    except UnsafeCheckpointError as error:
        raise UnsafeCheckpointError(f"{path.name} was refused, nothing was run: {error}") from None
    except CheckpointError as error:
        raise CheckpointError(f"{path.name}: {error}") from error
    except Exception as error:  # a malformed pickle can fail in any way
        if isinstance(error, OSError) and error.filename:  # of the file, not of a place in it
            raise
        if asked := re.search(r"GLOBAL (\S+)|(?:function|operand) \S+", str(error)):
            raise UnsafeCheckpointError(
                f"{path.name} was refused, nothing was run: it asks for {asked[1] or asked[0]}, "
                "which no checkpoint needs. Do not open this file with weights_only=False either, "
                "unless you trust whoever made it"
            ) from None
        raise CheckpointError(
            f"{path.name} cannot be read, it is damaged: {type(error).__name__}: {error}"
        ) from error


def _check_archive(path: Path) -> None:
    """Raise `CheckpointError` for a zip file that is none of `torch.save`, or asks for too much."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        pickles = [name for name in names if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(pickles) != 1 or len(set(names)) < len(names):
            raise CheckpointError("it is a zip file, but not of torch.save")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise CheckpointError("it is compressed, as torch.save writes no file")
        if archive.getinfo(pickles[0]).file_size > PROGRAM_BYTES:
            raise CheckpointError(
                f"its pickle is larger than {PROGRAM_BYTES >> 20} MB, as no checkpoint's is"
            )
        tuples = 0
        for step, argument, _ in pickletools.genops(archive.read(pickles[0])):
            if step.name == "PROTO" and argument != 2:
                raise UnsafeCheckpointError(
                    f"its pickle has protocol {argument}, and torch.save's own is 2"
                )
            tuples += step.name.startswith("TUPLE")
        if tuples > PROGRAM_TUPLES:
            raise CheckpointError(f"its pickle makes more than {PROGRAM_TUPLES:,} tuples")


_INTERPOLATION = re.compile(r"^\$\{([^${}:]+)\}$")
_MAX_DEPTH = 100


def to_plain(value: Any, _depth: int = 0, _budget: Budget | None = None) -> Any:
    """Dictionaries, lists and values out of OmegaConf records; anything else is left as it is.

    A value that refers to another (`${max_atoms}`) is replaced by it. References that cannot be
    followed stay the text they are.
    """
    # what is shared is counted each time, as it is copied, and written in a message, each time
    budget = _budget or Budget(VALUES, "values in a configuration", CheckpointError)
    budget.spend(1 + len(value) if isinstance(value, (str, bytes)) else 1)
    if _depth > _MAX_DEPTH:
        raise CheckpointError("the configuration refers to itself, or is nested too deep")
    if isinstance(value, Record):
        content = value.attributes.get("_content", value.attributes.get("_val"))
        if isinstance(content, str) and (match := _INTERPOLATION.match(content)):
            found, target = _follow(value, match[1])
            return to_plain(target, _depth + 1, budget) if found else content
        if "_content" not in value.attributes and "_val" not in value.attributes:
            return value
        return to_plain(content, _depth + 1, budget)
    if isinstance(value, Mapping):
        return {
            to_plain(key, _depth + 1, budget): to_plain(item, _depth + 1, budget)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return type(value)(to_plain(item, _depth + 1, budget) for item in value)
    return value


def _follow(node: Record, reference: str) -> tuple[bool, Any]:
    """The node that an OmegaConf reference means: from the root, or with leading dots from here."""
    dots = len(reference) - len(reference.lstrip("."))
    steps = 0
    while (parent := node.attributes.get("_parent")) is not None:
        if dots and steps == dots:
            break
        if not isinstance(parent, Record):
            return False, None
        node, steps = parent, steps + 1
        if steps > _MAX_DEPTH:
            return False, None
    for key in re.split(r"[.\[\]]+", reference[dots:].rstrip("]")):
        content = node.attributes.get("_content") if isinstance(node, Record) else None
        if isinstance(content, str) and _INTERPOLATION.match(content):
            return False, None  # a reference through a reference
        if isinstance(content, Mapping) and key in content:
            node = content[key]
        elif isinstance(content, list) and key.isdigit() and int(key) < len(content):
            node = content[int(key)]
        else:
            return False, None
    return True, node
