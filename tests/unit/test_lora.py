"""Changes of weights, and adapters on a model: fused equals live equals the formula; strengths
move, and they come off again.
"""

from __future__ import annotations

import copy
import math

import gguf
import pytest
import torch
import torch.nn.functional as F
from helpers.packed_leaves import fill_packed
from helpers.tiny import TINY, random_expert, run
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from wanflow.config import RequestError
from wanflow.models.dit import WanDiT
from wanflow.transforms.deltas import (
    Decomposed,
    Difference,
    Hadamard,
    Kronecker,
    LowRank,
    Replacement,
    WeightDelta,
    changed,
    shape_error,
)
from wanflow.transforms.lora import Adapters, LoRALinear
from wanflow.transforms.packed import Packed, PackedLinear, replace_with_packed


@pytest.fixture(scope="module")
def plain() -> WanDiT:
    return random_expert()


@pytest.fixture
def model(plain: WanDiT) -> WanDiT:
    return copy.deepcopy(plain)


def low_rank(out: int, width: int, rank: int = 3, scale: float = 0.5) -> LowRank:
    return LowRank(torch.randn(out, rank) / 4, torch.randn(rank, width) / 4, scale)


def everything() -> dict[str, WeightDelta]:
    """A change of each kind, on each kind of place."""
    torch.manual_seed(2)
    r = torch.randn
    return {
        "blocks.0.self_attn.q.weight": low_rank(32, 32),
        "blocks.0.self_attn.q.bias": Difference(r(32)),
        "blocks.1.self_attn.v.weight": Replacement(r(32, 32) / 4),
        "blocks.0.cross_attn.k.weight": Hadamard(r(32, 2), r(2, 32), r(32, 2), r(2, 32), 0.1),
        "blocks.1.cross_attn.v.weight": Kronecker(r(4, 4) / 4, r(8, 8)),
        "blocks.0.ffn.0.weight": Decomposed(low_rank(64, 32), r(64, 1).abs()),
        "blocks.1.ffn.2.weight": Decomposed(low_rank(32, 64), r(1, 64).abs()),
        "text_embedding.0.weight": low_rank(32, 24),
        "time_embedding.2.weight": low_rank(32, 32),
        "time_projection.1.weight": Difference(r(192, 32) / 9),
        "head.head.weight": low_rank(64, 32),
        "patch_embedding.weight": LowRank(r(32, 3, 1, 1, 1), r(3, 16, 1, 2, 2), 0.2),
        "patch_embedding.bias": Difference(r(32)),
        "blocks.0.modulation": Difference(r(1, 6, 32)),
        "head.modulation": Difference(r(1, 2, 32)),
        "blocks.0.norm3.weight": Difference(r(32)),
        "blocks.1.self_attn.norm_q.weight": Difference(r(32)),
    }


def fuse(model: nn.Module, changes: dict[str, WeightDelta], strength: float) -> None:
    for name, parameter in model.named_parameters():
        if name in changes:
            parameter.data = changed(parameter.data.float(), changes[name], strength).to(
                parameter.dtype
            )


# values


def test_formulas() -> None:
    """Each kind against its definition, written out; the weight stands at strength 0."""
    torch.manual_seed(3)
    r = torch.randn
    w, s = r(6, 8), 0.7
    up, down, a, b, c, d = r(6, 2), r(2, 8), r(6, 2), r(2, 8), r(6, 2), r(2, 8)
    one, two, m, row = r(2, 4), r(3, 2), r(6, 1).abs(), r(1, 8).abs()
    v = w + 0.5 * up @ down
    kron = torch.stack(
        [torch.cat([one[i, j] * two for j in range(4)], 1) for i in range(2)]
    ).flatten(0, 1)
    expected: list[tuple[WeightDelta, Tensor]] = [
        (LowRank(up, down, 0.5), w + s * 0.5 * up @ down),
        (LowRank(up, down, 0.5, torch.eye(2) * 3), w + s * 1.5 * up @ down),
        (Hadamard(a, b, c, d, 0.5), w + s * 0.5 * (a @ b) * (c @ d)),
        (Kronecker(one, two, 0.5), w + s * 0.5 * kron),
        (Kronecker(one[:, :1], r(3, 1), 1.0, torch.ones(1, 4), torch.zeros(1, 2)), w),
        (Difference(v), w + s * v),
        (Replacement(v), w + s * (v - w)),
        (Decomposed(LowRank(up, down, 0.5), m), w + s * (m * v / v.norm(dim=1, keepdim=True) - w)),
        (
            Decomposed(LowRank(up, down, 0.5), m.flatten()),
            w + s * (m * v / v.norm(dim=1, keepdim=True) - w),
        ),
        (
            Decomposed(LowRank(up, down, 0.5), row),
            w + s * (row * v / v.norm(dim=0, keepdim=True) - w),
        ),
    ]
    for change, value in expected:
        assert shape_error(change, (6, 8)) is None
        torch.testing.assert_close(changed(w, change, s), value)
        assert torch.equal(changed(w, change, torch.tensor(0.0)), w)
    assert torch.equal(changed(w, Replacement(v), 1.0), v)


def test_convolutions() -> None:
    """A product of convolutions, around a kernel in the middle too, is the convolution by one
    weight.
    """
    torch.manual_seed(4)
    r = torch.randn
    x, w = r(2, 4, 3, 6, 6), torch.zeros(6, 4, 1, 2, 2)
    up, down, mid, thin = r(6, 2, 1, 1, 1), r(2, 4, 1, 2, 2), r(2, 2, 1, 2, 2), r(2, 4, 1, 1, 1)
    torch.testing.assert_close(
        F.conv3d(x, changed(w, LowRank(up, down), 1.0)),
        F.conv3d(F.conv3d(x, down), up),
        atol=1e-4,
        rtol=1e-4,
    )
    tucker = LowRank(up, thin, 1.0, mid)
    assert shape_error(tucker, (6, 4, 1, 2, 2)) is None
    by_hand = F.conv3d(F.conv3d(F.conv3d(x, thin), mid), up)
    torch.testing.assert_close(F.conv3d(x, changed(w, tucker, 1.0)), by_hand, atol=1e-4, rtol=1e-4)
    loha = Hadamard(r(2, 6), r(2, 4), r(2, 6), r(2, 4), 1.0, mid, mid)
    lokr = Kronecker(r(2, 2), r(2, 3), 1.0, None, r(2, 2), mid)
    conv = Decomposed(LowRank(up, down), r(6, 1, 1, 1, 1))
    for change in (
        loha,
        lokr,
        conv,
        Kronecker(r(2, 2), r(3, 2, 1, 2, 2)),
        Kronecker(r(2, 2), r(3, 1), 1.0, None, r(1, 8)),
    ):
        assert shape_error(change, (6, 4, 1, 2, 2)) is None
        assert changed(torch.ones_like(w), change, 1.0).shape == w.shape
    kernel = torch.einsum("rsxyz,ro,si->oixyz", mid, lokr.w2, lokr.w2_b)
    torch.testing.assert_close(changed(w, lokr, 1.0)[:3, :2], lokr.w1[0, 0] * kernel)


@pytest.mark.parametrize(
    "change",
    [
        LowRank(torch.ones(6, 2), torch.ones(3, 8)),
        LowRank(torch.ones(8, 2), torch.ones(2, 6)),
        LowRank(torch.ones(6, 0), torch.ones(0, 8)),
        LowRank(torch.ones(6, 2), torch.ones(2, 8), 1.0, torch.ones(2, 2, 5)),
        LowRank(torch.ones(6), torch.ones(8)),
        Hadamard(torch.ones(6, 2), torch.ones(2, 8), torch.ones(1, 2), torch.ones(2, 8)),
        Kronecker(torch.ones(48, 48), torch.ones(1000, 1000)),
        Kronecker(torch.ones(2, 4), torch.ones(3, 2), 1.0, None, None, torch.ones(3, 3)),
        Difference(torch.ones(8, 6)),
        Replacement(torch.ones(48)),
        Decomposed(LowRank(torch.ones(6, 2), torch.ones(2, 8)), torch.ones(8)),
        Decomposed(LowRank(torch.ones(6, 2), torch.ones(2, 9)), torch.ones(6)),
    ],
)
def test_misfits(change: WeightDelta) -> None:
    assert shape_error(change, (6, 8))


# a model


@pytest.mark.parametrize("strength", [1.0, 0.3, -0.5])
def test_live_equals_fused(plain: WanDiT, model: WanDiT, strength: float) -> None:
    fused = copy.deepcopy(plain)
    fuse(fused, everything(), strength)
    Adapters(model).attach("all", everything(), strength)
    torch.testing.assert_close(run(model), run(fused), atol=2e-5, rtol=2e-5)
    assert not torch.allclose(run(model), run(plain), atol=1e-2)


def test_strength_and_removal(plain: WanDiT, model: WanDiT) -> None:
    """0 and removal give the model's own output, bit for bit, and a strength that comes back its
    old output.
    """
    base, adapters = run(plain), Adapters(model)
    adapters.attach("a", everything())
    full = run(model)
    adapters.set_strength("a", 0.0)
    assert torch.equal(run(model), base)
    adapters.set_strength("a", 1.0)
    assert torch.equal(run(model), full)
    adapters.remove("a")
    assert torch.equal(run(model), base) and adapters.names == ()
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    assert all(
        torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True)
    )


def test_several_at_once(plain: WanDiT, model: WanDiT) -> None:
    """Applied in their order; each comes off alone, the first before the last too."""
    first, second = everything(), everything()
    second["blocks.0.self_attn.q.weight"] = low_rank(32, 32, 5)
    adapters = Adapters(model)
    adapters.attach("style", first, 0.5)
    alone = run(model)
    adapters.attach("a.b", second, 0.25)
    fused = copy.deepcopy(plain)
    fuse(fused, first, 0.5)
    fuse(fused, second, 0.25)
    torch.testing.assert_close(run(model), run(fused), atol=2e-5, rtol=2e-5)
    adapters.remove("a.b")
    assert torch.equal(run(model), alone)
    adapters.attach("c", second, 0.25)
    adapters.remove("style")
    fused = copy.deepcopy(plain)
    fuse(fused, second, 0.25)
    torch.testing.assert_close(run(model), run(fused), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_live_loras_add_to_the_output_in_place(plain: WanDiT, dtype: torch.dtype) -> None:
    """Without gradients there is no second tensor of the output's size, and no other bit."""
    model = copy.deepcopy(plain).to(dtype)
    adapters = Adapters(model)
    for name in ("a", "b"):
        adapters.attach(name, {"blocks.0.ffn.0.weight": low_rank(64, 32)})
    wrapper = model.get_submodule("blocks.0.ffn.0")
    assert isinstance(wrapper, LoRALinear)
    outputs: list[Tensor] = []
    wrapper.leaf.register_forward_hook(lambda _leaf, _x, out: outputs.append(out))
    x = torch.randn(2, 5, 32, dtype=dtype)
    learning = wrapper(x)
    with torch.no_grad():
        result = wrapper(x)
    assert result.data_ptr() == outputs[1].data_ptr()
    assert learning.data_ptr() != outputs[0].data_ptr()
    assert torch.equal(result, learning)


def test_dtypes(plain: WanDiT) -> None:
    """On a bfloat16 base the sum is as near as bfloat16 is, the float32 islands stay, and 0 is
    still nothing.
    """
    model = copy.deepcopy(plain)
    for block in model.blocks:
        block.to(torch.bfloat16)
    base, adapters = run(model), Adapters(model)
    adapters.attach("a", everything(), 0.0)
    assert torch.equal(run(model), base)
    adapters.set_strength("a", 0.5)
    slot = adapters.slots("a")["blocks.0.self_attn.q.weight"]
    assert (
        slot.up.dtype == torch.bfloat16
        and adapters.slots("a")["head.head.weight"].up.dtype == torch.float32
    )
    assert model.blocks[0].self_attn.q.compute_dtype == torch.bfloat16  # type: ignore[index]
    fused = copy.deepcopy(plain)
    fuse(fused, everything(), 0.5)
    # Against the rounding of the base itself: both are of its size.
    noise = (run(copy.deepcopy(model)) - run(fused)).norm() / run(fused).norm()
    assert noise < 0.05
    adapters.remove("a")
    assert torch.equal(run(model), base)


class PackedDouble(nn.Module):
    """A packed leaf as transforms/packed.py has them, that rounds in a way of its own."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.compute_dtype = (
            linear.in_features,
            linear.out_features,
            torch.float32,
        )
        self.bias = linear.bias
        self.register_buffer("data", (linear.weight * 100).round().to(torch.int16))

    def dense(self, dtype: torch.dtype) -> Tensor:
        return (self.data / 100).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.double(), self.dense(torch.float64), self.bias.double()).float()


def test_packed_base(model: WanDiT) -> None:
    """A base that has no float weight takes every kind; its own matmul stays what it was."""
    for block in model.blocks:
        for name in (
            "self_attn.q",
            "self_attn.v",
            "cross_attn.k",
            "cross_attn.v",
            "ffn.0",
            "ffn.2",
        ):
            parent, _, child = name.rpartition(".")
            setattr(block.get_submodule(parent), child, PackedDouble(block.get_submodule(name)))  # type: ignore[arg-type]
    base, adapters = run(model), Adapters(model)
    fused = copy.deepcopy(model)
    changes = everything()
    for name, module in fused.named_modules():
        if isinstance(module, PackedDouble):
            linear = nn.Linear(module.in_features, module.out_features)
            linear.weight.data, linear.bias.data = module.dense(torch.float32), module.bias.data
            linear.compute_dtype = torch.float32  # type: ignore[assignment]
            fused.get_submodule(name.rpartition(".")[0])._modules[name.rpartition(".")[2]] = linear
    fuse(fused, changes, 0.5)
    adapters.attach("a", changes, 0.0)
    assert torch.equal(run(model), base)
    adapters.set_strength("a", 0.5)
    torch.testing.assert_close(run(model), run(fused), atol=5e-5, rtol=5e-5)
    adapters.remove("a")
    assert torch.equal(run(model), base)


@pytest.mark.parametrize("kind", ["F8_E4M3", "Q8_0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_and_gguf_bases(model: WanDiT, kind: str, dtype: torch.dtype) -> None:
    """Every matmul of every block packed: the change is of the weight that the packed one stands
    for.
    """
    weights = {
        f"{name}.weight": leaf.weight
        for name, leaf in model.named_modules()
        if isinstance(leaf, nn.Linear) and "blocks" in name
    }
    biases = {name: model.get_parameter(name.replace(".weight", ".bias")) for name in weights}
    packed = {}
    for name, weight in weights.items():
        if kind == "Q8_0":
            data = torch.from_numpy(
                gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q8_0)
            )
            packed[name] = Packed(kind, tuple(weight.shape), data)
        else:
            packed[name] = Packed(
                kind,
                tuple(weight.shape),
                (weight * 100).to(torch.float8_e4m3fn),
                torch.tensor(0.01),
            )
    fused = copy.deepcopy(model)
    for name, value in packed.items():
        fused.get_parameter(name).copy_(value.dense())
    fuse(fused, everything(), 0.5)
    replace_with_packed(model, dict.fromkeys(packed, kind), dtype)
    for name, value in packed.items():
        leaf = model.get_submodule(name.removesuffix(".weight"))
        assert isinstance(leaf, PackedLinear)
        fill_packed(leaf, value)
        leaf.bias = biases[name]
    base, adapters = run(model), Adapters(model)
    adapters.attach("a", everything(), 0.5)
    difference = (run(model) - run(fused)).norm() / run(fused).norm()
    assert difference < (1e-5 if dtype == torch.float32 else 0.05)
    adapters.set_strength("a", 0.0)
    assert torch.equal(run(model), base)
    adapters.remove("a")
    assert torch.equal(run(model), base)


def test_moving_the_model_keeps_strengths(model: WanDiT) -> None:
    adapters = Adapters(model)
    adapters.attach("a", everything())
    full = run(model)
    model.to(torch.float64).to(torch.float32)  # every tensor is replaced, shared ones no longer are
    adapters.set_strength("a", 0.0)
    nothing = run(model)
    adapters.set_strength("a", 1.0)
    torch.testing.assert_close(run(model), full)
    assert not torch.allclose(nothing, full)


def test_no_recompiling(model: WanDiT) -> None:
    """Strengths move under compiled blocks, to 0 and back, and nothing compiles anew."""
    adapters, count = Adapters(model), CompileCounter()
    adapters.attach("a", everything())
    for block in model.blocks:
        block.compile(backend=count, fullgraph=True)
    full = run(model)
    compiled = count.frame_count
    assert compiled
    outputs = []
    for strength in (0.5, 0.0, -1.0, 1.0):
        adapters.set_strength("a", strength)
        outputs.append(run(model))
    assert count.frame_count == compiled
    torch.testing.assert_close(outputs[-1], full)
    assert not torch.allclose(outputs[0], full) and not torch.allclose(outputs[1], outputs[0])


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients(model: WanDiT, autocast: bool) -> None:
    """They reach `up` and `down`, scaled by the strength, and nothing else; they are those of the
    fused weight.
    """
    adapters = Adapters(model)
    change = low_rank(32, 32)
    adapters.attach("a", {"blocks.1.self_attn.v.weight": change}, 0.5)
    slot = adapters.slots("a")["blocks.1.self_attn.v.weight"]
    slot.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = run(model).square().mean()
    loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        "blocks.1.self_attn.v.slots.1.up",
        "blocks.1.self_attn.v.slots.1.down",
    }
    adapters.remove("a")
    linear = model.blocks[1].self_attn.v  # type: ignore[index]
    up = (change.up * change.scale).requires_grad_()
    down = change.down.clone().requires_grad_()
    weight = linear.weight + 0.5 * up @ down
    expected = torch.autograd.grad(
        torch.func.functional_call(_Loss(model), {"model.blocks.1.self_attn.v.weight": weight}, ()),
        (up, down),
    )
    tolerance = 0.1 if autocast else 1e-4
    for grad, other in zip((slot.up.grad, slot.down.grad), expected, strict=True):
        assert grad is not None and (grad - other).norm() <= tolerance * other.norm()


class _Loss(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self) -> Tensor:
        return run(self.model).square().mean()


def test_refusals(model: WanDiT) -> None:
    """Everything is looked at first: what is refused has changed nothing."""
    adapters, before = Adapters(model), run(model)
    good = {"blocks.0.self_attn.q.weight": low_rank(32, 32)}
    for key, change in {
        "blocks.9.self_attn.q.weight": low_rank(32, 32),
        "blocks.0.norm1.weight": Difference(torch.ones(32)),
        "blocks.0.self_attn": Difference(torch.ones(32)),
        "blocks.0.self_attn.k.weight": low_rank(33, 32),
        "blocks.0.modulation": low_rank(6, 32),
    }.items():
        with pytest.raises(RequestError, match=key.replace(".", r"\.")):
            adapters.attach("a", {**good, key: change})
    assert adapters.names == () and torch.equal(run(model), before)
    for strength in (math.nan, math.inf):
        with pytest.raises(RequestError, match="finite"):
            adapters.attach("a", good, strength)
    adapters.attach("a", good)
    with pytest.raises(RequestError, match="already"):
        adapters.attach("a", good)
    with pytest.raises(RequestError, match="attached are a"):
        adapters.set_strength("b", 1.0)
    with pytest.raises(RequestError, match="no adapter"):
        adapters.remove("b")
    with torch.device("meta"):
        empty = WanDiT(TINY)
    with pytest.raises(RuntimeError, match="meta"):
        Adapters(empty).attach("a", good)
