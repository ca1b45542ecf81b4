"""The one public error type of the package."""


class SpcxrError(ValueError):
    """Input that cannot be used. The message names the file or the value, and the cause.

    Everything that `spcxr_hf` refuses (a file that is not a radiograph, a recipe with an unknown key, a checkpoint that
    is damaged) is raised as this type or a subclass of it. It derives from `ValueError`, which is what `modeling/`
    raises: those files travel to the Hub alone and cannot import this one.
    """
