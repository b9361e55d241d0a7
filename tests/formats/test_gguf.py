"""Packed weights and GGUF files: every layout against the gguf package, the leaves that hold them,
and files that lie.
"""

from __future__ import annotations

import copy
import random
import struct
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.gguf_blocks import blocks
from helpers.packed_leaves import fill_packed
from helpers.scaled_forms import E2M1, hadamard
from torch import Tensor, nn

from wanflow.checkpoint import containers as formats
from wanflow.checkpoint.containers import OpenedFile
from wanflow.checkpoint.gguf import GGUFFile, ggml_bytes, open_gguf
from wanflow.config import DiTConfig, RequestError, TextConfig
from wanflow.models.dit import Linear, Linear32, WanDiT
from wanflow.models.umt5 import UMT5Encoder
from wanflow.transforms import packed as module
from wanflow.transforms.blocks import BLOCKS, ROTATED
from wanflow.transforms.ggml import LAYOUTS
from wanflow.transforms.packed import (
    CODES,
    FP8,
    KINDS,
    Packed,
    PackedEmbedding,
    PackedLinear,
    replace_with_packed,
)

Kind = gguf.GGMLQuantizationType
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_packed(
    kind: str, rows: int, columns: int, scale: tuple[int, ...] | None = (), seed: int = 0
) -> Packed:
    generator = torch.Generator().manual_seed(seed)
    if kind not in CODES:
        factor = torch.tensor(0.3) if kind == "nvfp4" else None
        return Packed(kind, (rows, columns), blocks(kind, rows, columns, seed), factor)
    data = torch.randn(rows, columns, generator=generator)
    data = (data * 40 if CODES[kind] == torch.int8 else data).to(CODES[kind])
    return Packed(
        kind,
        (rows, columns),
        data,
        None if scale is None else torch.rand(scale, generator=generator) * 0.1 + 0.01,
    )


def oracle(packed: Packed) -> Tensor:
    """float32, by the gguf package, by torch's own conversion, or in plain steps."""
    if packed.kind in BLOCKS:
        return plain_blocks(packed)
    if packed.kind in ROTATED:
        codes = replace(packed, kind="int8")
        rows = oracle(codes).unflatten(1, (-1, ROTATED[packed.kind]))
        return (rows @ hadamard(ROTATED[packed.kind])).flatten(1)
    if packed.kind not in CODES:
        return torch.from_numpy(
            gguf.quants.dequantize(packed.data.numpy(), Kind[packed.kind])
        ).view(packed.shape)
    value = packed.data.float()
    if packed.scale is None:
        return value
    if packed.scale.ndim == 3:
        return (value.unflatten(1, (packed.scale.shape[1], -1)) * packed.scale).flatten(1)
    return value * (packed.scale.view(-1, 1) if packed.scale.numel() > 1 else packed.scale.view(()))


def plain_blocks(packed: Packed) -> Tensor:
    """The values of ComfyUI's blocks; see test_scaled_forms for what its library makes of files."""
    data = packed.data.reshape(-1, BLOCKS[packed.kind].nbytes)
    scales = data[:, :1].contiguous()
    if packed.kind == "mxfp8":
        values = data[:, 1:].contiguous().view(torch.float8_e4m3fn).float()
        return (values * torch.exp2(scales.float() - 127)).view(packed.shape)
    codes = torch.stack([data[:, 1:] >> 4, data[:, 1:] & 15], 2).flatten(1).long()
    values = E2M1[codes & 7] * (1 - 2 * (codes >> 3)) + 0.0  # of zeros without sign
    values = values * scales.view(torch.float8_e4m3fn).float()
    return (values if packed.scale is None else values * packed.scale).view(packed.shape)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
    )


# unpacking


@pytest.mark.parametrize("kind", [*LAYOUTS, *BLOCKS])
def test_blocks_as_the_gguf_package_unpacks_them(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = random_packed(kind, 48, 768)
    assert kind in BLOCKS or gguf.GGML_QUANT_SIZES[Kind[kind]] == LAYOUTS[kind][:2]
    want = oracle(packed)
    assert torch.isfinite(want).all() and want.unique().numel() > 100
    assert same_bits(packed.dense(), want)
    for dtype in DTYPES:
        assert same_bits(packed.dense(dtype), want.to(dtype))
    assert same_bits(packed.dense(rows=slice(3, 40)), want[3:40])
    assert same_bits(
        packed.dense(torch.bfloat16, rows=torch.tensor([7, 0, 7, 47])),
        want[[7, 0, 7, 47]].bfloat16(),
    )
    monkeypatch.setattr(module, "CHUNK", 1000)  # of no block's length
    assert same_bits(packed.dense(), want) and same_bits(
        packed.dense(torch.bfloat16), want.bfloat16()
    )


@pytest.mark.parametrize("scale", [None, (), (1,), (48,), (48, 1), (48, 6, 1)], ids=str)
@pytest.mark.parametrize("kind", FP8)
def test_fp8(kind: str, scale: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = random_packed(kind, 48, 96, scale)
    want = oracle(packed)
    for dtype in DTYPES:
        assert same_bits(packed.dense(dtype), want.to(dtype))
    assert same_bits(packed.dense(rows=slice(5, 9)), want[5:9])
    assert same_bits(packed.dense(rows=torch.tensor([9, 2])), want[[9, 2]])
    monkeypatch.setattr(module, "CHUNK", 500)
    assert same_bits(packed.dense(), want)


@pytest.mark.parametrize("kind", FP8)
def test_fp8_every_code(kind: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(FP8[kind])
    assert torch.equal(
        Packed(kind, (256,), codes).dense().nan_to_num(nan=1e9), codes.float().nan_to_num(nan=1e9)
    )
    cube = Packed(
        kind, (4, 8, 2, 4), codes.view(4, 8, 2, 4)[:, :, :, :4], torch.tensor([1.0, 2.0, 3.0, 4.0])
    )
    assert same_bits(
        cube.dense(rows=slice(0, 1)).nan_to_num(), codes.float().view(4, 8, 2, 4)[:1].nan_to_num()
    )
    assert (
        Packed(kind, (), codes[3].clone(), torch.tensor(2.0)).dense().item() == codes.float()[3] * 2
    )


def test_shapes_that_are_not_rows_of_blocks() -> None:
    packed = random_packed("Q4_K", 8, 256)
    conv = Packed("Q4_K", (32, 4, 1, 4, 4), packed.data)  # a row of 64 values
    assert same_bits(conv.dense(), oracle(packed).view(32, 4, 1, 4, 4))
    with pytest.raises(ValueError, match="blocks"):
        conv.rows(slice(0, 2))
    deep = Packed("Q4_K", (2, 4, 256), packed.data)
    assert same_bits(deep.dense(rows=slice(1, 2)), oracle(packed).view(2, 4, 256)[1:])
    assert Packed("Q8_0", (0, 32), torch.empty(0, 34, dtype=torch.uint8)).dense().shape == (0, 32)
    assert Packed("Q8_0", (3, 0), torch.empty(3, 0, dtype=torch.uint8)).dense(
        rows=slice(1)
    ).shape == (1, 0)
    assert Packed(
        "F8_E4M3", (0, 4), torch.empty(0, 4, dtype=torch.float8_e4m3fn)
    ).dense().shape == (0, 4)


@pytest.mark.parametrize(
    ("kind", "shape", "data", "scale"),
    [
        ("IQ2_XXS", (4, 256), torch.zeros(4, 66, dtype=torch.uint8), None),
        ("Q8_0", (4, 64), torch.zeros(4, 67, dtype=torch.uint8), None),
        ("Q8_0", (4, 32), torch.zeros(4, 34, dtype=torch.int8), None),
        ("Q8_0", (4, 32), torch.zeros(4, 34, dtype=torch.uint8), torch.ones(4)),
        ("F8_E4M3", (4, 32), torch.zeros(4, 32, dtype=torch.uint8), None),
        ("F8_E4M3", (4, 32), torch.zeros(4, 32).to(torch.float8_e5m2), None),
        ("F8_E4M3", (4, 32), torch.zeros(32, 4).to(torch.float8_e4m3fn), None),
        ("F8_E4M3", (4, 32), torch.zeros(4, 32).to(torch.float8_e4m3fn), torch.ones(32)),
        ("F8_E4M3", (4, 32), torch.zeros(4, 32).to(torch.float8_e4m3fn), torch.ones(4, 5, 1)),
        ("F8_E4M3", (4, 32), torch.zeros(4, 32).to(torch.float8_e4m3fn), torch.ones(0)),
    ],
)
def test_what_does_not_fit_is_refused(
    kind: str, shape: tuple[int, ...], data: Tensor, scale: Tensor | None
) -> None:
    with pytest.raises(RequestError):
        Packed(kind, shape, data, scale)


# leaves


def linear(packed: Packed, dtype: torch.dtype, bias: bool = True) -> PackedLinear:
    leaf = PackedLinear(packed.shape[1], packed.shape[0], bias, packed.kind, dtype)
    fill_packed(leaf, packed)
    if leaf.bias is not None:
        leaf.bias.data = torch.randn(packed.shape[0], generator=torch.Generator().manual_seed(1))
    return leaf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_linear(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = random_packed(kind, 80, 256, (80, 4, 1))
    weight, x = oracle(packed), torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(2))
    for bias in (True, False):
        leaf = linear(packed, dtype, bias)
        plain = Linear(256, 80, bias=bias, dtype=dtype)
        plain.weight.data = weight.to(dtype)
        if leaf.bias is not None:
            plain.bias.data = leaf.bias.data
        assert leaf.compute_dtype == plain.compute_dtype and same_bits(
            leaf.dense(), plain.weight.data
        )
        assert same_bits(leaf.dense(torch.float32), weight)
        want, got = plain(x), leaf(x)
        assert same_bits(got, want)
        monkeypatch.setattr(
            module, "PIECE", 7 * 256 * dtype.itemsize
        )  # 12 pieces, the last of them smaller
        wide = torch.zeros(300, 256)
        assert module.features_at_a_time(x, 80, dtype) == 7
        assert module.features_at_a_time(wide, 80, dtype) == leaf.out_features == 80
        close = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[
            dtype
        ]  # another shape of matmul may add in another order
        torch.testing.assert_close(leaf(x), want, rtol=close, atol=close * want.abs().max().item())
        monkeypatch.undo()


def test_linear_has_no_weight() -> None:
    packed = random_packed("Q8_0", 4, 32)
    leaf = linear(packed, torch.float32)
    assert not hasattr(leaf, "weight") and {name for name, _ in leaf.named_parameters()} == {
        "data",
        "bias",
    }
    assert same_bits(packed.dense(), leaf.dense())
    assert leaf.parts(packed)["data"].data_ptr() == packed.data.data_ptr()  # nothing is copied
    assert "Q8_0" in repr(leaf)
    with pytest.raises(ValueError, match="Q4_0"):
        leaf.parts(random_packed("Q4_0", 4, 32))
    with pytest.raises(ValueError, match="64"):
        leaf.parts(random_packed("Q8_0", 4, 64))
    with pytest.raises(ValueError, match="blocks"):
        PackedLinear(100, 4, True, "Q4_K", torch.float32)
    with pytest.raises(RequestError, match="IQ1_S"):
        PackedLinear(256, 4, True, "IQ1_S", torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_embedding(kind: str) -> None:
    packed = random_packed(kind, 40, 256, (40, 1))
    leaf = PackedEmbedding(40, 256, kind, torch.bfloat16)
    fill_packed(leaf, packed)
    ids = torch.tensor([[3, 39, 0], [3, 3, 1]])
    assert same_bits(leaf(ids), F.embedding(ids, oracle(packed).bfloat16()))
    assert leaf(ids[:, :0]).shape == (2, 0, 256)


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2", "Q4_K"])
def test_conversions_keep_bits_and_devices_move(kind: str) -> None:
    leaf = linear(random_packed(kind, 8, 256, (8, 1)), torch.bfloat16)
    before = leaf.dense(torch.float32)
    model = nn.Sequential(copy.deepcopy(leaf), nn.Linear(8, 8))
    for change in (
        lambda m: m.to(torch.float16),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.to("cpu", torch.bfloat16),
    ):
        held = change(model)[0]
        assert (
            held.data.dtype == leaf.data.dtype
            and held.bias.dtype == torch.float32
            and held.compute_dtype == torch.bfloat16
        )
        assert same_bits(held.dense(torch.float32), before)
    assert model[1].weight.dtype == torch.bfloat16
    away = copy.deepcopy(leaf).to("meta", torch.float16)
    assert {p.device.type for p in away.parameters()} == {
        "meta"
    } and away.data.dtype == leaf.data.dtype
    assert away.scale is None or away.scale.dtype == torch.float32
    assert away(torch.empty(2, 256, device="meta")).shape == (2, 8)
    back = away.to_empty(device="cpu")
    back.load_state_dict(leaf.state_dict())
    assert same_bits(back.dense(torch.float32), before)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_in_one_graph(kind: str) -> None:
    torch.compiler.reset()
    packed = random_packed(kind, 24, 256, (24, 1))
    leaf, x = linear(packed, torch.bfloat16), torch.randn(2, 256)
    table = PackedEmbedding(24, 256, kind, torch.bfloat16)
    fill_packed(table, packed)
    whole = torch.compile(
        lambda x, ids: leaf(x) + table(ids) @ torch.ones(256, 24, dtype=torch.bfloat16),
        fullgraph=True,
        backend="eager",
    )
    ids = torch.tensor([1, 5])
    torch.testing.assert_close(
        whole(x, ids), leaf(x) + table(ids) @ torch.ones(256, 24, dtype=torch.bfloat16)
    )


# whole models

DIT = DiTConfig(
    dim=256, ffn_dim=512, num_heads=2, num_layers=1, text_dim=256, text_len=8, freq_dim=256
)
TEXT = TextConfig(
    vocab=40,
    dim=256,
    dim_attn=256,
    dim_ffn=512,
    num_heads=4,
    num_layers=2,
    num_buckets=8,
    max_dist=16,
)


def swapped(cls: Any, config: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """A model with every Linear and Embedding packed, each of another kind, and its twin with the
    same weights unpacked.
    """
    with torch.device("meta"):
        packed, plain = cls(config).requires_grad_(False), cls(config).requires_grad_(False)
    kinds = {
        name: KINDS[number % len(KINDS)]
        for number, (name, parameter) in enumerate(plain.named_parameters())
        if name.endswith(".weight") and parameter.ndim == 2 and parameter.shape[1] % 256 == 0
    }
    replace_with_packed(
        packed,
        kinds
        | {
            "patch_embedding.weight": "Q8_0",
            "blocks.0.modulation": "Q8_0",
            "norm.weight": "Q8_0",
            "no.such": "Q8_0",
        },
        dtype,
    )
    for number, (name, parameter) in enumerate(list(plain.named_parameters())):
        owner, _, leaf = name.rpartition(".")
        value = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.05
        if name in kinds:
            weight = random_packed(kinds[name], *parameter.shape, seed=number)
            fill_packed(packed.get_submodule(owner), weight)
            value = weight.dense()
        else:
            setattr(packed.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
        holder = plain.get_submodule(owner)
        float32 = isinstance(holder, Linear32) or (
            cls is WanDiT and (not isinstance(holder, Linear) or leaf == "bias")
        )
        setattr(
            holder, leaf, nn.Parameter(value if float32 else value.to(dtype), requires_grad=False)
        )
        if cls is UMT5Encoder and name not in kinds:
            setattr(
                packed.get_submodule(owner),
                leaf,
                nn.Parameter(value.to(dtype), requires_grad=False),
            )
    return packed.eval(), plain.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_expert(dtype: torch.dtype) -> None:
    packed, plain = swapped(WanDiT, DIT, dtype)
    leaves = {name: leaf for name, leaf in packed.named_modules() if isinstance(leaf, PackedLinear)}
    assert set(leaves) == {
        name for name, leaf in plain.named_modules() if isinstance(leaf, nn.Linear)
    }
    assert {name for name, leaf in leaves.items() if leaf.compute_dtype != dtype} == (
        set()
        if dtype == torch.float32
        else {"time_embedding.0", "time_embedding.2", "time_projection.1", "head.head"}
    )
    generator = torch.Generator().manual_seed(5)
    latent, text = (
        torch.randn(1, 16, 1, 4, 4, generator=generator),
        torch.randn(1, 8, 256, generator=generator),
    )
    assert same_bits(
        packed(latent, torch.tensor([500]), text), plain(latent, torch.tensor([500]), text)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_text_encoder(dtype: torch.dtype) -> None:
    packed, plain = swapped(UMT5Encoder, TEXT, dtype)
    assert isinstance(packed.token_embedding, PackedEmbedding) and isinstance(
        packed.blocks[1].ffn.gate[0], PackedLinear
    )
    assert isinstance(packed.blocks[0].pos_embedding.embedding, nn.Embedding)
    ids, mask = torch.tensor([[3, 9, 1, 0]]), torch.tensor([[1, 1, 1, 0]])
    assert same_bits(packed(ids, mask), plain(ids, mask))


def test_rows_that_are_not_whole_blocks_are_not_swapped() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(100, 4), nn.Linear(100, 4))
    replace_with_packed(model, {"0.weight": "Q8_0", "1.weight": "F8_E4M3"}, torch.float32)
    assert isinstance(model[0], nn.Linear) and isinstance(model[1], PackedLinear)


# files


def write(path: Path, tensors: dict[str, tuple[np.ndarray, Any]], **keys: Any) -> Path:
    """By the gguf package. tensors: {name: (data, raw type or None)}; keys: values of any kind,
    `__` for a dot.
    """
    writer = gguf.GGUFWriter(path, "wan")
    for name, value in keys.items():
        key = name.replace("__", ".")
        add = {
            str: writer.add_string,
            bool: writer.add_bool,
            int: writer.add_int64,
            float: writer.add_float64,
            list: writer.add_array,
        }
        add[type(value)](key, value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def sample(path: Path) -> GGUFFile:
    generator = np.random.default_rng(3)
    weight = generator.normal(0, 0.1, (6, 256)).astype(np.float32)
    tensors: dict[str, tuple[np.ndarray, Any]] = {
        kind: (gguf.quants.quantize(weight, Kind[kind]), Kind[kind])
        for kind in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "BF16")
    }
    tensors |= {
        kind: (blocks(kind, 6, 256).numpy(), Kind[kind]) for kind in LAYOUTS if kind not in tensors
    }
    tensors["F32"], tensors["F16"] = (weight, None), (weight.astype(np.float16), None)
    tensors["F64"] = (weight.astype(np.float64), None)
    tensors |= {
        f"I{bits}": (np.arange(-3, 4, dtype=f"int{bits}"), None) for bits in (8, 16, 32, 64)
    }
    tensors["conv.weight"] = (weight.reshape(6, 16, 4, 4), None)
    tensors["conv.packed"] = (blocks("Q4_K", 6, 256).numpy(), Kind.Q4_K)
    return open_gguf(
        write(
            path,
            tensors,
            comfy__gguf__orig_shape__conv__weight=[6, 16, 1, 4, 4],
            **{"comfy.gguf.orig_shape.conv.packed": [24, 4, 1, 4, 4]},
            some__text="hé",
            some__truth=True,
            some__number=-(2**40),
            some__float=0.1,
            words=["▁a", "", "日本"],
            scores=[0.5, -1.0],
            counts=[1, -2, 3],
            truths=[True, False],
        )
    )


def test_file(tmp_path: Path) -> None:
    file = sample(tmp_path / "a.gguf")
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert file.container == "GGUF of wan" and set(file.tensors) == set(theirs)
    for name, tensor in theirs.items():
        info = file.tensors[name]
        kind = tensor.tensor_type.name
        assert info.nbytes == tensor.n_bytes and info.packing == (kind if kind in LAYOUTS else None)
        assert (
            ggml_bytes(kind, tuple(int(side) for side in reversed(tensor.shape))) == tensor.n_bytes
        )
        assert file.starts[name] == tensor.data_offset
        if kind in LAYOUTS or kind == "BF16":
            want = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
            want = want.bfloat16() if kind == "BF16" else want
        else:
            want = torch.from_numpy(np.array(tensor.data))
        want = want.view(info.shape)
        assert info.dtype == want.dtype and same_bits(file.read(name), want)
        assert same_bits(file.read(name, torch.bfloat16), want.bfloat16())
        if kind in LAYOUTS:
            assert same_bits(file.packed(name).dense(), want)
        else:
            with pytest.raises(KeyError):
                file.packed(name)
    assert file.tensors["conv.weight"].shape == (6, 16, 1, 4, 4) and file.tensors[
        "conv.packed"
    ].shape == (24, 4, 1, 4, 4)
    assert file.packed("Q4_K").data.shape == (6, 144)


def test_conversion_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = sample(tmp_path / "a.gguf")
    monkeypatch.setattr(formats, "CHUNK", 100)
    assert same_bits(file.read("F32", torch.bfloat16), file.read("F32").bfloat16())


def test_keys(tmp_path: Path) -> None:
    file = sample(tmp_path / "a.gguf")
    assert {key: file.metadata[f"some.{key}"] for key in ("text", "truth", "number", "float")} == {
        "text": "hé",
        "truth": True,
        "number": -(2**40),
        "float": 0.1,
    }
    assert "words" in file.metadata
    assert file.array("words") == ["▁a", "", "日本"] and file.array("scores") == [0.5, -1.0]
    assert file.array("counts") == [1, -2, 3] and file.array("truths") == [True, False]
    for key in ("nothing", "some.text"):
        with pytest.raises(RequestError, match=f"no list {key}"):
            file.array(key)


def test_a_file_that_shrinks_after_opening(tmp_path: Path) -> None:
    file = sample(tmp_path / "a.gguf")
    data = file.path.read_bytes()
    file.path.write_bytes(data[: file.starts["Q4_K"] + 100])
    with pytest.raises(RequestError, match=r"a\.gguf has changed"):
        file.packed("Q4_K")
    file = replace(file, file=OpenedFile.of(file.path))  # as if it shrank while it was read
    for read in (lambda: file.read("Q4_K"), lambda: file.packed("Q4_K")):
        with pytest.raises(RequestError, match=r"a\.gguf breaks off"):
            read()
    file.path.write_bytes(data[:100])
    file = replace(file, file=OpenedFile.of(file.path))
    with pytest.raises(RequestError, match=r"a\.gguf breaks off"):
        file.array("words")
    place = file.metadata["words"]
    file.path.write_bytes(data[: place.start] + b"\xff" * (place.stop - place.start))
    file = replace(file, file=OpenedFile.of(file.path))
    with pytest.raises(RequestError, match="damaged"):
        file.array("words")


def test_tokenizer_is_stepped_over(tmp_path: Path) -> None:
    count = 60_000
    words = b"".join(text(f"▁{number}") for number in range(count))
    keys = [
        ("general.architecture", 8, text("t5encoder")),
        ("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, count) + words),
        (
            "tokenizer.ggml.scores",
            9,
            struct.pack("<IQ", 6, count) + struct.pack(f"<{count}f", *range(count)),
        ),
    ]
    path = tmp_path / "t5.gguf"
    path.write_bytes(build(keys, [("x", (32,), 0, 0)], bytes(128)))
    start = time.thread_time()
    file = open_gguf(path)
    assert time.thread_time() - start < 0.5  # 10 ms here
    assert file.container == "GGUF of t5encoder" and file.read("x").tolist() == [0.0] * 32
    assert file.array("tokenizer.ggml.tokens") == [f"▁{number}" for number in range(count)]
    assert file.array("tokenizer.ggml.scores") == list(range(count))


# files that are not what they say


def text(value: str | bytes) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(value)) + value


def build(
    keys: list[tuple[str | bytes, int, bytes]] | None = None,
    tensors: list[tuple[str, tuple[int, ...], int, int]] | None = None,
    data: bytes = b"",
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
    align: int = 32,
) -> bytes:
    """A file by hand. keys: (name, type, bytes of the value); tensors: (name, sides, outermost
    first, type, place).
    """
    keys, tensors = keys or [], tensors or []
    out = magic + struct.pack("<IQQ", version, *(counts or (len(tensors), len(keys))))
    for key, kind, value in keys:
        out += text(key) + struct.pack("<I", kind) + value
    for name, sides, kind, place in tensors:
        out += (
            text(name)
            + struct.pack(f"<I{len(sides)}Q", len(sides), *reversed(sides))
            + struct.pack("<IQ", kind, place)
        )
    return out + bytes(-len(out) % align) + data


def array(kind: int, count: int, items: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + items


def nested(depth: int) -> bytes:
    return array(0, 0) if depth == 0 else array(9, 1, nested(depth - 1))


ONE = [("x", (2, 32), 8, 0)]  # Q8_0, 68 bytes
U32 = struct.Struct("<I").pack
BROKEN = {
    "magic": (build([], ONE, bytes(68), magic=b"GGML"), "not a GGUF file"),
    "version 1": (build([], ONE, bytes(68), version=1), "version 1"),
    "version 4": (build([], ONE, bytes(68), version=4), "version 4"),
    "big endian": (build([], ONE, bytes(68), version=3 << 24), "big-endian"),
    "short": (b"GGUF\3\0\0\0", "cut off"),
    "many tensors": (build([], ONE, bytes(68), counts=(2**63, 0)), "claims"),
    "more tensors": (build([], ONE, bytes(68), counts=(5, 0)), "damaged"),
    "many keys": (build([], ONE, bytes(68), counts=(1, 2**64 - 1)), "claims"),
    "more keys": (build([], ONE, bytes(68), counts=(1, 9)), "damaged"),
    "long name": (
        build([], ONE, bytes(68)).replace(text("x"), struct.pack("<Q", 2**62) + b"x"),
        "claims",
    ),
    "name beyond the end": (
        build([], ONE, bytes(68)).replace(text("x"), struct.pack("<Q", 5000) + b"x"),
        "cut off",
    ),
    "long text": (build([("k", 8, struct.pack("<Q", 2**64 - 1))], ONE, bytes(68)), "claims"),
    "long list": (build([("k", 9, array(0, 2**60))], ONE, bytes(68)), "claims"),
    "longer list": (build([("k", 9, array(12, 2**20))], ONE, bytes(68)), "cut off"),
    "list of long texts": (
        build([("k", 9, array(8, 3, struct.pack("<Q", 2**64 - 1) * 3))], ONE, bytes(68)),
        "cut off",
    ),
    "list of too many texts": (
        build([("k", 9, array(8, 2**60, text("a")))], ONE, bytes(68)),
        "claims",
    ),
    "list of few texts": (build([("k", 9, array(8, 20, text("a")))], ONE, bytes(68)), "damaged"),
    "lists in lists": (build([("k", 9, nested(3))], ONE, bytes(68)), "lists of lists"),
    "deep lists": (build([("k", 9, array(9, 1) * 500)], ONE, bytes(68)), "lists of lists"),
    "list of unknowns": (build([("k", 9, array(77, 1))], ONE, bytes(68)), "type 77"),
    "unknown key": (build([("k", 13, U32(0))], ONE, bytes(68)), "type 13"),
    "key twice": (
        build([("k", 4, U32(0)), ("k", 4, U32(1))], ONE, bytes(68)),
        "'k' is given twice",
    ),
    "key in no UTF-8": (build([(b"\xff\xfe", 4, U32(0))], ONE, bytes(68)), "UTF-8"),
    "text in no UTF-8": (build([("k", 8, text(b"\x80"))], ONE, bytes(68)), "k is no UTF-8"),
    "tensor twice": (build([], [*ONE, ("x", (2, 32), 8, 96)], bytes(164)), "'x' is given twice"),
    "overlap": (build([], [*ONE, ("y", (2, 32), 8, 64)], bytes(160)), "y overlaps"),
    "same place": (build([], [*ONE, ("y", (2, 32), 8, 0)], bytes(160)), "overlaps"),
    "off the alignment": (build([], [("x", (2, 32), 8, 4)], bytes(160)), "alignment"),
    "outside": (build([], [("x", (2, 32), 8, 2**40)], bytes(68)), "cut off"),
    "far outside": (build([], [("x", (2, 32), 8, 2**64 - 32)], bytes(68)), "cut off"),
    "large": (build([], [("x", (2**40, 32), 8, 0)], bytes(68)), "cut off"),
    "absurd": (build([], [("x", (2**40, 2**40), 8, 0)], bytes(68)), "impossible shape"),
    "absurd and empty": (
        build([], [("x", (0, 2**40, 2**40), 0, 0)], bytes(68)),
        "impossible shape",
    ),
    "wraps around": (build([], [("x", (2**32, 2**32), 0, 0)], bytes(68)), "impossible shape"),
    "many sides": (build([], [("x", (1,) * 9, 0, 0)], bytes(68)), "9 sides"),
    "more sides": (
        build([], ONE, bytes(68)).replace(text("x") + U32(2), text("x") + U32(2**32 - 1)),
        "sides",
    ),
    "parts of blocks": (build([], [("x", (2, 33), 8, 0)], bytes(96)), "no multiple of"),
    "no rows": (build([], [("x", (), 8, 0)], bytes(96)), "no multiple of"),
    "unread type": (
        build([], [("x", (2, 256), 16, 0)], bytes(600)),
        "IQ2_XXS.*supported are F64, F32.*Q4_K",
    ),
    "unknown type": (build([], [("x", (2, 256), 99, 0)], bytes(600)), "number 99"),
    "alignment 0": (build([("general.alignment", 4, U32(0))], ONE, bytes(68)), "alignment is 0"),
    "alignment 48": (build([("general.alignment", 4, U32(48))], ONE, bytes(68)), "alignment is 48"),
    "alignment 2^31": (
        build([("general.alignment", 4, U32(2**31))], ONE, bytes(68)),
        "alignment is",
    ),
    "alignment in words": (
        build([("general.alignment", 8, text("32"))], ONE, bytes(68)),
        "alignment is '32'",
    ),
    "original shape": (
        build([("comfy.gguf.orig_shape.x", 9, array(5, 2, U32(3) + U32(32)))], ONE, bytes(68)),
        "was",
    ),
    "original shape in words": (
        build([("comfy.gguf.orig_shape.x", 9, array(8, 1, text("64")))], ONE, bytes(68)),
        "list of sides",
    ),
    "original shape in a word": (
        build([("comfy.gguf.orig_shape.x", 8, text("64"))], ONE, bytes(68)),
        "list of sides",
    ),
    "negative sides": (
        build(
            [("comfy.gguf.orig_shape.x", 9, array(5, 2, struct.pack("<ii", -2, -32)))],
            ONE,
            bytes(68),
        ),
        "was",
    ),
    "absurd sides": (
        build(
            [("comfy.gguf.orig_shape.x", 9, array(10, 3, struct.pack("<3Q", 0, 2**62, 2**62)))],
            [("x", (0, 32), 8, 0)],
        ),
        "was",
    ),
}


def refused(path: Path, message: str) -> None:
    """A RequestError that names the file, within a second of CPU time and a few megabytes."""
    tracemalloc.start()
    start = time.thread_time()
    try:
        with pytest.raises(RequestError, match=f"(?s){path.name}.*{message}"):
            open_gguf(path)
        assert time.thread_time() - start < 1
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("what", BROKEN)
def test_broken_files(what: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(BROKEN[what][0])
    refused(path, BROKEN[what][1])


def test_the_same_unbroken(tmp_path: Path) -> None:
    path = tmp_path / "good.gguf"
    path.write_bytes(
        build(
            [("general.alignment", 4, U32(64))],
            [*ONE, ("y", (0, 32), 8, 128)],
            bytes(128),
            align=64,
        )
    )
    file = open_gguf(path)
    assert (
        file.read("x").shape == (2, 32)
        and file.read("y").shape == (0, 32)
        and file.container == "GGUF of no architecture"
    )
    shape = ("comfy.gguf.orig_shape.x", 9, array(5, 2, U32(32) + U32(2)))
    path.write_bytes(
        build([shape, ("none", 8, text("")), ("empty", 9, array(8, 0))], ONE, bytes(68), version=2)
    )
    file = open_gguf(path)
    assert file.tensors["x"].shape == (32, 2) and file.read("x").shape == (32, 2)
    assert file.metadata["none"] == "" and file.array("empty") == []


def test_a_header_that_never_ends(tmp_path: Path) -> None:
    """A long file of empty strings: it bears its own claims out, and is still given up."""
    path = tmp_path / "long.gguf"
    path.write_bytes(build([("k", 9, array(8, 30 << 20))], [], b""))
    with path.open("r+b") as file:
        file.truncate(1 << 30)  # sparse
    start = time.thread_time()
    with pytest.raises(RequestError, match="longer than"):
        open_gguf(path)
    assert time.thread_time() - start < 1


def test_cut_off_anywhere(tmp_path: Path) -> None:
    data = sample(tmp_path / "a.gguf").path.read_bytes()
    path = tmp_path / "cut.gguf"
    for part in range(16):
        path.write_bytes(data[: len(data) * part // 16])
        refused(path, "")
    with pytest.raises(RequestError, match=r"none\.gguf is missing"):
        open_gguf(tmp_path / "none.gguf")


def test_a_damaged_header_is_refused_or_read(tmp_path: Path) -> None:
    """Single bytes overwritten: whatever opens can be read, and nothing but a RequestError comes
    out.
    """
    good = build(
        [
            ("general.architecture", 8, text("wan")),
            ("k", 9, array(8, 2, text("a") + text("b"))),
            ("n", 5, U32(1)),
        ],
        [*ONE, ("y", (4, 8), 0, 96), ("z", (1, 256), 12, 224)],
        bytes(400),
    )
    path, chance, opened = tmp_path / "a.gguf", random.Random(1), 0
    for _ in range(400):
        data = bytearray(good)
        data[chance.randrange(len(good) - 400)] = chance.choice(
            [0, 1, 7, 127, 128, 255, chance.randrange(256)]
        )
        path.write_bytes(data)
        try:
            file = open_gguf(path)
        except RequestError:
            continue
        opened += 1
        for name in file.tensors:
            file.read(name)
    assert 20 < opened < 380
