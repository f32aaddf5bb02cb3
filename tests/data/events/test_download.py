"""Downloads from a server in this process: cut connections, servers that cannot continue, wrong files; archives."""

import hashlib
import io
import os
import stat
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from ranvier.data.events import download
from ranvier.data.events.download import fetch, unpack

CONTENT = np.random.default_rng(0).bytes(300_000)
MD5 = hashlib.md5(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `content`; the attributes make it fail."""

    content = CONTENT
    ranges = True  # answers Range requests
    cuts: list[int]  # after how many bytes to drop the connection, one for each of the first requests
    refusals: list[int]  # statuses to answer first
    shift = 0  # starts a range so many bytes too late
    chunked = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.cuts, self.refusals, self.asked = [], [], []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/data/file.zip"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.asked.append(wanted)
        if self.server.refusals:
            self.send_error(self.server.refusals.pop(0))
            return
        content, total = self.server.content, len(self.server.content)
        if wanted and self.server.ranges:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= total:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{total}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            start += self.server.shift
            content = content[start:]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        else:
            self.send_response(200)
        if not self.server.chunked:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: self.server.cuts.pop(0)] if self.server.cuts else content)

    def log_message(self, *_: object) -> None:
        """Stay silent."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(download, "_PAUSES", (0.0, 0.0))
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_file_arrives_whole(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.zip"
    assert fetch(server.url, path, md5=MD5) == path
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_is_there_is_not_fetched(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "file.zip"
    path.write_bytes(CONTENT)
    fetch(server.url, path, md5=MD5)
    assert server.asked == []
    path.write_bytes(CONTENT[:9])
    with pytest.raises(ValueError, match=rf"file.zip \(9 bytes\) has md5 .*, expected {MD5}. It was there before"):
        fetch(server.url, path, md5=MD5)
    assert path.read_bytes() == CONTENT[:9]


def test_a_cut_connection_is_continued(server: Server, tmp_path: Path) -> None:
    """Only what is missing is asked for again."""
    server.cuts = [100_000, 50_000]
    fetch(server.url, tmp_path / "file.zip", md5=MD5)
    assert server.asked == [None, "bytes=100000-", "bytes=150000-"]
    assert (tmp_path / "file.zip").read_bytes() == CONTENT


def test_a_later_call_continues(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "file.zip"
    server.cuts = [70_000, 0, 0, 0]
    with pytest.raises(
        ConnectionError, match=r"the connection ended after 70000 of 300000 bytes\). 70000 bytes are kept"
    ):
        fetch(server.url, path, md5=MD5)
    assert not path.exists()
    assert (tmp_path / "file.zip.part").stat().st_size == 70_000
    fetch(server.url, path, md5=MD5)
    assert server.asked[-1] == "bytes=70000-"
    assert path.read_bytes() == CONTENT
    assert not (tmp_path / "file.zip.part").exists()


def test_without_a_checksum_a_part_is_not_continued(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.zip.part").write_bytes(b"of another file")
    fetch(server.url, tmp_path / "file.zip")
    assert server.asked == [None]
    assert (tmp_path / "file.zip").read_bytes() == CONTENT


def test_a_server_that_cannot_continue_sends_it_all(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    server.cuts = [100_000]
    fetch(server.url, tmp_path / "file.zip", md5=MD5)
    assert server.asked == [None, "bytes=100000-"]
    assert (tmp_path / "file.zip").read_bytes() == CONTENT


def test_a_server_that_cannot_continue_and_always_cuts_is_given_up(server: Server, tmp_path: Path) -> None:
    """Lengths that go up and down are no progress."""
    server.ranges = False
    server.cuts = [100_000, 90_000, 99_000, 80_000, 95_000]
    with pytest.raises(ConnectionError, match="could not be fetched"):
        fetch(server.url, tmp_path / "file.zip", md5=MD5)
    assert len(server.asked) == 3


def test_a_part_that_is_whole_already_is_taken(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.zip.part").write_bytes(CONTENT)
    fetch(server.url, tmp_path / "file.zip", md5=MD5)
    assert (tmp_path / "file.zip").read_bytes() == CONTENT


@pytest.mark.parametrize("part", [CONTENT + b"more", b"an older version", CONTENT[:1000] + b"?" + CONTENT[1001:]])
def test_a_part_of_another_file_is_fetched_anew(server: Server, tmp_path: Path, part: bytes) -> None:
    (tmp_path / "file.zip.part").write_bytes(part)
    fetch(server.url, tmp_path / "file.zip", md5=MD5)
    assert (tmp_path / "file.zip").read_bytes() == CONTENT


def test_a_range_that_starts_elsewhere_is_not_appended(server: Server, tmp_path: Path) -> None:
    server.cuts = [100_000]
    server.shift = 1
    fetch(server.url, tmp_path / "file.zip", md5=MD5)
    assert server.asked == [None, "bytes=100000-", None]
    assert (tmp_path / "file.zip").read_bytes() == CONTENT


def test_a_wrong_checksum_leaves_nothing(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"has md5 {MD5}, expected {'0' * 32}. It came from http"):
        fetch(server.url, tmp_path / "file.zip", md5="0" * 32)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("status", [404, 403])
def test_a_refusal_says_what_to_do(server: Server, tmp_path: Path, status: int) -> None:
    server.refusals = [status]
    with pytest.raises(
        ConnectionError, match=rf"the server answers {status} .* by hand and put it there as .*file.zip\."
    ):
        fetch(server.url, tmp_path / "file.zip", md5=MD5)
    assert len(server.asked) == 1


def test_a_busy_server_is_asked_again(server: Server, tmp_path: Path) -> None:
    server.refusals = [503, 429]
    fetch(server.url, tmp_path / "file.zip", md5=MD5)
    assert (tmp_path / "file.zip").read_bytes() == CONTENT


def test_a_server_that_does_not_say_how_much_comes(server: Server, tmp_path: Path) -> None:
    server.chunked = True
    fetch(server.url, tmp_path / "file.zip", md5=MD5)
    assert (tmp_path / "file.zip").read_bytes() == CONTENT


def test_no_server(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConnectionError, match=r"could not be fetched .* 0 bytes are kept .* by hand"):
        fetch("http://127.0.0.1:9/file.zip", tmp_path / "file.zip", md5=MD5, timeout=1.0)


def test_only_web_addresses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"url is 'file:///etc/passwd', expected an address that starts with https"):
        fetch("file:///etc/passwd", tmp_path / "a")


def test_a_full_disk_is_not_a_cut_connection(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FullDisk(io.FileIO):
        def write(self, _: object) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", lambda self, mode: FullDisk(os.fspath(self), "a"))
    with pytest.raises(OSError, match="No space left"):
        fetch(server.url, tmp_path / "file.zip")
    assert len(server.asked) == 1


def zipped(path: Path, members: dict[str, bytes], mode: int = 0o644) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            member = zipfile.ZipInfo(name)
            member.external_attr = mode << 16
            archive.writestr(member, content)
    return path


def tarred(path: Path, members: dict[str, bytes], link: str = "") -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if link:
                member.type, member.linkname = tarfile.SYMTYPE, link
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


TREE = {"Train/0/00001.bin": b"one", "Train/1/00002.bin": b"two", "README.txt": b"read"}


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_archives_are_unpacked(tmp_path: Path, pack: type) -> None:
    archive = pack(tmp_path / "a.archive", {**TREE, "__MACOSX/._x": b"junk"})
    folder = tmp_path / "data"
    assert unpack(archive, folder) == [folder / "README.txt", folder / "Train"]
    assert {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()} == TREE


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_what_is_there_is_not_touched(tmp_path: Path, pack: type) -> None:
    archive = pack(tmp_path / "a.archive", TREE)
    mine = tmp_path / "data" / "Train" / "0" / "00001.bin"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"holds Train, which is in .*data already. Remove or rename"):
        unpack(archive, tmp_path / "data")
    assert [path.name for path in (tmp_path / "data").rglob("*")] == ["Train", "0", "00001.bin"]
    assert mine.read_bytes() == b"mine"


@pytest.mark.parametrize("pack", [zipped, tarred])
@pytest.mark.parametrize("name", ["../outside.txt", "a/../../outside.txt", "/tmp/ranvier-outside.txt"])
def test_nothing_lands_outside(tmp_path: Path, pack: type, name: str) -> None:
    """tarfile's data filter takes the slash off an absolute name, or refuses it."""
    folder = tmp_path / "deep" / "data"
    archive = pack(tmp_path / "a.archive", {"good.txt": b"good", name: b"bad"})
    try:
        unpack(archive, folder)
    except ValueError as error:
        assert "outside" in str(error)  # noqa: PT017
        assert list(folder.iterdir()) == []
    assert not Path("/tmp/ranvier-outside.txt").exists()
    assert [path for path in tmp_path.rglob("outside.txt") if not path.is_relative_to(folder)] == []


def test_links_are_refused(tmp_path: Path) -> None:
    link = zipped(tmp_path / "a.zip", {"link": b"/etc/passwd"}, mode=stat.S_IFLNK | 0o777)
    with pytest.raises(ValueError, match="member 'link' is a link"):
        unpack(link, tmp_path / "data")
    with pytest.raises(ValueError, match=r"b.tar.gz cannot be unpacked"):
        unpack(tarred(tmp_path / "b.tar.gz", {"link": b""}, link="/etc/passwd"), tmp_path / "data")


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_damaged_archives_are_named_and_leave_nothing(tmp_path: Path, pack: type) -> None:
    noise = np.random.default_rng(1).bytes(100_000)
    good = pack(tmp_path / "good", {"a/b.bin": noise}).read_bytes()
    damaged = tmp_path / "damaged.archive"
    for content in (good[:50_000], good[:50_000] + bytes(1_000) + good[51_000:], b"", b"noise" * 100):
        damaged.write_bytes(content)
        with pytest.raises(ValueError, match=r"damaged.archive cannot be unpacked .* Remove it and get it anew"):
            unpack(damaged, tmp_path / "data")
        assert list((tmp_path / "data").iterdir()) == []
