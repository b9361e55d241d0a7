"""What was measured on this machine is kept, and is never trusted blindly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from wanflow import remembered
from wanflow.remembered import Remembered


def test_values_outlive_the_object_and_other_processes(tmp_path: Path) -> None:
    first, second = (Remembered(tmp_path / "new", "H100", "2.13") for _ in range(2))
    first.put({"ms": 1.5}, "attention", 128)
    second.put("flash", "kernel")
    assert Remembered(tmp_path / "new", "H100", "2.13").get("attention", 128) == {"ms": 1.5}
    assert Remembered(tmp_path / "new", "H100", "2.13").get("kernel") == "flash"
    assert Remembered(tmp_path / "new", "H100", "2.12").get("kernel") is None
    assert Remembered(None, "H100", "2.13").get("kernel") is None


@pytest.mark.parametrize("data", ["", "[]", "{", '{"machine": "other", "values": {"kernel": 1}}'])
def test_a_damaged_file_is_as_none(tmp_path: Path, data: str) -> None:
    Remembered(tmp_path, "H100").put("flash", "kernel")
    (file,) = tmp_path.iterdir()
    file.write_text(data)
    again = Remembered(tmp_path, "H100")
    assert again.get("kernel") is None
    again.put("cudnn", "kernel")
    assert Remembered(tmp_path, "H100").get("kernel") == "cudnn"


def test_a_folder_that_cannot_be_written_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    values = Remembered(tmp_path / "file" / "folder", "H100")
    values.put("flash", "kernel")
    assert values.get("kernel") == "flash"


def test_it_stays_small(tmp_path: Path) -> None:
    values = Remembered(tmp_path, "H100")
    for n in range(remembered.MOST + 3):
        values.put(n, "entry", n)
    again = Remembered(tmp_path, "H100")
    assert again.get("entry", 2) is None and again.get("entry", 3) == 3


def test_a_device_is_its_model_and_its_software(monkeypatch: pytest.MonkeyPatch) -> None:
    here = remembered.of_device(None, torch.device("cpu"))._machine
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert remembered.of_device(None, torch.device("cpu"))._machine != here
