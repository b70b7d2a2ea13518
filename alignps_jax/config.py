"""What each field of a configuration may hold and decides: one table, read before any work."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flax import traverse_util
from ml_collections import ConfigDict

from alignps_jax.errors import UserError, nearest

# What a field decides: the trained network and the pixels that it sees (a checkpoint is used with
# its own values); the course of training (a run resumes with its values); the reported result, but
# no training step; or where files are, how fast a run is and what it logs.
NETWORK, TRAINING, RESULT, FREE = "network", "training", "result", "free"

_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(epoch|step)s?\s*")


class Rule(NamedTuple):
    """The type of a field's values, a condition on them, and both in words."""

    type: type
    holds: Callable[[Any], Any]
    expected: str
    unset: bool = False  # whether None is a value

    def accepts(self, value: Any) -> bool:
        """Whether a field may hold this; an integer is a number, True and False are neither."""
        if value is None or isinstance(value, bool) != (self.type is bool):
            return value is None and self.unset
        types = (int, float) if self.type is float else self.type
        return isinstance(value, types) and bool(self.holds(value))

    def read(self, typed: str) -> Any:
        """The value that a word of the command line means; the word itself if it means none."""
        if self.type is str and typed != "None":
            return typed
        try:
            value = ast.literal_eval(typed.title() or "True" if self.type is bool else typed)
        except (ValueError, SyntaxError):
            value = typed
        return (value,) if self.type is tuple and not isinstance(value, tuple) else value


def _integer(low: int, high: int = 2**31 - 1) -> Rule:
    bounds = f"{low} or more" if high == 2**31 - 1 else f"from {low} to {high}"
    return Rule(int, lambda x: low <= x <= high, f"an integer, {bounds}")


def _number(expected: str = "", holds: Callable[[float], bool] = lambda x: True) -> Rule:
    return Rule(float, lambda x: -1e300 < x < 1e300 and holds(x), f"a number{expected}")


def _choice(*names: str) -> Rule:
    return Rule(str, lambda x: x in names, f"one of {', '.join(names)}")


def _tuple_of(rule: Rule, expected: str, holds: Callable[[Any], bool] = lambda x: True) -> Rule:
    return Rule(tuple, lambda x: all(map(rule.accepts, x)) and holds(x), expected)


def _unset_or(rule: Rule) -> Rule:
    return rule._replace(expected=f"{rule.expected}, or None", unset=True)


def _ascending(values: tuple[float, ...]) -> bool:
    return list(values) == sorted(set(values))


_FLAG = Rule(bool, lambda x: True, "True or False")
_TEXT = Rule(str, lambda x: x != "" and "\0" not in x, "a text")
_COUNT, _SIDE, _FROM_0 = _integer(1), _integer(1, 2**15), _integer(0)
_SHARE = _number(", from 0 to 1", lambda x: 0 <= x <= 1)
_POSITIVE = _number(" above 0", lambda x: x > 0)
_NOT_NEGATIVE = _number(", 0 or more", lambda x: x >= 0)
_PAIR = "(long, short) in pixels, integers with 32768 >= long >= short >= 1"
_SCALE = _tuple_of(_SIDE, f"a pair {_PAIR}", lambda x: len(x) == 2 and x[0] >= x[1])
_SPAN = Rule(str, _DURATION.fullmatch, '"<number> epochs" or "<number> steps"')
_LONG = Rule(str, lambda x: _SPAN.holds(x) and steps_of(x, 10**9), f"{_SPAN.expected}, above 0")
_TRACED = Rule(str, re.compile(r"[1-9]\d*:[1-9]\d*").fullmatch, '"first:last", such as 100:105')
_PROTOCOL = Rule(str, re.compile(r"TestG\d+|all|occlusion|resolution|cross_camera").fullmatch, "")
_PROTOCOLS = "a tuple of TestG<size>, all, occlusion, resolution, cross_camera"
_STAGES = _tuple_of(_integer(3, 5), "some of (3, 4, 5), ascending, or ()", _ascending)
_LEVELS = _tuple_of(_integer(3, 7), "some of (3, ..., 7), ascending", lambda x: _ascending(x) and x)
_CONTEXT = _tuple_of(_COUNT, "() or (k1, k2), numbers of 1 or more", lambda x: len(x) in (0, 2))
_PIXEL = _tuple_of(_number(), "three numbers, in channel order", lambda x: len(x) == 3)
_BORDERS = _tuple_of(_POSITIVE, "a tuple of ascending numbers of pixels", _ascending)

# Fields of one kind and rule stand side by side.
_TABLE: dict[str, dict[str, Rule]] = {
    NETWORK: {
        "data.test_scale": _SCALE,
        "model.backbone": _choice("resnet50", "resnet_small"),
        "model.backbone_width model.channels model.norm_groups": _SIDE,
        "model.deform_stages": _STAGES,
        (
            "model.lateral_deform model.output_deform model.concatenate model.background_levels "
            "model.stride_in_3x3 model.roi"
        ): _FLAG,
        "model.levels": _LEVELS,
        "model.reid": _choice("input", "regression", "classification", "independent"),
        "model.head_convs": _integer(0, 1000),
        "model.channel_order": _choice("BGR", "RGB"),
        "model.pixel_mean model.pixel_std": _PIXEL,
    },
    TRAINING: {
        (
            "seed data.max_programs data.min_side data.synthetic.seed loss.queue_size "
            "loss.triplet_first_lut_identity"
        ): _FROM_0,
        "data.name": _choice("cuhk_sysu", "prw", "coco_person_search", "synthetic"),
        "data.train_scales": _tuple_of(_SCALE, f"one or more pairs {_PAIR}", bool),
        (
            "data.flip_probability data.validation_fraction loss.focal_alpha loss.lut_momentum "
            "optimizer.momentum optimizer.warmup_start"
        ): _SHARE,
        "data.orientation": _choice("stored", "upright"),
        "data.skip_damaged loss.normalize_lut loss.oim_labeled_mean": _FLAG,
        (
            "data.synthetic.train_images data.synthetic.test_images loss.rois_per_image "
            "data.synthetic.train_identities data.synthetic.test_identities train.batch_size"
        ): _COUNT,
        "data.synthetic.height data.synthetic.width": _SIDE,
        "model.frozen_stages": _integer(-1, 4),
        (
            "model.offset_gain loss.focal_gamma loss.oim_focal_gamma loss.triplet_margin "
            "optimizer.learning_rate optimizer.weight_decay optimizer.bias_lr_factor "
            "optimizer.drop_factor"
        ): _NOT_NEGATIVE,
        "model.initial_distance": _number(),
        "model.dtype": _choice("float32", "bfloat16"),
        "model.precision": _choice("default", "highest"),
        (
            "loss.center_radius loss.inverse_lut_temperature loss.inverse_queue_temperature "
            "loss.roi_inverse_temperature optimizer.clip_norm"
        ): _POSITIVE,
        "loss.level_borders": _BORDERS,
        (
            "loss.lut_size loss.queue_channels optimizer.scale_with_batch train.max_positives"
        ): _unset_or(_COUNT),
        "loss.triplet": _choice("none", "batch", "batch_and_lut"),
        "optimizer.name": _choice("sgd", "adamw"),
        "optimizer.bias_weight_decay": _unset_or(_NOT_NEGATIVE),
        "optimizer.warmup": _SPAN,
        "optimizer.drops": _tuple_of(_SPAN, f"a tuple of {_SPAN.expected}"),
        "train.ema_decay": _unset_or(_SHARE),
    },
    RESULT: {
        "model.pretrained": _TEXT,
        "train.duration train.eval_every": _LONG,
        "eval.score_threshold eval.min_cls_score eval.nms_iou": _SHARE,
        "eval.pre_nms eval.max_detections": _COUNT,
        "eval.dtype": _choice("float32", "bfloat16"),
        "eval.precision": _choice("default", "highest"),
        "eval.boxes": _choice("detected", "ground_truth"),
        "eval.branch": _choice("both", "dense", "roi"),
        "eval.context_matching": _CONTEXT,
        "eval.choose_on_test": _FLAG,
        "eval.protocols": _tuple_of(_PROTOCOL, _PROTOCOLS),
    },
    FREE: {
        "data.root": _TEXT,
        "data.prepared_dir": _unset_or(_TEXT),
        "data.prepare_again model.remat eval.untrained_baseline": _FLAG,
        "data.max_pixels": _integer(1, 2**40),
        "data.workers data.prefetch": _integer(0, 1024),
        "train.accumulate": _SIDE,
        "train.profile": _unset_or(_TRACED),
        "train.log_every_steps train.keep_checkpoints eval.batch_size": _COUNT,
        "train.checkpoint_every": _LONG,
    },
}
FIELDS = {
    name: (kind, rule)
    for kind, rows in _TABLE.items()
    for names, rule in rows.items()
    for name in names.split()
}


def check_fields(found: Mapping[str, Any]) -> None:
    """Holds the fields of a complete configuration, by dotted name, against their rules.

    Raises UserError where one does not exist, is missing, out of range or does not fit another.
    """
    for name in found.keys() - FIELDS.keys():
        same = [field for field in FIELDS if field.endswith(f".{name.rpartition('.')[2]}")]
        hint = f"; did you mean {' or '.join(same)}?" if same else nearest(name, FIELDS)
        raise UserError(f"config.{name}: no such field{hint}")
    for name, (_, rule) in FIELDS.items():
        if name not in found:
            raise UserError(f"config.{name}: missing, expected {rule.expected}")
        if not rule.accepts(found[name]):
            raise _wrong(name, found[name], rule.expected)
    levels, borders = found["model.levels"], found["loss.level_borders"]
    if len(borders) != len(levels) - 1:
        expected = f"{len(levels) - 1} ascending numbers for config.model.levels = {levels}"
        raise _wrong("loss.level_borders", borders, expected)
    if found["model.channels"] % (groups := found["model.norm_groups"]):
        expected = f"a divisor of config.model.channels = {found['model.channels']}"
        raise _wrong("model.norm_groups", groups, expected)
    if found["model.background_levels"] and levels != (3,):
        raise _wrong("model.background_levels", True, f"False for config.model.levels = {levels}")
    if found["eval.branch"] == "roi" and not found["model.roi"]:
        raise _wrong("eval.branch", "roi", "both or dense, as config.model.roi is False")


def _wrong(name: str, found: object, expected: str) -> UserError:
    return UserError(f"config.{name}: found {found!r}, expected {expected}")


def flat_fields(config: ConfigDict) -> dict[str, Any]:
    """The fields of a configuration by their dotted names."""
    return traverse_util.flatten_dict(config.to_dict(), sep=".")


def steps_of(duration: str, steps_per_epoch: int) -> int:
    """The number of steps of a checked duration: "<number> epochs" or "<number> steps"."""
    ((number, unit),) = _DURATION.findall(duration)
    return round(float(number) * (steps_per_epoch if unit == "epoch" else 1))
