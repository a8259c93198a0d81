"""Files of OMol25's evaluations: inputs and results, pickled or as JSON, read without danger.

In: a file. Out: nested dictionaries and lists with `ase.Atoms` in them. A pickle is a
program; what it may do here is build structures of numbers.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms
from ase.io.jsonio import decode

from allscaip_lite.checkpoints.unpickler import CALLABLE
from allscaip_lite.errors import DataError


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
        return _plain(_Reader(io.BytesIO(content)).load())
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
    atoms = decode(entry["atoms_json"])
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


class _Type(_Object):
    def __init__(self, code: str, *arguments: Any) -> None:
        if code[:1] not in ("b", "i", "u", "f", "U", "S"):
            raise DataError(f"it has an array of numpy's type {code!r}, not of numbers")
        self.code, self.state = code, (3, "|")


class _Array(_Object): ...


def _values(shape: Any, kind: _Type, raw: bytes, order: Literal["C", "F"] = "C") -> np.ndarray:
    dtype = np.dtype(kind.code).newbyteorder(kind.state[1])
    return np.ndarray(shape, dtype, raw, order=order).copy()


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
    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("ase.calculators."):
            return _Forgotten
        try:
            return STAND_INS[f"{module}.{name}"]
        except KeyError:
            raise DataError(f"it asks for {module}.{name}, which structures do not need") from None


def _plain(value: Any) -> Any:
    """Data in the place of their stand-ins."""
    if isinstance(value, _Array):
        _, shape, kind, fortran, raw = value.state
        return _values(shape, kind, raw, "F" if fortran else "C")
    if isinstance(value, _Atoms):
        return _structure(value.state)
    if isinstance(value, _Object):
        return None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value)
    return value


def _structure(state: dict[str, Any]) -> Atoms:
    arrays = _plain(state["arrays"])
    cell = _plain(state["_cellobj"].state["array"])
    atoms = Atoms(arrays.pop("numbers"), arrays.pop("positions"), cell=cell)
    atoms.pbc = _plain(state["_pbc"])
    for name, values in arrays.items():
        atoms.set_array(name, values)
    for constraint in state.get("_constraints", ()):
        if not isinstance(constraint, _FixAtoms):
            raise DataError("it has a constraint other than FixAtoms")
        atoms.constraints = [*atoms.constraints, FixAtoms(_plain(constraint.state["index"]))]
    atoms.info = _plain(state.get("info") or {})
    return atoms
