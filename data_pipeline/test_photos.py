"""The test photos of a data set in a folder of their own, as links: what `make serve` indexes."""

from __future__ import annotations

import sys
from pathlib import Path

from alignps_jax.types import UserError
from data_pipeline.sources.cuhk_sysu import CuhkSysuSource


def link_test_photos(root: Path, folder: Path) -> int:
    """Makes a folder of links to the test photos of a data set in CUHK-SYSU's layout.

    Args:
      root: of the data set.
      folder: made if it is missing; links that are there stay.

    Returns:
      How many photos there are.

    Raises:
      UserError: the data set is not there, or damaged.
    """
    photos = (root / CuhkSysuSource.photo_folders[0]).absolute()
    names = CuhkSysuSource(root).test.names
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        link = folder / name
        if not link.is_symlink():
            link.symlink_to(photos / name)
    return len(names)


if __name__ == "__main__":
    try:
        link_test_photos(Path(sys.argv[1]), Path(sys.argv[2]))
    except UserError as error:
        sys.exit(f"error: {error}")
