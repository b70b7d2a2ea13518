"""What the ready configurations promise."""

import pytest

from configs import cuhk
from data_pipeline.pipeline import make_train_pipeline
from tests.data_pipeline.pipeline_test import make_split


@pytest.mark.parametrize("batch_size", [4, 32])
def test_the_default_shapes_pad_at_most_15_percent_of_mixed_photos(batch_size):
    landscape = [(600, 800), (600, 900), (540, 960)]
    split = make_split([*landscape, *(size[::-1] for size in landscape)] * 200)

    def padding(variant: str) -> float:
        data = cuhk.get_config(variant).data
        pipeline = make_train_pipeline(split, data, seed=0, batch_size=batch_size)
        assert len(pipeline.buckets) <= 12
        plans = [pipeline.plan(step) for step in range(100)]
        photos = sum(plan.sizes.prod(axis=1).sum() for plan in plans)
        pixels = sum(plan.bucket[0] * plan.bucket[1] for plan in plans) * batch_size
        return 1 - photos / pixels

    assert padding("") <= 0.15
    assert padding("released") >= 0.4  # the batches of the paper
