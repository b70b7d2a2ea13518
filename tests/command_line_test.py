"""Flags by mode, one line for what is wrong with them, and fields with their types."""

import sys

import pytest
from alignps_jax.command_line import FLAGS, parse
from alignps_jax.modes import MODES
from alignps_jax.usages import USAGES

import launch
from alignps_jax.types import UserError
from configs import cuhk, tiny

EXAMPLES = [(mode, example) for mode, usage in USAGES.items() for example in usage.examples]


def arguments(*words: str):
    return parse(["launch.py", *words])


def test_every_mode_has_its_usage_and_every_flag_a_reader():
    assert list(MODES) == list(USAGES)
    read = {name for usage in USAGES.values() for name in usage.flags}
    assert read | {"mode"} == set(FLAGS)


@pytest.mark.parametrize(("mode", "example"), EXAMPLES)
def test_examples_parse(mode, example):
    words = example.partition("#")[0].replace("'", "").split()
    assert arguments(*words).mode == mode


def test_help_lists_the_modes_one_line_each(capsys):
    assert launch.main(["launch.py", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for mode in USAGES:
        (line,) = [line for line in lines if f"--mode={mode} " in line]
        assert USAGES[mode].summary in line


@pytest.mark.parametrize("mode", USAGES)
def test_help_of_a_mode_lists_its_flags_and_examples(mode, capsys):
    assert launch.main(["launch.py", f"--mode={mode}", "--help"]) == 0
    text = capsys.readouterr().out
    for name in FLAGS.keys() - {"mode"}:
        assert (f"  --{name} " in text) == (name in USAGES[mode].flags), name
    for example in USAGES[mode].examples:
        assert f"python launch.py {example}" in text


@pytest.mark.parametrize("mode", USAGES)
def test_a_flag_that_a_mode_does_not_read_names_those_that_do(mode):
    for name in FLAGS.keys() - USAGES[mode].flags.keys() - {"mode"}:
        word = f"--{name}" if name in ("quick", "accept_changes") else f"--{name}=1"
        with pytest.raises(UserError) as caught:
            arguments(f"--mode={mode}", word)
        message = str(caught.value)
        assert message.startswith(f"--{name}: --mode={mode} does not read it, only ")
        for other, usage in USAGES.items():
            assert (f"--mode={other}" in message.split("only")[1]) == (name in usage.flags)


@pytest.mark.parametrize("mode", USAGES)
def test_every_missing_flag_is_one_line(mode):
    usage = USAGES[mode]
    for missing in usage.needs:
        others = {group[0] for group in usage.needs if group != missing} - set(missing)
        with pytest.raises(UserError) as caught:
            arguments(f"--mode={mode}", *(f"--{name}=x" for name in others))
        message = str(caught.value)
        assert message.startswith(" or ".join(f"--{name}" for name in missing[-2:])) or (
            len(missing) > 2 and message.startswith(f"--{missing[0]}, ")
        )
        assert f"missing, --mode={mode} needs it" in message
        assert "\n" not in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mode=serch"], "--mode: found 'serch', expected one of .*; did you mean 'search'?"),
        (["--worksdir=x"], "--worksdir: no such flag, .*; did you mean --workdir?"),
        (["--mode=benchmark", "--noquik"], "did you mean --quick?"),
        (["--workdir="], "--workdir: found '', expected a value"),
        (["--workdir"], "Missing value for flag --workdir"),
        (["--mode=benchmark", "--runs=many"], "--runs: found 'many', expected an integer"),
        (["--mode=benchmark", "--quick=maybe"], "--quick: found 'maybe', expected true or false"),
        (["--mode=benchmark", "--noquick=1"], "command line: --noquick=1 does not take an arg"),
        (["--\udcff=1"], r"--.udcff: no such flag"),
        (["--" + "wor" * 1000 + "=1"], r"--(wor)+wo\.\.\.: no such flag, found 3,002 characters"),
        (["--workdir=x", "y"], "found 'y', expected only flags"),
        (
            ["--mode=evaluate", "--checkpoint=x", "--detections=y"],
            "--checkpoint and --detections: found both",
        ),
        (["--workdir=x", "--processes=2"], "--coordinator and --process: missing"),
        (["--workdir=x", "--distributed", "--process=1"], "--distributed: found --process beside"),
        (
            ["--workdir=x", "--processes=2", "--process=2", "--coordinator=a:1"],
            "--process: found 2, expected 0 to 1",
        ),
        (
            ["--workdir=x", "--processes=2", "--process=1", "--coordinator=a"],
            "--coordinator: found 'a', expected host:port",
        ),
    ],
)
def test_wrong_flags(words, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")) as caught:
        arguments(*words)
    assert "\n" not in str(caught.value)


def test_fields_are_set_with_their_types():
    words = [
        "--config=configs/tiny.py:plus",
        "--config.train.batch_size=8",
        "--config.optimizer.learning_rate=1",
        "--config.model.levels=(4,)",
        "--config.model.remat",
        "--config.model.frozen_stages",
        "-1",
        "--noconfig.model.concatenate",
        "--config.data.prepared_dir=/somewhere",
    ]
    args = arguments(*words)
    assert args.config_name == "tiny-plus"
    assert "model.concatenate" in args.overridden
    expected = tiny.get_config("plus")
    expected.train.batch_size, expected.optimizer.learning_rate = 8, 1.0
    expected.model.levels, expected.model.remat, expected.model.frozen_stages = (4,), True, -1
    expected.model.concatenate, expected.data.prepared_dir = False, "/somewhere"
    found = args.configuration()
    assert found.to_dict() == expected.to_dict()
    assert found.is_locked


def test_a_base_takes_fields_and_stays_as_it_is():
    base = cuhk.get_config().lock()
    args = arguments("--mode=list", "--config.eval.score_threshold=0.3")
    assert args.configuration(base).eval.score_threshold == 0.3
    assert base.eval.score_threshold == 0.2


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--config.data.rot=x", 'no such field: .*Did you mean "root"'),
        ("--config.train.batch_size=three", "--config.train.batch_size=three: invalid literal"),
        ("--config.eval.nms_iou=2", "config.eval.nms_iou: found 2.0, expected a number, from 0"),
        ("--config.model.remat=perhaps", "remat"),
        ("--config.model=5", "config"),
    ],
)
def test_wrong_fields(word, message):
    for base in (["--config=configs/tiny.py"], []):
        args = arguments("--mode=list", *base, word)
        with pytest.raises(UserError, match=message) as caught:
            args.configuration(tiny.get_config())
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "def get_config(:",
        "import nowhere",
        "x = 1",
        "def get_config():\n    return 1 / 0",
        "def get_config():\n    return None",
        "def get_config():\n    return 3",
        "from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict()",
    ],
)
def test_a_configuration_file_that_fails_is_one_line(text, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # that of an earlier test
    file = tmp_path / "broken.py"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        arguments("--mode=list", f"--config={file}").configuration()
    assert "\n" not in str(caught.value)
