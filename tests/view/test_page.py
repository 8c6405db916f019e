"""The viewer in a headless Chromium: open, filter, follow links by hand and by key, and see the right numbers. No request leaves."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("PACKAGE_PYTHON", sys.executable)
"""Of the environment that has the package; this one has the browser's driver."""
WAIT_S = 60


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("view") / "run"
    paths = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    subprocess.run([PYTHON, "-m", "support.view_run", str(folder)], check=True, env=paths, cwd=ROOT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [PYTHON, "-m", "nemo_pivotrl.cli", "view", str(folder), "--port", str(port)]
    with subprocess.Popen(command, env=paths, cwd=ROOT) as server:
        try:
            where, end = f"http://127.0.0.1:{port}", time.monotonic() + WAIT_S
            while True:
                try:
                    urllib.request.urlopen(f"{where}/api/run").close()
                    break
                except OSError:
                    assert server.poll() is None and time.monotonic() < end, "the server did not come up"
                    time.sleep(0.1)
            yield where
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def page(address: str) -> Iterator[Page]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    assert chromium, "no chromium: apt-get install chromium"
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        faults: list[str] = []
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: request.url.startswith(address) or faults.append(request.url))
        page.goto(address)
        yield page
        browser.close()
        assert [f for f in faults if "404" not in f] == []  # one test asks for what is not there


def test_a_rejected_sample_is_found_from_the_overview_by_links(page: Page, address: str) -> None:
    page.goto(f"{address}/#/")
    page.get_by_role("link", name="all 0: never accepted").click()
    expect(page.locator("#count")).to_have_text("1 to 1 of 1")
    page.get_by_role("link", name="t1:3").click()
    expect(page.locator(".why")).to_contain_text("Dropped: 0 of 4 samples were accepted")
    expect(page.locator(".sample h3")).to_contain_text("4 ×")
    expect(page.locator(".sample h3")).to_contain_text("NO_TOOL_CALL")
    expect(page.locator(".reason")).to_have_text("The policy talks, or does nothing, where the expert calls a tool.")
    page.locator("#prompt summary").click()
    expect(page.locator("#prompt")).to_contain_text(
        "Not shown: the profile is of a version that did not name its tokenizer's folder"
    )
    page.get_by_role("link", name="trajectory t1").click()
    expect(page.locator("h1")).to_have_text("Trajectory t1")
    expect(page.locator(".badge.pivot")).to_have_count(1)


def test_model_output_stays_text(page: Page, address: str) -> None:
    page.goto(f"{address}/#/turn/t1%3A3")
    expect(page.locator(".sample .diff")).to_contain_text("<img src=x")
    assert page.title() == "nemo-pivotrl view" and page.locator("img").count() == 0


def test_filters_are_in_the_address_and_keys_move_through_the_list(page: Page, address: str) -> None:
    page.goto(f"{address}/#/turns")
    expect(page.locator("#count")).to_have_text("1 to 3 of 3")
    page.keyboard.press("/")
    page.keyboard.type("red chair")
    page.keyboard.press("Enter")
    expect(page.locator("#count")).to_have_text("1 to 1 of 1")
    assert "q=red+chair" in page.url
    page.reload()
    expect(page.locator("input[name=q]")).to_have_value("red chair")
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    expect(page.locator("h1")).to_have_text("Turn t1:1")
    expect(page.locator(".sample").first).to_contain_text("q: the colours differ")
    expect(page.locator(".sample").nth(1)).to_contain_text("accepted by rule letter_case")
    expect(page.locator(".del").first).to_contain_text("blue chair")
    expect(page.locator(".add").first).to_contain_text("red chair")
    page.keyboard.press("u")
    expect(page.locator("#count")).to_have_text("1 to 1 of 1")


def test_token_rewards_and_arms_have_pages(page: Page, address: str) -> None:
    page.goto(f"{address}/#/pair/p1")
    expect(page.locator(".tokens span").first).to_have_attribute("title", "reward 0.900, Delta 0.1000 nats")
    expect(page.locator(".face")).to_have_count(4)
    expect(page.locator(".face span[title]").first).to_have_attribute(
        "title", "probability 0.9048, log-probability -0.1000"
    )
    page.goto(f"{address}/#/prompt/0")
    expect(page.locator(".arm")).to_have_count(2)
    expect(page.locator(".moved").first).to_have_text("so")


def test_an_address_that_is_not_there_says_so(page: Page, address: str) -> None:
    page.goto(f"{address}/#/trajectory/nobody")
    expect(page.locator(".error")).to_contain_text("not here")
