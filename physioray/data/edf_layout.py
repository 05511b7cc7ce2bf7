"""Where things lie in an EDF file, by its header and checked against its size, before anything else is read.

A header is 256 bytes and 256 more for each signal, all text; a header may claim any number, so what it claims is
compared with the bytes that are there. Format: Kemp et al. 1992.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime

from physioray.data.headers import RejectedRecording
from physioray.storage import Location

FIXED = 256
AGAIN = "Export or download it again."
_NOTES = "EDF Annotations"


@dataclass(frozen=True, kw_only=True)
class EdfLayout:
    """Where things lie in a file, checked against its size.

    Attributes:
        header: its bytes.
        sizes: samples in a data record of each signal, notes included.
        notes: which of the signals are notes.
        records: whole data records that the file holds and the header promises.
        seconds: duration of a data record.
        plus: `EDF+C`, `EDF+D` or empty.
    """

    header: bytes
    sizes: tuple[int, ...]
    notes: tuple[int, ...]
    records: int
    seconds: float
    plus: str
    warnings: tuple[str, ...]

    @property
    def encoding(self) -> str:
        """EDF allows ASCII only; what vendors write beyond it is UTF-8 or Latin-1."""
        try:
            self.header.decode("utf-8")
        except UnicodeDecodeError:
            return "latin-1"
        return "utf-8"


def read_layout(place: Location) -> EdfLayout:
    """Read and check where things lie in a file; never more than its header is read.

    Raises:
        RejectedRecording: it cannot be read, is no EDF, or holds less than it claims.
    """
    try:
        size = place.info().size
        if size is None:
            raise RejectedRecording(f"{place.name} must be a file, but there is none. Check the path.")
        with place.filesystem.open_input_file(place.path) as stream:
            head = stream.read(FIXED)
            signals = _read_count(place.name, head, size)
            header = head + stream.read(FIXED * signals)
    except OSError as error:
        reason = " ".join(str(error).split())
        raise RejectedRecording(f"{place.name} must be readable, but: {reason}. {AGAIN}") from error
    labels = [header[FIXED + 16 * i : FIXED + 16 * (i + 1)].decode("latin-1").strip() for i in range(signals)]
    sizes = tuple(_read_samples_per_record(place.name, header, signals, number) for number in range(signals))
    seconds = _read_number(header[244:252])
    if seconds is None or not 0 <= seconds < math.inf:
        raise RejectedRecording(
            f"{place.name} must state how long a data record lasts, but says {_show(header[244:252])}. {AGAIN}"
        )
    records, told = _count_records(place.name, header, size, sum(sizes))
    plus = header[192:197].decode("latin-1")
    return EdfLayout(
        header=header,
        sizes=sizes,
        notes=tuple(number for number, label in enumerate(labels) if label == _NOTES),
        records=records,
        seconds=seconds,
        plus=plus if plus in ("EDF+C", "EDF+D") else "",
        warnings=told,
    )


def _read_count(name: str, head: bytes, size: int) -> int:
    """Number of signals, which the file must at least have room for the headers of."""
    if len(head) < FIXED or head[:8].strip() != b"0":
        kind = "BDF" if head[1:8] == b"BIOSEMI" else f"{_show(head[:8])} and has {size} bytes"
        raise RejectedRecording(f"{name} must begin as an EDF file, with 0, but begins with {kind}. {AGAIN}")
    signals = _read_number(head[252:256])
    if signals is None or signals < 1 or signals != int(signals) or FIXED * (signals + 1) > size:
        raise RejectedRecording(
            f"{name} must describe 1 or more signals in its {size} bytes, but states {_show(head[252:256])}. {AGAIN}"
        )
    stated = _read_number(head[184:192])
    if stated != FIXED * (signals + 1):
        raise RejectedRecording(
            f"{name} must have a header of {FIXED * (int(signals) + 1)} bytes for {int(signals)} signals, but says "
            f"{_show(head[184:192])}. {AGAIN}"
        )
    return int(signals)


def _read_samples_per_record(name: str, header: bytes, signals: int, number: int) -> int:
    first = FIXED + signals * 216 + 8 * number
    value = _read_number(header[first : first + 8])
    if value is None or value < 0 or value != int(value):
        raise RejectedRecording(
            f"{name} must state how many samples a record holds, but says {_show(header[first : first + 8])} for "
            f"signal {number + 1}. {AGAIN}"
        )
    return int(value)


def _count_records(name: str, header: bytes, size: int, samples: int) -> tuple[int, tuple[str, ...]]:
    """Whole data records, and what had to be repaired."""
    stated = _read_number(header[236:244])
    if samples == 0 or stated is None or stated < -1 or stated != int(stated):
        raise RejectedRecording(
            f"{name} must state its number of data records and hold samples in them, but states "
            f"{_show(header[236:244])} records of {samples} samples. {AGAIN}"
        )
    whole, rest = divmod(size - len(header), 2 * samples)
    if whole == 0 and stated < 1:
        raise RejectedRecording(f"{name} must hold at least one data record, but holds none. {AGAIN}")
    if stated < 1:
        cut = f"; {rest} bytes of an unfinished one are left out" if rest else ""
        return whole, (f"the header states {int(stated)} data records, the file holds {whole}, which are used{cut}",)
    expected = len(header) + 2 * samples * int(stated)
    if size < expected:
        raise RejectedRecording(
            f"{name} must have {expected} bytes, but is cut short at {size}. Download it again; if the recording ended "
            "there, write -1 as the header's number of data records, and the whole ones are used."
        )
    extra = size - expected
    return int(stated), ((f"{extra} bytes after the last data record are not read",) if extra else ())


def _read_number(field: bytes) -> float | None:
    """A number as EDF writes it, in ASCII; None if it is none."""
    try:
        value = float(field.decode("ascii").strip())
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _show(field: bytes) -> str:
    return repr(field.decode("latin-1").strip("\x00 "))


def read_start(header: bytes) -> tuple[datetime | None, tuple[str, ...]]:
    """When a recording began; EDF's two digits of the year mean 1985 to 2084."""
    date, time = header[168:176].decode("latin-1"), header[176:184].decode("latin-1")
    try:
        day, month, year = (int(part) for part in date.strip().split("."))
        hour, minute, second = (int(part) for part in time.strip().split("."))
        return datetime(year + (1900 if year >= 85 else 2000), month, day, hour, minute, second), ()
    except ValueError:
        return None, (f"the header's start is no date and time ({date!r} {time!r}); it is not needed",)
