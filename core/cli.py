"""Command lines: flags made from a config class, and one-line errors for all commands (imports no torch)."""

import argparse
import dataclasses
import errno
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

from core.config import TrainConfig
from core.configfile import FieldInfo, convert, describe_fields, optional_inner, read_yaml, to_yaml
from core.errors import UserError, nearest

ConfigType = TypeVar("ConfigType", bound=TrainConfig)

USER_ERRNOS = (  # the machine's or the path's, not the code's
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
)


class OneLineParser(argparse.ArgumentParser):
    """argparse whose mistakes are one line, `error: ...`, with the nearest known word, and exit code 2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; names the nearest flag for an unknown one."""
        parsed, extras = self.parse_known_args(args, namespace)
        flags = [extra.partition("=")[0] for extra in extras if extra.startswith("-")]
        if flags:
            self.error(f"unknown flag {flags[0]}{nearest(flags[0], self._all_flags())}")
        if extras:
            self.error(f"unexpected argument {extras[0]!r}")
        return parsed

    def error(self, message: str) -> NoReturn:
        """Print one line, under `torchrun` one of each node, and exit with code 2."""
        message = re.sub(r"^argument (\S+): ", r"\1: ", message).replace(": must be", " must be", 1)
        choices = re.search(r"invalid choice: '(.*?)' \(choose from (.+)\)", message)
        if choices:
            message += nearest(choices[1], [word.strip("' ") for word in choices[2].split(",")])
        speaks = os.environ.get("LOCAL_RANK", "0") == "0"  # all ranks have the same command line
        self.exit(2, f"error: {' '.join(message.split())}\n" if speaks else None)

    def _all_flags(self) -> list[str]:
        flags = list(self._option_string_actions)
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                flags += [flag for child in action.choices.values() for flag in child._all_flags()]
        return flags


def parse_config(
    presets: Mapping[str, ConfigType],
    method: str,
    description: str,
    argv: Sequence[str] | None = None,
    describe_model: Callable[[ConfigType], str] | None = None,
) -> ConfigType:
    """The configuration that a training command line describes: preset, then `--config` file, then flags.

    Every field is a flag. `--steps` replaces `epochs` and the other way round. An unset `out` becomes
    `runs/<method>/<preset>[-<data>]`, with the data's name where it is not the preset's own. `--dry-run` prints the
    resolved configuration, which `--config` reads back, and exits.

    Args:
        presets: named configurations; the first is the default.
        method: package name, such as paa.
        description: what the command does, for `--help`.
        argv: command line without the program's name; the process's own by default.
        describe_model: one line about the model's size, which `--dry-run` adds.

    Raises:
        SystemExit: code 2 after one line for any mistake, 0 after `--help` and `--dry-run`.
    """
    base = next(iter(presets.values()))
    parser = _config_parser(type(base), presets, method, description)
    options = vars(parser.parse_args(argv))
    config_file, dry_run = options.pop("config_file"), options.pop("dry_run")
    try:
        from_file = read_yaml(config_file, type(base)) if config_file else {}
        config = resolve(presets, method, from_file, options)
    except (UserError, ValueError) as error:
        parser.error(str(error))
    if dry_run:
        print(describe_run(config))
        if describe_model:
            print(f"# model {describe_model(config)}")
        parser.exit()
    return config


def resolve(
    presets: Mapping[str, ConfigType], method: str, from_file: Mapping[str, Any], flags: Mapping[str, Any]
) -> ConfigType:
    """Preset, file and flags laid over each other, with the run's folder filled in.

    Raises:
        UserError: for an unknown preset.
        ValueError: for a configuration that contradicts itself.
    """
    name = flags.get("preset") or from_file.get("preset") or next(iter(presets))
    if name not in presets:
        raise UserError(f"unknown preset {name!r}, there are {', '.join(presets)}{nearest(name, presets)}")
    changes = {**_one_length(from_file), **_one_length(flags), "preset": name}
    config = dataclasses.replace(presets[name], **changes)
    return config if config.out else dataclasses.replace(config, out=default_out(config, method, presets[name].data))


def _one_length(changes: Mapping[str, Any]) -> dict[str, Any]:
    """The changes of one layer, where a run's length in steps unsets the one in epochs and the other way round.

    A warm-up in steps unsets the one in epochs, which otherwise decides.
    """
    given = {key for key in ("steps", "epochs") if changes.get(key) is not None}
    unset = {"steps": None, "epochs": None} if given else {}
    warmup = {"warmup_epochs": None} if changes.get("warmup_steps") is not None else {}
    return {**unset, **warmup, **changes}


def default_out(config: TrainConfig, method: str, preset_data: str) -> str:
    """`runs/<method>/<preset>[-<data>]`; the data's stem is added where it is not the preset's own data."""
    if config.data == preset_data:
        return f"runs/{method}/{config.preset}"
    path = Path(config.data).absolute()
    stem = path.stem if path.suffix.lower() in (".yaml", ".yml") else path.name
    return f"runs/{method}/{config.preset}-{stem}"


def describe_run(config: TrainConfig) -> str:
    """The configuration as YAML, with the values that follow from it as comments."""
    if config.lr is not None:
        origin = "as given"
    else:
        origin = f"{config.paper_lr:g} * {config.batch_size} / {config.paper_batch_size} images"
    return f"{to_yaml(config)}\n# learning rate {config.learning_rate:g}: {origin}\n# run folder {config.out}"


def _config_parser(
    cls: type[TrainConfig], presets: Mapping[str, TrainConfig], method: str, description: str
) -> OneLineParser:
    parser = OneLineParser(
        prog=f"python -m {method}.train",
        usage="%(prog)s [--preset P] [--config F.yaml] [--field value ...] [--dry-run]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    default = next(iter(presets))
    names = ", ".join(presets)
    parser.add_argument("--preset", metavar="P", help=f"named run to begin with: {names} [{default}]")
    parser.add_argument(
        "--config", dest="config_file", metavar="F.yaml", default=None, help="a run's config.yaml, or some of its lines"
    )
    parser.add_argument(
        "--dry-run", action="store_true", default=False, help="print the resolved recipe and model size"
    )
    groups: dict[str, Any] = {}
    for field in describe_fields(cls):
        if field.name == "preset":
            continue
        title = field.section or method
        group = groups.setdefault(title, None) or parser.add_argument_group(title)
        groups[title] = group
        _add_flag(group, field, getattr(presets[default], field.name))
    return parser


def _add_flag(group: Any, field: FieldInfo, default: Any) -> None:
    """One field as a flag; `[value]` at the end of its help is the default preset's."""
    flag = "--" + field.name.replace("_", "-")
    inner, _ = optional_inner(field.annotation)
    shown = " ".join(_short(value) for value in _as_tuple(default))
    meaning = (f"{field.meaning} [{shown}]" if shown else field.meaning).replace("%", "%%").strip()
    if inner is bool:
        group.add_argument(flag, dest=field.name, action=argparse.BooleanOptionalAction, help=meaning)
        return
    several = get_origin(inner) is tuple
    annotation = get_args(inner)[0] if several else field.annotation
    group.add_argument(
        flag,
        dest=field.name,
        type=_flag_type(annotation),
        action=_AsTuple if several else "store",
        nargs=_count(inner) if several else None,
        metavar=_metavar(annotation),
        help=meaning,
    )


class _AsTuple(argparse.Action):
    """Stores several values as the tuple that a frozen config holds."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, tuple(values))


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else () if value is None else (value,)


def _short(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _count(annotation: Any) -> str | int:
    parts = get_args(annotation)
    return "*" if parts[-1] is Ellipsis else len(parts)


def _flag_type(annotation: Any) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return convert(text, annotation)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def _metavar(annotation: Any) -> str:
    inner, _ = optional_inner(annotation)
    if get_origin(inner) is Literal:
        return "{" + ",".join(str(choice) for choice in get_args(inner)) + "}"
    return {int: "N", float: "X"}.get(inner, "TEXT")


def run(main: Callable[[], object]) -> NoReturn:
    """Run a command and leave: what a user can mend becomes one line and exit code 2, an interrupt 130.

    Everything else keeps its traceback: it is our mistake.
    """
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        _leave(2, f"error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        _leave(130, "interrupted")
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # whoever read our output has left: no second error
        _leave(2, "error: the reader of this output closed it")
    except OSError as error:
        if error.errno not in USER_ERRNOS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _leave(2, f"error: {where}{error.strerror}")
    sys.exit(0)


def _leave(code: int, line: str) -> NoReturn:
    print(line, file=sys.stderr)
    sys.exit(code)
