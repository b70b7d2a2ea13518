"""What each field of a configuration may hold: a table of rules, read before any work begins.

Names that something is chosen by (`model.backbone`, `data.name`, ...) are text here; the tables
that they are looked up in know them.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any

from ml_collections import ConfigDict

from alignps_jax.types import UserError

_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(epoch|step)s?\s*")


@dataclasses.dataclass(frozen=True)
class Rule:
    """Whether a value is one for a field, and what is expected in words."""

    check: Callable[[Any], bool]
    expected: str


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    # math.isfinite raises for integers that are too large for a float.
    return (isinstance(value, float) and math.isfinite(value)) or (
        _is_integer(value) and abs(value) < 2**63
    )


def _integer(low: int, high: int = 2**31 - 1) -> Rule:
    bounds = f"{low} or more" if high == 2**31 - 1 else f"from {low} to {high}"
    return Rule(lambda x: _is_integer(x) and low <= x <= high, f"an integer, {bounds}")


def _number(low: float, high: float = math.inf, *, above: bool = False) -> Rule:
    """A finite number from `low`, or `above` it, to `high`."""
    bounds = f"above {low:g}" if above else f"{low:g} or more"
    if high < math.inf:
        bounds = f"above {low:g} and up to {high:g}" if above else f"from {low:g} to {high:g}"
    return Rule(
        lambda x: _is_number(x) and (low < x if above else low <= x) and x <= high,
        f"a number, {bounds}",
    )


def _one_of(*names: str) -> Rule:
    return Rule(lambda x: isinstance(x, str) and x in names, f"one of {', '.join(names)}")


def _unset_or(rule: Rule) -> Rule:
    return Rule(lambda x: x is None or rule.check(x), f"{rule.expected}, or None")


def _tuple_of(rule: Rule, expected: str, *, length: int | None = None, least: int = 0) -> Rule:
    def check(value: Any) -> bool:
        if not isinstance(value, tuple) or len(value) < least:
            return False
        return (length is None or len(value) == length) and all(map(rule.check, value))

    return Rule(check, expected)


def _ascending(values: Any) -> bool:
    return all(low < high for low, high in pairwise(values))


def _is_scale(value: Any) -> bool:
    pair = isinstance(value, tuple) and len(value) == 2 and all(map(_is_integer, value))
    return pair and 2**15 >= value[0] >= value[1] >= 1


def _is_duration(value: Any) -> bool:
    return isinstance(value, str) and _DURATION.fullmatch(value) is not None


def _is_long(value: Any) -> bool:
    if not _is_duration(value):
        return False
    number, unit = _DURATION.findall(value)[0]
    return (round(float(number)) if unit == "step" else float(number)) > 0


def _is_protocol(value: Any) -> bool:
    known = r"TestG\d+|all|occlusion|resolution|cross_camera"
    return isinstance(value, str) and re.fullmatch(known, value) is not None


def _is_context(value: Any) -> bool:
    numbers = value if isinstance(value, tuple) else (None,)
    return len(numbers) in (0, 2) and all(_is_integer(k) and k > 0 for k in numbers)


_FINITE = Rule(_is_number, "a finite number")
_FLAG = Rule(lambda x: isinstance(x, bool), "True or False")
_TEXT = Rule(lambda x: isinstance(x, str) and x != "" and "\0" not in x, "a text")
_SHARE = _number(0, 1)
_POSITIVE = _number(0, above=True)
_NOT_NEGATIVE = _number(0)
_PAIR = "(long, short) in pixels, integers with 32768 >= long >= short >= 1"
_SCALE = Rule(_is_scale, f"a pair {_PAIR}")
_DURATION_TEXT = '"<number> epochs" or "<number> steps"'
_SPAN = Rule(_is_duration, _DURATION_TEXT)
_LONG = Rule(_is_long, f"{_DURATION_TEXT}, above 0")
_STAGES = Rule(
    lambda x: isinstance(x, tuple) and set(x) <= {3, 4, 5} and _ascending(x) and True not in x,
    "some of (3, 4, 5) in ascending order, or ()",
)

RULES: dict[str, Rule] = {
    "seed": _integer(0),
    "data.name": _TEXT,
    "data.root": _TEXT,
    "data.prepared_dir": _unset_or(_TEXT),
    "data.train_scales": _tuple_of(_SCALE, f"one or more pairs {_PAIR}", least=1),
    "data.test_scale": _SCALE,
    "data.flip_probability": _SHARE,
    "data.max_programs": _unset_or(_integer(1)),
    "data.min_side": _integer(0),
    "data.validation_fraction": Rule(
        lambda x: _is_number(x) and 0 <= x < 1, "a number, 0 or more and below 1"
    ),
    "data.max_pixels": _integer(1, 2**40),
    "data.workers": _integer(0, 1024),
    "data.prefetch": _integer(0, 1024),
    "data.synthetic.seed": _integer(0),
    "data.synthetic.train_images": _integer(1),
    "data.synthetic.test_images": _integer(1),
    "data.synthetic.train_identities": _integer(1),
    "data.synthetic.test_identities": _integer(1),
    "data.synthetic.height": _integer(1, 2**15),
    "data.synthetic.width": _integer(1, 2**15),
    "model.backbone": _TEXT,
    "model.pretrained": _unset_or(_TEXT),
    "model.backbone_width": _integer(1, 2**15),
    "model.frozen_stages": _integer(-1, 4),
    "model.deform_stages": _STAGES,
    "model.channels": _integer(1, 2**15),
    "model.lateral_deform": _FLAG,
    "model.output_deform": _FLAG,
    "model.concatenate": _FLAG,
    "model.levels": _tuple_of(
        _integer(3, 7), "some of (3, 4, 5, 6, 7) in ascending order", least=1
    ),
    "model.reid": _TEXT,
    "model.offset_gain": _NOT_NEGATIVE,
    "model.head_convs": _integer(0, 1000),
    "model.norm_groups": _integer(1, 2**15),
    "model.initial_distance": _FINITE,
    "model.background_levels": _FLAG,
    "model.dtype": _TEXT,
    "model.precision": _TEXT,
    "model.remat": _FLAG,
    "model.channel_order": _TEXT,
    "model.pixel_mean": _tuple_of(_FINITE, "three numbers, in channel order", length=3),
    "model.pixel_std": _tuple_of(_POSITIVE, "three numbers above 0, in channel order", length=3),
    "model.stride_in_3x3": _FLAG,
    "loss.focal_alpha": _SHARE,
    "loss.focal_gamma": _NOT_NEGATIVE,
    "loss.center_radius": _number(0, 100, above=True),
    "loss.level_borders": _tuple_of(_POSITIVE, "a tuple of ascending numbers of pixels"),
    "loss.lut_size": _unset_or(_integer(1)),
    "loss.queue_size": _integer(0),
    "loss.inverse_lut_temperature": _POSITIVE,
    "loss.inverse_queue_temperature": _POSITIVE,
    "loss.oim_focal_gamma": _NOT_NEGATIVE,
    "loss.lut_momentum": _SHARE,
    "loss.normalize_lut": _FLAG,
    "loss.queue_channels": _unset_or(_integer(1)),
    "loss.triplet": _one_of("none", "batch", "batch_and_lut"),
    "loss.triplet_margin": _NOT_NEGATIVE,
    "loss.triplet_first_lut_identity": _integer(0),
    "optimizer.name": _TEXT,
    "optimizer.learning_rate": _NOT_NEGATIVE,
    "optimizer.momentum": Rule(
        lambda x: _is_number(x) and 0 <= x < 1, "a number, 0 or more and below 1"
    ),
    "optimizer.scale_with_batch": _unset_or(_integer(1)),
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "optimizer.bias_lr_factor": _NOT_NEGATIVE,
    "optimizer.bias_weight_decay": _unset_or(_NOT_NEGATIVE),
    "optimizer.warmup": _SPAN,
    "optimizer.warmup_start": _SHARE,
    "optimizer.drops": _tuple_of(_SPAN, f"a tuple of {_DURATION_TEXT}"),
    "optimizer.drop_factor": _NOT_NEGATIVE,
    "optimizer.clip_norm": Rule(
        lambda x: _POSITIVE.check(x) or x == math.inf, "a number above 0; inf clips nothing"
    ),
    "train.batch_size": _integer(1),
    "train.duration": _LONG,
    "train.parallel": _TEXT,
    "train.accumulate": _integer(1, 2**15),
    "train.ema_decay": _unset_or(_number(0, 1, above=True)),
    "train.profile": _unset_or(_TEXT),
    "train.max_positives": _unset_or(_integer(1)),
    "train.log_every_steps": _integer(1),
    "train.checkpoint_every": _LONG,
    "train.eval_every": _LONG,
    "train.keep_checkpoints": _integer(1),
    "eval.batch_size": _integer(1),
    "eval.score_threshold": _FINITE,
    "eval.pre_nms": _integer(1),
    "eval.min_cls_score": _SHARE,
    "eval.nms_iou": _SHARE,
    "eval.max_detections": _integer(1),
    "eval.dtype": _one_of("float32", "bfloat16"),
    "eval.precision": _one_of("exact", "fast"),
    "eval.boxes": _TEXT,
    "eval.context_matching": Rule(
        _is_context, "() or (k1, k2), the numbers of gallery images and of people, 1 or more"
    ),
    "eval.untrained_baseline": _FLAG,
    "eval.protocols": _tuple_of(
        Rule(_is_protocol, ""),
        "a tuple of TestG<size>, all, occlusion, resolution, cross_camera, "
        "such as ('TestG100','all')",
    ),
}


def check_config(config: ConfigDict) -> None:
    """Holds every field of a complete configuration against its rule.

    Raises:
      UserError: a field does not exist (the nearest is named), is missing, or is out of range.
    """
    found = dict(_fields(config))
    for name in found:
        if name not in RULES:
            near = difflib.get_close_matches(name, RULES, n=1)
            hint = f"; did you mean config.{near[0]}?" if near else ""
            raise UserError(f"config.{name}: no such field{hint}")
    for name, rule in RULES.items():
        if name not in found:
            raise UserError(f"config.{name}: missing, expected {rule.expected}")
        if not rule.check(found[name]):
            raise UserError(f"config.{name}: found {found[name]!r}, expected {rule.expected}")
    _check_together(found)


def _check_together(found: Mapping[str, Any]) -> None:
    """What fields must be to one another."""
    levels, borders = found["model.levels"], found["loss.level_borders"]
    if len(borders) != len(levels) - 1 or not _ascending(borders):
        raise UserError(
            f"config.loss.level_borders: found {borders}, expected {len(levels) - 1} ascending "
            f"numbers of pixels for config.model.levels = {levels}"
        )
    channels, width = found["model.channels"], found["model.backbone_width"]
    groups = found["model.norm_groups"]
    divided = {"model.channels": channels}
    if found["model.backbone"] == "resnet_small":
        divided["model.backbone_width"] = width
    for name, number in divided.items():
        if number % groups:
            raise UserError(
                f"config.model.norm_groups: found {groups}, expected a divisor of "
                f"config.{name} = {number}"
            )


def _fields(section: ConfigDict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """The fields of a section, with their dotted names."""
    for name, value in section.items():
        if isinstance(value, ConfigDict):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
