"""Keep the videos that are asked for in a folder: a queue of what is made, and what is left.

The queue holds each video that was ever asked for there: its request with the seed, its name, and
whether it is made. So the same command goes on after any stop, and a longer list adds videos.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import re
import secrets
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanflow.cli import beside
from wanflow.cli.flags import request_from
from wanflow.cli.generate import checked, extended, notes
from wanflow.cli.keeping import again, state_of
from wanflow.cli.parser import settings_from
from wanflow.cli.prompts import Wanted, name_of_list, wanted
from wanflow.config import RequestError
from wanflow.front import prompts_of, with_pictures
from wanflow.outputs import slug
from wanflow.pipeline import Run
from wanflow.request import PICTURES, CompleteRequest, Request
from wanflow.runtime import Runtime
from wanflow.sanity import OutputError
from wanflow.serve.jobs import Job, new_id
from wanflow.serve.local import LocalStore
from wanflow.settings import settings_of
from wanflow.units import duration
from wanflow.untrusted import printable

if TYPE_CHECKING:
    from wanflow.checkpoint.checkpoint import Checkpoint
    from wanflow.screen import Screen

logger = logging.getLogger("wanflow")

QUEUE = ".wanflow"  # the folder of the queue, in that of the videos
OWNER = "wanflow generate"
ALL = 2**31  # jobs of a page
Prints = dict[str, str]  # what pictures are known by
TOGETHER = 64  # videos whose prompts are encoded at once: 4 MB of RAM each at the published size


@dataclass(frozen=True)
class Turn:
    """A video that is made now, as every rank gets it.

    run: saved earlier. texts: prompts of the next videos, where they are encoded now.
    """

    number: int
    name: str
    target: Path
    request: Request
    run: Run | None
    texts: list[str]


class Many:
    """How far a list of videos is, and when all will be there.

    Args:
        works: what each one costs, in any unit.
    """

    def __init__(self, works: Sequence[float]) -> None:
        self.works, self.number, self.share = works, 0, 0.0
        self._began, self._before = time.monotonic(), 0.0  # work that was done before

    def begin(self, number: int, share: float) -> None:
        """Begin a video, of which a share is done already."""
        self.number, self.share = number, share
        self._before += share * self.works[number]

    def text(self, share: float) -> str:
        """Return which video it is, and the time to the end of all."""
        which = f"video {self.number + 1}/{len(self.works)}"
        done = sum(self.works[: self.number]) + share * self.works[self.number]
        if done <= self._before:
            return which
        left = (time.monotonic() - self._began) / (done - self._before)
        return f"{which}, ETA of all {duration(left * (sum(self.works) - done))}"


@dataclass
class Video:
    """A video of the list: what is asked for, its row, what `--json` says of it.

    again: whether it failed before.
    """

    wanted: Wanted
    job: Job
    entry: dict[str, Any] = field(default_factory=dict)
    again: bool = False

    @property
    def name(self) -> str:
        return str(self.job.about["file"])


class Queue:
    """The videos of a folder; one process at a time owns it.

    Args:
        args: of the command.

    videos: all that the command asks for. turn: the one that is made now.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.folder: Path = args.out_dir or Path(f"{name_of_list(args)}_videos".lstrip("_"))
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(f"cannot write {self.folder}: {error.strerror}") from None
        args.claims.take(Path(os.path.abspath(self.folder)))
        self.videos: list[Video] = []
        self._left: list[Video] = []
        self._number = -1

    # Take

    def take(self, checkpoint: Checkpoint, screen: Screen) -> None:
        """Check all videos of the command and keep the new ones in the folder's queue.

        Raises:
            RequestError: naming every line that the model refuses; then nothing is kept.
        """
        self.spec, found = checkpoint.spec, wanted(self.args, request_from(self.args))
        requests, prints, wrong = list[Request](), list[Prints](), list[str]()
        for one in found:
            try:
                request = checked(with_pictures(one.request), checkpoint)
                prints.append({name: str(getattr(request, name)) for name in PICTURES})
                given = {name: getattr(one.request, name) for name in PICTURES}
                requests.append(replace(request, **given))  # without pixels
            except RequestError as error:
                wrong.append(f"{one.where}{': ' if one.where else ''}{error}")
        if wrong:
            raise RequestError(*dict.fromkeys(wrong))
        keys = list(_keys(self.args, checkpoint, found, prints))
        self.store = LocalStore(self.folder / QUEUE)
        self.store.run("BEGIN IMMEDIATE", [])
        try:
            self._keep(found, requests, keys, screen)
        except BaseException:
            with suppress(Exception):
                self.store.run("ROLLBACK", [])
            raise
        self.store.run("COMMIT", [])
        self._begin(checkpoint, screen)

    def _keep(
        self,
        found: list[Wanted],
        requests: list[Request],
        keys: list[tuple[str, str]],
        screen: Screen,
    ) -> None:
        rows = {one.idempotency: one for one in self._rows()}
        seeds = {one.about["draw"]: one.request["seed"] for one in rows.values()}
        numbers = [int(one.about["number"]) for one in rows.values()]
        number = max([0, *numbers, *self._numbers()])
        new = 0
        for one, request, (key, draw) in zip(found, requests, keys, strict=True):
            row, failed = rows.get(key), False
            if row is None:
                if request.seed is None or request.seed < 0:
                    seed = seeds.setdefault(draw, secrets.randbelow(2**32))
                    request = replace(request, seed=seed)
                request, number, new = extended(self.args, request), number + 1, new + 1
                row = self._submit(request, key, self._about(request, number, draw))
            elif row.state == "in_progress":
                row = self.store.put_back(row, "the command ended", counts=False) or row
            elif row.state != "queued" and not (
                row.state == "completed" and self._target(row).exists()
            ):
                failed = row.state != "completed"
                self.store.delete(row.id)
                row = self._submit(_request(row), key, row.about)
            self.videos.append(Video(one, row, again=failed))
        asked = {key for key, _ in keys}
        waiting = [one for key, one in rows.items() if key not in asked and not one.final]
        self._tell(screen, new, len(rows), len(waiting))

    def _submit(self, request: Request, key: str, about: Any) -> Job:
        fields = {name: getattr(request, name) for name in settings_of(Request)}
        given = {name: value for name, value in fields.items() if value is not None}
        affinity = json.dumps([request.lora, request.size])
        job = Job(new_id(), given, affinity, about=about, idempotency=key)
        return self.store.submit(job)[0]

    def _about(self, request: Request, number: int, draw: str) -> dict[str, Any]:
        suffix = ".png" if request.frame_num == 1 else ".mp4"
        words = (f"{number:04}", str(request.seed), slug(request.prompt))
        return {"number": number, "draw": draw, "file": "_".join(filter(None, words)) + suffix}

    def _tell(self, screen: Screen, new: int, before: int, waiting: int) -> None:
        there = sum(one.job.state == "completed" for one in self.videos)
        failed = sum(one.again for one in self.videos)
        screen.say(f"{_count(len(self.videos))} -> {self.folder}; after a stop: {again(self.args)}")
        if before and new:
            screen.say(f"{_count(new)} added to the {before} of its queue")
        if there:
            screen.say(f"{_count(there)} there already")
        if failed:
            screen.say(f"{_count(failed)} failed before, and tried again at the end")
        if waiting:
            screen.say(f"{_count(waiting)} of its queue not asked for any more, and left out")

    def _rows(self) -> list[Job]:
        return self.store.page(limit=ALL, newest_first=False)

    def _numbers(self) -> Iterable[int]:
        for file in self.folder.iterdir():
            if found := re.match(r"(\d{4,9})_", file.name):
                yield int(found[1])

    def _target(self, job: Job) -> Path:
        return self.folder / str(job.about["file"])

    def _begin(self, checkpoint: Checkpoint, screen: Screen) -> None:
        """Order what is left, LoRAs together, and say what to know about it."""
        left = [one for one in self.videos if one.job.state != "completed"]
        loras = dict[Any, int]()
        keys = dict[str, int]()
        for at, one in enumerate(left):
            loras.setdefault(str(one.job.request.get("lora")), at)
            keys.setdefault(one.job.key, at)
        self._left = sorted(
            left,
            key=lambda one: (one.again, loras[str(one.job.request.get("lora"))], keys[one.job.key]),
        )
        requests = [_request(one.job) for one in self._left]
        for note in notes(self.args, map(with_pictures, requests), checkpoint):
            logger.warning(note)
        self.many = Many([_work(self._complete(one)) for one in requests])
        for one in self.videos:
            one.entry |= self._entry(one)
        document = self.args.output.document
        document |= {"path": str(self.folder), "videos": [one.entry for one in self.videos]}
        document["resume"] = again(self.args)

    def _entry(self, one: Video) -> dict[str, Any]:
        facts: dict[str, Any] = {"path": str(self._target(one.job)), "status": one.job.state}
        facts |= {"prompt": one.wanted.request.prompt, "seed": one.job.request["seed"]}
        facts |= {"where": one.wanted.where} if one.wanted.where else {}
        facts |= {"settings": one.wanted.cell} if one.wanted.cell else {}
        return facts | dict(one.job.result)

    def _complete(self, request: Request) -> CompleteRequest:
        without = replace(request, image=None, last_image=None)
        return without.complete(self.spec)

    def largest(self) -> Request | None:
        """Return the largest request that is left, for which the machine must have room."""
        requests = (with_pictures(_request(one.job)) for one in self._left)
        return max(requests, key=lambda one: _tokens(one.complete(self.spec)), default=None)

    # Make

    @property
    def turn(self) -> Video:
        """The video that is made now."""
        return self._left[self._number]

    @property
    def entry(self) -> dict[str, Any]:
        """What `--json` says of the video that is made now."""
        return self.turn.entry

    def next_turn(self) -> Turn | None:
        """Begin the next video that is not there; None after the last.

        Raises:
            RequestError: where its pictures or its saved run cannot be read.
        """
        while self._number + 1 < len(self._left):
            self._number += 1
            one = self.turn
            claimed = self.store.claim_where(OWNER, "id = ?", [one.job.id])
            one.job = claimed or one.job
            one.entry["status"] = "in_progress"
            target = self._target(one.job)
            beside.sweep(target)
            if target.exists():  # published, and the process ended before it could say so
                beside.finish(target, self.args.contact_sheet)
                self.complete()
                continue
            request, run = with_pictures(_request(one.job)), None
            if state_of(target).exists():
                run = beside.saved(target, request.complete(self.spec))
            return Turn(self._number, one.name, target, request, run, self._texts())
        return None

    def _texts(self) -> list[str]:
        if self._number % TOGETHER or len(self._left) - self._number < 2:
            return []
        some = self._left[self._number : self._number + TOGETHER]
        return prompts_of(self._complete(_request(one.job)) for one in some)

    def complete(self) -> None:
        """Keep that the video is made."""
        kept = ("bytes", "seconds", "seconds_per_step", "contact_sheet")
        facts: dict[str, Any] = {name: self.entry[name] for name in kept if name in self.entry}
        for name in ("recipe", "error", "state", "step", "resume"):
            self.entry.pop(name, None)
        self.entry["status"] = "completed"
        self.store.finish(self.turn.job, "completed", facts)

    def fail(self, words: str) -> None:
        """Keep that the video failed, and why."""
        self.entry.update(status="failed", error=words)
        self.store.finish(self.turn.job, "failed", error={"code": "failed", "message": words})

    def conclude(self, screen: Screen) -> None:
        """Draw the sheets of a grid and report.

        Raises:
            OutputError: listing the videos that failed.
        """
        document = self.args.output.document
        counts = Counter(one.entry["status"] for one in self.videos)
        document |= {"completed": counts["completed"], "failed": counts["failed"]}
        sheets = self._sheets()
        if sheets:
            document["contact_sheets"] = [str(sheet) for sheet in sheets]
            screen.say(f"sheet {', '.join(str(sheet) for sheet in sheets)}")
        failed = [one for one in self.videos if one.entry["status"] == "failed"]
        if failed:
            lines = [
                f"  {one.wanted.where or one.name}: {printable(one.entry['error'], 400)}"
                for one in failed
            ]
            raise OutputError(
                "\n".join(
                    [
                        f"{len(failed)} of {_count(len(self.videos))} failed, the others are in"
                        f" {self.folder}; try again with: {again(self.args)}",
                        *lines,
                    ]
                )
            )
        del document["resume"]
        self.args.output.path = self.folder
        took = self.args.output.took()
        screen.say(f"{_count(len(self._left))} made in {took}: all are in {self.folder}")

    def _sheets(self) -> list[Path]:
        """Draw a sheet for each prompt of a grid."""
        if not self.args.grid:
            return []
        from wanflow.cli.grid import Cell, draw_sheets

        lines: dict[int, list[Cell]] = {}
        for one in self.videos:
            there = one.entry["status"] == "completed"
            cell = Cell(
                one.wanted.request.prompt,
                {"seed": one.job.request["seed"], **one.wanted.cell},
                self._target(one.job) if there else None,
                self._complete(_request(one.job)).frame_num,
                f"failed: {one.entry.get('error', '')}",
            )
            lines.setdefault(one.wanted.line, []).append(cell)
        return draw_sheets(self.folder, list(lines.values()))


def _count(number: int) -> str:
    return f"{number:,} video{'s' * (number != 1)}"


def _request(job: Job) -> Request:
    return Request(**dict(job.request))


def _tokens(request: CompleteRequest) -> int:
    return request.size[0] * request.size[1] * request.frame_num


def _work(request: CompleteRequest) -> float:
    return float(_tokens(request) * request.sample_steps)


def _keys(
    args: argparse.Namespace, checkpoint: Checkpoint, found: list[Wanted], prints: list[Prints]
) -> Iterable[tuple[str, str]]:
    """Yield what a video is known by, and what those are that share its drawn seed.

    Equal lines differ by their number.
    """
    from wanflow.assemble import model_record

    fixed = settings_from(Runtime, args).items()
    made = {name: value for name, value in fixed if settings_of(Runtime)[name].fixed}
    weights = model_record(checkpoint).fingerprint
    seen = Counter[str]()
    for one, pictures in zip(found, prints, strict=True):
        fields = {name: getattr(one.request, name) for name in settings_of(Request)}
        fields |= pictures
        apart = {name: value for name, value in fields.items() if name not in _set_by(one)}
        whole, shared = (_digest([weights, made, part]) for part in (fields, apart))
        yield f"{whole}.{seen[whole]}", f"{shared}.{seen[whole]}"
        seen[whole] += 1


def _set_by(one: Wanted) -> set[str]:
    """Return the fields that a video's place in the grid sets."""
    names = set(one.cell)
    return names | ({"cfg_high", "cfg_low"} if "sample_guide_scale" in names else set())


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
