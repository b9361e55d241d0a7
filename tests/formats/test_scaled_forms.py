"""nvfp4, mxfp8 and int8 weights of ComfyUI and LightX2V: what their programs read is read here.

`scaled_forms.safetensors` holds tensors that comfy-kitchen 0.2.40, ComfyUI's library for these
formats, made on a CPU, and the values that it reads in them. `tests/tools/record_scaled_forms.py`
makes it again, where that library is installed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from helpers.common import PROMPT, refusal
from helpers.features import packed as packed_model
from helpers.plans import of
from helpers.scaled_forms import FORMS, note, written
from safetensors.torch import load_file, save_file
from torch import Tensor

import wanflow
from wanflow.api import Pipeline
from wanflow.checkpoint import load
from wanflow.checkpoint.containers import TensorSource
from wanflow.checkpoint.source import open_source
from wanflow.checkpoint.structure import build, expert_structure
from wanflow.convert.convert import convert, open_model
from wanflow.convert.formats import options
from wanflow.inspect import inspect
from wanflow.models.dit import WanDiT
from wanflow.opening import resolve
from wanflow.plan.traces import Traces
from wanflow.presets import T2V_A14B
from wanflow.runtime import Runtime
from wanflow.transforms.packed import PackedEmbedding, PackedLinear

RECORDED = load_file(Path(__file__).with_name("scaled_forms.safetensors"))
CASES = sorted({name.partition(".")[0] for name in RECORDED})


def opened(tensors: dict[str, Tensor], folder: Path, **metadata: Any) -> TensorSource:
    meta = {key: json.dumps(value) for key, value in metadata.items()}
    save_file(tensors, folder / "x.safetensors", metadata=meta or None)
    return open_source(folder / "x.safetensors")


def bits(one: Tensor, two: Tensor) -> bool:
    return one.dtype == two.dtype and torch.equal(one, two)


# the oracle


@pytest.mark.parametrize("case", CASES)
def test_values_as_comfy_kitchen_reads_them(case: str, tmp_path: Path) -> None:
    tensors = {name: value for name, value in RECORDED.items() if name.startswith(case + ".")}
    want = tensors.pop(f"{case}.want")
    found = opened(tensors, tmp_path).read(f"{case}.weight", torch.float32)
    assert want.abs().amax() > 0 and want.unique().numel() > 50
    # nvfp4: comfy-kitchen rounds the product of both scales first; a rotation is a matmul
    rtol, atol = 2e-7 * ("nvfp4" in case), 1e-6 * ("convrot" in case)
    torch.testing.assert_close(found, want, rtol=rtol, atol=atol * want.abs().max().item())


# every form, at shapes drawn by chance


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("form", FORMS)
def test_any_shape_in_any_piece(form: str, seed: int, tmp_path: Path) -> None:
    draw = random.Random(f"{form} {seed}")
    step = FORMS[form]
    rows, columns = draw.randint(1, 300), step * draw.randint(1, 12)
    if form in ("nvfp4", "mxfp8") and seed % 2:
        columns -= draw.randint(1, step - 1)  # padded to the right, and mostly below
    torch.manual_seed(seed)
    value = torch.randn(rows, columns) * draw.choice([1e-3, 0.05, 20])
    value[draw.randrange(rows)] = 0
    tensors, want = written(form, "a", value)
    source = opened(tensors | {"a.bias": torch.zeros(rows)}, tmp_path)
    assert set(source.tensors) == {"a.weight", "a.bias"}
    info = source.tensors["a.weight"]
    assert info.shape == (rows, columns) and info.packing
    whole = source.read("a.weight")
    torch.testing.assert_close(whole, want, rtol=1e-6, atol=1e-6 * want.abs().max().item())
    assert bits(source.read("a.weight", torch.bfloat16), whole.bfloat16())
    part = slice(rows // 3, rows // 3 + draw.randint(0, rows))
    same = bits if form != "convrot" else lambda a, b: torch.allclose(a, b, rtol=1e-6, atol=1e-5)
    assert same(source.read("a.weight", rows=part), whole[part])
    out = torch.empty_like(whole)
    assert source.read("a.weight", out=out) is out and bits(out, whole)
    assert same(torch.cat(list(source.stream("a.weight"))), whole.flatten())
    if columns % step:
        with pytest.raises(ValueError, match="blocks"):
            source.packed("a.weight")
        return
    packed = source.packed("a.weight")
    assert packed.kind == info.packing and packed.shape == (rows, columns)
    assert packed.data.nbytes == info.nbytes
    assert same(source.packed("a.weight", part).dense(), whole[part])
    ids = torch.tensor([rows - 1, 0, rows // 2, rows - 1])
    assert same(packed.dense(rows=ids), whole[ids])
    assert same(torch.cat(list(packed.stream(100))), whole.flatten())
    for leaf, x in (
        (PackedLinear(columns, rows, False, packed.kind, torch.float32), torch.randn(3, columns)),
        (PackedEmbedding(rows, columns, packed.kind, torch.float32), ids),
    ):
        leaf.expect(info.scale)
        expected = {name: value.shape for name, value in leaf.named_parameters()}
        for name, part_of in leaf.parts(packed).items():
            assert part_of.shape == expected.pop(name)
            setattr(leaf, name, torch.nn.Parameter(part_of, requires_grad=False))
        assert not expected
        want_out = x @ whole.T if leaf.__class__ is PackedLinear else whole[ids]
        torch.testing.assert_close(leaf(x), want_out, rtol=1e-5, atol=1e-4 * want.abs().max())


def test_the_notes_of_a_header(tmp_path: Path) -> None:
    tensors, want = written("nvfp4", "a", torch.randn(16, 32))
    del tensors["a.comfy_quant"]
    layers = {"layers": {"a": {"format": "nvfp4"}}}
    found = opened(tensors, tmp_path, _quantization_metadata=layers).read("a.weight")
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)


def test_rows_without_their_padding_as_the_bias_has_them(tmp_path: Path) -> None:
    tensors, want = written("nvfp4", "a", torch.randn(20, 32))
    note(tensors, "a", format="nvfp4")
    assert opened(tensors, tmp_path).tensors["a.weight"].shape == (32, 32)
    source = opened(tensors | {"a.bias": torch.zeros(20)}, tmp_path)
    torch.testing.assert_close(source.read("a.weight"), want, rtol=1e-6, atol=1e-6)


def test_scales_of_blocks_as_bytes(tmp_path: Path) -> None:
    for form in ("nvfp4", "mxfp8"):
        tensors, want = written(form, "a", torch.randn(32, 64))
        tensors["a.weight_scale"] = tensors["a.weight_scale"].view(torch.uint8)
        found = opened(tensors, tmp_path).read("a.weight")
        torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)


# files that make no sense


def remove(*ends: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for end in ends:
            del tensors[f"a.{end}"]

    return change


def put(end: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({f"a.{end}": value})


def say(**fields: Any) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: note(tensors, "a", **fields)


def bytes_of(end: str, value: int) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"a.{end}"].view(torch.uint8).fill_(value)

    return change


ROTATED: dict[str, Any] = {"format": "int8_tensorwise", "convrot": True}
DAMAGED = [
    ("nvfp4", remove("weight"), "a.weight is missing"),
    ("nvfp4", remove("weight_scale"), "a.weight_scale is missing"),
    ("nvfp4", remove("weight_scale_2"), "a.weight_scale_2 is missing"),
    ("nvfp4", remove("comfy_quant"), "nothing that tells their format"),
    ("nvfp4", put("weight_scale", torch.zeros(64, 4)), "do not make up"),
    ("nvfp4", put("weight_scale", torch.zeros(64, 4).to(torch.float8_e4m3fn)), "do not make up"),
    ("nvfp4", put("weight_scale_2", torch.ones(2)), "do not make up"),
    ("nvfp4", put("weight", torch.zeros(64, 20, dtype=torch.uint8)), "do not make up"),
    ("nvfp4", put("weight", torch.zeros(64 * 16, dtype=torch.uint8)), "do not make up"),
    ("nvfp4", put("weight", torch.zeros(64, 16)), "do not make up"),
    ("nvfp4", say(format="nvfp4", orig_shape=[64, 99]), "should be [64, 99]"),
    ("nvfp4", put("bias", torch.zeros(30)), ""),  # the note's shape counts
    ("nvfp4", bytes_of("weight_scale", 127), "NaN"),
    ("nvfp4", bytes_of("weight_scale", 129), "negative"),
    ("nvfp4", put("weight_scale_2", torch.tensor(float("nan"))), "is nan"),
    ("nvfp4", put("weight_scale_2", torch.tensor(0.0)), "is 0"),
    ("mxfp8", remove("weight_scale"), "a.weight_scale is missing"),
    ("mxfp8", remove("comfy_quant"), "nothing that tells their format"),
    ("mxfp8", bytes_of("weight_scale", 255), "NaN"),
    ("lightx2v nvfp4", remove("alpha"), "nothing that tells their format"),
    ("lightx2v nvfp4", put("alpha", torch.tensor(-1.0)), "a.alpha times a.input_global_scale"),
    ("int8", remove("weight_scale"), "int8 or fp8 weights lack their scales (a.weight)"),
    ("int8", put("weight_scale", torch.ones(7)), "fits no known way"),
    ("int8", put("weight_scale", torch.tensor(float("nan"))), "NaN"),
    ("quanto", remove("weight._scale"), "int8 or fp8 weights lack their scales (a.weight)"),
    ("lightx2v int8", remove("weight_scale"), "int8 or fp8 weights lack their scales (a.weight)"),
    ("convrot", say(**ROTATED, convrot_groupsize=48), "groups of 48"),
    ("convrot", say(**ROTATED, convrot_groupsize=[1]), "groups of [1]"),
    ("convrot", say(**ROTATED), "groups of 256"),  # ComfyUI's default does not fill a row of 64
    ("convrot", say(format="int8_tensorwise", params=ROTATED), "groups of 256"),
    ("convrot", remove("weight"), "has none"),
    ("int8", say(format="int8_blockwise"), "'int8_blockwise'"),
    ("int8", say(format=["int8"]), "cannot be read"),
]


@pytest.mark.parametrize(("form", "change", "words"), DAMAGED)
def test_damaged(
    form: str, change: Callable[[dict[str, Tensor]], None], words: str, tmp_path: Path
) -> None:
    tensors, _ = written(form, "a", torch.randn(64, 64))
    change(tensors)

    def use() -> object:
        return opened(tensors, tmp_path).packed("a.weight").dense()

    if not words:
        use()
    else:
        assert words in refusal(use)


# a whole model


@pytest.fixture(
    scope="module", params=["nvfp4", "mxfp8", "int8", "convrot", "lightx2v nvfp4", "quanto"]
)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_nano_is_held_packed_as_planned_and_inspected(form: str) -> None:
    folder = packed_model("nano", form)
    checkpoint = resolve(folder)
    expert = load.load_expert(checkpoint, "high", torch.bfloat16, "cpu")
    matmuls = [leaf for leaf in expert.modules() if hasattr(leaf, "in_features")]
    assert len(matmuls) > 60 and all(isinstance(leaf, PackedLinear) for leaf in matmuls)
    traces = Traces(checkpoint, of(checkpoint.spec), torch.bfloat16, torch.device("cpu"))
    planned = traces.expert("high", Runtime())
    assert planned.total == sum(value.nbytes for value in expert.parameters())
    plain = Traces(resolve("nano"), of(checkpoint.spec), torch.bfloat16, torch.device("cpu"))
    ours, theirs = (
        side.step("high", 2, Runtime(chunk_tokens=0), False).work for side in (traces, plain)
    )
    assert ours.traffic > theirs.traffic and ours.total() >= theirs.total()
    (row,) = (row for row in inspect(folder).parts if "high" in row.what)
    kinds = {kind for leaf in matmuls for kind in [cast(PackedLinear, leaf).kind]}
    assert kinds <= set(row.dtypes)


def test_mps_has_no_float8(form: str) -> None:
    checkpoint = resolve(packed_model("nano", form))
    expert = expert_structure(
        checkpoint.spec.dit, checkpoint.source("high"), Runtime(), torch.bfloat16, "mps"
    )
    held = any(isinstance(leaf, PackedLinear) for leaf in expert.modules())
    assert held == (form in ("int8", "convrot", "quanto"))


# Least PSNR of the frames to nano's own, in dB; measured were 29, 41, 48, 55, 29 and 55.
LIKE = {"nvfp4": 24, "mxfp8": 34, "int8": 38, "convrot": 42, "lightx2v nvfp4": 24, "quanto": 42}


def test_nano_makes_nearly_its_own_video(form: str, nano: Pipeline) -> None:
    asked: dict[str, Any] = {"frame_num": 9, "sample_steps": 6, "seed": 5}
    mine = wanflow.load(packed_model("nano", form), device="cpu").generate(PROMPT, **asked).frames
    error = (mine.astype("float32") - nano.generate(PROMPT, **asked).frames).flatten() / 255
    psnr = -10 * np.log10((error**2).mean())
    assert psnr > LIKE[form]


def test_converted_back_it_has_the_same_values(form: str, tmp_path: Path) -> None:
    folder = packed_model("nano", form)
    convert(open_model(folder, {}), tmp_path / "plain", options("official"), lambda line: None)
    sides = [resolve(folder).source("low"), resolve(tmp_path / "plain").source("low")]
    for name in ("blocks.0.self_attn.q.weight", "head.head.weight", "blocks.3.ffn.2.bias"):
        one, two = (side.read(name, torch.float32) for side in sides)
        assert bits(one.bfloat16().float(), two)


def test_one_expert_of_14b_in_nvfp4() -> None:
    """The memory that docs/guides/formats.md states."""
    model = build(WanDiT, T2V_A14B.dit)
    matmuls = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    rest = sum(p.numel() for p in model.parameters()) - matmuls
    assert round((matmuls * 9 / 16 + 4 * rest) / 1e9, 1) == 8.1
