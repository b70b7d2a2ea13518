"""Which configuration holds: that of a file, or what a checkpoint says about itself."""

import json

import pytest
from alignps_jax.command_line import Arguments, parse

from alignps_jax.checkpoint.store import write_run_info
from alignps_jax.configuration import checkpoint_config, detections_config, train_config
from alignps_jax.types import UserError
from configs import tiny


def arguments(*words: str) -> Arguments:
    return parse(["launch.py", *words])


@pytest.fixture(scope="module")
def own():
    config = tiny.get_config("plus")
    config.eval.score_threshold, config.data.prepared_dir = 0.25, None
    return config.lock()


@pytest.fixture(scope="module")
def run(own, tmp_path_factory):
    """A workdir whose checkpoint is a configuration without arrays."""
    workdir = tmp_path_factory.mktemp("run")
    manifest = workdir / "checkpoints" / "3" / "manifest" / "metadata"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"config": json.loads(own.to_json()), "arrays": {}}))
    return workdir


@pytest.mark.parametrize("mode", ["evaluate", "search", "visualize", "export"])
def test_the_checkpoints_configuration_is_the_base(mode, run, own):
    needed = {
        "evaluate": [],
        "search": ["--query=q", "--gallery=g"],
        "visualize": [],
        "export": ["--target=t"],
    }
    args = arguments(
        f"--mode={mode}",
        f"--checkpoint={run}",
        *needed[mode],
        "--config.data.root=/elsewhere",
        "--config.data.prepared_dir=/there",
        "--config.eval.score_threshold=0.3",
    )
    expected = own.copy_and_resolve_references().to_dict()
    expected["data"]["root"], expected["data"]["prepared_dir"] = "/elsewhere", "/there"
    expected["eval"]["score_threshold"] = 0.3
    assert checkpoint_config(args, run).to_dict() == expected


def test_fields_are_checked_over_a_checkpoint_too(run):
    for word, message in (
        ("--config.eval.score_treshold=0.3", 'Did you mean "score_threshold"'),
        ("--config.eval.nms_iou=3", r"config\.eval\.nms_iou: found 3\.0"),
    ):
        with pytest.raises(UserError, match=message):
            checkpoint_config(arguments("--mode=evaluate", f"--workdir={run}", word), run)


def test_a_file_that_disagrees_is_refused_field_by_field(run):
    words = ["--mode=evaluate", f"--workdir={run}", "--config=configs/synthetic.py"]
    with pytest.raises(UserError) as caught:
        checkpoint_config(arguments(*words), run)
    message = str(caught.value)
    for field, found, expected in (
        ("model.deform_stages", "()", "(3, 4, 5)"),
        ("model.channels", "48", "16"),
        ("data.test_scale", "(256, 192)", "(128, 96)"),
    ):
        assert f"config.{field}: found {found}, expected {expected}" in message
    assert "\n" not in message
    assert "optimizer" not in message
    assert "eval" not in message.split("trained with", 1)[1]


def test_a_file_that_agrees_is_used(run):
    words = ["--mode=evaluate", f"--workdir={run}", "--config=configs/tiny.py:plus"]
    assert checkpoint_config(arguments(*words), run).eval.score_threshold == 0.2
    # What only training reads may differ.
    typed = ["--config.model.pretrained=x", "--config.model.remat=True"]
    assert checkpoint_config(arguments(*words, *typed), run).model.remat


def test_what_is_typed_holds_and_is_said(run, capsys):
    word = "--config.data.test_scale=(256,192)"
    config = checkpoint_config(arguments("--mode=evaluate", f"--workdir={run}", word), run)
    assert config.data.test_scale == (256, 192)
    assert "note: config.data.test_scale is (256, 192) as typed" in capsys.readouterr().out


def test_training_resumes_with_the_configuration_of_its_run(run, own, tmp_path):
    args = arguments(f"--workdir={run}", "--config.train.duration=9 steps")
    expected = own.copy_and_resolve_references().to_dict()
    expected["train"]["duration"] = "9 steps"
    assert train_config(args).to_dict() == expected
    # Without a checkpoint yet, the run is as it was last started.
    changed = own.copy_and_resolve_references()
    changed.seed = 7
    write_run_info(tmp_path, changed)
    assert train_config(arguments(f"--workdir={tmp_path}")).seed == 7
    (tmp_path / "config.json").write_text('{"seed": "many"')
    with pytest.raises(UserError, match=r"config\.json: cannot be read"):
        train_config(arguments(f"--workdir={tmp_path}"))
    with pytest.raises(UserError, match=r"--workdir: found no run in .*nowhere"):
        train_config(arguments(f"--workdir={tmp_path / 'nowhere'}"))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"seed": 0', '"seed": {}'),
        ('"lut_momentum": 0.9', '"lut_momentum": "\\u001b[2J"'),
        ('"lut_momentum": 0.9', f'"lut_momentum": 1{"0" * 400}'),
        ('"seed": 0', f'"seed": {"[" * 500}{"]" * 500}'),
        ('"seed": 0', '"seed": 0, "data": 3'),
    ],
)
def test_a_damaged_configuration_of_a_run_is_one_line(old, new, tmp_path):
    write_run_info(tmp_path, tiny.get_config())
    text = json.dumps(json.loads((tmp_path / "config.json").read_text()))
    assert old in text
    (tmp_path / "config.json").write_text(text.replace(old, new))
    with pytest.raises(UserError) as error:
        train_config(arguments(f"--workdir={tmp_path}"))
    assert str(error.value).isprintable()


def test_fine_tuning_names_the_detector(run, tmp_path):
    new, source = f"--workdir={tmp_path}", f"--checkpoint={run}"
    assert train_config(arguments(new, source)).model.deform_stages == (3, 4, 5)
    assert train_config(arguments(new, source)).model.pretrained == str(run)
    with_file = arguments(new, source, "--config=configs/tiny.py")
    assert train_config(with_file).model.pretrained == str(run)
    assert train_config(with_file).model.deform_stages == ()
    with pytest.raises(UserError, match="leave it out to resume"):
        train_config(arguments(f"--workdir={run}", source))
    with pytest.raises(UserError, match=r"beside --config\.model\.pretrained='y'"):
        train_config(arguments(new, source, "--config.model.pretrained=y"))


def test_saved_detections_take_the_configuration_of_their_run(run, own, tmp_path):
    inside = arguments("--mode=evaluate", f"--detections={run / 'detections.npz'}")
    assert detections_config(inside).to_dict() == own.to_dict()
    outside = arguments("--mode=evaluate", f"--detections={tmp_path / 'detections.npz'}")
    with pytest.raises(UserError, match=r"--config: missing, and .* no run's folder"):
        detections_config(outside)
