"""Write bytes and seconds for people: GiB for memory, GB for files, everywhere the same."""

from __future__ import annotations

DAY = 86_400  # seconds


def memory_size(count: float) -> str:
    """Return bytes of memory in words: `79.1 GiB`, `512 MiB`."""
    return _words(count, 1024, ("KiB", "MiB", "GiB", "TiB"))


def file_size(count: float) -> str:
    """Return bytes of a file, a disk or a transfer in words: `28.6 GB`, `1.3 MB`, `84 kB`."""
    return _words(count, 1000, ("kB", "MB", "GB", "TB"))


def duration(seconds: float) -> str:
    """Return seconds in words: `4 s`, `2.5 min`, `3.1 h`, `5 days`, `4 months`, `12 years`."""
    for unit, length in (("years", 365 * DAY), ("months", 30 * DAY), ("days", DAY)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    if seconds >= 7200:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.0f} s"


def measured(seconds: float) -> str:
    """Return measured seconds with three figures, `0.0214 s`; long ones as `duration`."""
    return f"{seconds:.3g} s" if seconds < 99.95 else duration(seconds)


def _words(count: float, base: int, units: tuple[str, ...]) -> str:
    """Return an amount in the largest unit that it fills, with tenths where they say something."""
    value, unit = float(count), "bytes"
    for larger in units:
        if value < base - 0.5:
            break
        value, unit = value / base, larger
    whole = unit in ("bytes", "kB", "KiB", "MiB") or value >= 99.95
    return f"{value:.{0 if whole else 1}f} {unit}"
