"""The pages in a real browser, over a real daemon on the shipped model.

With KEDIT_PICTURES=FOLDER it also takes the documentation's pictures:
    KEDIT_PICTURES=docs/pictures pytest tests/test_serve_browser.py
"""

import base64
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.ui import WebDriverWait
from serve_tools import application, by_daemon

from kedit_daemon import config, shipped
from kedit_daemon.demo.tour import DemoDaemon, load_story
from kedit_daemon.editing.audit import make_thresholds
from kedit_daemon.home import Home, open_database
from memory.db.queries import fetch_facts
from memory.facts import FactState
from policies.edit_site import load_site

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
PICTURES = os.environ.get("KEDIT_PICTURES")
PHONE, DESKTOP = (390, 844), (1100, 800)
PICTURE_BYTES = 150_000
LAYERS = 6  # of the shipped model
FEW, MORE = 3, 16  # facts: a picture wants some history

pytestmark = [
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver"),
    pytest.mark.timeout(400),
    pytest.mark.whole,
]


@contextmanager
def served(home: Home) -> Iterator[str]:
    """The pages on a port of this machine; the address."""
    site = load_site(shipped.MODEL, LAYERS)
    limits = make_thresholds(config.load_config(home.root, {}), site)
    app = application(home, get_thresholds=lambda: limits, ask_both=by_daemon(home))
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


@contextmanager
def chromium() -> Iterator[WebDriver]:
    """A browser without a window, that reaches nothing but this machine."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


class Person:
    """Who looks at the pages."""

    def __init__(self, driver: WebDriver, address: str) -> None:
        self.driver, self.address = driver, address

    def sits_at(self, size: tuple[int, int], dark: bool) -> None:
        width, height = size
        device = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == PHONE}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", device)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def opens(self, path: str) -> None:
        self.driver.get(self.address + path)

    def follows(self, words: str) -> None:
        self._clicks(By.PARTIAL_LINK_TEXT, words)

    def presses(self, words: str) -> None:
        self._clicks(By.XPATH, f"//button[normalize-space()='{words}']")

    def _clicks(self, by: str, value: str) -> None:
        # A page may give way to the next one between being found and being touched.
        wait = WebDriverWait(self.driver, 60, ignored_exceptions=[StaleElementReferenceException])
        wait.until(lambda driver: driver.find_element(by, value).click() or True)

    def reads(self) -> str:
        wait = WebDriverWait(self.driver, 60, ignored_exceptions=[StaleElementReferenceException])
        return wait.until(lambda driver: driver.find_element(By.TAG_NAME, "body").text)

    def sees(self, what: Callable[[str], bool]) -> str:
        return WebDriverWait(self.driver, 60).until(lambda _: what(now := self.reads()) and now)

    def style(self, selector: str, name: str) -> str:
        return self.driver.find_element(By.CSS_SELECTOR, selector).value_of_css_property(name)

    def measures(self, script: str) -> int:
        return int(self.driver.execute_script(f"return {script}"))

    def finds_it_in_order(self) -> None:
        """Nothing sticks out, nothing is too small for a finger, nothing was refused or missing."""
        root = "document.documentElement"
        assert self.measures(f"{root}.scrollWidth - {root}.clientWidth") == 0
        targets = self.driver.find_elements(By.CSS_SELECTOR, "button, nav a, select, input, .go")
        small = [t.accessible_name for t in targets if 0 < t.size["height"] < 44]
        assert small == []
        assert self.driver.get_log("browser") == []  # type: ignore[no-untyped-call]

    def takes_a_picture(self, name: str) -> None:
        if PICTURES is None:
            return
        reply = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
        content = base64.b64decode(reply["data"])
        assert len(content) < PICTURE_BYTES
        Path(PICTURES).mkdir(parents=True, exist_ok=True)
        (Path(PICTURES) / f"{name}.png").write_bytes(content)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DemoDaemon]:
    """A daemon with some facts in the weights and one more beside them."""
    daemon = DemoDaemon(tmp_path_factory.mktemp("browser") / "home")
    facts = load_story().facts
    count = MORE if PICTURES else FEW
    with daemon.run_process():
        for start in range(0, count, 4):
            daemon.drop_facts(facts[start : min(start + 4, count)])
            daemon.send_command("flush")
            if PICTURES:
                daemon.send_command("audit")
        daemon.drop_facts(facts[count : count + 1])
        yield daemon


@pytest.fixture(scope="module")
def person(running: DemoDaemon) -> Iterator[Person]:
    with served(running.home) as address, chromium() as driver:
        yield Person(driver, address)


def moved(home: Home) -> dict[str, Any]:
    """A fact in the weights, which was not stated before."""
    with open_database(home) as conn:
        facts = fetch_facts(conn, FactState.LIVE_WEIGHTS)
    return next(f for f in facts if f["before"] != f["after"])


def dots(person: Person) -> int:
    """How many points the curves have."""
    return len(person.driver.find_elements(By.CSS_SELECTOR, "figure > svg circle"))


def test_a_fact_is_found_and_reverted(person: Person, running: DemoDaemon) -> None:
    """On a phone, in the dark: found, looked at, taken out, and the change is seen everywhere."""
    fact = moved(running.home)
    person.sits_at(PHONE, dark=True)
    person.opens("/norms")
    points = dots(person)
    person.opens("/")
    assert "running" in person.reads()
    person.follows("Facts")
    box = person.driver.find_element(By.ID, "text")
    box.send_keys(fact["subject"].upper(), Keys.ENTER)
    person.sees(lambda page: page.count("→") == 1)
    person.follows(fact["subject"])
    seen = person.sees(lambda page: "Revert this fact" in page)
    assert f"Before\n{fact['before']}\nAfter\n{fact['after']}" in seen
    person.presses("Revert this fact")
    seen = person.sees(lambda page: "Nothing has been changed so far" in page)
    assert f"Before\n{fact['after']}" in seen
    assert "perplexity ratio" in seen
    person.finds_it_in_order()
    person.takes_a_picture("revert-phone-dark")
    person.presses("Take it out")
    person.sees(lambda page: "The daemon has done it" in page)
    person.opens(f"/log?fact={fact['id']}")
    kinds = [kind.text for kind in person.driver.find_elements(By.CLASS_NAME, "kind")]
    assert kinds[:2] == ["fact reverted", "fact live-weights"]
    person.opens("/norms")
    assert dots(person) > points
    assert "reverted by hand" in person.reads()


def test_both_answers_side_by_side(person: Person, running: DemoDaemon) -> None:
    person.sits_at(DESKTOP, dark=False)
    person.opens("/ask")
    fact = load_story().facts[FEW if PICTURES is None else MORE]
    person.driver.find_element(By.ID, "prompt").send_keys(fact.question)
    person.presses("Ask")
    seen = person.sees(lambda page: "Which fact fired" in page)
    assert fact.target in seen
    assert "Of the side memory" in seen
    for size, dark, name in ((DESKTOP, False, "desktop"), (PHONE, True, "phone-dark")):
        person.sits_at(size, dark)
        person.finds_it_in_order()
        person.takes_a_picture(f"ask-{name}")


@pytest.mark.parametrize(
    ("size", "dark", "name"), [(DESKTOP, False, "desktop"), (PHONE, True, "phone-dark")]
)
def test_every_page_fits(person: Person, size: tuple[int, int], dark: bool, name: str) -> None:
    person.sits_at(size, dark)
    person.opens("/facts?state=live-weights")
    paths = {"overview": "/", "norms": "/norms", "log": "/log", "facts": "/facts"}
    first = person.driver.find_element(By.CSS_SELECTOR, ".facts a").get_attribute("href") or ""
    paths["fact"] = first.removeprefix(person.address)
    for page, path in paths.items():
        person.opens(path)
        person.finds_it_in_order()
        person.takes_a_picture(f"{page}-{name}")
    assert person.style("body", "color") != person.style("button.grave", "color")
    light = sum(map(int, person.style(":root", "background-color")[5:].split(",")[:3])) > 380
    assert light is not dark


def test_by_keyboard_alone(person: Person) -> None:
    person.sits_at(DESKTOP, dark=False)
    person.opens("/")
    body = person.driver.find_element(By.TAG_NAME, "body")
    body.send_keys(Keys.TAB)
    skip = person.driver.switch_to.active_element
    assert skip.text == "Skip to the content"
    assert skip.location["y"] >= 0
    skip.send_keys(Keys.ENTER)
    assert person.driver.switch_to.active_element.get_attribute("id") == "main"
    for _ in range(30):
        person.driver.switch_to.active_element.send_keys(Keys.TAB)
        at = person.driver.switch_to.active_element
        assert at.value_of_css_property("outline-style") != "none"
        if at.tag_name == "button" and at.text == "Consolidate":
            break
    else:
        raise AssertionError("the button is not reached")
    at.send_keys(Keys.ENTER)
    person.sees(lambda page: "Nothing has been changed so far" in page)


def test_the_overview_keeps_up(person: Person) -> None:
    """What the script does, without the wait."""
    person.sits_at(DESKTOP, dark=False)
    person.opens("/")
    before = person.driver.find_element(By.ID, "live")
    person.driver.execute_script("return refresh()")
    deadline = time.monotonic() + 20
    while person.driver.find_element(By.ID, "live") == before:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert "Last changes" in person.reads()
