"""Compiled blocks on several ranks: the latent of one process, two graphs on each rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.common import PROMPT
from helpers.compiled import no_recompile, traced
from helpers.features import latent
from helpers.processes import Processes

from wanflow.assemble import assemble
from wanflow.opening import resolve
from wanflow.parallel import ranks
from wanflow.request import Request
from wanflow.runtime import Runtime

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
WAYS: dict[str, dict[str, Any]] = {
    "Ulysses": {"ulysses_size": 2},
    "ring": {"ring_size": 2},
    "guidance": {"cfg_parallel": True},
    "shared weights": {"ulysses_size": 2, "dit_fsdp": True},
}


def compiled(info: ranks.DistInfo) -> dict[str, Any]:
    found = {}
    for way, runtime in WAYS.items():
        with traced(), no_recompile():
            pipe = assemble(
                resolve("nano"), Runtime(device="cpu", compile="on", **runtime), None, info
            )
            run = pipe.resume(pipe.begin(Request(PROMPT, frame_num=5, sample_steps=2, seed=3)))
            found[way] = run.state.x, pipe.parts.compiler.graphs, run.recipe.runtime["compile"]
    return found


@pytest.mark.parametrize("way", WAYS)
def test_two_graphs_on_each_rank(way: str, processes: Processes) -> None:
    one = latent({}, {"sample_steps": 2})
    for found in processes(compiled, 2):
        result, graphs, recorded = found[way]
        assert (graphs, recorded) == (2, "on")
        assert (result - one).abs().max() <= 1e-3 * one.abs().max()
    assert torch.isfinite(one).all()
