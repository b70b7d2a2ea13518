"""The configuration of a mode: that of --config, or else what a checkpoint says about itself."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from alignps_jax.checkpoint.places import holds_checkpoint
from alignps_jax.checkpoint.store import load_config, load_run_config
from alignps_jax.command_line import Arguments
from alignps_jax.types import UserError
from configs import cuhk

# What decides what a trained network is and sees. The other fields of `config.model` matter at the
# start of training only (`pretrained`, `offset_gain`, `initial_distance`) or to its backward pass.
NETWORK_FIELDS = (
    *("backbone", "backbone_width", "deform_stages", "channels", "lateral_deform"),
    *("output_deform", "concatenate", "levels", "reid", "head_convs", "norm_groups"),
    *("background_levels", "dtype", "channel_order", "pixel_mean", "pixel_std", "stride_in_3x3"),
)
FIXED_FIELDS = (*(f"model.{name}" for name in NETWORK_FIELDS), "data.test_scale")


def train_config(args: Arguments) -> ConfigDict:
    """The configuration to train with: --config, else that of the run in --workdir to resume.

    --checkpoint is the detector to fine-tune; where nothing else says how, with its configuration.

    Raises:
      UserError: there is none of them, or a field is wrong.
    """
    config = args.configuration(None if args.config else _base_of_training(args))
    if args.checkpoint is None:
        return config
    if "model.pretrained" in args.overridden and config.model.pretrained != args.checkpoint:
        raise UserError(
            f"--checkpoint: found {args.checkpoint!r} beside --config.model.pretrained="
            f"{config.model.pretrained!r}, expected only one of them"
        )
    if args.workdir and Path(args.workdir).resolve() == Path(args.checkpoint).resolve():
        raise UserError(
            f"--checkpoint: found the run in --workdir itself, {args.workdir}; leave it out to "
            "resume that run, or choose another --workdir to fine-tune it"
        )
    with config.unlocked():
        config.model.pretrained = args.checkpoint
    return config


def _base_of_training(args: Arguments) -> ConfigDict:
    base = load_run_config(Path(args.workdir))
    source = args.workdir
    if base is None and args.checkpoint:
        base, source = load_config(Path(args.checkpoint)), args.checkpoint
    if base is None:
        raise UserError(
            f"--workdir: found no run in {args.workdir}, expected one to resume (or --config to "
            "start one)"
        )
    return _typed(base, source)


def checkpoint_config(args: Arguments, checkpoint: Path) -> ConfigDict:
    """The configuration to use a checkpoint with.

    It is the checkpoint's own, unless --config names a file; either way with the fields that the
    command line sets.

    Raises:
      UserError: there is no checkpoint, a field is wrong, or the file of --config disagrees with
        the checkpoint in what the network is or sees.
    """
    if args.config and not holds_checkpoint(checkpoint):
        return args.configuration()  # saved results without their network
    own = _typed(load_config(checkpoint), str(checkpoint))
    config = args.configuration(own)
    was, now = own.to_dict(), config.to_dict()
    different = [name for name in FIXED_FIELDS if _field(was, name) != _field(now, name)]
    typed = [name for name in different if name in args.overridden]
    silent = [name for name in different if name not in args.overridden]
    if silent:
        fields = "; ".join(
            f"config.{name}: found {_field(now, name)!r}, expected {_field(was, name)!r}"
            for name in silent
        )
        raise UserError(
            f"--config: {args.config} is not what {checkpoint} was trained with: {fields} "
            "(without --config, the checkpoint's own configuration holds)"
        )
    for name in typed:
        print(
            f"note: config.{name} is {_field(now, name)!r} as typed; {checkpoint} was trained with "
            f"{_field(was, name)!r}"
        )
    return config


def detections_config(args: Arguments) -> ConfigDict:
    """The configuration to measure --detections with: --config, else that of their run.

    Raises:
      UserError: they lie in no run's folder, or a field is wrong.
    """
    if args.config:
        return args.configuration()
    folder = Path(args.detections).parent
    if not (folder / "checkpoints").is_dir():
        raise UserError(
            f"--config: missing, and {folder}, where the detections lie, is no run's folder "
            "whose configuration could be taken"
        )
    return args.configuration(_typed(load_config(folder), str(folder)))


def _typed(stored: ConfigDict, source: str) -> ConfigDict:
    """A stored configuration with the types of today's fields, which unset ones have lost."""
    config = cuhk.get_config()
    try:
        with config.unlocked():
            _take(config, stored)
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        found = " ".join(str(error).split())
        raise UserError(f"{source}: its configuration is not one ({found})") from error
    return config


def _take(config: ConfigDict, stored: ConfigDict) -> None:
    for field, value in stored.items():
        if isinstance(value, ConfigDict) and isinstance(config.get(field), ConfigDict):
            _take(config[field], value)
        else:
            config[field] = value


def _field(config: dict, name: str) -> object:
    section, field = name.split(".")
    return config[section][field]
