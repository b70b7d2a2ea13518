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

FIELDS: dict[str, tuple[str, Rule]] = {
    "seed": (TRAINING, _FROM_0),
    "data.name": (TRAINING, _choice("cuhk_sysu", "prw", "coco_person_search", "synthetic")),
    "data.root": (FREE, _TEXT),
    "data.prepared_dir": (FREE, _unset_or(_TEXT)),
    "data.train_scales": (TRAINING, _tuple_of(_SCALE, f"one or more pairs {_PAIR}", bool)),
    "data.test_scale": (NETWORK, _SCALE),
    "data.flip_probability": (TRAINING, _SHARE),
    "data.max_programs": (TRAINING, _FROM_0),
    "data.min_side": (TRAINING, _FROM_0),
    "data.validation_fraction": (TRAINING, _SHARE),
    "data.orientation": (TRAINING, _choice("stored", "upright")),
    "data.skip_damaged": (TRAINING, _FLAG),
    "data.prepare_again": (FREE, _FLAG),
    "data.max_pixels": (FREE, _integer(1, 2**40)),
    "data.workers": (FREE, _integer(0, 1024)),
    "data.prefetch": (FREE, _integer(0, 1024)),
    "data.synthetic.seed": (TRAINING, _FROM_0),
    "data.synthetic.train_images": (TRAINING, _COUNT),
    "data.synthetic.test_images": (TRAINING, _COUNT),
    "data.synthetic.train_identities": (TRAINING, _COUNT),
    "data.synthetic.test_identities": (TRAINING, _COUNT),
    "data.synthetic.height": (TRAINING, _SIDE),
    "data.synthetic.width": (TRAINING, _SIDE),
    "model.backbone": (NETWORK, _choice("resnet50", "resnet_small")),
    "model.pretrained": (RESULT, _TEXT),
    "model.backbone_width": (NETWORK, _SIDE),
    "model.frozen_stages": (TRAINING, _integer(-1, 4)),
    "model.deform_stages": (NETWORK, _STAGES),
    "model.channels": (NETWORK, _SIDE),
    "model.lateral_deform": (NETWORK, _FLAG),
    "model.output_deform": (NETWORK, _FLAG),
    "model.concatenate": (NETWORK, _FLAG),
    "model.levels": (NETWORK, _LEVELS),
    "model.reid": (NETWORK, _choice("input", "regression", "classification", "independent")),
    "model.offset_gain": (TRAINING, _NOT_NEGATIVE),
    "model.head_convs": (NETWORK, _integer(0, 1000)),
    "model.norm_groups": (NETWORK, _SIDE),
    "model.initial_distance": (TRAINING, _number()),
    "model.background_levels": (NETWORK, _FLAG),
    "model.dtype": (TRAINING, _choice("float32", "bfloat16")),
    "model.precision": (TRAINING, _choice("default", "highest")),
    "model.remat": (FREE, _FLAG),
    "model.channel_order": (NETWORK, _choice("BGR", "RGB")),
    "model.pixel_mean": (NETWORK, _PIXEL),
    "model.pixel_std": (NETWORK, _PIXEL),
    "model.stride_in_3x3": (NETWORK, _FLAG),
    "loss.focal_alpha": (TRAINING, _SHARE),
    "loss.focal_gamma": (TRAINING, _NOT_NEGATIVE),
    "loss.center_radius": (TRAINING, _POSITIVE),
    "loss.level_borders": (TRAINING, _BORDERS),
    "loss.lut_size": (TRAINING, _unset_or(_COUNT)),
    "loss.queue_size": (TRAINING, _FROM_0),
    "loss.inverse_lut_temperature": (TRAINING, _POSITIVE),
    "loss.inverse_queue_temperature": (TRAINING, _POSITIVE),
    "loss.oim_focal_gamma": (TRAINING, _NOT_NEGATIVE),
    "loss.lut_momentum": (TRAINING, _SHARE),
    "loss.normalize_lut": (TRAINING, _FLAG),
    "loss.queue_channels": (TRAINING, _unset_or(_COUNT)),
    "loss.triplet": (TRAINING, _choice("none", "batch", "batch_and_lut")),
    "loss.triplet_margin": (TRAINING, _NOT_NEGATIVE),
    "loss.triplet_first_lut_identity": (TRAINING, _FROM_0),
    "optimizer.name": (TRAINING, _choice("sgd", "adamw")),
    "optimizer.learning_rate": (TRAINING, _NOT_NEGATIVE),
    "optimizer.momentum": (TRAINING, _SHARE),
    "optimizer.scale_with_batch": (TRAINING, _unset_or(_COUNT)),
    "optimizer.weight_decay": (TRAINING, _NOT_NEGATIVE),
    "optimizer.bias_lr_factor": (TRAINING, _NOT_NEGATIVE),
    "optimizer.bias_weight_decay": (TRAINING, _unset_or(_NOT_NEGATIVE)),
    "optimizer.warmup": (TRAINING, _SPAN),
    "optimizer.warmup_start": (TRAINING, _SHARE),
    "optimizer.drops": (TRAINING, _tuple_of(_SPAN, f"a tuple of {_SPAN.expected}")),
    "optimizer.drop_factor": (TRAINING, _NOT_NEGATIVE),
    "optimizer.clip_norm": (TRAINING, _POSITIVE),
    "train.batch_size": (TRAINING, _COUNT),
    "train.duration": (RESULT, _LONG),
    "train.accumulate": (FREE, _SIDE),
    "train.ema_decay": (TRAINING, _unset_or(_SHARE)),
    "train.profile": (FREE, _unset_or(_TRACED)),
    "train.max_positives": (TRAINING, _unset_or(_COUNT)),
    "train.log_every_steps": (FREE, _COUNT),
    "train.checkpoint_every": (FREE, _LONG),
    "train.eval_every": (RESULT, _LONG),
    "train.keep_checkpoints": (FREE, _COUNT),
    "eval.batch_size": (FREE, _COUNT),
    "eval.score_threshold": (RESULT, _SHARE),
    "eval.pre_nms": (RESULT, _COUNT),
    "eval.min_cls_score": (RESULT, _SHARE),
    "eval.nms_iou": (RESULT, _SHARE),
    "eval.max_detections": (RESULT, _COUNT),
    "eval.dtype": (RESULT, _choice("float32", "bfloat16")),
    "eval.precision": (RESULT, _choice("default", "highest")),
    "eval.boxes": (RESULT, _choice("detected", "ground_truth")),
    "eval.context_matching": (RESULT, _CONTEXT),
    "eval.choose_on_test": (RESULT, _FLAG),
    "eval.untrained_baseline": (FREE, _FLAG),
    "eval.protocols": (RESULT, _tuple_of(_PROTOCOL, _PROTOCOLS)),
}


def check_fields(found: Mapping[str, Any]) -> None:
    """Holds the fields of a complete configuration, by dotted name, against their rules.

    Raises:
      UserError: a field does not exist (the nearest is named), is missing, is out of range, or
        does not fit another.
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


def _wrong(name: str, found: object, expected: str) -> UserError:
    return UserError(f"config.{name}: found {found!r}, expected {expected}")


def flat_fields(config: ConfigDict) -> dict[str, Any]:
    """The fields of a configuration by their dotted names."""
    return traverse_util.flatten_dict(config.to_dict(), sep=".")


def steps_of(duration: str, steps_per_epoch: int) -> int:
    """The number of steps of a checked duration: "<number> epochs" or "<number> steps"."""
    ((number, unit),) = _DURATION.findall(duration)
    return round(float(number) * (steps_per_epoch if unit == "epoch" else 1))
