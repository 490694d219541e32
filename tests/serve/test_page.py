"""The pages in a real browser: a conversation, and what may come in between."""

from __future__ import annotations

import time

import httpx
import pytest

from cyclewise.serve.security import Keys
from tests.clock.chromium import ROOT_FLAGS, find_chromium
from tests.engine.toy import hashed_logits
from tests.serve.toys import WAIT, Running, Toy, wait_until

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=2</script>&amp;'
KEY = "a-key-of-sufficient-length"


class Site:
    """A toy's server whose answers are set from outside, and which may go away."""

    def __init__(self, **values):
        self.say = None
        self.seconds = 0.0  # of each step
        values = {"context": 4096, "max_batch_tokens": 512, "spare_pages": 2048, **values}
        self._values = {"logits": self._logits, **values}
        self.start()
        self.port = httpx.URL(self.address).port

    @property
    def address(self):
        return self.running.address

    @property
    def toy(self):
        return self.running.toy

    def start(self, port=0):
        self.running = Running(Toy(**self._values), port)
        self.toy.model.machine.before_step = lambda: time.sleep(self.seconds)

    def stop(self):
        self.running.server.force_exit = True  # connections are cut off
        self.running.close()

    def come_back(self):
        self.start(self.port)

    def _logits(self, token_ids):
        """Those that say `say` after the last turn of a user, and then end."""
        if self.say is None:
            return hashed_logits(token_ids)
        answer = bytes(token for token in token_ids if token < 256).rpartition(b"a:")[2]
        script = [*self.say.encode(), 257]
        row = hashed_logits(token_ids) * 0
        row[script[min(len(answer), len(script) - 1)]] = 30
        return row


@pytest.fixture(scope="module")
def browser():
    path = find_chromium()
    if path is None:
        pytest.skip("no Chromium here: `apt-get install chromium` adds it")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=path, args=ROOT_FLAGS)
        yield found
        found.close()


@pytest.fixture
def site():
    site = Site()
    yield site
    site.stop()


@pytest.fixture
def context(browser, site):
    """A browser's window; in the end, nothing may have been asked of anybody else, and no page may
    have complained.
    """
    context = browser.new_context(base_url=site.address)
    context.set_default_timeout(WAIT * 1000)
    asked, complaints = [], []
    context.on("request", lambda request: asked.append(request.url))
    context.on("weberror", lambda error: complaints.append(str(error.error)))
    context.on("console", lambda message: complaints.append(message.text))
    yield context
    context.close()
    assert all(url.startswith(site.address) for url in asked), asked
    # the browser itself says so where a server is away or refuses
    assert [text for text in complaints if not text.startswith("Failed to load resource")] == []


@pytest.fixture
def page(context):
    page = context.new_page()
    page.goto("/")
    return page


def ask(page, text, state="done"):
    page.fill("#message", text)
    page.press("#message", "Enter")
    if state:
        page.wait_for_selector(f"article.assistant[data-state={state}] >> nth=-1")


def texts(page):
    return page.locator("article .text").all_inner_texts()


def test_a_conversation(site, page):
    site.say = "Hello there.\n```py\nx = 1\n```\nDone."
    ask(page, "first")
    assert texts(page)[0] == "first"
    assert page.locator("article.assistant .text").evaluate("e => e.textContent") == site.say
    assert page.locator("article.assistant pre").inner_text() == "x = 1\n"
    assert page.locator("#model").inner_text() == "toy"
    site.say = "Yes."
    page.fill("#message", "a line")
    page.press("#message", "Shift+Enter")
    page.keyboard.type("another")
    page.press("#message", "Enter")
    page.wait_for_selector("article.assistant[data-state=done] >> nth=1")
    last, _ = site.toy.prompts.asked[-1]
    assert [message["role"] for message in last] == ["user", "assistant", "user"]
    assert last[1]["content"] == "Hello there.\n```py\nx = 1\n```\nDone."
    assert last[2]["content"] == "a line\nanother"
    # sentences are said aloud, each once
    assert page.locator("#speech").evaluate("e => e.textContent") == "Yes."
    assert page.locator("#turns").get_attribute("aria-live") == "off"


def test_the_strip_tells_of_each_token(site, page):
    site.say = "ab c"
    ask(page, "hi")
    cells = page.locator(".strip [role=option]")
    assert cells.locator(".word").all_inner_texts() == ["a", "b", "␣", "c", "end"]
    assert all("s" in name for name in cells.evaluate_all("a => a.map(e => e.ariaLabel)"))
    for name in ("prefill", "model", "sampling"):  # a toy's moments are not clocked
        assert page.locator(f".tokens .key .{name}").count() == 1
    cells.nth(1).click()
    detail = page.locator(".detail")
    assert "token 2" in detail.locator("h3").inner_text()
    assert detail.locator(".alternatives li.chosen code").inner_text() == "b"
    assert detail.locator(".alternatives li").count() == 5
    assert page.evaluate("[...CSS.highlights.get('token')][0].toString()") == "b"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert "token 4" in detail.locator("h3").inner_text()
    strip = page.locator(".strip")
    active = strip.get_attribute("aria-activedescendant")
    assert page.locator(f"#{active}").get_attribute("aria-selected") == "true"
    page.keyboard.press("Escape")
    assert detail.is_hidden()
    # a place in the text is a token too
    box = page.locator("article.assistant .prose").bounding_box()
    page.mouse.click(box["x"] + 3, box["y"] + box["height"] / 2)
    assert "token 1" in detail.locator("h3").inner_text()


def test_what_is_said_stays_text(site, page):
    site.say = HOSTILE
    ask(page, HOSTILE)
    assert texts(page) == [HOSTILE, HOSTILE]
    page.locator(".strip [role=option]").first.click()
    page.reload()
    assert texts(page) == [HOSTILE, HOSTILE]
    assert page.evaluate("[document.images.length, document.scripts.length]") == [0, 1]
    assert page.title() == "Chat · Cyclewise"


@pytest.mark.parametrize("how", ["key", "button"])
def test_stop(site, page, how):
    site.seconds = 0.01
    ask(page, "tell me", None)
    page.wait_for_selector(".strip [role=option] >> nth=5")
    if how == "key":
        page.keyboard.press("Escape")
    else:
        page.click("#stop")
    page.wait_for_selector("article.assistant[data-state=stopped]")
    said = texts(page)[1]
    assert len(said) > 4
    wait_until(lambda: site.toy.service.runner.numbers().jobs == 0)
    assert texts(page)[1] == said
    site.say = "Better."
    page.click(".again")
    page.wait_for_selector("article.assistant[data-state=done]")
    assert texts(page) == ["tell me", "Better."]


def test_reload(site, page):
    site.say = "One."
    ask(page, "first")
    page.click("#settings summary")
    page.fill("[name=temperature]", "0.25")
    site.say, site.seconds = "Two, which takes longer than that." * 3, 0.02
    ask(page, "second", None)
    page.wait_for_selector("article:last-child .strip [role=option] >> nth=5")
    page.fill("#message", "half typed")
    page.reload()
    shown = texts(page)
    assert shown[:3] == ["first", "One.", "second"] and site.say.startswith(shown[3]) and shown[3]
    assert page.input_value("#message") == "half typed"
    assert page.input_value("[name=temperature]") == "0.25"
    assert page.locator("article:nth-child(2) .strip [role=option]").count() == 5
    assert "was left" in page.locator(".note").last.inner_text()
    wait_until(lambda: site.toy.service.runner.numbers().jobs == 0)
    site.seconds = 0.0
    page.click(".again:visible")
    page.wait_for_selector("article.assistant[data-state=done] >> nth=1")
    assert texts(page)[3] == site.say and page.input_value("#message") == "half typed"


def test_two_tabs(context, site, page):
    other = context.new_page()
    other.goto("/")
    site.seconds = 0.005
    site.say = "For both of you."
    ask(page, "here", None)
    ask(other, "there")
    page.wait_for_selector("article.assistant[data-state=done]")
    for tab, text in ((page, "here"), (other, "there")):
        tab.reload()
        assert texts(tab) == [text, site.say]


def test_a_server_that_goes_away_and_comes_back(site, page):
    site.seconds = 0.02
    ask(page, "tell me", None)
    page.wait_for_selector(".strip [role=option] >> nth=5")
    page.fill("#message", "what I am writing")
    site.stop()
    page.wait_for_selector("article.assistant[data-state=failed]")
    assert "went away" in page.locator(".note").inner_text()
    page.wait_for_selector("#server[data-state=away]")
    said = texts(page)[1]
    assert len(said) > 4
    page.click(".again")  # too early: nothing is lost
    page.wait_for_selector("article.assistant[data-state=failed]")
    assert page.input_value("#message") == "what I am writing"
    site.say, site.seconds = "Here again.", 0.0
    site.come_back()
    page.wait_for_selector("#server[data-state=there]")
    assert "back" in page.locator("#server").inner_text()
    page.click(".again")
    page.wait_for_selector("article.assistant[data-state=done]")
    assert texts(page) == ["tell me", "Here again."]
    assert page.input_value("#message") == "what I am writing"


def test_what_is_refused(site, page):
    page.click("#settings summary")
    page.fill("[name=max_tokens]", "100000")
    ask(page, "hi", "failed")
    assert "context" in page.locator(".note").inner_text()
    page.fill("[name=temperature]", "9")  # the page itself knows better
    page.fill("#message", "kept")
    page.press("#message", "Enter")
    assert page.input_value("#message") == "kept" and len(texts(page)) == 2
    page.on("dialog", lambda dialog: dialog.accept())
    page.click("#new")
    assert texts(page) == [] and page.locator("#welcome").is_visible()


def test_the_batch(context, site, page):
    look = context.new_page()
    look.goto("/batch")
    look.wait_for_selector("#none:visible")
    site.seconds = 0.02
    ask(page, "a secret", None)
    look.bring_to_front()
    look.wait_for_selector("#answers .state.decode")
    row = look.locator("#answers tr").all_inner_texts()[0]
    assert row.split()[:2] == ["1", "decoding"] and "secret" not in look.content()
    look.wait_for_function("Number(document.getElementById('used').textContent) > 0")
    look.wait_for_function("Number(document.getElementById('rate').textContent) > 0")
    page.bring_to_front()
    page.keyboard.press("Escape")
    look.bring_to_front()
    look.wait_for_selector("#none:visible")
    site.stop()
    look.wait_for_selector("#server[data-state=away]")
    site.come_back()
    look.wait_for_selector("#server[data-state=there]")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_and_in_every_light(browser, site, scheme):
    context = browser.new_context(
        base_url=site.address, color_scheme=scheme, viewport={"width": 320, "height": 640}
    )
    page = context.new_page()
    page.goto("/")
    site.say = "a" * 300 + " and more\n```\n" + "b" * 300 + "\n```\n"
    ask(page, "c" * 300)
    page.locator(".strip [role=option]").nth(3).click()
    page.click("#settings summary")
    fits = "document.documentElement.scrollWidth <= innerWidth"
    assert page.evaluate(fits)
    assert page.evaluate(CONTRASTS) == []
    page.goto("/batch")
    page.wait_for_selector("#none:visible")
    assert page.evaluate(fits)
    assert page.evaluate(CONTRASTS) == []
    context.close()


CONTRASTS = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d");
  const rgb = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = (color) => {
    const [r, g, b] = rgb(color).map((x) => x / 255)
      .map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const color = getComputedStyle(node).backgroundColor;
      if (rgb(color)[3]) return color;
    }
  };
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!own || !node.checkVisibility()) continue;
    const pair = [light(getComputedStyle(node).color), light(behind(node))];
    const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    if (ratio < 4.5) found.push([node.tagName, node.className, node.textContent, ratio]);
  }
  return found;
}"""
"""Texts whose contrast is less than 4.5, which WCAG 2.2 asks for at level AA."""


def test_with_the_keyboard_alone(site, page):
    site.say = "Hi."
    assert page.evaluate("document.activeElement.id") == "message"
    page.keyboard.type("hello")
    page.keyboard.press("Enter")
    page.wait_for_selector("article.assistant[data-state=done]")
    seen = []
    for _ in range(12):
        page.keyboard.press("Shift+Tab")
        seen.append(page.evaluate("document.activeElement.className"))
        if seen[-1] == "strip":
            break
    assert seen[-1] == "strip"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("End")
    assert "end of the answer" in page.locator(".detail h3").inner_text()
    unnamed = """[...document.querySelectorAll("button, input, textarea, [role]")].filter((node) =>
      !(node.ariaLabel || node.labels?.length || node.textContent.trim()
        || node.getAttribute("aria-labelledby") || node.id === "server")).length"""
    assert page.evaluate(unnamed) == 0


def test_a_browser_is_asked_for_the_key(browser):
    site = Site(keys=Keys([KEY]))
    site.say = "Welcome."
    try:
        for key, status in (("wrong-key-of-some-length", 401), (KEY, 200)):
            context = browser.new_context(
                base_url=site.address, http_credentials={"username": "", "password": key}
            )
            page = context.new_page()
            assert page.goto("/").status == status
            if status == 200:
                ask(page, "hi")
                assert texts(page) == ["hi", "Welcome."]
            context.close()
    finally:
        site.stop()
