"""The one public error type of the package."""

from collections.abc import Iterator
from contextlib import contextmanager


class SpcxrError(ValueError):
    """Input that cannot be used. The message names the file or the value, and the cause.

    Everything that `spcxr_hf` refuses (a file that is not a radiograph, a recipe with an unknown key, a checkpoint that
    is damaged) is raised as this type or a subclass of it. It derives from `ValueError`, which is what `modeling/`
    raises: those files travel to the Hub alone and cannot import this one.
    """


def one_line(error: Exception | str) -> str:
    """What another library says, as part of a one-line message: at most 240 characters, or its type."""
    text = " ".join(str(error).split()) or type(error).__name__
    if text.startswith("Repo id must "):  # huggingface_hub on a path of a folder that is not there
        return "there is no such folder, and no Hub id is like that"
    return text if len(text) <= 240 else f"{text[:240]} ..."


def printable(text: str) -> str:
    """For a terminal: what a file's name may hold besides text (line ends, escape sequences) is shown, not done."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


@contextmanager
def needs(extra: str, package: str) -> Iterator[None]:
    """Imports of what an extra installs; where it is missing, the error says how to install it."""
    try:
        yield
    except ImportError as error:
        raise SpcxrError(f'{package} is missing: pip install "spcxr-hf[{extra}]"') from error
