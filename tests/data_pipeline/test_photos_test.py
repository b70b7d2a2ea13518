"""The test photos of a data set as a folder of links."""

import pytest

from alignps_jax.types import UserError
from data_pipeline.sources.cuhk_sysu import CuhkSysuSource
from data_pipeline.synthetic.dataset import write_synthetic
from data_pipeline.test_photos import link_test_photos
from tests.data_pipeline.synthetic.dataset_test import TINY


def test_the_links_lead_to_the_test_photos_alone(tmp_path):
    root = tmp_path / "set"
    write_synthetic(root, TINY)
    names = set(CuhkSysuSource(root).test.names)
    for _ in range(2):  # the second time they are there
        assert link_test_photos(root, tmp_path / "photos") == len(names)
        found = {path.name: path.resolve() for path in (tmp_path / "photos").iterdir()}
        assert found == {name: (root / "Image/SSM" / name).resolve() for name in names}
    with pytest.raises(UserError, match="nothing"):
        link_test_photos(tmp_path / "nothing", tmp_path / "photos")
