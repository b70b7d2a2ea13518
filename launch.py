"""Trains, evaluates and searches; `--help` lists the modes, `--mode=MODE --help` their flags.

python launch.py --config configs/cuhk.py --config.data.root=/data/CUHK-SYSU --workdir=runs/cuhk
"""

import signal
import sys
import traceback
from collections.abc import Sequence

from alignps_jax.command_line import parse
from alignps_jax.streams import outlive_readers
from alignps_jax.types import UserError


def main(argv: Sequence[str]) -> int:
    """Runs one mode; returns the exit code.

    0, 2 after bad input, 3 where photos were skipped, 130 after Ctrl-C, 143 after SIGTERM, 129
    after SIGHUP.
    """
    outlive_readers()
    try:
        args = parse(argv)
        if args.help:
            print(args.help)
            return 0
        # Imported here because all modes together take seconds, which --help and typos need not.
        from alignps_jax.distributed import barrier, join
        from alignps_jax.modes import MODES

        if args.coordinator or args.distributed:
            join(args.coordinator, args.processes, args.process)
        MODES[args.mode](args)
        barrier("end")
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 1
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return 128 + signal.SIGINT
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return UserError.exit_code
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    from alignps_jax.distributed import leave

    code = main(sys.argv)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback out of what ends Python
    leave(code)
