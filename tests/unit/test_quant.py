"""Rounded weights: every format against an independent spelling, every way of multiplying against
its bound, and what they must bear.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from helpers.common import same_bits, scales_rows
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from wanflow.config import DiTConfig, RequestError
from wanflow.models.dit import Linear, Linear32, WanDiT
from wanflow.runtime import QUANTIZATIONS, Quantization
from wanflow.transforms import packed as packing
from wanflow.transforms import quant as module
from wanflow.transforms import rounding
from wanflow.transforms.deltas import Decomposed, LowRank, changed
from wanflow.transforms.lora import Adapters
from wanflow.transforms.packed import PackedLinear, replace_with_packed
from wanflow.transforms.quant import (
    LARGEST,
    NF4,
    QuantLinear,
    Way,
    quantizable_layers,
    replace_with_quantised,
)

# heads of 16; 160 is nano's width, of two and a half of nf4's blocks
TINY = DiTConfig(
    dim=160, ffn_dim=320, num_heads=10, num_layers=2, text_dim=24, text_len=8, freq_dim=16
)
WAYS: list[tuple[Quantization, Way]] = [("fp8", "scaled_mm"), ("int8", "int_mm")]
EVERY: list[tuple[Quantization, Way]] = [*((mode, "weight-only") for mode in QUANTIZATIONS), *WAYS]


@pytest.fixture(autouse=True)
def only_what_this_torch_has(request: pytest.FixtureRequest) -> None:
    given = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if given.get("way") == "scaled_mm" and not scales_rows():
        pytest.skip("this PyTorch has no fp8 product with a scale for each row on a CPU")


def random(*shape: int, seed: int = 0, size: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size


def fill(leaf: QuantLinear, weight: Tensor, bias: Tensor | None = None) -> QuantLinear:
    for name, value in leaf.quantise(weight).items():
        setattr(leaf, name, nn.Parameter(value, requires_grad=False))
    if leaf.bias is not None:
        assert bias is not None
        leaf.bias = nn.Parameter(bias, requires_grad=False)
    return leaf


def rounded(
    weight: Tensor,
    mode: Quantization,
    way: Way = "weight-only",
    dtype: torch.dtype = torch.bfloat16,
    bias: Tensor | None = None,
) -> QuantLinear:
    with torch.device("meta"):
        leaf = QuantLinear(weight.shape[1], weight.shape[0], bias is not None, mode, dtype, way)
    return fill(leaf, weight, bias)


def snr(got: Tensor, want: Tensor) -> float:
    return float(
        10
        * torch.log10(
            want.double().square().mean() / (got.double() - want.double()).square().mean()
        )
    )


# formats


def values_of(mode: Quantization) -> Tensor:
    """All values that a format has before its scale."""
    if mode == "fp8":
        codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
        return codes[codes.isfinite()].unique()
    return torch.arange(-127, 128).double() if mode == "int8" else torch.tensor(NF4).double()


def spelled(weight: Tensor, mode: Quantization) -> tuple[Tensor, Tensor]:
    """What a weight should become, in float64: its scale for every value, and the nearest of the
    format's values times that.
    """
    out, columns = weight.shape
    scale = torch.empty(out, columns, dtype=torch.float64)
    for row in range(out):
        for start in range(0, columns, 64 if mode == "nf4" else columns):
            part = slice(start, start + (64 if mode == "nf4" else columns))
            largest = weight[row, part].abs().max()
            scale[row, part] = (
                largest.bfloat16().double() if mode == "nf4" else (largest / LARGEST[mode]).double()
            )
    levels = values_of(mode)
    nearest = (weight.double() / scale).unsqueeze(-1).sub(levels).abs().argmin(-1)
    return scale, levels[nearest] * scale


@pytest.mark.parametrize("shape", [(24, 640), (16, 160), (3, 70), (1, 1), (5, 129)], ids=str)
@pytest.mark.parametrize("mode", QUANTIZATIONS)
def test_every_value_becomes_the_nearest(
    mode: Quantization, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = random(*shape, size=0.02)
    weight[0] *= 300  # rows of very different size
    leaf = rounded(weight, mode)
    scale, want = spelled(weight, mode)
    got = leaf.dense(torch.float32).double()
    torch.testing.assert_close(
        got, want, rtol=0, atol=float(scale.max()) * LARGEST[mode] * 0.08
    )  # a tie may go either way, ...
    best, error = (want - weight.double()).abs(), (got - weight.double()).abs()
    assert bool(
        (error <= best + 1e-5 * scale * LARGEST[mode]).all()
    )  # ... but no value is further off than it need be
    for dtype in (torch.bfloat16, torch.float16):
        assert same_bits(leaf.dense(dtype), leaf.dense(torch.float32).to(dtype))
    assert leaf.dense().dtype == torch.bfloat16 and leaf.dense().shape == shape
    whole = leaf.quantise(weight)
    monkeypatch.setattr(module, "CHUNK", shape[1] * 2)
    monkeypatch.setattr(packing, "CHUNK", shape[1] * 3)
    assert all(same_bits(value, whole[name]) for name, value in leaf.quantise(weight).items())
    assert same_bits(leaf.dense(), rounded(weight, mode).dense())


def test_the_levels_of_nf4() -> None:
    """Quantiles of the normal distribution, eight above zero and seven below, as the paper derives
    them.
    """
    edge = 0.5 * (1 / 32 + 1 / 30)
    up, down = (
        torch.special.ndtri(torch.linspace(1 - edge, 0.5, n, dtype=torch.float64))[:-1]
        for n in (9, 8)
    )
    levels = torch.cat([-down, torch.zeros(1, dtype=torch.float64), up]).sort().values
    torch.testing.assert_close(
        torch.tensor(NF4, dtype=torch.float64), levels / levels.max(), rtol=0, atol=1e-6
    )


def test_nf4_bytes() -> None:
    """The first of two values in the upper bits, blocks of 64, the last one filled up."""
    weight = torch.zeros(1, 66)
    weight[0, :4], weight[0, 64:] = (
        torch.tensor([-2.0, 2.0, 0.0, 2 * NF4[9]]),
        torch.tensor([0.5, -0.5]),
    )
    made = rounded(weight, "nf4").quantise(weight)
    assert made["data"].shape == (1, 64) and made["data"].dtype == torch.uint8
    assert made["data"][0, :2].tolist() == [0x0F, 0x79] and made["data"][0, 32:34].tolist() == [
        0xF0,
        0x77,
    ]
    assert made["scale"].tolist() == [[2.0, 0.5]] and made["scale"].dtype == torch.bfloat16


@pytest.mark.parametrize(("mode", "bits"), [("fp8", 8), ("int8", 8), ("nf4", 4.25)])
def test_size_and_error_on_a_normal_weight(mode: Quantization, bits: float) -> None:
    weight = random(256, 5120, size=0.02)
    leaf = rounded(weight, mode)
    assert sum(
        value.nbytes for name, value in leaf.named_parameters() if name != "levels"
    ) * 8 / weight.numel() == pytest.approx(bits, 2e-3)
    assert snr(leaf.dense(torch.float32), weight) > {"fp8": 31, "int8": 40, "nf4": 20}[mode]


@pytest.mark.parametrize("mode", QUANTIZATIONS)
def test_zeros_and_extremes(mode: Quantization) -> None:
    weight = random(8, 640)
    weight[2], weight[3, 64:] = 0, 0
    weight[4] *= 1e-36
    weight[5] = torch.finfo(torch.float32).max / 2
    weight[6], weight[6, 100] = 1e-20, 1.0
    got = rounded(weight, mode).dense(torch.float32)
    assert same_bits(got[2].abs(), torch.zeros(640)) and same_bits(
        got[3, 64:].abs(), torch.zeros(576)
    )
    assert got.isfinite().all() and got[4].abs().max() < 1e-27
    assert got[5] == pytest.approx(weight[5], rel=4e-3) and got[6, 100] == pytest.approx(
        1, rel=4e-3
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("mode", QUANTIZATIONS)
def test_weights_that_are_not_finite_are_refused(mode: Quantization, value: float) -> None:
    weight = random(70, 160)
    weight[69, 159] = value
    with pytest.raises(RequestError, match="not finite"):
        rounded(weight, mode)
    with pytest.raises(ValueError, match="not \\[4, 32\\]"):
        QuantLinear(32, 4, False, mode, torch.float32).quantise(weight)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operator newly made."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        aliases = any(out.alias_info is not None for out in func._schema.returns)
        if isinstance(result, Tensor) and not aliases:
            self.nbytes = max(self.nbytes, result.nbytes)
        return result


@pytest.mark.parametrize("mode", QUANTIZATIONS)
def test_rounding_takes_little_memory(mode: Quantization, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random(1024, 1280).bfloat16()  # 5 MB as float32
    monkeypatch.setattr(module, "CHUNK", 1 << 16)
    leaf = rounded(weight[:1024], mode)
    with Largest() as largest:
        made = leaf.quantise(weight)
    assert largest.nbytes <= max(made["data"].nbytes, 8 << 16)


# structure


def experts(
    mode: Quantization,
    layers: Any = "all",
    way: Way | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[WanDiT, WanDiT]:
    """A tiny expert with rounded leaves, built on meta and filled tensor by tensor, and its twin
    that is not rounded.
    """
    torch.manual_seed(0)
    plain = WanDiT(TINY).eval().requires_grad_(False)
    for parameter in plain.parameters():
        parameter.normal_(0, 0.1)
    with torch.device("meta"):
        model = WanDiT(TINY).eval().requires_grad_(False)
    replace_with_quantised(model, quantizable_layers(model, layers), mode, dtype, "cpu", way)
    for name, value in plain.named_parameters():
        path, _, last = name.rpartition(".")
        holder = model.get_submodule(path)
        if isinstance(holder, QuantLinear) and last == "weight":
            for key, tensor in holder.quantise(value).items():
                setattr(holder, key, nn.Parameter(tensor, requires_grad=False))
        else:
            setattr(holder, last, nn.Parameter(value.detach().clone(), requires_grad=False))
    return model, plain


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(
            random(1, 16, 2, 4, 4, seed=1), torch.tensor([500.0]), random(1, 5, 24, seed=2)
        )


def test_leaves() -> None:
    with torch.device("meta"):
        model = WanDiT(TINY)
    assert quantizable_layers(model, "ffn") == [
        f"blocks.{n}.ffn.{m}" for n in (0, 1) for m in (0, 2)
    ]
    attention = {
        f"blocks.{n}.{kind}_attn.{side}"
        for n in (0, 1)
        for kind in ("self", "cross")
        for side in "qkvo"
    }
    assert (
        set(quantizable_layers(model, "all")) == {*attention, *quantizable_layers(model, "ffn")}
        and len(quantizable_layers(model, "all")) == 20
    )
    replace_with_packed(
        model,
        {"blocks.0.ffn.0.weight": "Q8_0", "blocks.1.self_attn.q.weight": "F8_E4M3"},
        torch.bfloat16,
    )
    assert quantizable_layers(model, "ffn") == [
        "blocks.0.ffn.2",
        "blocks.1.ffn.0",
        "blocks.1.ffn.2",
    ]
    replace_with_quantised(model, quantizable_layers(model, "all"), "int8", torch.bfloat16, "cpu")
    kinds = {
        type(leaf)
        for path, leaf in model.named_modules()
        if path.startswith("blocks.") and hasattr(leaf, "in_features")
    }
    assert kinds == {QuantLinear, PackedLinear} and quantizable_layers(model, "all") == []
    assert isinstance(model.time_projection[1], Linear32) and isinstance(
        model.text_embedding[0], Linear
    )
    with pytest.raises(RequestError, match="'attention' is neither ffn nor all"):
        quantizable_layers(model, "attention")  # type: ignore[arg-type]


def test_what_cannot_be_swapped() -> None:
    with torch.device("meta"):
        model = WanDiT(TINY)
    paths = quantizable_layers(model, "ffn")
    with pytest.raises(RequestError, match="'q4' is none of fp8, int8, nf4"):
        replace_with_quantised(model, paths, "q4", torch.bfloat16, "cpu")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="int8 or nf4"):
        replace_with_quantised(model, paths, "fp8", torch.bfloat16, "mps")
    with pytest.raises(ValueError, match="head.head is a Linear32"):
        replace_with_quantised(model, ["head.head"], "fp8", torch.bfloat16, "cpu")
    assert quantizable_layers(model, "ffn") == paths
    wrong = [
        ("nf4", "int_mm"),
        ("fp8", "int_mm"),
        ("int8", "scaled_mm"),
        ("fp8", "fast"),
        ("fp8", "scaled_mm"),
    ]
    for mode, way in wrong:
        with pytest.raises(ValueError, match="is no way to multiply"):
            QuantLinear(32, 32, True, mode, torch.float32, way)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", QUANTIZATIONS)
def test_meta_structure_is_the_filled_one(mode: Quantization) -> None:
    with torch.device("meta"):
        empty = WanDiT(TINY)
    replace_with_quantised(empty, quantizable_layers(empty, "all"), mode, torch.bfloat16, "cpu")
    shapes = {
        name: (value.shape, value.dtype, value.nbytes) for name, value in empty.named_parameters()
    }
    assert all(value.is_meta for value in empty.parameters())
    full, _ = experts(mode, dtype=torch.bfloat16)
    assert {
        name: (value.shape, value.dtype, value.nbytes) for name, value in full.named_parameters()
    } == shapes
    assert all(type(value) is nn.Parameter and value.is_contiguous() for value in full.parameters())
    assert not list(full.buffers())


@pytest.mark.parametrize(("mode", "way"), EVERY)
def test_parameters_may_be_views_of_one_buffer_of_bytes(mode: Quantization, way: Way) -> None:
    leaf = rounded(random(48, 160), mode, way, bias=random(48))
    x = random(40, 160, seed=1)
    want = leaf(x)
    offset, places = 0, {}
    for name, value in leaf.named_parameters():
        places[name] = offset
        offset += -(-value.nbytes // 16) * 16
    flat = torch.empty(offset, dtype=torch.uint8)
    for name, value in list(leaf.named_parameters()):
        view = flat[places[name] : places[name] + value.nbytes].view(value.dtype).view(value.shape)
        view.copy_(value)
        value.data = view
    assert leaf.data.data_ptr() == flat.data_ptr() + places["data"] and same_bits(leaf(x), want)


@pytest.mark.parametrize(("mode", "way"), EVERY)
def test_to_moves_and_does_not_convert(mode: Quantization, way: Way) -> None:
    leaf = rounded(random(32, 160), mode, way, bias=random(32))
    x, before = (
        random(20, 160, seed=1),
        {name: value.clone() for name, value in leaf.named_parameters()},
    )
    want = leaf(x)
    for changed_leaf in (leaf.to(torch.float16), leaf.double(), copy.deepcopy(leaf).half()):
        assert all(
            same_bits(value, before[name]) for name, value in changed_leaf.named_parameters()
        )
        assert same_bits(changed_leaf(x), want) and changed_leaf.compute_dtype == torch.bfloat16
    assert all(
        value.is_meta and value.dtype == before[name].dtype
        for name, value in copy.deepcopy(leaf).to("meta").named_parameters()
    )
    assert mode in repr(leaf) and way in repr(leaf) and "32 x 160" in repr(leaf)


# multiplying


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", QUANTIZATIONS)
def test_weight_only_is_a_matmul_with_the_dense_weight(
    mode: Quantization, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, bias, x = random(80, 160), random(80, seed=1), random(2, 3, 160, seed=2)
    for given in (bias, None):
        leaf = rounded(weight, mode, dtype=dtype, bias=given)
        want = F.linear(x.to(dtype), leaf.dense(), None if given is None else given.to(dtype))
        assert same_bits(leaf(x), want) and leaf(x).dtype == dtype
        monkeypatch.setattr(packing, "PIECE", 7 * 160 * dtype.itemsize)
        close = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
        torch.testing.assert_close(leaf(x), want, rtol=close, atol=close * want.abs().max().item())
        monkeypatch.undo()


def outliers(rows: int, columns: int) -> Tensor:
    """Activations with what real ones have: large channels, large tokens, a token of zeros; on a
    grid that bfloat16 keeps.
    """
    x = random(rows, columns, seed=3)
    x[:, ::50] *= 40
    x[rows // 2] *= 300
    x[-1] = 0
    return x.bfloat16().float()


def bound(leaf: QuantLinear, x: Tensor) -> Tensor:
    """How far results may lie from those of the same weight and unrounded tokens, by what rounding
    does to one value.

    int8: at most half a scale. fp8: at most 1/16 of the value, or half of the smallest step (2^-10
        of the scale). Then the result itself is rounded to bfloat16, 2^-8 of it at most (a bias
        that is added afterwards rounds twice).
    """
    weight = leaf.dense(torch.float32).double()
    scale = x.double().abs().amax(-1, keepdim=True) / LARGEST[leaf.mode]
    if leaf.mode == "int8":
        moved = (scale / 2 * weight.abs().sum(-1)) * (1 + 1e-4)
    else:
        moved = (x.double().abs() @ weight.abs().T / 16 + scale * 2**-10 * weight.abs().sum(-1)) * (
            1 + 1e-4
        )
    exact = x.double() @ weight.T
    bias = torch.zeros(1, dtype=torch.float64) if leaf.bias is None else leaf.bias.double().abs()
    return (
        moved + (exact.abs() + moved + bias) * 2**-7 * (leaf.compute_dtype == torch.bfloat16) + 1e-6
    )


@pytest.mark.parametrize("rows", [1, 3, 16, 17, 75])
@pytest.mark.parametrize(("mode", "way"), WAYS)
def test_rounded_tokens_stay_within_their_bound(mode: Quantization, way: Way, rows: int) -> None:
    weight, bias, x = random(48, 640, size=0.05), random(48, seed=1), outliers(rows, 640)
    leaf = rounded(weight, mode, way, bias=bias)
    exact = x.double() @ leaf.dense(torch.float32).double().T + bias.double()
    error = (leaf(x).double() - exact).abs()
    assert bool((error <= bound(leaf, x)).all())
    assert rows == 1 or float(error.max()) > 0.05  # the tokens were rounded
    assert torch.equal(leaf(x)[-1], bias.bfloat16())  # zeros stay zeros


@pytest.mark.parametrize(("mode", "way"), WAYS)
def test_rounded_tokens_by_another_spelling(mode: Quantization, way: Way) -> None:
    weight, x = random(32, 320, size=0.05), outliers(20, 320)
    leaf = rounded(weight, mode, way)
    step = x.abs().amax(-1, keepdim=True) / LARGEST[mode] + (x.abs().amax(-1, keepdim=True) == 0)
    tokens = (
        (x / step).to(torch.float8_e4m3fn).double()
        if mode == "fp8"
        else torch.round(x / step).double()
    )
    want = (tokens * step.double()) @ leaf.dense(torch.float32).double().T
    torch.testing.assert_close(
        leaf(x).double(), want, rtol=2**-8, atol=1e-5 * float(want.abs().max())
    )


@pytest.mark.parametrize(("mode", "way"), EVERY)
def test_shapes_of_input(mode: Quantization, way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    leaf = rounded(random(48, 160), mode, way, bias=random(48))
    x = random(3, 40, 160, seed=1)
    want = leaf(x)
    assert want.shape == (3, 40, 48) and want.dtype == torch.bfloat16
    wide, turned = random(3, 40, 320, seed=2), x.transpose(0, 1).contiguous().transpose(0, 1)
    wide[..., ::2] = x
    for same in (
        turned,
        wide[..., ::2],
    ):  # another layout takes another matmul, which adds the bias after rounding
        assert same_bits(
            leaf(same),
            (
                want
                if way != "weight-only"
                else F.linear(same.bfloat16(), leaf.dense(), leaf.bias.bfloat16())
            ),
        )
    assert (
        leaf(x[:0]).shape == (0, 40, 48)
        and leaf(x[0, :0]).shape == (0, 48)
        and leaf(x[0, 0]).shape == (48,)
    )
    assert same_bits(leaf(x.bfloat16()), want)
    monkeypatch.setattr(rounding, "PIECE", 1)  # 32 tokens at a time
    torch.testing.assert_close(leaf(x), want)
    assert same_bits(leaf(x.reshape(-1, 160)[:32]), leaf(x.reshape(-1, 160))[:32])


def test_sums_of_int8_do_not_overflow_at_full_width() -> None:
    leaf = rounded(torch.ones(8, 13824), "int8", "int_mm", torch.float32)
    assert leaf(torch.ones(17, 13824)) == pytest.approx(torch.full((17, 8), 13824.0), rel=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("mode", "way"), EVERY)
def test_a_token_that_is_not_finite_is_seen_and_spoils_no_other(
    mode: Quantization, way: Way, value: float
) -> None:
    leaf, x = rounded(random(48, 160), mode, way), random(20, 160, seed=1)
    want = leaf(x)
    x[7, 3] = value
    got = leaf(x)
    assert not got[7].isfinite().any()
    torch.testing.assert_close(torch.cat([got[:7], got[8:]]), torch.cat([want[:7], want[8:]]))


@pytest.mark.parametrize(("mode", "way"), EVERY)
def test_gradients_pass_by_the_dense_weight(mode: Quantization, way: Way) -> None:
    leaf = rounded(random(48, 160), mode, way)
    x = random(20, 160, seed=1).bfloat16().requires_grad_()
    leaf(x).float().sum().backward()
    torch.testing.assert_close(
        x.grad, leaf.dense().float().sum(0).expand(20, -1).bfloat16(), rtol=2e-2, atol=2e-2
    )


@pytest.fixture
def compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(("mode", "way"), EVERY)
def test_compiled_in_one_graph(mode: Quantization, way: Way) -> None:
    leaf, x = rounded(random(48, 160), mode, way, bias=random(48)), random(40, 160, seed=1)
    counter = CompileCounter()
    with torch.no_grad():
        want = leaf(x)
        whole = torch.compile(leaf, fullgraph=True, backend=counter)
        torch.testing.assert_close(whole(x), want)
        whole(x * 2), whole(x * 1e-40)  # other values, zeros among them, are no other code
    assert counter.frame_count == 1
    with torch.no_grad():
        traced = torch.compile(leaf, fullgraph=True, backend="aot_eager", dynamic=True)
        torch.testing.assert_close(traced(x), want)


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(("mode", "way"), WAYS)
def test_inductor_makes_the_same_of_rounded_tokens(mode: Quantization, way: Way) -> None:
    leaf = rounded(random(48, 160), mode, way, bias=random(48))
    whole = torch.compile(leaf, fullgraph=True, dynamic=True)
    for count in (40, 75, 333):
        x = random(2, count, 160, seed=count).bfloat16()
        with torch.no_grad():
            want = leaf(x)
            # Fused, int8 adds the bias before it rounds to bfloat16, and not after.
            close = 2**-8 * float(want.abs().max())
            torch.testing.assert_close(whole(x), want, rtol=2**-8, atol=close)


@pytest.mark.parametrize(("mode", "way"), EVERY)
def test_traced_without_memory(mode: Quantization, way: Way) -> None:
    for context in (torch.device("meta"), FakeTensorMode()):
        with context:
            leaf = QuantLinear(5120, 13824, True, mode, torch.bfloat16, way)
            got = leaf(torch.empty(2, 100, 5120, dtype=torch.bfloat16))
        assert got.shape == (2, 100, 13824) and got.dtype == torch.bfloat16


# with the rest


@pytest.mark.parametrize("layers", ["ffn", "all"])
@pytest.mark.parametrize(
    ("mode", "way"),
    [("fp8", "weight-only"), ("int8", "weight-only"), ("nf4", "weight-only"), ("int8", "int_mm")],
)
def test_expert(mode: Quantization, way: Way, layers: str) -> None:
    model, plain = experts(mode, layers, way)
    twin = copy.deepcopy(plain)
    for path, leaf in model.named_modules():
        if isinstance(leaf, QuantLinear):
            assert leaf.way == way
            twin.get_submodule(path).weight.data = leaf.dense(torch.float32)
    want, got = run(plain), run(model)
    if way == "weight-only":
        torch.testing.assert_close(got, run(twin), rtol=1e-5, atol=1e-5)
    assert {"fp8": 22, "int8": 30, "nf4": 12}[mode] < snr(got, want) < 70


@pytest.mark.parametrize(
    ("mode", "way"), [("fp8", "weight-only"), ("nf4", "weight-only"), ("int8", "int_mm")]
)
def test_lora_beside_a_rounded_weight(mode: Quantization, way: Way) -> None:
    model, _ = experts(mode, "all", way)
    clean = run(model)
    plain_leaf: Any = model.blocks[0].ffn[0]
    thin = LowRank(random(320, 4, seed=5) / 4, random(4, 160, seed=6) / 4, 0.5)
    turned = Decomposed(
        LowRank(random(160, 4, seed=7) / 4, random(4, 160, seed=8) / 4),
        random(160, 1, seed=9).abs(),
    )
    adapters = Adapters(model)
    adapters.attach(
        "one", {"blocks.0.ffn.0.weight": thin, "blocks.1.self_attn.q.weight": turned}, 0.7
    )
    x = random(9, 160, seed=4)
    leaf: Any = model.blocks[0].ffn[0]
    torch.testing.assert_close(
        leaf(x), plain_leaf(x) + 0.7 * 0.5 * x @ thin.down.T @ thin.up.T, rtol=1e-4, atol=1e-4
    )
    other: Any = model.blocks[1].self_attn.q
    delta = changed(other.leaf.dense(torch.float32), turned, 0.7) - other.leaf.dense(torch.float32)
    torch.testing.assert_close(other(x), other.leaf(x) + x @ delta.T, rtol=1e-4, atol=1e-4)
    assert snr(run(model), clean) < 20
    adapters.set_strength("one", 0)
    torch.testing.assert_close(run(model), clean, rtol=1e-5, atol=1e-5)
    adapters.remove("one")
    assert same_bits(run(model), clean)


@pytest.mark.parametrize("mode", QUANTIZATIONS)
def test_a_fused_lora_is_rounded_with_its_weight(mode: Quantization) -> None:
    """Live and fused differ by rounding only: that of the changed weight against that of the
    unchanged one.
    """
    weight, change = (
        random(320, 160, size=0.1),
        LowRank(random(320, 4, seed=5) / 9, random(4, 160, seed=6) / 9),
    )
    fused = rounded(changed(weight, change, 0.7), mode, dtype=torch.float32)
    live = rounded(weight, mode, dtype=torch.float32)
    x = random(50, 160, seed=4)
    want = x @ changed(weight, change, 0.7).T
    for got in (fused(x), live(x) + 0.7 * x @ change.down.T @ change.up.T):
        assert snr(got, want) > {"fp8": 28, "int8": 36, "nf4": 18}[mode]


def test_every_way_is_tested() -> None:
    assert {way for _, way in EVERY} == set(get_args(Way)) and {mode for mode, _ in EVERY} == set(
        QUANTIZATIONS
    )
