"""For tests: configs/synthetic.py with fewer and smaller scenes and few steps, seconds on a CPU."""

from ml_collections import ConfigDict

from configs import synthetic
from configs.variants import apply_variant


def get_config(variant: str = "") -> ConfigDict:
    """`variant` names an entry of `configs.variants.variants_for("synthetic")`."""
    config = synthetic.get_config()
    data = config.data
    data.root = "data/tiny"
    data.synthetic.train_images = 24
    data.synthetic.test_images = 16
    data.synthetic.train_identities = 8
    data.synthetic.test_identities = 6
    data.synthetic.height = 96
    data.synthetic.width = 128
    data.train_scales = ((128, 96),)
    data.test_scale = (128, 96)

    config.model.backbone_width = 8
    config.model.channels = 16
    config.model.norm_groups = 4
    config.loss.queue_size = 16

    config.optimizer.learning_rate = 0.001
    config.optimizer.drop_factor = 0.4
    config.optimizer.warmup = "2 steps"
    config.optimizer.drops = ("20 steps",)
    config.train.batch_size = 4
    config.train.duration = "6 steps"
    config.train.log_every_steps = 1
    config.train.checkpoint_every = "2 steps"
    config.train.eval_every = "1000 steps"
    config.eval.batch_size = 4
    config.eval.untrained_baseline = False
    return apply_variant(config, variant)
