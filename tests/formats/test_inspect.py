"""Inspection: every layout, every part, LoRAs, relatives, damage; from headers alone, and all
values where that is asked for.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import sparse_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

import wanflow
from wanflow.checkpoint import published as catalogue
from wanflow.checkpoint.values import BadValuesError, check_values, extremes, finite
from wanflow.cli import command_parser, main
from wanflow.cli import inspect as command
from wanflow.cli.output import Output
from wanflow.config import RequestError
from wanflow.convert.convert import convert, open_model
from wanflow.convert.formats import options
from wanflow.inspect import EITHER, Findings, Row, inspect

HERE = Path(__file__).parents[1]
NANO = Path(wanflow.__file__).parent / "assets" / "nano"
EXPERT = "high_noise_model/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of nano to damage."""
    return Path(shutil.copytree(NANO, tmp_path / "model"))


def parse(name: str, *argv: str) -> argparse.Namespace:
    args = command_parser(name).parse_args(argv)
    args.output = Output()
    return args


def rows(found: Findings) -> dict[str, Row]:
    return {str(row.part or row.what): row for row in found.parts}


def alter(file: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    state = load_file(file)
    change(state)
    save_file(state, file)


# what there is


def test_nano() -> None:
    found = inspect(NANO)
    assert (found.layout, found.model, found.complete, found.problem) == (
        "official",
        "nano",
        True,
        None,
    )
    assert found.parameters == {
        "experts_total": 5_479_488,
        "experts_active": 2_739_744,
        "all": 8_611_715,
        "published": None,
    }
    parts = rows(found)
    assert list(parts) == ["vae", "t5", "high", "low", "tokenizer"]
    high = parts["high"]
    assert (high.what, high.container, high.dialect, high.model, high.tensors) == (
        "high-noise expert",
        "safetensors",
        "official",
        "nano",
        177,
    )
    assert high.dtypes == {"BF16": 177} and high.bytes == 2 * high.parameters == 5_479_488
    assert high.files[0].bytes == (NANO / EXPERT).stat().st_size and high.files[0].sha256 is None
    assert high.shape == {
        "dim": 160,
        "ffn_dim": 640,
        "num_layers": 6,
        "in_dim": 16,
        "out_dim": 16,
        "text_dim": 128,
        "freq_dim": 64,
        "patch_size": (1, 2, 2),
    }
    assert (
        parts["vae"].model == parts["t5"].model == "nano"
        and parts["tokenizer"].files[0].name == "google/umt5-xxl/tokenizer.json"
    )


FORMS: dict[str, tuple[str, str, dict[str, int]]] = {
    "diffusers": ("diffusers", "diffusers", {"BF16": 177}),
    "fp8": ("files", "official", {"BF16": 111, "F8_E4M3 scaled": 66}),
    "gguf-q4_1": ("files", "official", {"F32": 114, "Q4_1": 60, "F16": 3}),
}


@pytest.mark.parametrize("to", list(FORMS))
def test_other_layouts(to: str, tmp_path: Path) -> None:
    out = convert(open_model(NANO, {}), tmp_path / "model", options(to), lambda text: None)
    found, (layout, dialect, dtypes) = inspect(out), FORMS[to]
    parts = rows(found)
    assert (
        found.complete
        and found.layout == layout
        and found.model == "nano"
        and set(parts) == {"high", "low", "t5", "vae", "tokenizer"}
    )
    assert (
        parts["low"].dialect == dialect
        and parts["low"].dtypes == dtypes
        and parts["low"].parameters == 2_739_744
    )
    assert (
        not parts["low"].missing + parts["low"].unexpected and found.parameters["all"] == 8_611_715
    )
    alone = inspect(out / Path(parts["low"].path))
    assert (
        alone.layout == "file"
        and alone.complete is None
        and alone.model == "nano"
        and alone.parts[0].what == "low-noise expert"
    )


def test_prefixes_and_experts_that_nothing_names(folder: Path, tmp_path: Path) -> None:
    state = {
        f"model.diffusion_model.{name}": value for name, value in load_file(folder / EXPERT).items()
    }
    save_file(state, tmp_path / "unet.safetensors")
    (row,) = inspect(tmp_path / "unet.safetensors").parts
    assert (row.part, row.what, row.prefix) == (
        None,
        "expert, the tensors do not say which",
        "model.diffusion_model.",
    )
    everything = state | {
        f"vae.{name}": value for name, value in torch.load(NANO / "Wan2.1_VAE.pth").items()
    }
    save_file(everything, tmp_path / "checkpoint.safetensors")
    found = inspect(tmp_path / "checkpoint.safetensors")
    assert [row.what for row in found.parts] == ["expert, the tensors do not say which", "VAE"]
    assert found.bytes == (tmp_path / "checkpoint.safetensors").stat().st_size and [
        row.tensors for row in found.parts
    ] == [177, 146]


def test_missing_unknown_and_misshapen(folder: Path) -> None:
    def damage(state: dict[str, Tensor]) -> None:
        del state["blocks.2.ffn.0.bias"]
        state["blocks.1.ffn.9.bias"] = torch.zeros(1)
        state["blocks.1.norm3.bias"] = torch.zeros(2)

    alter(folder / EXPERT, damage)
    found = inspect(folder)
    high = rows(found)["high"]
    assert not found.complete and "does not fit" in str(found.problem)
    assert high.unexpected == ["blocks.1.ffn.9.bias"] and "blocks.2.ffn.0.bias" in high.missing
    assert high.wrong_shape == ["blocks.1.norm3.bias is [2], not [160]"]
    assert not rows(found)["low"].missing


def test_relatives_are_named_and_not_refused(folder: Path) -> None:
    for change, name in (
        (
            lambda state: state.update({"patch_embedding.weight": torch.zeros(160, 36, 1, 2, 2)}),
            "nano-i2v",
        ),
        (
            lambda state: state.update(
                {
                    "vace_blocks.0.x.weight": torch.zeros(2),
                    "patch_embedding.weight": torch.zeros(160, 16, 1, 2, 2),
                }
            ),
            "Wan VACE (video editing)",
        ),
    ):
        alter(folder / EXPERT, change)
        found = inspect(folder / EXPERT)
        assert (
            found.model == name
            and found.parts[0].error is None
            and found.parts[0].what == "high-noise expert"
        )


def lora(root: Path, name: str = "lora_high_noise.safetensors", alpha: float | None = 8.0) -> Path:
    state = {
        f"diffusion_model.blocks.{n}.{path}.lora_{side}.weight": torch.zeros(shape)
        for n in range(3)
        for path in ("self_attn.q", "ffn.0")
        for side, shape in (("down", (4, 160)), ("up", (160, 4)))
    }
    if alpha is not None:
        state |= {
            f"diffusion_model.blocks.{n}.self_attn.q.alpha": torch.tensor(alpha) for n in range(3)
        }
    save_file(state, root / name)
    return root / name


def test_lora(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = inspect(lora(tmp_path)).parts
    assert row.what == "LoRA for the high-noise expert" and row.lora is not None
    assert (row.lora["ranks"], row.lora["alphas"], row.lora["modules"], row.lora["kinds"]) == (
        [4],
        [8.0],
        6,
        {"LoRA": 6},
    )
    command.inspect(parse("inspect", str(lora(tmp_path, "style.safetensors", None))))
    told = capsys.readouterr().out
    assert (
        "LoRA, for either expert" in told
        and "rank 4, alpha not given (the rank), 6 modules (6 LoRA)" in told
    )


def test_tokenizer(tmp_path: Path) -> None:
    (row,) = inspect(NANO / "google/umt5-xxl/tokenizer.json").parts
    assert (row.what, row.container, row.notes) == ("tokenizer", "tokenizer.json", ["480 pieces"])
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(RequestError, match="not a readable tokenizer"):
        inspect(tmp_path / "tokenizer.json")


# damage


def test_a_broken_file_is_a_row_in_a_folder_and_refused_alone(folder: Path, tmp_path: Path) -> None:
    with (folder / EXPERT).open("r+b") as file:
        file.truncate(1_000_000)
    found = inspect(folder)
    broken = next(row for row in found.parts if row.error)
    assert (
        broken.path == EXPERT
        and broken.what == "not readable"
        and "cut off" in str(broken.error)
        and broken.files[0].bytes == 1_000_000
    )
    assert not found.complete and {row.part for row in found.parts} == {
        "vae",
        "t5",
        "low",
        "tokenizer",
        None,
    }
    empty = tmp_path / "empty"
    empty.mkdir()
    pointer = tmp_path / "x.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\n")
    for path, expected in (
        (folder / EXPERT, "cut off"),
        (empty, "holds no weights"),
        (tmp_path / "none", "is missing"),
        (pointer, "git lfs"),
    ):
        with pytest.raises(RequestError, match=expected) as caught:
            inspect(path)
        assert str(path) in str(caught.value)
    shard = Path(shutil.copytree(NANO / "low_noise_model", tmp_path / "shards"))
    (shard / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}})
    )
    with pytest.raises(RequestError, match=r"lacks 2 of 3 files"):
        inspect(shard)
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    assert (
        inspect(tmp_path / "other.safetensors").parts[0].what
        == "something else (its tensors begin x)"
    )


def test_a_folder_that_lacks_parts_is_described_all_the_same(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "Wan2.1_VAE.pth").unlink()
    command.inspect(parse("inspect", str(folder)))
    told = capsys.readouterr().out
    assert (
        "it does not load as a model: " in told
        and "Wan2.1_VAE.pth" in told
        and "low-noise expert" in told
    )


# hashes


def test_hashes_computed_remembered_and_of_the_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = folder / EXPERT
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    told: list[tuple[int, int]] = []
    (row,) = inspect(file, hashes=True, report=lambda done, total: told.append((done, total))).parts
    assert (row.files[0].sha256, row.files[0].sha256_from) == (sha256, "computed") and told[-1] == (
        file.stat().st_size,
    ) * 2
    assert all(len(str(part.files[0].sha256)) == 64 for part in inspect(folder, hashes=True).parts)

    entry = {
        "size": file.stat().st_size,
        "mtime_ns": file.stat().st_mtime_ns,
        "sha256": sha256,
        "from": "somewhere",
    }
    (folder / ".wanflow-download.json").write_text(json.dumps({"files": {EXPERT: entry}}))
    assert (
        rows(inspect(folder))["high"].files[0].sha256_from == "download"
        and rows(inspect(folder))["low"].files[0].sha256 is None
    )
    (folder / ".wanflow-download.json").unlink()

    blob = tmp_path / "models--a--b" / "blobs" / sha256
    blob.parent.mkdir(parents=True)
    shutil.move(file, blob)
    file.symlink_to(blob)
    assert (
        inspect(file).parts[0].files[0].sha256,
        inspect(file).parts[0].files[0].sha256_from,
    ) == (sha256, "cache")

    monkeypatch.setitem(catalogue.known_hashes(), "known.safetensors", sha256)
    assert inspect(file).parts[0].files[0].published_as == "known.safetensors"
    named = tmp_path / "known.safetensors"
    shutil.copy(NANO / "low_noise_model/diffusion_pytorch_model.safetensors", named)
    assert not inspect(named, hashes=True).parts[0].notes  # a miniature's file
    monkeypatch.setattr("wanflow.inspect.SMALL", 1000)
    assert inspect(named, hashes=True).parts[0].notes == [
        "known.safetensors is named as a published file, and is another one"
    ]


# values


def test_check_finds_what_no_model_can_have(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def damage(state: dict[str, Tensor]) -> None:
        state["blocks.1.ffn.0.weight"][5, 7:9] = float("nan")
        state["blocks.1.ffn.0.weight"][6, 7] = float("-inf")
        state["blocks.1.norm3.weight"].fill_(1)
        state["blocks.1.norm3.bias"].zero_()

    assert list(check_values(NANO)) == []
    alter(folder / EXPERT, damage)
    told: list[tuple[int, int]] = []
    found = list(check_values(folder, lambda done, total: told.append((done, total))))
    assert {(value.tensor, value.what, value.bad) for value in found} == {
        ("blocks.1.ffn.0.weight", "2 NaN and 1 infinite of 102,400 values", True),
        ("blocks.1.norm3.weight", "all 1", False),
        ("blocks.1.norm3.bias", "all zero", False),
    }
    assert all(value.path == EXPERT for value in found) and told[-1][0] == told[-1][1]
    with pytest.raises(BadValuesError, match=r"1 tensors are damaged: blocks.1.ffn.0.weight"):
        command.inspect(parse("inspect", str(folder), "--check"))
    capsys.readouterr()
    assert main(["inspect", str(folder), "--check", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert len(document["values"]) == 3 and document["code"] == 1
    assert "1 tensors are damaged" in document["error"]
    command.inspect(parse("inspect", "nano", "--check"))
    assert "every value is finite" in capsys.readouterr().out


def test_check_unpacks_what_is_packed(tmp_path: Path) -> None:
    for to, ending in (("fp8", "safetensors"), ("gguf-q8_0", "gguf")):
        convert(
            open_model(NANO / EXPERT, {}), tmp_path / f"x.{ending}", options(to), lambda text: None
        )
        assert [value for value in check_values(tmp_path / f"x.{ending}") if value.bad] == []
    state = load_file(tmp_path / "x.safetensors")
    state["blocks.1.ffn.0.weight"].view(torch.uint8)[0, 3] = 127  # NaN
    state["blocks.2.ffn.0.scale_weight"].fill_(float("nan"))
    state["blocks.3.ffn.0.scale_weight"].fill_(0)
    save_file(state, tmp_path / "x.safetensors")
    found = {
        value.tensor: value.what for value in check_values(tmp_path / "x.safetensors") if value.bad
    }
    assert found["blocks.1.ffn.0.weight"] == "1 NaN of 102,400 values" and len(found) == 3
    assert (
        "is zero, negative, NaN or infinite" in found["blocks.2.ffn.0.weight"]
        and "is zero" in found["blocks.3.ffn.0.weight"]
    )
    source = wanflow.checkpoint.source.open_source(tmp_path / "x.gguf")
    with (tmp_path / "x.gguf").open("r+b") as file:
        file.seek(source.starts["blocks.1.ffn.0.weight"])
        file.write(b"\x00\x7c")  # an infinite scale of the first block
    (value,) = (value for value in check_values(tmp_path / "x.gguf") if value.bad)
    assert value.tensor == "blocks.1.ffn.0.weight" and "of 102,400 values" in value.what
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    assert [value.bad for value in check_values(tmp_path / "broken.gguf")] == [True]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_extremes_see_every_value(dtype: torch.dtype) -> None:
    """They stand for isfinite, so a NaN anywhere must show, whatever way the processor takes."""
    for count in (1, 7, 64, 1001, 1 << 16):
        for place in {0, count // 3, count - 1}:
            for bad in (float("nan"), float("inf"), float("-inf")):
                piece = torch.randn(count).to(dtype)
                assert finite(piece)
                piece[place] = bad
                assert not finite(piece)
    assert extremes(torch.empty(0, dtype=dtype)) == (0.0, 0.0)


# the command


def test_the_table_and_the_document(capsys: pytest.CaptureFixture[str]) -> None:
    command.inspect(parse("inspect", "nano"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("nano, the official layout") and lines[1].startswith(
        "5.48M total, 2.74M active (experts 5,479,488"
    )
    table = lines[lines.index("") + 1 :]
    assert table[0].split()[:4] == ["what", "file", "form", "stored"]
    assert (
        len({line.index("safetensors, ") for line in table if "-noise expert" in line}) == 1
    )  # aligned
    command.inspect(parse("inspect", str(NANO / "Wan2.1_VAE.pth")))
    assert "2.58M parameters (2,577,987)" in capsys.readouterr().out
    assert main(["inspect", "nano", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document.pop("code") == 0
    assert list(document) == [
        "path",
        "layout",
        "model",
        "complete",
        "problem",
        "notes",
        "parameters",
        "tensors",
        "bytes",
        "parts",
    ]
    assert list(document["parts"][0]) == [
        "path",
        "what",
        "files",
        "part",
        "container",
        "dialect",
        "prefix",
        "model",
        "shape",
        "dtypes",
        "parameters",
        "tensors",
        "bytes",
        "missing",
        "unexpected",
        "wrong_shape",
        "lora",
        "notes",
        "error",
    ]
    assert document == json.loads(json.dumps(asdict(inspect(NANO))))


def test_on_a_terminal_it_is_drawn(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    command.inspect(parse("inspect", "nano"))
    assert "─" in capsys.readouterr().out


# full size


@pytest.fixture(scope="module")
def full() -> Iterator[Path]:
    """The published model, made of holes."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["", name])
        sparse_checkpoint.main()
        shutil.copytree(NANO / "google", Path(name) / "google")
        yield Path(name)


TIMED = """
import json, sys, time
import torch
from wanflow.cli import inspect, main
start = time.process_time()
assert main(["inspect", sys.argv[1], "--json"]) == 0
print(json.dumps({"seconds": time.process_time() - start}), file=sys.stderr)
"""


@pytest.mark.slow
def test_a_full_size_folder_in_under_two_seconds(full: Path) -> None:
    """All of it, wanflow's own imports among it; by hand, the whole command in 1.9 s, of which
    importing torch takes 1.5.
    """
    env = {**os.environ, "PYTHONPATH": str(HERE.parent / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", TIMED, str(full)],
        capture_output=True,
        text=True,
        env=env,
        check=True,
    )
    document, seconds = json.loads(done.stdout), json.loads(done.stderr)["seconds"]
    assert seconds < 2
    assert (
        document["model"] == "Wan2.2-T2V-A14B"
        and document["complete"]
        and document["tensors"] == 2 * 1095 + 242 + 194
    )
    assert document["parameters"] == {
        "experts_total": 28_576_983_168,
        "experts_active": 14_288_491_584,
        "all": 34_384_786_035,
        "published": "27B total, 14B active",
    }
    parts = {part["part"]: part for part in document["parts"]}
    assert (
        parts["high"]["bytes"] == 57_153_966_336
        and parts["high"]["model"] == EITHER
        and parts["high"]["container"] == "safetensors, 6 shards"
    )
    assert (
        parts["t5"]["model"] == "UMT5-XXL"
        and parts["vae"]["model"] == "the Wan2.1 VAE"
        and parts["t5"]["dtypes"] == {"BF16": 242}
    )


def test_a_folder_of_one_expert(full: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.inspect(parse("inspect", str(full / "low_noise_model")))
    told = capsys.readouterr().out
    assert "does not load" not in told and inspect(full / "low_noise_model").complete is None
    assert (
        "low-noise expert" in told
        and "Wan2.1-T2V-14B, which has the same shapes" in told
        and "27B" not in told
    )


def test_a_large_tokenizer_in_a_gguf_file_costs_no_time(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    import time

    writer = gguf.GGUFWriter(tmp_path / "t5.gguf", "t5encoder")
    writer.add_tokenizer_model("t5")
    writer.add_token_list([f"word{n}" for n in range(256_384)])
    writer.add_token_scores([0.0] * 256_384)
    for name, value in torch.load(NANO / "models_t5_umt5-xxl-enc-bf16.pth").items():
        writer.add_tensor(name, value.float().numpy())
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
    ):
        write()
    writer.close()
    start = time.process_time()
    (row,) = inspect(tmp_path / "t5.gguf").parts
    assert time.process_time() - start < 1
    assert (
        row.what == "text encoder"
        and row.notes == ["carries its tokenizer"]
        and row.container == "GGUF of t5encoder"
    )
