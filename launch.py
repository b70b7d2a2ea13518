"""Trains, evaluates and searches; `--help` lists the modes, `--mode=MODE --help` their flags.

python launch.py --config=configs/cuhk.py --config.data.root=/data/CUHK-SYSU --workdir=runs/cuhk
"""

from alignps_jax.cli import entry, main  # noqa: F401 (main is for programs)

if __name__ == "__main__":
    entry()
