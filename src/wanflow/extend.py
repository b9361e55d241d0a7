"""Rewrite a short prompt into a detailed one through a server of OpenAI's chat completions API.

With pictures a vision model sees them too. DashScope is such a server. Written, not run against the
real service.
"""

from __future__ import annotations

import base64
import io
import json
import logging
from collections.abc import Sequence
from http.client import HTTPException
from typing import Any
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

from wanflow.config import RequestError
from wanflow.request import Picture
from wanflow.untrusted import parse_json, printable
from wanflow.web import check_url, on_loopback, read_bounded, within

logger = logging.getLogger("wanflow")

DASHSCOPE = "https://dashscope.aliyuncs.com/compatible-mode/v1"
DEFAULT_MODEL, VISION_MODEL = "qwen-plus", "qwen-vl-max"  # as the official script has them
PICTURE_SIDE = 1024  # pixels of a picture that is sent
LONGEST_PROMPT = 8000  # characters
ANSWER_BYTES = 1 << 20  # a prompt of a hundred words takes a kilobyte
INSTRUCTIONS = {
    "zh": (
        "你为文生视频模型改写提示词。保留用户的原意与所有细节，补充主体外观、动作、场景、光线、"
        "镜头与风格，"
        "写成一段80到100字的中文。只输出改写后的提示词。"
    ),
    "en": (
        "You rewrite prompts for a text-to-video model. Keep the user's meaning and every detail;"
        " add the subject's looks, its motion, the setting, light, camera and style. Answer with"
        " one English paragraph of 80 to 100 words and nothing else."
    ),
}
WITH_PICTURES = {
    "zh": (
        "你为图生视频模型改写提示词。视频从所给的图片开始（如有第二张，则以它结束）。以图片内容为准，"
        "保留用户的原意，着重补充主体的动作与镜头运动，不要描述图中没有的东西，"
        "写成一段80到100字的中文。只输出改写后的提示词。"
    ),
    "en": (
        "You rewrite prompts for an image-to-video model. The video begins with the given picture,"
        " and ends with the second one if there is one. Stay with what the pictures show and what"
        " the user means; add motion of the subject and of the camera. Answer with one English"
        " paragraph of 80 to 100 words and nothing else."
    ),
}


class _NoRedirect(HTTPRedirectHandler):
    """Follow no redirect: the key would go to a host that it is not for."""

    def redirect_request(self, *_: object) -> None:
        return None


def extend(
    prompt: str,
    language: str,
    model: str | None,
    url: str | None,
    key: str | None,
    timeout: float = 60.0,
    pictures: Sequence[Picture] = (),
) -> str:
    """Return the rewritten prompt, or the prompt itself with a warning when the server fails.

    The official code does the same.

    Args:
        prompt: the text to rewrite.
        language: "zh" or "en", the language of the answer.
        model: the server's model; None: `DEFAULT_MODEL`, or `VISION_MODEL` with pictures.
        url: base address, such as DashScope's (the default) or http://127.0.0.1:8000/v1.
        key: sent as a bearer token; DashScope needs one.
        timeout: seconds that the server may take for all of its answer.
        pictures: that the video begins or ends with; the server gets them, made smaller.

    Raises:
        RequestError: for DashScope without a key, or an address that is not http(s).
    """
    if url is None and not key:
        raise RequestError(
            "--use_prompt_extend needs a key for DashScope: set DASH_API_KEY, or DASH_API_URL for"
            " another server"
        )
    base = check_url((url or DASHSCOPE).rstrip("/"), "DASH_API_URL", DASHSCOPE)
    if key and not (key.isascii() and key.isprintable()):
        raise RequestError("DASH_API_KEY holds characters that no key has; copy it again")
    asked = {"model": model or (VISION_MODEL if pictures else DEFAULT_MODEL)}
    body = json.dumps({**asked, "messages": _messages(prompt, language, pictures)}).encode()
    headers = {"Content-Type": "application/json"} | (
        {"Authorization": f"Bearer {key}"} if key else {}
    )
    request = Request(f"{base}/chat/completions", body, headers)

    direct = [ProxyHandler({})] if on_loopback(base) else []

    def ask() -> bytes:
        with build_opener(_NoRedirect, *direct).open(request, timeout=timeout) as answer:
            return read_bounded(iter(lambda: answer.read1(1 << 16), b""), ANSWER_BYTES, timeout)

    try:
        answer = parse_json(within(timeout, ask), base)
        text = answer["choices"][0]["message"]["content"].strip()
        if not isinstance(text, str) or not text or len(text) > LONGEST_PROMPT:
            raise ValueError(f"the answer is no text of 1 to {LONGEST_PROMPT:,} characters")
        text.encode()  # raises for half a character
    except (
        OSError,
        HTTPException,
        RequestError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ) as error:
        why = printable(error) or type(error).__name__
        logger.warning("the prompt was not extended (%s); the original one is used", why)
        return prompt
    return text


def _messages(prompt: str, language: str, pictures: Sequence[Picture]) -> list[dict[str, Any]]:
    """Return what the server is asked; a prompt with pictures is a list of contents."""
    shown = [{"type": "image_url", "image_url": {"url": _address(one)}} for one in pictures]
    system = (WITH_PICTURES if pictures else INSTRUCTIONS)[language]
    content = [*shown, {"type": "text", "text": prompt}] if pictures else prompt
    return [{"role": "system", "content": system}, {"role": "user", "content": content}]


def _address(picture: Picture) -> str:
    """Return a picture as an address that holds a JPEG."""
    from PIL import Image

    image, file = Image.fromarray(picture.pixels), io.BytesIO()
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    image.save(file, "JPEG")
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
