"""Every feature with every other one: the result is the plain run's, or the combination is refused
in words.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers.common import PROMPT
from helpers.features import BIT, FEATURES, KINDS, feature, latent, plain_latent

import wanflow
from wanflow.api import Pipeline
from wanflow.config import RequestError


def compatible(one: str, two: str) -> bool:
    """Two features that set the same thing to different values are one choice, not a pair."""
    sides = zip(FEATURES[one][:2], FEATURES[two][:2], strict=True)
    return not any(a[key] != b[key] for a, b in sides for key in a.keys() & b.keys())


# What truly cannot go together is refused in words, before a weight is read.
REFUSED = {
    (a, b): "packed weights already"
    for a in ("quantised", "all quantised")
    for b in ("fp8 weights", "GGUF weights", "nvfp4 weights", "rotated int8 weights")
}
PAIRS = [(a, b) for a, b in itertools.combinations(FEATURES, 2) if compatible(a, b)]
# The family: what touches its channels, times and single network, in the default run and in pairs.
FAMILY = [kind for kind in KINDS if kind != "nano"]
QUICK = ("i2v, both pictures", "ti2v, picture")
TOUCHED = (
    "two passes",
    "stop and resume",
    "fused LoRAs",
    "blocks streamed from disk",
    "the next expert read ahead",
    "tokens in chunks",
    "quantised",
    "compiled",
)


def compare(kind: str, runtime: dict[str, Any], request: dict[str, Any], limit: float) -> None:
    """How it runs must not change what is made, beyond the limit."""
    result = latent(runtime, request, kind)
    asked = tuple(sorted((key, value) for key, value in request.items() if key != "stop"))
    plain = plain_latent(asked, kind)
    assert torch.isfinite(result).all()
    if limit == BIT:
        assert torch.equal(result, plain)
    else:
        assert (result - plain).abs().mean() <= limit * plain.abs().mean()


def pair(kind: str, one: str, two: str) -> None:
    (runtime1, request1, limit1), (runtime2, request2, limit2) = (
        feature(kind, name) for name in (one, two)
    )
    if (one, two) in REFUSED:
        with pytest.raises(RequestError, match=REFUSED[one, two]):
            latent(runtime1 | runtime2, request1 | request2, kind)
        return
    compare(kind, runtime1 | runtime2, request1 | request2, max(limit1, limit2))


@pytest.mark.parametrize("name", FEATURES)
def test_alone(name: str) -> None:
    compare("nano", *FEATURES[name])


@pytest.mark.slow
@pytest.mark.parametrize(("one", "two"), PAIRS, ids=[f"{a} + {b}" for a, b in PAIRS])
def test_pair(one: str, two: str) -> None:
    pair("nano", one, two)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(
            kind,
            name,
            id=f"{kind}: {name}",
            marks=() if kind in QUICK and name in TOUCHED[:-1] else pytest.mark.slow,
        )
        for kind in FAMILY
        for name in FEATURES
        if (kind in QUICK) or name in TOUCHED
    ],
)
def test_family_alone(kind: str, name: str) -> None:
    if name == "one frame" and "last_image" in KINDS[kind][1]:
        with pytest.raises(RequestError, match="last_image needs a video"):
            latent(*feature(kind, name)[:2], kind)
        return
    compare(kind, *feature(kind, name))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "one", "two"),
    [
        pytest.param(kind, one, two, id=f"{kind}: {one} + {two}")
        for kind in QUICK
        for one, two in itertools.combinations(TOUCHED, 2)
    ],
)
def test_family_pair(kind: str, one: str, two: str) -> None:
    pair(kind, one, two)


@pytest.mark.parametrize(
    ("runtime", "words"),
    [
        ({"dtype": "int4"}, "dtype"),
        ({"device": "tpu"}, "device"),
        ({"noise_device": "tpu"}, "noise_device"),
        ({"devise": "cpu"}, "devise"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(
    runtime: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wanflow.loaders import parts, prompts

    def read(*_: object) -> None:
        raise AssertionError("a weight was read")

    for module, name in (
        (parts, "open_expert"),
        (prompts, "load_text_encoder"),
        (parts, "load_vae"),
    ):
        monkeypatch.setattr(module, name, read)
    with pytest.raises(RequestError, match=words):
        wanflow.load("nano", **runtime)


def test_a_pipeline_serves_many_requests(nano: Pipeline) -> None:
    """No request leaves anything behind for the next."""
    first = nano.generate(PROMPT, frame_num=5, sample_steps=2, seed=1).frames
    nano.generate(
        "a large green cross spins on a black background",
        frame_num=9,
        sample_steps=3,
        sample_solver="euler",
        cfg_high=1.0,
    )
    assert (nano.generate(PROMPT, frame_num=5, sample_steps=2, seed=1).frames == first).all()
