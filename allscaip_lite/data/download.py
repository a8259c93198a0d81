"""Public data sets, fetched: `allscaip-lite data fetch`.

In: a name of the table below, an address, or a file of the model hub. Out: a folder of
`.aselmdb` files that `Dataset` reads. A download that was stopped continues where it was.

Names, sizes and addresses of OMol25 are those of its own list (DATASET.md of facebook/OMol25 on the
model hub); licence CC BY 4.0; D. S. Levine et al., arXiv:2505.08762.
"""

from __future__ import annotations

import argparse
import errno
import http.client
import os
import re
import shutil
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from tqdm import tqdm

from allscaip_lite.checkpoints.native import download_from_hub
from allscaip_lite.errors import InputError
from allscaip_lite.files import alone, atomic_write, sha256_of, store_text

SERVER = "https://dl.fbaipublicfiles.com/opencatalystproject/data/"
HUB = "hub:"
CHUNK = 1 << 20
ATTEMPTS = 5  # in a row without a single byte
ARCHIVES = (".tar.gz", ".tgz", ".tar")


@dataclass(frozen=True)
class Source:
    """One archive: its place below `SERVER`, about how many GB it has, what it holds."""

    path: str
    gigabytes: float
    about: str


SOURCES = {
    "omol25-neutral-val": Source(
        "omol/250514/neutral_val.tar.gz", 0.119, "validation set, neutral singlets: small"
    ),
    "omol25-val": Source("omol/250514/val.tar.gz", 20, "validation set"),
    "omol25-test": Source("omol/250514/test.tar.gz", 8, "test set, without labels"),
    "omol25-train-4m": Source("omol/250514/train_4M.tar.gz", 19, "4M training set"),
    "omol25-neutral-train": Source(
        "omol/250514/neutral_train.tar.gz", 101, "training set, neutral"
    ),
    "omol25-train": Source("omol/250514/train.tar.gz", 456, "whole training set"),
    "omol25-evaluations": Source(
        "omol/250915/omol25_evaluation_inputs_250915.tar.gz", 0, "inputs of the evaluations"
    ),
}


@alone
def fetch(
    name: str,
    folder: str | os.PathLike[str],
    *,
    server: str = SERVER,
    sha256: str | None = None,
    progress: bool = True,
) -> list[Path]:
    """Fetch a data set into `folder`.

    Archives are unpacked into `folder/NAME` and then removed; a set that is there already is not
    fetched again.

    Args:
        name: one of `SOURCES`, an http(s) address, or `hub:OWNER/REPOSITORY/FILE` (of a data set's
            repository `hub:datasets/OWNER/...`) for a file of the model hub, with the token of
            `hf auth login` or HF_TOKEN where it is gated.
        folder: where the data set goes.
        server: the address in front of the paths of `SOURCES`; give a mirror that is closer.
        sha256: the checksum of the file.
        progress: whether to show progress bars.

    Returns:
        The folders that hold the `.aselmdb` files.

    Raises:
        InputError: for an unknown name, a disk without space, a server that does not answer or has
            no such file, a checksum that differs, an archive that is broken or would write outside
            its folder. What was fetched until then is kept.
    """
    folder = Path(folder)
    source = SOURCES.get(name)
    if source:
        address = server.rstrip("/") + "/" + source.path
    elif name.startswith(HUB) or urlsplit(name).scheme in ("http", "https"):
        address = name
    else:
        raise InputError(
            f"no data set is called {name!r}. There are {', '.join(SOURCES)}; or give an http "
            "address, or hub:OWNER/REPOSITORY/FILE"
        )
    file = PurePosixPath(unquote(urlsplit(address).path)).name
    if not file:
        raise InputError(f"{name}: the address of a file is needed, not of a folder")
    suffix = next((end for end in ARCHIVES if file.endswith(end)), "")
    done = folder / (name if source else file.removesuffix(suffix))
    origin = done.with_name(done.name + ".from")  # the address; a data set's name is its own
    if origin.exists() and origin.read_text() != name:
        raise InputError(f"{done} is from {origin.read_text()}: choose another --out for {name}")
    if done.exists():
        return _data_folders(done)
    folder.mkdir(parents=True, exist_ok=True)
    if not source:
        store_text(origin, name)
    # what is no archive gets its own name only once it is whole and right
    archive = folder / (file if suffix else file + ".partial")
    try:
        if name.startswith(HUB):
            fetched = _from_hub(name)
            if suffix:
                archive = fetched
            else:
                with atomic_write(archive) as partial:
                    shutil.copyfile(fetched, partial)
        else:
            free = shutil.disk_usage(folder).free
            download(address, archive, free=free, progress=progress)
        if sha256:
            _check(archive, sha256)
    except BaseException:
        if not any(path.exists() for path in (archive, archive.with_name(archive.name + ".part"))):
            origin.unlink(missing_ok=True)  # nothing is here that another file could mix with
        raise
    if not suffix:
        archive.replace(done)
        return _data_folders(done)
    _unpack(archive, done, progress)
    if not name.startswith(HUB):  # the hub's cache is another's
        archive.unlink()
    return _data_folders(done)


def download(
    address: str, file: Path, *, free: float = float("inf"), progress: bool = True
) -> None:
    """Fetch one file; what an earlier attempt left in `file.part` is continued.

    A connection that breaks is tried again, until `ATTEMPTS` in a row bring nothing.

    Args:
        address: http or https.
        file: where the file goes; nothing is done where it exists.
        free: bytes that fit on the disk.
        progress: whether to show a progress bar.

    Raises:
        InputError: for a refusal of the server, a server that does not answer, and a file larger
            than `free`.
    """
    if file.exists():
        return
    part, tag = file.with_name(file.name + ".part"), file.with_name(file.name + ".tag")
    failures, most = 0, -1
    while True:
        have = part.stat().st_size if part.exists() else 0
        failures = failures + 1 if have <= most else 0
        most = max(most, have)
        reason: object = "it ends early, or with another part than was asked for"
        try:
            complete = _fetch_rest(address, part, tag, have, free, progress)
        except urllib.error.HTTPError as error:
            if error.code < 500 or failures >= ATTEMPTS:
                raise InputError(_refused(address, error)) from error
            complete = False
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise InputError(f"the disk is full: free some space; {part} is kept") from error
            if isinstance(error, OSError) and error.filename:  # of a file here, not of the network
                raise
            complete, reason = False, error
        if not complete and failures >= ATTEMPTS:
            raise InputError(
                f"{address} does not answer as it should ({reason}). Check the network, or name a "
                "mirror with --server; the same command continues from there"
            )
        if complete:
            part.replace(file)
            tag.unlink(missing_ok=True)
            return
        time.sleep(min(0.1 * 2**failures, 5))


def _fetch_rest(
    address: str, part: Path, tag: Path, have: int, free: float, progress: bool
) -> bool:
    """Fetch what is missing behind the first `have` bytes; whether the file is whole then."""
    request = urllib.request.Request(address, headers={"User-Agent": "allscaip-lite"})
    known = tag.read_text() if tag.exists() else ""
    if have and known:
        # the server sends all of it again if the file is not the one that was begun
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", known)
    try:
        answer = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing is missing, or the file became shorter
            whole = (error.headers.get("Content-Range") or "").endswith(f"/{have}")
            if not whole:
                part.unlink()
            return whole
        raise
    with answer:
        validator = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
        length = answer.headers.get("Content-Length") or ""
        if answer.status != 206:
            have = 0
        total = have + int(length) if length.isdecimal() else None
        if answer.status == 206:
            place = re.fullmatch(
                r"bytes (\d+)-(\d+)/(\d+)", answer.headers.get("Content-Range") or ""
            )
            right = place and int(place[1]) == have and int(place[2]) + 1 == int(place[3])
            if not place or not right or (validator and validator != known):
                part.unlink(missing_ok=True)  # another file, or another part: begin again
                tag.unlink(missing_ok=True)
                return False
            total = int(place[3])
        if total and total - have > free:
            raise InputError(
                f"{total / 1e9:.1f} GB do not fit on the disk, where {free / 1e9:.1f} GB are free: "
                "choose another --out, or a smaller set"
            )
        tag.write_text(validator)
        with (
            part.open("ab" if have else "wb") as stream,
            tqdm(
                total=total,
                initial=have,
                unit="B",
                unit_scale=True,
                desc=part.stem,
                disable=not progress,
                mininterval=0.5 if sys.stderr.isatty() else 30,
            ) as bar,
        ):
            while block := answer.read(CHUNK):
                stream.write(block)
                have += len(block)
                bar.update(len(block))
    return total is None or have == total


def _refused(address: str, error: urllib.error.HTTPError) -> str:
    if error.code in (403, 404):
        return (
            f"{address}: the server has no such file, or does not give it ({error.code}). See "
            "huggingface.co/facebook/OMol25 (DATASET.md) for where it is now, and give that address"
        )
    return f"{address}: the server answers {error.code} ({error.reason}); try again later"


def _from_hub(name: str) -> Path:
    path = name.removeprefix(HUB)
    kind = "dataset" if path.startswith("datasets/") else "model"
    owner, _, rest = path.removeprefix("datasets/").partition("/")
    repository, _, file = rest.partition("/")
    if not (owner and repository and file):
        raise InputError(f"{name}: write hub:OWNER/REPOSITORY/FILE, or hub:datasets/OWNER/...")
    return download_from_hub(f"{owner}/{repository}", file, kind=kind)


def _check(file: Path, expected: str) -> None:
    found = sha256_of(file)
    if found != expected.lower():
        raise InputError(f"{file} has SHA-256 {found}, not {expected}: remove it and fetch again")


def _unpack(archive: Path, done: Path, progress: bool) -> None:
    """Unpack into `done`, which appears only once all of it is there."""
    try:
        with (
            atomic_write(done) as partial,
            tarfile.open(archive) as members,
            tqdm(desc=f"unpacking {archive.name}", unit="file", disable=not progress) as bar,
        ):
            for member in members:
                # a link could lead what comes after it out of the folder, whatever tarfile checks
                if not (member.isreg() or member.isdir()):
                    raise InputError(
                        f"{archive} holds {member.name}, which is a link or a device: only files "
                        "and folders are unpacked"
                    )
                members.extract(member, partial, filter="data")
                bar.update()
            while members.fileobj.read(CHUNK):  # to its end, where its checksum is
                pass
    except tarfile.FilterError as error:
        raise InputError(f"{archive} would write outside its folder: {error}") from error
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise InputError(f"the disk is full: free some space; {archive} is kept") from error
        if isinstance(error, OSError) and error.errno:  # the system's, not that of a reader
            raise
        raise InputError(f"{archive} is broken ({error}): remove it and fetch again") from error


def _data_folders(done: Path) -> list[Path]:
    """The folders below with `.aselmdb` files; of a single file, itself."""
    if done.is_file():
        return [done]
    return sorted({file.parent for file in done.rglob("*.aselmdb")}) or [done]


# --- The command -----------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `allscaip-lite data fetch`."""
    listed = "; ".join(
        f"{name}: {source.about}" + (f", {source.gigabytes:g} GB" if source.gigabytes else "")
        for name, source in SOURCES.items()
    )
    parser.description = (
        f"Fetch a public data set. Names: {listed}. The same command continues a download that "
        "was stopped. OMol25 is licensed CC BY 4.0 (arXiv:2505.08762)."
    )
    parser.add_argument(
        "name", help="a name, an http address, or hub:OWNER/REPOSITORY/FILE on the model hub"
    )
    parser.add_argument("--out", type=Path, default=Path("data/fetched"), help="folder")
    parser.add_argument("--server", default=SERVER, help="a mirror of the public files")
    parser.add_argument("--sha256", help="checksum of the file, if you know one")


def run(args: argparse.Namespace) -> int:
    """`allscaip-lite data fetch`: fetch, and say where the data are; the exit status."""
    for folder in fetch(args.name, args.out, server=args.server, sha256=args.sha256):
        print(folder)
    return 0
