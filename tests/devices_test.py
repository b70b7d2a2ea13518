"""Where compiled programs are kept."""

import jax
import pytest

from alignps_jax.devices import use_compilation_cache


@pytest.fixture(autouse=True)
def _restored():
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_a_whole_run_keeps_them_for_all_that_is_done_with_it(tmp_path):
    run, step, out = tmp_path / "run", tmp_path / "run" / "checkpoints" / "7", tmp_path / "out"
    step.mkdir(parents=True)
    for checkpoint, folder in ((None, out), (step, out), (run, run)):
        use_compilation_cache(out, checkpoint)
        assert jax.config.jax_compilation_cache_dir == str(folder / "xla_cache")
    assert not out.exists()
