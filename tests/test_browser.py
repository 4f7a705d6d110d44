"""The built site in a real browser: Debian's Chromium, driven by Playwright, with axe-core for accessibility.

The tests are skipped, with the reason, where Playwright or Chromium is not installed.
"""

import re
import shutil
from pathlib import Path
from urllib.parse import urlencode

import cells
import pytest
import yaml
from _ext import website

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python")

ROOT = Path(__file__).resolve().parent.parent
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text())
PAGES = [TOC["root"], *(entry["file"] for part in TOC["parts"] for entry in part["chapters"])]
WEIGHT = 1_500_000  # bytes of a page with all that it loads, uncompressed, before pictures
each_page = pytest.mark.parametrize("page", [*PAGES, "genindex", "search"])

# Query -> the page that has to stand first. A page that is added to the book brings its names.
SEARCHES = {
    "DLG": "book/dlg",
    "deep leakage from gradients": "book/dlg",
    "Zhu": "book/dlg",
    "ligeng zhu dlg": "book/dlg",
    "iDLG": "book/idlg",
    "improved deep leakage": "book/idlg",
    "Zhao": "book/idlg",
    "label inference": "book/idlg",
    "inverting gradients": "book/inverting_gradients",
    "Geiping": "book/inverting_gradients",
    "geiping cosine": "book/inverting_gradients",
    "cosine similarity": "book/inverting_gradients",
    "bias ratio": "book/closed_form",
    "R-GAP": "book/layer_by_layer",
    "Phong": "book/closed_form",
    "closed form": "book/closed_form",
    "lenet": "book/models_and_data",
    "resnet": "book/models_and_data",
    "vision transformer": "book/models_and_data",
    "ViT": "book/models_and_data",
    "CIFAR-10": "book/models_and_data",
    "imagenet": "book/models_and_data",
    "PSNR": "book/metrics",
    "LPIPS": "book/metrics",
    "threat model": "book/inverse_problem",
    "FedAvg": "book/federated",
    "local steps": "book/federated",
    "leaderboard": "book/leaderboard",
    "which attack is best": "book/survey",
    "glossary": "book/notation",
    "how to run": "book/how_to",
    "gi_lib.metrics": "book/api",
}


@pytest.fixture(scope="module")
def chromium():
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium, origin):
    """Opens a page of the site in a fresh profile; keyword arguments go to the browser's context."""
    contexts = []

    def opened(name, **options):
        contexts.append(chromium.new_context(**options))
        tab = contexts[-1].new_page()
        tab.goto(f"{origin}/{name}", wait_until="networkidle")
        return tab

    yield opened
    for context in contexts:
        context.close()


@each_page
def test_page_loads_lightly_without_errors_or_outside_requests(chromium, origin, page):
    """Pictures are what is served as an image and what stands in the page as a data: address of one."""
    context = chromium.new_context()
    tab = context.new_page()
    errors, outside, responses = [], [], []
    tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("request", lambda request: outside.append(request.url))
    tab.on("response", lambda response: responses.append(response))
    tab.goto(f"{origin}/{page}.html", wait_until="networkidle")
    assert errors == []
    assert [url for url in outside if not url.startswith((origin + "/", "data:", "blob:"))] == []
    served = {r.url: int(r.headers.get("content-length", 0)) for r in responses if r.url.startswith(origin)}
    pictures = [r.url for r in responses if r.headers.get("content-type", "").startswith("image/")]
    text = next(r for r in responses if r.url == f"{origin}/{page}.html").text()
    embedded = sum(len(data) for data in re.findall(r"data:image/[^\"')]*", text))
    weight = sum(size for url, size in served.items() if url not in pictures) - embedded
    assert 100_000 < weight < WEIGHT, sorted(served.items(), key=lambda item: -item[1])[:8]
    assert not [url for url in served if "vendor/fontawesome" in url], "an icon is missing in website.ICONS"
    formulas = tab.locator(".math.notranslate")
    assert formulas.count() == tab.locator(".math.notranslate > .katex, .math.notranslate > .katex-display").count()
    assert tab.locator(".katex-error").count() == 0
    context.close()


@each_page
def test_page_fits_a_phone(open_page, page):
    tab = open_page(f"{page}.html", viewport={"width": 390, "height": 844})
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390


WIDE = """() => [...document.querySelectorAll("article table")]
  .filter(table => table.checkVisibility() && table.scrollWidth > table.parentElement.clientWidth + 1)
  .map(table => table.innerText.slice(0, 80))"""
CODE = """() => {
  const tall = element => element.getBoundingClientRect().height, article = document.querySelector("article");
  const code = [...article.querySelectorAll("div.highlight")].filter(element => element.checkVisibility());
  return code.reduce((sum, element) => sum + tall(element), 0) / tall(article);
}"""


@each_page
def test_no_table_is_wider_than_its_column(open_page, page):
    tab = open_page(f"{page}.html", viewport={"width": 1400, "height": 900})
    folded = "article details:not(table details)"  # a BibTeX entry in a cell is wide, and closed until it is asked for
    tab.evaluate("folded => document.querySelectorAll(folded).forEach(details => { details.open = true; })", folded)
    assert tab.evaluate(WIDE) == []


@pytest.mark.parametrize("page", [page for page in PAGES if (ROOT / f"{page}.ipynb").exists()])
def test_code_takes_a_quarter_of_a_chapter_at_most(open_page, page):
    tab = open_page(f"{page}.html", viewport={"width": 1400, "height": 900})
    assert tab.evaluate(CODE) <= 0.25


@pytest.mark.parametrize(
    "page", ["closed_form", "layer_by_layer", "dlg", "idlg", "inverting_gradients", "survey", "exposed"]
)
def test_what_came_out_stands_on_the_first_screen(open_page, page):
    tab = open_page(f"book/{page}.html", viewport={"width": 1400, "height": 900})
    first = tab.locator("article :is(.gi-pictures, .gi-slider, table.gi-grid) img").first
    assert first.bounding_box()["y"] < 900 - 96


def findings(tab, options=None):
    """Serious and critical findings of axe-core: rule, target, element. Not in listings, which are long: see below."""
    result = axe.Axe().run(tab, context={"exclude": [["div.highlight"]]}, options=options or {})
    return [
        (rule["id"], str(node["target"]), node["html"][:120])
        for rule in result.response["violations"]
        if rule["impact"] in ("serious", "critical")
        for node in rule["nodes"]
    ]


@each_page
def test_page_is_accessible(open_page, page):
    assert findings(open_page(f"{page}.html")) == []


@each_page
def test_colours_of_a_dark_page_can_be_told_apart(open_page, page):
    tab = open_page(f"{page}.html", color_scheme="dark")
    assert tab.evaluate("document.documentElement.dataset.theme") == "dark"
    assert findings(tab, {"runOnly": {"type": "rule", "values": ["color-contrast"]}}) == []


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_listings_are_readable(open_page, mode):
    tab = open_page("book/how_to.html", color_scheme=mode)
    result = axe.Axe().run(tab, options={"runOnly": {"type": "rule", "values": ["color-contrast"]}})
    assert tab.locator("div.highlight").count() > 0 and result.response["violations"] == []


def test_button_switches_between_dark_and_light_and_is_remembered(open_page):
    tab = open_page("book/preface.html", color_scheme="light")
    colours = {}
    for _ in range(3):  # auto, then each of the two
        tab.locator(".theme-switch-button:visible").first.click()
        theme = tab.evaluate("document.documentElement.dataset.theme")
        colours[theme] = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert set(colours) == {"light", "dark"} and colours["light"] != colours["dark"]
    while tab.evaluate("document.documentElement.dataset.theme") != "dark":
        tab.locator(".theme-switch-button:visible").first.click()
    tab.reload()
    assert tab.evaluate("document.documentElement.dataset.theme") == "dark"


def test_slider_moves_through_the_iterations(open_page):
    tab = open_page("book/dlg.html")
    slider = tab.locator(".gi-slider").first
    handle = slider.locator("input[type=range]")
    before = handle.input_value(), slider.locator(".gi-now").inner_text(), slider.screenshot()
    handle.press("Home")
    after = handle.input_value(), slider.locator(".gi-now").inner_text(), slider.screenshot()
    assert all(a != b for a, b in zip(before, after, strict=True))


def test_explorer_filters_as_one_types(open_page):
    tab = open_page("book/explorer.html")
    count = tab.locator("#gi-explorer [role=status]").first
    everything = int(re.search(r"[\d,]+", count.inner_text())[0].replace(",", ""))
    tab.locator("#gi-explorer input[type=search]").first.fill("no such record")
    sync_api.expect(count).not_to_contain_text(re.compile(rf"^{everything:,} "))
    tab.locator("#gi-explorer input[type=search]").first.fill("")
    sync_api.expect(count).to_contain_text(f"{everything:,} of")


@pytest.fixture(scope="module")
def searching(chromium):
    """A tab for searches. The search fetches each page that it lists to quote from it: not here."""
    context = chromium.new_context()
    tab = context.new_page()
    quote = '<div role="main"></div>'
    tab.route("**/*.html", lambda r: r.fulfill(body=quote) if r.request.resource_type == "fetch" else r.continue_())
    yield tab
    context.close()


@pytest.mark.parametrize(("query", "page"), SEARCHES.items(), ids=SEARCHES)
def test_search_finds_the_right_page_first(searching, origin, query, page):
    searching.goto(f"{origin}/search.html?{urlencode({'q': query})}", wait_until="domcontentloaded")
    first = searching.locator("#search-results ul.search li a").first
    first.wait_for()
    assert first.get_attribute("href").split("#")[0] == f"{page}.html"


def test_wrong_address_gets_a_page_at_any_depth(chromium, site):
    """As GitHub Pages serves it: below /NAME/, and 404.html for whatever is not there."""
    base = website.public_address(cells.address())
    context = chromium.new_context()
    tab = context.new_page()

    def serve(route):
        path = site / route.request.url.split("?")[0].removeprefix(base)
        there = route.request.url.startswith(base) and path.is_file()
        route.fulfill(path=path if there else site / "404.html", status=200 if there else 404)

    tab.route("**/*", serve)
    for wrong in ("nothing", "book/nothing.html", "a/b/c/nothing/"):
        assert tab.goto(base + wrong).status == 404
        tab.get_by_role("link", name="DLG", exact=False).first.click()
        assert "DLG" in tab.locator("h1").first.inner_text() and tab.url == f"{base}book/dlg.html"
    tab.goto(base + "a/b/nothing")
    tab.locator("input[name=q]").fill("geiping")
    tab.keyboard.press("Enter")
    tab.locator("#search-results li a").first.click()
    assert tab.url.startswith(f"{base}book/inverting_gradients.html")
    context.close()
