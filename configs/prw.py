"""AlignPS on PRW: the fields that differ from CUHK-SYSU.

    python launch.py --config configs/prw.py --config.data.root=/data/PRW --workdir=runs/prw

The paper reports mAP 45.9 and top-1 81.9 (Table 6), after 20 hours on one V100.
"""

from ml_collections import ConfigDict

from configs import cuhk
from configs.variants import apply_variant


def get_config(variant: str = "") -> ConfigDict:
    """`variant` names an entry of `configs.variants.variants_for("prw")`."""
    config = cuhk.get_config()
    config.data.name = "prw"
    config.data.root = "data/PRW"
    config.loss.queue_size = 500
    config.eval.score_threshold = 0.15
    return apply_variant(config, variant)
