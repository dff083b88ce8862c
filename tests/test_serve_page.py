"""The page in a headless browser: the system's Chromium, driven by Playwright."""

import pytest

from tests.needs import needs, program
from tests.serving import PROMPT, FakeRunner, ServerProcess, fake, wait_for

needs("playwright")
pytestmark = pytest.mark.browser


def expect(locator):
    from playwright.sync_api import expect

    return expect(locator)


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    path = program("chromium", "chromium-browser", "google-chrome")
    with sync_playwright() as playwright:
        # a container's root has no sandbox, and its /dev/shm is small
        started = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield started
        started.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with ServerProcess(tmp_path_factory.mktemp("page") / "store") as process:
        yield process.ready().address


class Watched:
    """A page, what its console said, and whom it asked."""

    def __init__(self, browser, address, **options):
        self.context = browser.new_context(viewport={"width": 1100, "height": 900}, **options)
        self.context.set_default_timeout(15_000)
        self.page, self.problems, self.hosts = self.context.new_page(), [], set()
        self.page.on("console", self.console)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("dialog", lambda dialog: self.problems.append(f"dialog {dialog.message}"))
        self.page.on("request", lambda request: self.hosts.add(request.url.split("/")[2]))
        self.address = address
        self.page.goto(address + "/")

    def console(self, message):
        if message.type in ("error", "warning") and "status of 4" not in message.text:
            self.problems.append(message.text)

    def __enter__(self):
        return self.page

    def __exit__(self, kind, error, trace):
        self.context.close()
        if kind is None:
            assert not self.problems
            own = self.address.split("/")[2]
            assert self.hosts <= {own, ""}  # no outside asset


def steps_drawn(page, figure="#plan-a"):
    return page.locator(f"{figure} rect:not(.other)").count()


def test_a_clip_by_keyboard_alone(browser, address):
    with Watched(browser, address) as page:
        page.wait_for_selector("#plan-a svg")
        page.keyboard.press("Tab")
        assert page.locator("#prompt:focus").count() == 1  # the first stop
        page.keyboard.type(PROMPT)
        for _ in range(3):
            page.keyboard.press("Tab")
        assert page.locator("#seed:focus").count() == 1
        page.keyboard.type("7")
        page.keyboard.press("Tab")
        page.keyboard.type("60")
        page.locator("#plan").focus()
        page.keyboard.type("reference")
        page.keyboard.press("Escape")  # the list of plans
        page.wait_for_selector("#plan-a rect.bridge")
        page.keyboard.press("Enter")
        page.wait_for_selector("#running .card img[src^='data:image/jpeg']")
        assert page.locator("#running progress").evaluate("e => e.value") > 0
        words = page.locator("#running .state").inner_text()
        assert "of 60, both" in words and "left" in words
        card = page.locator("#gallery .card").first
        card.wait_for()
        page.wait_for_selector("#none-running:visible")
        assert page.locator("#gallery .card img[src^='blob:']").count() >= 1
        card.focus()
        page.keyboard.press("Enter")
        page.wait_for_selector("#clip-facts dd")
        facts = page.locator("#clip-facts").inner_text()
        for word in ("reference", "7", "64x64, 17 frames", "denoise", "cpu", "video_"):
            assert word in facts
        page.wait_for_selector("#clip-video[src^='blob:']")
        expect(page.locator("#clip-video")).to_have_js_property("readyState", 4)
        page.keyboard.press("Escape")
        expect(page.locator("#clip-dialog")).not_to_be_visible()
        assert page.locator("#gallery .card:focus").count() == 1  # where it was opened


def test_the_plan_is_drawn_and_priced_before_it_runs(browser, address):
    with Watched(browser, address) as page:
        page.wait_for_selector("#plan-a svg")
        assert steps_drawn(page) == 10
        assert page.locator("#plan-a rect.small").count() == 6
        assert page.locator("#plan-a rect.large").count() == 4
        caption = page.locator("#plan-a figcaption")
        assert "10 steps, about" in caption.inner_text()
        assert "timestep 999" in page.locator("#plan-a rect.small title").first.text_content()
        page.fill("#plan", "handoff=0.5")
        page.fill("#num_inference_steps", "12")
        expect(page.locator("#plan-a rect:not(.other)")).to_have_count(12)
        assert page.locator("#plan-a rect.bridge").count() >= 1
        page.fill("#plan", "fast")
        expect(caption).to_contain_text("unknown plan 'fast'")
        page.fill("#plan_b", "large")
        expect(page.locator("#plan-b rect.large")).to_have_count(12)


def test_cancel_and_a_reload_in_between(browser, address):
    with Watched(browser, address) as page:
        page.wait_for_selector("#plan-a svg")
        page.fill("#prompt", PROMPT)
        page.fill("#plan", "reference")
        page.fill("#num_inference_steps", "900")
        page.click("#go")
        page.wait_for_selector("#running .card img[src^='data:']")
        page.reload()
        page.wait_for_selector("#running .card img[src^='data:']")
        page.get_by_role("button", name="Cancel").click()
        page.wait_for_selector("#running .state:text('cancelled')")
        assert page.locator("#running progress").count() == 0


def test_two_plans_side_by_side_on_one_seed(browser, address):
    with Watched(browser, address) as page:
        page.wait_for_selector("#plan-a svg")
        page.fill("#prompt", PROMPT)
        page.fill("#plan", "small")
        page.fill("#plan_b", "large")
        page.click("#go")
        for i in (1, 2):
            page.wait_for_selector(f"#pair .card:nth-child({i}) video[src^='blob:']")
        expect(page.locator("#pair .state").nth(1)).to_contain_text("seed")
        expect(page.locator("#pair .state").nth(0)).to_contain_text("seed")
        words = page.locator("#pair .state").all_inner_texts()
        assert words[0].startswith("small:") and words[1].startswith("large:")
        seeds = {text.rpartition("seed ")[2] for text in words}
        assert len(seeds) == 1 and seeds.pop().isdigit()
        for i in range(2):
            video = page.locator("#pair video").nth(i)
            expect(video).to_have_js_property("readyState", 4)
        page.click("#together")
        moving = page.locator("#pair video")
        wait_for(lambda: all(moving.nth(i).evaluate("e => !e.paused") for i in range(2)))


def test_what_is_wrong_is_said_beside_the_button(browser, address):
    with Watched(browser, address) as page:
        page.wait_for_selector("#plan-a svg")
        page.click("#go")
        assert page.locator("#prompt:invalid").count() == 1  # it is required
        page.fill("#prompt", PROMPT)
        page.fill("#size", "65x64")
        page.click("#go")
        alert = page.get_by_role("alert")
        expect(alert).to_contain_text("multiple of 16, such as 64 or 80")
        assert page.locator("#size[aria-invalid='true']").count() == 1
        page.fill("#size", "64x64")
        page.click("#go")
        expect(alert).to_be_empty()


def test_hostile_prompts_are_text(browser, tmp_path):
    hostile = "</p><img src=x onerror=alert(1)><script>alert(2)</script>"
    with fake(tmp_path, FakeRunner(steps=400, seconds=0.01)) as (address, _, _):  # noqa: SIM117
        with Watched(browser, address) as page:
            page.wait_for_selector("#plan-a svg")
            page.fill("#prompt", hostile)
            page.click("#go")
            page.wait_for_selector("#running .card .prompt")
            assert page.locator("#running .prompt").inner_text() == hostile
            assert page.locator("img[src='x']").count() == 0
            page.get_by_role("button", name="Cancel").click()


def test_a_server_with_keys_asks_for_one(browser, tmp_path):
    with fake(tmp_path, api_keys=("a-key-of-ours",)) as (address, _, _):  # noqa: SIM117
        with Watched(browser, address) as page:
            for key in ("not-this-one", "a-key-of-ours"):
                page.wait_for_selector("#key-dialog[open]")
                page.fill("#key", key)
                page.keyboard.press("Enter")
            page.wait_for_selector("#plan-a svg")
            page.fill("#prompt", PROMPT)
            page.click("#go")
            page.wait_for_selector("#gallery .card")


def test_narrow_screens_and_labels(browser, address):
    for width in (320, 375, 768):
        with Watched(browser, address) as page:
            page.set_viewport_size({"width": width, "height": 700})
            page.wait_for_selector("#plan-a svg")
            assert page.locator("html").evaluate("e => e.scrollWidth") <= width
            for field in page.locator("input, textarea, select, button:not(.card)").all():
                name = field.evaluate("e => e.labels?.length || e.textContent.trim().length")
                assert name, field
                box = field.bounding_box()
                if box is not None:
                    assert box["x"] >= 0 and box["x"] + box["width"] <= width + 0.5
            page.wait_for_selector("#gallery .card")
            page.locator("#gallery .card").first.click()
            page.wait_for_selector("#clip-facts dd")
            box = page.locator("#clip-dialog").bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= width
            page.click("#clip-close")


def test_deleting_and_using_settings_again(browser, address):
    with Watched(browser, address) as page:
        page.wait_for_selector("#gallery .card")
        before = page.locator("#gallery .card").count()
        page.locator("#gallery .card").first.click()
        page.wait_for_selector("#clip-facts dd")
        page.click("#clip-again")
        assert page.locator("#prompt").input_value() == PROMPT
        assert page.locator("#seed").input_value().isdigit()
        page.locator("#gallery .card").first.click()
        page.wait_for_selector("#clip-facts dd")
        page.click("#clip-delete")
        expect(page.locator("#gallery .card")).to_have_count(before - 1)
