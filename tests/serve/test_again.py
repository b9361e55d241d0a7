"""What the page needs to make a job again, and to see every job that is not final."""

from __future__ import annotations

import io
import threading
from pathlib import Path

from helpers.serving import FakeWorker, Serving, wait_for
from PIL import Image

from wanflow.files import write_bytes
from wanflow.presets import NANO_I2V

PROMPT = "a red circle moves left on a blue background"


def test_the_request_of_any_job_makes_an_equal_one(tmp_path: Path) -> None:
    app = Serving(tmp_path, loras={"ink": tmp_path})
    body = {
        "prompt": PROMPT, "size": "96x64", "num_frames": 5, "num_inference_steps": 9, "cfg_high": 2,
        "preset": "lightning-motion", "lora": [{"name": "ink", "scale": 0.5}], "seed": 7,
    }  # fmt: skip
    with app.client() as client:
        first = client.post("/v1/videos", json=body).json()
        client.post(f"/v1/videos/{first['id']}/cancel")
        again = client.get(f"/v1/videos/{first['id']}/request").json()
        assert again["lora"] == ["ink@0.5"] and again["seed"] == 7 and again["lora_from"] == 3
        second = client.post("/v1/videos", json=again)
        assert second.status_code == 200, second.text
        assert client.get("/v1/videos/video_" + 32 * "0" + "/request").status_code == 404
    newest, oldest = app.store.page()
    assert newest.request == oldest.request and newest.key == oldest.key


def test_a_picture_that_is_kept_is_named_by_its_hash(tmp_path: Path) -> None:
    app = Serving(tmp_path, spec=NANO_I2V)
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "PNG")
    with app.client() as client:
        sent = {"input_reference": ("a.png", file.getvalue(), "image/png")}
        first = client.post("/v1/videos", data={"prompt": PROMPT}, files=sent).json()
        again = client.get(f"/v1/videos/{first['id']}/request").json()
        assert client.post("/v1/videos", json=again).status_code == 200
        newest, oldest = app.store.page()
        assert newest.request == oldest.request
        app.data.picture(oldest.request["image"]).unlink()
        refused = client.post("/v1/videos", json=again)
        assert refused.status_code == 400 and "not kept" in refused.json()["error"]["message"]
        again["image"] = {"file_id": "../../etc/passwd"}
        assert client.post("/v1/videos", json=again).status_code == 400


def test_events_of_all_show_the_job_at_work_behind_many_that_wait(tmp_path: Path) -> None:
    app = Serving(tmp_path)
    with app.client() as client:
        first = client.post("/v1/videos", json={"prompt": PROMPT}).json()["id"]
        for _ in range(3):
            client.post("/v1/videos", json={"prompt": PROMPT})
    assert first in [video["id"] for video, *_ in app.service.recent(2)]
    assert len(app.service.recent(2)) == 4


def test_a_preview_that_is_replaced_meanwhile_is_whole(tmp_path: Path) -> None:
    app, over = Serving(tmp_path), threading.Event()
    with app.client() as client, FakeWorker(app) as worker:
        worker.go.clear()
        id = client.post("/v1/videos", json={"prompt": PROMPT}).json()["id"]
        wait_for(app.data.preview(id).exists)

        def replace() -> None:
            for size in range(1, 10_000):
                if over.is_set():
                    return
                data = bytes([size % 7]) * (1 + 4000 * (size % 7))
                write_bytes(app.data.preview(id), data, overwrite=True)

        thread = threading.Thread(target=replace)
        thread.start()
        try:
            for _ in range(60):
                answer = client.get(f"/v1/videos/{id}/preview")
                assert len(answer.content) == int(answer.headers["content-length"])
        finally:
            over.set()
            thread.join()
