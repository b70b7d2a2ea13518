"""AlignPS on CUHK-SYSU: the complete configuration, every field documented.

    python launch.py --config configs/cuhk.py --config.data.root=/data/CUHK-SYSU --workdir=runs/cuhk

It starts from ImageNet weights, which are downloaded once (`model.pretrained`). The paper reports
mAP 93.1 and top-1 93.4 with gallery size 100 (Table 6), after 29 hours on one V100. A variant
follows a colon: `configs/cuhk.py:plus` is AlignPS+, `:released` has the values of the released code
where they differ from the paper. `--mode=list` prints them all.
"""

from ml_collections import ConfigDict, config_dict

from configs.variants import apply_variant


def get_config(variant: str = "") -> ConfigDict:
    """The paper's settings; `variant` names an entry of `configs.variants.VARIANTS`."""
    config = ConfigDict()
    # Seed of the initial weights, the shuffling, the scales and the flips.
    config.seed = 0

    data = config.data = ConfigDict()
    # The data set: cuhk_sysu, prw, coco_person_search or synthetic.
    data.name = "cuhk_sysu"
    # Folder of the data set in its own layout (see docs/data.md).
    data.root = "data/CUHK-SYSU"
    # Folder of the prepared ArrayRecord files; if unset, `<root>/prepared`.
    data.prepared_dir = config_dict.placeholder(str)
    # Limits (long side, short side) in pixels. Each image draws one pair and is resized to the
    # largest size within it that keeps the aspect ratio.
    scales = (667, 400), (1000, 600), (1333, 800), (1500, 900), (1666, 1000), (2000, 1200)
    data.train_scales = scales
    # The same limits for evaluation and search.
    data.test_scale = (1500, 900)
    # Maximum number of padded shapes, chosen to minimize padding; the images of a batch share a
    # scale. With 0, a shape for each scale and orientation, and each image draws a scale (Paper).
    data.max_programs = 12
    # Probability that a training image is mirrored.
    data.flip_probability = 0.5
    # Training leaves out photos with a side of fewer pixels than this.
    data.min_side = 32
    # Share of the training identities, and all photos of them, that are held out as a validation
    # split, whose search mAP chooses the checkpoint that counts; with 0, the last one counts.
    data.validation_fraction = 0.0
    # Boxes are annotated in photos as they are stored, or upright: turned as EXIF says.
    data.orientation = "stored"
    # Go on although some photos cannot be used: they are not trained on, and black in evaluations.
    data.skip_damaged = False
    # Prepare the photos anew, once, although they are prepared.
    data.prepare_again = False
    # Photos with more pixels are refused before they are decoded, here and in searches.
    data.max_pixels = 100_000_000
    # Threads that decode and resize photos; with 0, the training thread does it.
    data.workers = 8
    # Batches that are read ahead of the training step.
    data.prefetch = 4
    # Of data.name=synthetic alone: images of one seed and size (in pixels) are always the same.
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
    # The weights to start from, which also decide channel_order, pixel_mean, pixel_std and
    # stride_in_3x3 below (docs/weights.md): msra (of the released code; needs PyTorch once) and
    # torchvision are downloaded; a file (.safetensors, .pth), https address, run or folder of a
    # step holds a backbone, or a detector to fine-tune; random is for resnet_small, unfrozen.
    model.pretrained = "msra"
    # Channels of the backbone's stem; every stage doubles them.
    model.backbone_width = 64
    # Training never updates the stages up to this one (0: the stem, 1: stem and res2; -1: none).
    model.frozen_stages = 1
    # Backbone stages (3, 4, 5) whose 3x3 convolutions are deformable (DCNv2): AlignPS+.
    model.deform_stages = ()
    # Channels of the neck, which is the dimension of the embeddings, and of the head's towers.
    model.channels = 256
    # Whether the neck's lateral and its output convolutions are deformable (False: plain), and
    # whether it joins maps by concatenation (False: by addition, as FPN does).
    model.lateral_deform = True
    model.output_deform = True
    model.concatenate = True
    # Levels of the pyramid (3 to 7, strides 8 to 128) on which people are found.
    model.levels = (3,)
    # Where embeddings come from: input (of the head: "re-id first", AlignPS), regression or
    # classification (output of that tower: T1, T2 of the paper) or independent (a third tower: T3).
    model.reid = "input"
    # Factor on the initial offset weights (Xavier uniform) of the neck's deformable convolutions.
    model.offset_gain = 1.0
    # 3x3 convolutions in each tower of the head; the last one is deformable (DCNv2).
    model.head_convs = 4
    # Groups of the group normalization in the head (and in resnet_small).
    model.norm_groups = 32
    # Distances from a location to its box's sides before training, in strides (Released code: 0).
    model.initial_distance = 0.0
    # In training, run the head on P4 to P7, too: all background (Released code).
    model.background_levels = False
    # Also embed regions of the map with stride 16 around people, found by their boxes: ROI-AlignPS.
    model.roi = False
    # Type of the activations: float32 or bfloat16. Parameters and losses are always float32.
    model.dtype = "float32"
    # How accelerators multiply float32 numbers in training: highest, or default (one pass
    # in bfloat16 on TPUs, TF32 on GPUs since Ampere). Losses are exact. See docs/devices.md.
    model.precision = "default"
    # Recompute the activations of each block in the backward pass: less memory, more time.
    model.remat = False
    # What the backbone's weights expect of a pixel: the order of its channels (BGR or RGB), then
    # (pixel - pixel_mean) / pixel_std in that order. Set by model.pretrained, unless it is random.
    model.channel_order = "BGR"
    model.pixel_mean = (103.530, 116.280, 123.675)
    model.pixel_std = (1.0, 1.0, 1.0)
    # Where a stage of resnet50 halves its map: in the 3x3 convolution of its first block (True:
    # torchvision) or in the 1x1 convolution before it (False: Caffe, Released code).
    model.stride_in_3x3 = False

    loss = config.loss = ConfigDict()
    # Focal loss of the classification: weight of positive locations, and exponent.
    loss.focal_alpha = 0.25
    loss.focal_gamma = 2.0
    # Half the side of the square around a box's center in which locations are positive, in strides.
    loss.center_radius = 1.5
    # One border between each level of model.levels and the next, in pixels: a level learns boxes
    # whose largest distance from the location to a side lies between its borders.
    loss.level_borders = ()
    # Rows of the lookup table; if unset, as many as the training set has identities.
    loss.lut_size = config_dict.placeholder(int)
    # Slots of the circular queue of people without identity.
    loss.queue_size = 5000
    # 1 / tau of Eq. (1), for the table and for the queue.
    loss.inverse_lut_temperature = 10.0
    loss.inverse_queue_temperature = 10.0
    # Exponent of the focal term of the OIM loss (Paper, Sec. 4.2); 0 gives the plain loss.
    loss.oim_focal_gamma = 2.0
    # Whether the OIM loss is the mean over labeled people (ROI-AlignPS) or over all.
    loss.oim_labeled_mean = False
    # With model.roi, number of regions that are sampled from an image.
    loss.rois_per_image = 128
    # 1 / tau of their OIM loss, for their table and their queue.
    loss.roi_inverse_temperature = 30.0
    # Share of the old row that an update of the lookup table keeps.
    loss.lut_momentum = 0.5
    # Scale each updated row of the table back to length one (OIM paper; Released code: False).
    loss.normalize_lut = True
    # How many channels of a queue slot are written; if unset, all (Released code: 64).
    loss.queue_channels = config_dict.placeholder(int)
    # Samples of the triplet loss: none (OIM alone), batch (no table rows) or batch_and_lut (TOIM).
    loss.triplet = "batch_and_lut"
    # Margin M of the triplet loss (Paper, Eq. 3).
    loss.triplet_margin = 0.3
    # Smallest identity whose table row joins the triplet (Released code: 1).
    loss.triplet_first_lut_identity = 0

    optimizer = config.optimizer = ConfigDict()
    # sgd (Paper) or adamw.
    optimizer.name = "sgd"
    # Rate after the warm-up; momentum is the first decay rate (beta 1) of adamw.
    optimizer.learning_rate = 0.001
    # If set, the rate is multiplied by train.batch_size / scale_with_batch (linear scaling).
    optimizer.scale_with_batch = config_dict.placeholder(int)
    optimizer.momentum = 0.9
    optimizer.weight_decay = 5e-4
    # Factor on the learning rate, and weight decay, of the biases of plain convolutions and of the
    # main convolutions of DCNv2; if the decay is unset, it is that of the weights.
    optimizer.bias_lr_factor = 1.0
    optimizer.bias_weight_decay = config_dict.placeholder(float)
    # The rate rises linearly from the share `warmup_start` during `warmup`, in steps or epochs.
    optimizer.warmup = "300 steps"
    optimizer.warmup_start = 1 / 3
    # When the rate is multiplied by `drop_factor`, each "<number> steps" or "<number> epochs".
    optimizer.drops = ("16 epochs", "22 epochs")
    optimizer.drop_factor = 0.1
    # Gradients are scaled down to this norm over all parameters.
    optimizer.clip_norm = 35.0

    train = config.train = ConfigDict()
    # Images per step, over all devices together.
    train.batch_size = 4
    # Parts that each device feeds its images to the network in: with 4, a step needs the memory of
    # a quarter of its images and one more forward pass, and computes the same.
    train.accumulate = 1
    # How long to train: "<number> epochs" or "<number> steps".
    train.duration = "24 epochs"
    # Maximum number of positive locations per image (the log counts those that are dropped); if
    # unset, as many as the fullest training image can have.
    train.max_positives = config_dict.placeholder(int)
    # If set, evaluations and searches use a moving average of the parameters, which keeps this
    # share of itself in each step (less at first).
    train.ema_decay = config_dict.placeholder(float)
    # "first:last": steps to trace with jax.profiler, into <workdir>/profile.
    train.profile = config_dict.placeholder(str)
    # Steps between two lines of the log, and time between two checkpoints.
    train.log_every_steps = 50
    train.checkpoint_every = "1000 steps"
    # Time between two evaluations (detection and search); there is always one at the end.
    train.eval_every = "8 epochs"
    # How many of the latest checkpoints stay, besides the one with the highest search mAP.
    train.keep_checkpoints = 3

    evaluation = config.eval = ConfigDict()
    evaluation.batch_size = 4  # on CPUs, 1 is fastest
    # Detections with a lower score take no part in search and detection metrics.
    evaluation.score_threshold = 0.2
    # Candidates of each level of an image, and the classification score that they must exceed.
    evaluation.pre_nms = 1000
    evaluation.min_cls_score = 0.05
    # IoU above which a better detection suppresses another, and detections kept per image.
    evaluation.nms_iou = 0.5
    evaluation.max_detections = 100
    # Type of the activations: float32, or bfloat16, whose boxes differ; model.dtype is not read.
    evaluation.dtype = "float32"
    # The same choice as config.model.precision, for evaluation and search.
    evaluation.precision = "highest"
    # Which boxes are searched: detected, or ground_truth (an upper bound).
    evaluation.boxes = "detected"
    # With model.roi, whose embeddings are compared: those of both branches, dense alone, or roi.
    evaluation.branch = "both"
    # (k1, k2): context bipartite graph matching (SeqNet) with k1 gallery images and k2 people of
    # the query photo replaces similarities; () does without. SeqNet uses (10, 3), on PRW (30, 4).
    evaluation.context_matching = ()
    # Also evaluate the network as it was before training, for comparison.
    evaluation.untrained_baseline = False
    # Whether the checkpoint with the best mAP on the test split counts, which is too good then.
    evaluation.choose_on_test = False
    # Search protocols to report. () means all that the folder has, in this order: cuhk_sysu has
    # TestG100, TestG50, TestG500, TestG1000, TestG2000, TestG4000, all, occlusion and resolution,
    # synthetic the same by size, prw all and cross_camera, coco_person_search all.
    evaluation.protocols = ()

    return apply_variant(config, variant)
