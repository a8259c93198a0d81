"""Reading a `torch.save` file that might be hostile.

In: the path of a zip file as `torch.save` writes it. Out: its content, made of tensors, plain
containers and passive records. A pickle is a program; this reader runs it with a vocabulary that
can only build data, so a file that names anything else is refused before anything happens.
Nothing that the file names is imported, so neither fairchem nor OmegaConf need be installed.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
import sys
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from allscaip_lite.errors import CheckpointError, UnsafeCheckpointError
from allscaip_lite.files import Budget

CHECKPOINT_MODULE = "fairchem.core.units.mlip_unit.api.inference"
CHECKPOINT_CLASS = "MLIPInferenceCheckpoint"


class Record:
    """An object of a class that is known but not imported: its name and its attributes."""

    class_name = ""

    def __init__(self, *arguments: object) -> None:
        self.attributes: dict[str, Any] = {}
        if arguments:
            raise UnsafeCheckpointError(f"{self.class_name} is called with arguments")

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


OMEGACONF = (
    "dictconfig.DictConfig listconfig.ListConfig base.Metadata base.ContainerMetadata "
    "nodes.AnyNode nodes.StringNode nodes.IntegerNode nodes.FloatNode nodes.BooleanNode "
    "nodes.PathNode nodes.BytesNode"
).split()
RECORDS = (f"{CHECKPOINT_MODULE}.{CHECKPOINT_CLASS}", *(f"omegaconf.{name}" for name in OMEGACONF))


@dataclass(frozen=True)
class _Name:
    """A type that the file mentions as a value (OmegaConf notes the types of its nodes)."""

    text: str


# Types that may be called, as `called` does. Pickles of protocol 2 use the names of Python 2.
CALLABLE = {
    "collections.OrderedDict": OrderedDict,
    "collections.defaultdict": defaultdict,
    **{
        f"{module}.{kind.__name__}": kind
        for module in ("builtins", "__builtin__")
        for kind in (dict, list, tuple, set, frozenset, int, float, bool, str)
    },
    "__builtin__.long": int,
    "__builtin__.unicode": str,
    "torch.Size": torch.Size,
}
MENTIONED = (
    *(f"typing.{name}" for name in ("Any", "Union", "Optional", "Dict", "List", "Tuple")),
    "builtins.NoneType",
    "__builtin__.NoneType",
)
STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (*STORAGES.values(), torch.complex64)
}


PROGRAM_BYTES = 4 << 20  # of a checkpoint's pickle; weights are outside it
PROGRAM_STEPS = 1_000_000
PROGRAM_DEPTH = 200
_FILLING = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS")
# of each instruction: whether it takes what is above the last mark, how many objects it takes
# besides, and whether it leaves one
_EFFECTS = {
    op.name: (
        pickletools.markobject in op.stack_before,
        [*op.stack_before, pickletools.markobject].index(pickletools.markobject),
        bool(op.stack_after),
    )
    for op in pickletools.opcodes
}


def check_program(content: bytes) -> None:
    """Walk through a pickle without running it.

    Raises `CheckpointError` for more than `PROGRAM_STEPS` instructions, containers nested deeper
    than `PROGRAM_DEPTH` (a deep tuple that is hashed ends the process), integers of more than 64
    bits, and numbers of remembered objects (each is a place in a table) that no pickler writes.
    """
    # A stack as the unpickler's, of the depth of each object, in a list as objects are shared;
    # None is a mark.
    stack: list[Any] = []
    memo: dict[int, list[int]] = {}
    argument: Any
    for count, (instruction, argument, _) in enumerate(pickletools.genops(content), start=1):
        name = instruction.name
        if count > PROGRAM_STEPS:
            raise CheckpointError(f"it has more than {PROGRAM_STEPS:,} instructions")
        if isinstance(argument, int) and abs(argument) >= 2**64:
            raise CheckpointError("it has an integer of more than 64 bits")
        if name == "MARK":
            stack.append(None)
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name.endswith("PUT"):
            if not 0 <= argument <= count:
                raise CheckpointError(f"it remembers an object under the number {argument}")
            memo[argument] = stack[-1]
        elif name.endswith("GET"):
            stack.append(memo[argument])
        elif name == "DUP":
            stack.append(stack[-1])
        else:
            to_mark, below, leaves = _EFFECTS[name]
            taken = []
            while to_mark and (top := stack.pop()) is not None:
                taken.append(top)
            taken += [stack.pop() for _ in range(below)]
            if name in _FILLING:
                owner = taken.pop()
                owner[0] = max([owner[0], *(1 + depth[0] for depth in taken)])
                stack.append(owner)
            elif name == "BUILD":  # the state of an object is nothing that is hashed
                stack.append(taken[1])
            elif leaves:
                stack.append([1 + max(depth[0] for depth in taken)] if taken else [0])
            if leaves and stack[-1][0] > PROGRAM_DEPTH:
                raise CheckpointError(f"it is nested deeper than {PROGRAM_DEPTH} levels")


def called(kind: Callable[..., Any], budget: Budget) -> Callable[..., Any]:
    """`kind`, to be called by a pickle: with plain data, as long as the budget of copies lasts.

    A function of its own each time, since a pickle may set attributes on what it names.
    """

    def call(*arguments: Any) -> Any:
        for argument in arguments:
            if isinstance(argument, (list, tuple, dict, set, frozenset)):
                if kind in (str, int, float, bool):  # a text of all that is in it
                    raise UnsafeCheckpointError(f"{kind.__name__} of a container")
                budget.spend(len(argument))
            elif isinstance(argument, (str, bytes, bytearray)):
                budget.spend(len(argument))
            elif not (callable(argument) or isinstance(argument, (int, float, _Name, type(None)))):
                found = type(argument).__name__
                raise UnsafeCheckpointError(f"a {found} is handed to a function")
        return kind(*arguments)

    return call


def read_torch_file(path: str | Path) -> Any:
    """Read a `torch.save` file without running any code that it carries.

    Returns tensors (on the CPU), plain containers, and a `Record` for each object of the classes
    in `RECORDS`. Raises `UnsafeCheckpointError`, naming it, for any other class or function, and
    `CheckpointError` where the file is no such zip file or is damaged.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            pickles = [name for name in names if re.fullmatch(r"[^/]+/data\.pkl", name)]
            if len(pickles) != 1:
                raise CheckpointError("it is a zip file, but not of torch.save")
            folder = pickles[0].removesuffix("data.pkl")
            if f"{folder}byteorder" in names:
                byteorder = archive.open(f"{folder}byteorder").read(8).decode()
                if byteorder != sys.byteorder:
                    raise CheckpointError(
                        f"it was written on a {byteorder}-endian machine; "
                        f"load and save it with torch on one like this ({sys.byteorder}) first"
                    )
            if archive.getinfo(pickles[0]).file_size > PROGRAM_BYTES:
                raise CheckpointError(
                    f"its pickle is larger than {PROGRAM_BYTES >> 20} MB, as no checkpoint's is"
                )
            program = archive.read(pickles[0])
            check_program(program)
            # the weights once, each tensor's part of them, and as much again for shared ones
            memory = Budget(4 * path.stat().st_size + 1024, "bytes of weights", CheckpointError)
            copies = Budget(len(program), "copied items", CheckpointError)
            return _DataUnpickler(program, archive, folder, memory, copies).load()
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
        raise CheckpointError(
            f"{path.name} cannot be read, it is damaged: {type(error).__name__}: {error}"
        ) from error


class _DataUnpickler(pickle.Unpickler):
    """An unpickler whose only vocabulary is data."""

    def __init__(
        self, program: bytes, archive: zipfile.ZipFile, folder: str, memory: Budget, copies: Budget
    ) -> None:
        super().__init__(io.BytesIO(program))
        self.archive, self.folder, self.memory, self.copies = archive, folder, memory, copies
        self.storages: dict[str, Tensor] = {}
        # Classes made for this one file: changes that it makes to them stay in it.
        self.records = {
            name: type(name.rpartition(".")[2], (Record,), {"class_name": name}) for name in RECORDS
        }

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name in CALLABLE:
            return called(CALLABLE[full_name], self.copies)
        if full_name in self.records:
            return self.records[full_name]
        if full_name in MENTIONED:
            return _Name(full_name)
        if full_name == "torch._utils._rebuild_tensor_v2":
            # not a method, whose attributes a file could change
            return lambda *arguments: _tensor(self.memory, *arguments)
        if full_name == "torch._utils._rebuild_parameter":
            return lambda data, requires_grad, hooks: _expect(data, Tensor)
        if module == "torch" and name in STORAGES:
            return _Name(name)
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        raise UnsafeCheckpointError(
            f"it asks for {full_name}, which no checkpoint needs. Do not open this file with "
            "torch.load either, unless you trust whoever made it"
        )

    def persistent_load(self, identifier: Any) -> Tensor:
        """The storage that `identifier` names, as a flat tensor."""
        kind, storage, key, _location, size = identifier
        if kind != "storage" or not isinstance(storage, _Name) or storage.text not in STORAGES:
            raise CheckpointError(f"unknown storage {identifier!r}")
        if key not in self.storages:
            dtype = STORAGES[storage.text]
            entry = self.archive.getinfo(f"{self.folder}data/{key}")
            compressed = entry.compress_type != zipfile.ZIP_STORED
            if compressed or entry.file_size != size * dtype.itemsize:
                raise CheckpointError(f"storage {key} has another size than announced")
            self.memory.spend(entry.file_size)
            content = bytearray(self.archive.read(entry))
            if dtype == torch.bool:
                content = bytearray(map(bool, content))  # other bytes than 0 and 1 are no bool
            self.storages[key] = (
                torch.frombuffer(content, dtype=dtype) if size else torch.empty(0, dtype=dtype)
            )
        return self.storages[key]


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        found = type(value).__name__
        raise CheckpointError(f"a {found} stands where a {kind.__name__} belongs")
    return value


def _tensor(
    memory: Budget,
    storage: Tensor,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    *_gradient_and_hooks: object,
) -> Tensor:
    """A tensor of its own: the part of a storage that offset, size and stride pick."""
    _expect(storage, Tensor)
    if offset < 0 or any(n < 0 for n in size) or any(step < 0 for step in stride):
        raise CheckpointError("a tensor has a negative size")
    if math.prod(size) > storage.numel():  # would grow from a small file to any size
        raise CheckpointError("a tensor is larger than its storage")
    memory.spend(math.prod(size) * storage.itemsize)
    return storage.as_strided(tuple(size), tuple(stride), offset).clone()


_INTERPOLATION = re.compile(r"^\$\{([^${}:]+)\}$")
_MAX_DEPTH = 100


def to_plain(value: Any, _depth: int = 0, _budget: Budget | None = None) -> Any:
    """Dictionaries, lists and values out of OmegaConf records; anything else is left as it is.

    A value that refers to another (`${max_atoms}`) is replaced by it. References that cannot be
    followed stay the text they are.
    """
    # what is shared is counted each time, as it is copied, and written in a message, each time
    budget = _budget or Budget(10**7, "values in a configuration", CheckpointError)
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
        node, steps = _expect(parent, Record), steps + 1
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
