"""Trains, evaluates and searches; `--help` lists the modes, `--mode=MODE --help` their flags.

python launch.py --config configs/cuhk.py --config.data.root=/data/CUHK-SYSU --workdir=runs/cuhk
"""

import errno
import io
import signal
import sys
from collections.abc import Sequence
from functools import partial

from alignps_jax.allocator import restart_with_settings

if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # without a traceback out of an import
    restart_with_settings()  # before the slow imports

from alignps_jax.command_line import parse
from alignps_jax.peers import end, end_together, join
from alignps_jax.tpu_compiler import stop_at_good_tilings
from alignps_jax.types import UserError

# What the system says where there is no room, wherever in the code it says so.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def main(argv: Sequence[str]) -> int:
    """Runs one mode; returns the exit code.

    0, 2 after bad input, 3 where photos were skipped, 4 where another process of the run is gone,
    130 after Ctrl-C, 143 after SIGTERM.
    """
    return end_together(partial(_run, argv))


def _run(argv: Sequence[str]) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    try:
        args = parse(argv)
        if args.help:
            print(args.help)
            return 0
        # Imported here because all modes together take seconds, which --help and typos need not.
        from alignps_jax.modes import MODES

        stop_at_good_tilings()  # before JAX looks for TPUs
        if args.coordinator or args.distributed:
            join(args.coordinator, args.processes, args.process)
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        MODES[args.mode](args)
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 1
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return 128 + signal.SIGINT
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.errno not in FULL:
            raise
        place = error.filename or "a file"
        print(f"error: {place}: cannot be written ({error.strerror})", file=sys.stderr)
        return UserError.exit_code
    return 0


if __name__ == "__main__":
    end(main(sys.argv))
