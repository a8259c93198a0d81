"""Errors that a user can put right.

The command line prints the message of an `InputError` as one line and ends with status 2. Any other
exception, a bare `ValueError` of this package too, is a fault of the package and shows its
traceback. The subclasses are those that some caller tells apart.
"""

from __future__ import annotations

from pathlib import Path
from types import UnionType

# What to do where a structure has what a model did not see in training.
WAYS = ("warn", "error", "ignore")
COINCIDENT = 1e-4  # Å; closer than this, two atoms stand on one spot


class InputError(ValueError):
    """An input, an option or a file that cannot be used; the message says what to change."""


class DataError(InputError):
    """Data that cannot be read or used, or that lack labels; the message says which, and why."""


class RunError(InputError):
    """A run that cannot start, go on or be analysed; the message says what to change."""


class CheckpointError(InputError):
    """A model file that is no checkpoint, is another kind of checkpoint, or is damaged."""


class UnsafeCheckpointError(CheckpointError):
    """A model file that asks for more than data; none of its code was run."""


class KernelError(InputError):
    """A set of kernels that cannot be compiled here, or cannot run this model or this batch."""


class StructureError(InputError):
    """A structure the model cannot answer for; the message says what to change."""


class StructureWarning(UserWarning):
    """What is assumed of a structure, or unknown to the model; commands repeat it at the end."""


def check_kind(value: object, kind: type | UnionType, wanted: str) -> None:
    """Raise TypeError, which says what is wanted, for an argument of another kind."""
    if not isinstance(value, kind):
        told = value is None or isinstance(value, (str, Path))
        shown = repr(value) if told else f"a {type(value).__name__!r} object"
        raise TypeError(f"give {wanted}, not {shown:.80}")
