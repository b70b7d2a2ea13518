"""Which configuration a command line means: that of a file, or what a checkpoint says of itself."""

import json

import pytest

from alignps_jax.checkpoint.store import write_run_info
from alignps_jax.cli import parse
from alignps_jax.config import flat_fields
from alignps_jax.configuration import (
    checkpoint_config,
    configuration,
    evaluation_folder,
    train_config,
)
from alignps_jax.types import UserError
from configs import prw, tiny


def arguments(*words):
    return parse(["launch.py", *words])


@pytest.fixture(scope="module")
def own():
    config = tiny.get_config("plus")
    config.eval.score_threshold = 0.25
    return config.lock()


@pytest.fixture(scope="module")
def run(own, tmp_path_factory):
    """A workdir whose checkpoint is a configuration without arrays."""
    workdir = tmp_path_factory.mktemp("run")
    manifest = workdir / "checkpoints" / "3" / "manifest" / "metadata"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"config": json.loads(own.to_json()), "arrays": {}}))
    return workdir


@pytest.mark.parametrize(
    ("field", "typed", "value"),
    [
        ("train.batch_size", "8", 8),
        ("optimizer.learning_rate", "1", 1.0),
        ("optimizer.weight_decay", "2e-3", 0.002),
        ("model.initial_distance", "-2", -2.0),
        ("model.remat", "", True),
        ("model.concatenate", "false", False),
        ("model.deform_stages", "(3,)", (3,)),
        ("data.test_scale", "256,192", (256, 192)),
        ("eval.protocols", "TestG50", ("TestG50",)),
        ("optimizer.drops", "3 epochs", ("3 epochs",)),
        ("data.prepared_dir", "/some where", "/some where"),
        ("data.root", "8", "8"),
        ("loss.lut_size", "None", None),
    ],
)
def test_fields_are_set_with_their_types(field, typed, value):
    args = arguments("--config=prw:released", f"--config.{field}", *filter(None, [typed]))
    found, before = flat_fields(configuration(args)), flat_fields(prw.get_config("released"))
    assert found == before | {field: value}
    assert found != before
    assert type(found[field]) is type(value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (".data.rot=x", r"config\.data\.rot: no such field; did you mean 'data\.root'"),
        (".batch_size=4", "config.batch_size: .* train.batch_size or eval.batch_size"),
        (".train.batch_size=four", r"batch_size: found 'four', expected an integer, 1"),
        (".model.remat=yes", r"config\.model\.remat: found 'yes', expected True or Fal"),
        (".model=5", r"config\.model: no such field"),
        (".train.duration", r"config\.train\.duration: found ''"),
        ("=nowhere.py", r"found no Python file nowhere\.py, expected one or cuhk, "),
        ("=pyproject.toml", r"found no Python file pyproject\.toml"),
        ("=tiny:pluss", "found 'pluss', expected one of .* did you mean 'plus'"),
    ],
)
def test_mistakes_are_one_line_in_our_words(words, message):
    with pytest.raises(UserError, match=message) as caught:
        configuration(arguments("--mode=list", f"--config{words}"))
    assert "\n" not in str(caught.value)


def test_the_ready_configurations_and_own_files_are_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    for name in ("tiny", "tiny.py", "configs/tiny.py"):
        assert configuration(arguments(f"--config={name}")).data.root == "data/tiny"
    (tmp_path / "tiny.py").write_text("\nx = 1 / 0")
    with pytest.raises(UserError, match=r"--config: tiny.py, line 2: ZeroDivisionError"):
        configuration(arguments("--config=tiny.py"))
    (tmp_path / "tiny.py").write_text("from configs.prw import get_config")
    assert configuration(arguments("--config=tiny.py:plus")).data.root == "data/PRW"


def test_a_checkpoint_is_used_with_its_own_configuration(run, own):
    words = [
        *("--mode=evaluate", f"--checkpoint={run}", "--config.eval.score_threshold=0.3"),
        "--config.data.prepared_dir=/there",  # unset in the run, but a text
        "--config.data.test_scale=(256,192)",  # another network, as typed
    ]
    found = flat_fields(checkpoint_config(arguments(*words), run))
    typed = {"eval.score_threshold": 0.3, "data.prepared_dir": "/there"}
    assert found == flat_fields(own) | typed | {"data.test_scale": (256, 192)}


def test_with_a_file_a_checkpoint_keeps_its_network(run, own, capsys):
    words = ["--mode=evaluate", f"--workdir={run}", "--config=configs/synthetic.py"]
    config = checkpoint_config(arguments(*words, "--config.model.remat=True"), run)
    assert (config.model.deform_stages, config.data.test_scale) == ((3, 4, 5), (128, 96))
    assert (config.data.root, config.model.remat) == ("data/synthetic", True)
    assert config.eval.score_threshold == 0.2
    note = capsys.readouterr().out
    assert note.startswith(f"note: {run} keeps its own data.test_scale, model.backbone_width, ")
    assert "optimizer" not in note


def test_training_resumes_with_the_configuration_of_its_run(run, own, tmp_path):
    config = train_config(arguments(f"--workdir={run}", "--config.train.duration=9 steps"))
    assert flat_fields(config) == flat_fields(own) | {"train.duration": "9 steps"}
    write_run_info(tmp_path, tiny.get_config())  # without a checkpoint yet
    assert train_config(arguments(f"--workdir={tmp_path}")).model.deform_stages == ()
    text = (tmp_path / "config.json").read_text()
    for old, new in (('"seed": 0', '"seed": {}'), ('"seed": 0', '"seed": '), ('"data"', '"d"')):
        (tmp_path / "config.json").write_text(text.replace(old, new))
        with pytest.raises(UserError, match=f"^{tmp_path}"):
            train_config(arguments(f"--workdir={tmp_path}"))
    with pytest.raises(UserError, match=r"--workdir: found no run in .*nowhere"):
        train_config(arguments(f"--workdir={tmp_path / 'nowhere'}"))


@pytest.mark.parametrize(
    ("words", "stages"), [((), (3, 4, 5)), (("--config=configs/tiny.py",), ())]
)
def test_fine_tuning_names_the_detector(words, stages, run, tmp_path):
    found = train_config(arguments(f"--workdir={tmp_path}", f"--checkpoint={run}", *words)).model
    assert (found.pretrained, found.deform_stages) == (str(run), stages)
    with pytest.raises(UserError, match="found both, expected one"):
        train_config(arguments("--workdir=w", f"--checkpoint={run}", "--config.model.pretrained=x"))


def test_other_settings_have_a_folder_of_their_own(run, tmp_path, capsys):
    def folder(*words, workdir=None):
        config = checkpoint_config(arguments("--mode=evaluate", f"--workdir={run}", *words), run)
        return evaluation_folder(config, run, workdir)

    assert folder() == folder("--config.data.root=/there", "--config.eval.batch_size=1") == run
    assert folder("--config.train.duration=9 steps", "--config.loss.queue_size=9") == run
    threshold = "--config.eval.score_threshold=0.5"
    assert folder(threshold, workdir=tmp_path) == tmp_path
    named = run / "eval-protocols=TestG50,all-score_threshold=0.5"
    protocols = "--config.eval.protocols=('TestG50','all')"
    assert folder(threshold, protocols) == folder(threshold, protocols, workdir=run) == named
    assert f"results go to {named}, " in capsys.readouterr().out
    many = folder(f"--config.eval.protocols={tuple(f'TestG{size}' for size in range(50))}")
    assert len(many.name) < 250
