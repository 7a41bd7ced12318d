"""The page in a real browser: pick, draw, look; from this machine alone, and without a word of complaint."""

import gc
import http.client
import os
import shutil
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tfmq.studio.page import LOOPBACK, Studio, find_models, original_of

CHROMIUM = (
    os.environ.get("TFMQ_CHROMIUM")
    or shutil.which("chromium")
    or shutil.which("chromium-browser")
    or shutil.which("google-chrome")
)
PATIENCE = 120_000


def test_models_are_found_where_they_are(quantized: Path, original: Path, tmp_path: Path) -> None:
    assert (
        find_models(quantized) == [str(quantized)] == find_models(quantized.parent)
        and find_models(original) == []
    )
    (tmp_path / "a" / "b").mkdir(parents=True)
    shutil.copytree(quantized, tmp_path / "a" / "b" / "c")
    assert find_models(tmp_path) == [] and find_models(tmp_path / "a") == [str(tmp_path / "a" / "b" / "c")]


def test_the_original_is_found_by_what_a_model_seals(
    quantized: Path, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three models that are known by name, one has another scheduler and one another width."""
    for name in ("mine", "other-scheduler", "wider"):
        shutil.copytree(original, tmp_path / name)
    for path, old, new in (
        ("other-scheduler/model_index.json", "DDIMScheduler", "DDPMScheduler"),
        ("wider/unet/config.json", "16", "32"),
    ):
        text = (tmp_path / path).read_text()
        assert old in text
        (tmp_path / path).write_text(text.replace(old, new))
    monkeypatch.setattr("tfmq.targets.SHELVES", (tmp_path,))
    assert original_of(str(quantized)) == "mine"
    shutil.rmtree(tmp_path / "mine")
    assert (
        original_of(str(quantized)) == original_of(None) == original_of(str(tmp_path / "absent")) == "default"
    )
    shutil.copytree(original, tmp_path / "text")
    assert original_of(None) == "text"


@pytest.fixture(scope="module")
def address(original: Path, quantized: Path) -> Iterator[str]:
    pytest.importorskip("gradio", reason="gradio is not installed; pip install 'tfmq[studio]' has it")
    studio = Studio([str(quantized)], str(original), backend="simulated")
    with warnings.catch_warnings():
        # Gradio and what it stands on deprecate each other's names from release to release.
        warnings.simplefilter("ignore")
        page = studio.launch()
        yield page.local_url
        page.close()
        # Its server leaves an event loop to the collector, which would complain in another test.
        del page
        gc.collect()
    studio.close()


@pytest.mark.skipif(
    CHROMIUM is None,
    reason="no Chromium on the path; install the package chromium, or name one by TFMQ_CHROMIUM",
)
def test_both_images_appear(address: str, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    assert address.startswith(f"http://{LOOPBACK}:")
    complaints: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--headless", "--no-sandbox", "--disable-gpu"], timeout=PATIENCE
        )
        page = browser.new_page(viewport={"width": 1200, "height": 1000})
        page.on(
            "console", lambda message: complaints.append(message.text) if message.type == "error" else None
        )
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request",
            lambda request: (
                None
                if request.url.startswith((address, "data:", "blob:"))
                else complaints.append(request.url)
            ),
        )
        page.goto(address, timeout=PATIENCE)
        check_drawing(page)
        page.screenshot(path=tmp_path / "studio.png")
        browser.close()
    assert complaints == []


def check_drawing(page: Any) -> None:
    """Two images of the size that people can see, each with its time and memory; what cannot be drawn is
    said.
    """
    page.get_by_label("Steps").first.wait_for(timeout=PATIENCE)
    page.get_by_label("Seed").fill("7")
    # Those that the model was calibrated on.
    assert page.get_by_role("spinbutton", name="Steps").input_value() == "3"
    page.get_by_role("button", name="Draw").click()
    page.wait_for_function(
        (
            "document.querySelectorAll('.drawn img').length >= 2 && "
            "document.body.innerText.match(/of memory at most/g)?.length === 2"
        ),
        timeout=PATIENCE,
    )
    sizes = page.evaluate(
        "Promise.all([...document.querySelectorAll('.drawn img')].map(image "
        "=> image.decode().then(() => image.naturalWidth)))"
    )
    assert sizes == [512, 512]
    text = page.inner_text("body")
    assert (
        "backend simulated" in text
        and "was not calibrated" not in text
        and "Full precision" in text
        and "Quantized" in text
    )
    page.get_by_label("Reference").fill("/no/such/model")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Draw").click()
    page.get_by_text("does not exist").wait_for(timeout=PATIENCE)


def test_the_page_answers_its_own_machine_alone(address: str) -> None:
    """Of any page that the user visits, and of a name that somebody lets point here, requests are refused."""
    host = address.removeprefix("http://").rstrip("/")

    def status(**headers: str) -> int:
        connection = http.client.HTTPConnection(host, timeout=60)
        connection.request("GET", "/config", headers=headers)
        found = connection.getresponse().status
        connection.close()
        return found

    assert status() == status(Origin=f"http://{host}") == 200
    assert (
        status(Host="evil.example:7860")
        == status(Origin="http://evil.example")
        == status(Origin="null")
        == 403
    )


def test_a_port_that_is_taken_is_named(original: Path) -> None:
    pytest.importorskip("gradio", reason="gradio is not installed; pip install 'tfmq[studio]' has it")
    with socket.socket() as taken, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        taken.bind((LOOPBACK, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            ValueError, match=f"port {port} of {LOOPBACK} is taken; name a free one with --port"
        ):
            Studio([], str(original)).launch(port=port)
