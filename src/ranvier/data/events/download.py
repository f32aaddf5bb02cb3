"""Fetching files over HTTP so that a cut connection costs little, and unpacking archives so that they stay in place."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import lzma
import os
import re
import shutil
import stat
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Any

_PART = ".part"
_BLOCK = 1 << 20  # bytes
_PAUSES = (1.0, 2.0, 4.0, 8.0)  # [s] before each further attempt that follows one without progress
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})


class _InterruptionError(Exception):
    """The connection failed; what has arrived is in the part file, and another attempt may continue it."""


def fetch(
    url: str, path: str | os.PathLike[str], *, md5: str | None = None, timeout: float = 60.0, progress: bool = True
) -> Path:
    """Download a file, unless it is there already.

    What arrives is kept in `<path>.part`. When a connection is cut, it is continued from there, by this call up to
    four times without progress, or by a later one. The file takes its name when it is whole and its checksum is right.
    Without `md5` a part that an earlier call has left is not continued, as nothing would tell whether the two halves
    belong together.

    Args:
        url: An http or https address.
        path: Where to put the file; its folder is created.
        md5: Checksum of the whole file, in hexadecimal digits; None trusts what arrives.
        timeout: Time without any answer [s] that counts as a cut connection.
        progress: Show a progress bar on a terminal.

    Returns:
        `path`.

    Raises:
        ConnectionError: the server refuses, or cannot be reached.
        ValueError: the checksum is wrong, also that of a file that is there already; or `url` is no web address.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"url is {url!r}, expected an address that starts with https:// or http://.")
    if path.exists():
        _check(path, md5, "It was there before: remove or rename it, then try again.")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + _PART)
    if md5 is None:
        part.unlink(missing_ok=True)
    continued = part.exists()
    with _progress(progress) as bar:
        task = bar.add_task(path.name, total=None)
        _fetch_part(url, part, timeout, bar, task)
        if continued and md5 is not None and _md5(part) != md5:
            part.unlink()  # its first half may have been of an older file
            _fetch_part(url, part, timeout, bar, task)
    try:
        _check(part, md5, f"It came from {url}, which may hold another version by now. Try again, or get it by hand.")
    except ValueError:
        part.unlink()
        raise
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    part.replace(path)
    return path


def unpack(archive: str | os.PathLike[str], folder: str | os.PathLike[str]) -> list[Path]:
    """Unpack a zip or tar archive; nothing of it appears in `folder` before all of it is unpacked.

    Args:
        archive: A `.zip`, `.tar`, `.tar.gz`, `.tar.xz` or `.tar.bz2` file.
        folder: Where to unpack; it is created.

    Returns:
        The files and folders that the archive has at its top, sorted.

    Raises:
        ValueError: the file is no such archive or damaged, or a member would land outside `folder`.
        FileExistsError: something of that name is in `folder` already; nothing has been changed.
    """
    archive, folder = Path(archive), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{archive.name}.", suffix=".tmp", dir=folder))
    try:
        _extract(archive, temporary)
        found = sorted(entry for entry in temporary.iterdir() if entry.name != "__MACOSX")
        for entry in found:
            if (folder / entry.name).exists():
                raise FileExistsError(
                    f"{archive} holds {entry.name}, which is in {folder} already. Remove or rename "
                    f"{folder / entry.name}, then try again."
                )
        for entry in found:
            entry.rename(folder / entry.name)
    finally:
        shutil.rmtree(temporary)
    return [folder / entry.name for entry in found]


def _fetch_part(url: str, part: Path, timeout: float, bar: Any, task: Any) -> None:
    """Fill `part` to its end, over as many connections as it takes."""
    failures, most = 0, _size(part)
    while True:
        try:
            _append(url, part, timeout, bar, task)
            return
        except _InterruptionError as error:
            failures = 1 if _size(part) > most else failures + 1
            most = max(most, _size(part))
            if failures > len(_PAUSES):
                raise ConnectionError(
                    f"{url} could not be fetched ({error}). {_size(part)} bytes are kept in {part}; the next call "
                    "continues there. Without network access, put the file there by hand."
                ) from error
            time.sleep(_PAUSES[failures - 1])


def _append(url: str, part: Path, timeout: float, bar: Any, task: Any) -> None:
    """One connection: append to `part` what is missing, or start it anew where the server cannot continue."""
    start = _size(part)
    headers = {"User-Agent": "ranvier", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416 and start:  # nothing behind what we have: it is whole, or longer than the file
                if error.headers.get("Content-Range") != f"bytes */{start}":
                    part.unlink()
                    raise _InterruptionError("the part file was longer than the file") from error
                return
            if error.code in _TRANSIENT:
                raise _InterruptionError(f"the server answers {error.code} {error.reason}") from error
            raise ConnectionError(
                f"{url} could not be fetched: the server answers {error.code} {error.reason}. Has the file moved? Get "
                f"it by hand and put it there as {part.with_name(part.name.removesuffix(_PART))}."
            ) from error
    except (OSError, http.client.HTTPException) as error:
        raise _InterruptionError(str(error) or type(error).__name__) from error
    with response:
        continues = response.status == 206 and _first_byte(response.headers.get("Content-Range")) == start
        if start and not continues and response.status == 206:
            part.unlink()
            raise _InterruptionError("the server sent another part than asked for")
        start = start if continues else 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length is not None and length.isdecimal() else None
        bar.update(task, total=total, completed=start)
        with part.open("ab" if continues else "wb") as file:
            while True:
                try:
                    block = response.read(_BLOCK)
                except (OSError, http.client.HTTPException) as error:
                    raise _InterruptionError(str(error) or type(error).__name__) from error
                if not block:
                    break
                file.write(block)
                bar.update(task, advance=len(block))
    if total is not None and _size(part) < total:
        raise _InterruptionError(f"the connection ended after {_size(part)} of {total} bytes")


def _first_byte(content_range: str | None) -> int | None:
    found = re.match(r"bytes (\d+)-", content_range or "")
    return int(found[1]) if found else None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _check(path: Path, md5: str | None, advice: str) -> None:
    if md5 is not None and (found := _md5(path)) != md5:
        raise ValueError(f"{path} ({_size(path)} bytes) has md5 {found}, expected {md5}. {advice}")


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _progress(shown: bool) -> Any:
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal))


def _extract(archive: Path, folder: Path) -> None:
    damaged = f"{archive} cannot be unpacked ({{}}). Remove it and get it anew."
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as zipped:
                for member in zipped.infolist():
                    _check_member(member, archive)
                zipped.extractall(folder)
        elif tarfile.is_tarfile(archive):
            with tarfile.open(archive) as tarred:
                tarred.extractall(folder, filter="data")  # refuses members that would land outside
                while tarred.fileobj is not None and tarred.fileobj.read(_BLOCK):
                    pass  # the compressed stream has its checksum at its end, behind the last member
        else:
            raise ValueError(damaged.format("it is neither a zip nor a tar archive"))
    except (
        zipfile.BadZipFile,
        tarfile.TarError,
        gzip.BadGzipFile,
        EOFError,
        zlib.error,
        lzma.LZMAError,
        RuntimeError,
    ) as error:
        raise ValueError(damaged.format(error)) from error


def _check_member(member: zipfile.ZipInfo, archive: Path) -> None:
    """Refuse what `ZipFile` would quietly write elsewhere or as something else."""
    name = PurePosixPath(member.filename.replace("\\", "/"))
    if name.is_absolute() or ".." in name.parts or ":" in name.parts[:1]:
        raise ValueError(
            f"{archive}: member {member.filename!r} would land outside the folder. Do not trust this file."
        )
    if stat.S_ISLNK(member.external_attr >> 16):
        raise ValueError(f"{archive}: member {member.filename!r} is a link, expected files. Do not trust this file.")
