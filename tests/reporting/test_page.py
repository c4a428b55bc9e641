"""The page about one network."""

import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from playwright.sync_api import sync_playwright

import coconv_surgery as cs

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser():
    """A browser of the distribution's packages, without a network."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    assert path, "no Chromium: install your distribution's package chromium (or google-chrome)"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page with everything on it, of a small trained network."""
    from click.testing import CliRunner

    from coconv_cli.app import app

    folder = tmp_path_factory.mktemp("report")
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet").state_dict(), folder / "w.pth")
    (folder / "images").mkdir()
    for number in range(4):
        small = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize((96, 96), Image.Resampling.BICUBIC).save(folder / "images" / f"{number}.png")
    options = ["--weights", folder / "w.pth", "--input-size", 64, "--calibrate", folder / "images", "--time"]
    done = CliRunner().invoke(app, ["report", "test_resnet", *map(str, options), "-o", str(folder / "page.html")])
    assert done.exit_code == 0, done.output
    return folder / "page.html"


def text_of(page):
    found = []
    parser = HTMLParser()
    parser.handle_data = found.append
    parser.feed(page.read_text())
    return " ".join(" ".join(found).split())


def test_it_says_what_was_done_and_measured(page):
    text = text_of(page)
    plan = cs.plan_conversion(timm.create_model("test_resnet"), input_size=64)
    assert f"{len(plan.converted)} of {len(plan.rows)} convolutions are contextual" in text
    assert f"{plan.parameters:,}" in text
    for part in (
        "multiply-adds",
        "time, plain = 1",
        "calibrated on 4 images",
        "Weights: of w.pth, trained in plain convolutions: calibrated",
        "quartiles",
    ):
        assert part in text
    for row in plan.in_question:
        assert row.name in text
    assert "Not measured" not in text


def test_it_needs_no_other_file_and_no_network(page):
    links = re.findall(r"(?:src|srcset|href)=\"([^\"]{0,40})", page.read_text())
    assert links
    assert all(link.startswith("data:image/svg+xml;base64,") for link in links)


def test_it_prints_the_commands_that_make_it_anew(page):
    text = text_of(page)
    given = f"test_resnet --input-size 64 --checkpoint {page.with_name('w.pth')} --calibrate {page.with_name('images')}"
    assert f"coconv report {given} --time --output {page}" in text
    assert f"coconv convert {given} --output converted.safetensors" in text


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_all_of_it(page, browser, scheme, width, tmp_path):
    shown = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=True)
    asked = []
    shown.on("request", lambda request: asked.append(request.url))
    shown.goto(page.as_uri())
    shown.locator("details").evaluate("element => element.open = true")
    assert shown.evaluate("document.documentElement.scrollWidth") <= width, "nothing is cut at the side"
    images = shown.locator("img")
    assert images.count() == 5
    shapes = images.evaluate_all("all => all.map(image => [image.complete, image.naturalWidth, image.clientWidth])")
    assert all(complete and natural > 0 and client > 300 for complete, natural, client in shapes)
    assert not [url for url in asked if not url.startswith(("file:", "data:"))]
    shown.screenshot(path=tmp_path / "shot.png", full_page=True)
    shown.close()
    pixels = np.asarray(Image.open(tmp_path / "shot.png").convert("L"))
    assert (np.median(pixels) < 60) == (scheme == "dark")
    assert len(np.unique(pixels)) > 100, "pictures and text are there"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pictures_and_page_are_of_one_scheme(page, browser, scheme):
    shown = browser.new_page(color_scheme=scheme)
    shown.goto(page.as_uri())
    light, dark = shown.evaluate(
        "[document.querySelector('img').getAttribute('src'), document.querySelector('source').srcset]"
    )
    assert shown.evaluate("document.querySelector('img').currentSrc") == (dark if scheme == "dark" else light)
    shown.close()


def test_what_cannot_be_measured_is_said(coconv, tmp_path):
    (tmp_path / "own.py").touch()
    done = coconv(
        "report", "torchvision/squeezenet1_1", "--input-size", 64, "--exclude", "*", "-o", tmp_path / "p.html"
    )
    assert done.code == 0, done.err
    assert "Not measured (effective receptive fields): no convolution is converted" in text_of(tmp_path / "p.html")


def test_calibration_without_trained_weights_is_refused(coconv, tmp_path):
    done = coconv("report", "test_resnet", "--calibrate", tmp_path, "-o", tmp_path / "page.html")
    assert done.code == 1
    assert "--calibrate needs weights of a plain network" in done.err
    assert not (tmp_path / "page.html").exists()


OWN = """
import timm

def trained():  # as far as its norms tell
    return timm.create_model("test_resnet", zero_init_last=False)

def untrained():
    return timm.create_model("test_resnet")
"""


def test_what_a_factory_makes_may_be_trained(coconv, page, tmp_path, monkeypatch):
    (tmp_path / "own_factories.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    options = ("--calibrate", page.with_name("images"), "--input-size", 64)
    assert coconv("report", "own_factories:trained", *options, "-o", "page.html").code == 0
    assert "those that it was made with" in text_of(tmp_path / "page.html")
    done = coconv("report", "own_factories:untrained", *options, "-o", "page.html")
    assert done.code == 1
    assert "--calibrate needs weights of a plain network" in done.err


def test_calibration_of_a_converted_networks_weights_is_refused(coconv, page, tmp_path):
    cs.save_converted(cs.convert(timm.create_model("test_resnet")), tmp_path / "converted.safetensors")
    options = ("--weights", tmp_path / "converted.safetensors", "--calibrate", page.with_name("images"))
    done = coconv("report", "test_resnet", *options, "-o", tmp_path / "page.html")
    assert done.code == 1
    assert "--calibrate needs weights of a plain network" in done.err


def test_names_are_shown_as_they_are(coconv, tmp_path, monkeypatch):
    (tmp_path / "odd_names.py").write_text(
        "import torch.nn as nn\n"
        "class Odd(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.add_module('a$frac$<b>', nn.Conv2d(3, 8, 3, padding=1))\n"
        "        self.last = nn.Conv2d(8, 4, 1)\n"
        "    def forward(self, x):\n"
        "        return self.last(self.get_submodule('a$frac$<b>')(x))\n"
    )
    monkeypatch.chdir(tmp_path)
    done = coconv("report", "odd_names:Odd", "--input-size", 32, "-o", "page.html")
    assert done.code == 0, done.err
    assert "<td>a$frac$&lt;b&gt;</td>" in (tmp_path / "page.html").read_text()


def test_a_name_of_another_kind_of_file_is_refused_first(coconv, tmp_path):
    done = coconv("report", "test_resnet", "-o", tmp_path / "page.pdf")
    assert done.code == 2
    assert "its name must end in .html or .htm" in done.err


def test_fields_prints_and_draws_before_and_after(coconv, tmp_path):
    done = coconv(
        *("fields", "test_resnet", "--input-size", 64, "--only", "layer1.*"),
        *("--figure", tmp_path / "fields.svg", "--heatmap", tmp_path / "effective.png", "--layer", "layer1.0.conv2"),
    )
    assert done.code == 0, done.err
    assert done.out.splitlines()[2].startswith("layer1.0.conv1")
    assert {path.name for path in tmp_path.iterdir()} == {"fields.svg", "effective.png"}
