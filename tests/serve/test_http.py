"""The HTTP interface: routes, the video object, fields, limits, and who may ask; no model runs."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from helpers.serving import VIDEO, FakeWorker, Serving, wait_for
from PIL import Image
from starlette.testclient import TestClient

from wanflow.out_of_memory import words as out_of_memory
from wanflow.presets import I2V_A14B, NANO_I2V, T2V_A14B, TI2V_5B
from wanflow.serve.document import document
from wanflow.serve.errors import Code
from wanflow.serve.fields import FIELDS, NOTHING, for_clients
from wanflow.serve.jobs import StoreError, Worker
from wanflow.serve.planner import Planner
from wanflow.serve.retention import Retention

PROMPT = "a red circle moves left on a blue background"
SUBMIT = {"prompt": PROMPT}


@pytest.fixture
def serving(tmp_path: Path) -> Serving:
    return Serving(tmp_path)


@pytest.fixture
def client(serving: Serving) -> Iterator[TestClient]:
    with serving.client() as client:
        client.event_hooks["response"].append(check_refusal)
        yield client


def check_refusal(answer: Any) -> None:
    """Check what every refusal has: a code that the page knows, and no flag in its words."""
    if answer.status_code >= 400 and answer.request.method != "HEAD":
        answer.read()
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] in get_args(Code) and "--" not in error["message"], error


def make(client: TestClient, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/videos", json=SUBMIT | fields)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def refused(client: TestClient, body: object, status: int = 400) -> dict[str, Any]:
    content = body if isinstance(body, bytes) else json.dumps(body)
    headers = {"content-type": "application/json"}
    answer = client.post("/v1/videos", content=content, headers=headers)
    assert answer.status_code == status, answer.text
    check_refusal(answer)
    error = dict(answer.json()["error"])
    assert "\n" not in error["message"] and "Traceback" not in error["message"]
    return error


def ended(client: TestClient, id: str) -> dict[str, Any]:
    def look() -> Any:
        video = client.get(f"/v1/videos/{id}").json()
        return video["status"] in ("completed", "failed", "cancelled") and video

    return dict(wait_for(look))


def png(width: int = 48, height: int = 32, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, kind)
    return file.getvalue()


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for part in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in part.splitlines() if line[:1] not in (":", ""))
        if "event" in lines:
            found.append((lines["event"], json.loads(lines["data"])))
    return found


# The life of a job


def test_a_job_from_submission_to_deletion(serving: Serving, client: TestClient) -> None:
    assert client.get("/readyz").status_code == 503
    video = make(client, seed=7, user="me")
    assert video["object"] == "video" and video["status"] == "queued" and video["model"] == "nano"
    assert video["queue_position"] == 1 and video["progress"] == 0 and video["user"] == "me"
    assert video["remixed_from_video_id"] is None and video["error"] is None
    id = video["id"]
    early = client.get(f"/v1/videos/{id}/content")
    assert early.status_code == 409 and "queued" in early.json()["error"]["message"]
    with FakeWorker(serving):
        assert client.get("/readyz").status_code == 200
        done = ended(client, id)
    assert done["status"] == "completed" and done["progress"] == 100 and done["seed"] == 7
    assert done["size"] == "64x64" and done["seconds"] == "2.125" and done["num_frames"] == 17
    assert done["media_type"] == "video/mp4" and done["file_name"].endswith(".mp4")
    assert done["stage_durations"] == {"denoising": 1.0, "decoding": 0.5}
    assert done["inference_time_s"] == 1.5 and done["peak_memory_mb"] == 2.0
    assert done["expires_at"] == done["completed_at"] + 7 * 86_400
    assert done["queue_position"] is None and done["eta_seconds"] is None
    whole = client.get(f"/v1/videos/{id}/content")
    assert whole.content == VIDEO and whole.headers["content-type"] == "video/mp4"
    assert client.head(f"/v1/videos/{id}/content").headers["content-length"] == str(len(VIDEO))
    part = client.get(f"/v1/videos/{id}/content", headers={"Range": "bytes=10-19"})
    assert part.status_code == 206 and part.content == VIDEO[10:20]
    assert part.headers["content-range"] == f"bytes 10-19/{len(VIDEO)}"
    beyond = client.get(f"/v1/videos/{id}/content", headers={"Range": "bytes=999999-"})
    assert beyond.status_code == 416 and beyond.json()["error"]["code"] == "invalid_range"
    assert beyond.headers["content-range"] == f"bytes */{len(VIDEO)}"
    odd = client.get(f"/v1/videos/{id}/content", headers={"Range": "bytes=x-y"})
    assert odd.status_code == 400 and odd.json()["error"]["param"] == "range"
    picture = client.get(f"/v1/videos/{id}/content", params={"variant": "thumbnail"})
    assert picture.content == b"thumbnail" and picture.headers["content-type"] == "image/webp"
    absent = client.get(f"/v1/videos/{id}/content", params={"variant": "spritesheet"})
    assert absent.status_code == 404 and "spritesheet" in absent.json()["error"]["message"]
    other = client.get(f"/v1/videos/{id}/content", params={"variant": "../../jobs.sqlite"})
    assert other.status_code == 400 and other.json()["error"]["param"] == "variant"
    gone = client.delete(f"/v1/videos/{id}")
    assert gone.json() == {"id": id, "object": "video.deleted", "deleted": True}
    assert client.get(f"/v1/videos/{id}").status_code == 404
    assert not list((serving.data.path / "videos").iterdir())


def test_a_failed_job_is_answered_with_its_error(serving: Serving, client: TestClient) -> None:
    worker = FakeWorker(serving)
    worker.fail = {"code": "out_of_memory", "message": "it took more than there is"}
    with worker:
        done = ended(client, make(client)["id"])
    assert done["status"] == "failed" and done["error"] == worker.fail
    content = client.get(f"/v1/videos/{done['id']}/content")
    assert content.status_code == 404 and "more than there is" in content.json()["error"]["message"]


def test_cancel_and_delete(serving: Serving, client: TestClient) -> None:
    waiting = make(client)["id"]
    assert client.post(f"/v1/videos/{waiting}/cancel").json()["status"] == "cancelled"
    assert client.post(f"/v1/videos/{waiting}/cancel").json()["status"] == "cancelled"
    with FakeWorker(serving) as worker:
        worker.go.clear()
        one, two = make(client)["id"], make(client)["id"]
        wait_for(lambda: client.get(f"/v1/videos/{one}").json()["status"] == "in_progress")
        assert client.post(f"/v1/videos/{one}/cancel").json()["cancelling"]
        assert ended(client, one)["status"] == "cancelled"
        wait_for(lambda: client.get(f"/v1/videos/{two}").json()["status"] == "in_progress")
        assert client.delete(f"/v1/videos/{two}").json()["deleted"]
        assert client.get(f"/v1/videos/{two}").status_code == 404
    for answer in (client.delete(f"/v1/videos/{two}"), client.post(f"/v1/videos/{two}/cancel")):
        assert answer.status_code == 404 and two in answer.json()["error"]["message"]


def test_lists_go_page_by_page(client: TestClient) -> None:
    ids = [make(client)["id"] for _ in range(5)]
    first = client.get("/v1/videos", params={"limit": 2, "order": "asc"}).json()
    assert first["object"] == "list" and first["has_more"]
    assert [one["id"] for one in first["data"]] == ids[:2]
    assert [one["queue_position"] for one in first["data"]] == [1, 2]
    assert (first["first_id"], first["last_id"]) == (ids[0], ids[1])
    rest = client.get("/v1/videos", params={"after": ids[1], "order": "asc"}).json()
    assert [one["id"] for one in rest["data"]] == ids[2:] and not rest["has_more"]
    newest = client.get("/v1/videos", params={"limit": 1}).json()
    assert newest["data"][0]["id"] == ids[4]
    for query in ({"limit": 0}, {"limit": 101}, {"order": "up"}, {"limit": "x"}):
        answer = client.get("/v1/videos", params=query)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == next(iter(query))
    assert client.get("/v1/videos", params={"after": "video_" + "0" * 32}).status_code == 404


def test_events_tell_each_change_and_end(serving: Serving, client: TestClient) -> None:
    with FakeWorker(serving, steps=3) as worker:
        worker.go.clear()
        id = make(client)["id"]
        wait_for(lambda: client.get(f"/v1/videos/{id}").json()["step"] == 1)
        assert client.get(f"/v1/videos/{id}/preview").content == b"preview 1"
        running = client.get(f"/v1/videos/{id}").json()
        assert running["stage"] == "denoising" and running["expert"] == "high"
        assert running["eta_seconds"] == 3 and running["steps"] == 3
        from threading import Timer

        Timer(0.5, worker.go.set).start()
        text = client.get(f"/v1/videos/{id}/events").text
    told = events(text)
    kinds = [kind for kind, _ in told]
    assert kinds[0] == "preview" and kinds[-1] == "state"
    assert (
        told[0][1]["image"] == "data:image/webp;base64," + base64.b64encode(b"preview 1").decode()
    )
    assert [video["status"] for kind, video in told if kind == "state"] == [
        "in_progress",
        "completed",
    ]
    again = client.get(f"/v1/videos/{id}/events").text
    assert [kind for kind, _ in events(again)] == ["state"]
    last = again.splitlines()[0].removeprefix("id: ")
    resumed = client.get(f"/v1/videos/{id}/events", headers={"Last-Event-ID": last})
    assert events(resumed.text) == []
    assert client.get(f"/v1/videos/video_{'0' * 32}/events").status_code == 404


def test_sync_returns_the_video(serving: Serving, client: TestClient) -> None:
    with FakeWorker(serving) as worker:
        answer = client.post("/v1/videos/sync", json=SUBMIT)
        assert answer.content == VIDEO and answer.headers["content-type"] == "video/mp4"
        assert client.get(f"/v1/videos/{answer.headers['x-video-id']}").status_code == 200
        worker.fail = {"code": "out_of_memory", "message": "too large"}
        failed = client.post("/v1/videos/sync", json=SUBMIT)
        assert failed.status_code == 500 and failed.json()["error"]["code"] == "out_of_memory"


# Fields


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"seconds": "4"}, {"frame_num": 33}),  # of 8 a second: 32, and 4n+1
        ({"seconds": 1.5, "fps": 16}, {"frame_num": 25, "fps": 16}),
        ({"size": "96x64"}, {"size": "96x64"}),
        ({"width": 96, "height": 64}, {"size": "96*64"}),
        ({"num_frames": 9, "num_inference_steps": 3}, {"frame_num": 9, "sample_steps": 3}),
        ({"frame_num": 9, "sample_steps": 3}, {"frame_num": 9, "sample_steps": 3}),
        ({"guidance_scale": 5, "guidance_scale_2": 2}, {"cfg_high": 5, "cfg_low": 2}),
        ({"guidance_scale": 5}, {"cfg_high": 5, "cfg_low": 5}),
        ({"guidance_scale_2": 2}, {"cfg_low": 2}),
        ({"guidance_scale": 5, "cfg_high": 6, "cfg_low": 1}, {"cfg_high": 6, "cfg_low": 1}),
        ({"flow_shift": 8, "boundary_ratio": 0.9}, {"sample_shift": 8, "boundary": 0.9}),
        ({"extra_body": {"seed": 3}, "nvext": {"fps": 10}}, {"seed": 3, "fps": 10}),
        ({"extra_params": {"video_params": {"seed": 3}}}, {"seed": 3}),
        (
            {"preset": "lightning4"},
            {"sample_steps": 4, "sample_solver": "euler", "cfg_high": 1.0, "cfg_low": 1.0},
        ),
        ({"negative_prompt": "", "n": 1, "model": "nano", "quality": "standard"}, {}),
        ({"generate_sound": False, "true_cfg_scale": None, "aspect_ratio": None}, {}),
    ],
)
def test_fields_become_a_request(
    serving: Serving, client: TestClient, fields: dict[str, Any], expected: dict[str, Any]
) -> None:
    job = serving.store.get(make(client, **fields)["id"])
    assert job is not None and expected.items() <= job.request.items()
    drawn = job.request["seed"]
    assert 0 <= drawn < 2**32  # the seed is drawn when the job is accepted
    form = {name: (None, text_of(value)) for name, value in (SUBMIT | fields).items()}
    answer = client.post("/v1/videos", files=form)
    if "aspect_ratio" not in fields:  # a form has no null
        assert answer.status_code == 200, answer.text
        other = serving.store.get(answer.json()["id"])
        assert other is not None and expected.items() <= other.request.items()


def text_of(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def test_forms_take_brackets(serving: Serving, client: TestClient) -> None:
    form = {"prompt": (None, PROMPT), "extra_body[seed]": (None, "5")}
    job = serving.store.get(client.post("/v1/videos", files=form).json()["id"])
    assert job is not None and job.request["seed"] == 5
    encoded = client.post("/v1/videos", data={"prompt": PROMPT, "seed": "6"})
    assert encoded.json()["seed"] == 6


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": None}, "prompt is missing"),
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": 5}, "prompt must be text"),
        ({"prompt": "x" * 5001}, "5,001 characters; at most 5,000"),
        ({"prompt": "a\0b"}, "null character"),
        ({"colour": "red", "n": 1}, "unknown fields: colour; known are prompt"),
        ({"extra_body": {"colour": 1}}, "unknown fields: colour"),
        ({"extra_body": [1]}, "extra_body must be an object"),
        ({"seed": 1, "extra_body": {"seed": 2}}, "seed is given twice"),
        ({"n": 2}, "n 2: a job makes one video"),
        ({"num_outputs_per_prompt": 4}, "num_outputs_per_prompt 4"),
        ({"generate_sound": True}, "generate_sound True: wanflow does not do this"),
        ({"output_path": "/etc/x"}, "output_path '/etc/x': wanflow does not do this"),
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number from 1"),
        ({"num_inference_steps": 101}, "at most 100 are accepted"),
        ({"num_frames": 16}, "num_frames 16 is not 4n+1; the nearest is 17"),
        ({"frame_num": 16}, "frame_num 16 is not 4n+1; the nearest is 17"),
        ({"flow_shift": -1}, "flow_shift must be"),
        ({"num_inference_steps": 2, "cfg_start": 3, "cfg_start_steps": 3}, "cfg_start_steps must"),
        ({"num_frames": 261}, "num_frames 261 is too much; at most 257"),
        ({"num_frames": 9, "frame_num": 13}, "mean the same and differ"),
        ({"seconds": "4", "num_frames": 9}, "seconds 4 differ"),
        ({"seconds": "soon"}, "seconds must be a number"),
        ({"seconds": "0"}, "seconds must be above 0"),
        ({"size": "1920x1088"}, "at most the area of 1280*720"),
        ({"size": "65x64"}, "size '65x64': width 65 is not a positive multiple of 16"),
        ({"width": 64, "height": 65}, "height 65 is not a positive multiple of 16"),
        ({"size": "large"}, "is not WIDTH*HEIGHT"),
        ({"width": 64}, "width and height go together"),
        ({"size": "64x64", "width": 96, "height": 64}, "differ; give one of them"),
        ({"guidance_scale": True}, "guidance_scale must be a number from 0 to 100"),
        ({"seed": 2**80}, "seed must be a whole number"),
        ({"preset": "fast"}, "preset must be one of lightning4"),
        ({"lora": "mine"}, "lora 'mine' is not on this server"),
        ({"user": "u" * 513}, "user must have at most 512"),
        ({"input_reference": data_url(b"x")}, "nano takes no picture"),
    ],
)
def test_refusals_name_the_field(client: TestClient, fields: dict[str, Any], words: str) -> None:
    error = refused(client, SUBMIT | fields)
    assert words in error["message"]
    about_all = {"colour", "extra_body", "size", "num_frames", "seconds", "guidance_scale"}
    assert error["param"] in {*SUBMIT, *fields, "colour"} or (
        not error["param"] and about_all & set(fields)
    )


def test_another_model_is_refused(client: TestClient) -> None:
    error = refused(client, SUBMIT | {"model": "sora-2"}, 404)
    assert error["code"] == "model_not_found" and "nano" in error["message"]


@pytest.mark.parametrize("name", sorted(NOTHING))
def test_fields_that_ask_for_nothing(client: TestClient, name: str) -> None:
    for value in (None, *NOTHING[name]):
        make(client, **{name: value})
    assert name in refused(client, SUBMIT | {name: "something"})["message"]


def test_defaults_of_other_servers_ask_for_nothing(client: TestClient) -> None:
    given = {"true_cfg_scale": 1.0, "frame_interpolation_scale": 1.0, "frame_interpolation_exp": 1}
    make(client, **given, rollout=False, annotations=[])
    assert "true_cfg_scale" in refused(client, SUBMIT | {"true_cfg_scale": True})["message"]
    assert "rollout" in refused(client, SUBMIT | {"rollout": 0})["message"]
    texts = {name: str(value) for name, value in given.items()} | {"generate_sound": "false"}
    answer = client.post("/v1/videos", data=SUBMIT | texts)
    assert answer.status_code == 200, answer.text
    answer = client.post("/v1/videos", data=SUBMIT | {"true_cfg_scale": "4.0"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "true_cfg_scale"


def test_the_models_of_the_family_mean_their_own_seconds(tmp_path: Path) -> None:
    for spec, frames in ((T2V_A14B, 65), (TI2V_5B, 97)):
        serving = Serving(tmp_path / spec.name, spec)
        with serving.client() as client:
            video = make(client, seconds="4")
            assert video["num_frames"] == frames and video["fps"] == spec.fps
            assert video["size"] == "x".join(map(str, spec.size))


# Bodies


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not JSON"),
        (b"[1]", "must be a JSON object"),
        (b'{"prompt": NaN}', "not JSON"),
        (b'{"prompt": "a", "prompt": "b"}', "a key is given twice"),
        (b'{"prompt": "a", "seed": 1e999}', "too large a number"),
        (b'{"prompt": "\\ud800"}', "half a letter"),
        (b'{"prompt": "a", "lora": ' + b"[" * 100 + b"]" * 100 + b"}", "more than 64 levels"),
        (b'{"prompt": "a", "lora": ' + b"[" * 100_000, "JSON"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"\xff\xfe{", "not JSON"),
    ],
)
def test_broken_json(client: TestClient, body: bytes, words: str) -> None:
    assert words in refused(client, body)["message"]


def test_broken_forms(client: TestClient) -> None:
    kind = {"content-type": "multipart/form-data; boundary=x"}
    for body in (
        b"",
        b"--x",
        b"--x\r\n\r\n\r\n--x--",
        b"--x\r\nContent-Disposition: form-data\r\n",
    ):
        answer = client.post("/v1/videos", content=body, headers=kind)
        assert answer.status_code == 400, body
    nothing = {"content-type": "multipart/form-data"}
    assert client.post("/v1/videos", content=b"--x", headers=nothing).status_code == 400
    twice = [("prompt", (None, "a")), ("prompt", (None, "b"))]
    answer = client.post("/v1/videos", files=twice)
    assert answer.status_code == 400 and "prompt is given twice" in answer.text
    other = client.post("/v1/videos", content=b"a", headers={"content-type": "text/plain"})
    assert other.status_code == 415


def test_a_body_is_bounded_while_it_comes(tmp_path: Path) -> None:
    serving = Serving(tmp_path, max_body_mb=0.1)
    with serving.client() as client:
        refused(client, b'{"prompt": "' + b"x" * 200_000 + b'"}', 413)
        taken = 0

        def chunks() -> Iterator[bytes]:
            nonlocal taken
            for _ in range(1000):
                taken += 1
                yield b"x" * 10_000

        answer = client.post(
            "/v1/videos", content=chunks(), headers={"content-type": "application/json"}
        )
        assert answer.status_code == 413


# Pictures


@pytest.fixture
def pictured(tmp_path: Path) -> Iterator[tuple[Serving, TestClient]]:
    serving = Serving(tmp_path, NANO_I2V, max_picture_mp=1)
    with serving.client() as client:
        yield serving, client


def test_pictures_come_as_files_and_data_urls(pictured: tuple[Serving, TestClient]) -> None:
    serving, client = pictured
    url = data_url(png())
    ways: list[dict[str, Any]] = [
        {"json": SUBMIT | {"input_reference": {"image_url": url}}},
        {"json": SUBMIT | {"input_reference": {"image_url": {"url": url}}}},
        {"json": SUBMIT | {"image": url}},
        {"files": {"prompt": (None, PROMPT), "input_reference": ("a.png", png(), "image/png")}},
        {"files": {"prompt": (None, PROMPT), "input_reference[image_url]": (None, url)}},
    ]
    names = set()
    for way in ways:
        answer = client.post("/v1/videos", **way)
        assert answer.status_code == 200, answer.text
        job = serving.store.get(answer.json()["id"])
        assert job is not None and serving.data.picture(job.request["image"]).is_file()
        names.add(job.request["image"])
        # The picture's shape, in the area of the model's size.
        assert answer.json()["width"] > answer.json()["height"]
    assert len(names) == 1 and len(list((serving.data.path / "pictures").iterdir())) == 1
    both = client.post("/v1/videos", json=SUBMIT | {"image": url, "last_image": data_url(png(32))})
    job = serving.store.get(both.json()["id"])
    assert job is not None and job.request["image"] != job.request["last_image"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"image_url": "http://127.0.0.1:9/x.png"}, "fetches no address"),
        ({"image_url": "file:///etc/passwd"}, "fetches no address"),
        ("/etc/passwd", "fetches no address"),
        ({"file_id": "file-1"}, "file_id must be the sha256 of a picture"),
        ({"image_url": "data:image/png;base64,@@"}, "base64 is damaged"),
        ({"image_url": "data:image/png;base64,"}, "the file is empty"),
        ({"image_url": "data:text/html;base64,AAAA"}, "fetches no address"),
        (data_url(b"no picture"), "not a picture"),
        (data_url(png()[:60]), "damaged"),
        (data_url(png(2000, 1000)), "at most 1 megapixels"),
        (5, "must be a file of the form"),
        ([], "must be a file of the form"),
    ],
)
def test_refused_pictures(pictured: tuple[Serving, TestClient], value: object, words: str) -> None:
    serving, client = pictured
    error = refused(client, SUBMIT | {"input_reference": value})
    assert words in error["message"] and error["param"] == "input_reference"
    assert not (serving.data.path / "pictures").exists()


def test_a_model_of_pictures_needs_one(pictured: tuple[Serving, TestClient]) -> None:
    missing = refused(pictured[1], SUBMIT)
    assert missing["param"] == "input_reference"
    assert "makes a video of a picture" in missing["message"]


# LoRAs


def test_loras_go_by_name(tmp_path: Path) -> None:
    serving = Serving(tmp_path, loras={"motion": tmp_path / "motion.safetensors"})
    with serving.client() as client:
        for given, kept in (
            ("motion", "motion@1.0"),
            ("motion@0.5", "motion@0.5"),
            ({"name": "motion", "scale": 0.5}, "motion@0.5"),
            ([{"name": "motion", "high": 1, "low": 0.5}], "motion@high=1.0,low=0.5"),
        ):
            job = serving.store.get(make(client, lora=given)["id"])
            assert job is not None and job.request["lora"] == [kept]
        form = {"prompt": (None, PROMPT), "lora": (None, '{"name": "motion", "scale": 0.5}')}
        assert client.post("/v1/videos", files=form).status_code == 200
        for wrong in (
            {"name": "motion", "path": "/etc/passwd"},
            {"name": "../motion"},
            {"name": "motion", "scale": "x"},
            {"name": "motion", "scale": 1e9},
            "/etc/passwd",
            [5],
        ):
            assert "lora" in refused(client, SUBMIT | {"lora": wrong})["message"]
        assert client.get("/v1/settings").json()["loras"] == ["motion"]


# Limits


def test_a_full_queue(tmp_path: Path) -> None:
    serving = Serving(tmp_path, max_queue=2)
    with serving.client() as client:
        make(client), make(client)
        answer = client.post("/v1/videos", json=SUBMIT)
        assert answer.status_code == 429 and answer.json()["error"]["code"] == "queue_full"
        assert int(answer.headers["retry-after"]) >= 1


def test_a_full_queue_says_when_the_job_at_work_ends(tmp_path: Path) -> None:
    serving = Serving(tmp_path, max_queue=1)
    with serving.client() as client:
        worker = FakeWorker(serving)
        worker.go.clear()
        with worker:
            id = make(client)["id"]
            wait_for(lambda: (job := serving.store.get(id)) and job.progress.eta_s)
            make(client)
            answer = client.post("/v1/videos", json=SUBMIT)
            assert answer.status_code == 429 and answer.headers["retry-after"] == "3"


def test_a_full_disk(tmp_path: Path) -> None:
    with Serving(tmp_path, min_free_gb=1e6).client() as client:
        answer = client.post("/v1/videos", json=SUBMIT)
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "disk_full"
        assert answer.headers["retry-after"]


def test_a_store_that_is_away(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object) -> None:
        raise StoreError("postgresql://user:secret@host")

    with serving.client() as client:
        monkeypatch.setattr(serving.store, "get", away)
        answer = client.get("/v1/videos/video_" + "0" * 32)
        assert answer.status_code == 503 and answer.headers["retry-after"] == "5"
        assert "secret" not in answer.text
        assert client.get("/healthz").status_code == 200


def test_a_job_that_is_kept_is_answered_for(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise StoreError("away")

    with serving.client() as client:
        monkeypatch.setattr(serving.store, "get", away)  # just after the job was kept
        made = make(client)
        assert made["status"] == "queued" and made["prompt"] == PROMPT
        monkeypatch.undo()
        assert [one["id"] for one in client.get("/v1/videos").json()["data"]] == [made["id"]]


def test_idempotency(serving: Serving, client: TestClient) -> None:
    key = {"Idempotency-Key": "abc"}
    one = client.post("/v1/videos", json=SUBMIT, headers=key).json()
    same = client.post("/v1/videos", json=SUBMIT, headers=key).json()
    assert same["id"] == one["id"] and same["seed"] == one["seed"]
    form = client.post("/v1/videos", files={"prompt": (None, PROMPT)}, headers=key)
    assert form.json()["id"] == one["id"]
    other = client.post("/v1/videos", json=SUBMIT | {"seed": 1}, headers=key)
    assert other.status_code == 409 and "another request" in other.json()["error"]["message"]
    assert sum(serving.store.counts().values()) == 1
    for wrong in ("", "a b", "k" * 256):
        answer = client.post("/v1/videos", json=SUBMIT, headers={"Idempotency-Key": wrong})
        assert answer.status_code == 400


GIB = 2**30
SMALL = {"gpu": 12 * GIB, "gpu_name": "small", "ram": 32 * GIB, "disk_free": 200 * GIB}


def test_what_a_worker_was_loaded_for_needs_no_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving = Serving(tmp_path, T2V_A14B)
    asked: list[dict[str, Any]] = []
    refusal = "size 1280*720 with frame_num 121 needs 31.5 GiB"

    def why_not(request: Any, model: str, worker: Any) -> str:
        asked.append(request)
        return refusal if worker["machine"]["gpu"] < 40 * GIB else ""

    monkeypatch.setattr(serving.planner, "why_not", why_not)
    with serving.client() as client:
        make(client, num_frames=121)  # no worker yet: nobody knows who comes
        serving.store.enrol(Worker("a", T2V_A14B.name, True, SMALL))
        make(client)
        assert not asked
        for prompt in ("one", "two"):
            error = refused(client, {"prompt": prompt, "num_frames": 121})
            assert error["message"] == "size 1280*720 with num_frames 121 needs 31.5 GiB"
            assert error["code"] == "does_not_fit" and error["param"] == "size"
        assert len(asked) == 1 and asked[0]["frame_num"] == 121  # and is remembered
        serving.store.enrol(Worker("b", T2V_A14B.name, True, {**SMALL, "gpu": 80 * GIB}))
        make(client, num_frames=121)
        limits = {"size": "832*480", "frame_num": 41}
        for id in ("a", "b"):
            serving.store.enrol(Worker(id, T2V_A14B.name, True, SMALL, limits=limits))
        make(client, size="832x480", num_frames=41)
        assert "limit of the worker" in refused(client, SUBMIT)["message"]


@pytest.mark.slow
def test_the_planner_says_what_does_not_fit() -> None:
    planner = Planner(None, {})
    request = {"prompt": "any", "seed": 0, "size": [480, 272], "frame_num": 5}
    small = {"machine": {**SMALL, "gpu": 2 * GIB}, "settings": {"resident_blocks": 40}}
    try:
        words = planner.why_not(request, T2V_A14B.name, small)
        assert re.search(r"needs [\d.]+ GiB of GPU memory", words), words
        large = {"machine": {**SMALL, "gpu": 80 * GIB, "ram": 128 * GIB}, "settings": {}}
        assert planner.why_not(request, T2V_A14B.name, large) == ""
    finally:
        planner.close()


@pytest.mark.slow
def test_what_is_refused_for_memory_names_what_fits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="wanflow")
    serving = Serving(tmp_path, max_size="8192*8192")
    about = {"gpu": 0, "ram": 8 * GIB, "disk_free": 200 * GIB}
    serving.store.enrol(Worker("a", "nano", True, about))
    try:
        with serving.client() as client:
            error = refused(client, SUBMIT | {"size": "8192x8192", "num_frames": 81})
            assert error["code"] == "does_not_fit" and error["param"] == "size"
            words = r"size (\S+) with num_frames 81 needs [\d.]+ GiB of RAM .* can be used"
            assert re.search(words, error["message"]), error
            assert "the operator of the server can change its settings" in error["message"]
            assert "force starts it anyway" in caplog.text  # the operator's words
            found = re.search(r"size (\S+) with num_frames (\d+) fits", error["message"])
            assert found, error
            make(client, size=found[1], num_frames=int(found[2]))
    finally:
        serving.planner.close()


# Who may ask


def test_a_token(tmp_path: Path) -> None:
    with Serving(tmp_path, token="s3cret").client() as client:
        for path in ("/v1/videos", "/v1/models", "/v1/settings", "/metrics", "/v1/events"):
            answer = client.get(path)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["code"] == "invalid_token"
        for header in ("Bearer s3cre", "Bearer s3cret2", "Basic s3cret", "s3cret", "Bearer \xe9"):
            wrong = {"Authorization": header.encode("latin-1")}
            assert client.get("/v1/videos", headers=wrong).status_code == 401
        right = {"Authorization": "Bearer s3cret"}
        assert client.get("/v1/videos", headers=right).status_code == 200
        assert client.get("/healthz").status_code == 200
        assert client.get("/readyz").status_code == 503
        named = {"Host": "videos.example.com"}
        assert client.get("/v1/videos", headers=right | named).status_code == 200


def test_without_a_token_only_loopback_names_are_answered(client: TestClient) -> None:
    for host in ("127.0.0.1:8000", "localhost", "[::1]:8000"):
        assert client.get("/healthz", headers={"Host": host}).status_code == 200
    for host in ("evil.example", "127.0.0.1.evil.example", "", "[::1", "127.0.0.2"):
        answer = client.get("/v1/videos", headers={"Host": host})
        assert answer.status_code == 403, host


def test_a_page_of_another_site_changes_nothing(serving: Serving, client: TestClient) -> None:
    for headers in (
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec-Fetch-Site": "cross-site"},
    ):
        answer = client.post("/v1/videos", json=SUBMIT, headers=headers)
        assert answer.status_code == 403, headers
    assert not sum(serving.store.counts().values())
    own = {"Origin": "http://127.0.0.1", "Sec-Fetch-Site": "same-origin"}
    assert client.post("/v1/videos", json=SUBMIT, headers=own).status_code == 200


def test_unknown_paths_and_methods(client: TestClient) -> None:
    assert client.get("/v2").json()["error"]["type"] == "not_found_error"
    assert client.put("/v1/videos").status_code == 405
    for id in ("x", "video_1", "..%2f..%2fjobs.sqlite", "video_%00", "é", "video_" + "0" * 32):
        for path in ("", "/content", "/preview", "/recipe", "/events"):
            answer = client.get(f"/v1/videos/{id}{path}")
            assert answer.status_code == 404, (id, path)
    for name in (
        "../http.py",
        "..%2fhttp.py",
        "%2e%2e/http.py",
        "/etc/passwd",
        "",
        "a%00b",
        "x.py",
    ):
        assert client.get(f"/page/{name}").status_code == 404, name


def test_answers_carry_their_headers(client: TestClient) -> None:
    answer = client.get("/healthz")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["content-security-policy"].startswith("default-src 'self'")


# What a server says of itself


def test_models_settings_and_metrics(serving: Serving, client: TestClient) -> None:
    models = client.get("/v1/models").json()["data"]
    assert [one["id"] for one in models] == ["nano"]
    assert client.get("/v1/models/nano").json()["id"] == "nano"
    assert client.get("/v1/models/other").status_code == 404
    settings = client.get("/v1/settings").json()
    assert settings["sizes"][0] == settings["defaults"]["size"] == "64x64"
    with FakeWorker(serving):
        ended(client, make(client)["id"])
        text = wait_for(
            lambda: (
                (found := client.get("/metrics").text)
                and 'wanflow_jobs_ended_total{state="completed"} 1.0' in found
                and found
            )
        )
    assert 'wanflow_jobs{state="completed"} 1.0' in text
    assert 'wanflow_workers{ready="true"} 1.0' in text
    assert 'wanflow_stage_seconds_count{stage="denoising"} 1.0' in text
    assert "wanflow_step_seconds_count 1.0" in text
    assert 'wanflow_peak_memory_bytes{kind="ram"} 2e+06' in text
    assert PROMPT not in text


def test_a_job_that_is_deleted_at_once_counts(serving: Serving, client: TestClient) -> None:
    id = make(client)["id"]
    assert client.delete(f"/v1/videos/{id}").status_code == 200
    assert 'wanflow_jobs_ended_total{state="cancelled"} 1.0' in client.get("/metrics").text
    with FakeWorker(serving):
        ended(client, make(client)["id"])  # the next look counts it no second time
        counted = 'wanflow_jobs_ended_total{state="completed"} 1.0'
        text = wait_for(lambda: counted in (found := client.get("/metrics").text) and found)
    assert 'wanflow_jobs_ended_total{state="cancelled"} 1.0' in text


def test_a_data_folder_that_is_gone_is_no_fault(serving: Serving, client: TestClient) -> None:
    id = make(client)["id"]
    shutil.rmtree(serving.data.path)
    for answer in (client.post("/v1/videos", json=SUBMIT), client.get(f"/v1/videos/{id}")):
        assert answer.status_code == 503 and answer.headers["retry-after"]
        assert answer.json()["error"]["code"] == "store_unavailable"
    assert client.get("/healthz").status_code == 200


def test_the_model_of_an_unknown_server_is_that_of_its_workers(tmp_path: Path) -> None:
    serving = Serving(tmp_path, None)
    with serving.client() as client:
        assert client.get("/v1/models").status_code == 503
        assert client.post("/v1/videos", json=SUBMIT).status_code == 503
        serving.store.enrol(FakeWorker(serving).me)
        assert client.get("/v1/models").json()["data"][0]["id"] == "nano"
        assert make(client)["model"] == "nano"


def test_the_document_is_frozen(client: TestClient) -> None:
    served = client.get("/openapi.json").json()
    assert served == document(), "run `make openapi`, and look at what changed"
    known = served["paths"]["/v1/videos"]["post"]["requestBody"]["content"]["application/json"]
    assert set(FIELDS) <= set(known["schema"]["properties"])


# Retention


def test_old_jobs_and_too_many_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serving = Serving(tmp_path, keep_gb=0.001)
    monkeypatch.setattr("helpers.serving.VIDEO", bytes(400_000))
    look = Retention(serving.service, 60).look
    with serving.client() as client:
        with FakeWorker(serving):
            ids = [ended(client, make(client)["id"])["id"] for _ in range(3)]
        waiting = make(client)["id"]
        assert look() == ids[:1]  # the oldest, until the rest has room
        assert not list(serving.data.path.glob(f"videos/{ids[0]}*"))
        assert look() == []
        assert look(time.time() + 8 * 86_400) == ids[1:]
        assert client.get(f"/v1/videos/{waiting}").status_code == 200
        assert not list(serving.data.path.glob("videos/*"))


def test_pictures_that_no_job_has_go(tmp_path: Path) -> None:
    serving = Serving(tmp_path, I2V_A14B)
    look = Retention(serving.service, 60).look
    with serving.client() as client:
        id = make(client, image=data_url(png()))["id"]
        files = serving.data.path / "pictures"
        look(time.time() + 10_000)
        assert len(list(files.iterdir())) == 1
        client.delete(f"/v1/videos/{id}")
        look()
        assert len(list(files.iterdir())) == 1  # another submission may be about to use it
        look(time.time() + 10_000)
        assert not list(files.iterdir())


# In the names that a client sent


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"size": "65x64"}, "size", "size '65x64': width 65 is not"),
        ({"width": 65, "height": 64}, "width", "width 65 is not"),
        ({"width": 1920, "height": 1088}, "width", "width 1920: size 1920x1088 is too large"),
        ({"num_frames": 16}, "num_frames", "num_frames 16 is not 4n+1"),
        ({"frame_num": 16}, "frame_num", "frame_num 16 is not 4n+1"),
        ({"extra_params": {"num_frames": 16}}, "num_frames", "num_frames 16 is not"),
        ({"frame_num": 261}, "frame_num", "frame_num 261 is too much"),
        ({"seconds": "9999"}, "seconds", "seconds '9999': frame_num must be"),
        ({"seconds": "99"}, "seconds", "seconds '99': num_frames 793 is too much"),
        ({"sample_steps": 101}, "sample_steps", "sample_steps 101 is too much"),
        (
            {"cfg_start_steps": 9, "num_inference_steps": 4},
            "cfg_start_steps",
            "cfg_start_steps must be at most num_inference_steps, 4",
        ),
        ({"input_reference": "x"}, "input_reference", "input_reference: nano takes no picture"),
        ({"image": "x"}, "image", "image: nano takes no picture"),
        ({"video_params": "x"}, "video_params", "video_params must be an object"),
        ({"foo": 1, "seed": 1}, "foo", "unknown fields: foo"),
        ({"true_cfg_scale": 4}, "true_cfg_scale", "leave it out (or null or 1)"),
        ({"generate_sound": True}, "generate_sound", "leave it out (or null or false)"),
        ({"seed": 2**64}, "seed", "seed must be a whole number below 2**63"),
    ],
)
def test_a_refusal_speaks_of_what_the_client_sent(
    client: TestClient, fields: dict[str, Any], param: str, words: str
) -> None:
    error = refused(client, SUBMIT | fields)
    assert words in error["message"] and error["param"] == param


def test_a_form_names_what_is_no_json(client: TestClient) -> None:
    answer = client.post("/v1/videos", data=SUBMIT | {"extra_params": "{bad"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["message"].startswith("extra_params: not JSON")
    assert error["param"] == "extra_params"


def test_guidance_of_one_network_is_refused_by_its_field(tmp_path: Path) -> None:
    with Serving(tmp_path, TI2V_5B).client() as client:
        error = refused(client, SUBMIT | {"guidance_scale": 4, "guidance_scale_2": 3})
        assert error["param"] == "guidance_scale"
        assert "guidance_scale 4 and guidance_scale_2 3" in error["message"]


def test_a_failed_job_speaks_of_fields(serving: Serving, client: TestClient) -> None:
    worker = FakeWorker(serving)
    worker.fail = {"code": "out_of_memory", "message": "a smaller --size, or --resident_blocks"}
    with worker:
        done = ended(client, make(client)["id"])
    assert done["error"]["message"] == (
        "a smaller size, or resident_blocks (of the server's settings: resident_blocks; its"
        " operator can change them, and its log has the flags)"
    )


def test_words_for_clients_have_no_flags() -> None:
    where = "(of the server's settings: {}; its operator can change them, and its log has the"
    for text, words in {
        "size '--large' is no size": "size '--large' is no size",  # it is what a client sent
        "the model's --size 64*64": "the model's size 64*64",
        "NaN: check the weights: wanflow inspect --check": (
            f"NaN: check the weights: wanflow inspect {where.format('check')} flags)"
        ),
        "see `wanflow plan --gpu 8gb`, or --quantize fp8": (
            f"see `wanflow plan`, or quantize fp8 {where.format('gpu, quantize')} flags)"
        ),
    }.items():
        assert for_clients(text) == words
    error = MemoryError()
    assert "--" not in for_clients(out_of_memory(error)) and "--" in out_of_memory(error)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_picture_by_a_client_that_says_null_or_breaks_lines(
    pictured: tuple[Serving, TestClient], wrapped: bool
) -> None:
    _, client = pictured
    url = data_url(png())
    url = url.replace("=", "=\n") if url.endswith("=") else f"{url[:60]}\n{url[60:]}"
    value = {"file_id": None, "image_url": url}
    video = make(client, input_reference=[value] if wrapped else value)
    assert video["status"] == "queued"


def test_a_list_of_pictures_is_refused_without_their_bytes(
    pictured: tuple[Serving, TestClient],
) -> None:
    _, client = pictured
    files = [("input_reference[]", ("a.png", png())), ("input_reference[]", ("b.png", png()))]
    answer = client.post("/v1/videos", data=SUBMIT, files=files)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].endswith("(got a list of 2)")


def test_what_load_balancers_and_old_clients_ask(client: TestClient) -> None:
    assert client.get("/health").json() == client.get("/healthz").json()
    for path in ("/", "/healthz", "/v1/videos", "/v1/models"):
        head = client.head(path)
        assert head.status_code == 200 and head.content == b""
        assert head.headers["content-length"] == client.get(path).headers["content-length"]
    assert client.head("/v1/events").status_code == 405  # a stream has no end
    id = make(client)["id"]
    remix = client.post(f"/v1/videos/{id}/remix", json={"prompt": "y"})
    assert remix.status_code == 404 and "/request again" in remix.json()["error"]["message"]
    after = client.get("/v1/videos", params={"after": "x"}).json()["error"]
    assert after["param"] == "after"
    headers = {"content-encoding": "gzip", "content-type": "application/json"}
    packed = client.post("/v1/videos", content=b"\x1f\x8b", headers=headers)
    assert packed.status_code == 415 and "gzip" in packed.json()["error"]["message"]


def test_a_video_that_a_client_has_is_not_sent_again(serving: Serving, client: TestClient) -> None:
    with FakeWorker(serving):
        id = ended(client, make(client)["id"])["id"]
    content = f"/v1/videos/{id}/content"
    tag = client.get(content).headers["etag"]
    for known in (tag, f'"x", W/{tag}', "*"):
        for range in ({}, {"Range": "bytes=0-9"}):
            same = client.get(content, headers={"If-None-Match": known, **range})
            assert same.status_code == 304 and same.content == b"" and same.headers["etag"] == tag
    assert client.head(content, headers={"If-None-Match": tag}).status_code == 304
    other = client.get(content, headers={"If-None-Match": '"x"'})
    assert other.status_code == 200 and other.content == VIDEO
    lines = client.get(content, headers={"Range": "lines=0-9"})  # a unit that nobody knows
    assert lines.status_code == 200 and lines.content == VIDEO


def test_the_page_behind_a_proxy_that_replaces_the_host(client: TestClient) -> None:
    headers = {"Origin": "https://videos.example", "Sec-Fetch-Site": "same-origin"}
    assert client.post("/v1/videos", json=SUBMIT, headers=headers).status_code == 200
    headers["Sec-Fetch-Site"] = "cross-site"
    assert client.post("/v1/videos", json=SUBMIT, headers=headers).status_code == 403


def test_a_form_in_another_encoding_is_refused(serving: Serving, client: TestClient) -> None:
    # A console in another code page sends its own bytes; a wrong prompt would cost a video.
    for text in ("\u7ea2\u5706".encode("gbk"), "caf\u00e9".encode("latin-1")):
        part = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n' + text
        forms = {
            "multipart/form-data; boundary=b": part + b"\r\n--b--\r\n",
            "application/x-www-form-urlencoded": b"prompt=" + text,
        }
        for kind, body in forms.items():
            answer = client.post("/v1/videos", content=body, headers={"content-type": kind})
            assert answer.status_code == 400, answer.text
            assert "is not UTF-8" in answer.json()["error"]["message"]
    prompt = "\u7ea2\u5706 caf\u00e9 \N{SLIGHTLY SMILING FACE}"
    data = {"user": "\u00e9", "prompt": prompt}
    parts = {name: (None, value) for name, value in data.items()}
    typed = f"prompt={prompt}".encode()  # as curl -d sends it
    for answer in (
        client.post("/v1/videos", data=data),
        client.post("/v1/videos", files=parts),
        client.post("/v1/videos", content=typed, headers={"content-type": kind}),
    ):
        assert answer.status_code == 200 and answer.json()["prompt"] == prompt
