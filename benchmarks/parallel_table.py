"""Print what several GPUs send, hold and take for one video, by the plan; nothing is measured.

For 81 frames at 1280*720 and 832*480 on 1, 2, 3, 4, 6 and 8 GPUs: the chosen layout, with complete
weights and with shards, and the official program's (Ulysses over all, with shards). A step runs on
tensors without memory, as the last rank, and the code that sends counts what it sends.
`expected_bytes` computes the same independently. Times come from rates (A100 and H100) and a link:
NVLink, and PCIe as if these cards had only that. Published times of others are next to them.

    python benchmarks/parallel_table.py
"""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from wanflow.checkpoint.checkpoint import published
from wanflow.parallel.groups import sizes
from wanflow.plan.cards import GPUS, PCIE
from wanflow.plan.estimate import Estimate, estimate
from wanflow.plan.gpus import described
from wanflow.plan.plan import Plan
from wanflow.plan.solve import solve
from wanflow.presets import T2V_A14B
from wanflow.request import Request
from wanflow.runtime import Runtime

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers.expected_bytes import forward_bytes

SIZES, COUNTS = ("1280*720", "832*480"), (1, 2, 3, 4, 6, 8)
CARDS = ("a100-80gb", "h100-80gb", "h20")
# Seconds of a complete run in 40 steps, weights loaded: Wan2.2's comp_effic.png; (GPUs, seconds).
OFFICIAL = {
    "1280*720": {
        "a100-80gb": {1: 2735.7, 4: 725.3, 8: 386.7},
        "h100-80gb": {1: 1041.5, 4: 288.7, 8: 155.1},
        "h20": {1: 4048.7, 4: 1067.8, 8: 564.7},
    },
    "832*480": {
        "a100-80gb": {1: 785.7, 4: 215.2, 8: 119.9},
        "h100-80gb": {1: 326.9, 4: 91.7, 8: 51.5},
        "h20": {1: 1133.9, 4: 306.6, 8: 170.5},
    },
}
# LightX2V's beginner guide ("Run DiT" on eight); diffusion-bench-framework's report of 2026-07-28
# for SGLang and LightX2V on four.
OTHERS = {
    "h100-80gb": {
        1: {"LightX2V": 796},
        4: {"SGLang": 209.9, "LightX2V": 214.4},
        8: {"LightX2V": 119.0},
    }
}


def plan_of(size: str, count: int, runtime: Runtime) -> Plan:
    model, request = published(), Request("any", size=size, seed=0).complete(T2V_A14B)
    return solve(
        model, request, runtime, described("h200", count, ram=2000, disk=500), processes=count
    )


def without_loading(found: Estimate) -> float:
    return found.seconds - sum(stage.loading for stage in found.stages)


def timed(plan: Plan, card: str, link: float | None = None) -> Estimate:
    known = GPUS[card].rates
    return estimate(
        replace(
            plan,
            machine=replace(
                plan.machine, rates=known if link is None else replace(known, link=link)
            ),
        )
    )


def row_of(size: str, count: int, name: str, plan: Plan) -> dict[str, Any]:
    assert plan.need is not None
    layout, step = plan.layout, plan.need.phases[1]
    width, height = map(int, size.split("*"))
    tokens = 21 * width * height // 256
    passes = 1 if layout.cfg == 2 else 2
    # One velocity a step; the rest in each pass.
    expected = {
        what: amount * (1 if what == "velocity" else passes)
        for what, amount in forward_bytes(layout, T2V_A14B.dit, tokens, count - 1).items()
    }
    heads, shares = sizes(T2V_A14B.dit.num_heads, layout.ulysses), sizes(tokens, layout.sequence)
    return {
        "size": size,
        "gpus": count,
        "which": name,
        "layout": str(layout),
        "dit_fsdp": plan.runtime.dit_fsdp,
        "sent_gb": round(sum(step.sent.values()) / 1e9, 3),
        "sent": dict(step.sent),
        "as_layout_says": dict(step.sent) == expected,
        "messages": step.messages,
        "gathered_gb": round(step.gathered / 1e9, 3),
        "heads": heads,
        "tokens": [min(shares), max(shares)],
        "gpu_gb": round(plan.need.device.device / 1e9, 1),
        "gpu_gb_at_work": round(step.device / 1e9, 1),
        "activations_gb": round(step.activations / 1e9, 1),
        "vae_activations_gb": round(plan.need.phases[-1].activations / 1e9, 1),
        "vae_sent_gb": round(sum(plan.need.phases[-1].sent.values()) / 1e9, 3),
        "step_s": {card: round(timed(plan, card).stages[1].step, 3) for card in CARDS},
        "step_pcie_s": {card: round(timed(plan, card, PCIE).stages[1].step, 3) for card in CARDS},
        "run_s": {card: round(without_loading(timed(plan, card)), 1) for card in CARDS},
        "run_pcie_s": {card: round(without_loading(timed(plan, card, PCIE)), 1) for card in CARDS},
    }


def explained(size: str, plans: dict[tuple[str, int, str], Plan]) -> list[dict[str, Any]]:
    """The official program's times on several GPUs, from its own on one: does the same reckoning
    hold for it?

    It decodes on one GPU, and embeds every token's timestep on each; all else is shared, and it
    sends what Ulysses sends. What of each pass would then have to be unshared for its published
    time: the same number on 4 and on 8, if the reckoning is right.
    """
    found = []
    for card, known in OFFICIAL[size].items():
        vae = timed(plans[size, 1, "auto"], card).stages[-1].step
        for count in (4, 8):
            sending = timed(plans[size, count, "official"], card).stages[1].sending * 40
            shared = known[1] - vae
            unshared = (known[count] - vae - sending - shared / count) / (1 - 1 / count)
            found.append(
                {
                    "size": size,
                    "card": card,
                    "gpus": count,
                    "unshared_s_a_pass": round(unshared / 80, 3),
                }
            )
    return found


def main() -> None:
    rows, plans = [], dict[tuple[str, int, str], Plan]()
    complete = Runtime(
        keep_experts=True,
        dit_fsdp=False,
        resident_blocks=40,
        chunk_tokens=0,
        t5_cpu=False,
        prefetch=False,
    )
    for size in SIZES:
        for count in COUNTS:
            ways = {"auto": complete}
            if count > 1:
                ways["auto, dit_fsdp"] = replace(complete, dit_fsdp=True)
                ways["official"] = replace(complete, dit_fsdp=True, ulysses_size=count)
            for name, runtime in ways.items():
                plans[size, count, name] = plan = plan_of(size, count, runtime)
                row = row_of(size, count, name, plan)
                rows.append(row)
                a100, h100 = (
                    f"{row['step_s'][card]:6.2f} ({row['step_pcie_s'][card]:6.2f} by PCIe)"
                    for card in CARDS[:2]
                )
                print(
                    f"{size:8} {count} {name:15} {row['layout']:18} sends {row['sent_gb']:6.2f} GB,"
                    f" gets {row['gathered_gb']:5.1f}  GPU {row['gpu_gb']:5.1f} GB  a step: A100"
                    f" {a100}, H100 {h100}",
                    flush=True,
                )
    print(
        json.dumps(
            {
                "what": (
                    "what several GPUs send, hold and take, by the plan; nothing of it was measured"
                ),
                "date": str(date.today()),
                "machine": {"system": platform.platform(), "torch": torch.__version__},
                "command": "python benchmarks/parallel_table.py",
                "links": {card: GPUS[card].rates.link for card in CARDS} | {"pcie": PCIE},
                "rows": rows,
                "official": OFFICIAL,
                "others": OTHERS,
                "official_explained": [found for size in SIZES for found in explained(size, plans)],
            }
        )
    )


if __name__ == "__main__":
    main()
