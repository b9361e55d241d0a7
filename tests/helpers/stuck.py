"""The `wanflow` command whose model is stuck in one operation of C++ for minutes.

    stuck.py STEP generate ...

From the forward of STEP on (1-based; two passes of guidance are one forward here), attention runs
over four times as many tokens as the published model has at 1280*720 and 81 frames. A line "stuck"
on standard error gives the moment. With PATIENT in the environment, one signal ends nothing.
"""

from __future__ import annotations

import os
import sys
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F

from wanflow import cli
from wanflow.cli import ending
from wanflow.models.dit import WanDiT

TOKENS = 4 * 75_600


def main() -> None:
    first, forward, numbers = int(sys.argv[1]), WanDiT.forward, count(1)

    def slow(*args: Any, **kwargs: Any) -> Any:
        if next(numbers) >= first:
            q = torch.zeros(1, 1, TOKENS, 128)
            print("stuck", file=sys.stderr, flush=True)
            F.scaled_dot_product_attention(q, q, q)
        return forward(*args, **kwargs)

    if "PATIENT" in os.environ:
        ending.STUCK_S = ending.UNWINDING_S = 600.0
    WanDiT.forward = slow  # type: ignore[method-assign]
    cli.entry(sys.argv[2:])


if __name__ == "__main__":
    main()
