"""Every field of the configuration: what it holds, and what becomes of a wrong value; variants."""

from functools import reduce

import pytest

from alignps_jax.config import FIELDS, FREE, NETWORK, RESULT, TRAINING, check_fields, flat_fields
from alignps_jax.types import UserError
from configs import ablation, cuhk, prw, synthetic, tiny
from configs.variants import VARIANTS
from data_pipeline.pipeline import make_train_pipeline
from tests.data_pipeline.pipeline_test import make_split

NAN, INFINITY = float("nan"), float("inf")
COUNT = (0, -1, 1.5, "4", True, 2**31)
TEXT = ("", 3, ("a",))
SHARES = (-0.1, 1.1, NAN, "1", True)
SPANS = ("3 weeks", "epochs", "-1 steps", "", 300)
SCALES = ((100, 200), (100,), (200.0, 100), (0, 0), (10**6, 100), "200")
TRIPLES = ((1.0, 2.0), (1.0, 2.0, "3"), (1.0, 2.0, NAN), 1.0, [1.0, 2.0, 3.0])

# For each kind of field; [] is wrong for all, None for those that cuhk.py does not leave unset.
WRONG = {
    "seed": (-1, 2**31, 1.0, True),
    "data.name": (*TEXT, "cuhk"),
    "data.root": (*TEXT, "a\0b"),
    "data.train_scales": ((), (128, 96), *((scale,) for scale in SCALES)),
    "data.test_scale": ((), ((128, 96),), *SCALES),
    "data.flip_probability": SHARES,
    "model.frozen_stages": (-2, 5, 99, 1.0, True),
    "model.deform_stages": ((6,), (2,), (3, 3), (4, 3), ("3",), (True,), 3),
    "model.lateral_deform": (0, 1, "True"),
    "model.levels": ((), (2, 3), (8,), (4, 3), (3, 3), (3.0,), (True,), 3),
    "model.initial_distance": (NAN, INFINITY, "1"),
    "model.pixel_mean": TRIPLES,
    "loss.center_radius": (0.0, -1.5, NAN, INFINITY),
    "loss.level_borders": ((64,), (0,), (64, 64), ("a",), (NAN,), 64),
    "loss.lut_size": COUNT,
    "optimizer.learning_rate": (-0.1, NAN, INFINITY, "1", True),
    "optimizer.warmup": SPANS,
    "optimizer.drops": ("3 steps", *((span,) for span in SPANS)),
    "optimizer.clip_norm": (0.0, -1.0, NAN, "1"),
    "train.eval_every": (*SPANS, "0 steps", "0.4 steps", "0 epochs"),
    "train.profile": ("5", "0:3", "a:b", "1:2:3", " 1:2"),
    "eval.context_matching": ((3,), (0, 3), (10, 3, 1), (10, 3.0), (True, 2), "10", 10),
    "eval.protocols": ("all", ("TestG",), (3,), ("TestG50", "al")),
}


def check(**fields):
    """The tiny configuration with some fields of any type, as a file could give them."""
    check_fields(flat_fields(tiny.get_config()) | fields)


def test_every_field_is_in_the_table_with_its_type():
    config = cuhk.get_config()
    assert flat_fields(config).keys() == FIELDS.keys()
    assert {kind for kind, _ in FIELDS.values()} == {NETWORK, TRAINING, RESULT, FREE}
    for name, (_, rule) in FIELDS.items():
        *sections, field = name.split(".")
        section = reduce(getattr, sections, config)
        assert section.get_type(field) is rule.type, name
        assert rule.unset == (section[field] is None), name


@pytest.mark.parametrize("module", [ablation, cuhk, prw, synthetic, tiny])
def test_every_variant_passes_and_trains_in_float32(module):
    for name in VARIANTS:
        config = module.get_config(name)
        check_fields(flat_fields(config))
        assert (config.model.dtype, config.model.precision) == ("float32", "default")


@pytest.mark.parametrize("name", FIELDS)
def test_wrong_values_are_refused(name):
    rule = FIELDS[name][1]
    for value in (*WRONG.get(name, ()), [], *([] if rule.unset else [None])):
        with pytest.raises(UserError) as caught:
            check(**{name: value})
        message = str(caught.value)
        assert message.startswith(f"config.{name}: found "), (value, message)
        assert rule.expected in message or "level_borders" in name
        assert "\n" not in message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model.levels": (3, 4)}, r"loss\.level_borders: found \(\), expected 1 "),
        ({"loss.level_borders": (64,)}, r"loss\.level_borders: found \(64,\), expected 0 "),
        ({"model.levels": (4,), "model.background_levels": True}, "background_levels: found True"),
        ({"eval.branch": "roi"}, "eval.branch: found .roi., expected both or dense"),
        ({"model.norm_groups": 7}, "norm_groups: found 7, expected a divisor of config.model.chan"),
    ],
)
def test_fields_that_do_not_fit_one_another_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        check(**fields)


def test_a_missing_field_is_named():
    fields = flat_fields(tiny.get_config())
    del fields["eval.nms_iou"]
    with pytest.raises(UserError, match=r"config\.eval\.nms_iou: missing, expected a number"):
        check_fields(fields)


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
        return 1 - photos / sum(plan.bucket[0] * plan.bucket[1] * batch_size for plan in plans)

    assert padding("") <= 0.15
    assert padding("released") >= 0.4  # the batches of the paper
