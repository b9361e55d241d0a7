"""Damaged files of every kind end in one clear error or none: no crash, no hang, no memory for a
lie. `make fuzz` tries ten times as many.

What is damaged, and how, is in helpers/fuzz.py and helpers/mutations.py.
`python tests/helpers/fuzz.py CONTAINER SEED 1` shows one again.
"""

from __future__ import annotations

import base64
import json
import os
import re
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers import fuzz
from helpers.common import open_part
from safetensors.torch import save_file

from wanflow.checkpoint.infer_config import _numbered
from wanflow.checkpoint.key_maps import to_official
from wanflow.checkpoint.source import open_source
from wanflow.checkpoint.tokenizers import check_charsmap, open_tokenizer
from wanflow.config import RequestError
from wanflow.pipeline import Run

COUNT = int(os.environ.get("WANFLOW_FUZZ", "200"))
ENOUGH = 3  # failures to be told of at once


@pytest.fixture(scope="module")
def worker() -> Iterator[fuzz.Worker]:
    with fuzz.worker() as one:
        yield one


@pytest.fixture(scope="module")
def bare() -> Iterator[fuzz.Worker]:
    with fuzz.worker(bare=True) as one:
        yield one


@pytest.mark.parametrize("container", fuzz.CONTAINERS)
def test_nothing_but_one_clear_error(container: str, worker: fuzz.Worker) -> None:
    refused, faults = 0, list[str]()
    seeds = range(0, COUNT, fuzz.CONTAINERS[container].every)
    for seed in seeds:
        result = worker.try_one(container, seed)
        refused += result.get("refused", 0) > 0
        if "fault" in result:
            faults.append(f"{container}, seed {seed}: {result['fault']}")
            if len(faults) == ENOUGH:
                break
    assert not faults, "\n".join(faults)
    assert (
        len(seeds) / 5 < refused < len(seeds)
    )  # most damage is seen, and not everything is refused


# The net itself: one with a hole in it would pass everything.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("allocate", "allocate memory"),
        ("touch", "memory grew"),
        ("another error", "KeyError"),
        ("two lines", "the message holds"),
        ("no name", "does not name the file"),
        ("code", "code of the file was run"),
        ("crash", "Segmentation"),
        ("hang", "Timeout"),
    ],
)
@pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere memory that is only asked for is not seen"
)
def test_every_fault_is_seen(fault: str, told: str, bare: fuzz.Worker) -> None:
    result = bare.try_one(fault, 0, 0.5 if fault == "hang" else fuzz.SECONDS)
    assert "fault" in result
    assert re.search(told, result["fault"]), result["fault"]


def test_a_seed_is_always_the_same_file(tmp_path: Path) -> None:
    bench = fuzz.Bench(tmp_path)
    for name, container in fuzz.CONTAINERS.items():
        one, other = bench.damaged(name, 7), bench.damaged(name, 7)
        assert one == other and one[1] != bench.good[one[0]] and one[0] in dict(container.files)


# What damage has found, by hand: each of these once crashed, hung, took memory, or told nobody
# which file it was.


class Memory:
    def __reduce__(self) -> tuple[object, ...]:
        return bytearray, (1 << 33,)


def refusal(path: Path, action: Callable[[Path], object]) -> str:
    with pytest.raises(RequestError) as caught:
        action(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "blocks.99999999.ffn.0.weight",
        f"blocks.{'9' * 5000}.ffn.0.weight",
        "decoder.upsamples.99999999.resample.1.weight",
    ],
)
def test_a_name_with_a_huge_number_makes_no_huge_table(name: str, tmp_path: Path) -> None:
    kind = "vae" if name.startswith("decoder") else "dit"
    assert (
        to_official(
            kind, [name, "decoder.conv1.weight" if kind == "vae" else "patch_embedding.weight"]
        )[name]
        == name
    )  # type: ignore[arg-type]
    many = {f"blocks.{number}.modulation": torch.zeros(1) for number in range(300)}
    save_file(
        many | {"patch_embedding.weight": torch.zeros(32, 16, 1, 2, 2)}, tmp_path / "x.safetensors"
    )
    source = open_part("dit", tmp_path / "x.safetensors")
    with pytest.raises(RequestError, match="at most 256"):
        _numbered(source, "blocks.")


@pytest.mark.parametrize(
    "charsmap",
    [
        b"\xff\xff\xff\xff",
        struct.pack("<I", 1024) + bytes(1000),
        struct.pack("<I", 1024) + struct.pack("<I", 1 << 30) + bytes(1020),
        fuzz.CHARSMAP[:-3],
        fuzz.CHARSMAP[:-1] + b"\xff",
    ],
)
def test_a_normaliser_that_leads_outside_itself(charsmap: bytes, tmp_path: Path) -> None:
    check_charsmap(fuzz.CHARSMAP, tmp_path)
    told = refusal(tmp_path, lambda path: check_charsmap(charsmap, path))
    assert "normaliser" in told
    said = {
        "normalizer": {
            "type": "Precompiled",
            "precompiled_charsmap": base64.b64encode(charsmap).decode(),
        }
    }
    for text in (
        json.dumps(said),
        json.dumps(said).replace("precompiled_ch", "precompiled\\u005fch"),
    ):
        (tmp_path / "tokenizer.json").write_text(text)
        assert refusal(tmp_path / "tokenizer.json", open_tokenizer).endswith(
            told.partition(": ")[2]
        )


def test_pickles_that_ask_for_memory_or_hold_odd_numbers(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"x": torch.ones(2), "y": Memory()}, path)
    assert "bytearray" in refusal(path, open_source)
    torch.save({"x": torch.ones(2, dtype=torch.complex64)}, path)
    assert "not a plain tensor but torch.complex64" in refusal(path, open_source)


def test_names_that_a_terminal_would_obey(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    for name in ("a\nb", "\x1b[2J", "\u202egnp.x"):
        save_file({name: torch.ones(2)}, path)
        assert "a tensor is called" in refusal(path, open_source)
    assert str(RequestError("a\nb\ud800", "c")) == "a\\nb\\ud800\nc"
    assert len(str(RequestError("x" * 10_000))) < 3100


@pytest.mark.slow
def test_scales_of_no_format_and_a_state_without_end(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(
        {"a.weight": torch.ones(2)},
        path,
        {"_quantization_metadata": json.dumps({"layers": {"a": {"format": ["x"]}}})},
    )
    assert "['x'] is no format's name" in refusal(path, open_source)
    save_file({"x": torch.ones(2)}, path, {"wanflow": "[" * 100_000})
    assert "not a saved wanflow run" in refusal(path, Run.load)
