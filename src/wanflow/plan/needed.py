"""Say what the full model needs, and what to do where a machine lacks it; without torch."""

from __future__ import annotations

from wanflow.plan.gpus import Machine

# The README asks for 80, 64 and 150 GB; drivers and systems report a little less.
GPU_NEEDED, RAM_NEEDED, DISK_NEEDED = 80, 64, 150
GPU_REPORTED, RAM_REPORTED = 75 * 2**30, 58 * 2**30
# GB of GPU memory and RAM that 1280*720 and 81 frames run with; tests hold the plan to it.
LEAST = (12, 32)
WHERE_ELSE = (
    "run it on a server or cloud machine with an 80 GB GPU, such as an A100 or H100 (Alibaba PAI,"
    " Tencent TI, AWS, Azure, Google Cloud, or a container platform), or on any GPU with 12 GB; on"
    " this machine, --ckpt_dir nano runs the miniature"
)


def needed_words() -> str:
    """Return what the full model needs, for a message."""
    return (
        f"Wan2.2-T2V-A14B needs a GPU with {GPU_NEEDED} GB, {RAM_NEEDED} GB of RAM and"
        f" {DISK_NEEDED} GB of disk for its weights; with {LEAST[0]} GB and {LEAST[1]} GB of RAM it"
        " runs by streaming them"
    )


def enough_for_full_size(machine: Machine) -> bool:
    """Return whether a machine has the GPU and the RAM that the README asks for."""
    return machine.gpu >= GPU_REPORTED and (machine.ram == 0 or machine.ram >= RAM_REPORTED)
