"""What the package says of itself."""

from importlib.metadata import metadata
from pathlib import Path

import yaml

import coconv_surgery

ROOT = Path(__file__).parents[1]


def test_the_version_is_one_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert coconv_surgery.__version__ == metadata("coconv-surgery")["Version"] == citation["version"]
