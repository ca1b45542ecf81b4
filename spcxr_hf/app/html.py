"""Answers as HTML: tables, pictures with a text in their place, and all that files and checkpoints name escaped.

Pictures are part of the page (`data:` addresses), so that nothing of a radiograph is written to the disk.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Sequence
from html import escape
from io import BytesIO

from PIL import Image

from spcxr_hf.app.session import MOST_BYTES, MOST_FILES, Answer, Map, Page
from spcxr_hf.files import RESEARCH_NOTICE
from spcxr_hf.models.lungs import LungAreas

EMBEDDING_SHOWN = 8  # numbers of an embedding that are printed; all are in the file
QUALITY = 88  # of the JPEG pictures

STYLE = """
.spcxr-note { margin: 0; padding: .6rem 1rem; background: #5c3b00; color: #fff; font-weight: 600; text-align: center; }
.spcxr h1 { font-size: 1.5rem; margin: .75rem 0 .25rem; }
.spcxr section { border-top: 1px solid #8884; padding: .5rem 0 1.25rem; }
.spcxr h2 { font-size: 1.2rem; margin: .75rem 0 .25rem; overflow-wrap: anywhere; }
.spcxr h3 { font-size: 1rem; margin: 1rem 0 .35rem; }
.spcxr p { margin: .25rem 0; }
.spcxr .small { font-size: .875rem; }
.spcxr .alert { border-left: 5px solid #b35900; background: #fff3e0; color: #3d2200; padding: .6rem .9rem;
  margin: .5rem 0; border-radius: 4px; overflow-wrap: anywhere; }
.spcxr .pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 1rem; }
.spcxr figure { margin: 0; max-width: 420px; }
.spcxr figure img { width: 100%; max-height: 480px; object-fit: contain; background: #000; border-radius: 4px; }
.spcxr figcaption { font-size: .875rem; padding-top: .25rem; overflow-wrap: anywhere; }
.spcxr .path { overflow-wrap: anywhere; }
.spcxr .pages { display: flex; flex-wrap: wrap; gap: .5rem; list-style: none; padding: 0; margin: .5rem 0; }
.spcxr .pages img { height: 90px; width: auto; max-width: 120px; display: block; border-radius: 4px; background: #000; }
.spcxr .pages li { font-size: .8rem; max-width: 120px; overflow-wrap: anywhere; }
.spcxr .spcxr-table { border: 0 !important; border-collapse: collapse; width: 100%; max-width: 46rem;
  font-size: .95rem; }
.spcxr .spcxr-table :is(thead, tbody, tr) { border: 0 !important; }
.spcxr caption { text-align: left; font-size: .875rem; padding-bottom: .25rem; }
.spcxr .spcxr-table th, .spcxr .spcxr-table td { text-align: left; padding: .3rem .75rem .3rem 0; border: 0;
  border-bottom: 1px solid #8886; font-variant-numeric: tabular-nums; }
.spcxr .bar { background: #8883; height: .7rem; border-radius: 3px; min-width: 6rem; }
.spcxr .bar span { display: block; height: 100%; border-radius: 3px; background: #0072b2; }
.spcxr a { text-decoration: underline; }
.spcxr pre { overflow-x: auto; padding: .6rem; border: 1px solid #8886; border-radius: 4px; font-size: .85rem; }
"""

MAKE_AN_INDEX = """mkdir index
spcxr embed radiographs/ --output index/radiographs.safetensors
spcxr demo --serve --index index/"""


def heading() -> str:
    """The top of the page: the note that stays in view, and the title."""
    return (
        f'<p class="spcxr-note" role="note">{escape(RESEARCH_NOTICE.capitalize())}. '
        "A probability above a threshold is no diagnosis.</p>"
    )


def title() -> str:
    """What this page is, and what happens to files."""
    return (
        '<div class="spcxr"><h1>SPCXR: a chest X-ray foundation model</h1>'
        "<p>Drop radiographs, choose a task, ask. Files are read into memory and removed; nothing is kept on the disk. "
        f"At most {MOST_FILES} files of {MOST_BYTES // 2**20} MB. Upright frontal chest radiographs with dark lungs "
        "are what the checkpoints know.</p></div>"
    )


# ---- files -------------------------------------------------------------------------------------------------------


def list_pages(pages: Sequence[Page], left_out: int = 0) -> str:
    """What has been read, a small picture each, and what could not be, with its cause."""
    if not pages:
        return '<div class="spcxr" role="status"><p>No radiograph yet.</p></div>'
    good = [page for page in pages if page.image is not None]
    parts = [f"<p>{_count(len(good), 'radiograph')} read.</p>"] if good else []
    if good:
        items = "".join(f"<li>{_picture(page.shown, '')}{escape(_describe(page))}</li>" for page in good)
        parts.append(f'<ul class="pages">{items}</ul>')
    parts += [_alert(f"{page.name}: {page.cause}") for page in pages if page.image is None]
    if left_out:
        parts.append(_alert(f"{_count(left_out, 'file')} left out: {len(pages)} in one go are the most"))
    return f'<div class="spcxr" role="status">{"".join(parts)}</div>'


def _describe(page: Page) -> str:
    image = page.image
    assert image is not None
    bits = 8 if image.mode == "L" else 16
    return f"{page.name}, {image.width} × {image.height}, {bits} bits"


# ---- answers -----------------------------------------------------------------------------------------------------


def answers(sections: Iterable[str]) -> str:
    """All sections, with the note that goes wherever the page is printed or copied."""
    return f'<div class="spcxr" role="region" aria-label="Answers">{"".join(sections)}</div>'


def message(text: str) -> str:
    """One line in the place of answers."""
    return answers([_alert(text)])


def broken(page: Page) -> str:
    """A section for a file that cannot be used."""
    return _section(page, [_alert(f"This file cannot be used: {page.cause}.")])


def withheld(page: Page) -> str:
    """A section for what does not look like a chest radiograph."""
    text = f"No answer is given. This image: {'; '.join(page.quality_warnings)}."
    hint = '<p>That test is a rough one. "Answer all the same" shows what the checkpoint says.</p>'
    return _section(page, [_alert(text), hint, _figure(page.shown, f"{page.name}, as read", page.name)])


def section(answer: Answer) -> str:
    """A page's answer."""
    page = answer.page
    parts = [f'<p class="small">Task {escape(answer.choice.title)}, checkpoint {escape(answer.model)}</p>']
    if page.quality_warnings:
        parts.append(_alert(f"Not to be relied on. This image: {'; '.join(page.quality_warnings)}."))
    if answer.prediction is not None:
        parts.append(_prediction(answer))
    parts.append(_pictures(answer))
    if answer.embedding is not None:
        parts.append(_embedding(answer))
    if answer.choice.task != "segmentation":
        parts.append(_neighbours(answer))
    return _section(page, parts)


def _section(page: Page, parts: Sequence[str]) -> str:
    name = escape(page.name)
    return f'<section aria-label="{name}"><h2>{name}</h2>{"".join(parts)}</section>'


def _prediction(answer: Answer) -> str:
    assert answer.prediction is not None
    rows = [
        [escape(label), f'{value:.3f}', _bar(value)]
        for label, value in sorted(answer.prediction["probabilities"].items(), key=lambda item: -item[1])
    ]  # fmt: skip
    tables = _table("Calibrated where the checkpoint's card says so.", ["Label", "Probability", ""], rows)
    return f"<h3>Probabilities</h3>{tables}<h3>Operating points</h3>{_operating_points(answer.prediction)}"


def _operating_points(prediction: dict) -> str:
    if not prediction["targets"]:
        return "<p>This checkpoint names none.</p>"
    rows = [
        [escape(target), f"{found['probability']:.3f}", f"{found['threshold']:.3f}", escape(found["decision"])]
        for target, found in prediction["targets"].items()
    ]
    caption = f"Operating point: {prediction['operating_point']}. Above a threshold is no diagnosis."
    return _table(caption, ["Target", "Probability", "Threshold", "The probability lies"], rows)


def _pictures(answer: Answer) -> str:
    page = answer.page
    figures = [_figure(page.shown, "As read", f"{page.name}: the radiograph as it was read")]
    if answer.lungs is not None:
        picture, areas = answer.lungs
        figures.append(_figure(picture, _areas(areas), f"{page.name}: the lung mask, tinted blue over the radiograph"))
    figures += [_map(page, one) for one in answer.maps]
    return f'<h3>Pictures</h3><div class="pictures">{"".join(figures)}</div>'


def _areas(areas: LungAreas) -> str:
    if not areas.total:
        return "Lung mask: no lung found"
    return (
        f"Lung mask: {areas.total:.1%} of the image; image left {areas.image_left:.1%}, image right "
        f"{areas.image_right:.1%} (in a frontal view the image's left is the patient's right)"
    )


def _map(page: Page, one: Map) -> str:
    target = "the embedding" if one.target is None else one.target
    share = "" if one.share is None else f"; {one.share:.0%} of it inside the lungs"
    text = f"Relevance for {target}{share}. What the model used, not where a disease is"
    return _figure(one.picture, text, f"{page.name}: the relevance for {target}, coloured over the radiograph")


def _embedding(answer: Answer) -> str:
    vector = answer.embedding
    assert vector is not None
    first = ", ".join(f"{value:.3f}" for value in vector[:EMBEDDING_SHOWN].tolist())
    lines = "\n".join(repr(value) for value in vector.tolist())
    address = f"data:text/csv;base64,{b64encode(lines.encode()).decode()}"
    return (
        f"<h3>Embedding</h3><p>{len(vector)} numbers, L2 norm {vector.norm():.3f}: {first}, ... "
        f'<a href="{address}" download="embedding.csv">All of them as CSV</a></p>'
    )


def _neighbours(answer: Answer) -> str:
    if answer.neighbours is None:
        return (
            "<h3>Nearest neighbours</h3><p>No index is loaded, and no radiographs come with the demo. Make one of your "
            "own and start with it:</p>"
            f'<pre tabindex="0" aria-label="Commands"><code>{escape(MAKE_AN_INDEX)}</code></pre>'
        )
    ranked = list(enumerate(answer.neighbours, start=1))
    rows = [
        [str(rank), f'<span class="path">{escape(one.id)}</span>', f"{one.similarity:.3f}"] for rank, (one, _) in ranked
    ]
    table = _table("Cosine similarity of the embeddings, at most 1.", ["Rank", "Image", "Similarity"], rows)
    figures = [
        _figure(picture, f"{rank}: {one.id}, similarity {one.similarity:.3f}", f"Neighbour {rank}: {one.id}")
        for rank, (one, picture) in ranked
        if picture is not None
    ]
    pictures = f'<div class="pictures">{"".join(figures)}</div>' if figures else ""
    return f"<h3>Nearest neighbours</h3>{table}{pictures}"


# ---- pieces ------------------------------------------------------------------------------------------------------


def _table(caption: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already; the first of each row is its heading."""
    head = "".join(f'<th scope="col">{name}</th>' if name else "<td></td>" for name in names)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    parts = f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<table class="spcxr-table">{parts}</table>'


def _bar(value: float) -> str:
    return f'<div class="bar" aria-hidden="true"><span style="width: {100 * value:.1f}%"></span></div>'


def _figure(image: Image.Image | None, caption: str, text: str) -> str:
    return f"<figure>{_picture(image, text)}<figcaption>{escape(caption)}</figcaption></figure>"


def _picture(image: Image.Image | None, text: str) -> str:
    if image is None:
        return ""
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    address = f"data:image/jpeg;base64,{b64encode(buffer.getvalue()).decode()}"
    return f'<img alt="{escape(text)}" src="{address}">'


def _alert(text: str) -> str:
    return f'<p class="alert" role="alert">{escape(text)}</p>'


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
