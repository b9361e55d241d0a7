"""The page in a real browser: Debian's Chromium without a screen, and a real `wanflow serve`."""

from __future__ import annotations

import io
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from helpers.serving import FakeWorker, Serving, wait_for
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from wanflow.api import Pipeline
from wanflow.files import write_bytes
from wanflow.presets import NANO_I2V
from wanflow.serve.jobs import FINAL, Progress, Worker

pytestmark = pytest.mark.slow

AXE = Path(__file__).parent / "axe" / "axe.min.js"
PROMPT = "a red circle moves left on a blue background"
# Seconds on the fastest CPU: what is seen between submission and end is seen on any.
LONG = {"steps": "100", "length": "81"}
LIMIT_S = 120.0  # of what a busy machine does late
expect.set_options(timeout=1000 * LIMIT_S)
HIGH, LOW = "high noise: layout and motion", "low noise: detail"
BROWSER = ("chromium", "chromium-browser", "google-chrome")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server of nano with one worker."""
    folder, port = tmp_path_factory.mktemp("serve"), free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "wanflow", "serve", "--ckpt_dir", "nano"]
    command += ["--port", str(port), "--data_dir", str(folder / "data")]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
        try:
            wait_for(lambda: ready(url) or process.poll() is not None)
            assert process.poll() is None, (folder / "log").read_text()
            yield url
        finally:
            process.terminate()
            process.wait(LIMIT_S)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, BROWSER)), None)
    assert found, "there is no Chromium; install it with: make services"
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=flags)
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Open pages in a new profile each; a fault of the page's code, or its CSP, fails the test."""
    faults: list[str] = []
    contexts = []

    def opened(url: str, **options: Any) -> Page:
        defaults = {"viewport": {"width": 1280, "height": 860}, "locale": "en-GB"}
        context = browser.new_context(**(defaults | options))
        contexts.append(context)
        return tab(context.new_page(), url)

    def tab(page: Page, url: str) -> Page:
        page.set_default_timeout(1000 * LIMIT_S)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda line: _csp(line.text))
        page.goto(url)
        return page

    def _csp(text: str) -> None:
        if "Content Security Policy" in text:
            faults.append(text)

    opened.tab = tab  # type: ignore[attr-defined]
    yield opened
    for context in contexts:
        context.close()
    assert faults == []


def until(page: Page, script: str, seconds: float = LIMIT_S) -> Any:
    """Wait for a value that is true; the page's CSP forbids Playwright's own way."""
    end = time.monotonic() + seconds
    while not (found := page.evaluate(script)):
        assert time.monotonic() < end, script
        page.wait_for_timeout(30)
    return found


def submit(page: Page, prompt: str = PROMPT, **fields: str) -> None:
    page.fill("#prompt", prompt)
    for name in ("steps", "length", "seed", "count"):
        page.fill(f"#{name}", fields.get(name, "1" if name == "count" else ""))
    page.click("form button.main")


def entry(page: Page, prompt: str = PROMPT) -> Locator:
    return page.locator(".entry", has_text=prompt)


def card(page: Page, prompt: str = PROMPT) -> Locator:
    return page.locator(".card[data-id]", has_text=prompt)


def barriers(page: Page) -> list[str]:
    """What axe finds that is serious or critical."""
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run(document)")
    assert len(found["passes"]) > 10
    return [
        f"{one['impact']} {one['id']}: {node['html'][:200]}"
        for one in found["violations"]
        for node in one["nodes"]
        if one["impact"] in ("serious", "critical")
    ]


def test_a_job_is_submitted_watched_and_played(server: str, open_page: Callable[..., Page]) -> None:
    page = open_page(server)
    submit(page, **LONG)
    doings, shares = list[str](), list[int]()
    end = time.monotonic() + LIMIT_S
    while not card(page).count():
        assert time.monotonic() < end, shares
        try:
            seen = page.evaluate(
                """() => {
                    const one = document.querySelector(".entry.works");
                    return one && [one.querySelector(".doing").textContent.trim(),
                        +one.querySelector("[role=progressbar]").ariaValueNow];
                }"""
            )
        finally:
            page.wait_for_timeout(30)
        if seen:
            doings.append(seen[0])
            shares.append(seen[1])
    # How much is seen depends on the machine; what is seen is in order.
    assert shares == sorted(shares)
    experts = [one for one in doings if one in (HIGH, LOW)]
    assert experts == sorted(experts)
    # A screen reader hears quarters and experts, never each step.
    assert PROMPT in page.inner_text("[aria-live=polite]")
    card(page).get_by_role("button", name="Play").click()
    until(page, "document.querySelector('.card video')?.currentTime > 0.4")
    assert page.evaluate("document.activeElement.tagName") == "VIDEO"
    assert barriers(page) == []


def test_the_expert_the_time_and_the_preview_follow_the_steps(
    tmp_path: Path, open_page: Callable[..., Page]
) -> None:
    app = Serving(tmp_path)
    me = Worker("by hand", "nano", True)
    app.store.enrol(me)
    with serving(app) as url:
        page = open_page(url)
        submit(page)
        expect(entry(page)).to_be_visible()
        job = app.store.claim(me.id)
        assert job is not None
        works, previews = page.locator(".works"), set[str]()
        source = "document.querySelector('.works .frame img')?.src"
        for step, expert, words, colour in ((1, "high", HIGH, "red"), (3, "low", LOW, "blue")):
            picture = io.BytesIO()
            Image.new("RGB", (64, 64), colour).save(picture, "WEBP")
            write_bytes(app.data.preview(job.id), picture.getvalue(), overwrite=True)
            app.store.report(job, Progress(step, 4, "denoising", expert, 5000.0, 25 * step))
            expect(works.locator(".doing")).to_have_text(words)
            expect(works).to_contain_text(f"Step {step} of 4")
            expect(works).to_contain_text("min left")
            bar = works.locator("[role=progressbar]")
            expect(bar).to_have_attribute("aria-valuenow", str(25 * step))
            until(page, f"({source}) && !{json.dumps(sorted(previews))}.includes({source})")
            previews.add(page.evaluate(source))


def test_a_strangers_prompt_is_text_and_cancel_stops(
    server: str, open_page: Callable[..., Page]
) -> None:
    prompt = "<img src=x onerror=alert(1)> <b>a star</b> & falls"
    page = open_page(server)
    page.on("dialog", lambda dialog: pytest.fail(f"the prompt ran: {dialog.message}"))
    submit(page, prompt, **LONG)
    expect(entry(page, prompt)).to_be_visible()
    assert page.locator(".entry b:not(.dot)").count() == 0
    entry(page, prompt).get_by_role("button", name="Cancel").click()
    expect(card(page, prompt)).to_contain_text("Cancelled")
    card(page, prompt).get_by_role("button", name="Try again").click()
    expect(entry(page, prompt)).to_be_visible()
    entry(page, prompt).get_by_role("button", name="Cancel").click()
    expect(card(page, prompt)).to_have_count(2)


def test_a_reload_and_a_second_tab_see_the_same(
    server: str, open_page: Callable[..., Page]
) -> None:
    prompt = "a small cyan cross spins on a black background"
    page = open_page(server)
    submit(page, prompt, seed="77", **LONG)
    expect(entry(page, prompt).locator("[role=progressbar]")).to_be_visible()
    page.reload()
    assert page.input_value("#prompt") == prompt and page.input_value("#seed") == "77"
    expect(entry(page, prompt).locator("[role=progressbar]")).to_be_visible()
    other = open_page.tab(page.context.new_page(), server)  # type: ignore[attr-defined]
    expect(entry(other, prompt)).to_be_visible()
    entry(other, prompt).get_by_role("button", name="Cancel").click()
    expect(card(page, prompt)).to_contain_text("Cancelled")
    card(page, prompt).get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete", exact=True).click()
    expect(card(page, prompt)).to_have_count(0)
    expect(card(other, prompt)).to_have_count(0)
    other.get_by_role("button", name="Light or dark").click()  # a choice holds in every tab
    until(page, "document.documentElement.dataset.theme === 'light'")


def test_a_grid_plays_together_and_two_are_compared(
    server: str, open_page: Callable[..., Page]
) -> None:
    prompt = "a large yellow star falls on a black background"
    page = open_page(server)
    submit(page, prompt, seed="5", count="3", steps="4")
    grid = page.locator(".card.grid", has_text=prompt)
    expect(grid.locator(".cell")).to_have_count(3)
    assert [one.strip() for one in grid.locator(".label").all_inner_texts()] == [
        "seed 5", "seed 6", "seed 7",
    ]  # fmt: skip
    expect(page.locator(".entry")).to_have_count(0)
    times = "[...document.querySelectorAll('.cell video')].map((one) => one.currentTime)"
    for _ in range(10):  # a busy machine may start one of them late
        grid.get_by_role("button", name="Play all").click()
        until(page, f"{times}.length === 3 && {times}.every((one) => one > 0.3)")
        found = page.evaluate(times)
        if max(found) - min(found) < 0.25:
            break
        grid.get_by_role("button", name="Pause all").click()
    assert max(found) - min(found) < 0.25
    for place in (0, 1):
        grid.locator("[aria-expanded]").nth(place).click()
        grid.locator(".cell").nth(place).get_by_role("button", name="Compare").click()
    page.get_by_role("button", name="Compare side by side").click()
    dialog = page.get_by_role("dialog")
    expect(dialog.locator("table")).to_contain_text("seed")
    assert barriers(page) == []
    dialog.get_by_role("button", name="Play both").click()
    both = "[...document.querySelectorAll('dialog video')].map((one) => one.currentTime)"
    together = "left > 0.4 && right > 0.4 && Math.abs(left - right) < 0.15"
    until(page, f"(([left, right]) => {together})({both})")
    page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)
    # A grid over guidance, from one of them.
    grid.locator(".cell").first.get_by_role("button", name="As a grid").click()
    page.select_option("#grid-vary", "cfg_high")
    page.fill("#grid-values", "2, 6")
    page.get_by_role("button", name="Make 2").click()
    newest = page.locator(".card.grid").first
    expect(newest.locator(".label")).to_have_text(
        ["Guidance, high noise 2", "Guidance, high noise 6"]
    )


def test_all_by_keyboard(server: str, open_page: Callable[..., Page]) -> None:
    prompt = "a green triangle rises on a white background"
    page = open_page(server)
    expect(page.locator("#prompt")).to_be_visible()
    page.keyboard.press("n")
    page.keyboard.type(prompt)
    page.keyboard.press("Control+Enter")
    expect(entry(page, prompt).or_(card(page, prompt))).to_be_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("Shift+?")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    expect(card(page, prompt)).to_be_visible()
    page.keyboard.press("g")
    focus = (
        "document.activeElement.getAttribute('aria-label') || document.activeElement.textContent"
    )
    page.keyboard.press("Tab")
    assert page.evaluate(focus) == f"Play: {prompt}"
    shown = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert shown == "solid"  # the focus is seen
    page.keyboard.press("Enter")
    until(page, "document.querySelector('.card video')?.currentTime > 0.2")
    page.keyboard.press("Tab")
    for _ in range(12):  # Chromium's own buttons of the video come first
        if page.evaluate(focus) == "Recipe":
            break
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator(".recipe")).to_contain_text(prompt)
    page.keyboard.press("Escape")
    until(page, f"({focus}) === 'Recipe'")  # the focus is where it was
    page.keyboard.press("Delete")
    until(page, f"({focus}) === 'Keep'")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(card(page, prompt)).to_have_count(0)


LOOKS = {
    "phone": {"viewport": {"width": 375, "height": 720}, "has_touch": True},
    "dark": {"color_scheme": "dark"},
    "chinese": {"locale": "zh-CN", "reduced_motion": "reduce"},
}


@pytest.mark.parametrize("look", LOOKS)
def test_every_look(server: str, open_page: Callable[..., Page], look: str) -> None:
    page, made = open_page(server, **LOOKS[look]), f"a red star falls, {look}"
    submit(page, f"a blue square shrinks, {look}", **LONG)
    expect(page.locator(".works .frame :is(img, canvas)")).to_be_visible()
    assert barriers(page) == []
    cancel = "取消" if look == "chinese" else "Cancel"
    page.locator(".works").get_by_role("button", name=cancel).click()
    submit(page, made, steps="4")
    expect(card(page, made).locator("button.frame img")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    if look == "dark":
        ground = "getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g)"
        assert page.evaluate(f"{ground}.every((one) => one < 60)")
        page.get_by_role("button", name="Light or dark").click()
        until(page, f"{ground}.every((one) => one > 200)")
    if look == "chinese":
        assert page.get_attribute("html", "lang") == "zh-CN"
        expect(page.locator("#gallery-title")).to_have_text("视频")
        page.select_option("header select", "en")
        expect(page.locator("#gallery-title")).to_have_text("Videos")
        page.reload()
        expect(page.locator("#gallery-title")).to_have_text("Videos")


def test_what_the_server_refuses_stands_beside_the_field(
    server: str, open_page: Callable[..., Page]
) -> None:
    page = open_page(server)
    submit(page, steps="999")
    words = page.locator("#steps-error")
    expect(words).to_contain_text("999")
    assert page.get_attribute("#steps", "aria-invalid") == "true"
    assert page.evaluate("document.activeElement.id") == "steps"
    assert barriers(page) == []
    page.fill("#steps", "4")
    expect(words).to_have_count(0)
    page.fill("#prompt", " ")
    page.click("form button.main")
    expect(page.locator("#prompt-error")).to_have_text("Prompt: say what the video shows.")


def test_without_events_the_page_asks_and_connects_again(
    server: str, open_page: Callable[..., Page]
) -> None:
    prompt = "a purple circle grows on a gray background"
    page = open_page(server)
    page.route("**/v1/events", lambda route: route.abort())
    page.reload()
    submit(page, prompt, **LONG)
    expect(page.locator(".works .frame img")).to_be_visible()  # previews are asked for, too
    entry(page, prompt).get_by_role("button", name="Cancel").click()
    expect(card(page, prompt)).to_be_visible()
    expect(page.locator(".notice")).to_be_visible()
    page.set_viewport_size({"width": 1280, "height": 300})
    page.evaluate("scrollTo(0, 200)")
    top = page.evaluate("document.querySelector('main').getBoundingClientRect().top")
    page.route("**/v1/**", lambda route: route.abort())
    expect(page.locator(".notice")).to_contain_text("does not answer")
    expect(page.locator(".notice")).to_be_in_viewport()  # from everywhere, and nothing moves
    assert page.evaluate("document.querySelector('main').getBoundingClientRect().top") == top
    page.unroute("**/v1/**")
    page.unroute("**/v1/events")
    expect(page.locator(".notice")).to_have_count(0)


# A server in this process, whose worker makes what a test wants


@contextmanager
def serving(app: Serving) -> Iterator[str]:
    """Serve an application on a port of its own."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app.app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(60)


def test_a_token_is_asked_for_once_and_everything_loads_with_it(
    tmp_path: Path, open_page: Callable[..., Page], nano: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = Serving(tmp_path, token="secret")
    nano.generate(PROMPT, sample_steps=2).save(str(tmp_path / "clip.mp4"))
    monkeypatch.setattr("helpers.serving.VIDEO", (tmp_path / "clip.mp4").read_bytes())
    with FakeWorker(app), serving(app) as url:
        page = open_page(url)
        dialog = page.get_by_role("dialog")
        expect(dialog).to_be_visible()
        assert barriers(page) == []
        for wrong in ("wrong", "口令"):  # the second cannot stand in a header
            page.fill("#token", wrong)
            page.keyboard.press("Enter")
            expect(dialog).to_contain_text("refused")
            page.fill("#token", "")
            for _ in range(2):  # Chromium closes a dialog at the second, whatever a page says
                page.keyboard.press("Escape")
            expect(dialog).to_be_visible()
        page.fill("#token", "secret")
        page.keyboard.press("Enter")
        submit(page)
        card(page).get_by_role("button", name="Play").click()
        until(page, "document.querySelector('.card video')?.currentTime > 0.2")
        assert page.evaluate("document.querySelector('.card video').src").startswith("blob:")
        with page.expect_download() as saved:
            card(page).get_by_role("link", name="Download").click()
        assert saved.value.path().read_bytes() == (tmp_path / "clip.mp4").read_bytes()
        (job,) = app.store.page()
        name = f"a-red-circle-moves-left-on-a-blue-backgr-{job.request['seed']}.mp4"
        assert saved.value.suggested_filename == name
        page.reload()  # the tab remembers
        expect(card(page)).to_be_visible()


# A picture is seen before the browser has kept it.
KEPT = """async () => {
    const result = (asked) => new Promise((done) => (asked.onsuccess = () => done(asked.result)));
    const kept = await result(indexedDB.open("wanflow", 1));
    const form = await result(kept.transaction("pictures").objectStore("pictures").get("form"));
    kept.close();
    return Object.values(form ?? {}).filter(Boolean).length === 2;
}"""


def test_pictures_are_chosen_dropped_and_pasted(
    tmp_path: Path, open_page: Callable[..., Page]
) -> None:
    app = Serving(tmp_path, spec=NANO_I2V)
    files = {}
    for name in ("red", "blue"):
        files[name] = tmp_path / f"{name}.png"
        Image.new("RGB", (64, 64), name).save(files[name])
    give = """([bytes, kind]) => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], "blue.png", {type: "image/png"}));
        const target = document.querySelector("#last").closest(".drop");
        target.dispatchEvent(kind === "drop"
            ? new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true})
            : new ClipboardEvent("paste", {clipboardData: data, bubbles: true, cancelable: true}));
    }"""
    with FakeWorker(app), serving(app) as url:
        page = open_page(url)
        submit(page, "without a picture")
        expect(page.locator("form")).to_contain_text("picture")
        for kind in ("drop", "paste"):
            page.set_input_files("#image", files["red"])
            page.evaluate(give, [list(files["blue"].read_bytes()), kind])
            expect(page.locator(".drop img")).to_have_count(2)
            until(page, KEPT)
            page.reload()  # pictures outlive it
            expect(page.locator(".drop img")).to_have_count(2)
            submit(page, f"a ball, {kind}")
            expect(card(page, kind)).to_be_visible()
            page.get_by_role("button", name="Clear the form").click()
            expect(page.locator(".drop img")).to_have_count(0)
        card(page, "paste").get_by_role("button", name="Again, another seed").click()
        expect(card(page, "paste")).to_have_count(2)
    first, second, third = app.store.page(newest_first=False)
    assert all(job.state in FINAL for job in (first, second, third))
    pictures = [(job.request["image"], job.request["last_image"]) for job in (first, second, third)]
    assert len(set(pictures)) == 1 and pictures[0][0] != pictures[0][1]
    assert third.request["seed"] != second.request["seed"]
    assert json.dumps({**third.request, "seed": 0}) == json.dumps({**second.request, "seed": 0})


def test_every_field_reaches_the_job_and_comes_back_from_it(
    tmp_path: Path, open_page: Callable[..., Page]
) -> None:
    app = Serving(tmp_path, loras={"ink": tmp_path, "<i>odd</i>": tmp_path})
    with FakeWorker(app) as worker, serving(app) as url:
        worker.fail = {"code": "out_of_memory", "message": "out of memory: try 832*480"}
        page = open_page(url)
        expect(page.locator("#prompt")).to_be_visible()
        page.locator("summary").click()
        page.select_option("#size", "own")
        page.fill("[aria-label='Width x height']", "96*64")
        page.select_option("#preset", "lightning8")
        page.select_option("[aria-label='frames / seconds']", "seconds")
        values = {"negative": "blur", "cfg_high": "2.5", "cfg_low": "1.5", "shift": "7"}
        for name, value in values.items():
            page.fill(f"#{name}", value)
        page.get_by_label("ink").check()
        page.fill("[aria-label='Strength of ink']", "0.5")
        expect(page.locator("fieldset")).to_contain_text("<i>odd</i>")
        submit(page, length="1.2", seed="11", steps="6")
        expect(card(page)).to_contain_text("out of memory: try 832*480")
        (first,) = app.store.page()
        given = {name: first.request[name] for name in ("negative_prompt", "size", "lora", "seed")}
        assert given == {
            "negative_prompt": "blur", "size": "96x64", "lora": ["ink@0.5"], "seed": 11,
        }  # fmt: skip
        numbers = ("frame_num", "sample_steps", "cfg_high", "cfg_low", "sample_shift")
        assert [first.request[name] for name in numbers] == [9, 6, 2.5, 1.5, 7]
        worker.fail = None
        card(page).get_by_role("button", name="Try again").click()
        expect(card(page)).to_have_count(2)
        # A recipe is in the video's file; this worker's holds none, and the page says so.
        card(page).first.get_by_role("button", name="Recipe").click()
        expect(page.get_by_role("dialog")).to_contain_text("No recipe")
        page.keyboard.press("Escape")
    second, _ = app.store.page()
    assert second.request == first.request and second.key == first.key


def test_the_newest_is_first_also_within_a_second(
    tmp_path: Path, open_page: Callable[..., Page]
) -> None:
    app = Serving(tmp_path)
    names = [f"job {number}" for number in range(6)]
    with FakeWorker(app), serving(app) as url:
        page = open_page(url)
        expect(page.locator("#gallery")).to_be_visible()
        for name in names:
            app.service.submit({"prompt": name}, False, None)
        expect(page.locator(".card .prompt")).to_have_text(names[::-1])
        page.reload()
        expect(page.locator(".card .prompt")).to_have_text(names[::-1])


FOCUS = "(document.activeElement.id || document.activeElement.textContent).trim()"


def test_the_focus_is_never_lost(tmp_path: Path, open_page: Callable[..., Page]) -> None:
    app = Serving(tmp_path)
    with FakeWorker(app) as worker, serving(app) as url:
        worker.go.clear()
        page = open_page(url)
        page.fill("#prompt", "a ball")
        page.focus("form button.main")
        page.keyboard.press("Enter")
        expect(entry(page, "a ball").locator("[role=progressbar]")).to_be_visible()
        until(page, f"{FOCUS} === 'Make video'")
        page.focus(".entry button")
        page.keyboard.press("Enter")
        expect(card(page, "a ball")).to_contain_text("Cancelled")
        until(page, f"{FOCUS} === 'queue'")
        # What has no video has no recipe, but a request, and is not compared.
        card(page, "a ball").get_by_role("button", name="Recipe").click()
        expect(page.locator(".recipe")).to_contain_text("a ball")
        page.keyboard.press("Escape")
        until(page, "document.activeElement.ariaLabel === 'Recipe'")
        page.keyboard.press("c")
        page.keyboard.press("Delete")
        expect(page.get_by_role("dialog")).to_be_visible()
        expect(page.locator(".chosen-bar")).to_have_count(0)
        page.keyboard.press("Escape")
        # A field that is folded away opens for its error, and stays open while it is mended.
        page.locator("summary").click()
        page.fill("#cfg_high", "much")
        page.locator("summary").click()
        page.click("form button.main")
        until(page, f"{FOCUS} === 'cfg_high'")
        page.keyboard.type("2")
        expect(page.locator("#cfg_high-error")).to_have_count(0)
        expect(page.locator("#cfg_high")).to_be_visible()


def test_what_goes_wrong_is_told_in_chinese(tmp_path: Path, open_page: Callable[..., Page]) -> None:
    app = Serving(tmp_path)
    with FakeWorker(app) as worker, serving(app) as url:
        page = open_page(url, locale="zh-CN")
        submit(page, steps="101")
        told = page.locator("#steps-error")
        expect(told).to_contain_text("步数：服务器不接受所填的内容。")
        expect(told.locator("[lang=en]")).to_have_text(
            "num_inference_steps 101 is too much; at most 100 are accepted"
        )
        worker.fail = {"code": "out_of_memory", "message": "it took 9 GB"}
        submit(page)
        expect(card(page)).to_contain_text("显存或内存不足")
        expect(card(page).locator("[lang=en]")).to_have_text("it took 9 GB")
        assert barriers(page) == []
        # What stands between, or nothing at all, answers.
        page.route("**/v1/videos", lambda route: route.fulfill(status=502, body="<h1>no</h1>"))
        submit(page, "two")
        told = page.locator("form .boxed")
        expect(told).to_contain_text("未提交：服务器的回答无法识别。")
        expect(told.locator("[lang=en]")).to_have_text("HTTP 502")
        page.route("**/v1/videos", lambda route: route.abort())
        submit(page, "three")
        expect(told).to_have_text("未提交：服务器没有响应")


def test_numbers_are_read_as_people_write_them(
    tmp_path: Path, open_page: Callable[..., Page]
) -> None:
    app = Serving(tmp_path)
    with serving(app) as url:
        page = open_page(url)
        page.locator("summary").click()
        for seed, words in (("9007199254740993", "at most"), ("1.5", "not a whole number")):
            submit(page, seed=seed)
            expect(page.locator("#seed-error")).to_contain_text(words)
        page.fill("#cfg_high", "3,5")
        page.select_option("[aria-label='frames / seconds']", "seconds")
        page.select_option("#size", "own")
        submit(page, seed="４２", length="0,6")
        expect(page.locator("#size-error")).to_contain_text("width and a height")
        assert app.store.page() == []  # never another size than was asked for
        page.fill("#own", "９６×64")
        page.keyboard.press("Enter")
        expect(entry(page)).to_be_visible()
    (job,) = app.store.page()
    names = ("seed", "cfg_high", "frame_num", "size")
    assert [job.request[name] for name in names] == [42, 3.5, 5, "96x64"]


def test_what_is_no_picture_or_too_large_is_refused_before_it_is_sent(
    tmp_path: Path, open_page: Callable[..., Page]
) -> None:
    app = Serving(tmp_path, spec=NANO_I2V, max_body_mb=0.1)
    give = """([selector, name, size, event, text]) => {
        const data = new DataTransfer();
        const type = name.endsWith("png") ? "image/png" : "application/pdf";
        data.items.add(new File([new Uint8Array(size)], name, {type}));
        if (text) data.items.add(text, "text/plain");
        const options = {bubbles: true, cancelable: true};
        const one = event === "drop" ? new DragEvent("drop", {...options, dataTransfer: data})
            : new ClipboardEvent("paste", {...options, clipboardData: data});
        document.querySelector(selector).dispatchEvent(one);
        return one.defaultPrevented;
    }"""
    with serving(app) as url:
        page = open_page(url)
        expect(page.locator("#image")).to_be_attached()
        submit(page)
        expect(page.locator("#image-error")).to_contain_text("choose one")
        assert page.evaluate(give, ["#last", "notes.pdf", 9, "drop", ""])
        expect(page.locator("#last-error")).to_have_text("notes.pdf is not a picture.")
        assert page.evaluate(give, ["#image", "huge.png", 200_000, "drop", ""])
        expect(page.locator("#image-error")).to_contain_text("0.2 MB")
        expect(page.locator("#last-error, .drop img")).to_have_count(0)
        assert barriers(page) == []
        # Text that a text editor copies as a picture too is text; a picture goes to a free place,
        # also where it is dropped beside the field: else the browser leaves the page for it.
        assert not page.evaluate(give, ["#prompt", "text.png", 9, "paste", "a ball"])
        assert page.evaluate(give, ["#gallery", "one.png", 9, "drop", ""])
        expect(page.locator(".drop img")).to_have_count(1)


def test_several_videos_of_a_picture_send_it_once_and_say_how_much_is_sent(
    tmp_path: Path, open_page: Callable[..., Page]
) -> None:
    app = Serving(tmp_path, spec=NANO_I2V)
    Image.effect_noise((900, 900), 99).save(tmp_path / "noise.png")
    kinds = []
    with serving(app) as url:
        page = open_page(url)
        page.on(
            "request",
            lambda one: one.method == "POST" and kinds.append(one.headers["content-type"][:16]),
        )
        page.set_input_files("#image", tmp_path / "noise.png")
        page.evaluate(
            """() => new MutationObserver(() => {
                const words = document.querySelector("form button.main").textContent;
                if (/Sending … [0-9]+ %/.test(words)) window.told = true;
            }).observe(document.body, {childList: true, subtree: true, characterData: true})"""
        )
        submit(page, count="3")
        expect(page.locator(".entry")).to_have_count(3)
        assert page.evaluate("window.told")
    assert kinds == ["multipart/form-d", "application/json", "application/json"]
    assert len({job.request["image"] for job in app.store.page()}) == 1


def test_earlier_videos_come_also_after_the_last_was_deleted(
    tmp_path: Path, open_page: Callable[..., Page]
) -> None:
    app = Serving(tmp_path, max_queue=200)
    ids = [app.service.submit({"prompt": f"job {n}"}, False, None).id for n in range(130)][::-1]
    for id in ids:
        app.service.cancel(id)
    with serving(app) as url:
        page = open_page(url)
        cards = page.locator(".card")
        expect(cards).to_have_count(100)  # those that the events bring
        assert app.service.delete(ids[39])  # the last of the first list
        page.get_by_role("button", name="Show earlier videos").click()
        until(page, "document.querySelectorAll('.card').length > 100")
        page.get_by_role("button", name="Show earlier videos").press("Enter")
        expect(page.get_by_role("button", name="Show earlier videos")).to_have_count(0)
        until(page, "document.activeElement.closest('.card')")
        expect(cards.last).to_contain_text("job 0")


def test_a_tab_that_was_hidden_comes_back_without_a_word(
    server: str, open_page: Callable[..., Page]
) -> None:
    page = open_page(server)
    show = """(hidden) => {
        Object.defineProperty(document, "hidden", {value: hidden, configurable: true});
        document.dispatchEvent(new Event("visibilitychange"));
    }"""
    until(page, "document.querySelector('#gallery') && !document.querySelector('.notice')")
    page.evaluate(
        """() => new MutationObserver(() => {
            const words = document.querySelector(".notice")?.textContent || "";
            if (words.includes("every few seconds")) window.noticed = true;
        }).observe(document.body, {childList: true, subtree: true})"""
    )
    with page.expect_response("**/v1/videos?*"):
        page.evaluate(show, True)
    with page.expect_response("**/v1/events"):
        page.evaluate(show, False)
    assert not page.evaluate("window.noticed")
