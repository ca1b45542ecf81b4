"""The command `spcxr`: options read and handed on.

predict, segment, embed, explain, reconstruct   many files through a model: `pipeline.Job` with a function of `tasks`
audit, install, publish, export, demo           one function each
pretrain, finetune, evaluate, ...               a script of `training_scripts/`, by accelerate's launcher

What a command needs is imported inside it, so that help and a mistyped option answer at once.
"""

import inspect
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from spcxr_hf.errors import SpcxrError, printable

BASE, LUNGS, PNEUMONIA = "spcxr/base", "spcxr/lung-segmentation", "spcxr/pneumonia"
IDS = (BASE, LUNGS, "spcxr/anatomy", PNEUMONIA, "spcxr/screening", "spcxr/covid")

# Command -> its script in training_scripts/, and what that does.
SCRIPTS = {
    "pretrain": ("pretrain", "Pretrain an encoder on radiographs without labels."),
    "finetune": ("finetune_classification", "Fine-tune an encoder to classify radiographs."),
    "finetune-segmentation": ("finetune_segmentation", "Fine-tune an encoder to segment the lungs."),
    "probe": ("linear_probe", "Linear probe or k-NN on frozen features."),
    "evaluate": ("evaluate", "Figures of a model with 95 % intervals."),
    "calibrate": ("calibrate", "Calibrate a classifier and set its thresholds."),
    "shortcuts": ("shortcuts", "What a classifier reads besides the lungs."),
}

HELP = """SPCXR: a chest X-ray foundation model. Research use only, not for clinical use.

\b
Images are files, folders or quoted patterns ('scans/**/*.dcm'), PNG, JPEG,
TIFF, WebP, BMP or DICOM. Records go to standard output, a table in a terminal
and JSON Lines in a pipe, or to --output. Everything else goes to standard
error. Flags may be written with underscores too."""
EXIT_CODES = """\b
Exit status:
  0    all is done
  1    nothing could be done: the message says why
  2    the command line is mistaken
  3    some files failed, or a folder holds what is not read (links, .gif);
       each is reported on standard error, and the others are done
  130  interrupted; the records written so far are complete, and --resume continues"""

# No mark-up and no framed tracebacks: the text reads the same in a terminal, a pipe and a log.
app = typer.Typer(
    help=HELP,
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"token_normalize_func": lambda word: word.replace("_", "-")},
)


def _example(*lines: str) -> str:
    """The end of a command's help."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)


def _from(*words: str) -> Any:
    """The shell's completions of an option's value."""

    def complete(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return complete


# ---- options that commands share ---------------------------------------------------------------------------------

Images = Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Files, folders or quoted patterns.")]
ModelOption = Annotated[
    str, typer.Option("--model", metavar="ID|FOLDER", help="A Hub id or a folder.", autocompletion=_from(*IDS))
]
HeadOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="ID|FOLDER",
        help="A classifier's Hub id or folder. Required; without it, they are listed.",
        autocompletion=_from(*IDS),
    ),
]
WorkersOption = Annotated[
    int | None, typer.Option("--workers", min=1, help="Threads that read; by default one per processor, at most 8.")
]
PicturesOption = Annotated[Path, typer.Option("--pictures", metavar="FOLDER", help="Where the pictures go.")]
CheckpointsOption = Annotated[
    Path | None,
    typer.Option("--checkpoints", metavar="FOLDER", help="Holds a folder per checkpoint; by default the tree's own."),
]


class JobOptions(NamedTuple):
    """Options of every command that takes many files through a model."""

    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.", autocompletion=_from("auto", "cpu", "cuda", "mps"))
    ] = "auto"
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 16
    workers: WorkersOption = None
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="The records: .jsonl, .csv, .parquet or .txt; embeddings also .safetensors.",
        ),
    ] = None
    format: Annotated[
        str | None,
        typer.Option(
            help="table, jsonl, csv, parquet or safetensors, where the suffix does not say it.",
            autocompletion=_from("table", "jsonl", "csv", "parquet", "safetensors"),
        ),
    ] = None
    json: Annotated[bool, typer.Option("--json", help="The same as --format jsonl.")] = False
    resume: Annotated[bool, typer.Option("--resume", help="Leave out files that an earlier run has finished.")] = False
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run has written.")] = False


def _job_command(short_help: str, *example: str) -> Callable[[Callable], Callable]:
    """Register a command that takes `options`; each field of `JobOptions` becomes an option."""

    def register(command: Callable) -> Callable:
        def run(**given: Any) -> None:
            command(options=JobOptions(*(given.pop(name) for name in JobOptions._fields)), **given)

        own = [one for one in inspect.signature(command).parameters.values() if one.name != "options"]
        shared = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for (name, default), annotation in zip(
                JobOptions._field_defaults.items(), JobOptions.__annotations__.values(), strict=True
            )
        ]
        run.__signature__ = inspect.Signature([*own, *shared])  # type: ignore[attr-defined]
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return app.command(short_help=short_help, epilog=_example(*example))(run)

    return register


def _run(
    options: JobOptions,
    images: list[str],
    task: str,
    model: str,
    make_answer: Callable[[Any, Any], Any],
    pictures: Path | None = None,
    suffix: str = ".png",
) -> None:
    """Run a model over every image; the command ends with the job's exit status.

    `make_answer` takes the loaded model and the place of each source's picture, and returns a function of `tasks`;
    `pictures` is the folder of the pictures, for tasks that make one of each image, and `suffix` theirs.
    """
    from spcxr_hf.inference.pipeline import Job, find_sources, load_model, picture_names

    left_out: list[Path] = []
    sources = find_sources(images, left_out)
    place = None if pictures is None else picture_names(sources, pictures, suffix)
    stated = "jsonl" if options.json else options.format
    output, resume, overwrite = options.output, options.resume, options.overwrite
    job = Job(sources, output, stated, resume, overwrite, options.batch_size, options.workers, place, left_out)
    loaded = load_model(task, model, options.device)
    raise typer.Exit(job.run(loaded, make_answer(loaded, place)).exit_code)


def _chosen_head(model: str | None) -> str:
    """The model given; without one, the classifiers are listed with their intended population, and the status is 2."""
    if model is not None:
        return model
    from spcxr_hf.inference.pipeline import list_heads

    known = "\n".join(
        f"  {head.repo_id:<20} {head.population or 'population not stated'}: {', '.join(head.labels)}"
        for head in list_heads()
    )
    known = f"They are\n{known}" if known else "`spcxr install` puts the bundled ones into the cache."
    print(f"error: say which classifier by --model. {printable_lines(known)}", file=sys.stderr)
    raise typer.Exit(2)


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        from spcxr_hf import __version__

        typer.echo(f"spcxr {__version__}")
        raise typer.Exit


# ---- many files through a model ----------------------------------------------------------------------------------


@_job_command(
    "Probabilities of each label, beside named thresholds.",
    "spcxr predict scans/ --model spcxr/pneumonia --output predictions.csv",
    "spcxr predict chest.dcm --model spcxr/screening | jq .targets",
)
def predict(
    options: JobOptions,
    images: Images,
    model: HeadOption = None,
    operating_point: Annotated[
        str | None, typer.Option(metavar="NAME", help="One of the checkpoint's, as 'youden'.")
    ] = None,
    abstain: Annotated[
        bool, typer.Option("--abstain", help="No answer for images that are unlike the training images.")
    ] = False,
) -> None:
    """Probabilities of each label, and whether they are above or below the thresholds of an operating point."""
    from spcxr_hf.inference.tasks import Predictor

    head = _chosen_head(model)
    _run(options, images, "classification", head, lambda loaded, _: Predictor(loaded, operating_point, abstain))


@_job_command("The embedding of each image.", "spcxr embed 'scans/**/*.dcm' --output embeddings.parquet")
def embed(options: JobOptions, images: Images, model: ModelOption = BASE) -> None:
    """The embedding of each image: the vector that a linear probe or a search for neighbors takes."""
    from spcxr_hf.inference import tasks

    _run(options, images, "embedding", model, lambda *_: tasks.embed)


@_job_command(
    "A lung mask of each image, and its areas.",
    "spcxr segment scans/ --masks masks/ --output areas.csv",
    "spcxr segment scans/ --model spcxr/anatomy --drawings outlines/ --output anatomy.csv",
)
def segment(
    options: JobOptions,
    images: Images,
    model: ModelOption = LUNGS,
    masks: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the masks go.")] = Path("masks"),
    mask_format: Annotated[
        str,
        typer.Option(
            help="png (white is lung; of several structures a bit each), or seg: DICOM segmentations of DICOM files.",
            autocompletion=_from("png", "seg"),
        ),
    ] = "png",
    drawings: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Draw the outlines over each radiograph into this folder.")
    ] = None,
) -> None:
    """A lung mask of each image, at the image's size, and the areas of the lungs as shares of the image.

    With --model spcxr/anatomy masks of both lungs, the heart and both clavicles, and the cardiothoracic ratio."""
    from spcxr_hf.inference import tasks

    def answer(_: Any, place: Any) -> Any:
        return lambda loaded, batch: tasks.segment(loaded, batch, place, drawings)

    _run(options, images, "segmentation", model, answer, masks, tasks.mask_suffix(mask_format))


@_job_command(
    "Draw the parts of an image that an answer rests on.",
    "spcxr explain chest.png --model spcxr/pneumonia --target 'viral pneumonia' --pictures explained/",
)
def explain(
    options: JobOptions,
    images: Images,
    model: HeadOption = None,
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
) -> None:
    """Draw a saliency map over each image. It shows what the model used, not where a disease is."""
    from spcxr_hf.inference.pipeline import load_model
    from spcxr_hf.inference.tasks import Explainer

    def answer(loaded: Any, place: Any) -> Any:
        outliner = None if lungs == "none" else load_model("segmentation", lungs, options.device)
        return Explainer(loaded, place, None if target == "embedding" else target or "probable", method, outliner)

    if target == "embedding":
        _run(options, images, "embedding", model or BASE, answer, pictures)
    _run(options, images, "classification", _chosen_head(model), answer, pictures)


@_job_command(
    "Draw images corrupted and reconstructed.", "spcxr reconstruct chest.png --fill noise --fill block --seed 1"
)
def reconstruct(
    options: JobOptions,
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
) -> None:
    """Draw each image clean, corrupted, reconstructed and the error, a row for each way to corrupt it."""
    from spcxr_hf.inference.tasks import Reconstructor, read_second

    fills = fill or ["noise", "zeros", "block", *(["replace"] if second else [])]

    def answer(loaded: Any, place: Any) -> Any:
        return Reconstructor(place, fills, seed, None if second is None else read_second(loaded, second))

    _run(options, images, "reconstruction", model, answer, pictures)


# ---- one function each -------------------------------------------------------------------------------------------


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
    images: Annotated[
        list[str], typer.Argument(metavar="SET...", help="A folder, Parquet, CSV, .tar, files, patterns.")
    ],
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
    copies_list: Annotated[
        Path | None,
        typer.Option("--copies-list", metavar="FILE", help="Ids to leave out, for no image to be on two sides."),
    ] = None,
    read_as: Annotated[
        str | None,
        typer.Option("--read-as", metavar="KIND", help="A folder is: folder, classes, pictures, or an archive's name."),
    ] = None,
    image_root: Annotated[
        Path | None, typer.Option("--image-root", metavar="FOLDER", help="Where files may lie that a table names.")
    ] = None,
    workers: WorkersOption = None,
) -> None:
    """Audit a data set: sizes, depths, broken files, copies, leaks between splits; an HTML page and JSON."""
    from spcxr_hf.inference.pipeline import table_of
    from spcxr_hf.quality.audit import audit as look_through

    left_out: list[Path] = []
    table = table_of(images, read_as, image_root, left_out)
    found = look_through(
        table,
        output,
        split_column=split,
        label_columns=label or (),
        patient_column=patient,
        flips=flips,
        workers=workers,
        on_error=on_error,  # type: ignore[arg-type]  # checked there
        copies_list=copies_list,
    )
    typer.echo(str(output / "audit.html"))
    _note("1 image" if len(table) == 1 else f"{len(table)} images")
    raise typer.Exit(3 if found["broken"] or left_out else 0)


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
        from spcxr_hf.hub.export import export_vit

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


# ---- training ------------------------------------------------------------------------------------------------------


def _script_command(name: str, script: str, what: str) -> None:
    """A command that starts a script of `training_scripts/`; it has the script's arguments and help."""

    def start(
        context: typer.Context,
        processes: Annotated[int | None, typer.Option("--processes", min=1)] = None,
        config_file: Annotated[str | None, typer.Option("--config-file")] = None,
    ) -> None:
        from spcxr_hf.training.launch import launch

        launch(script, context.args, processes, config_file)

    settings = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
    app.command(name, short_help=what, context_settings=settings)(start)


for _name, (_script, _what) in SCRIPTS.items():
    _script_command(_name, _script, _what)


@app.command(
    short_help="List the recipes, or show one.", epilog=_example("spcxr recipes", "spcxr recipes covid_cpu_112")
)
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="The recipe to show.")] = None,
) -> None:
    """List the recipes with the command that takes each, or show one."""
    from spcxr_hf.training.launch import list_recipes

    every = list_recipes()
    if name is not None:
        found = [one.path for one in every if name in (one.name, one.path.stem, one.path.name)]
        if not found:
            raise SpcxrError(f"{name}: no such recipe; `spcxr recipes` lists them")
        for path in found:
            typer.echo(path.read_text(encoding="utf-8"), nl=False)
        return
    width = max(len(f"{one.command} {one.name}") for one in every)
    for one in every:
        typer.echo(f"spcxr {one.command} {one.name}".ljust(width + 7) + f" {one.title}")


def _register_quietly() -> None:
    """Register the Auto classes without progress bars: these weights load within a second."""
    from transformers.utils import logging

    from spcxr_hf.models.auto import register

    register()
    logging.disable_progress_bar()


def _note(what: str) -> None:
    from spcxr_hf.files import RESEARCH_NOTICE

    print(f"{what}. {RESEARCH_NOTICE.capitalize()}.", file=sys.stderr)


def printable_lines(text: object) -> str:
    """Each line as of `printable`."""
    return "\n".join(map(printable, str(text).split("\n")))


def main() -> None:
    """Run the command line; what cannot be used is one line on standard error, and the exit status is 1."""
    warnings.showwarning = lambda message, *_: print(f"warning: {printable_lines(message)}", file=sys.stderr)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # as the package's import leaves it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        app()
    except SpcxrError as error:
        print(f"error: {printable_lines(error)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
