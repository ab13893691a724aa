"""Values of settings: their types, what they must be in words, and errors that say so. No torch is imported here."""

from __future__ import annotations

import difflib
import os
import re
import reprlib
from collections.abc import Iterable
from functools import cache
from typing import Annotated, Any, get_args, get_type_hints

from pydantic import AfterValidator, BeforeValidator, ByteSize, Field, Strict, TypeAdapter, ValidationError

from optima.errors import RecipeError


def _one_or_many(value: Any) -> Any:
    """One text, or path, stands for a list of one."""
    many = [value] if isinstance(value, str | os.PathLike) else value
    return [_as_text(each) for each in many] if isinstance(many, list | tuple) else many


def _as_text(value: Any) -> Any:
    """Of a path."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


# The types of values, each with what it must be in words.
Fraction = Annotated[float, Field(gt=0, lt=1), "a number strictly between 0 and 1, such as 0.5"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), "a positive number"]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False), "a number of at least 0"]
Share = Annotated[float, Field(gt=0, le=1), "a number above 0 and at most 1"]
PartialShare = Annotated[float, Field(ge=0, lt=1), "0, or a number below 1 such as 0.5"]
Ridge = Annotated[float, Field(ge=0, le=1), "a number from 0 to 1"]
Count = Annotated[int, Field(ge=1, lt=2**63), "a whole number of at least 1"]
Seed = Annotated[int, Field(ge=0, lt=2**63), "a whole number of at least 0 and below 2^63"]
Size = Annotated[ByteSize, Field(ge=2**20), AfterValidator(int), "a size such as 8GiB, of 1MiB at least"]
Texts = Annotated[list[str], BeforeValidator(_one_or_many), "a list of texts"]
Name = Annotated[str, Field(min_length=1)]
Place = Annotated[str, BeforeValidator(_as_text)]
Names = Annotated[list[Name], BeforeValidator(_one_or_many), "a list of names, none of them empty"]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$"), "auto, cpu, cuda or cuda:N"]
Flag = Annotated[bool, Strict(), "true or false"]


@cache
def _kinds(owner: type) -> dict[str, tuple[TypeAdapter[Any], str]]:
    """How the values of each field of a class are read, and what they must be in words."""
    kinds = {}
    for name, hint in get_type_hints(owner, include_extras=True).items():
        notes = [note for part in (hint, *get_args(hint)) for note in getattr(part, "__metadata__", ())]
        kinds[name] = TypeAdapter(hint), next((note for note in notes if isinstance(note, str)), "text")
    return kinds


def must_be(owner: type, name: str) -> str:
    """What the values of a class's field must be, in words."""
    return _kinds(owner)[name][1]


def adapter(owner: type, name: str) -> TypeAdapter[Any]:
    """The type of the values of a class's field."""
    return _kinds(owner)[name][0]


def checked(owner: type, name: str, value: Any, default: Any) -> Any:
    """``value`` as the type of a field: YAML reads 1e-4 as text, and a command line has nothing but texts.

    Raises:
        RecipeError: if it is none.
    """
    is_flag = default is False
    try:
        if isinstance(value, bool) and not is_flag:
            raise TypeError("true and false are no numbers")
        return adapter(owner, name).validate_python(value)
    except (ValidationError, TypeError) as error:
        words = must_be(owner, name)
        number = isinstance(default, int | float) and not is_flag and "such" not in words
        example = f", such as {default}" if number else ""
        raise RecipeError(f"{name} must be {words}{example}, got {shown(value)}") from error


def check_regexes(name: str, regexes: list[str]) -> None:
    """Raise ``RecipeError`` if one of the ``regexes`` of the option ``name`` is none."""
    for regex in regexes:
        try:
            re.compile(regex)
        except re.error as error:
            raise RecipeError(f"{name}: {regex!r} is not a regular expression: {error}") from error


def unknown(what: str, value: str, known: Iterable[str]) -> str:
    """An error's words for a name that is none of the ``known``, with the closest of them."""
    known = list(known)
    close = difflib.get_close_matches(value, known, 1)
    meant = f" (did you mean {close[0]}?)" if close else ""
    return f"unknown {what} {value!r}{meant}: known {what}s are {', '.join(known)}"


def shown(value: Any) -> str:
    """``repr`` of bounded length: aliases make a small file a huge value."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 200
    return short.repr(value)
