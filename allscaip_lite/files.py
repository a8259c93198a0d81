"""Files that are written whole or not at all, locks between processes, fingerprints, budgets.

In: a path and what belongs there. Out: a file that is either whole or not there.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import inspect
import os
import pickle
import shutil
import sys
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np

from allscaip_lite.errors import InputError, RunError

P = ParamSpec("P")
Result = TypeVar("Result")
Named = TypeVar("Named", bound=str | os.PathLike[str])
FULL = 1 << 20  # bytes; a disk with less is full
LOCK = ".lock"  # the name of the file that is locked in a folder
WAIT = 5.0  # seconds, for another process that writes the same file
# What readers of zip files, arrays and pickles raise where a file is damaged.
UNREADABLE = (
    EOFError,
    LookupError,
    RuntimeError,
    ValueError,
    zlib.error,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
)


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a path to write to, which becomes `path` when the block ends without an error.

    That path has the name of `path`, in a hidden folder next to it: libraries that choose a format
    by its suffix see the right one, and whoever lists the folder sees no unfinished file. A process
    that is killed leaves the hidden folder behind; the next writer of `path` removes it. Raises
    `RunError` where another process writes `path`, and does not end within some seconds.
    """
    path = Path(path)
    check_writable(path)
    folder = unfinished_folder(path)
    with locked(folder, shown=path, wait=WAIT):
        for left in folder.iterdir():
            if left.name != LOCK:
                left.unlink()
        try:
            yield folder / path.name
            (folder / path.name).replace(path)
        except InputError:
            raise
        except OSError as error:
            error.filename = error.filename or str(path)  # where the system does not say it
            raise
        except Exception as error:  # libraries say it in their own ways
            if "space left" in str(error) or shutil.disk_usage(folder).free < FULL:
                full = os.strerror(errno.ENOSPC)
                raise OSError(errno.ENOSPC, full, str(path)) from error
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def listed_paths(paths: Named | Iterable[Named]) -> list[Named]:
    """One path, or several, as a list; `InputError` for what is none."""
    several = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    found = list(several) if isinstance(several, Iterable) else [several]
    for path in found:
        if not isinstance(path, (str, os.PathLike)) or not str(path):
            raise InputError(f"give the path of a file, or a list of paths, not {path!r:.80}")
    return found


def check_writable(path: Path) -> None:
    """Raise an OSError, before any work, where a file cannot be written.

    That is IsADirectoryError where a folder has its name, FileExistsError where a device or a pipe
    has it, which a file must not replace, and PermissionError where its folder, or that in which
    the folder would be made, is read-only.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder: choose another name", str(path))
    if path.exists() and not path.is_file():
        what = "it is a device or a pipe: choose the name of a file"
        raise FileExistsError(errno.EEXIST, what, str(path))
    folder = next(above for above in path.absolute().parents if above.exists())
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{folder.name} is no folder", str(path))
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, "its folder is read-only: choose another", str(path))


def unfinished_folder(path: Path) -> Path:
    """The folder in which `atomic_write` keeps a file until it is complete."""
    return path.parent / f".{path.name}.partial"


def store_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file with `atomic_write`."""
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def try_lock(path: str | os.PathLike[str]) -> Iterator[bool]:
    """Whether this process got the lock on `path`, held until the block ends; it does not wait.

    The lock is advisory, and the system's: it ends with the process, however that ends. The file
    is made where it does not exist, and stays.
    """
    with Path(path).open("a") as file:
        try:
            _lock(file.fileno())
        except (BlockingIOError, PermissionError):  # on Linux; on Windows
            yield False
            return
        try:
            mine = os.path.samestat(os.fstat(file.fileno()), Path(path).stat())
        except FileNotFoundError:  # the one that held it before has removed it meanwhile
            mine = False
        yield mine


def _lock(file: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def locked(
    folder: str | os.PathLike[str], name: str = LOCK, shown: object = None, wait: float = 0.0
) -> Iterator[None]:
    """Work alone in a folder, which is made where it does not exist, or on a file in it.

    Args:
        folder: the folder.
        name: of the file that is locked, which is gone afterwards.
        shown: what the message says that another process works on, by default the folder.
        wait: so many seconds for the other process.

    Raises `RunError` where another process does. Its lock ends with it, however that ends. Of
    several processes of one training run the first locks for all.
    """
    if int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0):
        Path(folder).mkdir(parents=True, exist_ok=True)
        yield
        return
    path, until = Path(folder) / name, time.monotonic() + wait
    with ExitStack() as stack:
        while True:
            Path(folder).mkdir(parents=True, exist_ok=True)
            late = time.monotonic() >= until
            try:
                if stack.enter_context(try_lock(path)):
                    break
            except FileNotFoundError:  # the one that held it has removed the folder
                if late:
                    raise
            stack.close()
            if late:
                work = f"in {folder}" if shown is None else f"on {shown}"
                raise RunError(f"another process works {work}: wait for it, or choose another one")
            time.sleep(0.05)
        try:
            yield
        finally:
            with suppress(PermissionError):  # Windows keeps a file that is open
                path.unlink(missing_ok=True)


def locked_file(path: str | os.PathLike[str], wait: float = 0.0) -> AbstractContextManager[None]:
    """`locked` while a file is made; its folder is made where it does not exist.

    Raises IsADirectoryError, before any work, where a folder has the name of the file.
    """
    path = Path(path)
    check_writable(path)
    return locked(path.resolve().parent, f".{path.name}.lock", path, wait)


def alone(function: Callable[P, Result]) -> Callable[P, Result]:
    """A function that works in its argument `folder` under the lock of `locked`."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> Result:
        with locked(signature.bind(*args, **kwargs).arguments["folder"]):
            return function(*args, **kwargs)

    return run


@contextmanager
def store_state(path: Path) -> Iterator[Path]:
    """`atomic_write` that keeps the file before, for `read_state`."""
    with atomic_write(path) as partial:
        yield partial
        if path.exists():
            path.replace(_before(path))


def read_state(path: Path, read: Callable[[Path], Result]) -> Result | None:
    """What a run saved last in a zip file (.npz, .pt), or before that where the last is damaged.

    `store_state` wrote the file, and `read` reads one whose checksums are right. None where nothing
    was saved. A fall-back is said in a warning; raises RunError where nothing is whole.
    """
    damage = ""
    for file in (path, _before(path)):
        if not file.exists():
            continue
        try:
            with zipfile.ZipFile(file) as archive:
                if part := archive.testzip():
                    raise zipfile.BadZipFile(f"{part} has another checksum")
            if (found := read(file)) is None:
                raise ValueError("nothing is in it")
        except UNREADABLE as error:
            damage = f"{file} is damaged ({_first_line(error)})"
        else:
            if damage:
                warnings.warn(f"{damage}: going on from the state before it", stacklevel=3)
            return found
    if damage:
        raise RunError(f"{damage}, and none before it is there: remove the folder and start again")
    return None


@contextmanager
def restoring(file: Path) -> Iterator[None]:
    """Around what takes up the state of a run: RunError where the file holds something else."""
    try:
        yield
    except InputError:
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise RunError(
            f"{file} is not the state of this run ({type(error).__name__}: {_first_line(error)}): "
            f"bring it back, or remove {file.parent} and start again"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _before(path: Path) -> Path:
    return path.with_name(f"{path.stem}.before{path.suffix}")


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(arrays: Iterable[np.ndarray]) -> str:
    """Sixteen hexadecimal digits, the same for the same numbers of the same type."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def differing(
    one: Mapping[str, Any], other: Mapping[str, Any], but: Iterable[str] = ()
) -> list[str]:
    """The names, apart from those in `but`, under which two mappings hold different values."""
    return sorted(key for key in {*one, *other} - {*but} if one.get(key) != other.get(key))


class Budget:
    """What a reader may spend on one file, so that a small file cannot ask for a large memory.

    amount: bytes, or a count. what: its name in the message. error: the class of the error.
    """

    def __init__(self, amount: int, what: str, error: type[InputError] = InputError) -> None:
        self.left, self.amount, self.what, self.error = amount, amount, what, error

    def spend(self, amount: int) -> None:
        """Take some of it; raises `error` where that is more than is left."""
        self.left -= amount
        if self.left < 0:
            raise self.error(f"it asks for more than {self.amount:,} {self.what}")


def decompress(content: bytes, budget: Budget) -> bytes:
    """What zlib made into `content`, unless it is larger than the budget has left."""
    reader = zlib.decompressobj()
    plain = reader.decompress(content, budget.left + 1)
    budget.spend(len(plain))
    if not reader.eof:
        raise zlib.error("incomplete or truncated stream")
    return plain
