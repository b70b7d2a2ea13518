"""Named variants of a configuration: each is one entry that says what it changes."""

from ml_collections import ConfigDict

# What the released code does differently from the paper, apart from the data set's own values.
RELEASED = {
    "model.background_levels": True,
    "loss.normalize_lut": False,
    "loss.queue_channels": 64,
    "loss.triplet_first_lut_identity": 1,
    "optimizer.weight_decay": 1e-4,
    "optimizer.bias_lr_factor": 2.0,
    "optimizer.bias_weight_decay": 0.0,
    "optimizer.warmup": "500 steps",
}
PLUS = {"model.deform_stages": (3, 4, 5)}

VARIANTS = {
    "": {},
    "plus": PLUS,
    "released": RELEASED,
    "released_plus": RELEASED | PLUS,
}


def apply_variant(
    config: ConfigDict, variant: str, variants: dict[str, dict[str, object]] = VARIANTS
) -> ConfigDict:
    """Returns `config` with the fields of one entry of `variants` replaced.

    Raises:
      ValueError: there is no such variant.
    """
    if variant not in variants:
        known = ", ".join(sorted(name for name in variants if name))
        raise ValueError(f"unknown variant {variant!r}; known: {known}")
    with config.unlocked():
        for field, value in variants[variant].items():
            config.update_from_flattened_dict({field: value})
    return config
