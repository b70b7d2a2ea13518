"""Checkpoints of older versions: what they did before a field existed, what nobody reads now."""

from __future__ import annotations

from ml_collections import ConfigDict

# By field, what the software did before it had the field. These are facts about old checkpoints:
# they stay as they are when a default of `configs/` changes.
BEFORE = {
    # There was no limit then; it changes no result and protects from files of today.
    "data.max_pixels": 100_000_000,
    "data.max_programs": None,
    "data.validation_fraction": 0.0,
    "model.levels": (3,),
    "model.lateral_deform": True,
    "model.output_deform": True,
    "model.concatenate": True,
    "model.reid": "input",
    "model.offset_gain": 1.0,
    "model.initial_distance": 0.0,
    "model.remat": False,
    "model.precision": "default",
    "model.stride_in_3x3": False,
    "loss.level_borders": (),
    "optimizer.name": "sgd",
    "optimizer.drop_factor": 0.1,
    "train.parallel": "pmap",
    "train.accumulate": 1,
    "train.ema_decay": None,
    "train.profile": None,
    "optimizer.scale_with_batch": None,
    # Everything that was measured then was measured on CPUs.
    "eval.precision": "highest",
    "eval.boxes": "detected",
    "eval.context_matching": (),
}
# Fields that had another name, without the section.
RENAMED = {
    "loss.lut_temperature": "inverse_lut_temperature",
    "loss.queue_temperature": "inverse_queue_temperature",
}
# Arrays that older checkpoints hold: `rng` was for dropout, which the network has not.
NO_LONGER_READ = ("rng",)


def complete(config: ConfigDict) -> ConfigDict:
    """Gives a stored configuration the names of today, and the fields that it lacks."""
    for path, name in RENAMED.items():
        section, field = path.split(".")
        if section in config and field in config[section]:
            config[section][name] = config[section][field]
            del config[section][field]
    for path, value in BEFORE.items():
        section, field = path.split(".")
        if section in config and field not in config[section]:
            config[section][field] = value
    return config
