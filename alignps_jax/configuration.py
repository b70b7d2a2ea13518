"""Which configuration and which folder a command line means."""

from __future__ import annotations

import copy
import re
import runpy
import traceback
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from alignps_jax.checkpoint.places import holds_checkpoint, is_step, results_folder
from alignps_jax.checkpoint.store import load_config, load_run_config
from alignps_jax.config import (
    FIELD_KINDS,
    FREE,
    NETWORK,
    check_config,
    check_name,
    flat_fields,
    out_of_range,
)
from alignps_jax.flags import Arguments
from alignps_jax.types import UserError

# Configurations that --config finds by their name, wherever the command is typed.
READY = ("cuhk", "prw", "synthetic", "tiny", "ablation")
_FOLDER = Path(__file__).parents[1] / "configs"
_REFUSED = re.compile(r"flag --(?:no)?config\.([\w.]+)=(.*?): ", re.DOTALL)


def configuration(args: Arguments, base: ConfigDict | None = None) -> ConfigDict:
    """The configuration of --config, else `base`, else cuhk, with the fields that were typed.

    Raises:
      UserError: the file or variant does not exist, the file fails, or a field is wrong.
    """
    if args.config or base is None:
        base = _loaded(args.config or "cuhk")
    config = copy.deepcopy(base).lock()  # unset fields keep their types
    for name in args.overridden:
        check_name(name)
    values, words = flags.FlagValues(), args.overrides
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=words)
        values(["", *words])
    except flags.Error as error:
        if found := _REFUSED.match(str(error)):
            raise out_of_range(found[1], found[2]) from error
        raise UserError(f"command line: {str(error).splitlines()[0]}") from error
    check_config(config)
    return config


def _loaded(spec: str) -> ConfigDict:
    """The configuration of FILE or FILE:VARIANT."""
    typed, _, variant = spec.partition(":")
    path = Path(typed)
    if not path.is_file() and path.stem in READY and path.parent in (Path(), Path("configs")):
        path = _FOLDER / f"{path.stem}.py"
    if not path.is_file():
        found, ready = "a folder" if path.is_dir() else "nothing there", ", ".join(READY)
        raise UserError(
            f"--config: found {found}: {path}, expected a configuration file or {ready}"
        )
    try:
        get_config = runpy.run_path(str(path))["get_config"]
        config = get_config(variant) if variant else get_config()
        if not isinstance(config, ConfigDict):
            raise TypeError(f"get_config returns {type(config).__name__}, expected a ConfigDict")
    except UserError:
        raise
    except Exception as error:  # the file is a program of the user's
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f", line {frame.lineno}" for frame in frames if frame.filename == str(path)]
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"--config: {path}{''.join(lines[-1:])}: {what}") from error
    return config


def train_config(args: Arguments) -> ConfigDict:
    """The configuration to train with: --config, else that of the run to resume or to fine-tune.

    Raises:
      UserError: there is none of them, or a field is wrong.
    """
    base = None
    if not args.config:
        base = load_run_config(args.workdir)
        if base is None and args.checkpoint:
            base = load_config(args.checkpoint)
        if base is None:
            raise UserError(
                f"--workdir: found no run in {args.workdir}, expected one to resume (or --config "
                "to start one)"
            )
        base = _typed(base, args.workdir)
    config = configuration(args, base)
    if not args.checkpoint:
        return config
    if "model.pretrained" in args.overridden:
        raise UserError("--checkpoint, --config.model.pretrained: found both, expected one")
    if args.workdir and args.workdir.resolve() == args.checkpoint.resolve():
        raise UserError(
            f"--checkpoint: found the run in --workdir itself, {args.workdir}; leave it out to "
            "resume that run, or choose another --workdir to fine-tune it"
        )
    with config.unlocked():
        config.model.pretrained = str(args.checkpoint)
    return config


def checkpoint_config(args: Arguments, checkpoint: Path) -> ConfigDict:
    """The configuration to use a checkpoint with: --config, else its own, with typed fields.

    Raises:
      UserError: there is no checkpoint, a field is wrong, or the file of --config disagrees with
        the checkpoint in what the network is or sees.
    """
    if args.config and not holds_checkpoint(checkpoint):
        return configuration(args)  # saved results without their network
    own = _typed(load_config(checkpoint), checkpoint)
    config = configuration(args, own)
    wrong = []
    for name, (found, expected) in _changed(config, own).items():
        if FIELD_KINDS[name] == NETWORK and name in args.overridden:
            print(f"note: config.{name} is {found!r}; {checkpoint} has {expected!r}")
        elif FIELD_KINDS[name] == NETWORK:
            wrong.append(f"config.{name}: found {found!r}, expected {expected!r}")
    if wrong:
        raise UserError(
            f"--config: {args.config} is not what {checkpoint} was trained with: "
            f"{'; '.join(wrong)} (without --config, the checkpoint's own configuration holds)"
        )
    return config


def evaluation_folder(config: ConfigDict, checkpoint: Path, workdir: Path | None) -> Path:
    """Where an evaluation goes: `workdir`, else the checkpoint's place for results.

    With other settings than the checkpoint's own it is a folder there, named after these.
    """
    folder = results_folder(checkpoint)
    if workdir and workdir.resolve() != folder.resolve():
        return workdir
    changed = _changed(config, load_config(checkpoint)).items()
    settings = [f"-{name}={now}" for name, (now, _) in changed if FIELD_KINDS[name] != FREE]
    if not settings:
        return say_folder(checkpoint)
    name = "eval" + "".join(settings).replace("-eval.", "-")
    folder /= re.sub(r",\)|[^\w.,=-]", "", name)[:240]
    print(f"results go to {folder}, as these settings are not the run's own")
    return folder


def say_folder(checkpoint: Path) -> Path:
    """The checkpoint's place for results, with a line where that is not its own folder."""
    folder = results_folder(checkpoint)
    if is_step(checkpoint):
        print(f"results go to {folder}, because training deletes the folders of steps in time")
    return folder


def _changed(config: ConfigDict, own: ConfigDict) -> dict[str, tuple[Any, Any]]:
    """The fields in which `config` differs from `own`, with both values."""
    was = dict(flat_fields(own))
    return {name: (now, was[name]) for name, now in flat_fields(config) if now != was[name]}


def _typed(stored: ConfigDict, source: Path) -> ConfigDict:
    """A stored configuration whose unset fields have their types again."""
    try:
        check_config(stored)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    config = _loaded(str(_FOLDER / "cuhk.py"))
    config.update(stored)
    return config
