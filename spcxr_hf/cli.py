"""The command `spcxr`: what a person asks for, read and handed on to the flows that do it.

predict, segment, embed, explain, reconstruct   many files through a model: jobs.Job, with a function of tasks
audit, install, publish, export, demo           one flow each

What a command needs is imported inside it, so that help and a mistyped option answer at once.
"""

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spcxr_hf.errors import SpcxrError, printable

if TYPE_CHECKING:
    from spcxr_hf.inference.pipeline import Loaded, Source
    from spcxr_hf.inference.tasks import Job

BASE, LUNGS, PNEUMONIA = "spcxr/base", "spcxr/lung-segmentation", "spcxr/pneumonia"
IDS = (BASE, LUNGS, PNEUMONIA, "spcxr/screening", "spcxr/covid")

HELP = """SPCXR: a chest X-ray foundation model. Research use only, not for clinical use.

\b
Images are files, folders or quoted patterns ('scans/**/*.dcm'), PNG, JPEG,
TIFF, WebP, BMP or DICOM. Records go to standard output, a table in a terminal
and JSON Lines in a pipe, or to --output. All that is no record goes to
standard error."""
EXIT_CODES = """\b
Exit status:
  0    all is done
  1    nothing could be done: the message says why
  2    the command line is mistaken
  3    some files failed, each told on standard error; the others are done
  130  interrupted; what is written is whole, and --resume goes on"""

# No mark-up and no framed tracebacks: the text reads the same in a terminal, a pipe and a log.
app = typer.Typer(
    help=HELP,
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _example(*lines: str) -> str:
    """What stands below a command's help."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)


def _from(*words: str) -> Any:
    """What the shell completes an option's value from."""

    def complete(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return complete


# ---- options that commands share ---------------------------------------------------------------------------------

Images = Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Files, folders or quoted patterns.")]
ModelOption = Annotated[
    str, typer.Option("--model", metavar="ID|FOLDER", help="A Hub id or a folder.", autocompletion=_from(*IDS))
]
DeviceOption = Annotated[
    str,
    typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps.", autocompletion=_from("auto", "cpu", "cuda", "mps")),
]
BatchOption = Annotated[int, typer.Option("--batch-size", min=1, help="Images per forward pass.")]
WorkersOption = Annotated[
    int | None, typer.Option("--workers", min=1, help="Threads that read; by default one per processor, at most 8.")
]
OutputOption = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE", help="The records; .jsonl, .csv, .parquet or .txt.")
]
VectorsOption = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE", help=".parquet, .safetensors, .jsonl or .csv.")
]
FormatOption = Annotated[
    str | None,
    typer.Option(
        "--format",
        help="table, jsonl, csv or parquet, where the suffix does not say it.",
        autocompletion=_from("table", "jsonl", "csv", "parquet", "safetensors"),
    ),
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Leave out files that an earlier run has finished.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run has written.")]
PicturesOption = Annotated[Path, typer.Option("--pictures", metavar="FOLDER", help="Where the pictures go.")]
CheckpointsOption = Annotated[
    Path | None,
    typer.Option("--checkpoints", metavar="FOLDER", help="Holds a folder per checkpoint; by default the tree's own."),
]


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        from spcxr_hf import __version__

        typer.echo(f"spcxr {__version__}")
        raise typer.Exit


# ---- many files through a model ----------------------------------------------------------------------------------


@app.command(
    short_help="Probabilities of each label, beside named thresholds.",
    epilog=_example("spcxr predict scans/ --output predictions.csv", "spcxr predict chest.dcm | jq .targets"),
)
def predict(
    images: Images,
    model: ModelOption = PNEUMONIA,
    operating_point: Annotated[
        str | None, typer.Option("--operating-point", metavar="NAME", help="One of the checkpoint's, as 'youden'.")
    ] = None,
    device: DeviceOption = "auto",
    batch_size: BatchOption = 16,
    workers: WorkersOption = None,
    output: OutputOption = None,
    format_: FormatOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Probabilities of each label, and whether they lie above or below the thresholds of a named operating point."""
    from spcxr_hf.inference.tasks import Job, Predictor

    job = Job(_find(images), output, format_, resume, overwrite, batch_size, workers)
    loaded = _load("classification", model, device)
    _finish(job, loaded, Predictor(loaded, operating_point))


@app.command(
    short_help="The embedding of each image.",
    epilog=_example("spcxr embed 'scans/**/*.dcm' --output embeddings.parquet"),
)
def embed(
    images: Images,
    model: ModelOption = BASE,
    device: DeviceOption = "auto",
    batch_size: BatchOption = 16,
    workers: WorkersOption = None,
    output: VectorsOption = None,
    format_: FormatOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """The embedding of each image: the vector that a linear probe or a search for neighbours takes."""
    from spcxr_hf.inference.tasks import Job
    from spcxr_hf.inference.tasks import embed as answer

    job = Job(_find(images), output, format_, resume, overwrite, batch_size, workers)
    _finish(job, _load("embedding", model, device), answer)


@app.command(
    short_help="A lung mask of each image, and its areas.",
    epilog=_example("spcxr segment scans/ --masks masks/ --output areas.csv"),
)
def segment(
    images: Images,
    model: ModelOption = LUNGS,
    masks: Annotated[Path, typer.Option("--masks", metavar="FOLDER", help="Where the masks go.")] = Path("masks"),
    mask_format: Annotated[
        str,
        typer.Option(
            "--mask-format",
            help="png (white is lung), or seg: DICOM segmentations of DICOM files.",
            autocompletion=_from("png", "seg"),
        ),
    ] = "png",
    device: DeviceOption = "auto",
    batch_size: BatchOption = 16,
    workers: WorkersOption = None,
    output: OutputOption = None,
    format_: FormatOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """A lung mask of each image, of its own size, and the areas of the lungs as shares of the image."""
    from spcxr_hf.inference.tasks import Job, mask_saver, picture_names
    from spcxr_hf.inference.tasks import segment as answer

    sources = _find(images)
    save, suffix = mask_saver(mask_format, model)
    place = picture_names(sources, masks, suffix)
    job = Job(sources, output, format_, resume, overwrite, batch_size, workers, place)
    _finish(
        job, _load("segmentation", model, device), partial(answer, save=lambda mask, image: save(mask, image, place))
    )


@app.command(
    short_help="Draw which parts of an image an answer rests on.",
    epilog=_example("spcxr explain chest.png --target 'viral pneumonia' --pictures explained/"),
)
def explain(
    images: Images,
    model: ModelOption = PNEUMONIA,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="LABEL", help="A label, labels joined by ' + ', or 'embedding'; by default the most probable label."
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(help="relevance or rollout.", autocompletion=_from("relevance", "rollout"))
    ] = "relevance",
    lungs: Annotated[
        str,
        typer.Option(
            metavar="ID|FOLDER|none",
            help="The model that outlines the lungs, or none.",
            autocompletion=_from(LUNGS, "none"),
        ),
    ] = LUNGS,
    pictures: PicturesOption = Path("explained"),
    device: DeviceOption = "auto",
    batch_size: BatchOption = 16,
    workers: WorkersOption = None,
    output: OutputOption = None,
    format_: FormatOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Draw which parts of each image an answer rests on. It shows what the model used, not where a disease is."""
    from spcxr_hf.inference.tasks import Explainer

    job = _picture_job(images, pictures, output, format_, resume, overwrite, batch_size, workers)
    wants_embedding = target == "embedding"
    loaded = _load("embedding" if wants_embedding else "classification", model, device)
    outliner = None if lungs == "none" else _load("segmentation", lungs, device)
    what = None if wants_embedding else target or "probable"
    _finish(job, loaded, Explainer(loaded, _png_saver(job), what, method, outliner))


@app.command(
    short_help="Draw images corrupted and reconstructed.",
    epilog=_example("spcxr reconstruct chest.png --fill noise --fill block --seed 1"),
)
def reconstruct(
    images: Images,
    model: ModelOption = BASE,
    fill: Annotated[
        list[str] | None,
        typer.Option(
            help="noise, zeros, block or replace; again for more. By default all but replace.",
            autocompletion=_from("noise", "zeros", "block", "replace"),
        ),
    ] = None,
    second: Annotated[Path | None, typer.Option(metavar="IMAGE", help="Where replace takes its pixels from.")] = None,
    seed: Annotated[int, typer.Option(help="Where the corrupted groups lie.")] = 0,
    pictures: PicturesOption = Path("reconstructed"),
    device: DeviceOption = "auto",
    batch_size: BatchOption = 16,
    workers: WorkersOption = None,
    output: OutputOption = None,
    format_: FormatOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Draw each image clean, corrupted, reconstructed and the error, a row for each way to corrupt it."""
    from spcxr_hf.inference.tasks import Reconstructor, read_second

    job = _picture_job(images, pictures, output, format_, resume, overwrite, batch_size, workers)
    loaded = _load("reconstruction", model, device)
    other = None if second is None else read_second(loaded, second)
    fill_modes = fill or ["noise", "zeros", "block", *(["replace"] if second else [])]
    _finish(job, loaded, Reconstructor(_png_saver(job), fill_modes, seed, other))


def _find(images: list[str]) -> "list[Source]":
    from spcxr_hf.inference.pipeline import find_sources

    return find_sources(images)


def _load(task: str, model: str, device: str) -> "Loaded":
    from spcxr_hf.inference.pipeline import load_model

    return load_model(task, model, device)


def _picture_job(images: list[str], pictures: Path, output: Path | None, stated: str | None, *options: Any) -> "Job":
    from spcxr_hf.inference.tasks import Job, picture_names

    sources = _find(images)
    # The options are the four between; mypy takes them for all that could follow.
    return Job(sources, output, stated, *options, picture_of=picture_names(sources, pictures))  # type: ignore[misc]


def _png_saver(job: "Job") -> Any:
    from spcxr_hf.files import write_png

    def save(picture: Any, image: Any) -> Path:
        path = job.picture_of(image.source)  # type: ignore[misc]
        write_png(picture, path)
        return path

    return save


def _finish(job: "Job", loaded: "Loaded", answer: Any) -> None:
    """Run the job; its exit status is the command's."""
    raise typer.Exit(job.run(loaded, answer).exit_code)


# ---- one flow each -----------------------------------------------------------------------------------------------


@app.command(
    short_help="Look at one radiograph, or at many in a browser.",
    epilog=_example("spcxr demo", "spcxr demo chest.dcm --output chest.png", "spcxr demo --serve"),
)
def demo(
    image: Annotated[
        Path | None,
        typer.Argument(
            metavar="IMAGE", help="PNG, JPEG or DICOM; left out, a public chest radiograph that pydicom-data carries."
        ),
    ] = None,
    output: Annotated[Path, typer.Option(metavar="PNG", help="The picture to write.")] = Path("spcxr_demo.png"),
    checkpoints: CheckpointsOption = None,
    serve: Annotated[bool, typer.Option("--serve", help="Show the demo in a browser instead.")] = False,
    host: Annotated[str, typer.Option(help="With --serve: where to listen; by default this machine alone.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="With --serve; 0 is a free one.")] = 7860,
    index: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="With --serve: holds an index of nearest neighbours.")
    ] = None,
) -> None:
    """Look at a radiograph: embedding, lungs, attention, reconstruction; or at many, in a browser."""
    if serve and image is not None:
        raise SpcxrError("--serve takes no IMAGE: drop it into the page")
    if serve:
        from spcxr_hf.app.server import serve as serve_demo

        serve_demo(checkpoints, index=index, host=host, port=port or None)
        return
    from spcxr_hf.inference.demo import run_demo
    from spcxr_hf.models.auto import register

    register()
    run_demo(image, output, checkpoints)


@app.command(short_help="Put the bundled checkpoints into the local cache.", epilog=_example("spcxr install"))
def install(
    checkpoints: CheckpointsOption = None,
    force: Annotated[
        bool, typer.Option("--force", help="Load the bundled checkpoint even where the Hub's own is in the cache.")
    ] = False,
) -> None:
    """Put the bundled checkpoints into the local Hub cache, so that their ids load offline."""
    from spcxr_hf.hub.install import install_checkpoints

    for checkpoint in install_checkpoints(checkpoints, force=force):
        state = "installed" if checkpoint.is_new else "already there"
        typer.echo(f"{checkpoint.repo_id}  revision {checkpoint.revision}  {state}")
    print("From Python: export HF_HUB_OFFLINE=1 first, or transformers asks the Hub for them.", file=sys.stderr)


@app.command(
    short_help="Look through a set: broken files, copies, leaks.", epilog=_example("spcxr audit scans/ --output audit/")
)
def audit(
    images: Annotated[list[str], typer.Argument(metavar="SET...", help="Parquet, a folder, files or quoted patterns.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where the page goes.")] = Path(
        "audit"
    ),
    split: Annotated[str | None, typer.Option(metavar="COLUMN", help="Whose values are the splits.")] = None,
    label: Annotated[list[str] | None, typer.Option(metavar="COLUMN", help="Labels to count; again for more.")] = None,
    patient: Annotated[str, typer.Option(metavar="COLUMN", help="Whose values are the patients.")] = "patient",
    flips: Annotated[bool, typer.Option("--flips", help="Look for mirrored copies, too.")] = False,
    on_error: Annotated[
        str,
        typer.Option(
            "--on-error",
            help="A broken file: skip lists it, stop ends all.",
            autocompletion=_from("skip", "stop"),
        ),
    ] = "skip",
    workers: WorkersOption = None,
) -> None:
    """Look through a set: sizes, depths, broken files, copies, leaks between splits; one page and its numbers."""
    from spcxr_hf.inference.pipeline import table_of
    from spcxr_hf.quality.audit import audit as look_through

    table = table_of(images)
    found = look_through(
        table,
        output,
        split_column=split,
        label_columns=label or (),
        patient_column=patient,
        flips=flips,
        workers=workers,
        on_error=on_error,  # type: ignore[arg-type]  # checked there
    )
    typer.echo(str(output / "audit.html"))
    _note("1 image" if len(table) == 1 else f"{len(table)} images")
    raise typer.Exit(3 if found["broken"] else 0)


@app.command(
    short_help="Write a checkpoint for ONNX Runtime, or as a ViT.",
    epilog=_example("spcxr export spcxr/base --to onnx --output spcxr-base-onnx --quantize"),
)
def export(
    model: Annotated[str, typer.Argument(metavar="ID|FOLDER", help="A Hub id or a folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="The folder to write.")],
    to: Annotated[str, typer.Option("--to", "--format", help="onnx, or vit: a plain ViT of transformers.")] = "onnx",
    quantize: Annotated[bool, typer.Option("--quantize", help="An 8-bit version beside the ONNX file, too.")] = False,
    reduce_range: Annotated[
        bool, typer.Option("--reduce-range", help="With --quantize: 7 bits, for x86 processors without VNNI.")
    ] = False,
    num_channels: Annotated[int, typer.Option("--channels", help="3 takes RGB pictures, 1 grey ones.")] = 3,
) -> None:
    """Write a checkpoint for other software: ONNX Runtime and Transformers.js, or any user of a plain ViT."""
    if to not in ("onnx", "vit") or (quantize and to == "vit"):
        raise SpcxrError(f"--to is onnx or vit, and --quantize is for onnx; got {to!r}")
    if reduce_range and not quantize:
        raise SpcxrError("--reduce-range belongs to --quantize")
    _register_quietly()
    if to == "vit":
        from spcxr_hf.hub.export_vit import export_vit

        typer.echo(str(export_vit(model, output, num_channels=num_channels)))
    else:
        from spcxr_hf.hub.export_onnx import EXACT_SUMS, export_onnx, lacks_vnni, quantize_int8

        file = export_onnx(model, output, num_channels=num_channels)
        typer.echo(str(file))
        if quantize:
            typer.echo(str(quantize_int8(file, reduce_range=reduce_range)))
            if lacks_vnni() and not reduce_range:
                option = "=".join(EXACT_SUMS)
                typer.echo("this processor has no VNNI: sums of 8 bits can overflow", err=True)
                typer.echo(f"give the session {option}, or export in 7 bits: --reduce-range", err=True)
    _note("exported")


@app.command(
    short_help="Send checkpoints to the Hub.",
    epilog=_example("spcxr publish --namespace my-lab --dry-run", "spcxr publish --namespace my-lab base"),
)
def publish(
    only: Annotated[list[str] | None, typer.Argument(metavar="[NAME...]", help="Checkpoints; all by default.")] = None,
    checkpoints: CheckpointsOption = None,
    namespace: Annotated[str, typer.Option(help="The user or organisation on the Hub.")] = "spcxr",
    private: Annotated[bool, typer.Option("--private", help="New repositories are for members only.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all and say what would change.")] = False,
    tag: Annotated[str | None, typer.Option(help="The name of this version; by default the package's.")] = None,
) -> None:
    """Send checkpoints to the Hub, a repository each. The token is that of `hf auth login` or HF_TOKEN."""
    from spcxr_hf.hub.publish import publish as send

    _register_quietly()
    for publication in send(checkpoints, namespace, private, dry_run, tag=tag, only=only or None):
        typer.echo(publication.describe())


def _register_quietly() -> None:
    """Without a bar for the weights of every checkpoint: they are there in an instant."""
    from transformers.utils import logging

    from spcxr_hf.models.auto import register

    register()
    logging.disable_progress_bar()


def _note(what: str) -> None:
    from spcxr_hf.files import RESEARCH_NOTICE

    print(f"{what}. {RESEARCH_NOTICE.capitalize()}.", file=sys.stderr)


def main() -> None:
    """Run the command line; what cannot be used is told in one line, and the exit status is 1 then."""
    try:
        app()
    except SpcxrError as error:
        told = "\n".join(map(printable, str(error).split("\n")))
        print(f"error: {told}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
