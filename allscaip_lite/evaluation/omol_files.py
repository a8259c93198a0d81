"""Files of OMol25's evaluations: inputs and results, pickled or as JSON, read without danger.

In: a file. Out: nested dictionaries and lists with `ase.Atoms` in them. A pickle is a
program; what it may do here is build structures of numbers.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms

from allscaip_lite.checkpoints.unpickler import CALLABLE, called, check_program
from allscaip_lite.data.lmdb_file import decode_json
from allscaip_lite.errors import DataError
from allscaip_lite.files import Budget


def read(file: Path) -> Any:
    """The content of a pickle or of a JSON file, with every structure as `ase.Atoms`.

    A pickle is a program; this reader runs it with a vocabulary that can only build data, and
    imports nothing that it names, so pymatgen (whose `MSONAtoms` OMol25 uses) need not be there.
    Raises DataError, naming it, for a class or function that structures do not need, and
    for a file that is damaged.
    """
    content = file.read_bytes()
    try:
        if content.lstrip()[:1] == b"{":
            return json.loads(content, object_hook=_from_json)
        check_program(content, 20_000_000)
        found = _Reader(content).load()
        return _plain(found, Budget(8 * len(content) + 10**6, "bytes of structures", DataError))
    except DataError as error:
        raise DataError(f"{file.name} was refused, nothing of it was run: {error}") from None
    except Exception as error:  # a malformed file can fail in any way
        raise DataError(
            f"{file.name} is neither a pickle nor JSON that can be read; fetch it again "
            f"({type(error).__name__}: {error})"
        ) from error


def _from_json(entry: dict[str, Any]) -> dict[str, Any] | Atoms:
    """An entry, or the structure that it is (the dictionary of pymatgen's MSONAtoms)."""
    if "atoms_json" not in entry:
        return entry
    atoms = decode_json(entry["atoms_json"])
    if not isinstance(atoms, Atoms):
        raise TypeError(f"a {type(atoms).__name__} stands where a structure belongs")
    atoms.info = entry.get("atoms_info", {})
    return atoms


class _Object:
    """What is kept of an object; a subclass for each class that is let in."""

    state: Any = None

    def __init__(self, *arguments: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Atoms(_Object): ...


class _Cell(_Object): ...


class _FixAtoms(_Object): ...


class _Forgotten(_Object, dict[str, Any]):
    """A calculator, or a part of one."""


# one number, or a text of one character or more: no object, no fields, no part of an array
_NUMBERS_OR_TEXT = re.compile(r"[b]1|[iuf][1248]|[US][1-9][0-9]{0,5}")


class _Type(_Object):
    def __init__(self, code: str, *arguments: Any) -> None:
        if not (isinstance(code, str) and _NUMBERS_OR_TEXT.fullmatch(code)):
            raise DataError(f"it has an array of numpy's type {code!r}, not of numbers")
        self.code, self.state = code, (3, "|")


class _Array(_Object): ...


def _values(shape: Any, kind: _Type, raw: bytes, order: Literal["C", "F"] = "C") -> np.ndarray:
    if not isinstance(kind, _Type) or kind.state[1] not in ("<", ">", "|", "="):
        raise DataError("it has an array whose type is none of numpy's")
    dtype = np.dtype(kind.code).newbyteorder(kind.state[1])
    if min(shape, default=0) < 0 or len(raw) != math.prod(shape) * dtype.itemsize:
        raise DataError(f"it has an array of shape {tuple(shape)} in {len(raw)} bytes")
    if dtype.kind == "b":
        return np.ndarray(shape, np.uint8, raw, order=order) != 0  # other bytes are no bool
    values = np.ndarray(shape, dtype, raw, order=order).copy()
    if dtype.kind == "U":
        values.tolist()  # fails here, and not later, where a character is none
    return values


def _method(owner: Any, name: str) -> None:  # calculators carry one of their own
    if not isinstance(owner, _Forgotten):
        raise DataError("it asks for getattr, which structures do not need")


STAND_INS: dict[str, Callable[..., Any]] = {
    **CALLABLE,
    "ase.atoms.Atoms": _Atoms,
    "pymatgen.io.ase.MSONAtoms": _Atoms,
    "ase.cell.Cell": _Cell,
    "ase.constraints.FixAtoms": _FixAtoms,
    "ase.constraints.fix_atoms.FixAtoms": _FixAtoms,
    "builtins.getattr": _method,
    "__builtin__.getattr": _method,
    "_codecs.encode": lambda text, _: text.encode("latin1"),  # how protocol 2 writes bytes
    "numpy.ndarray": _Array,
    "numpy.dtype": _Type,
}
for _core in ("numpy.core", "numpy._core"):  # of numpy 1, and of numpy 2
    STAND_INS |= {
        f"{_core}.multiarray._reconstruct": _Array,
        f"{_core}.multiarray.scalar": lambda kind, raw: _values((), kind, raw).item(),
        f"{_core}.numeric._frombuffer": lambda raw, kind, *rest: _values(
            rest[0], kind, bytes(raw), rest[1]
        ),
    }


class _Reader(pickle.Unpickler):
    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))
        self.copies = Budget(2 * len(content), "copied items", DataError)

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("ase.calculators."):
            return _Forgotten
        try:
            found = STAND_INS[f"{module}.{name}"]
        except KeyError:
            raise DataError(f"it asks for {module}.{name}, which structures do not need") from None
        if isinstance(found, type) and issubclass(found, _Object):
            return found
        if found in CALLABLE.values():
            return called(found, self.copies)
        # a function of its own: a pickle may set attributes on what it names
        return lambda *arguments: found(*arguments)  # noqa: PLW0108


def _plain(value: Any, budget: Budget) -> Any:
    """Data in the place of their stand-ins; what is shared is counted each time it is copied."""
    budget.spend(1)
    if isinstance(value, _Array):
        _, shape, kind, fortran, raw = value.state
        budget.spend(len(raw))
        return _values(shape, kind, raw, "F" if fortran else "C")
    if isinstance(value, _Atoms):
        return _structure(value.state, budget)
    if isinstance(value, _Object):
        return None
    if isinstance(value, dict):
        return {key: _plain(item, budget) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item, budget) for item in value)
    return value


def _structure(state: dict[str, Any], budget: Budget) -> Atoms:
    arrays = _plain(state["arrays"], budget)
    cell = _plain(state["_cellobj"].state["array"], budget)
    # as an array, for ASE takes a text as a formula, which may be one of many atoms
    atoms = Atoms(np.asarray(arrays.pop("numbers"), int), arrays.pop("positions"), cell=cell)
    atoms.pbc = _plain(state["_pbc"], budget)
    for name, values in arrays.items():
        atoms.set_array(name, values)
    for constraint in state.get("_constraints", ()):
        if not isinstance(constraint, _FixAtoms):
            raise DataError("it has a constraint other than FixAtoms")
        atoms.constraints = [
            *atoms.constraints,
            FixAtoms(_plain(constraint.state["index"], budget)),
        ]
    atoms.info = _plain(state.get("info") or {}, budget)
    return atoms
