"""The packages of the extra `gallery`, without which everything else works."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from alignps_jax.types import UserError

_PACKAGES = ("lancedb", "pyarrow", "fastapi", "jinja2", "python_multipart", "uvicorn")


def need_extra(what: str) -> None:
    """Raises UserError if a package is missing that `what` needs, such as `--mode=index`."""
    for package in _PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"{what}: found no package {package}, expected the extra gallery "
                "(pip install '.[gallery]' in the project's folder)"
            )


def is_gallery(address: str) -> bool:
    """Whether something that --mode=index made may lie there, rather than a folder of photos."""
    return "://" in address or (Path(address) / "people.lance").is_dir()
