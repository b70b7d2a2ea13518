"""Every field of the configuration: what it holds, and what becomes of a wrong value."""

import pytest
from ml_collections import ConfigDict

from alignps_jax.config import FIELDS, FREE, NETWORK, RESULT, TRAINING, check_config, flat_fields
from alignps_jax.types import UserError
from configs import ablation, cuhk, prw, synthetic, tiny
from configs.variants import VARIANTS

NAN, INFINITY = float("nan"), float("inf")
NOT_NEGATIVE = (-0.1, NAN, INFINITY, "1", True)
COUNT = (0, -1, 1.5, "4", True, 2**31)
TEXT = ("", 3, ("a",))
FLAGS = (0, 1, "True")
SHARES = (-0.1, 1.1, NAN, "1", True)
ABOVE_0 = (0.0, -1.0, NAN, INFINITY)
TRIPLES = ((1.0, 2.0), (1.0, 2.0, "3"), (1.0, 2.0, NAN), 1.0, [1.0, 2.0, 3.0])
SPANS = ("3 weeks", "epochs", "-1 steps", "", 300)
LONG = (*SPANS, "0 steps", "0.4 steps", "0 epochs")
SCALES = ((100, 200), (100,), (200.0, 100), (0, 0), (10**6, 100), "200")

# None is wrong for all fields but those that a new configuration leaves unset.
WRONG = {
    "seed": (-1, 2**31, 1.0, True),
    "data.name": (*TEXT, "cuhk"),
    "data.root": (*TEXT, "a\0b"),
    "data.train_scales": ((), (128, 96), *((scale,) for scale in SCALES)),
    "data.test_scale": ((), ((128, 96),), *SCALES),
    "data.flip_probability": SHARES,
    "data.max_programs": (-1, 1.5, "many", True),
    "data.min_side": (-1, 1.5, True),
    "data.validation_fraction": (-0.1, 1.0, NAN, "0.1", True),
    "data.synthetic.height": (*COUNT, 10**5),
    "model.backbone": (*TEXT, "resnet51"),
    "model.backbone_width": (*COUNT, 10**6),
    "model.frozen_stages": (-2, 5, 99, 1.0, True),
    "model.deform_stages": ((6,), (2,), (3, 3), (4, 3), ("3",), (True,), 3),
    "model.lateral_deform": FLAGS,
    "model.levels": ((), (2, 3), (8,), (4, 3), (3, 3), (3.0,), (True,), 3),
    "model.reid": (*TEXT, "head"),
    "model.initial_distance": (NAN, INFINITY, "1"),
    "model.dtype": (*TEXT, "float16"),
    "model.precision": (*TEXT, "bfloat16"),
    "model.channel_order": (*TEXT, "GBR"),
    "model.pixel_mean": TRIPLES,
    "model.pixel_std": (*TRIPLES, (1.0, 1.0, 0.0), (1.0, 1.0, -1.0)),
    "loss.center_radius": (0.0, -1.5, NAN, INFINITY),
    "loss.level_borders": ((64,), (0,), ("a",), (NAN,), 64),
    "loss.lut_size": COUNT,
    "loss.inverse_lut_temperature": ABOVE_0,
    "loss.triplet": (*TEXT, "lut"),
    "optimizer.name": (*TEXT, "adam"),
    "optimizer.learning_rate": NOT_NEGATIVE,
    "optimizer.momentum": (1.0, *SHARES),
    "optimizer.bias_weight_decay": NOT_NEGATIVE,
    "optimizer.warmup": SPANS,
    "optimizer.drops": ("3 steps", *((span,) for span in SPANS)),
    "optimizer.clip_norm": (0.0, -1.0, NAN, "1"),
    "train.batch_size": COUNT,
    "train.duration": LONG,
    "train.profile": ("5", "0:3", "5:4", "a:b", "1:2:3", " 1:2"),
    "train.ema_decay": SHARES,
    "eval.score_threshold": (*SHARES, 20),
    "eval.precision": (*TEXT, "float32"),
    "eval.boxes": (*TEXT, "truth"),
    "eval.context_matching": ((3,), (0, 3), (10, 3, 1), (10, 3.0), (True, 2), "10", 10),
    "eval.protocols": ("all", ("TestG",), (3,), ("TestG50", "al")),
}


def with_field(name, value):
    """The tiny configuration with one field of any type, as a file could give it."""
    config = ConfigDict()
    for dotted, content in {**dict(flat_fields(tiny.get_config())), name: value}.items():
        *sections, field = dotted.split(".")
        section = config
        for part in sections:
            if part not in section:
                section[part] = ConfigDict()
            section = section[part]
        section[field] = content
    return config


def test_every_field_is_in_the_table_with_its_type():
    config = cuhk.get_config()
    assert dict(flat_fields(config)).keys() == FIELDS.keys()
    assert {kind for kind, _ in FIELDS.values()} == {NETWORK, TRAINING, RESULT, FREE}
    for name, (_, rule) in FIELDS.items():
        *sections, field = name.split(".")
        section = config
        for part in sections:
            section = section[part]
        assert section.get_type(field) is rule.type, name
        assert rule.unset == (section[field] is None), name


@pytest.mark.parametrize("module", [ablation, cuhk, prw, synthetic, tiny])
def test_every_variant_passes(module):
    for name in VARIANTS:
        check_config(module.get_config(name))


@pytest.mark.parametrize("name", FIELDS)
def test_wrong_values_are_refused(name):
    rule = FIELDS[name][1]
    for value in (*WRONG.get(name, ()), [], *([] if rule.unset else [None])):
        with pytest.raises(UserError) as caught:
            check_config(with_field(name, value))
        message = str(caught.value)
        assert message.startswith(f"config.{name}: found "), (value, message)
        assert rule.expected in message or "level_borders" in name
        assert "\n" not in message


def test_fields_that_do_not_fit_one_another_or_are_missing():
    for name, value, message in (
        ("model.channels", 18, r"norm_groups: found 4, expected a divisor of model\.channels"),
        ("model.backbone_width", 6, r"norm_groups: found 4, expected a divisor of model\.back"),
        ("model.levels", (3, 4), r"level_borders: found \(\), expected 1 ascending"),
    ):
        with pytest.raises(UserError, match=message):
            check_config(with_field(name, value))
    config = with_field("seed", 3)
    del config.eval.nms_iou
    with pytest.raises(UserError, match=r"config\.eval\.nms_iou: missing, expected a number"):
        check_config(config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"levels": ()}, r"config.model.levels: found \(\)"),
        ({"levels": (4, 3)}, r"config.model.levels: found \(4, 3\)"),
        ({"levels": (2, 3)}, r"config.model.levels: found \(2, 3\)"),
        ({"levels": (3, 4)}, r"config.loss.level_borders: found \(\), expected 1 "),
        ({"level_borders": (64,)}, r"config.loss.level_borders: found \(64,\), expected 0 "),
        ({"levels": (3, 4, 5), "level_borders": (64, 64)}, r"level_borders: found \(64, 64\)"),
        ({"levels": (3, 4), "level_borders": (-1,)}, r"level_borders: found \(-1,\)"),
        ({"levels": (3, 4), "level_borders": (float("nan"),)}, r"level_borders: found \(nan,\)"),
        ({"levels": (4,), "background_levels": True}, "config.model.background_levels: found"),
    ],
)
def test_levels_that_do_not_fit_one_another_are_refused(fields, message):
    config = tiny.get_config()
    for name, value in fields.items():
        section = config.loss if name == "level_borders" else config.model
        section[name] = value
    with pytest.raises(UserError, match=message):
        check_config(config)
