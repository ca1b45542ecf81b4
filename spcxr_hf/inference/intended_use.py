"""Compares `config.intended_use` of a model with age and view in a DICOM header."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from spcxr_hf.images.dicom import quiet
from spcxr_hf.images.plausibility import VIEWS as OTHER_VIEWS
from spcxr_hf.images.reader import file_kind

DAYS_IN = {"D": 1, "W": 7, "M": 30.44, "Y": 365.25}  # units of the value representation AS, PS3.5 section 6.2


class AgeAndView(NamedTuple):
    """Age in years and ViewPosition by a DICOM header; None and "" where it does not say."""

    age: float | None = None
    view: str = ""


UNSTATED = AgeAndView()


def read_age_and_view(path: str | os.PathLike) -> AgeAndView:
    """What a file's header says; nothing for other files than DICOM, and where it cannot be read.

    The age is PatientAge, or the years from PatientBirthDate to StudyDate.
    """
    try:
        with Path(path).open("rb") as file:
            if file_kind(file.read(132), Path(path).name) != "DICOM":
                return UNSTATED
        import pydicom

        tags: list[Any] = ["PatientAge", "PatientBirthDate", "StudyDate", "ViewPosition"]
        with quiet():  # pydicom's warnings quote the header
            header = pydicom.dcmread(path, force=True, stop_before_pixels=True, specific_tags=tags)
            age, born, taken, view = (str(header.get(tag) or "").strip() for tag in tags)
    except Exception:  # whatever is wrong with the file, its reader reports it
        return UNSTATED
    if found := re.fullmatch(r"(\d{1,3})([DWMY])", age.upper()):
        return AgeAndView(int(found[1]) * DAYS_IN[found[2]] / DAYS_IN["Y"], view)
    try:
        days = (datetime.strptime(taken, "%Y%m%d") - datetime.strptime(born, "%Y%m%d")).days
    except ValueError:
        return AgeAndView(None, view)
    return AgeAndView(days / DAYS_IN["Y"] if days >= 0 else None, view)


def use_warnings(intended_use: Mapping[str, Any] | None, header: AgeAndView) -> list[str]:
    """How the header differs from a model's intended use; the header's own values are not repeated.

    A lateral view is left to `quality_warnings`.
    """
    use = intended_use or {}
    made_for = f"this model was made for {use['population']}" if use.get("population") else "outside the model's use"
    youngest, oldest = use.get("ages") or (None, None)
    found = []
    if header.age is not None and (
        (youngest is not None and header.age < youngest)
        or (oldest is not None and header.age >= oldest + 1)  # 5.9 years count as 5
    ):
        found.append(f"{made_for}, and the header gives another age")
    view, views = header.view.upper(), [str(view).upper() for view in use.get("views") or ()]
    if view and views and view not in views and view not in OTHER_VIEWS:
        found.append(f"{made_for}, {' or '.join(views)} views, and the header gives another view")
    return found
