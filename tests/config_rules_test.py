"""Every field of the configuration: what it refuses, and that it does so before any work."""

import time

import pytest

from alignps_jax.config_rules import RULES, check_config
from alignps_jax.experiments.reproduce import flatten
from alignps_jax.training.run import rehearse
from alignps_jax.training.train import train_and_evaluate
from alignps_jax.types import UserError
from configs import ablation, cuhk, prw, synthetic, tiny
from configs.variants import VARIANTS

NAN, INFINITY = float("nan"), float("inf")
NOT_NEGATIVE = (-0.1, NAN, INFINITY, "1", None, True)
COUNT = (0, -1, 1.5, "4", True, 2**31)
NAMES = ("", 3, None, ("a",))
FLAGS = (0, 1, "True", None)
SHARES = (-0.1, 1.1, NAN, "1", None, True)
TEMPERATURES = (0.0, -1.0, NAN, INFINITY, None)
TRIPLES = ((1.0, 2.0), (1.0, 2.0, "3"), (1.0, 2.0, NAN), 1.0, [1.0, 2.0, 3.0])
SPANS = ("3 weeks", "epochs", "-1 steps", "", 300, None)
LONG = (*SPANS, "0 steps", "0.4 steps", "0 epochs")
SCALES = ((100, 200), (100,), (200.0, 100), (0, 0), (10**6, 100), "200", None)

WRONG = {
    "seed": (-1, 2**31, 1.0, None, True),
    "data.name": (*NAMES, "cuhk"),
    "data.root": ("", 3, None, "a\0b"),
    "data.prepared_dir": ("", 3),
    "data.train_scales": ((), (128, 96), *((scale,) for scale in SCALES)),
    "data.test_scale": ((), ((128, 96),), *SCALES),
    "data.flip_probability": SHARES,
    "data.max_programs": (0, 1.5, "many", True),
    "data.min_side": (-1, 1.5, None, True),
    "data.validation_fraction": (-0.1, 1.0, NAN, "0.1", None, True),
    "data.max_pixels": COUNT[:-1],
    "data.workers": (-1, 1.5, 10**6, None),
    "data.prefetch": (-1, 1.5, 10**6, None),
    "data.synthetic.seed": (-1, 1.5, None),
    "data.synthetic.train_images": COUNT,
    "data.synthetic.test_images": COUNT,
    "data.synthetic.train_identities": COUNT,
    "data.synthetic.test_identities": COUNT,
    "data.synthetic.height": (*COUNT, 10**5),
    "data.synthetic.width": (*COUNT, 10**5),
    "model.backbone": (*NAMES, "resnet51"),
    "model.pretrained": ("", 3, "runs/nowhere"),
    "model.backbone_width": (*COUNT, 10**6, 6),
    "model.frozen_stages": (-2, 5, 99, 1.0, None, True),
    "model.deform_stages": ((6,), (2,), (3, 3), (4, 3), ("3",), (True,), 3, None),
    "model.channels": (*COUNT, 10**6, 18),
    "model.lateral_deform": FLAGS,
    "model.output_deform": FLAGS,
    "model.concatenate": FLAGS,
    "model.levels": ((), (2, 3), (8,), (4, 3), (3, 3), (3.0,), (True,), 3, None),
    "model.reid": (*NAMES, "head"),
    "model.offset_gain": NOT_NEGATIVE,
    "model.head_convs": (-1, 1.5, 10**6, None),
    "model.norm_groups": (*COUNT, 5, 10**6),
    "model.initial_distance": (NAN, INFINITY, "1", None),
    "model.background_levels": FLAGS,
    "model.dtype": (*NAMES, "float16"),
    "model.precision": (*NAMES, "bfloat16"),
    "model.remat": FLAGS,
    "model.channel_order": (*NAMES, "GBR"),
    "model.pixel_mean": TRIPLES,
    "model.pixel_std": (*TRIPLES, (1.0, 1.0, 0.0), (1.0, 1.0, -1.0)),
    "model.stride_in_3x3": FLAGS,
    "loss.focal_alpha": SHARES,
    "loss.focal_gamma": NOT_NEGATIVE,
    "loss.center_radius": (0.0, -1.5, NAN, INFINITY, 1000.0, None),
    "loss.level_borders": ((64,), (0,), ("a",), (NAN,), 64, None),
    "loss.lut_size": (*COUNT, 1),
    "loss.queue_size": (-1, 1.5, None, True),
    "loss.inverse_lut_temperature": TEMPERATURES,
    "loss.inverse_queue_temperature": TEMPERATURES,
    "loss.oim_focal_gamma": NOT_NEGATIVE,
    "loss.lut_momentum": SHARES,
    "loss.normalize_lut": FLAGS,
    "loss.queue_channels": COUNT,
    "loss.triplet": (*NAMES, "lut"),
    "loss.triplet_margin": NOT_NEGATIVE,
    "loss.triplet_first_lut_identity": (-1, 1.5, None),
    "optimizer.name": (*NAMES, "adam"),
    "optimizer.learning_rate": NOT_NEGATIVE,
    "optimizer.momentum": (1.0, *SHARES),
    "optimizer.scale_with_batch": (0, -4, 1.5, "4", True),
    "optimizer.weight_decay": NOT_NEGATIVE,
    "optimizer.bias_lr_factor": NOT_NEGATIVE,
    "optimizer.bias_weight_decay": (-0.1, NAN, INFINITY, "1", True),
    "optimizer.warmup": SPANS,
    "optimizer.warmup_start": SHARES,
    "optimizer.drops": ("3 steps", None, *((span,) for span in SPANS)),
    "optimizer.drop_factor": NOT_NEGATIVE,
    "optimizer.clip_norm": (0.0, -1.0, NAN, "1", None),
    "train.batch_size": COUNT,
    "train.duration": LONG,
    "train.accumulate": (*COUNT, 3),
    "train.ema_decay": (0.0, -0.5, 1.5, NAN, "1", True),
    "train.profile": ("", "5", "0:3", "5:4", "a:b", 5),
    "train.max_positives": (-3, *COUNT),
    "train.log_every_steps": COUNT,
    "train.checkpoint_every": LONG,
    "train.eval_every": LONG,
    "train.keep_checkpoints": COUNT,
    "eval.batch_size": COUNT,
    "eval.score_threshold": (NAN, INFINITY, "1", None),
    "eval.pre_nms": COUNT,
    "eval.min_cls_score": SHARES,
    "eval.nms_iou": SHARES,
    "eval.max_detections": COUNT,
    "eval.precision": (*NAMES, "float32"),
    "eval.boxes": (*NAMES, "truth"),
    "eval.context_matching": ((3,), (0, 3), (10, 3, 1), (10, 3.0), (True, 2), "10", 10, None),
    "eval.untrained_baseline": FLAGS,
    "eval.protocols": ("all", ("TestG",), (3,), ("TestG50", "al"), None),
}


# Fields that are wrong together: the one that the message begins with.
INSTEAD = {
    ("model.backbone_width", "6"): "model.norm_groups",
    ("model.channels", "18"): "model.norm_groups",
}


def with_field(name, value):
    """The tiny configuration with one field of any type, as a file could give it."""
    fields = flatten(tiny.get_config().to_dict()) | {name: value}
    config = tiny.get_config().copy_and_resolve_references()
    config = type(config)()
    for dotted, content in fields.items():
        *sections, field = dotted.split(".")
        section = config
        for part in sections:
            if part not in section:
                section[part] = type(config)()
            section = section[part]
        section[field] = content
    return config


def test_every_field_has_a_rule_and_wrong_values():
    assert flatten(cuhk.get_config().to_dict()).keys() == RULES.keys() == WRONG.keys()


@pytest.mark.parametrize("module", [ablation, cuhk, prw, synthetic, tiny])
def test_every_variant_passes(module):
    for name in VARIANTS:
        check_config(module.get_config(name))


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_are_refused_before_any_work(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value in WRONG[name]:
        if name == "loss.lut_size" and value == 1:
            continue  # only the data set can tell
        start = time.process_time()
        with pytest.raises(UserError) as caught:
            train_and_evaluate(with_field(name, value), tmp_path / "run")
        message = str(caught.value)
        assert f"config.{INSTEAD.get((name, str(value)), name)}" in message, (value, message)
        assert "found" in message or "no checkpoint" in message or "unknown" in message
        assert "\n" not in message
        assert time.process_time() - start < 5
    assert not list(tmp_path.iterdir())


def test_a_table_that_is_too_small_is_refused_before_photos_are_packed(tmp_path):
    config = with_field("loss.lut_size", 1)
    config.data.root = str(tmp_path / "tiny")
    with pytest.raises(UserError, match=r"config\.loss\.lut_size: found 1, expected at least the"):
        train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not (tmp_path / "tiny" / "prepared").exists()


def test_fields_that_do_not_exist_or_are_missing_are_named():
    config = with_field("train.batchsize", 3)
    expected = "config.train.batchsize: no such field; did you mean config.train.batch_size"
    with pytest.raises(UserError, match=expected):
        check_config(config)
    config = with_field("seed", 3)
    del config.eval.nms_iou
    with pytest.raises(UserError, match=r"config\.eval\.nms_iou: missing, expected a number"):
        check_config(config)


def test_every_variant_can_be_rehearsed():
    for name in ("", "plus", "baseline", "t3", "oim", "released"):
        rehearse(tiny.get_config(name))
