"""What the openai client sent when `record_wire.py` ran, sent again without that client."""

from __future__ import annotations

import base64
import json
from functools import partial
from pathlib import Path

import pytest
from helpers.serving import VIDEO, FakeWorker, Serving, wait_for

from wanflow.presets import NANO_I2V

WIRE = json.loads((Path(__file__).parent / "wire" / "openai.json").read_text("utf-8"))


def completed(serving: Serving, id: str) -> bool:
    job = serving.store.get(id)
    return job is not None and job.state == "completed"


@pytest.mark.parametrize("token", ["", "token"])  # the client always sends one
def test_the_requests_of_the_openai_client(tmp_path: Path, token: str) -> None:
    serving, id, seen = Serving(tmp_path, NANO_I2V, token), "", []
    with serving.client() as client, FakeWorker(serving):
        for one in WIRE["requests"]:
            path = one["path"].replace("{id}", id)
            body = base64.b64decode(one["body"])
            answer = client.request(one["method"], path, content=body, headers=one["headers"])
            assert answer.status_code == 200, (one["method"], path, answer.text)
            seen.append(f"{one['method']} {one['path'].partition('?')[0]}")
            if one["method"] == "POST":
                video = answer.json()
                id = video["id"]
                job = serving.store.get(id)
                assert job is not None and job.request["sample_steps"] == 2
                assert job.request["seed"] == 7 and job.request["frame_num"] == 9
                assert len(job.request["image"]) == 64
                wait_for(partial(completed, serving, id))
            elif path.endswith("/content"):
                assert answer.content == VIDEO
            elif path.endswith("variant=thumbnail"):
                assert answer.content == b"thumbnail"
            elif one["method"] == "DELETE":
                assert answer.json() == {"id": id, "object": "video.deleted", "deleted": True}
            elif path == f"/v1/videos/{id}":
                assert answer.json()["object"] == "video"
            else:
                assert answer.json()["object"] == "list" and answer.json()["data"]
    assert set(seen) == {
        "POST /v1/videos", "GET /v1/videos/{id}", "GET /v1/videos/{id}/content", "GET /v1/videos",
        "DELETE /v1/videos/{id}", "GET /v1/models",
    }  # fmt: skip
