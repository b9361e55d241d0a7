"""The gang's side with nano, in the process of the test: results, saved states, faults."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from helpers.gangs import LIMIT_S, job, wait_for
from PIL import Image

import wanflow
from wanflow import keeping, outputs
from wanflow.clipfiles import read_frames, read_recipe
from wanflow.config import RequestError
from wanflow.front import Pipeline
from wanflow.pipeline import Progress, Run
from wanflow.request import Request
from wanflow.sanity import OutputError
from wanflow.serve import gang
from wanflow.serve.folder import DataFolder
from wanflow.serve.jobs import Job
from wanflow.serve.line import Line, Message
from wanflow.serve.named import without_folders


class Boss:
    """The worker of a gang, in the test."""

    def __init__(self, line: Line) -> None:
        self.line = line
        self.heard: list[Message] = []
        Thread(target=line.hear, args=(self.heard.append,), daemon=True).start()

    def make(self, job: Job) -> None:
        self.line.say(do="make", job=gang.made_of(job))

    def of(self, job: Job, what: str) -> list[Message]:
        return [one for one in self.heard if one["say"] == what and one.get("id") == job.id]

    def end_of(self, job: Job) -> Message:
        """Return the message that ended a job."""
        kinds = ("done", "failed", "stopped", "crashed")
        wait_for(lambda: any(self.of(job, kind) for kind in kinds), lambda: str(self.heard))
        return next(one for kind in kinds for one in self.of(job, kind))


@contextmanager
def at_work(
    folder: Path, pipe: Pipeline | None, loras: tuple[Path, ...] = (), orders: Any = None
) -> Iterator[Boss]:
    """A gang that works for the test; leaving is the end of its worker."""
    here, there = Pipe()
    opened.clear()

    def open_it(report: Any) -> Pipeline:
        opened.append(pipe or wanflow.load("nano", device="cpu", report=report))
        return opened[-1]

    def work() -> None:
        try:
            gang.Maker(open_it, DataFolder(folder), loras, instructions, orders).work()
        except Exception as error:
            ended.append(error)

    boss, gone = Boss(Line(here)), list[int]()
    instructions = gang.Instructions(Line(there), lambda: gone.append(1))
    thread = Thread(target=work)
    thread.start()
    try:
        yield boss
    finally:
        boss.line.say(do="drain")
        thread.join(LIMIT_S)
        assert not thread.is_alive()
        with socket.socket(fileno=os.dup(here.fileno())) as end:
            end.shutdown(socket.SHUT_RDWR)
        wait_for(lambda: gone, lambda: "a gang whose worker is gone does not notice")


opened: list[Pipeline] = []  # how often the model was
ended: list[Exception] = []  # what ended a gang


@pytest.fixture(autouse=True)
def forgotten() -> None:
    ended.clear()


def attempt(number: int, one: Job) -> Job:
    return replace(one, attempts=number)


def frames(folder: Path, message: Message) -> Any:
    return read_frames(folder / "videos" / message["result"]["file"])[0]


def test_a_recipe_for_clients_names_no_folder(nano: Pipeline) -> None:
    recipe = nano.begin(Request("a", seed=1)).recipe
    paths = {"high": "/weights/a/high.safetensors"}
    private = replace(
        recipe,
        model=replace(recipe.model, folder="/weights/a", parts=paths),
        request=replace(recipe.request, lora=("/loras/b/fast.safetensors@high=1.0,low=0.5",)),
        loras={"/loras/b/fast.safetensors": "f" * 16},
    )
    public = without_folders(private)
    assert "/" not in json.dumps(public.to_json())
    assert public.request.lora == ("fast.safetensors@high=1.0,low=0.5",)
    assert public.model.parts == {"high": "high.safetensors"}
    assert public.loras == {"fast.safetensors": "f" * 16}


def test_a_job_becomes_a_video_with_its_pictures(tmp_path: Path, nano: Pipeline) -> None:
    one = attempt(1, job())
    with at_work(tmp_path, nano) as boss:
        boss.make(one)
        result = boss.end_of(one)["result"]
        seen = [message["progress"] for message in boss.of(one, "progress")]
    video = tmp_path / "videos" / f"{one.id}.1.mp4"
    assert result["file"] == video.name and result["bytes"] == video.stat().st_size
    names = ("width", "height", "frames", "fps", "seed")
    assert [result[name] for name in names] == [64, 64, 5, 8, 7]
    assert result["seconds"] > 0 and result["seconds_per_step"] > 0 and result["peak_memory"]["ram"]
    assert {"prompt", "denoising", "decoding", "saving"} <= set(result["stages"])
    assert 0.5 * result["seconds"] < sum(result["stages"].values()) < result["seconds"] + 0.01
    made = nano.generate(job().request["prompt"], seed=7, sample_steps=4, frame_num=5)
    assert read_frames(video)[0].shape == made.frames.shape
    recipe = read_recipe(video)
    assert recipe["request"]["seed"] == 7 and recipe["model"]["folder"] == "nano"
    for variant, size in (("thumbnail", (64, 64)), ("spritesheet", None)):
        with Image.open(DataFolder(tmp_path).beside(video, variant)) as picture:
            assert picture.format == "WEBP" and size in (None, picture.size)
    assert [one["step"] for one in seen if one["stage"] == "denoising"] == [1, 2, 3, 4]
    assert {one["expert"] for one in seen if one["step"]} == {"high", "low"}
    percents = [one["percent"] for one in seen]
    assert percents == sorted(percents) and percents[0] == 0 and percents[-1] == 99
    assert all(one["steps"] == 4 for one in seen)


def test_one_frame_is_a_picture(tmp_path: Path, nano: Pipeline) -> None:
    one = attempt(1, job(frame_num=1, sample_steps=2))
    with at_work(tmp_path, nano) as boss:
        boss.make(one)
        assert boss.end_of(one)["result"]["file"] == f"{one.id}.1.png"


def test_the_second_job_knows_when_it_will_end(tmp_path: Path, nano: Pipeline) -> None:
    first, second = attempt(1, job()), attempt(1, job())
    with at_work(tmp_path, nano) as boss:
        boss.make(first)
        boss.make(second)
        boss.end_of(second)
        seen = [message["progress"] for message in boss.of(second, "progress")]
    assert all(one["eta_s"] is not None for one in seen if one["stage"] == "denoising")
    assert opened == [nano]  # the model stays between jobs


class Stop:
    """Asks a gang to stop at a step, from within that step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: int, ask: Callable[[], Any]) -> None:
        real = keeping.Keeper.__call__

        def call(keeper: keeping.Keeper, progress: Progress) -> bool:
            if progress.step == step and not self.asked:
                self.asked = True
                ask()
            return real(keeper, progress)

        self.asked = False
        monkeypatch.setattr(keeping.Keeper, "__call__", call)


def stopped_at(
    step: int, one: Job, folder: Path, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> Message:
    """Let a worker leave at a step of a job; return how the job ended."""
    with monkeypatch.context() as patch, at_work(folder, pipe) as boss:
        draining = "wanflow.serve.gang.Instructions.stopping"
        Stop(patch, step, lambda: patch.setattr(draining, lambda self, job: True))
        boss.make(one)
        return boss.end_of(one)


def test_a_job_goes_on_at_the_step_it_had_reached(
    tmp_path: Path, nano: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, one = attempt(1, job()), attempt(1, job())
    end = stopped_at(2, one, tmp_path, nano, monkeypatch)
    assert end == {"say": "stopped", "id": one.id, "step": 2}
    assert Run.load(DataFolder(tmp_path).state(one.id)).state.index == 2
    with at_work(tmp_path, nano) as boss:
        boss.make(whole)
        boss.make(attempt(2, one))
        begun, gone_on = boss.end_of(whole), boss.end_of(one)
        steps = [message["progress"]["step"] for message in boss.of(one, "progress")]
    assert min(steps) == 2 and gone_on["result"]["notes"] == []
    assert np.array_equal(frames(tmp_path, begun), frames(tmp_path, gone_on))
    videos = tmp_path / "videos"
    files = [videos / end["result"]["file"] for end in (begun, gone_on)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_job_that_was_to_be_decoded_is_not_denoised_again(
    tmp_path: Path, nano: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = attempt(1, job())
    with monkeypatch.context() as patch, at_work(tmp_path, nano) as boss:
        full = "is full"
        patch.setattr(gang, "refuse_without_room", lambda *given: raises(RequestError(full)))
        boss.make(one)
        assert boss.end_of(one) == {"say": "stopped", "id": one.id, "why": full}
    with at_work(tmp_path, nano) as boss:
        boss.make(attempt(2, one))
        assert boss.end_of(one)["say"] == "done"
        assert "denoising" not in [m["progress"]["stage"] for m in boss.of(one, "progress")]


@pytest.mark.parametrize("fault", ["damaged", "other", "weights"])
def test_a_state_that_does_not_fit_is_begun_again(
    fault: str, tmp_path: Path, nano: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, file = attempt(1, job()), DataFolder(tmp_path).state("")
    file = DataFolder(tmp_path).state(one.id)
    file.parent.mkdir()
    run = nano.begin(wanflow.Request(**{**one.request, "seed": 8}))
    if fault == "damaged":
        run.save(file)
        file.write_bytes(file.read_bytes()[:-100])
    elif fault == "other":
        run.save(file)
    else:
        run = nano.begin(wanflow.Request(**one.request))
        model = replace(run.recipe.model, fingerprint="0" * 16)
        replace(run, recipe=replace(run.recipe, model=model)).save(file)
    with at_work(tmp_path, nano) as boss:
        boss.make(one)
        end = boss.end_of(one)
        assert "began again" in end["result"]["notes"][0]
        whole = attempt(1, job())
        boss.make(whole)
        assert np.array_equal(frames(tmp_path, end), frames(tmp_path, boss.end_of(whole)))


def test_a_cancelled_job_stops_within_one_step(
    tmp_path: Path, nano: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, after = attempt(1, job()), attempt(1, job(sample_steps=2))
    with at_work(tmp_path, nano) as boss:

        def cancel() -> None:
            boss.line.say(do="cancel", id=one.id)
            boss.make(after)

        Stop(monkeypatch, 2, cancel)
        boss.make(one)
        end = boss.end_of(one)
        assert end["say"] == "stopped" and end["step"] <= 3
        assert boss.end_of(after)["say"] == "done"
    assert not DataFolder(tmp_path).state(one.id).exists()


@pytest.mark.parametrize("what", ["text encoder", "low-noise", "VAE"])
def test_a_cancelled_job_does_not_wait_for_weights(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, one, after = gang.Maker._loading, attempt(1, job()), attempt(1, job())
    asked: list[int] = []

    def loading(self: gang.Maker, name: str, done: int, total: int) -> None:
        if what in name and done < total and not asked:
            asked.append(done)
            self.worker._cancelled.add(one.id)  # type: ignore[union-attr]
        real(self, name, done, total)

    monkeypatch.setattr(gang.Maker, "_loading", loading)
    with at_work(tmp_path, None) as boss:
        boss.make(one)
        assert boss.end_of(one) == {
            "say": "stopped",
            "id": one.id,
            "step": 2 if what == "low-noise" else 0,
        }
        boss.make(after)
        assert boss.end_of(after)["say"] == "done"


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"size": [100, 100]}, "size"),
        ({"frame_num": 6}, "frame"),
        ({"lora": ["../secret"]}, "not registered"),
        ({"image": "0" * 64}, "gone from the server"),
        ({"sample_steps": 0}, "sample_steps"),
    ],
)
def test_a_bad_request_fails_with_words(
    asked: dict[str, Any], words: str, tmp_path: Path, nano: Pipeline
) -> None:
    one, after = attempt(1, job(**asked)), attempt(1, job(sample_steps=2))
    with at_work(tmp_path, nano) as boss:
        boss.make(one)
        boss.make(after)
        end = boss.end_of(one)
        assert (end["say"], end["code"]) == ("failed", "invalid_request")
        assert words in end["message"] and str(tmp_path) not in end["message"]
        assert boss.end_of(after)["say"] == "done"


def raises(error: Exception) -> None:
    raise error


def test_a_broken_output_fails_the_job(
    tmp_path: Path, nano: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wanflow import pipeline

    def broken(*given: Any) -> None:
        raise OutputError("NaN at step 1")

    one = attempt(1, job())
    monkeypatch.setattr(pipeline, "check_step", broken)
    with at_work(tmp_path, nano) as boss:
        boss.make(one)
        end = boss.end_of(one)
    assert end["code"] == "bad_output" and end["message"] == "NaN at step 1"
    assert not DataFolder(tmp_path).state(one.id).exists()


def test_out_of_memory_fails_the_job_and_the_gang_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wanflow.models.vae import WanVAE

    one, after = attempt(1, job()), attempt(1, job())
    pipe = wanflow.load("nano", device="cpu")
    with at_work(tmp_path, pipe) as boss:
        with monkeypatch.context() as patch:
            patch.setattr(WanVAE, "decode_frames", lambda *given: raises(MemoryError("no more")))
            boss.make(one)
            end = boss.end_of(one)
        assert (end["say"], end["code"]) == ("failed", "out_of_memory")
        assert "out of memory in decoding" in end["message"] and "take" in end["message"]
        boss.make(after)
        assert boss.end_of(after)["say"] == "done"
    assert len(opened) == 2


def test_settings_that_saved_memory_end_with_their_job(tmp_path: Path) -> None:
    """A job in smaller pieces must not change the videos after it by rounding."""
    pipe = wanflow.load("nano", device="cpu")
    one, after = attempt(1, job()), attempt(1, job())
    with at_work(tmp_path, pipe) as boss:
        pipe.parts.adapted |= {"vae_tile": 64}
        boss.make(one)
        boss.make(after)
        assert boss.end_of(after)["say"] == "done"
    assert len(opened) >= 2


def test_a_full_disk_ends_no_gang(
    tmp_path: Path, nano: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wanflow import files

    one, after = attempt(1, job()), attempt(1, job())
    with at_work(tmp_path, nano) as boss:
        with monkeypatch.context() as patch:
            full = OSError(errno.ENOSPC, "No space left on device")
            patch.setattr(files.os, "fsync", lambda handle: raises(full))
            boss.make(one)
            end = boss.end_of(one)
        assert end["say"] == "stopped" and "the disk is full" in end["why"]
        boss.make(after)
        assert boss.end_of(after)["say"] == "done"
    assert sorted(path.name for path in (tmp_path / "videos").glob(f"{one.id}*")) == []


def test_a_state_that_cannot_be_saved_only_warns(
    tmp_path: Path, nano: Pipeline, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def full(self: Run, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(keeping, "SAVE_SECONDS", -1.0)
    monkeypatch.setattr(Run, "save", full)
    one = attempt(1, job())
    with at_work(tmp_path, nano) as boss:
        boss.make(one)
        assert boss.end_of(one)["say"] == "done"
    assert caplog.text.count("not saved for now") == 1


def test_any_other_error_ends_the_gang(
    tmp_path: Path, nano: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: Any) -> None:
        raise RequestError("the weights are damaged")

    monkeypatch.setattr(Pipeline, "resume", broken)
    one = attempt(1, job())
    with at_work(tmp_path, nano) as boss:
        boss.make(one)
        end = boss.end_of(one)
    assert end["say"] == "crashed" and "the weights are damaged" in end["why"]
    assert isinstance(ended[0], RequestError)


def test_room_is_asked_for_before_encoding(
    tmp_path: Path, nano: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "free_bytes", lambda path: 10)
    one = attempt(1, job())
    with at_work(tmp_path, nano) as boss:
        boss.make(one)
        end = boss.end_of(one)
    assert "the video needs" in end["why"]


@pytest.mark.parametrize("ranks", [False, True])
def test_a_folder_that_cannot_be_written_is_no_fault_of_the_job(
    ranks: bool, tmp_path: Path, nano: Pipeline
) -> None:
    """A broken mount on one machine would fail every job of a fleet; ranks still end together."""
    (tmp_path / "videos").write_text("no folder")
    one, after = attempt(1, job()), attempt(1, job())
    decoded: list[int] = []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(nano, name)

        def frames(self, *args: Any) -> Iterator[Any]:
            yield from nano.frames(*args)
            decoded.append(1)

    class Orders:
        def give(self, text: str) -> None:
            pass

    watched: Any = Watched()
    with at_work(tmp_path, watched, orders=Orders() if ranks else None) as boss:
        boss.make(one)
        end = boss.end_of(one)
        assert end["say"] == "stopped" and "cannot write" in end["why"]
        assert decoded == [1] * ranks  # alone it has not even begun
        (tmp_path / "videos").unlink()
        boss.make(after)
        assert boss.end_of(after)["say"] == "done"
    assert not ended


def test_a_picture_of_a_client_begins_the_video(tmp_path: Path) -> None:
    from wanflow.pictures import digest

    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:, :, 0] = 200
    name = digest(pixels)
    file = DataFolder(tmp_path).picture(name)
    file.parent.mkdir()
    Image.fromarray(pixels).save(file)
    one = attempt(1, job(image=name, sample_steps=2))
    with at_work(tmp_path, wanflow.load("nano-i2v", device="cpu")) as boss:
        boss.make(one)
        end = boss.end_of(one)
    recipe = read_recipe(tmp_path / "videos" / end["result"]["file"])
    assert recipe["request"]["image"]["sha256"] == name
    assert recipe["request"]["image"]["file"] == ""  # no path of the server


@pytest.mark.parametrize(
    ("message", "say", "words"),
    [
        ("rank 1 of 2: out of memory in decoding: no more", "failed", "out of memory"),
        ("rank 1 of 2: no heartbeat", "crashed", "no heartbeat"),
    ],
)
def test_the_first_rank_says_why_all_end(
    message: str, say: str, words: str, tmp_path: Path, nano: Pipeline
) -> None:
    here, there = Pipe()
    boss = Boss(Line(here))
    instructions = gang.Instructions(Line(there), lambda: None)
    maker = gang.Maker(lambda report: nano, DataFolder(tmp_path), worker=instructions)
    maker.on_end(1, message)  # no job: nothing to say
    one = maker._job = attempt(1, job())
    maker.on_end(1, message)
    end = boss.end_of(one)
    assert end["say"] == say and words in str(end) and len(boss.heard) == 1
    assert say == "crashed" or end["code"] == "out_of_memory"
    with socket.socket(fileno=os.dup(here.fileno())) as both:
        both.shutdown(socket.SHUT_RDWR)


def test_orders_reach_every_rank_in_their_sequence() -> None:
    from torch.distributed import HashStore

    from wanflow.parallel.orders import Orders

    store = HashStore()
    first, others = Orders(store), [Orders(store), Orders(store)]
    for text in ("one", "two", ""):
        first.give(text)
        assert [other.take() for other in others] == [text, text]
