"""The synthetic scenes at the scale of docs/ablations: a row of a table takes minutes on a CPU.

python launch.py --mode=reproduce --config=configs/ablation.py --table=2
"""

from ml_collections import ConfigDict

from configs import synthetic
from configs.variants import apply_variant


def get_config(variant: str = "") -> ConfigDict:
    """A narrower network than configs/synthetic.py, on fewer photos, for fewer steps."""
    config = synthetic.get_config()
    config.data.root = "data/ablation"
    config.data.synthetic.train_images = 1200
    config.data.synthetic.train_identities = 240
    config.model.backbone_width = 16
    config.model.channels = 32
    config.optimizer.learning_rate = 0.001
    config.optimizer.drop_factor = 0.4
    config.optimizer.warmup = "30 steps"
    config.optimizer.drops = ("150 steps", "200 steps", "225 steps")
    config.train.batch_size = 8
    config.train.duration = "240 steps"
    config.train.checkpoint_every = "120 steps"
    config.train.eval_every = "240 steps"
    config.eval.untrained_baseline = False
    return apply_variant(config, variant)
