"""A small AlignPS on the built-in synthetic scenes: trained from scratch in minutes on a CPU.

This is what `make demo` runs:

    python launch.py --config configs/synthetic.py --workdir=runs/demo
"""

from ml_collections import ConfigDict

from configs import cuhk
from configs.variants import apply_variant


def get_config(variant: str = "") -> ConfigDict:
    """`variant` names an entry of `configs.variants.variants_for("synthetic")`."""
    config = cuhk.get_config()
    data = config.data
    data.name = "synthetic"
    data.root = "data/synthetic"
    data.train_scales = ((256, 192),)
    data.test_scale = (256, 192)
    data.workers = 1
    # Many identities, each in few photos: what tells these apart also tells others apart.
    data.synthetic.train_images = 2800
    data.synthetic.train_identities = 560

    model = config.model
    model.backbone = "resnet_small"
    model.pretrained = "random"
    model.backbone_width = 24
    model.frozen_stages = -1
    model.channels = 48
    model.head_convs = 1
    # A network from scratch learns faster from a plain grid and boxes of a person's size.
    model.offset_gain = 0.0
    model.initial_distance = 3.0
    model.norm_groups = 8
    model.channel_order = "RGB"
    model.pixel_mean = (114.0, 114.0, 114.0)
    model.pixel_std = (58.0, 58.0, 58.0)

    config.loss.queue_size = 100
    # A row of the lookup table becomes a mean over several photos, not a copy of the last one.
    config.loss.lut_momentum = 0.9

    optimizer = config.optimizer
    optimizer.name = "adamw"
    optimizer.learning_rate = 0.0006
    # Each step of AdamW takes learning_rate times this share off a weight.
    optimizer.weight_decay = 0.05
    optimizer.warmup = "100 steps"
    optimizer.drops = tuple(f"{step} steps" for step in (2000, 2840, 3500, 4000, 4420, 4700))
    optimizer.drop_factor = 0.6

    train = config.train
    # On a CPU, many small steps teach this network more than few large ones that take as long.
    train.batch_size = 2
    train.duration = "5000 steps"
    train.log_every_steps = 10
    train.checkpoint_every = "1250 steps"
    train.eval_every = "2500 steps"

    config.eval.batch_size = 8
    config.eval.untrained_baseline = True
    return apply_variant(config, variant)
