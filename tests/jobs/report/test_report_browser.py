"""The report in a real browser: it fetches and runs nothing from outside, and works by mouse and by keyboard."""

import shutil

import pytest
from rich.console import Console

from blocksight.jobs.evaluate.compare import Output
from blocksight.jobs.plan.plan import existing_plan
from blocksight.jobs.report.page import REPORT_KEY, write_report
from blocksight.storage.stores.local import LocalStore
from tests.jobs.audits import audited
from tests.jobs.jobs_of import run_here
from tests.jobs.side_products import OF_METHODS, blocks, with_products
from tests.jobs.tiny import HOSTILE, folder_of_images, hostile_table

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
WIDTHS = {"phone": (375, 800), "desktop": (1280, 900)}


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("neither chromium nor google-chrome is on PATH")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as runner:
        arguments = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-quic"]
        started = runner.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield started
        started.close()


def written(folder, text):
    store = LocalStore(folder)
    audited(store, text=text)
    write_report(Output(str(folder), store, existing_plan(store)), None, Console(quiet=True))
    return f"file://{folder / REPORT_KEY}"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A report with several maps of several classes."""
    root = tmp_path_factory.mktemp("plain")
    run_here(folder_of_images(root / "in", 9), root / "out", target="top-2", explainer="gradcam")
    return written(root / "out", "in words")


@pytest.fixture(scope="module")
def hostile_address(tmp_path_factory):
    """A report whose texts are all attacks, or very long."""
    root = tmp_path_factory.mktemp("hostile")
    run_here(hostile_table(root / "in"), root / "out", explainer="gradcam", model="tests.jobs.tiny:make_hostile")
    return written(root / "out", " ".join(HOSTILE) + "x" * 500)


@pytest.fixture(scope="module")
def beside_address(tmp_path_factory):
    """A report of maps with all side products."""
    root = tmp_path_factory.mktemp("beside")
    run_here(folder_of_images(root / "in", 9), root / "out", target="top-2", explainer="gradcam")
    with_products(LocalStore(root / "out"), *OF_METHODS, accumulated_maps=blocks(12))
    return written(root / "out", "in words")


class Watched:
    """An open page; notes console messages and requests."""

    def __init__(self, page):
        self.page, self.troubles = page, []
        page.on("console", lambda message: self.troubles.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: self.troubles.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (self.troubles.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on("request", self._requested)

    def _requested(self, request):
        if not request.url.startswith("data:") and request.url.split("#")[0] != self.address:
            self.troubles.append(f"request: {request.url}")

    def open(self, address):
        self.address = address
        self.page.goto(address)
        return self.page


@pytest.fixture
def watched(browser):
    """Fails the test if the page wrote to the console or requested anything."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, color_scheme="light")
    made = Watched(context.new_page())
    yield made
    context.close()
    assert made.troubles == []


def visible(page):
    return page.locator(".item:visible")


def zoomed(page):
    """The title of the open dialog and the visible side."""
    assert page.locator("dialog[open]").count() == 1
    side = page.locator(".sides img.chosen")
    assert side.evaluate("own => own.naturalWidth") > 0
    return page.locator("#zoom-title").inner_text(), side.get_attribute("data-side")


@pytest.mark.parametrize(
    ("scheme", "size"),
    [
        ("light", "phone"),
        ("dark", "desktop"),
        pytest.param("light", "desktop", marks=pytest.mark.sweep),
        pytest.param("dark", "phone", marks=pytest.mark.sweep),
    ],
)
@pytest.mark.parametrize("which", ["address", "hostile_address", "beside_address"])
def test_it_opens_without_console_messages_and_nothing_overflows(watched, request, which, size, scheme):
    width, height = WIDTHS[size]
    watched.page.set_viewport_size({"width": width, "height": height})
    watched.page.emulate_media(color_scheme=scheme)
    page = watched.open(request.getfixturevalue(which))
    page.locator(".chip", has_text="All").click()
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert page.evaluate("[...document.images].every(own => own.complete && own.naturalWidth > 0)")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    dark = sum(map(int, background.removeprefix("rgb(").removesuffix(")").split(","))) < 384
    assert dark == (scheme == "dark")
    visible(page).first.locator("button").click()
    assert page.evaluate("(own => own.scrollWidth <= own.clientWidth)(document.querySelector('dialog'))")
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_hostile_names_are_read_and_not_run(watched, hostile_address):
    page = watched.open(hostile_address)
    page.locator(".chip", has_text="All").click()
    for number in range(visible(page).count()):
        visible(page).nth(number).locator("button").click()
        zoomed(page)
        page.keyboard.press("Escape")
    for text in HOSTILE[:5]:
        page.locator("#text-filter").fill(text)
        assert visible(page).count() >= 1
    for text in ("\u202egnp.EXE\u202c \x1b[31m", "\\x1b[31m"):  # as it is, and as it is shown
        page.locator("#text-filter").fill(text)
        assert visible(page).count() == 2  # one record has it for its key, another for its label
    page.locator("#text-filter").fill("\u202dgnp")
    assert visible(page).count() == 0
    assert page.locator("main script, main style, main svg [onload], dialog script").count() == 0
    assert page.title() == "in - blocksight report"


def test_the_policy_stops_what_a_page_is_not_made_of(browser, address):
    page = browser.new_page()
    page.goto(address)
    refused = []
    page.on("console", lambda message: refused.append(message.text))
    ran = page.evaluate(
        """() => new Promise(done => {
            const script = document.createElement("script");
            script.textContent = "window.ran = true";
            document.body.append(script);
            const image = new Image();
            image.onload = () => done("loaded");
            image.onerror = () => done(Boolean(window.ran));
            image.src = "file:///etc/hostname";
        })"""
    )
    page.close()
    assert ran is False
    assert len([text for text in refused if "Content Security Policy" in text]) == 2


def test_the_galleries_filter_by_kind_class_and_text(watched, address):
    page = watched.open(address)
    num_maps = page.locator(".item").count()
    random = page.locator(".chip", has_text="Random")
    assert random.get_attribute("aria-pressed") == "true"
    page.locator(".chip", has_text="Findings").click()
    assert visible(page).count() == 1
    assert random.get_attribute("aria-pressed") == "false"
    assert page.locator("#shown").inner_text() == f"1 of {num_maps} maps."
    page.locator(".chip", has_text="All").click()
    assert visible(page).count() == num_maps
    chosen = page.locator("#class-filter option").nth(1)
    page.locator("#class-filter").select_option(chosen.get_attribute("value"))
    captions = {caption.inner_text() for caption in visible(page).locator(".caption").all()}
    assert captions == {chosen.inner_text()}
    assert 0 < visible(page).count() < num_maps
    page.locator("#class-filter").select_option("")
    page.locator("#text-filter").fill("BEE/001")
    assert visible(page).count() == 2  # one record, two targets
    page.locator("#text-filter").fill("no such thing")
    assert visible(page).count() == 0
    assert page.locator(".empty").is_visible()


def test_a_map_is_zoomed_by_mouse(watched, address):
    page = watched.open(address)
    first = visible(page).first
    first.locator("button").click()
    name = first.locator(".caption").inner_text()
    assert zoomed(page) == (name, "overlay")
    for view in ("image", "map", "overlay"):
        page.locator(f"[data-view={view}]").click()
        assert zoomed(page)[1] == view
        assert page.locator(f"[data-view={view}]").get_attribute("aria-pressed") == "true"
    assert page.locator(".zoom-facts dt", has_text="record").count() == 1
    page.locator("#zoom-after").click()
    assert page.locator("#zoom-count").inner_text().startswith("2 of ")
    page.locator("#zoom-before").click()
    page.locator("#zoom-before").click()
    assert page.locator("#zoom-count").inner_text() == f"{visible(page).count()} of {visible(page).count()}."
    page.locator("#zoom-close").click()
    assert page.locator("dialog[open]").count() == 0
    first.locator("button").click()
    page.mouse.click(5, 5)
    assert page.locator("dialog[open]").count() == 0


def test_all_is_reached_by_keyboard(watched, address):
    page = watched.open(address)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.locator(".skip").bounding_box()["x"] >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "content"
    visible(page).first.locator("button").focus()
    page.keyboard.press("Enter")
    assert zoomed(page)[1] == "overlay"
    page.locator("[data-view=map]").focus()
    page.keyboard.press("Space")
    page.keyboard.press("ArrowRight")
    assert page.locator("#zoom-count").inner_text().startswith("2 of ")
    assert zoomed(page)[1] == "map"  # the view stays
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0
    second = visible(page).nth(1).locator("button")
    page.wait_for_function("own => own === document.activeElement", arg=second.element_handle())
    page.keyboard.press("Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_a_findings_maps_open_beside_each_other(watched, address):
    page = watched.open(address)
    peek = page.locator("#findings .peek").first
    assert peek.locator("img").evaluate("own => own.naturalWidth") > 0
    peek.focus()
    page.keyboard.press("Enter")
    assert page.locator("#zoom-count").inner_text() == "1 of 1."


def test_what_was_found_beside_maps_is_seen_and_leads_to_them(watched, beside_address):
    page = watched.open(beside_address)
    page.locator(".top nav a", has_text="Side products").click()
    assert page.locator("#products .film").count() == 6 * 5
    film = page.locator("#products .film:not(.single)").first
    tops = film.locator("li").evaluate_all("all => all.map(own => own.offsetTop)")
    assert (len(tops), len(set(tops))) == (12, 1)  # twelve blocks fit abreast
    assert page.locator("#products img:not([alt])").count() == 0
    peek = page.locator("#products .peek").first
    peek.focus()
    page.keyboard.press("Enter")
    assert page.locator(".zoom-facts dt", has_text="scan path").count() == 1
    page.keyboard.press("Escape")
    page.emulate_media(media="print")
    assert film.is_visible()


def test_the_theme_is_toggled(watched, address):
    page = watched.open(address)
    button = page.locator("#theme")
    colour = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(colour)
    assert button.inner_text() == "Dark theme"  # what the button gives, not what is shown
    button.click()
    assert button.inner_text() == "Light theme"
    assert page.evaluate(colour) != light
    button.press("Enter")
    assert page.evaluate(colour) == light
    page.emulate_media(color_scheme="dark")
    watched.open(address)
    assert button.inner_text() in ("Light theme", "Dark theme")
    assert (button.inner_text() == "Light theme") == (page.evaluate(colour) != light)


def test_wrong_predictions_are_marked_and_filtered(watched, address):
    page = watched.open(address)
    page.locator(".chip", has_text="All").click()
    verdicts = {item.get_attribute("data-verdict") for item in page.locator(".item").all()}
    assert verdicts >= {"right", "wrong"}
    for verdict in ("right", "wrong"):
        page.locator("#verdict-filter").select_option(verdict)
        shown = visible(page)
        assert {item.get_attribute("data-verdict") for item in shown.all()} == {verdict}
        assert shown.locator(".wrong").count() == (shown.count() if verdict == "wrong" else 0)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_metrics_are_one_table_on_a_phone(watched, address, width):
    watched.page.set_viewport_size(dict(zip(("width", "height"), WIDTHS[width], strict=True)))
    page = watched.open(address)
    is_phone = width == "phone"
    assert page.locator(".metric-table").is_visible() == is_phone
    assert page.locator("article.metric").first.is_visible() != is_phone
    rows = page.locator(".metric-table tbody tr")
    assert rows.count() == page.locator("article.metric").count() > 0
    assert all(row.locator("td").count() == page.locator(".metric-table thead th").count() - 1 for row in rows.all())


def test_nothing_moves_while_it_loads(watched, address):
    watched.page.add_init_script(
        "window.moved = 0; new PerformanceObserver(list => { for (const one of list.getEntries()) "
        "window.moved += one.value; }).observe({ type: 'layout-shift', buffered: true });"
    )
    page = watched.open(address)
    page.wait_for_function("document.documentElement.classList.contains('ready')")
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert page.evaluate("window.moved") < 0.01  # of the window; a busy machine may draw the page in two steps


def test_without_scripts_every_map_is_there(browser, address):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(address)
    assert visible(page).count() == page.locator(".item").count() > 0
    assert not page.locator("#theme, .controls").first.is_visible()
    context.close()


def test_it_prints_in_black_on_white_without_controls(watched, address):
    page = watched.open(address)
    page.locator("#theme").click()
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "light"
    assert not page.locator(".controls, .top").first.is_visible()
