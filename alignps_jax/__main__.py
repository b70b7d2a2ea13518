"""`python -m alignps_jax` is the command line."""

from alignps_jax.cli import entry

entry()
