"""One flat dataclass per program -> defaults < `--config` YAML < flags.

Owns how options are written, read, checked and explained. Knows no program's fields.

    @dataclass
    class Options:
        model: str                                                        # required: no default
        "What `--help` says about the field: a string literal right under it."
        runs: list[str] = field(default_factory=list, metadata={"positional": True})
        out: Path | None = field(default=None, metadata={"config": False})  # cannot stand in a YAML file
        def problems(self) -> Problems: yield "…"                         # optional: what types cannot check

    def main(argv: list[str]) -> int:
        options = parse_options(Options, argv, prog="gpt2repro plot", description=__doc__)

`int | None` takes `none` for None; `bool` becomes `--x` / `--no-x`; `Literal` becomes choices; lists and tuples take
several values. `--batch-tokens` is read as `--batch_tokens`. Limits stand in the type: `AtLeastOne`, or
`Annotated[int, pydantic.Field(gt=0)]`.
"""

import argparse
import ast
import atexit
import contextlib
import dataclasses
import difflib
import errno
import gc
import inspect
import itertools
import re
import signal
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

PRESETS = Path(__file__).parent / "presets"
# A run is a number of steps at a learning rate: an infinite or missing number is a typing mistake, "off" is none.
VALIDATION = ConfigDict(coerce_numbers_to_str=True, allow_inf_nan=False)

LARGEST_YAML_BYTES = 1 << 20  # ours have a few kB; /dev/zero never ends
LARGEST_COUNT = 10**15  # steps, tokens, bytes: more is a typing mistake

AtLeastOne = Annotated[int, Field(ge=1, le=LARGEST_COUNT)]
NotNegative = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[float, Field(gt=0)]
NotNegativeNumber = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]

Problems = Iterable[str]  # of an options class: a sentence for each

T = TypeVar("T")


class InputError(Exception):
    """Bad input. The message is one sentence for the user; the process ends with exit code 2 and no traceback."""


def taken(out: Path) -> Problems:
    """The problem of an option --out that is to become a new directory and cannot."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        yield f"--out {out} exists and is not an empty directory; choose another"


def first_line(error: BaseException) -> str:
    """The message of an error in one line; the error's name where it has none."""
    return ((getattr(error, "strerror", None) or str(error)).strip().splitlines() or [type(error).__name__])[0]


def say(message: str) -> None:
    """Print a message about the work on stderr; results go to stdout."""
    print(message, file=sys.stderr, flush=True)


def parse_options(cls: type[T], argv: Sequence[str], *, prog: str, description: str | None = None) -> T:
    """Read `argv`, and the YAML file that it names, into an instance of the dataclass `cls`.

    Raises: InputError naming every problem at once: unknown options, missing and mistyped values, `cls.problems()`.
    """
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    kinds = typing.get_type_hints(cls, include_extras=True)
    positional = next((name for name, field in fields.items() if field.metadata.get("positional")), None)
    explaining = not {"-h", "--help"}.isdisjoint(argv)
    parser = _parser(cls, fields, kinds, positional, prog, description, explaining)
    flags, rest = parser.parse_known_args([_canonical(argument, kinds) for argument in argv])
    given = vars(flags)
    problems: list[str] = []

    strangers = [argument for argument in rest if argument.startswith("-") and argument != "--"]
    values = [argument for argument in rest if not argument.startswith("-")]
    problems += [f"unknown option {name}{nearest(name, fields, '--')}" for name in strangers]
    if strangers:  # the words after an unknown option are most likely its values
        values = values[: rest.index(strangers[0])] or values[-1:]
    if values and positional:
        given[positional] = values
    elif values and not strangers:
        problems.append(f"unexpected argument {' '.join(map(repr, values))} (options are written --name value)")

    raw: dict[str, tuple[Any, str]] = {}  # field -> value as written, and where it was written
    config = None if "config" in fields else given.pop("config", None)  # a class may have a `config` of its own
    if config is _NO_VALUE:
        problems.append("--config needs a value: a YAML file, or a preset that --help names")
    elif config is not None:
        for name, value in read_yaml(config).items():
            if name not in fields:
                problems.append(f"unknown option {name!r} in {config}{nearest(str(name), fields, '')}")
            elif not fields[name].metadata.get("config", True):
                problems.append(f"{name} cannot be set in {config}; use the flag --{name}")
            else:
                raw[name] = value, str(config)
    raw.update({name: (value, "flag") for name, value in given.items()})

    checked: dict[str, Any] = {}
    for name, (value, source) in raw.items():
        try:
            if not fields[name].metadata.get("free_text") and isinstance(value, (str, list)):
                if value == "":  # such as an unset variable of a shell
                    raise ValueError("should not be empty")
                if re.search("[\ud800-\udfff]", "".join(map(str, value))):  # what Python makes of other bytes
                    raise ValueError("should be UTF-8 text")
            checked[name] = _convert(value, kinds[name])
        except ValueError as error:
            shown = f"--{name}" if source == "flag" else f"{name} in {source}"
            problems.append(f"{shown} needs a value" if value is _NO_VALUE else f"{shown}: {error}, not {value!r}")
    required = [name for name, field in fields.items() if _default(field) is dataclasses.MISSING]
    problems += [f"--{name} is required" for name in required if name not in raw]

    if checked.keys() >= set(required):
        options = cls(**checked)
        if hasattr(options, "problems"):
            # A mistyped field has its default here, so a problem that names this field would be one of the default.
            wrong = raw.keys() - checked.keys()
            problems += [text for text in options.problems() if not any(name in text for name in wrong)]
    if problems:
        many = f"{len(problems)} problems with the options:\n  - " if len(problems) > 1 else ""
        raise InputError(many + "\n  - ".join(problems))
    return options


def to_yaml(config: Any) -> str:
    """The resolved configuration as YAML, which is a valid `--config`."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.metadata.get("config", True)}
    plain = {name: _plain(value) for name, value in values.items()}
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def run_main(main: Callable[[list[str]], int], argv: Sequence[str] | None = None) -> int:
    """Call `main(argv)` and return an exit code.

    2 is bad input or a fault of the machine, 130 Ctrl-C, 141 a closed pipe.
    """
    atexit.register(gc.freeze)  # an ending interpreter searches torch's objects for garbage: 0.9 s of a processor
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # generated text must not end a program on a console that is not UTF-8
            stream.reconfigure(errors="replace")
    try:
        code = main(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()  # a full disk behind it is met here and not while the interpreter ends
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError):  # of stdout, or of something else?
            try:
                print(flush=True)
            except BrokenPipeError:  # the reader, such as `head`, has seen enough
                sys.stdout = None  # or the interpreter tries once more when it ends
                return 141  # as a shell calls SIGPIPE, which Windows does not have
        sentence = sentence_for(error)
        if sentence is None:
            raise
        with contextlib.suppress(OSError):  # stderr may be on the same full disk
            print(f"error: {sentence}", file=sys.stderr, flush=True)
        try:
            sys.stdout.flush()
        except OSError:
            sys.stdout = None  # or the interpreter tries once more when it ends
        return 2
    finally:
        if argv is None:  # Ctrl-C while the interpreter ends: no traceback of what it was just closing
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def sentence_for(error: BaseException) -> InputError | None:
    """What to say of bad input, absent packages, and faults of files, disks and memory; None for other errors."""
    if isinstance(error, InputError):
        return error
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        what = f"{error.filename}: " if error.filename is not None else ""
        return InputError(f"{what}{error.strerror}; {_ADVICE.get(error.errno, _ELSEWHERE)}")
    kinds = (RuntimeError, ImportError, SystemError)
    if isinstance(error, MemoryError) or (isinstance(error, kinds) and _OUT_OF_MEMORY.search(str(error))):
        return InputError(
            "the memory ran out; take smaller batches (for training: halve --micro_batch_size), or a machine with more "
            "memory"
        )
    if isinstance(error, ModuleNotFoundError) and error.name and "gpt2repro" not in error.name:  # else a fault of ours
        package = error.name.partition(".")[0]
        return InputError(f"this needs the package {package}, which is not installed here: pip install {package}")
    return None


_ADVICE = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room and start the same command again")
_ELSEWHERE = "see to it, or name another place"
# The words of torch's allocators, of the loader of shared libraries, and of Python; torch is not imported here.
_OUT_OF_MEMORY = re.compile(
    "out of memory|can't allocate memory|not enough memory|[Cc]annot allocate memory|bad_alloc|failed to map segment"
    "|can't start new thread|error return without exception set"
)


def preset_names() -> list[str]:
    """Names of the packaged presets, each a valid `--config`."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def _presets_for(fields: dict) -> list[str]:
    """The packaged presets for this program: they set nothing but `fields`."""
    contents = {name: yaml.safe_load((PRESETS / f"{name}.yaml").read_text(encoding="utf-8")) for name in preset_names()}
    return [name for name, content in contents.items() if content.keys() <= fields.keys()]


_NO_VALUE = object()  # of a flag that needs a value and has none


def _parser(cls, fields, kinds, positional, prog, description, explaining: bool) -> argparse.ArgumentParser:
    """An argparse parser that only splits and explains; values stay text, which pydantic converts afterwards."""
    words = f" {positional.upper()}…" if positional else ""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog}{words} [--option value …]",
        description=inspect.cleandoc(description) if description else None,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=110),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.error = _refuse
    docs = _field_docs(cls)
    if positional:
        parser.add_argument_group(f"{positional.upper()}…", docs.get(positional))
    if "config" not in fields:
        fitting = _presets_for(fields) if explaining else []
        text = f"YAML file{' or packaged preset ' * bool(fitting)}{', '.join(fitting)}; flags win over it"
        parser.add_argument("--config", nargs="?", const=_NO_VALUE, metavar="YAML", help=text.replace("%", "%%"))
    for name, field in fields.items():
        if name == positional:
            continue
        default = _default(field)
        shown = "required" if default is dataclasses.MISSING else f"default: {_plain_text(default)}"
        text = f"{docs.get(name, '')} ({shown})".strip().replace("%", "%%")
        kind = _without_none(kinds[name])
        if kind is bool:
            parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=text)
        elif get_origin(kind) in (list, tuple):
            parser.add_argument(f"--{name}", nargs="*", metavar=_metavar(get_args(kind)[0]), help=text)
        else:
            parser.add_argument(f"--{name}", nargs="?", const=_NO_VALUE, metavar=_metavar(kind), help=text)
    return parser


def _refuse(message: str):
    raise InputError(message)


def _canonical(argument: str, kinds: dict) -> str:
    """`--batch-tokens=8` -> `--batch_tokens=8`; `--no_compile` -> `--no-compile`, as argparse spells it."""
    if not argument.startswith("--") or argument == "--":
        return argument
    name, equals, value = argument[2:].partition("=")
    name = name.replace("-", "_")
    if name.startswith("no_") and name not in kinds and name[3:] in kinds:
        name = "no-" + name[3:]
    return f"--{name}{equals}{value}"


def read_yaml(name: str, flag: str = "--config") -> dict:
    """The mapping in a YAML file or, for `--config`, a packaged preset. Raises: InputError."""
    path, is_config = Path(name), flag == "--config"
    if is_config and not path.is_file() and path.name == name and (PRESETS / f"{name}.yaml").is_file():
        path = PRESETS / f"{name}.yaml"
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_YAML_BYTES + 1)
        if len(content) > LARGEST_YAML_BYTES:
            raise ValueError(f"it has more than {LARGEST_YAML_BYTES} bytes")
        text = content.decode("utf-8")
        for event in yaml.parse(text, yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("anchors and aliases are not allowed, since a few of them can fill the memory")
            if tag := getattr(event, "tag", None):  # its constructor may raise anything
                raise ValueError(f"the tag {tag} is not read; write the value itself")
        content = yaml.load(text, _StrictLoader)
    except FileNotFoundError:
        names = preset_names()
        presets = f", and the packaged presets are {', '.join(names) or 'none'}{nearest(name, names)}" * is_config
        raise InputError(f"{flag} {name}: no such file{presets}") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError, RecursionError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
        raise InputError(f"{flag} {name} is not a readable YAML file: {reason}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"{flag} {name} must hold lines like 'name: value', found a {type(content).__name__}")
    return content


class _StrictLoader(yaml.SafeLoader):
    """Reads YAML and refuses its surprises: a key that is given twice, 1:30:00 (5400 to YAML) and 010 (8)."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise ValueError(f"{twice} is given twice")
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node):
        value = super().construct_scalar(node)
        if node.tag.endswith((":int", ":float")) and re.search(r":|^[-+]?0\d", value):
            raise ValueError(f"{value} is no plain number; write it out, or in quotes if it is text")
        return value


def _convert(value: Any, kind: Any) -> Any:
    """`value` as `kind`. Raises: ValueError saying what was expected."""
    if isinstance(value, str) and value.lower() == "none" and _without_none(kind) is not kind:
        return None
    if isinstance(value, bool) and "bool" not in str(kind) and kind is not Any:
        raise ValueError(f"should be {_metavar(_without_none(kind)).lower()}")  # pydantic would read true as 1
    try:
        return TypeAdapter(kind, config=VALIDATION).validate_python(value)
    except ValidationError as error:
        texts = [e["msg"].removeprefix("Input ").removeprefix("Value error, ") for e in error.errors(include_url=False)]
        raise ValueError(" or ".join(dict.fromkeys(texts))) from None


def _field_docs(cls: type) -> dict[str, str]:
    """Field name -> the string literal below the field, for `cls` and its bases."""
    docs: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0].body
        except (OSError, TypeError, SyntaxError):  # a built-in class, or one without source: help has no texts
            continue
        for statement, below in itertools.pairwise(body):
            if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
                continue
            if isinstance(below, ast.Expr) and isinstance(getattr(below.value, "value", None), str):
                docs[statement.target.id] = " ".join(below.value.value.split())
    return docs


def _default(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _without_none(kind: Any) -> Any:
    """`int | None` -> `int`; any other annotation as it is."""
    if get_origin(kind) not in (Union, types.UnionType) or type(None) not in get_args(kind):
        return kind
    rest = tuple(part for part in get_args(kind) if part is not type(None))
    return rest[0] if len(rest) == 1 else Union[rest]  # noqa: UP007 - built from a tuple


def _metavar(kind: Any) -> str:
    origin = get_origin(kind)
    if origin is Literal:
        return "{" + ",".join(map(str, get_args(kind))) + "}"
    if hasattr(kind, "__metadata__"):  # Annotated
        return _metavar(_without_none(get_args(kind)[0]))
    if origin in (Union, types.UnionType):
        return "|".join(_metavar(part) for part in get_args(kind))
    names = {int: "INTEGER", float: "NUMBER", str: "TEXT", Path: "PATH"}
    return names.get(kind, getattr(origin or kind, "__name__", "VALUE").upper())


def _plain(value: Any) -> Any:
    """`value` in the types that YAML has: tuples become lists, paths become text."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.as_posix() if isinstance(value, PurePath) else value


def _plain_text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(_plain_text, value)) or "empty"
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else str(value)


def nearest(name: str, known: Any, prefix: str = "") -> str:
    """`; did you mean --batch_tokens?`, or nothing if no known name is similar."""
    found = difflib.get_close_matches(name.lstrip("-").split("=")[0].replace("-", "_"), list(known), n=1)
    return f"; did you mean {prefix}{found[0]}?" if found else ""
