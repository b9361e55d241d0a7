"""Files of strangers that ask for time, memory or silence: refused in words, at once."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.common import open_part, refusal
from helpers.memory import measurable, measured
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import wanflow
from wanflow.checkpoint import state_dict
from wanflow.checkpoint.checkpoint import open_checkpoint
from wanflow.checkpoint.folders import open_folder
from wanflow.checkpoint.load import load_tokenizer
from wanflow.checkpoint.source import open_source
from wanflow.checkpoint.tokenizers import open_tokenizer
from wanflow.convert.convert import convert, open_model
from wanflow.convert.formats import options
from wanflow.inspect import inspect
from wanflow.lora.reader import read_adapter

NANO = Path(wanflow.__file__).parent / "assets" / "nano"
EXPERT = NANO / "high_noise_model"


def safetensors(path: Path, header: dict[str, Any], data: bytes = b"") -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


# pickles


def pickled(path: Path, pickle: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickle)
        archive.writestr("a/byteorder", "little")
        archive.writestr("a/version", "3\n")
    return path


def words(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def nested(count: int) -> bytes:
    return b"(" + b")q\x00" + b"h\x00h\x00\x86q\x00" * count + b"t"


HEX = b"c_codecs\nencode\n" + words("A" * 1000) + words("latin-1") + b"\x86R"
HEX += b"".join(b"q\x00c_codecs\nencode\nh\x00" + words("hex") + b"\x86R" for _ in range(24))
BOMBS = {
    "a key that takes 2^40 steps to hash": b"\x80\x02}" + nested(40) + b"Ns.",
    "a key whose name takes 2^25 letters": b"\x80\x02}" + nested(25) + b"Ns.",
    "codecs that double a text 24 times": b"\x80\x02" + HEX + b".",
    "a global of another module": b"\x80\x02cos\nsystem\n" + words("true") + b"\x85R.",
    "bytes of any length": b"\x80\x02c__builtin__\nbytearray\n" + b"J\xff\xff\xff\x7f\x85R.",
    "a number of a million digits": b"\x80\x02}\x8b"
    + struct.pack("<I", 400_000)
    + b"\7" * 400_000
    + b"Ns.",
    "endless marks": b"\x80\x02" + b"(" * 3_000_000 + b".",
    "a pickle of 5 MB": b"\x80\x02}" + words("x" * 5_000_000) + b"Ns.",
}


@pytest.mark.parametrize("case", BOMBS)
def test_pickles_that_torch_would_follow(case: str, tmp_path: Path) -> None:
    path = pickled(tmp_path / "x.pth", BOMBS[case])
    assert str(path) in refusal(lambda: open_source(path))


def test_a_training_checkpoint_is_read_whatever_stands_beside_the_weights(tmp_path: Path) -> None:
    model = nn.Linear(3, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    half = nn.Parameter(torch.arange(4.0).half())
    state = {**model.state_dict(), "half": half, "fp8": torch.ones(2).to(torch.float8_e4m3fn)}
    state |= {"view": torch.arange(24.0).view(4, 6)[1:3, ::2], "scalar": torch.tensor(3)}
    saved = {"state_dict": state, "optimizer": optimizer.state_dict(), "lr": 1e-4, "epoch": None}
    for protocol in (2, 4):
        torch.save(saved, tmp_path / "x.pth", pickle_protocol=protocol)
        source = open_source(tmp_path / "x.pth")
        assert list(source.tensors) == [*model.state_dict(), "half", "fp8", "view", "scalar"]
        for name, value in state.items():
            found = source.read(name)
            assert found.dtype == value.dtype or name == "fp8"  # which unpacks without a scale
            assert torch.equal(found.float(), value.detach().float())
            if value.ndim:
                rows = source.read(name, torch.float32, slice(1, 2))
                assert torch.equal(rows, value.detach().float()[1:2])
            pieces = torch.cat([piece.float().clone() for piece in source.stream(name)])
            assert torch.equal(pieces, value.detach().float().flatten())


def test_a_module_with_metadata_is_a_state_dict(tmp_path: Path) -> None:
    model = nn.BatchNorm1d(3)  # an OrderedDict with an attribute `_metadata`, and an integer
    torch.save(model.state_dict(), tmp_path / "x.pth")
    source = open_source(tmp_path / "x.pth")
    assert set(source.tensors) == set(model.state_dict())
    assert source.read("num_batches_tracked").item() == 0


def test_records_that_overlap_or_are_missing(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"x": torch.ones(4)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    short = next(name for name in entries if name.endswith("/data/0"))
    for content in (None, b"1234"):
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in entries.items():
                if name != short or content is not None:
                    archive.writestr(name, content if name == short and content else data)
        assert "claims more data" in refusal(lambda: open_source(path))
    pickle = next(name for name in entries if name.endswith("data.pkl"))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(pickle, b"cos\n.")
    assert "not a complete file" in refusal(lambda: open_source(path))


def test_walking_takes_what_torch_writes_and_nothing_else() -> None:
    assert state_dict.walk(b"\x80\x02}X\x01\x00\x00\x00aK\x05s.") == {"a": 5}
    for broken in (b"", b"\x80\x02", b"\x80\x02.", b"\x80\x02s.", b"\x80\x02h\x05."):
        with pytest.raises(ValueError):  # noqa: PT011 (any words)
            state_dict.walk(broken)


# headers


def many(count: int) -> dict[str, Any]:
    return {f"t{n}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for n in range(count)}


def test_headers_of_any_length(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors(path, many(66_000))
    assert "at most 65,536" in refusal(lambda: open_source(path))
    assert "at most 65,536" in refusal(lambda: inspect(path))
    assert "at most 65,536" in refusal(lambda: read_adapter(path, {}))
    with path.open("wb") as file:  # a million of them; nothing of it is read
        file.write(struct.pack("<Q", 60 << 20))
        file.truncate(70 << 20)
    assert "header is damaged" in refusal(lambda: open_source(path))
    one: dict[str, Any] = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    for header, expected in (
        ({"x" * 5000: one}, "5,000 letters"),
        ({"x": one | {"shape": [1] * 9 + [0]}}, "lists of counts"),
        ({"x": one | {"shape": [0, 10**30]}}, "lists of counts"),
        ({"__metadata__": {"a": 1}}, "not all text"),
        ({"__metadata__": {"a": "b"}, "x": 5}, "not described"),
    ):
        assert expected in refusal(lambda header=header: open_source(safetensors(path, header)))
    deep = '{"__metadata__": ' + '{"a": ' * 100 + "1" + "}" * 101
    path.write_bytes(struct.pack("<Q", len(deep)) + deep.encode())
    assert "more than 64 levels" in refusal(lambda: open_source(path))


def test_an_index_of_everything(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    for mapping, expected in (
        ({f"t{n}": "a.safetensors" for n in range(70_000)}, "70,000 tensors"),
        ({f"t{n}": f"{n}.safetensors" for n in range(600)}, "600 files"),
        ({"x": "../../etc/passwd"}, "of its own folder"),
        ({"x": "/etc/passwd.safetensors"}, "of its own folder"),
    ):
        index.write_text(json.dumps({"weight_map": mapping}))
        assert expected in refusal(lambda: open_folder(tmp_path))


def test_formats_that_are_known_and_not_read_have_their_names(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    entry = {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}
    safetensors(path, {"blocks.0.ffn.0.weight": entry}, b"12")
    shown = refusal(lambda: open_source(path))
    assert "fp4" in shown and "damaged" not in shown
    for scale in (torch.uint8, torch.float8_e8m0fnu, torch.float8_e4m3fn):
        state = {"weight": torch.zeros(2, 16, dtype=torch.uint8), "weight_scale": torch.ones(2, 2)}
        state["weight_scale"] = state["weight_scale"].to(scale)
        save_file({f"blocks.0.ffn.0.{name}": value for name, value in state.items()}, path)
        shown = refusal(lambda: open_source(path))
        assert "nvfp4 and mxfp8 are read with ComfyUI's notes" in shown


@pytest.mark.parametrize("width", [256, 5120 // 16])
def test_any_width_is_inspected(width: int, tmp_path: Path) -> None:
    from wanflow.checkpoint.structure import module_of
    from wanflow.config import DiTConfig

    dit = DiTConfig(dim=width, ffn_dim=64, num_heads=2, num_layers=1, text_dim=32, freq_dim=32)
    state = {name: torch.zeros(p.shape) for name, p in module_of(dit).named_parameters()}
    save_file(state, tmp_path / "x.safetensors")
    (row,) = inspect(tmp_path / "x.safetensors").parts
    assert row.error is None
    assert row.model == f"another size of Wan: width {width}, 1 blocks"


# scales


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    out = tmp_path_factory.mktemp("scaled") / "x.safetensors"
    convert(open_model(EXPERT, {}), out, options("fp8"), lambda line: None)
    return load_file(out)


@pytest.mark.parametrize("value", [-0.01, 0.0, 1e-30, 1e30, float("nan"), float("inf")])
def test_scales_that_no_weight_has(value: float, scaled: dict[str, Tensor], tmp_path: Path) -> None:
    name = "blocks.1.ffn.0"
    state = scaled | {f"{name}.scale_weight": torch.tensor(value)}
    save_file(state, tmp_path / "x.safetensors")
    source = open_part("dit", tmp_path / "x.safetensors")
    assert f"{name}.scale_weight" in refusal(lambda: source.packed(f"{name}.weight"))


def test_a_weight_of_zeros_has_any_scale(scaled: dict[str, Tensor], tmp_path: Path) -> None:
    name = "blocks.1.ffn.0"
    zeros = torch.zeros_like(scaled[f"{name}.weight"])
    state = scaled | {f"{name}.weight": zeros, f"{name}.scale_weight": torch.tensor(1e-30)}
    save_file(state, tmp_path / "x.safetensors")
    source = open_part("dit", tmp_path / "x.safetensors")
    assert not source.read(f"{name}.weight", torch.float32).any()


# tokenizers


def tokenizer(path: Path, **changed: Any) -> Path:
    parsed = json.loads((NANO / "google/umt5-xxl/tokenizer.json").read_bytes())
    path.write_text(json.dumps(parsed | changed))
    return path


PADDING = {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None}
PADDING |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}
TRUNCATION = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}


def replaced(text: str, by: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: text}, "content": by}


def test_a_tokenizer_that_pads_or_cuts_does_neither(tmp_path: Path) -> None:
    plain = open_tokenizer(NANO / "google/umt5-xxl/tokenizer.json")
    found = open_tokenizer(
        tokenizer(tmp_path / "tokenizer.json", padding=PADDING, truncation=TRUNCATION)
    )
    text = "a red circle moves left"
    assert (
        found.encode(text, add_special_tokens=False).ids
        == plain.encode(text, add_special_tokens=False).ids
    )


@pytest.mark.parametrize(
    "normalizer",
    [
        {"type": "Sequence", "normalizers": [replaced("a", "aa")] * 40},
        {"type": "Prepend", "prepend": "x" * 10_000_000},
        replaced("a", "b" * 1_000_000),
        replaced("", "b"),
        replaced("(a+)+$", "b", "Regex"),
        replaced("a*a*a*a*b", "b", "Regex"),
        {"type": "SomethingNew"},
        {"type": ["x"]},
        5,
    ],
)
def test_a_tokenizer_that_grows_texts(normalizer: object, tmp_path: Path) -> None:
    path = tokenizer(tmp_path / "tokenizer.json", normalizer=normalizer)
    assert str(path) in refusal(lambda: open_tokenizer(path))


def test_a_table_that_makes_books_of_letters(tmp_path: Path) -> None:
    from helpers.fuzz import CHARSMAP

    long = CHARSMAP + b"x" * 10_000 + b"\0"
    table = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(long).decode()}
    path = tokenizer(tmp_path / "tokenizer.json", normalizer=table)
    assert "normaliser" in refusal(lambda: open_tokenizer(path))


def test_a_piece_on_which_the_library_would_overflow_its_stack(tmp_path: Path) -> None:
    parsed = json.loads((NANO / "google/umt5-xxl/tokenizer.json").read_bytes())
    parsed["model"]["vocab"][5][0] = "[" * 200_000
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(parsed))
    assert "200,000 letters" in refusal(lambda: open_tokenizer(path))
    size = 100_000
    piece = b"\n" + b"\xa0\x8d\x06" + b"x" * size
    pieces = [b"\x0a\xa4\x8d\x06" + piece, b"\n\x05\n\x01u\x18\x02"]
    (tmp_path / "spiece.model").write_bytes(b"".join(pieces))
    assert "100,000 letters" in refusal(lambda: open_tokenizer(tmp_path / "spiece.model"))


def test_tokenizers_of_any_length(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b"{" + b" " * (21 << 20))
    assert "too large" in refusal(lambda: open_tokenizer(path))
    path.write_text('{"a":' * 2000)
    assert "levels" in refusal(lambda: open_tokenizer(path))
    (tmp_path / "spiece.model").write_bytes(b"\n\x00" * 1_100_000)
    assert "pieces" in refusal(lambda: open_tokenizer(tmp_path / "spiece.model"))


def test_a_tokenizer_in_no_bytes_and_an_embedding_of_no_sides(tmp_path: Path) -> None:
    path = tmp_path / "t5.safetensors"
    save_file({"spiece_model": torch.ones(5).bfloat16(), "shared.weight": torch.zeros(2, 2)}, path)
    assert "holds no tokenizer" in refusal(lambda: open_tokenizer(path))
    model = Path(shutil.copytree(NANO, tmp_path / "model"))
    file = model / "high_noise_model/diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"patch_embedding.weight": torch.tensor(1.0)}, file)
    assert "patch_embedding.weight" in refusal(lambda: open_checkpoint(model))


# what is no file


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("reader", [open_source, open_tokenizer, inspect])
def test_a_pipe_is_not_waited_for(reader: Callable[[Path], object], tmp_path: Path) -> None:
    for ending in ("safetensors", "pth", "gguf", "json"):
        path = tmp_path / f"x.{ending}"
        os.mkfifo(path)
        assert "regular file" in refusal(lambda path=path: reader(path))
    assert "regular file" in refusal(lambda: reader(Path("/dev/zero")))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize(
    "name",
    [
        "wanflow.json",
        "high_noise_model/config.json",
        "Wan2.1_VAE.pth",
        "google/umt5-xxl/tokenizer.json",
        "low_noise_model/diffusion_pytorch_model.safetensors.index.json",
    ],
)
def test_a_pipe_in_a_model_is_not_waited_for(name: str, tmp_path: Path) -> None:
    model = Path(shutil.copytree(NANO, tmp_path / "model"))
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    signal.alarm(30)  # ends the tests, where one waits
    try:
        shown = refusal(lambda: load_tokenizer(open_checkpoint(model)))
    finally:
        signal.alarm(0)
    assert Path(name).name in shown


@pytest.mark.parametrize("value", ["1e999", "99999999999999", "-5", "true", '"x"', "NaN"])
def test_sizes_that_no_config_has(value: str, tmp_path: Path) -> None:
    model = Path(shutil.copytree(NANO, tmp_path / "model"))
    config = model / "high_noise_model/config.json"
    config.write_text(config.read_text().replace('"text_len": 32', f'"text_len": {value}'))
    shown = refusal(lambda: open_checkpoint(model))
    assert "config.json" in shown


# what is read, and was not


def test_a_diffusers_folder_of_bin_files(tmp_path: Path) -> None:
    made = convert(open_model(NANO, {}), tmp_path / "made", options("diffusers"), lambda line: None)
    for file in sorted(made.rglob("*.safetensors")):
        state = load_file(file)
        stem = "pytorch_model" if file.parent.name == "text_encoder" else file.stem
        if file.parent.name == "transformer":
            names = [f"{stem}-{n}-of-2.bin" for n in (1, 2)]
            parts = [dict(list(state.items())[n::2]) for n in (0, 1)]
            for name, part in zip(names, parts, strict=True):
                torch.save(part, file.parent / name)
            index = {key: name for name, part in zip(names, parts, strict=True) for key in part}
            (file.parent / f"{stem}.bin.index.json").write_text(json.dumps({"weight_map": index}))
        else:
            torch.save(state, file.parent / f"{stem}.bin")
        file.unlink()
    (made / "text_encoder/training_args.bin").write_bytes(b"of no concern")
    found, nano = open_checkpoint(made), open_checkpoint(NANO)
    assert found.spec.dit == nano.spec.dit
    for part in ("high", "low", "t5", "vae"):
        for name in nano.source(part).tensors:
            assert torch.equal(found.source(part).read(name), nano.source(part).read(name))


def test_a_folder_of_shards_needs_no_config(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    state = load_file(EXPERT / "diffusion_pytorch_model.safetensors")
    index = {}
    for n, part in enumerate((dict(list(state.items())[:9]), dict(list(state.items())[9:]))):
        name = f"x-{n}-of-2.safetensors"
        save_file(part, folder / name)
        index |= dict.fromkeys(part, name)
    (folder / "x.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    model = Path(shutil.copytree(NANO, tmp_path / "model"))
    card = json.loads((model / "wanflow.json").read_text())
    card["dit"] |= {"num_heads": 5, "text_len": 32}  # which no tensor shows
    (model / "wanflow.json").write_text(json.dumps(card))
    found = open_checkpoint(model, {"high": folder})
    assert found.spec.dit.num_heads == 5
    assert torch.equal(found.source("high").read("head.head.weight"), state["head.head.weight"])
    (folder / "x-1-of-2.safetensors").unlink()
    shown = refusal(lambda: open_checkpoint(model, {"high": folder}))
    assert (
        str(folder) in shown and "x-1-of-2.safetensors" in shown and "wanflow download" not in shown
    )


def test_modules_to_save_are_named(tmp_path: Path) -> None:
    shapes = {"head.head.weight": (64, 32), "blocks.0.self_attn.q.weight": (32, 32)}
    stem = "base_model.model."
    q = f"{stem}blocks.0.self_attn.q.lora_"
    state = {f"{q}A.weight": torch.ones(2, 32), f"{q}B.weight": torch.ones(32, 2)}
    save_file(state | {f"{stem}head.head.weight": torch.ones(64, 32)}, tmp_path / "a.safetensors")
    report = read_adapter(tmp_path / "a.safetensors", shapes).report()
    assert (
        "applied 1 of 1" in report and "modules_to_save" in report and "head.head.weight" in report
    )


def test_patterns_of_peft_are_counted(tmp_path: Path) -> None:
    patterns = {f"m{n}": 1 for n in range(5000)}
    header = json.dumps({"r": 2, "lora_alpha": 2, "alpha_pattern": patterns})
    q = "base_model.model.blocks.0.self_attn.q.lora_"
    state = {f"{q}A.weight": torch.ones(2, 32), f"{q}B.weight": torch.ones(32, 2)}
    path = tmp_path / "a.safetensors"
    save_file(state, path, {"lora_adapter_metadata": header})
    shapes = {"blocks.0.self_attn.q.weight": (32, 32)}
    assert "at most 4,096" in refusal(lambda: read_adapter(path, shapes))
    huge = json.dumps({"r": 10**400, "lora_alpha": 2})
    save_file(state, path, {"lora_adapter_metadata": huge})
    assert "expected a number" in refusal(lambda: read_adapter(path, shapes))
    save_file(state, path, {"lora_adapter_metadata": "[" * 5000})
    assert "lora_adapter_metadata" in refusal(lambda: read_adapter(path, shapes))


# time and memory

MEASURE = """
import json, sys, time
from pathlib import Path
from helpers.memory import Peak
from wanflow.config import RequestError
from wanflow.inspect import inspect
from wanflow.lora.reader import read_adapter

peak = Peak()
for name in sys.argv[1:]:
    for reader in (inspect, lambda path: read_adapter(path, {"a.weight": (2, 2)})):
        peak.reset()
        began, words = time.process_time(), ""
        try:
            reader(Path(name))
        except RequestError as error:
            words = str(error)
        print(json.dumps({"s": time.process_time() - began, "peak": peak.look(), "words": words}))
"""


@pytest.mark.slow
@measurable
def test_a_million_tensors_cost_little(tmp_path: Path) -> None:
    safetensors(tmp_path / "a.safetensors", many(1_000_000))
    safetensors(tmp_path / "b.safetensors", many(65_000))
    nest = "[" * 60 + ",".join(["[]"] * 5_000_000) + "]" * 60
    (tmp_path / "c.safetensors").write_bytes(struct.pack("<Q", len(nest)) + nest.encode())
    found = measured(MEASURE, *(tmp_path / f"{name}.safetensors" for name in "abc"))
    assert len(found) == 6
    assert all(one["s"] < 20 and one["peak"] < 700 << 20 for one in found), found
