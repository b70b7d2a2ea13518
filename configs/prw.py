"""AlignPS on PRW: what differs from CUHK-SYSU.

    python launch.py --config configs/prw.py --config.data.root=/data/PRW --workdir=runs/prw

The paper reports mAP 45.9 and top-1 81.9 (Table 6), after 20 hours on one V100.
"""

from ml_collections import ConfigDict

from configs import cuhk
from configs.variants import VARIANTS, apply_variant

# The released PRW models were trained without the triplet, with the table as in the OIM paper.
RELEASED_PRW = VARIANTS["released"] | {
    "loss.lut_size": 483,
    "loss.lut_temperature": 15.0,
    "loss.normalize_lut": True,
    "loss.triplet": "none",
    "optimizer.weight_decay": 1e-3,
}
PRW_VARIANTS = VARIANTS | {
    "released": RELEASED_PRW,
    "released_plus": RELEASED_PRW | VARIANTS["plus"] | {"optimizer.weight_decay": 7e-4},
}


def get_config(variant: str = "") -> ConfigDict:
    """`variant` names an entry of `PRW_VARIANTS`."""
    config = cuhk.get_config()
    config.data.name = "prw"
    config.data.root = "data/PRW"
    config.loss.queue_size = 500
    config.eval.score_threshold = 0.15
    return apply_variant(config, variant, PRW_VARIANTS)
