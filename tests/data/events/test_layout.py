"""Headers of text and events of one size, as several formats have them."""

import pytest

from ranvier.data.events.layout import check_whole_events, header_lines
from ranvier.data.events.recording import RecordingError


def test_header_lines_stop_at_the_first_other_byte() -> None:
    assert header_lines(b"%a\n% b\r\n\x0c%c\n", b"%", "a.dat") == ([b"%a", b"% b\r"], 8)
    assert header_lines(b"\x0c%a\n", b"%", "a.dat") == ([], 0)
    assert header_lines(b"", b"%", "a.dat") == ([], 0)


@pytest.mark.parametrize(("data", "byte"), [(b"# no end", 0), (b"# a\n#\x07\n", 4)])
def test_header_lines_that_are_no_text(data: bytes, byte: int) -> None:
    with pytest.raises(RecordingError, match=f"a.aedat: byte {byte}: the header line .* is not a line of text"):
        header_lines(data, b"#", "a.aedat")


def test_partial_events_are_refused() -> None:
    assert check_whole_events(bytes(21), 1, 5, "a.bin") == 4
    with pytest.raises(
        RecordingError, match="a.bin: 1 byte is left over at byte 6, after event 0; an event has 5 bytes"
    ):
        check_whole_events(bytes(7), 1, 5, "a.bin")
    with pytest.raises(RecordingError, match="4 bytes are left over at byte 6, after event 0"):
        check_whole_events(bytes(10), 1, 5, "a.bin")
