"""Where compiled programs are kept, and that nothing needs such a place."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from alignps_jax.devices import use_compilation_cache
from tests.places import ROOT

PROGRAM = """if True:
    import os, sys
    import jax
    from alignps_jax.devices import use_compilation_cache
    jax.jit(lambda x: x + 2)(1)  # imports the rest, which the user may be unable to read
    if sys.argv[1:]:
        os.setuid(int(sys.argv[1]))
    use_compilation_cache()
    print(jax.jit(lambda x: x + 1)(1), jax.config.jax_compilation_cache_dir)
"""


# A user without an entry in the list of users, which only root can become.
NOBODY = ("54321",) if os.getuid() == 0 else ()


@pytest.fixture(autouse=True)
def _restored(monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    jax.experimental.compilation_cache.compilation_cache.reset_cache()


def run(variables: dict[str, str | None], *user: str) -> list[str]:
    """What a process says that compiles a program; no variable has the value None."""
    env = {name: x for name, x in (os.environ | variables).items() if x is not None}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *user], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "Error writing" not in done.stderr
    return done.stdout.splitlines()


def unusable(variables: dict[str, str | None], *user: str) -> str:
    """The note of a process that works without a cache."""
    note, said = run(variables, *user)
    assert note.startswith("note: compiled programs are not kept (")
    assert said == "2 None"
    return note


def entries(folder: Path) -> int:
    return len(list(folder.glob("*-cache")))


def test_each_run_of_a_program_has_its_own_folder(tmp_path):
    """JAX opens a folder once: all runs of a table were once in that of the first."""
    for number, name in enumerate(("first", "second", "third"), start=1):
        folder = tmp_path / name / "xla_cache"
        use_compilation_cache(folder)
        assert jax.config.jax_compilation_cache_dir == str(folder)
        jax.jit(lambda x, n=number: x * n)(jnp.ones(number + 7)).block_until_ready()
        assert entries(folder) > 0, name


def test_the_users_own_folder_is_private(tmp_path):
    said = run({"XDG_CACHE_HOME": str(tmp_path)})
    assert said == [f"2 {tmp_path / 'alignps_jax'}"]
    assert entries(tmp_path / "alignps_jax") > 0
    assert (tmp_path / "alignps_jax").stat().st_mode & 0o077 == 0


def test_the_variable_of_jax_wins(tmp_path):
    said = run({"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "here"), "HOME": str(tmp_path)})
    assert said == [f"2 {tmp_path / 'here'}"]
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_a_folder_that_others_can_write_is_left_alone(tmp_path):
    folder = tmp_path / "alignps_jax"
    folder.mkdir()
    folder.chmod(0o770)
    assert f"others can write there: '{folder}'" in unusable({"XDG_CACHE_HOME": str(tmp_path)})
    assert not list(folder.iterdir())


def test_a_file_in_the_way_is_a_note(tmp_path):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in unusable({"XDG_CACHE_HOME": str(tmp_path / "file")})


@pytest.mark.skipif(not NOBODY, reason="this user has a home")
def test_without_a_home_or_in_one_that_cannot_be_written_everything_runs(tmp_path):
    unusable({"HOME": None, "XDG_CACHE_HOME": None}, *NOBODY)
    assert not (ROOT / "~").exists()
    tmp_path.chmod(0o555)
    note = unusable({"HOME": str(tmp_path), "XDG_CACHE_HOME": None}, *NOBODY)
    assert str(tmp_path) in note
