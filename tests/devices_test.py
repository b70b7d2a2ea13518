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


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"])
def test_the_users_own_folder_is_private_and_the_variable_of_jax_wins(variable, tmp_path):
    folder = tmp_path / ("alignps_jax" if variable == "XDG_CACHE_HOME" else "")
    assert run({"HOME": "/nowhere", variable: str(tmp_path)}) == [f"2 {folder}"]
    assert entries(folder) > 0
    assert folder.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("obstacle", ["a file", "others", "no home", "another's home"])
def test_where_nothing_can_be_kept_a_note_says_so_and_everything_runs(obstacle, tmp_path):
    if "home" in obstacle and not NOBODY:
        pytest.skip("this user has a home")
    folder = tmp_path / "alignps_jax"
    if obstacle == "a file":
        folder.write_text("")
    if obstacle == "others":
        folder.mkdir()
        folder.chmod(0o770)
    home = {"HOME": None if obstacle == "no home" else str(tmp_path), "XDG_CACHE_HOME": None}
    tmp_path.chmod(0o555 if obstacle == "another's home" else 0o755)
    own = home if "home" in obstacle else {"XDG_CACHE_HOME": str(tmp_path)}
    note, said = run(own, *(NOBODY if "home" in obstacle else ()))
    assert note.startswith("note: compiled programs are not kept (")
    assert str(tmp_path) in note or obstacle == "no home"
    assert said == "2 None"
    assert not (ROOT / "~").exists()
