"""Rewrite a short prompt into a detailed one, by any server that speaks OpenAI's chat completions
(DashScope among them).

Written, not run against the real service.
"""

from __future__ import annotations

import json
import logging
import urllib.error
import urllib.request

from wanflow.config import RequestError

logger = logging.getLogger("wanflow")

DASHSCOPE = "https://dashscope.aliyuncs.com/compatible-mode/v1"
DEFAULT_MODEL = "qwen-plus"
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


def extend(
    prompt: str,
    language: str,
    model: str | None,
    url: str | None,
    key: str | None,
    timeout: float = 60.0,
) -> str:
    """The rewritten prompt, or the prompt itself with a warning when the server fails (as the
    official code does).

    Args:
        language: "zh" or "en", the language of the answer.
        url: base address, such as DashScope's (the default) or http://127.0.0.1:8000/v1.
        key: sent as a bearer token; DashScope needs one.

    Raises:
        RequestError: when DashScope is to be asked and there is no key, or the address is not
            http(s).
    """
    if url is None and not key:
        raise RequestError(
            "--use_prompt_extend asks DashScope, which needs a key: set DASH_API_KEY (or"
            " DASH_API_URL for another server)"
        )
    base = (url or DASHSCOPE).rstrip("/")
    if not base.startswith(("http://", "https://")):
        raise RequestError(f"DASH_API_URL {base!r} is not an http address")
    messages = [
        {"role": "system", "content": INSTRUCTIONS[language]},
        {"role": "user", "content": prompt},
    ]
    body = json.dumps({"model": model or DEFAULT_MODEL, "messages": messages}).encode()
    headers = {"Content-Type": "application/json"} | (
        {"Authorization": f"Bearer {key}"} if key else {}
    )
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"{base}/chat/completions", body, headers), timeout=timeout
        ) as answer:
            text = json.load(answer)["choices"][0]["message"]["content"].strip()
        if not isinstance(text, str) or not text:
            raise ValueError("the answer is empty")
        return text
    except (
        urllib.error.URLError,
        OSError,
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
    ) as error:
        logger.warning("the prompt was not extended (%s); the original one is used", error)
        return prompt
