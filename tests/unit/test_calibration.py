"""What `wanflow bench` measures of a device, written and read again."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from wanflow.config import RequestError
from wanflow.plan.calibration import RATES, Calibration, from_json, read_calibration
from wanflow.plan.cards import GPUS, Rates

MEASURED = Calibration(
    "NVIDIA H100",
    80 * 10**9,
    "bfloat16",
    {"torch": "2.13.0"},
    matmul=6.4e14,
    attention=5.1e14,
    memory=2.6e12,
    copy=5.2e10,
    context=520_000_000,
    fragmentation=0.03,
)


@pytest.mark.parametrize("whole", [True, False], ids=["document", "object"])
def test_it_comes_back_as_it_was(whole: bool, tmp_path: Path) -> None:
    file, value = tmp_path / "calibration.json", MEASURED.to_json()
    file.write_text(json.dumps({"parts": [], "calibration": value} if whole else value))
    assert read_calibration(file) == MEASURED
    assert "disk" not in value and "workspace" not in value  # not measured


def test_what_was_measured_replaces_what_is_assumed() -> None:
    assumed = GPUS["h100-80gb"].rates
    rates = MEASURED.rates(assumed)
    assert rates is not None
    assert (rates.matmul, rates.attention, rates.memory) == (6.4e14, 5.1e14, 2.6e12)
    assert (rates.disk, rates.low, rates.link) == (assumed.disk, assumed.low, assumed.link)
    assert rates.source == "wanflow bench" != assumed.source
    assert Calibration("GPU", 1, "bfloat16").rates(assumed) is assumed  # nothing was measured


def test_an_unknown_device_needs_every_rate() -> None:
    assert MEASURED.rates(None) is None
    every = Calibration("GPU", 1, "float16", **dict.fromkeys(RATES, 0.5), versions={})
    assert every.rates(None) == Rates(*[0.5] * len(RATES), source="wanflow bench")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "calibration format 2; expected 1"),
        ({"format": True}, "calibration format True; expected 1"),
        ({"speed": 1.0}, "calibration 'speed'; expected one of device, "),
        ({"matmul": "fast"}, "matmul 'fast'; expected a number from 1000 to 1e+18"),
        ({"matmul": True}, "matmul True; expected a number"),
        ({"matmul": -1e12}, "matmul -1000000000000.0; expected a number"),
        ({"matmul": None}, "matmul None; expected a number"),
        ({"launch": 2.0}, "launch 2.0; expected a number from 1e-09 to 1;"),
        ({"context": 0.5}, "context 0.5; expected a whole number from 0"),
        ({"context": 2**50}, "expected a whole number"),
        ({"fragmentation": 11}, "fragmentation 11; expected a number from 0 to 10"),
        ({"dtype": "fp8"}, "dtype 'fp8'; expected one of float32, bfloat16, float16"),
        ({"device": 7}, "device 7; expected the name of a device"),
        ({"device_memory": -1}, "device_memory -1; expected a number of bytes"),
        ({"versions": {"torch": 2}}, "expected an object of texts"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)) as raised:
        from_json({**MEASURED.to_json(), **change}, "there.json")
    assert str(raised.value).startswith("there.json: ") and "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["[]", "null", '{"calibration": 3}', '{"matmul": 1e12}', "{", ""])
def test_another_file_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(RequestError, match=r"a\.json"):
        read_calibration(tmp_path / "a.json")


@pytest.mark.parametrize("name", ["device", "device_memory", "dtype"])
def test_the_device_must_be_named(name: str) -> None:
    value = MEASURED.to_json()
    del value[name]
    with pytest.raises(RequestError, match=f"calibration {name} None; expected"):
        from_json(value, "there.json")
