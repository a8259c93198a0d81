"""The pages of an LMDB file, read with care.

In: an `.aselmdb` file, whoever wrote it. Out: the values of its keys. LMDB's own library trusts
every number in a file: where a copy was cut short or a page is damaged, it reads beyond its memory
and the process ends. This reader looks only where the file is. It reads what the library writes in
one database of a file, without locks; the library writes.

The format is LMDB's, version 1 (`lib/lmdb/mdb.c` of openldap.org): two pages with the state of the
file, of which the later counts; a B+ tree of pages of sorted keys; large values on pages of their
own.
"""

from __future__ import annotations

import itertools
import json
import math
import mmap
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
from ase.io import jsonio

from allscaip_lite.errors import DataError
from allscaip_lite.files import Budget, decompress

_HEADER = 16  # bytes, of a page
_BRANCH, _LEAF = 0x01, 0x02
_ON_ITS_OWN_PAGES = 0x01  # of a value
_EMPTY = 2**64 - 1
_MAGIC, _VERSION = 0xBEEFC0DE, 1
_LEVELS = 32  # a tree that is deeper refers to itself
_MAP, _AT_ONCE = 64 << 20, 100  # bytes of a file at first; rows of one transaction
ROW_BYTES = 64 << 20  # of a structure: some 300,000 atoms


class LMDBFile:
    """Keys and values of an LMDB file.

    Raises DataError, naming the file, for a file that is none, is cut short, or is damaged, here or
    on access. Files that are open survive a fork; they do not pickle.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            try:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError as error:
                raise DataError(f"{path}: not a readable .aselmdb file, it is empty") from error
        if len(self._bytes) < 152 or self._unpack("<II", _HEADER) != (_MAGIC, _VERSION):
            raise DataError(f"{path}: not a readable .aselmdb file")
        (self._page_size,) = self._unpack("<I", 40)
        if not 256 <= self._page_size <= 65536:
            raise self._damaged()
        states = []
        for page in (0, self._page_size):
            if self._unpack("<II", page + _HEADER) != (_MAGIC, _VERSION):
                raise self._damaged()
            states.append((self._unpack("<Q", page + 144)[0], page))
        newest = max(states)[1]
        (flags,) = self._unpack("<H", newest + 92)
        self.entries, self._root, last = self._unpack("<QQQ", newest + 120)
        if flags:
            raise DataError(f"{path}: not a readable .aselmdb file, its keys are of another kind")
        self.entries = min(self.entries, len(self._bytes) // 8)  # a key and a size at least
        if len(self._bytes) % self._page_size:
            raise self._cut()
        if len(self._bytes) < (last + 1) * self._page_size:
            for _ in self._leaves(self._root, 0):  # pages at the end may be unused and unwritten
                pass

    def get(self, key: bytes) -> bytes | None:
        """The value of a key, None where there is none."""
        number = self._root
        for _ in range(_LEVELS):
            if number == _EMPTY:
                return None
            page, kind, pointers = self._page(number)
            low, high = (1 if kind == _BRANCH else 0), len(pointers)
            while low < high:  # the first node behind `key`, or at it in a leaf
                middle = (low + high) // 2
                found = self._key(page, pointers[middle])
                if found < key or (found == key and kind == _BRANCH):
                    low = middle + 1
                else:
                    high = middle
            if kind == _LEAF:
                if low == len(pointers) or self._key(page, pointers[low]) != key:
                    return None
                return self._value(page, pointers[low])
            number = self._child(page, pointers[low - 1])
        raise self._damaged()

    def _leaves(self, number: int, level: int) -> Iterator[None]:
        """Walk through the tree and look whether all its pages are there."""
        if number == _EMPTY:
            return
        if level == _LEVELS:
            raise self._damaged()
        page, kind, pointers = self._page(number)
        for pointer in pointers:
            if kind == _BRANCH:
                yield from self._leaves(self._child(page, pointer), level + 1)
            else:
                self._value(page, pointer)
                yield

    def _page(self, number: int) -> tuple[int, int, tuple[int, ...]]:
        """Where a page of the tree begins, its kind, and where its nodes are."""
        page = number * self._page_size
        _, flags, lower = self._unpack("<HHH", page + 8)
        kind, count = flags & (_BRANCH | _LEAF), (lower - _HEADER) // 2
        if flags not in (_BRANCH, _LEAF) or not 0 <= count <= self._page_size // 2:
            raise self._damaged()
        if kind == _BRANCH and not count:
            raise self._damaged()
        return page, kind, self._unpack(f"<{count}H", page + _HEADER)

    def _key(self, page: int, pointer: int) -> bytes:
        (size,) = self._unpack("<H", page + pointer + 6)
        return self._slice(page + pointer + 8, size)

    def _child(self, page: int, pointer: int) -> int:
        low, high, top = self._unpack("<HHH", page + pointer)
        return low | high << 16 | top << 32

    def _value(self, page: int, pointer: int) -> bytes:
        low, high, flags, size = self._unpack("<HHHH", page + pointer)
        start, length = page + pointer + 8 + size, low | high << 16
        if flags & _ON_ITS_OWN_PAGES:
            start = self._unpack("<Q", start)[0] * self._page_size + _HEADER
        return self._slice(start, length)

    def _slice(self, start: int, length: int) -> bytes:
        if start + length > len(self._bytes):
            raise self._cut()
        return self._bytes[start : start + length]

    def _unpack(self, form: str, start: int) -> tuple[int, ...]:
        return struct.unpack(form, self._slice(start, struct.calcsize(form)))

    def _cut(self) -> DataError:
        size = len(self._bytes)
        return DataError(f"{self.path} is cut short, it ends at {size:,} bytes: copy it again")

    def _damaged(self) -> DataError:
        return DataError(f"{self.path} is damaged: copy it again")


def write_lmdb(path: Path, entries: Iterable[tuple[str, str]]) -> None:
    """Write keys and values in JSON, as `unpack_json` reads them, to a file nobody else opens.

    Raises LMDB's errors, such as that of a full disk.
    """
    # no lock, which is a file in shared memory: on a full disk, to write there ends the process;
    # ASE's own writer has one, and a map of 2 TiB, which not every machine grants
    with lmdb.open(str(path), subdir=False, lock=False, sync=False, map_size=_MAP) as file:
        rest = iter(entries)
        while some := list(itertools.islice(rest, _AT_ONCE)):
            packed = [(key.encode(), zlib.compress(value.encode())) for key, value in some]
            while True:
                try:
                    with file.begin(write=True) as transaction:
                        for key, content in packed:
                            transaction.put(key, content)
                    break
                except lmdb.MapFullError:
                    file.set_mapsize(2 * file.info()["map_size"])
        file.sync(True)


def unpack_json(content: bytes, limit: int) -> Any:
    """A value of an ASE database in LMDB: JSON that zlib compressed, of at most `limit` bytes.

    Raises DataError, ValueError or zlib's error for what is damaged or larger.
    """
    budget = Budget(limit, "bytes in one entry", DataError)
    return decode_json(decompress(content, budget).decode())


def decode_json(text: str) -> Any:
    """`ase.io.jsonio.decode`, with arrays whose numbers are in the text.

    Raises DataError for an array of another size than its shape, or of objects.
    """
    budget = Budget(64 * len(text) + 10**5, "bytes of arrays", DataError)

    def hook(entry: dict[str, Any]) -> Any:
        if "__ndarray__" in entry:
            shape, kind, values = entry["__ndarray__"]
            dtype = np.dtype(kind)
            count = len(values) // (2 if dtype.kind == "c" else 1)
            if dtype.kind not in "biufcUS" or not dtype.itemsize or math.prod(shape) != count:
                raise DataError(f"an array of type {kind} and shape {shape} has {count} values")
            budget.spend(count * dtype.itemsize)
        if "__ase_objtype__" in entry and isinstance(entry.get("numbers"), str):
            raise DataError("its numbers are a text, which ASE would take as a formula")
        return jsonio.object_hook(entry)

    try:
        return jsonio.numpyfy(jsonio.fix_int_keys_in_dicts(json.loads(text, object_hook=hook)))
    except RecursionError as error:
        raise DataError("it is nested too deep") from error
