"""The documentation runs: every block of every page, the API reference, the notebooks.

The blocks of a page run in order, in one namespace and one empty folder in which ``configs/`` lies. A ``text`` block
behind one that prints is its output; "…" in it stands for anything. With a comment ``<!-- not run: why -->`` above it,
Python is compiled and commands are parsed. Weights that timm would download are random ones.
"""

import contextlib
import importlib.util
import io
import re
import shlex
import sys
from importlib.metadata import metadata
from pathlib import Path
from unittest.mock import patch

import click
import notebooks
import pytest
import timm.models._builder
from click.testing import CliRunner
from mmengine.config import Config
from mmengine.registry import DefaultScope
from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser

import coconv_surgery
from coconv_cli.app import app
from coconv_surgery.mmdet.building import build_detector

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = {
    "needs several processes",
    "needs a place on the hub",
    "needs ultralytics",
    "needs a compiler",
    "takes minutes",
}
MARK = re.compile(r"<!-- not run: (.+?) -->\n+\Z")


def reason(example):
    """Why a block is not run, or None."""
    mark = MARK.search(example.document.text[: example.start])
    if mark is None:
        return None
    assert mark[1] in NOT_RUN, f"{mark[1]!r} is not among the reasons: {sorted(NOT_RUN)}"
    return mark[1]


def python(example):
    """Run Python; what it prints is kept for the text behind it. What begins with a base is a config, and is built."""
    source = str(example.parsed)
    code = compile("\n" * (example.line + example.parsed.line_offset) + source, example.path, "exec")
    if reason(example):
        return
    if source.startswith("_base_"):
        build_config(source)
        return
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, example.namespace)
    example.namespace["printed"] = printed.getvalue()


def build_config(source):
    """The model of a config builds, if it has one of its own."""
    Path("page.py").write_text(source)
    with DefaultScope.overwrite_default_scope("mmdet"):
        config = Config.fromfile("page.py")
        build_detector(config.model)


def text(example):
    """Compare with what the block before has printed, if it has printed anything."""
    printed = example.namespace.pop("printed", "")
    if printed:
        parts = [re.escape(part.strip()) for part in str(example.parsed).split("…")]
        assert re.fullmatch(r"[\s\S]*".join(parts), printed.strip()), f"it prints\n{printed}"


def console(example):
    """Run each command, or parse it; its output is kept as Python's is."""
    why = reason(example)
    printed = ""
    for line in str(example.parsed).splitlines():
        if line.startswith("$ "):
            program, *arguments = shlex.split(line[2:], comments=True)
            printed += CHECKS[program](arguments, why) or ""
    example.namespace["printed"] = printed


def command(arguments, why):
    """A command of ours."""
    if why is None:
        main, path = sys.modules["__main__"], [*sys.path]  # which a script that is run changes
        try:
            result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        finally:
            sys.modules["__main__"], sys.path[:] = main, path
        assert result.exit_code == 0, result.output
        return result.output
    context = click.Context(app, info_name="coconv")
    name, found, rest = app.resolve_command(context, arguments)
    with patch.object(click.Path, "convert", lambda self, value, *_: Path(value)):  # which need not exist
        found.make_context(name, rest, parent=context)
    return None


def pip(arguments, why):
    """An installation: its extras exist."""
    extras = set(metadata("coconv-surgery").get_all("Provides-Extra"))
    assert arguments[0] == "install"
    for argument in arguments[1:]:
        for asked in re.findall(r"\[(.+)\]", argument):
            assert set(asked.split(",")) <= extras, argument


def make(arguments, why):
    """A target of the Makefile."""
    assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(), re.M), arguments


def module(arguments, why):
    """A module that Python finds."""
    at = arguments.index("-m") if "-m" in arguments else None
    if at is None:
        assert why, f"it names no module: {arguments}"
    elif arguments[at + 1] == "coconv_surgery":
        command(arguments[at + 2 :], why)
    else:
        assert importlib.util.find_spec(arguments[at + 1]), arguments


CHECKS = {"coconv": command, "pip": pip, "make": make, "python": module, "torchrun": module}
BLOCKS = Sybil(
    parsers=[
        CodeBlockParser("python", python),
        CodeBlockParser("text", text),
        CodeBlockParser("console", console),
    ]
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.setattr(sys, "argv", sys.argv)  # both of which `coconv run` sets for its script
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(timm.models._builder, "load_pretrained", lambda *args, **kwargs: None)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_a_page_runs(page, folder):
    for example in BLOCKS.parse(page).examples():
        example.evaluate()


def test_every_block_is_of_a_kind_that_runs():
    for page in PAGES:
        kinds = re.findall(r"^```([^`\n]+)$", page.read_text(), re.M)
        directives = {kind for kind in kinds if kind.startswith("{")}
        assert set(kinds) - directives <= {"python", "text", "console", "bibtex"}, page


def test_the_api_reference_has_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text()
    listed = re.findall(r"^\.\. auto\w+:: coconv_surgery\.(\w+)$", page, re.M)
    assert sorted(listed) == sorted(coconv_surgery.__all__)


@pytest.mark.long
@pytest.mark.parametrize("page", notebooks.PAGES, ids=lambda page: page.stem)
def test_a_notebook_runs(page):
    cells = notebooks.execute(page).cells
    assert any(cell.get("outputs") for cell in cells)


@pytest.mark.parametrize("page", notebooks.PAGES, ids=lambda page: page.stem)
def test_a_notebook_shows_its_outputs_in_order(page):
    counts = [cell.execution_count for cell in notebooks.read(page).cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
