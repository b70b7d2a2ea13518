"""Reading the command line, with one clear line for what is wrong with it."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence

from absl import flags

from alignps_jax.types import UserError

FLAGS = flags.FLAGS


def parse(argv: Sequence[str], modes: Collection[str]) -> None:
    """Parses all flags, `config` and `mode` among them.

    Raises:
      UserError: a flag, a field of the configuration or a mode does not exist (the nearest is
        named), or a value is wrong.
    """
    try:
        rest = FLAGS(list(argv))[1:]
        if FLAGS.config is not None:
            FLAGS.config.lock()  # a file that cannot be loaded fails only when it is used
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(f"command line: {_one_line(str(error))}") from error
    if rest:
        raise UserError(f"command line: found {rest[0]!r}, expected only flags (--name=value)")
    if FLAGS.mode not in modes:
        near = difflib.get_close_matches(FLAGS.mode, modes, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"--mode: found {FLAGS.mode!r}, expected one of {', '.join(modes)}{hint}")


def required(flag: str) -> str:
    """The value of a flag that the mode cannot do without; UserError if it is not given."""
    if FLAGS[flag].value is None:
        raise UserError(f"--{flag}: missing, --mode={FLAGS.mode} needs it")
    return FLAGS[flag].value


def _one_line(message: str) -> str:
    """The message without the traceback, the quotes and the line ends of ml_collections."""
    head, *traceback = message.split("Traceback (most recent call last):")
    if traceback:
        message = f"{head} {traceback[0].strip().splitlines()[-1]}"
    if message[:1] == message[-1:] == "'":
        message = message[1:-1].replace("\\n", " ").replace("\\'", "'")
    return " ".join(message.split())
