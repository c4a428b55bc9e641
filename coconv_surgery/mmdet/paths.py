"""Where this project's configs are."""

from pathlib import Path


def config_path(name: str) -> Path:
    """Find a config: in the installed package, or beside the package in a checkout.

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
    raise FileNotFoundError(f"no config {name} below {package / '.mim'} or beside the package")
