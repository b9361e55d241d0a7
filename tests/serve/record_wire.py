"""Record what the openai client sends: `python tests/serve/record_wire.py`, writes wire/*.json.

The client may drop its videos any month. What it sends today stands beside the test that uses it,
and `test_wire.py` sends it again without the client.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import httpx2
import openai
from helpers.serving import FakeWorker, Serving
from PIL import Image

from wanflow.presets import NANO_I2V

WIRE = Path(__file__).parent / "wire"
KEPT = ("accept", "authorization", "content-type", "user-agent")
PROMPT = "a red circle moves left on a blue background"


async def record(serving: Serving) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []

    async def hear(request: httpx2.Request) -> None:
        body = await request.aread()
        headers = {name: request.headers[name] for name in KEPT if name in request.headers}
        text = base64.b64encode(body).decode()
        target = request.url.raw_path.decode()
        found.append({"method": request.method, "path": target, "headers": headers, "body": text})

    transport = httpx2.ASGITransport(serving.app)
    http = httpx2.AsyncClient(transport=transport, event_hooks={"request": [hear]})
    client = openai.AsyncOpenAI(base_url="http://127.0.0.1/v1", api_key="token", http_client=http)
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "PNG")
    file.name = "red.png"
    async with client:
        video = await client.videos.create_and_poll(
            prompt=PROMPT, model="nano-i2v", seconds="1", size="64x64", input_reference=file,
            extra_body={"num_inference_steps": 2, "seed": 7}, poll_interval_ms=100,
        )  # fmt: skip
        await client.videos.download_content(video.id)
        await client.videos.download_content(video.id, variant="thumbnail")
        async for _ in client.videos.list(limit=1, order="asc"):
            pass
        await client.videos.delete(video.id)
        await client.models.list()
    for one in found:
        one["path"] = one["path"].replace(video.id, "{id}")
    return found


def main() -> None:
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        serving = Serving(Path(folder), NANO_I2V)
        with FakeWorker(serving):
            found = asyncio.run(record(serving))
    once = list({json.dumps(one): one for one in found}.values())  # polls repeat
    WIRE.mkdir(exist_ok=True)
    text = json.dumps({"client": f"openai {openai.__version__}", "requests": once}, indent=1)
    (WIRE / "openai.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
