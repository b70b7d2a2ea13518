"""AlignPS on CUHK-SYSU: the complete configuration, every field documented.

    python launch.py --config configs/cuhk.py --config.data.root=/data/CUHK-SYSU --workdir=runs/cuhk

The paper reports mAP 93.1 and top-1 93.4 with gallery size 100 (Table 6), after 29 hours on one
V100. Variants follow a colon, such as `configs/cuhk.py:plus` (AlignPS+) or `:released` (the values
of the released code where they differ from the paper); `--mode=list` prints them all.
"""

from ml_collections import ConfigDict, config_dict

from configs.variants import apply_variant


def get_config(variant: str = "") -> ConfigDict:
    """The paper's settings; `variant` names an entry of `configs.variants.VARIANTS`."""
    config = ConfigDict()
    # Seeds initialisation, shuffling, scales and flips.
    config.seed = 0

    data = config.data = ConfigDict()
    # cuhk_sysu, prw, coco_person_search or synthetic.
    data.name = "cuhk_sysu"
    # Folder of the data set in its own layout (see README, "Data sets").
    data.root = "data/CUHK-SYSU"
    # Where the prepared ArrayRecord files go; unset: `<root>/prepared`.
    data.prepared_dir = config_dict.placeholder(str)
    # (long, short) sides; one pair is drawn per image, the aspect ratio is kept.
    data.train_scales = (
        (667, 400),
        (1000, 600),
        (1333, 800),
        (1500, 900),
        (1666, 1000),
        (2000, 1200),
    )
    data.test_scale = (1500, 900)
    data.flip_probability = 0.5
    # Training images with a side (of the photo) below this many pixels are left out.
    data.min_side = 32
    # Photos with more pixels are refused before they are decoded, here and in searches: a file of a
    # few hundred bytes can ask for all the memory there is.
    data.max_pixels = 100_000_000
    # Threads that decode and resize; 0 does it in the training thread.
    data.workers = 8
    # Batches kept ready ahead of the training step (at least one per worker).
    data.prefetch = 4
    # Shape of the synthetic data set (read only by data.name=synthetic).
    data.synthetic = ConfigDict()
    data.synthetic.seed = 0
    data.synthetic.train_images = 1200
    data.synthetic.test_images = 160
    data.synthetic.train_identities = 240
    data.synthetic.test_identities = 60
    data.synthetic.height = 192
    data.synthetic.width = 256

    model = config.model = ConfigDict()
    # resnet50 (ImageNet weights, frozen statistics) or resnet_small (group norm, from scratch).
    model.backbone = "resnet50"
    # Where the backbone's weights come from at the start of training: a checkpoint of ours, such
    # as --mode=convert writes from an ImageNet ResNet-50; unset: random weights.
    model.pretrained = config_dict.placeholder(str)
    # Channels of its stem; doubled in every stage.
    model.backbone_width = 64
    # Stages up to this one are never updated (0: stem only, 1: stem and res2; -1: none).
    model.frozen_stages = 1
    # Backbone stages (3, 4, 5) whose 3x3 convolutions are deformable (DCNv2): AlignPS+.
    model.deform_stages = ()
    # Width of the neck, hence dimension of the embeddings, and of the head's towers.
    model.channels = 256
    # The neck: deformable convolutions (False: plain ones) as lateral and output convolutions, and
    # maps joined by concatenation (False: by addition, as in FPN).
    model.lateral_deform = True
    model.output_deform = True
    model.concatenate = True
    # Levels of the pyramid (3 to 7, strides 8 to 128) that people are searched on.
    model.levels = (3,)
    # Where embeddings come from: input (of the head: "re-id first", AlignPS), regression or
    # classification (on top of that tower: T1, T2 of the paper) or independent (a third tower: T3).
    model.reid = "input"
    # Initial offsets of the neck's deformable convolutions: Xavier uniform times this.
    model.offset_gain = 1.0
    # 3x3 convolutions in each tower of the head; the last one is deformable (DCNv2).
    model.head_convs = 4
    # Groups of the head's (and of resnet_small's) group normalisation.
    model.norm_groups = 32
    # Box distances before training, in strides (release: 0).
    model.initial_distance = 0.0
    # Also run the head on P4-P7 in training, as pure background (released code).
    model.background_levels = False
    # float32 or bfloat16 activations; parameters, losses and memory stay float32.
    model.dtype = "float32"
    # Recompute the activations of each block in the backward pass: less memory, more time.
    model.remat = False
    # Input convention: what the backbone's weights expect of a pixel.
    model.channel_order = "BGR"
    model.pixel_mean = (103.530, 116.280, 123.675)  # in channel order
    model.pixel_std = (1.0, 1.0, 1.0)
    # Where a stage of resnet50 halves its map: in the 3x3 of its first block (torchvision) or in
    # the 1x1 before it (Caffe, the release).
    model.stride_in_3x3 = False

    loss = config.loss = ConfigDict()
    loss.focal_alpha = 0.25
    loss.focal_gamma = 2.0
    # Centre sampling: half side of the positive region, in strides.
    loss.center_radius = 1.5
    # Largest distance, in pixels, from a location to a side of its box: one border between each
    # level of model.levels and the next.
    loss.level_borders = ()
    # Rows of the lookup table; unset: as many as the training set has identities.
    loss.lut_size = config_dict.placeholder(int)
    loss.queue_size = 5000
    # 1 / tau of Eq. (1), for the table and for the queue.
    loss.inverse_lut_temperature = 10.0
    loss.inverse_queue_temperature = 10.0
    # Exponent of the focal term that is added to OIM.
    loss.oim_focal_gamma = 2.0
    # Share of the old row that a lookup-table update keeps.
    loss.lut_momentum = 0.5
    # Scale each updated row of the table back to length one (OIM paper; not in the release).
    loss.normalize_lut = True
    # Channels of a queue slot that are written; unset: all (the release writes 64).
    loss.queue_channels = config_dict.placeholder(int)
    # none, batch (TOIM without table entries) or batch_and_lut (TOIM).
    loss.triplet = "batch_and_lut"
    loss.triplet_margin = 0.3
    # Smallest identity whose table row joins the triplet (the release leaves out identity 0).
    loss.triplet_first_lut_identity = 0

    optimizer = config.optimizer = ConfigDict()
    # sgd (the paper's) or adamw.
    optimizer.name = "sgd"
    optimizer.learning_rate = 0.001
    optimizer.momentum = 0.9
    optimizer.weight_decay = 5e-4
    # Learning-rate factor and weight decay of the biases of plain and DCNv2 main convolutions.
    optimizer.bias_lr_factor = 1.0
    optimizer.bias_weight_decay = 5e-4
    # Linear warm-up from this share of the rate over this long ("<number> steps" or "epochs").
    optimizer.warmup = "300 steps"
    optimizer.warmup_start = 1 / 3
    # When the rate is multiplied by `drop_factor`.
    optimizer.drops = ("16 epochs", "22 epochs")
    optimizer.drop_factor = 0.1
    # Largest global gradient norm.
    optimizer.clip_norm = 35.0

    train = config.train = ConfigDict()
    # Images per step over all devices.
    train.batch_size = 4
    # How long to train: "<number> epochs" or "<number> steps".
    train.duration = "24 epochs"
    # Static number of positive locations kept per image; more are dropped and counted in the
    # log. Unset: 9 per level and person of the fullest training image, never exceeded.
    train.max_positives = config_dict.placeholder(int)
    train.log_every_steps = 50
    train.checkpoint_every = "1000 steps"
    # Evaluate (detection and search) this often, and always at the end.
    train.eval_every = "8 epochs"
    # Latest checkpoints kept, besides the best one by search mAP.
    train.keep_checkpoints = 3

    evaluation = config.eval = ConfigDict()
    # Images per step over all devices.
    evaluation.batch_size = 4
    # Detections below take no part in search and detection metrics.
    evaluation.score_threshold = 0.2
    # Candidates per image, classification score to be one, IoU of suppression, detections kept.
    evaluation.pre_nms = 1000
    evaluation.min_cls_score = 0.05
    evaluation.nms_iou = 0.5
    evaluation.max_detections = 100
    # Boxes that are searched: detected, or ground_truth (perfect detection, an upper bound).
    evaluation.boxes = "detected"
    # Weigh similarities by context bipartite graph matching (SeqNet), with k1 gallery images and k2
    # people of the query photo: (k1, k2); () does without. SeqNet: (10, 3), on PRW (30, 4).
    evaluation.context_matching = ()
    # Also evaluate the network as it was before training, for comparison.
    evaluation.untrained_baseline = False
    # Search protocols to report, the first one picks the best checkpoint; () means all that the
    # folder has, in this order. cuhk_sysu: TestG100, TestG50, TestG500, TestG1000, TestG2000,
    # TestG4000, all, occlusion, resolution; synthetic the same by size; prw: all, cross_camera;
    # coco_person_search: all. See docs/evaluation.md.
    evaluation.protocols = ()

    return apply_variant(config, variant)
