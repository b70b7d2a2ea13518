"""The TPU compiler's settings: for libraries that know them, and never over the user's."""

import os

import pytest

from alignps_jax.tpu_compiler import FLAG, VARIABLE, stop_at_good_tilings


@pytest.fixture
def flags(tmp_path, monkeypatch):
    """The flags after a start with a library of these bytes and flags of the user's."""

    def after(library, given=None):
        path = tmp_path / "libtpu.so"
        path.write_bytes(library)
        monkeypatch.setenv("TPU_LIBRARY_PATH", str(path))
        monkeypatch.delenv(VARIABLE, raising=False)
        if given is not None:
            monkeypatch.setenv(VARIABLE, given)
        stop_at_good_tilings()
        return os.environ.get(VARIABLE)

    return after


KNOWS = b"\x7fELF" + bytes(70_000) + f"\0{FLAG}\0".encode()


def test_a_library_that_knows_the_flag_is_told(flags):
    assert flags(KNOWS) == f"--{FLAG}=0.95"
    assert flags(KNOWS, "--xla_other=1") == f"--xla_other=1 --{FLAG}=0.95"


def test_what_the_user_set_stays(flags):
    assert flags(KNOWS, f"--{FLAG}=1") == f"--{FLAG}=1"


def test_a_second_start_adds_nothing(flags):
    once = flags(KNOWS)
    assert flags(KNOWS, once) == once


def test_a_library_that_does_not_know_it_is_not_told(flags):
    assert flags(b"\x7fELF" + bytes(70_000), "--xla_other=1") == "--xla_other=1"
    assert flags(b"\x7fELF" + bytes(70_000)) is None
