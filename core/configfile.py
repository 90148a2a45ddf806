"""A configuration as text: what its fields mean, values from text, and the YAML file of a run (imports no torch).

The comments beside a config class's fields are its documentation: they become the help of the flags and the comments of
`config.yaml`; a comment on a line of its own opens a section.
"""

import ast
import dataclasses
import inspect
import io
import math
import textwrap
import tokenize
import types
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from core.config import TrainConfig
from core.errors import UserError, nearest, shown
from core.files import open_regular

MAX_YAML = 2**18  # bytes; a configuration has a few thousand
MAX_SCALAR = 2000  # characters of a value: Python can write a whole number of as many hexadecimal digits

ConfigType = TypeVar("ConfigType", bound=TrainConfig)


class FieldInfo(NamedTuple):
    """One field of a config class."""

    name: str
    annotation: Any  # the resolved type
    section: str  # heading above it in the class; empty for fields that a method adds
    meaning: str  # the comment beside it


def describe_fields(cls: type[TrainConfig]) -> tuple[FieldInfo, ...]:
    """All fields of a config class, each with the comment of the first class that says something about it.

    In order, but for a section that a subclass goes on with: its fields join those that the base class wrote down.
    """
    hints = get_type_hints(cls)
    sections: dict[str, str] = {}
    meanings: dict[str, str] = {}
    for base in reversed([c for c in cls.__mro__ if dataclasses.is_dataclass(c)]):
        for name, (section, meaning) in _field_comments(base).items():
            sections.setdefault(name, section)
            meanings[name] = meanings.get(name) or meaning  # a method's comment may speak of its default only
    fields = [
        FieldInfo(f.name, hints[f.name], sections.get(f.name, ""), meanings.get(f.name, ""))
        for f in dataclasses.fields(cls)
    ]
    order = list(dict.fromkeys(field.section for field in fields))
    return tuple(sorted(fields, key=lambda field: order.index(field.section)))


def _field_comments(cls: type) -> dict[str, tuple[str, str]]:
    """Section and comment of each field that this class itself writes down; empty where there is no source."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):
        return {}
    headings: dict[int, str] = {}
    beside: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            alone = not token.line[: token.start[1]].strip()
            (headings if alone else beside)[token.start[0]] = token.string.lstrip("# ").strip()
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            above = [line for line in headings if line < node.lineno]
            section = headings[max(above)] if above else ""
            comment = beside.get(node.end_lineno or node.lineno, "") or beside.get(node.lineno, "")
            found[node.target.id] = (section, comment)
    return found


def optional_inner(annotation: Any) -> tuple[Any, bool]:
    """`X | None` as (X, True), any other type as (itself, False)."""
    if get_origin(annotation) in (Union, types.UnionType):
        inner = [part for part in get_args(annotation) if part is not type(None)]
        if len(inner) == 1:
            return inner[0], True
    return annotation, False


def convert(value: object, annotation: Any) -> Any:
    """A value from a flag (text) or a YAML file as the type of its field.

    Numbers may be written 500, 5e2, 0.01, 1e-4 or 2/3; a field that may be unset takes `none`.

    Raises:
        ValueError: with a message that continues the field's name, such as "must be a whole number, got 'x'".
    """
    inner, may_be_none = optional_inner(annotation)
    if may_be_none and (value is None or value == "none"):
        return None
    if get_origin(inner) is Literal:
        return _choice(value, get_args(inner))
    if get_origin(inner) is tuple:
        return _several(value, inner)
    if inner is bool:
        if not isinstance(value, bool):
            raise ValueError(f"must be true or false, got {shown(value)}")
        return value
    if inner in (int, float):
        return _number(value, inner)
    if isinstance(value, str) or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return str(value)
    raise ValueError(f"must be text, got {shown(value)}; put it in quotes")


def _choice(value: object, choices: tuple[Any, ...]) -> Any:
    for choice in choices:
        if str(value) == str(choice):
            return choice
    words = [str(choice) for choice in choices]
    raise ValueError(f"must be one of {', '.join(words)}, got {shown(value)}{nearest(str(value), words)}")


def _several(value: object, annotation: Any) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"must be a list, got {shown(value)}")
    parts = get_args(annotation)
    if parts[-1] is Ellipsis:
        return tuple(convert(part, parts[0]) for part in value)
    if len(value) != len(parts):
        raise ValueError(f"must have {len(parts)} values, got {shown(value)}")
    return tuple(convert(part, kind) for part, kind in zip(value, parts, strict=True))


def _number(value: object, kind: type) -> int | float:
    wanted = "a whole number" if kind is int else "a number"
    try:
        number = _parse_number(value)
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ValueError(f"must be {wanted}, got {shown(value)}") from None
    if kind is int and number != int(number):
        raise ValueError(f"must be {wanted}, got {shown(value)}")
    return kind(number)


def _parse_number(value: object) -> int | float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        number: int | float = value
    elif isinstance(value, str):
        numerator, slash, denominator = value.partition("/")
        digits = numerator.replace("_", "").lstrip("+-").isdigit()
        number = int(numerator) if digits else float(numerator)
        number = number / float(denominator) if slash else number
    else:
        raise ValueError
    if not math.isfinite(number):
        raise ValueError
    return number


def changed_flags(old: Mapping[str, Any], config: TrainConfig, free: Collection[str] = ()) -> list[str]:
    """The options in which a run's configuration differs from an earlier one, in words: `--lr 0.05, now 0.1`.

    Args:
        old: values by field; one that did not exist then had today's default.
        config: of now.
        free: fields that may differ.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    new = dataclasses.asdict(config)
    before = {**defaults, **old}
    changed = [name for name in before if name not in free and (name not in new or before[name] != new[name])]
    return [
        f"--{name.replace('_', '-')} {_in_words(before[name])}, now {_in_words(new[name]) if name in new else 'gone'}"
        for name in changed
    ]


def _in_words(value: object) -> str:
    """A field's value in a line: `0.5 0.75`, `on`, `none`, `''`."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value) or "''"


def to_yaml(config: TrainConfig) -> str:
    """The resolved configuration, one field a line under its sections, as `read_yaml` reads it back."""
    lines, last = [], None
    for field in describe_fields(type(config)):
        section = field.section or "method"
        if section != last:
            lines += ["", f"# {section}"] if last is not None else [f"# {section}"]
            last = section
        value = getattr(config, field.name)
        plain = list(value) if isinstance(value, tuple) else value
        text = yaml.safe_dump([plain], default_flow_style=True, width=math.inf, allow_unicode=True).strip()[1:-1]
        lines.append(f"{field.name}: {text}  # {field.meaning}".removesuffix("  # "))
    return "\n".join(lines) + "\n"


def read_yaml(path: str | Path, cls: type[TrainConfig]) -> dict[str, Any]:
    """The fields that a YAML file sets: a run's config.yaml or a hand-written part of one.

    Raises:
        UserError: for a missing or malformed file, an unknown field (naming the nearest) or a value of the wrong type.
    """
    return _convert_fields(read_mapping(Path(path)), cls, str(path))


def config_from_values(values: Mapping[object, object], cls: type[ConfigType], source: str) -> ConfigType:
    """A configuration from the plain values that a checkpoint holds.

    Raises:
        UserError: for an unknown field, a value of the wrong type, or fields that contradict each other.
    """
    try:
        return cls(**_convert_fields(values, cls, source))
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None


def _convert_fields(values: Mapping[object, object], cls: type[TrainConfig], source: str) -> dict[str, Any]:
    fields = {field.name: field for field in describe_fields(cls)}
    converted = {}
    for key, value in values.items():
        if key not in fields:
            raise UserError(f"{source}: unknown field {shown(key)}{nearest(str(key), fields)}")
        try:
            converted[str(key)] = convert(value, fields[str(key)].annotation)
        except ValueError as error:
            raise UserError(f"{source}: {key} {error}") from None
    return converted


def read_mapping(path: Path, what: str = "configuration file") -> dict[Any, Any]:
    """The top-level mapping of a YAML file of the user's; empty for an empty file.

    Raises:
        UserError: missing, not YAML, with aliases or repeated keys, or no mapping.
    """
    try:
        content = yaml.load(_text(path), Loader=_StrictLoader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such {what}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{path}{line}: not a YAML file of fields: {reason}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold lines of the form `field: value`, got a {type(content).__name__}")
    return content


def _text(path: Path) -> str:
    with open_regular(path) as file:
        content = file.read(MAX_YAML + 1)
    if len(content) > MAX_YAML:
        raise ValueError(f"has more than {MAX_YAML:,} bytes")
    return content.decode()


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which refuses a field written twice and endless values.

    It has no aliases: nested ones explode in memory.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A node of the file; an alias and a very long value are refused."""
        event = self.peek_event()
        mark: Any = event.start_mark
        if isinstance(event, yaml.AliasEvent):
            raise yaml.constructor.ConstructorError(None, None, "aliases are not allowed", mark)
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > MAX_SCALAR:
            length = f"a value of {len(event.value):,} characters"
            raise yaml.constructor.ConstructorError(None, None, length, mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """A mapping; a field that is written twice is refused."""
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            keys = Counter(str(key.value) for key, _ in node.value)
            twice = keys.most_common(1)[0][0]
            raise yaml.constructor.ConstructorError(None, None, f"{shown(twice)} is set twice", node.start_mark)
        return mapping
