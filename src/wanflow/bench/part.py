"""Run one part of a check: `python -m wanflow.bench.part NAME FILE DEVICE SECONDS`."""

from __future__ import annotations

import faulthandler
import logging
import sys
from importlib import import_module
from pathlib import Path

from wanflow.bench.record import Record

# {part: functions "module.name" that answer it, in this order}
CODE = {
    "machine": ("machine.machine",),
    "nano": ("nano.nano",),
    "pinning": ("machine.pinning",),
    "block": ("block.block",),
    "compiled": ("block.rewrites", "block.compiled"),
    "expert": ("expert.expert",),
    "streaming": ("expert.streaming", "expert.copies"),
    "vae": ("vae.vae",),
    "ffn": ("ffn.ffn",),
    "loading": ("loading.loading", "nano.clip"),
}
FULL = 40 * 10**9  # bytes of GPU memory that every part fits in
BEFORE = 2.0  # seconds before its end at which a part that hangs says where


def main(name: str, file: str, device: str, seconds: str) -> None:
    """Answer a part."""
    faulthandler.enable()
    faulthandler.dump_traceback_later(max(1.0, float(seconds) - BEFORE))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    record = Record(name, Path(file))
    record.save()
    import torch

    from wanflow.bench.machine import about_device
    from wanflow.bench.tools import scale_of
    from wanflow.choices import choose_device
    from wanflow.runtime import dtype_name

    with record.asking("the device"), torch.no_grad():
        scale = scale_of(choose_device(device))
        # Kernels of packages launch on the current device. Choosing it makes a context, whose
        # memory the first part measures.
        if scale.cuda and name != "machine":
            torch.cuda.set_device(scale.device)
        record.about = about_device(scale.device, dtype_name(scale.dtype))
        record.small = scale.cuda and record.about["device_memory"] < FULL
        for place in CODE[name]:
            module, function = place.split(".")
            with record.asking(f"the part {name}"):
                getattr(import_module(f"wanflow.bench.{module}"), function)(record, scale)
            scale.empty()
    record.save(ended=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
