"""A command line is a typed dataclass plus a YAML recipe: `script.py recipe.yaml --learning_rate 1e-3`."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from transformers import HfArgumentParser

from .errors import SpcxrError

Arguments = TypeVar("Arguments")


def parse_arguments(arguments_class: type[Arguments], argv: Sequence[str] | None = None) -> Arguments:
    """Parse a command line: an optional recipe first, then flags, which win over the recipe.

    The recipe's values go through the same parser as the flags, so both are typed and refused alike.

    Args:
        arguments_class: A dataclass; its fields are the flags, their metadata's "help" the help text.
        argv: The words of the command line without the program's name; those of the process by default.

    Raises:
        SpcxrError: the recipe cannot be read, or has a key that is no field; the message names both.
        SystemExit: a flag is unknown or its value of the wrong type, as in every command line.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(cast(Any, arguments_class), description=(arguments_class.__doc__ or "").strip())
    parser.usage = "%(prog)s [RECIPE.yaml] [--flag value ...]"
    if words and not words[0].startswith("-"):
        # The recipe's flags go first: of two equal flags, argparse keeps the last.
        words = [*_recipe_words(arguments_class, Path(words[0])), *words[1:]]
    arguments, unknown = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    if unknown:  # their values are not repeated: they may be secrets
        known = [field.name for field in dataclasses.fields(cast(Any, arguments_class))]
        flags = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        named = ", ".join(flag + _nearest(flag, known, "--") for flag in flags)
        parser.error(f"unrecognized arguments: {named or unknown[0]}")
    return arguments


def _nearest(name: str, known: Iterable[str], dashes: str = "") -> str:
    """What was meant, in brackets, if anything known is called nearly so."""
    near = difflib.get_close_matches(name.removeprefix(dashes), list(known), n=1)
    return f" (did you mean {dashes}{near[0]}?)" if near else ""


def read_recipe(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML recipe.

    Raises:
        SpcxrError: the file is missing, is not YAML, or holds something else than keys and values.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SpcxrError(f"{path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise SpcxrError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise SpcxrError(f"{path}: a recipe holds `key: value` lines; found {type(values).__name__}")
    return values


def save_recipe(arguments: Any, path: Path) -> None:
    """Write the resolved values of a dataclass as a recipe that gives them back."""
    path.write_text(yaml.safe_dump(dataclasses.asdict(arguments), sort_keys=False), encoding="utf-8")


def fill_from_recipe(arguments: Any, recipe: Path, **otherwise: Any) -> None:
    """Give fields that are empty the recipe's values, as of the recipe that lies beside a trained model.

    Args:
        arguments: A dataclass of which fields are changed.
        recipe: A file that need not be there.
        otherwise: Field -> its value where the recipe does not say one either.

    Raises:
        SpcxrError: as `read_recipe`, of a file that is there.
    """
    known = read_recipe(recipe) if recipe.is_file() else {}
    for name, value in otherwise.items():
        setattr(arguments, name, getattr(arguments, name) or known.get(name) or value)


def _recipe_words(arguments_class: type, path: Path) -> list[str]:
    known = {field.name for field in dataclasses.fields(arguments_class)}
    words: list[str] = []
    for key, value in read_recipe(path).items():
        if key not in known:
            meant = _nearest(str(key), known)
            raise SpcxrError(f"{path}: unknown key {key!r}{meant}; known keys: {', '.join(sorted(known))}")
        if value is None or value == []:  # no flag says so; it is what these fields are by default
            continue
        values = value if isinstance(value, list) else [value]
        words += [f"--{key}", *(str(item) for item in values)]
    return words
