"""One writer per workdir; that a killed one frees its lock, `store_test` shows."""

from __future__ import annotations

import errno
import fcntl
import os
from unittest.mock import Mock

import pytest

from alignps_jax.checkpoint.lock import NAME, one_writer
from alignps_jax.types import UserError


def test_a_second_writer_is_refused_by_name_until_the_first_ends(tmp_path):
    named = rf"^{tmp_path}: found another run .*\(process {os.getpid()} on \S+, started .*2.*\), "
    with one_writer(tmp_path):
        for _ in range(2):  # a refusal leaves the name there
            with pytest.raises(UserError, match=named), one_writer(tmp_path):
                pass
    with one_writer(tmp_path):
        pass


def test_a_lock_file_that_vanishes_harms_nobody(tmp_path):
    with one_writer(tmp_path):
        (tmp_path / NAME).unlink()


def test_a_file_system_without_locks_is_a_note(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(errno.ENOLCK, "No locks")))
    with one_writer(tmp_path / "new"):
        pass
    assert capsys.readouterr().out.startswith(f"note: {tmp_path / 'new' / NAME}: No locks")
