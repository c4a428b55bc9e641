"""Paths of this project's configs."""

from pathlib import Path


def config_path(name: str) -> Path:
    """Find a config: inside an installed package, or beside it in a checkout.

    Args:
        name: Path below ``configs/``, such as ``"ssd/ssd300_coresnet50_coco.py"``.

    Raises:
        FileNotFoundError: If it is in neither place.

    >>> config_path("ssd/ssd300_coresnet50_coco.py").name
    'ssd300_coresnet50_coco.py'
    """
    package = Path(__file__).parents[1]
    for folder in (package / ".mim" / "configs", package.parent / "configs"):
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(f"found no config {name}, neither in {package / '.mim'} nor beside the package")
