"""SPCXR: a chest X-ray foundation model in the Hugging Face ecosystem. Importing it registers the Auto classes.

The command `spcxr` is the exception: there torch and transformers, which take seconds to import, wait for a command
that needs them, so that help, completion and a mistyped option answer at once.
"""

import signal
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import SpcxrError

# The installed command has no suffix; `spcxr.py` is a user's script.
_IS_COMMAND = bool(sys.argv) and Path(sys.argv[0]).name in ("spcxr", "spcxr.exe")
# `python -m spcxr_hf....`; the package is imported before the module's name is in `sys.argv`.
_IS_MODULE = sys.argv[:1] == ["-m"] and any(word.startswith(f"{__name__}.") for word in sys.orig_argv)
if (_IS_COMMAND or _IS_MODULE) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until their `main` runs, Ctrl-C leaves no traceback

if TYPE_CHECKING or not _IS_COMMAND:
    from .images.reader import read_radiograph
    from .modeling.configuration_spcxr import SpcxrConfig
    from .modeling.image_processing_spcxr import SpcxrImageProcessor, SpcxrImageProcessorPil
    from .modeling.modeling_spcxr import (
        SpcxrBackbone,
        SpcxrForImageClassification,
        SpcxrForPreTraining,
        SpcxrForSemanticSegmentation,
        SpcxrModel,
        SpcxrPreTrainedModel,
    )
    from .models.auto import register

    register()

try:
    __version__ = version("spcxr-hf")
except PackageNotFoundError:  # a bare checkout on the path, not installed
    __version__ = "0+unknown"

__all__ = [
    "SpcxrBackbone",
    "SpcxrConfig",
    "SpcxrError",
    "SpcxrForImageClassification",
    "SpcxrForPreTraining",
    "SpcxrForSemanticSegmentation",
    "SpcxrImageProcessor",
    "SpcxrImageProcessorPil",
    "SpcxrModel",
    "SpcxrPreTrainedModel",
    "__version__",
    "read_radiograph",
]


def __getattr__(name: str) -> Any:
    """A public name that the command has not imported yet; with it comes the registration."""
    if name in __all__ and _IS_COMMAND:
        import_module(".models.auto", __name__).register()
        for home in (
            "images.reader",
            *(f"modeling.{file}_spcxr" for file in ("configuration", "image_processing", "modeling")),
        ):
            module = import_module(f".{home}", __name__)
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
