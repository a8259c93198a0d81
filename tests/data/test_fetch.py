"""Fetching data sets, from a stand-in server that hangs up, moves, changes and lies."""

from __future__ import annotations

import errno
import hashlib
import http.server
import io
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator

from allscaip_lite import cli
from allscaip_lite.data import download as fetch
from allscaip_lite.data.aselmdb import Dataset, write_aselmdb
from allscaip_lite.data.download import SOURCES
from allscaip_lite.errors import InputError

NAME = "omol25-neutral-val"


class Server(http.server.ThreadingHTTPServer):
    """Gives one file; hangs up after `patience` bytes of an answer, `hangs` times."""

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.tag = content, '"one"'
        self.paths = ["/" + SOURCES[NAME].path, "/one.aselmdb", "/other/one.aselmdb"]
        self.hangs, self.patience, self.status, self.ranges = 0, 0, 200, []
        self.place, self.lie = "", ""  # a Content-Range and an ETag of its parts that are not true

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        asked = self.headers.get("Range")
        server.ranges.append(asked)
        if server.status != 200 or self.path.partition("?")[0] not in server.paths:
            self.send_error(server.status if server.status != 200 else 404)
            return
        first = 0
        if asked and self.headers.get("If-Range") == server.tag:
            first = int(asked.removeprefix("bytes=").removesuffix("-"))
        if first and first >= len(server.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.content)}")
            self.end_headers()
            return
        body = server.content[first:]
        self.send_response(206 if first else 200)
        self.send_header("ETag", server.lie or server.tag)
        if first:
            last = len(server.content) - 1
            self.send_header("Content-Range", server.place or f"bytes {first}-{last}/{last + 1}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.hangs:
            server.hangs -= 1
            body = body[: server.patience]
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


def archive(members: dict[str, bytes], compresslevel: int = 9) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz", compresslevel=compresslevel) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An archive as OMol25 publishes it: a folder of .aselmdb files."""
    folder = tmp_path_factory.mktemp("published")
    members = {}
    for shard in range(2):
        atoms = molecule("H2O", info={"charge": 0, "spin": 1})
        atoms.calc = SinglePointCalculator(atoms, energy=float(shard), forces=np.zeros((3, 3)))
        write_aselmdb(folder / f"data{shard}.aselmdb", [atoms])
        members[f"neutral_val/data{shard}.aselmdb"] = (folder / f"data{shard}.aselmdb").read_bytes()
    return archive(members)


@pytest.fixture
def server(published: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(fetch.time, "sleep", lambda seconds: None)
    running = Server(published)
    thread = threading.Thread(target=running.serve_forever, args=(0.01,))
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


def get(server: Server, folder: Path, **options) -> list[Path]:
    return fetch.fetch(NAME, folder, server=server.address, progress=False, **options)


def energies(folders: list[Path]) -> list[float]:
    return [atoms.get_potential_energy() for atoms in Dataset(folders)]


def test_a_set_is_fetched_unpacked_and_not_fetched_twice(server: Server, tmp_path: Path) -> None:
    found = get(server, tmp_path / "new")
    assert energies(found) == [0.0, 1.0]
    assert [path.name for path in (tmp_path / "new").iterdir()] == [NAME]
    server.status = 500
    assert get(server, tmp_path / "new") == found


def test_a_connection_that_breaks_is_gone_on_with(server: Server, tmp_path: Path) -> None:
    server.hangs, server.patience = 3, 300
    assert energies(get(server, tmp_path)) == [0.0, 1.0]
    assert server.ranges == [None, "bytes=300-", "bytes=600-", "bytes=900-"]


def test_a_stopped_download_goes_on_in_the_next_run(server: Server, tmp_path: Path) -> None:
    server.hangs, server.patience = 1, 500
    read = fetch._fetch_rest

    def stopped(*arguments) -> bool:
        read(*arguments)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fetch, "_fetch_rest", stopped)
        get(server, tmp_path)
    assert energies(get(server, tmp_path)) == [0.0, 1.0]
    assert server.ranges == [None, "bytes=500-"]


def test_a_file_that_was_replaced_meanwhile_is_begun_again(server: Server, tmp_path: Path) -> None:
    part = tmp_path / "neutral_val.tar.gz.part"
    part.write_bytes(b"x" * 500)
    (tmp_path / "neutral_val.tar.gz.tag").write_text('"another"')
    assert energies(get(server, tmp_path)) == [0.0, 1.0]
    assert not part.exists()


@pytest.mark.parametrize("lie", ["bytes 0-99/100", "bytes 400-9/9", "nonsense", "tag"])
def test_a_part_that_was_not_asked_for_is_not_taken(
    server: Server, tmp_path: Path, published: bytes, lie: str
) -> None:
    (tmp_path / "neutral_val.tar.gz.part").write_bytes(published[:500])
    (tmp_path / "neutral_val.tar.gz.tag").write_text(server.tag)
    server.place, server.lie = ("", '"changed"') if lie == "tag" else (lie, "")
    assert energies(get(server, tmp_path)) == [0.0, 1.0]
    assert server.ranges == ["bytes=500-", None]


def test_a_body_that_is_always_short_is_not_asked_for_for_ever(
    server: Server, tmp_path: Path
) -> None:
    server.hangs, server.patience, server.tag = 10**6, 300, ""
    with pytest.raises(InputError, match="does not answer as it should"):
        get(server, tmp_path)
    assert len(server.ranges) <= fetch.ATTEMPTS + 2


def test_a_whole_part_is_not_fetched_again(
    server: Server, tmp_path: Path, published: bytes
) -> None:
    (tmp_path / "neutral_val.tar.gz.part").write_bytes(published)
    (tmp_path / "neutral_val.tar.gz.tag").write_text(server.tag)
    assert energies(get(server, tmp_path)) == [0.0, 1.0]


def test_a_server_that_stays_silent_is_an_error_and_nothing_is_lost(
    server: Server, tmp_path: Path
) -> None:
    server.hangs, server.patience = 1, 700
    get_on = fetch.ATTEMPTS + 1
    server.hangs = 1
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError, match="does not answer"):
        original = fetch._fetch_rest
        calls = []

        def once(*arguments) -> bool:
            calls.append(1)
            if len(calls) == 1:
                return original(*arguments)
            raise ConnectionRefusedError("refused")

        patch.setattr(fetch, "_fetch_rest", once)
        get(server, tmp_path)
    assert len(calls) == get_on + 1
    assert (tmp_path / "neutral_val.tar.gz.part").stat().st_size == 700


def test_a_disk_that_is_read_only_is_no_fault_of_the_server(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*arguments: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", "neutral_val.tar.gz.tag")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Read-only.*gz.tag"):
        patch.setattr(fetch.Path, "write_text", read_only)
        get(server, tmp_path)
    monkeypatch.setattr(fetch.tarfile, "open", read_only)
    with pytest.raises(OSError, match="Read-only"):
        get(server, tmp_path)
    assert (tmp_path / "neutral_val.tar.gz").exists(), "what was fetched is kept"


@pytest.mark.parametrize(
    "status, words", [(404, "no such file"), (403, "no such file"), (401, "answers 401")]
)
def test_a_refusal_says_what_to_do(server: Server, tmp_path: Path, status: int, words: str) -> None:
    server.status = status
    with pytest.raises(InputError, match=words):
        get(server, tmp_path)
    assert len(server.ranges) == 1, "a refusal was asked again"


def test_a_checksum_is_checked(server: Server, tmp_path: Path, published: bytes) -> None:
    with pytest.raises(InputError, match="has SHA-256"):
        get(server, tmp_path / "wrong", sha256="0" * 64)
    assert not (tmp_path / "wrong" / NAME).exists()
    assert get(server, tmp_path / "right", sha256=hashlib.sha256(published).hexdigest().upper())


def test_an_archive_that_would_write_elsewhere_is_refused(server: Server, tmp_path: Path) -> None:
    server.content = archive({"../evil.txt": b"!"})
    with pytest.raises(InputError, match="outside its folder"):
        get(server, tmp_path / "here")
    assert not (tmp_path / "evil.txt").exists() and not (tmp_path / "here" / "evil.txt").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_not_unpacked(server: Server, tmp_path: Path, kind: bytes) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        tar.addfile(tarfile.TarInfo("neutral_val/first"))
        link = tarfile.TarInfo("neutral_val/data0.aselmdb")
        link.type, link.linkname = kind, "first"  # inside the folder: no filter minds it
        tar.addfile(link)
    server.content = stream.getvalue()
    with pytest.raises(InputError, match="data0.aselmdb, which is a link or a device"):
        get(server, tmp_path)
    assert not (tmp_path / NAME).exists()


def test_a_broken_archive_is_not_taken_for_a_set(
    server: Server, tmp_path: Path, published: bytes
) -> None:
    server.content = published[:-200]
    with pytest.raises(InputError, match="broken"):
        get(server, tmp_path)
    assert not (tmp_path / NAME).exists()


@pytest.mark.parametrize("place", [b"neutral_val/data1", b"second"], ids=["header", "content"])
def test_a_damaged_archive_is_not_taken_for_a_set(
    server: Server, tmp_path: Path, place: bytes
) -> None:
    """tarfile alone ends without a word where a header in the middle makes no sense, and does not
    compare checksums. Stored without compression, each byte here is one of the files'; of a
    compressed archive, a changed byte may unpack to the same files."""
    members = {"neutral_val/data0.aselmdb": b"first" * 999, "neutral_val/data1.aselmdb": b"second"}
    whole = archive(members, compresslevel=0)
    where = whole.index(place)
    server.content = whole[:where] + bytes([whole[where] ^ 0xFF]) + whole[where + 1 :]
    with pytest.raises(InputError, match="broken"):
        get(server, tmp_path)
    assert not (tmp_path / NAME).exists()


def test_a_single_file_appears_only_when_it_is_right(server: Server, tmp_path: Path) -> None:
    server.content = b"content"
    address = f"{server.address}/one.aselmdb"
    for _ in range(2):
        with pytest.raises(InputError, match="has SHA-256"):
            fetch.fetch(address, tmp_path, sha256="0" * 64, progress=False)
        assert not (tmp_path / "one.aselmdb").exists()
    (found,) = fetch.fetch(address, tmp_path, progress=False)
    assert found == tmp_path / "one.aselmdb" and found.read_bytes() == b"content"
    assert fetch.fetch(address, tmp_path, progress=False) == [found]


def test_another_file_of_the_same_name_is_not_taken_for_it(server: Server, tmp_path: Path) -> None:
    server.content = b"content"
    fetch.fetch(f"{server.address}/one.aselmdb", tmp_path, progress=False)
    with pytest.raises(InputError, match=r"is from .*/one.aselmdb: choose another --out"):
        fetch.fetch(f"{server.address}/other/one.aselmdb", tmp_path, progress=False)


def test_an_address_that_gave_nothing_is_in_nobodys_way(server: Server, tmp_path: Path) -> None:
    server.content = b"content"
    with pytest.raises(InputError, match="no such file"):
        fetch.fetch(f"{server.address}/wrong/one.aselmdb", tmp_path, progress=False)
    (found,) = fetch.fetch(f"{server.address}/one.aselmdb", tmp_path, progress=False)
    assert found.read_bytes() == b"content"


def test_an_interrupted_file_is_gone_on_with_and_in_the_way_of_another(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    server.content, server.hangs, server.patience = b"content", 1, 3
    here, other = f"{server.address}/one.aselmdb", f"{server.address}/other/one.aselmdb"
    monkeypatch.setattr(fetch.time, "sleep", interrupt)  # before the second attempt
    with pytest.raises(KeyboardInterrupt):
        fetch.fetch(here, tmp_path, progress=False)
    with pytest.raises(InputError, match="choose another --out"):
        fetch.fetch(other, tmp_path, progress=False)
    (found,) = fetch.fetch(here, tmp_path, progress=False)
    assert found.read_bytes() == b"content" and server.ranges[-1] == "bytes=3-"


def test_an_archive_is_known_by_its_name_behind_a_question(server: Server, tmp_path: Path) -> None:
    address = f"{server.address}/{SOURCES[NAME].path}?download=1"
    assert energies(fetch.fetch(address, tmp_path, progress=False)) == [0.0, 1.0]


def test_too_little_room_is_said_before_the_download(server: Server, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="do not fit on the disk"):
        fetch.download(
            f"{server.address}/{SOURCES[NAME].path}", tmp_path / "a", free=100, progress=False
        )


def test_any_address_and_its_mistakes(server: Server, tmp_path: Path) -> None:
    address = f"{server.address}/{SOURCES[NAME].path}"
    (found,) = fetch.fetch(address, tmp_path, progress=False)
    assert found == tmp_path / "neutral_val" / "neutral_val"
    for name, words in (
        ("omol", "no data set is called 'omol'. There are omol25-neutral-val"),
        ("http://127.0.0.1/", "the address of a file"),
        ("hub:facebook/OMol25", "write hub:OWNER"),
    ):
        with pytest.raises(InputError, match=words):
            fetch.fetch(name, tmp_path)


def test_the_command_prints_where_the_data_are(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--out", str(tmp_path), "--server", server.address + "/"]
    assert cli.main(["data", "fetch", NAME, *options]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / NAME / "neutral_val")
    assert cli.main(["data", "fetch", "nothing", *options]) == 2


def test_a_file_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def stand_in(repository: str, file: str, kind: str) -> Path:
        asked.append((repository, file, kind))
        (tmp_path / "cache").write_bytes(archive({"set/readme.txt": b"hello"}))
        return tmp_path / "cache"

    monkeypatch.setattr(fetch, "download_from_hub", stand_in)
    (found,) = fetch.fetch("hub:facebook/OMol25/some/set.tar.gz", tmp_path / "a", progress=False)
    assert (found / "set" / "readme.txt").read_text() == "hello"
    assert (tmp_path / "cache").exists(), "the hub's cache is not ours to empty"
    fetch.fetch("hub:datasets/a/b/set.tgz", tmp_path / "b", progress=False)
    assert asked == [("facebook/OMol25", "some/set.tar.gz", "model"), ("a/b", "set.tgz", "dataset")]
