"""Plan in a process of its own: seconds of work, and torch, that HTTP never waits for.

`python -m wanflow.serve.planner` answers lines of JSON on standard input, until it ends. It starts
with the first question, so a server of the miniature never has one.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Mapping
from threading import Lock, Timer
from typing import Any

from wanflow.config import RequestError

logger = logging.getLogger("wanflow")
OPERATOR = "the operator of the server can change its settings: its log has the flags"
TABLES = ("rates", "overheads")  # of a machine, which the plan looks up again
ANSWER_S = 180.0  # a plan takes seconds; after this it counts as failed


class Planner:
    """The process, as HTTP sees it; one question at a time.

    Args:
        ckpt_dir: the model's folder. parts: single files of it. Without both, the published files
            of the model are planned, of which the shapes are known.
    """

    def __init__(self, ckpt_dir: str | None, parts: Mapping[str, str]) -> None:
        self._about = {"ckpt_dir": ckpt_dir, "parts": dict(parts)}
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = Lock()

    def model(self) -> str:
        """Return the name of the model of the files.

        Raises:
            RequestError: for files that cannot be read.
        """
        answer = self._ask({"do": "model"})
        if "model" not in answer:
            raise RequestError(answer.get("refused", "the model cannot be read; see the log"))
        return str(answer["model"])

    def why_not(self, request: Mapping[str, Any], model: str, worker: Mapping[str, Any]) -> str:
        """Return why a request does not fit a worker; "" where it does, or no plan can be made.

        The words are for clients; the log gets those with flags.
        """
        answer = self._ask({"do": "plan", "request": request, "model": model, "worker": worker})
        if "flags" in answer:
            logger.info("a video is refused: %s", " ".join(answer["flags"].split()))
        return str(answer.get("refused", ""))

    def _ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE
                )
            process = self._process
            assert process.stdin is not None and process.stdout is not None
            late = Timer(ANSWER_S, process.kill)
            late.start()
            try:
                process.stdin.write(json.dumps({**self._about, **question}).encode() + b"\n")
                process.stdin.flush()
                answer = process.stdout.readline()
            except OSError:
                answer = b""
            finally:
                late.cancel()
            if not answer:
                logger.warning("no plan could be made; the worker decides")
                return {}
            found: dict[str, Any] = json.loads(answer)
            return found

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


# The process's side


def main() -> None:
    """Answer until standard input ends."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is no answer
    opened: dict[str, Any] = {}
    for line in sys.stdin:
        question = json.loads(line)
        try:
            if not opened:
                opened["checkpoint"] = _checkpoint(question)
            if question["do"] == "model":
                answer = {"model": opened["checkpoint"].spec.name}
            else:
                answer = _plan(opened["checkpoint"], question)
        except RequestError as error:
            answer = {"refused": str(error)}
        except Exception:
            logger.exception("a plan failed")
            answer = {}
        print(json.dumps(answer), file=answers, flush=True)


def _checkpoint(question: Mapping[str, Any]) -> Any:
    from wanflow.checkpoint.checkpoint import published
    from wanflow.opening import resolve
    from wanflow.presets import FAMILY

    named, parts = question["ckpt_dir"], question["parts"]
    if named is None and not parts:
        spec = next((one for one in FAMILY if one.name == question.get("model")), None)
        return resolve("nano") if spec is None else published(spec)
    return resolve(named, parts)


def _plan(checkpoint: Any, question: Mapping[str, Any]) -> dict[str, str]:
    """Return why a request does not fit a worker: for clients, and with flags; {} where it does."""
    from dataclasses import fields, replace

    from wanflow.plan.solve import solve
    from wanflow.plan.start import raise_if_unfit
    from wanflow.request import Request
    from wanflow.runtime import Runtime

    worker = question["worker"]
    known = {one.name for one in fields(Runtime)}
    settings = {name: value for name, value in worker["settings"].items() if name in known}
    runtime = replace(Runtime(**settings), calibration=None)
    machine, processes = described(worker["machine"]), int(worker["machine"].get("processes", 1))
    runtime = replace(runtime, device="auto" if machine.gpu else "cpu")
    complete = Request(**question["request"]).complete(checkpoint.spec)
    plan = solve(checkpoint, complete, runtime, machine, processes=processes)
    try:
        raise_if_unfit(plan)
    except RequestError as error:
        return {"refused": _for_clients(plan, str(error.args[0])), "flags": str(error)}
    return {}


def _for_clients(plan: Any, needs: str) -> str:
    """Return why a plan does not fit, by what a client can change; `needs` where that is nothing.

    Settings, which the plan offers too, are the operator's.
    """
    here = plan.machine.words()
    if not plan.short:
        return f"{needs}; the worker has {here}; {OPERATOR}"
    (width, height), frames = plan.request.size, plan.request.frame_num
    found = (one for one in plan.offers if one.startswith("size "))
    smaller = next(found, "no smaller video was found that").removesuffix(" fits")
    return (
        f"size {width}*{height} with frame_num {frames} needs {'; and '.join(plan.short)} on the"
        f" worker ({here}); {smaller} fits; {OPERATOR}"
    )


def described(facts: Mapping[str, Any]) -> Any:
    """Return the machine of a worker, with all of its memory free: a job may use what is loaded."""
    from dataclasses import fields

    from wanflow.plan.gpus import Machine

    known = {one.name for one in fields(Machine)} - set(TABLES)
    found: dict[str, Any] = {"gpu": 0, "gpu_name": "", "ram": 0, "disk_free": 0}
    found |= {name: value for name, value in facts.items() if name in known}
    free = {"gpu_free": found["gpu"], "ram_free": found["ram"], "described": True, "device": ""}
    return Machine(**{**found, **free})


if __name__ == "__main__":
    main()
