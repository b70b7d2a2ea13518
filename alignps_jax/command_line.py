"""The command line: the flags of every mode, and one clear line for what is wrong with them.

`USAGES` says what each mode reads and needs; a flag that a mode does not read is an error. Flags of
the form `--config.section.field=value` change fields of the configuration, which ml_collections
does with their types.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from alignps_jax.config_rules import check_config
from alignps_jax.registry import known_name
from alignps_jax.types import UserError
from alignps_jax.usages import USAGES, Usage, mode_help, modes_help

# A str, or None where the flag is not given; `parse` sees to it that a mode has what it needs.
Text = Any
_HELP = ("-h", "-help", "--help", "--helpfull", "--helpshort")
_OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]*)")
_LONGEST_NAME = 200
_KINDS: dict[Any, Any] = {
    int: flags.DEFINE_integer,
    str: flags.DEFINE_string,
    bool: flags.DEFINE_bool,
}
_EXPECTED = {int: "an integer", str: "a value", bool: "true or false"}


def _flag(kind: type = str, default: object = None) -> Any:
    return dataclasses.field(default=default, metadata={"kind": kind})


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What was typed: a field per flag (None: not given), and the fields of the configuration.

    `help` is the text that was asked for. `overrides` are the flags `--config.<field>=<value>` as
    they were typed.
    """

    mode: str = _flag(str, "train")
    config: Text = _flag()
    workdir: Text = _flag()
    checkpoint: Text = _flag()
    detections: Text = _flag()
    query: Text = _flag()
    box: str | None = _flag()
    gallery: Text = _flag()
    source: Text = _flag()
    every: str = _flag(str, "1s")
    prune: bool = _flag(bool, False)
    exact_up_to: int = _flag(int, 2_000_000)
    photo: Text = _flag()
    person: Text = _flag()
    convention: str | None = _flag()
    target: Text = _flag()
    table: Text = _flag()
    seeds: int = _flag(int, 2)
    what: str | None = _flag()
    runs: int = _flag(int, 5)
    quick: bool = _flag(bool, False)
    topology: str | None = _flag()
    scale: str | None = _flag()
    batch: int | None = _flag(int)
    host: str = _flag(str, "127.0.0.1")
    port: int = _flag(int, 8000)
    accept_changes: bool = _flag(bool, False)
    distributed: bool = _flag(bool, False)
    coordinator: Text = _flag()
    processes: int | None = _flag(int)
    process: int | None = _flag(int)
    overrides: tuple[str, ...] = ()
    help: str | None = None

    @property
    def config_file(self) -> str:
        """The file of --config without its variant."""
        return self.config.partition(":")[0]

    @property
    def config_name(self) -> str:
        """The name of the configuration and its variant, as folders carry it."""
        path, _, variant = self.config.partition(":")
        return "-".join(filter(None, (Path(path).stem, variant)))

    @property
    def overridden(self) -> frozenset[str]:
        """The dotted names of the fields that the command line sets."""
        names = (_OVERRIDE.match(word) for word in self.overrides)
        return frozenset(found[1] for found in names if found)

    def configuration(self, base: ConfigDict | None = None) -> ConfigDict:
        """The configuration of --config, else `base`, with the fields of the command line.

        Returns:
          A configuration of its own, locked, with every field checked.

        Raises:
          UserError: the file cannot be loaded, a field does not exist (the nearest is named), or
            its value is not one.
        """
        values = flags.FlagValues()
        words = [*([f"--config={self.config}"] if self.config else []), *self.overrides]
        try:
            if self.config:
                config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=words)
            else:
                own = copy.deepcopy(base or ConfigDict()).lock()  # unset fields keep their types
                config_flags.DEFINE_config_dict("config", own, flag_values=values, sys_argv=words)
            rest = values(["", *words])[1:]
            config: Any = values["config"].value
            if not hasattr(config, "lock"):  # a file that cannot be loaded fails here at last
                raise TypeError(f"found {type(config).__name__}, expected a ConfigDict")
        except (AttributeError, KeyError) as error:
            message = _one_line(str(error.args[0] if error.args else error))
            raise UserError(f"command line: no such field: {message}") from error
        except (flags.Error, TypeError, ValueError, OSError) as error:
            raise UserError(f"command line: {_one_line(str(error))}") from error
        except Exception as error:  # the file is a program: it can raise anything
            message = _one_line(f"{type(error).__name__}: {error}")
            source = self.config_file if self.config else "the stored configuration"
            raise UserError(f"--config: {source} fails with {message}") from error
        _refuse_words(rest)
        check_config(config)
        return config


FLAGS = {field.name: field for field in dataclasses.fields(Arguments) if field.metadata.get("kind")}


def parse(argv: Sequence[str]) -> Arguments:
    """Parses the flags of a command line, whose first word is the program.

    Raises:
      UserError: a mode or flag does not exist (the nearest is named), a value is wrong, the mode
        does not read a flag or lacks one.
    """
    words = [word for word in argv[1:] if word not in _HELP]
    _refuse_long_names(words)
    plain, overrides = _split(words)
    values = _parse_plain(plain)
    given = {name for name in FLAGS if values[name].present}
    mode = values.mode
    known_name("--mode", mode, USAGES)
    found: dict[str, Any] = {name: values[name].value for name in FLAGS}
    if len(words) < len(argv) - 1:
        text = mode_help(mode) if "mode" in given else modes_help()
        return Arguments(**found, help=text)
    for name in sorted(given):
        if found[name] == "":
            raise UserError(f"--{name}: found '', expected a value")
    _check_usage(mode, given - {"mode"})
    _check_processes(found)
    return Arguments(**found, overrides=tuple(overrides))


def _refuse_long_names(words: Sequence[str]) -> None:
    """Raises UserError for a name so long that absl, looking for a similar one, would overflow."""
    for word in words:
        name = word.partition("=")[0]
        if name.startswith("-") and len(name) > _LONGEST_NAME:
            raise UserError(f"{name[:40]}...: no such flag, found {len(name):,} characters")


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words without, and those of, the flags that set a field of the configuration."""
    plain: list[str] = []
    overrides: list[str] = []
    value_follows = False
    for word in words:
        is_flag = re.match(r"--?[A-Za-z]", word) is not None
        if _OVERRIDE.match(word):
            overrides.append(word)
            value_follows = "=" not in word
            continue
        (overrides if value_follows and not is_flag else plain).append(word)
        value_follows = False
    return plain, overrides


def _parse_plain(words: Sequence[str]) -> flags.FlagValues:
    values = flags.FlagValues()
    for name, field in FLAGS.items():
        _KINDS[field.metadata["kind"]](name, field.default, "", flag_values=values)
    try:
        rest = values(["", *words])[1:]
    except flags.UnrecognizedFlagError as error:
        near = difflib.get_close_matches(error.flagname.removeprefix("no"), FLAGS, n=1)
        hint = f"; did you mean --{near[0]}?" if near else ""
        raise UserError(
            f"--{error.flagname}: no such flag, expected one of --{', --'.join(FLAGS)}{hint}"
        ) from error
    except flags.IllegalFlagValueError as error:
        name, value = re.findall(r"^flag --(\w+)=(.*?): ", str(error), flags=re.DOTALL)[0]
        expected = _EXPECTED[FLAGS[name].metadata["kind"]]
        raise UserError(f"--{name}: found {value!r}, expected {expected}") from error
    except (flags.Error, OSError, ValueError) as error:  # ValueError: --noquick=1
        raise UserError(f"command line: {_one_line(str(error))}") from error
    _refuse_words(rest)
    return values


def _refuse_words(rest: Sequence[str]) -> None:
    if rest:
        raise UserError(f"command line: found {rest[0]!r}, expected only flags (--name=value)")


def _check_usage(mode: str, given: Collection[str]) -> None:
    """Raises UserError for a flag that the mode does not read, excludes, or lacks."""
    usage = USAGES[mode]
    for name in sorted(given):
        if name not in usage.flags:
            readers = [f"--mode={other}" for other in USAGES if name in USAGES[other].flags]
            raise UserError(
                f"--{name}: --mode={mode} does not read it, only {_listed(readers, 'and')}"
            )
    for names in usage.one_of:
        both = [f"--{name}" for name in names if name in given]
        if len(both) > 1:
            raise UserError(f"{_listed(both, 'and')}: found both, expected only one of them")
    for names in usage.needs:
        if not any(name in given for name in names):
            flags_ = _listed([f"--{name}" for name in names], "or")
            raise UserError(f"{flags_}: missing, --mode={mode} needs it; {_example(usage)}")


def _example(usage: Usage) -> str:
    return f"for example: python launch.py {usage.examples[0]}"


def _check_processes(found: Mapping[str, Any]) -> None:
    """Raises UserError unless the flags of a multi-process run fit together."""
    names = ("coordinator", "processes", "process")
    missing = [f"--{name}" for name in names if found[name] is None]
    if len(missing) == len(names):
        return
    if found["distributed"]:
        given = [f"--{name}" for name in names if found[name] is not None]
        raise UserError(
            f"--distributed: found {_listed(given, 'and')} beside it, expected none: the cluster's "
            "manager says all of them"
        )
    if missing:
        raise UserError(
            f"{_listed(missing, 'and')}: missing, --coordinator, --processes and --process go "
            "together"
        )
    coordinator, processes, process = (found[name] for name in names)
    if not re.fullmatch(r"\S+:\d+", coordinator):
        raise UserError(f"--coordinator: found {coordinator!r}, expected host:port of process 0")
    if processes < 1:
        raise UserError(f"--processes: found {processes}, expected 1 or more")
    if not 0 <= process < processes:
        raise UserError(f"--process: found {process}, expected 0 to {processes - 1}")


def _listed(names: Sequence[str], word: str) -> str:
    """Such as "--a, --b and --c"."""
    *front, last = names
    return f"{', '.join(front)} {word} {last}" if front else last


def _one_line(message: str) -> str:
    """The message without the traceback, the quotes and the line ends of ml_collections."""
    head, *traceback = message.split("Traceback (most recent call last):")
    if traceback:
        message = f"{head} {traceback[0].strip().splitlines()[-1]}"
    if message[:1] == message[-1:] == "'":
        message = message[1:-1].replace("\\n", " ").replace("\\'", "'")
    return " ".join(message.split())
