"""What files of events share: lines of text in front, then events of one size."""

from __future__ import annotations

from ranvier.data.events.recording import RecordingError


def header_lines(data: bytes, mark: bytes, where: str) -> tuple[list[bytes], int]:
    r"""Split off the lines of text in front of a file.

    Args:
        data: The whole file.
        mark: What each of the lines starts with.
        where: The file, for messages.

    Returns:
        The lines without their ends, and the offset of the first byte behind them.

    Raises:
        RecordingError: a line does not end, or holds bytes that are not text.

    >>> header_lines(b"# one\r\n# two\nrest", b"#", "a.aedat")
    ([b'# one\r', b'# two'], 13)
    """
    lines = []
    start = 0
    while data.startswith(mark, start):
        end = data.find(b"\n", start)
        line = data[start : end if end >= 0 else None]
        if end < 0 or any(byte < 32 and byte not in b"\t\r" for byte in line):
            raise RecordingError(
                f"{where}: byte {start}: the header line {line[:40]!r} is not a line of text. The file is damaged or "
                "cut off: get it anew."
            )
        lines.append(line)
        start = end + 1
    return lines, start


def check_whole_events(data: bytes, start: int, size: int, where: str) -> int:
    """Number of events of `size` bytes from byte `start` to the end of `data`; `where` names the file in messages.

    Raises:
        RecordingError: a part of an event is left over.

    >>> check_whole_events(bytes(11), start=1, size=5, where="a.bin")
    2
    """
    count, rest = divmod(len(data) - start, size)
    if rest:
        number = f"{rest} bytes are" if rest > 1 else "1 byte is"
        after = f"after event {count - 1}" if count else "before the first event"
        raise RecordingError(
            f"{where}: {number} left over at byte {start + size * count}, {after}; an event has {size} "
            "bytes. The file is cut off or of another format: get it anew."
        )
    return count
