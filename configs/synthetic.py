"""A small AlignPS on the built-in synthetic scenes: trained from scratch in minutes on a CPU.

python launch.py --config configs/synthetic.py --workdir=runs/synthetic
"""

from ml_collections import ConfigDict

from configs import cuhk
from configs.variants import apply_variant


def get_config(variant: str = "") -> ConfigDict:
    """`variant` names an entry of `configs.variants.VARIANTS`."""
    config = cuhk.get_config()
    data = config.data
    data.name = "synthetic"
    data.root = "data/synthetic"
    data.train_scales = ((320, 240),)
    data.test_scale = (320, 240)
    data.workers = 1

    model = config.model
    model.backbone = "resnet_small"
    model.backbone_width = 32
    model.frozen_stages = -1
    model.channels = 64
    model.head_convs = 2
    model.norm_groups = 8
    model.channel_order = "RGB"
    model.pixel_mean = (114.0, 114.0, 114.0)
    model.pixel_std = (58.0, 58.0, 58.0)

    config.loss.queue_size = 100

    optimizer = config.optimizer
    optimizer.learning_rate = 0.02
    optimizer.warmup = "100 steps"
    optimizer.drops = ("6 epochs", "7.5 epochs")

    train = config.train
    train.batch_size = 8
    train.duration = "8 epochs"
    train.log_every_steps = 10
    train.checkpoint_every = "2 epochs"
    train.eval_every = "4 epochs"

    config.eval.batch_size = 8
    config.eval.untrained_baseline = True
    return apply_variant(config, variant)
