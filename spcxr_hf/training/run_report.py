"""The page that a training run leaves behind: what was run, how it went, and its pictures, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spcxr_hf.errors import SpcxrError
from spcxr_hf.files import software_versions


def write_report(
    folder: Path,
    title: str,
    figures: Mapping[str, Any],
    recipe: Mapping[str, Any],
    pictures: Sequence[str] = (),
) -> Path:
    """Write `folder/report.md`, which any viewer of Markdown shows with its pictures.

    Args:
        figures: What was measured, by name, in the order to show it in.
        recipe: The resolved command line; paths are left out, since they say who and where.
        pictures: Names of PNG files in the folder; those that are not there are left out.

    Raises:
        SpcxrError: the folder cannot be written to.
    """
    lines = [f"# {title}", "", *_table(("figure", "value"), figures), ""]
    lines += [f"![{Path(name).stem}]({name})\n" for name in pictures if (folder / name).is_file()]
    told = {name: value for name, value in recipe.items() if not _is_place(name) and value not in (None, [])}
    lines += ["## Recipe", "", *_table(("setting", "value"), told), "", f"Software: {software_versions()}.", ""]
    path = folder / "report.md"
    try:
        path.write_text("\n".join(lines), encoding="utf-8")
    except OSError as error:
        raise SpcxrError(f"{path}: cannot be written ({error})") from error
    return path


def _is_place(name: str) -> bool:
    return name in ("data", "output", "cache_folder", "init_from", "model")


def _table(header: tuple[str, str], rows: Mapping[str, Any]) -> list[str]:
    return [
        f"| {header[0]} | {header[1]} |",
        "|---|---|",
        *(f"| {name} | {_cell(value)} |" for name, value in rows.items()),
    ]


def _cell(value: Any) -> str:
    text = f"{value:.5g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
