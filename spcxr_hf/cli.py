"""The command `spcxr`: `spcxr demo` looks at a radiograph, `spcxr install` fills the local Hub cache.

What a command needs is imported inside it, so that a mistyped option is told at once.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from .errors import SpcxrError

# No mark-up and no framed tracebacks: the text reads the same in a terminal, a pipe and a log.
app = typer.Typer(
    help="SPCXR: a chest X-ray foundation model. Not for clinical use.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

CheckpointsOption = Annotated[
    Path | None,
    typer.Option("--checkpoints", metavar="FOLDER", help="Holds a folder per checkpoint; by default the tree's own."),
]


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        from . import __version__

        typer.echo(f"spcxr {__version__}")
        raise typer.Exit


@app.command()
def demo(
    image: Annotated[
        Path | None,
        typer.Argument(
            metavar="IMAGE", help="PNG, JPEG or DICOM; left out, a public chest radiograph that pydicom-data carries."
        ),
    ] = None,
    output: Annotated[Path, typer.Option(metavar="PNG", help="The picture to write.")] = Path("spcxr_demo.png"),
    checkpoints: CheckpointsOption = None,
) -> None:
    """Look at a radiograph: embedding, lungs, attention, reconstruction."""
    from .demo import run_demo

    run_demo(image, output, checkpoints)


@app.command()
def install(
    checkpoints: CheckpointsOption = None,
    force: Annotated[
        bool, typer.Option("--force", help="Load the bundled checkpoint even where the Hub's own is in the cache.")
    ] = False,
) -> None:
    """Put the bundled checkpoints into the local Hub cache, so that their ids load offline."""
    from .hub import install_checkpoints

    for checkpoint in install_checkpoints(checkpoints, force=force):
        state = "installed" if checkpoint.is_new else "already there"
        typer.echo(f"{checkpoint.repo_id}  revision {checkpoint.revision}  {state}")


def main() -> None:
    """Run the command line; what cannot be used is told in one line, and the exit status is 1 then."""
    try:
        app()
    except SpcxrError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
