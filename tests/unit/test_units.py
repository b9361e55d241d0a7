"""Bytes and seconds in words."""

from __future__ import annotations

import pytest

from wanflow.units import duration, file_size, measured, memory_size


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (84_212, "84 kB"),
        (999_600, "1.0 MB"),
        (1_250_000, "1.2 MB"),
        (126_000_000, "126 MB"),
        (28_580_000_000, "28.6 GB"),
        (126_200_000_000, "126 GB"),
        (2.5e15, "2500 TB"),
    ],
)
def test_files_are_in_powers_of_1000(count: float, words: str) -> None:
    assert file_size(count) == words


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (1000, "1000 bytes"),
        (2**20, "1 MiB"),
        (512 * 2**20, "512 MiB"),
        (2**30, "1.0 GiB"),
        (int(79.1 * 2**30), "79.1 GiB"),
        (141 * 2**30, "141 GiB"),
    ],
)
def test_memory_is_in_powers_of_1024(count: float, words: str) -> None:
    assert memory_size(count) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0 s"),
        (119, "119 s"),
        (150, "2.5 min"),
        (7200, "2.0 h"),
        (47 * 3600, "47.0 h"),
        (5 * 86_400, "5 days"),
        (2974 * 3600, "4 months"),
        (1e9, "32 years"),
    ],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.02139, "0.0214 s"),
        (3.214, "3.21 s"),
        (48.06, "48.1 s"),
        (99.97, "100 s"),
        (7200, "2.0 h"),
    ],
)
def test_measured_seconds_keep_three_figures(seconds: float, words: str) -> None:
    assert measured(seconds) == words
