"""Named variants of a configuration, and the paper's results with them (Yan et al., CVPR 2021).

python launch.py --mode=list                                # prints both
python launch.py --config=configs/cuhk.py:t3 ...            # runs a variant
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from alignps_jax.errors import known_name

CUHK, PRW = "cuhk_sysu", "prw"


@dataclasses.dataclass(frozen=True)
class PaperRow:
    """One row of a table of the paper ("1" to "6", "fig4"), with its metrics in percent.

    Numbers that are None are in no table; `inferred` ones are in the paper's text.
    """

    table: str
    variant: str
    label: str
    recall: float | None = None
    AP: float | None = None
    mAP: float | None = None  # noqa: N815 (its name everywhere)
    top1: float | None = None
    dataset: str = CUHK
    inferred: bool = False
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Variant:
    """A description of the variant, and the fields that it changes (dotted names)."""

    description: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


Changes = dict[str, Any]

# Region alignment: without these three components, AFA is an FPN (Paper, Table 2).
PLAIN_LATERAL: Changes = {"model.lateral_deform": False}
PLAIN_OUTPUT: Changes = {"model.output_deform": False}
SUM: Changes = {"model.concatenate": False}
FPN = PLAIN_LATERAL | PLAIN_OUTPUT | SUM
# Scale alignment: AlignPS finds people on P3 alone, FCOS on five levels (Paper, Table 1).
FCOS_LEVELS: Changes = {"model.levels": (3, 4, 5, 6, 7), "loss.level_borders": (64, 128, 256, 512)}
P3_P4: Changes = {"model.levels": (3, 4), "loss.level_borders": (128,)}
P3_P4_P5: Changes = {"model.levels": (3, 4, 5), "loss.level_borders": (128, 256)}
# Task alignment: without "re-id first", a re-id head stands beside the detection head.
PARALLEL: Changes = {"model.reid": "independent"}
BASELINE = FPN | FCOS_LEVELS | PARALLEL

# How the released code differs from the paper, apart from the values of a data set.
RELEASED_CODE: Changes = {
    "data.max_programs": 0,
    "model.background_levels": True,
    "loss.normalize_lut": False,
    "loss.queue_channels": 64,
    "loss.triplet_first_lut_identity": 1,
}
RELEASED = RELEASED_CODE | {
    "optimizer.weight_decay": 1e-4,
    "optimizer.bias_lr_factor": 2.0,
    "optimizer.bias_weight_decay": 0.0,
    "optimizer.warmup": "500 steps",
}
PLUS: Changes = {"model.deform_stages": (3, 4, 5)}
ROI: Changes = {"model.roi": True, "loss.oim_labeled_mean": True}

VARIANTS: dict[str, Variant] = {
    "": Variant("AlignPS"),
    "baseline": Variant("FCOS on an FPN (P3 to P7), with a re-id head of its own", BASELINE),
    "sa": Variant("the baseline with scale alignment: P3 only", FPN | PARALLEL),
    "ra": Variant("the baseline with region alignment: AFA on P3 to P5", P3_P4_P5 | PARALLEL),
    "ta": Variant("the baseline with task alignment: re-id first", FPN | FCOS_LEVELS),
    "p4": Variant("people are searched on P4 (stride 16)", {"model.levels": (4,)}),
    "p5": Variant("people are searched on P5 (stride 32)", {"model.levels": (5,)}),
    "p3_p4": Variant("people on P3 or P4 by their size", P3_P4),
    "p3_p4_p5": Variant("people on P3, P4 or P5 by their size", P3_P4_P5),
    "fpn": Variant("no deformable convolutions in the neck, maps are added: an FPN", FPN),
    "lateral": Variant("AFA with lateral deformable convolutions only", PLAIN_OUTPUT | SUM),
    "output": Variant("AFA with output deformable convolutions only", PLAIN_LATERAL | SUM),
    "concat": Variant("AFA with concatenation only", PLAIN_LATERAL | PLAIN_OUTPUT),
    "lateral_output": Variant("AFA without concatenation", SUM),
    "lateral_concat": Variant("AFA without output deformable convolutions", PLAIN_OUTPUT),
    "output_concat": Variant("AFA without lateral deformable convolutions", PLAIN_LATERAL),
    "t1": Variant("embeddings from the regression tower", {"model.reid": "regression"}),
    "t2": Variant("embeddings from the classification tower", {"model.reid": "classification"}),
    "t3": Variant("embeddings from a tower of their own", PARALLEL),
    "oim": Variant("OIM loss, no triplet loss", {"loss.triplet": "none"}),
    "toim_without_lut": Variant("triplet loss without table rows", {"loss.triplet": "batch"}),
    "res3": Variant("deformable convolutions in res3", {"model.deform_stages": (3,)}),
    "res3_res4": Variant("deformable convolutions in res3, res4", {"model.deform_stages": (3, 4)}),
    "plus": Variant("AlignPS+: deformable convolutions in res3, res4 and res5", PLUS),
    "released": Variant("AlignPS with the values of the released code", RELEASED),
    "released_plus": Variant("AlignPS+ with the values of the released code", RELEASED | PLUS),
    "roi": Variant("ROI-AlignPS: also embeds the regions of people", ROI),
    # Ready for machines, in float32; docs/devices.md has the memory that they need.
    "card24": Variant("for one card with 24 GB, which the defaults fit"),
    "h100x8": Variant(
        "for 8 H100: 4 images each, the learning rate follows",
        {"train.batch_size": 32, "optimizer.scale_with_batch": 4, "eval.batch_size": 32},
    ),
    "v5e8": Variant(
        "for a TPU v5e-8: 1 image each, the learning rate follows",
        {"train.batch_size": 8, "optimizer.scale_with_batch": 4, "eval.batch_size": 8},
    ),
}

PAPER = (
    PaperRow("fig4", "baseline", "baseline"),
    PaperRow("fig4", "sa", "SA"),
    PaperRow("fig4", "ra", "RA"),
    PaperRow("fig4", "ta", "TA"),
    PaperRow("fig4", "t3", "SA + RA", note="the network of Table 3's T3"),
    PaperRow("fig4", "fpn", "SA + TA", note="the network of Table 2's first row"),
    PaperRow("fig4", "p3_p4_p5", "RA + TA", note="the network of Table 1's P3, P4, P5"),
    PaperRow("fig4", "", "SA + RA + TA", note="more than 20 mAP above the baseline"),
    PaperRow("1", "", "P3", 90.3, 81.2, 93.1, 93.4),
    PaperRow("1", "p4", "P4", 87.5, 78.7, 92.7, 93.1),
    PaperRow("1", "p5", "P5", 79.0, 71.7, 89.3, 89.5),
    PaperRow("1", "p3_p4", "P3, P4", 90.4, 80.5, 91.1, 91.6),
    PaperRow("1", "p3_p4_p5", "P3, P4, P5", 90.9, 80.4, 90.0, 90.5),
    PaperRow("2", "fpn", "none", mAP=83.4, top1=83.7),
    PaperRow("2", "lateral", "lateral", mAP=90.6, top1=90.8),
    PaperRow("2", "output", "output", mAP=91.4, top1=91.9),
    PaperRow("2", "concat", "concat", mAP=84.0, top1=84.1),
    PaperRow("2", "lateral_output", "lateral + output", mAP=91.8, top1=92.2, inferred=True),
    PaperRow("2", "lateral_concat", "lateral + concat", mAP=90.7, top1=91.0, inferred=True),
    PaperRow("2", "output_concat", "output + concat", mAP=92.0, top1=92.5, inferred=True),
    PaperRow("2", "", "lateral + output + concat", mAP=93.1, top1=93.4),
    PaperRow("3", "t1", "T1", 87.5, 79.0, 80.3, 79.2),
    PaperRow("3", "t2", "T2", 89.1, 78.6, 77.1, 75.9),
    PaperRow("3", "t3", "T3", 90.1, 81.4, 80.7, 80.2),
    PaperRow("3", "", "AlignPS", 90.3, 81.2, 93.1, 93.4),
    PaperRow("4", "oim", "OIM", mAP=92.4, top1=92.9),
    PaperRow("4", "toim_without_lut", "TOIM w/o LUT", mAP=92.8, top1=93.2),
    PaperRow("4", "", "TOIM w/ LUT", mAP=93.1, top1=93.4),
    PaperRow("5", "", "none", mAP=93.1, top1=93.4),
    PaperRow("5", "res3", "res3", mAP=93.5, top1=93.9),
    PaperRow("5", "res3_res4", "res3 & res4", mAP=93.5, top1=94.0),
    PaperRow("5", "plus", "res3 & res4 & res5", mAP=94.0, top1=94.5),
    PaperRow("6", "", "AlignPS", mAP=93.1, top1=93.4),
    PaperRow("6", "plus", "AlignPS+", mAP=94.0, top1=94.5),
    PaperRow("6", "", "AlignPS", mAP=45.9, top1=81.9, dataset=PRW),
    PaperRow("6", "plus", "AlignPS+", mAP=46.1, top1=82.1, dataset=PRW),
    PaperRow("roi", "", "AlignPS", mAP=93.1, top1=93.4),
    PaperRow("roi", "roi", "ROI-AlignPS", mAP=95.1, top1=96.0),
    PaperRow("roi", "", "AlignPS", mAP=45.9, top1=81.9, dataset=PRW),
    PaperRow("roi", "roi", "ROI-AlignPS", mAP=51.6, top1=84.4, dataset=PRW),
)


# The released PRW models were trained without the triplet and with the table of the OIM paper.
RELEASED_PRW: Changes = {
    "loss.lut_size": 483,
    "loss.inverse_lut_temperature": 15.0,
    "loss.normalize_lut": True,
    "loss.triplet": "none",
    "optimizer.weight_decay": 1e-3,
}
# The released ROI-AlignPS was trained with the same values on both data sets.
RELEASED_ROI = RELEASED_CODE | {
    "optimizer.learning_rate": 0.0015,
    "optimizer.warmup": "1141 steps",
    "optimizer.warmup_start": 1 / 200,
    "optimizer.clip_norm": 10.0,
    "train.batch_size": 5,
}
# These borders give each level a share of the synthetic scenes' people (36 to 150 pixels high in
# 256x192). With the paper's, only P3 and P4 would have any.
SYNTHETIC_BORDERS = (48, 72, 96, 120)

# By data set and variant: further or other changes.
_OWN_CHANGES: dict[str, dict[str, Changes]] = {
    CUHK: {"roi": RELEASED_ROI},
    PRW: {
        "released": RELEASED_PRW,
        "released_plus": RELEASED_PRW | {"optimizer.weight_decay": 7e-4},
        "roi": RELEASED_ROI | {"loss.lut_size": 483},
    },
    "synthetic": {
        name: {"loss.level_borders": SYNTHETIC_BORDERS[: len(borders)]}
        for name, variant in VARIANTS.items()
        if (borders := variant.changes.get("loss.level_borders"))
    }
    # Few regions, which cost little on a CPU.
    | {"roi": {"loss.rois_per_image": 8, "loss.roi_inverse_temperature": 10.0}},
}


def variants_for(dataset: str) -> dict[str, Variant]:
    """The variants by name, with the values of a data set (`config.data.name`); "" is AlignPS."""
    own = _OWN_CHANGES.get(dataset, {})
    return {
        name: Variant(variant.description, {**variant.changes, **own.get(name, {})})
        for name, variant in VARIANTS.items()
    }


def figures_on(dataset: str) -> str:
    """The data set whose paper metrics stand beside runs on `dataset`: PRW has its own."""
    return PRW if dataset == PRW else CUHK


def rows_of(table: str, dataset: str) -> tuple[tuple[str, PaperRow], ...]:
    """The rows of a table with metrics on `figures_on(dataset)`, each after its variant's name."""
    data = figures_on(dataset)
    return tuple((row.variant, row) for row in PAPER if row.table == table and row.dataset == data)


def apply_variant(config: ConfigDict, variant: str) -> ConfigDict:
    """`config` with the fields of an entry of `variants_for` replaced; UserError without one."""
    variants = variants_for(config.data.name)
    if variant:
        known_name("variant of the configuration", variant, sorted(filter(None, variants)))
    config.update_from_flattened_dict(dict(variants[variant].changes))
    return config
