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
from configs import cuhk, tiny


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


def test_fields_are_set_with_their_types():
    args = arguments(
        "--config=configs/tiny.py:plus",
        "--config.train.batch_size=8",
        "--config.optimizer.learning_rate=1",
        *("--config.model.levels=(4,)", "--config.model.remat", "--noconfig.model.concatenate"),
        *("--config.model.initial_distance", "-2"),
        *("--config.data.prepared_dir=/somewhere", "--config.eval.protocols=TestG50"),
    )
    assert args.config_name == "tiny-plus"
    assert {"model.concatenate", "model.initial_distance"} <= args.overridden
    found, before = (dict(flat_fields(x)) for x in (configuration(args), tiny.get_config("plus")))
    assert {name: value for name, value in found.items() if value != before[name]} == {
        **{"train.batch_size": 8, "optimizer.learning_rate": 1.0, "model.levels": (4,)},
        **{"model.remat": True, "model.initial_distance": -2.0, "model.concatenate": False},
        **{"data.prepared_dir": "/somewhere", "eval.protocols": ("TestG50",)},
    }
    base = cuhk.get_config().lock()  # stays as it is
    args = arguments("--mode=list", "--config.eval.score_threshold=0.3")
    assert configuration(args, base).eval.score_threshold == 0.3
    assert base.eval.score_threshold == 0.2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (".data.rot=x", r"config\.data\.rot: no such field; did you mean 'data\.root'"),
        (".batch_size=4", "config.batch_size: .* train.batch_size or eval.batch_size"),
        (".train.batch_size=four", r"batch_size: found 'four', expected an integer, 1"),
        (".model.remat=yes", r"config\.model\.remat: found 'yes', expected True or Fal"),
        (".optimizer.drops=3 epochs", r"drops: found '3 epochs', expected a tuple of"),
        (".model=5", r"config\.model: no such field"),
        (".train.duration", r"config\.train\.duration"),
        ("=nowhere.py", r"nothing there: nowhere\.py, expected a configuration file or"),
        ("=configs", "found a folder: configs"),
        ("=pyproject.toml", r"pyproject\.toml: SyntaxError: .*line 3"),
        ("=tiny:pluss", "found 'pluss', expected one of .* did you mean 'plus'"),
        ("\nimport nowhere", "own.py, line 2: ModuleNotFoundError: No module named 'nowhere'"),
        ("def get_config():\n    x = 0\n    return 1 / x", "line 3: ZeroDivisionError"),
        ("def get_config():\n    return 3", "own.py: TypeError: get_config returns int, exp"),
    ],
)
def test_mistakes_are_one_line_in_our_words(words, message, tmp_path):
    file = tmp_path / "own.py"
    file.write_text(words)
    with pytest.raises(UserError, match=message) as caught:
        # Several lines are a file.
        configuration(
            arguments("--mode=list", "--config" + (f"={file}" if "\n" in words else words))
        )
    assert "\n" not in str(caught.value)


def test_the_ready_configurations_are_found_from_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    for name in ("tiny", "tiny.py", "configs/tiny.py"):
        assert configuration(arguments(f"--config={name}")).data.root == "data/tiny"


def test_a_checkpoint_is_used_with_its_own_configuration(run, own, capsys):
    words = [
        *("--mode=evaluate", f"--checkpoint={run}", "--config.eval.score_threshold=0.3"),
        "--config.data.prepared_dir=/there",  # unset in the run, but a text
        "--config.data.test_scale=(256,192)",  # another network, as typed: it is said
    ]
    config = checkpoint_config(arguments(*words), run)
    assert (config.eval.score_threshold, config.data.prepared_dir) == (0.3, "/there")
    assert config.model.to_dict() == own.model.to_dict()
    assert "note: config.data.test_scale is (256, 192); " in capsys.readouterr().out
    with pytest.raises(UserError, match=r"config\.eval\.nms_iou: found 3\.0"):
        checkpoint_config(arguments(*words, "--config.eval.nms_iou=3"), run)


def test_a_file_that_disagrees_is_refused_field_by_field(run):
    words = ["--mode=evaluate", f"--workdir={run}", "--config=configs/synthetic.py"]
    with pytest.raises(UserError) as caught:
        checkpoint_config(arguments(*words), run)
    message = str(caught.value)
    for field in ("model.deform_stages: found (), ", "model.channels: found 48, expected 16"):
        assert f"config.{field}" in message
    assert "optimizer" not in message
    words[-1] = "--config=tiny:plus"  # what only training reads may differ
    assert checkpoint_config(arguments(*words, "--config.model.remat=True"), run).model.remat


def test_training_resumes_with_the_configuration_of_its_run(run, own, tmp_path):
    config = train_config(arguments(f"--workdir={run}", "--config.train.duration=9 steps"))
    assert config.train.duration == "9 steps"
    assert config.model.to_dict() == own.model.to_dict()
    write_run_info(tmp_path, tiny.get_config())  # without a checkpoint yet
    assert train_config(arguments(f"--workdir={tmp_path}")).model.deform_stages == ()
    text = (tmp_path / "config.json").read_text()
    for old, new in (('"seed": 0', '"seed": {}'), ('"seed": 0', '"seed": '), ('"data"', '"d"')):
        (tmp_path / "config.json").write_text(text.replace(old, new))
        with pytest.raises(UserError, match=f"^{tmp_path}"):
            train_config(arguments(f"--workdir={tmp_path}"))
    with pytest.raises(UserError, match=r"--workdir: found no run in .*nowhere"):
        train_config(arguments(f"--workdir={tmp_path / 'nowhere'}"))


def test_fine_tuning_names_the_detector(run, tmp_path):
    new, source = f"--workdir={tmp_path}", f"--checkpoint={run}"
    for words, stages in (((), (3, 4, 5)), (("--config=configs/tiny.py",), ())):
        found = train_config(arguments(new, source, *words)).model
        assert (found.pretrained, found.deform_stages) == (str(run), stages)
    with pytest.raises(UserError, match="leave it out to resume"):
        train_config(arguments(f"--workdir={run}", source))
    with pytest.raises(UserError, match=r"model\.pretrained: found both"):
        train_config(arguments(new, source, "--config.model.pretrained=y"))


def test_other_settings_have_a_folder_of_their_own(run, tmp_path, capsys):
    def folder(*words, workdir=None):
        config = checkpoint_config(arguments("--mode=evaluate", f"--workdir={run}", *words), run)
        return evaluation_folder(config, run, workdir)

    assert folder() == folder("--config.data.root=/there", "--config.eval.batch_size=1") == run
    threshold = "--config.eval.score_threshold=0.5"
    assert folder(threshold, workdir=tmp_path) == tmp_path
    named = run / "eval-protocols=TestG50,all-score_threshold=0.5"
    protocols = "--config.eval.protocols=('TestG50','all')"
    assert folder(threshold, protocols) == folder(threshold, protocols, workdir=run) == named
    assert f"results go to {named}, " in capsys.readouterr().out
    many = folder(f"--config.eval.protocols={tuple(f'TestG{size}' for size in range(50))}")
    assert len(many.name) < 250
