"""Masks as a DICOM segmentation object (PS3.3 A.51) that refers to the radiograph it was made of.

By `highdicom` (the extra `seg`). Of the patient and the study the object takes over only what the standard
requires there (PS3.3 C.7.1.1, C.7.2.1: types 1 and 2), so that an archive files it beside its source; physicians' names
are left empty. A viewer lays it over its source by the geometry.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from spcxr_hf.errors import SpcxrError
from spcxr_hf.files import RESEARCH_NOTICE, atomic_file
from spcxr_hf.images.dicom import quiet

INSTALL = 'pip install "spcxr-hf[seg]"'
SERIES_NUMBER = 9000  # far from what a modality numbers its own series
IDENTIFIERS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
# Type 2 attributes of the patient and study modules, which may be empty. The others of type 2 name physicians.
TAKEN_OVER = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate", "StudyTime",
              "AccessionNumber")  # fmt: skip
EMPTY = ("ReferringPhysicianName",)
GEOMETRY = ("SpecificCharacterSet", "SOPClassUID", "Modality", "Rows", "Columns", "NumberOfFrames",
            "FrameOfReferenceUID", "PositionReferenceIndicator", "PixelSpacing", "ImagerPixelSpacing",
            "NominalScannedPixelSpacing", "PixelAspectRatio", "PatientOrientation", "ImageType")  # fmt: skip
# label -> SNOMED CT code and meaning, and of one of a pair its side
STRUCTURES = {
    "lung": ("39607008", "Lung", None),
    "left lung": ("39607008", "Lung", ("7771000", "Left")),
    "right lung": ("39607008", "Lung", ("24028007", "Right")),
    "heart": ("80891009", "Heart", None),
    "left clavicle": ("51299004", "Clavicle", ("7771000", "Left")),
    "right clavicle": ("51299004", "Clavicle", ("24028007", "Right")),
}


class SourceError(SpcxrError):
    """No segmentation can refer to this radiograph; others may still be written."""


def check_highdicom() -> None:
    """Refuse early where the packages are missing."""
    try:
        import highdicom  # noqa: F401
    except ImportError as error:
        raise SpcxrError(f"DICOM segmentation objects need highdicom: {INSTALL}") from error


def write_segmentation(masks: Mapping[str, np.ndarray], source: Path, output: Path, model: str) -> None:
    """Write masks as a binary DICOM segmentation with a segment for each, atomically.

    Args:
        masks: Name, one of `STRUCTURES`, -> (rows, columns) booleans of the source's size; they may overlap.
        source: The DICOM radiograph.
        output: The file to write.
        model: What made the mask: an id with its revision, or a folder.

    Raises:
        SourceError: the source is no DICOM file with the identifiers that an object must refer to. The text holds
            nothing of the source's header.
        SpcxrError: the output cannot be written, or `highdicom` is not installed.
    """
    check_highdicom()
    if unknown := [name for name in masks if name not in STRUCTURES]:
        raise SpcxrError(f"no SNOMED code is known for {unknown[0]!r}; there are {', '.join(STRUCTURES)}")
    dataset = _read_source(source)
    try:
        with quiet():
            segmentation = _segmentation(masks, dataset, model)
    except Exception as error:  # its text can quote the header
        raise SourceError(f"{source}: no segmentation can refer to this DICOM file ({type(error).__name__})") from None
    with atomic_file(output) as partial:
        segmentation.save_as(partial)


def _read_source(source: Path) -> Any:
    import pydicom
    from pydicom.errors import InvalidDicomError

    try:
        with quiet():
            dataset = pydicom.dcmread(
                source, stop_before_pixels=True, specific_tags=[*IDENTIFIERS, *TAKEN_OVER, *GEOMETRY]
            )
    except (InvalidDicomError, OSError):
        raise SourceError(
            f"{source}: not a DICOM file, and a DICOM segmentation must refer to one; use PNG masks"
        ) from None
    missing = [name for name in IDENTIFIERS if name not in dataset]
    if missing:
        raise SourceError(f"{source}: a segmentation must refer to {', '.join(missing)}, which this DICOM file lacks")
    for name in (*TAKEN_OVER, *EMPTY):
        if name not in dataset:
            setattr(dataset, name, "")
    return dataset


def _segmentation(masks: Mapping[str, np.ndarray], source: Any, model: str) -> Any:
    import highdicom
    from highdicom.sr.coding import CodedConcept
    from pydicom.sr.codedict import codes

    try:
        software = version("spcxr-hf")
    except PackageNotFoundError:  # a bare checkout
        software = "0"
    algorithm = highdicom.AlgorithmIdentificationSequence(
        name="SPCXR lung segmentation" if len(masks) == 1 else "SPCXR anatomy segmentation",
        version=software,
        family=codes.DCM.ArtificialIntelligence,
        parameters={"model": model},
    )
    descriptions = []
    for number, name in enumerate(masks, 1):
        code, meaning, side = STRUCTURES[name]
        kind = CodedConcept(code, "SCT", meaning)
        if side is not None:
            kind.SegmentedPropertyTypeModifierCodeSequence = [CodedConcept(side[0], "SCT", side[1])]
        descriptions.append(
            highdicom.seg.SegmentDescription(
                segment_number=number,
                segment_label=name.capitalize(),
                segmented_property_category=CodedConcept("123037004", "SCT", "Anatomical Structure"),
                segmented_property_type=kind,
                algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
                algorithm_identification=algorithm,
            )
        )
    return highdicom.seg.Segmentation(
        source_images=[source],
        pixel_array=np.stack([*masks.values()], axis=-1)[None].astype(np.uint8),  # (frames, rows, columns, segments)
        segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=descriptions,
        series_instance_uid=highdicom.UID(),
        series_number=SERIES_NUMBER,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="SPCXR",
        manufacturer_model_name="spcxr-hf",
        software_versions=software,
        device_serial_number="0",
        content_label="RESEARCH_USE",
        content_description=RESEARCH_NOTICE,
        series_description=f"{'Lungs' if len(masks) == 1 else 'Anatomy'}, {RESEARCH_NOTICE}",
        omit_empty_frames=False,
    )
