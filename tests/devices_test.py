"""Where compiled programs are kept: they are native code, so in nobody else's folder."""

import os
import stat
from pathlib import Path

import jax
import pytest

from alignps_jax.devices import own_cache, use_compilation_cache
from alignps_jax.types import UserError


@pytest.fixture(autouse=True)
def _restored():
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_a_folder_is_used_as_it_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    use_compilation_cache(Path("run/xla_cache"))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "run" / "xla_cache")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("relative", [False, True])
def test_the_users_own_folder_is_private(tmp_path, monkeypatch, relative):
    """A relative XDG_CACHE_HOME is to be ignored, says the specification."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "cache" if relative else str(tmp_path / "cache"))
    folder = own_cache()
    root = tmp_path / "home" / ".cache" if relative else tmp_path / "cache"
    assert folder == root / "alignps_jax" / "xla"
    for path in (folder, folder.parent):
        assert stat.S_IMODE(path.stat().st_mode) & 0o022 == 0
    assert own_cache() == folder


@pytest.mark.parametrize("inner", [False, True])
def test_a_folder_that_others_can_write_to_is_refused(tmp_path, monkeypatch, inner):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = own_cache()
    writable = folder if inner else folder.parent
    writable.chmod(0o777)
    with pytest.raises(UserError, match="found a folder that others can write to"):
        own_cache()


def test_a_folder_of_another_user_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    own_cache()
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(UserError, match="found a folder of user"):
        own_cache()


def test_a_file_in_the_way_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="no folder for compiled programs can be made there"):
        own_cache()
