"""Which configuration and which folder a command line means."""

from __future__ import annotations

import re
import runpy
import traceback
from pathlib import Path

from ml_collections import ConfigDict

from alignps_jax.checkpoint.places import holds_checkpoint, results_folder
from alignps_jax.checkpoint.store import load_config, load_run_config
from alignps_jax.config import FIELDS, FREE, NETWORK, check_fields, flat_fields
from alignps_jax.flags import Arguments
from alignps_jax.types import UserError

_FOLDER = Path(__file__).parents[1] / "configs"
_READY = "cuhk, prw, synthetic, tiny, ablation"  # --config finds them from everywhere


def configuration(
    args: Arguments, own: ConfigDict | None = None, source: Path | None = None
) -> ConfigDict:
    """The configuration of --config, else `own` of the run `source`, else cuhk; typed fields win.

    Also with --config, the network of `source` and the pixels that it sees stay its own. Raises
    UserError if there is no such file or variant, the file fails, or a field is wrong.
    """
    config = _loaded(args.config or "cuhk")
    fields = flat_fields(config)
    if own is not None:
        kept = flat_fields(own)
        try:
            check_fields(kept)
        except UserError as error:
            raise UserError(f"{source}: {error}") from error
        if args.config:
            kept = {name: x for name, x in kept.items() if FIELDS[name][0] == NETWORK}
            if other := [name for name, x in kept.items() if fields.get(name) != x]:
                print(f"note: {source} keeps its own {', '.join(other)}")
        fields |= kept
    for name, word in args.fields.items():
        fields[name] = FIELDS[name][1].read(word) if name in FIELDS else word
    check_fields(fields)
    config.update_from_flattened_dict(fields)
    return config.lock()


def _loaded(spec: str) -> ConfigDict:
    """The configuration of FILE or FILE:VARIANT."""
    typed, _, variant = spec.partition(":")
    path = Path(typed)
    if not path.is_file() and path.parent in (Path(), Path("configs")):
        path = _FOLDER / f"{path.stem}.py"
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"--config: found no Python file {typed}, expected one or {_READY}")
    try:
        get_config = runpy.run_path(str(path))["get_config"]
        return get_config(variant) if variant else get_config()
    except UserError:
        raise
    except Exception as error:  # the file is a program of the user's
        calls = traceback.extract_tb(error.__traceback__)
        lines = [f", line {call.lineno}" for call in calls if call.filename == str(path)]
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"--config: {path}{''.join(lines[-1:])}: {reason}") from error


def train_config(args: Arguments) -> ConfigDict:
    """The configuration to train with: --config, else that of the run to resume or to fine-tune.

    Raises UserError if there is none of them, or a field is wrong.
    """
    own = None
    if not args.config:
        own = load_run_config(args.workdir) or (args.checkpoint and load_config(args.checkpoint))
        if not own:
            raise UserError(f"--workdir: found no run in {args.workdir}, expected one, or --config")
    if args.checkpoint:
        if "model.pretrained" in args.fields:
            raise UserError("--checkpoint, --config.model.pretrained: found both, expected one")
        args.fields["model.pretrained"] = str(args.checkpoint)
    return configuration(args, own, args.workdir)


def checkpoint_config(args: Arguments, checkpoint: Path) -> ConfigDict:
    """The configuration to use a checkpoint with; raises as `configuration`."""
    if args.config and not holds_checkpoint(checkpoint):
        return configuration(args)  # saved results without their network
    return configuration(args, load_config(checkpoint), checkpoint)


def evaluation_folder(config: ConfigDict, checkpoint: Path, workdir: Path | None) -> Path:
    """Where an evaluation goes: `workdir`, else the checkpoint's place for results.

    With other settings than the checkpoint's own it is a folder there, named after these.
    """
    folder = results_folder(checkpoint)
    if workdir and workdir.resolve() != folder.resolve():
        return workdir
    own, now = flat_fields(load_config(checkpoint)), flat_fields(config)
    read = [name for name in now if name.startswith(("data.", "model.", "eval."))]
    changed = [name for name in read if now[name] != own[name] and FIELDS[name][0] != FREE]
    if not changed:
        return folder
    name = "eval" + "".join(f"-{name}={now[name]}" for name in changed).replace("-eval.", "-")
    folder /= re.sub(r",\)|[^\w.,=-]", "", name)[:240]
    print(f"results go to {folder}, as these settings are not the run's own")
    return folder
