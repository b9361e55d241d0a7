"""`--gpus 0,1,2,3`: one video by several ranks on this machine."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from wanflow.cli.devices import LAUNCHED, Ranks
from wanflow.cli.output import Output

COMMAND = [sys.executable, "-P", "-m", "wanflow"]


def launch(argv: list[str], ranks: Ranks, output: Output) -> int:
    """Run the command line on the ranks; return the run's exit code."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if getattr(signal, "SIGHUP", None) and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        os.environ.setdefault("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT")  # nohup
    from wanflow.parallel.agent import run_ranks

    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), LAUNCHED: str(os.getpid())}
    return run_ranks(
        [*COMMAND, *argv, *ranks.flags],
        len(ranks.devices),
        ranks.environment | environment,
        output.error,
        output.conclude,
    )
