"""Tables, goals and curves of the evidence, made from its results file only.

Cells that were not run are marked as such.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

NOT_RUN = "not run"
NOTHING = "Not run."
REACHED, MISSED, OPEN = "reached", "missed", "open: cells not run"
SO_FAR = ", by the seeds that were run"
FEW = 0.1  # the largest share of the labels that counts as few
POINTS_ONCE, POINTS_ALWAYS = 0.25, 0.05  # of balanced accuracy
LABELS = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "auroc": "AUROC",
    "within_auroc": "AUROC within a source",
}

PROBE_INTERVALS = "Means over the draws of the labels; the intervals are of the patients alone."
COMPARED = ("balanced_accuracy", "accuracy", "auroc")

Results = Mapping[str, Any]


# ---- goals -------------------------------------------------------------------------------------------------------


def goals(results: Results) -> list[dict[str, str]]:
    """The goals of the comparison, each with what was found and whether it is reached.

    A goal for every setting is missed as soon as one misses it, and reached only when every one was run. The state says
    where seeds are still to be run.
    """
    few = [entry for entry in settings(results) if entry["fraction"] <= FEW]
    whole = [entry for entry in settings(results) if entry["fraction"] == 1]
    return [
        _goal("balanced accuracy at least +25 points in one setting of 10 % of the labels or less", few,
              POINTS_ONCE, any_of=True),
        _goal("balanced accuracy at least +5 points in every setting of 10 % or less", few, POINTS_ALWAYS),
        _goal("never worse at 100 %", whole, 0.0),
        *_peer_goals(results),
    ]  # fmt: skip


def settings(results: Results) -> list[dict[str, Any]]:
    """Every task and share of the labels, with the difference of balanced accuracy on the main report, or None."""
    ours, floor = results["compare"]["ours"], results["compare"]["floor"]
    found = []
    for task, entry in results["fine_tuning"].items():
        for fraction, setting in entry["fractions"].items():
            difference = _dig(setting, "differences", f"{ours} - {floor}", entry["main"], "balanced_accuracy")
            seeds_left = any(setting["inits"].get(init, {}).get("missing") for init in (ours, floor))
            found.append(
                {"task": task, "fraction": float(fraction), "difference": difference, "seeds_left": seeds_left}
            )
    return found


def _goal(what: str, entries: Sequence[Mapping[str, Any]], least: float, any_of: bool = False) -> dict[str, str]:
    """One goal over settings."""
    known = [entry for entry in entries if entry["difference"] is not None]
    passed = [entry["difference"]["mean"] >= least for entry in known]
    complete = len(known) == len(entries) > 0
    if any_of:
        state = REACHED if any(passed) else MISSED if complete else OPEN
    else:
        state = MISSED if not all(passed) else REACHED if complete else OPEN
    if state != OPEN and any(entry["seeds_left"] for entry in known):
        state += SO_FAR
    said = "; ".join(
        f"{entry['task']} {_percent(entry['fraction'])}: {_points(entry['difference'])}" for entry in known
    )
    return {"goal": what, "found": said or NOT_RUN, "state": state}


def _peer_goals(results: Results) -> Iterator[dict[str, str]]:
    """Ahead of the other pretext on at least three of four tasks, by each way of using the features.

    Of fine-tuning those shares of the labels count at which the other was run at all; where it never was, all of them.
    """
    ours, peer = results["compare"]["ours"], results["compare"]["peer"]
    for method in ("linear", "knn"):
        pairs = {
            task: [_dig(_probe(results, model, task, method, "1"), "mean") for model in (ours, peer)]
            for task in results.get("probing", {}).get("tasks", ())
        }
        yield _peer_goal(f"ahead of {peer} on at least 3 of 4 tasks ({_method_name(method)}, all labels)", pairs)
    tuned = _tuned_pairs(results, ours, peer)
    known = {share: pairs for share, pairs in tuned.items() if any(pair[1] is not None for pair in pairs.values())}
    for share, pairs in (known or tuned).items():
        yield _peer_goal(
            f"ahead of {peer} on at least 3 of 4 tasks (fine-tuning, {_percent(float(share))} of the labels)", pairs
        )


def _tuned_pairs(results: Results, ours: str, peer: str) -> dict[str, dict[str, list[float | None]]]:
    """Share of the labels -> task -> balanced accuracy of the two after fine-tuning."""
    pairs: dict[str, dict[str, list[float | None]]] = {}
    for name, entry in results["fine_tuning"].items():
        for task, report in entry.get("peer_tasks", {name: entry["main"]}).items():
            for share, setting in entry["fractions"].items():
                pairs.setdefault(share, {})[task] = [
                    _dig(setting, "inits", init, "reports", report, "balanced_accuracy", "mean")
                    for init in (ours, peer)
                ]
    return pairs


def _peer_goal(what: str, pairs: Mapping[str, Sequence[float | None]]) -> dict[str, str]:
    known = {name: pair for name, pair in pairs.items() if None not in pair}
    ahead = [name for name, (ours, peer) in known.items() if ours > peer]  # type: ignore[operator]
    lost, needed = len(known) - len(ahead), -(-3 * len(pairs) // 4)
    state = REACHED if pairs and len(ahead) >= needed else MISSED if lost > len(pairs) - needed else OPEN
    said = f"ahead on {len(ahead)} of {len(known)}" + (f" ({', '.join(ahead)})" if ahead else "")
    return {"goal": what, "found": said if known else NOT_RUN, "state": state}


# ---- tables ------------------------------------------------------------------------------------------------------


def blocks(results: Results) -> dict[str, str]:
    """Markdown by the name of the block that it goes into: `evidence`, `evidence <task>`, `evidence goals`, ..."""
    parts = {
        "evidence comparison": comparison_table(results),
        "evidence pretext": comparison_table(results, role="peer"),
        "evidence drift": other_reports_table(results),
        "evidence probes": probe_table(results),
        "evidence ablations": ablation_table(results),
        "evidence cost": cost_table(results),
        "evidence goals": goal_table(results),
    }
    for task in results["fine_tuning"]:
        parts[f"evidence {task}"] = "\n\n".join(
            [comparison_table(results, [task]), other_reports_table(results, [task]), note(results)]
        )
    titles = ("Against no pretraining", "Against another pretext", "Elsewhere", "Frozen features", "Ablations", "Cost",
              "Goals")  # fmt: skip
    named = zip(titles, list(parts.values())[: len(titles)], strict=True)
    whole = "\n\n".join(f"**{title}**\n\n{text}" for title, text in named)
    return {"evidence": f"{whole}\n\n{note(results)}", **parts}


def note(results: Results) -> str:
    """How the figures were measured, in two sentences."""
    return f"{results['setting']} {results['method']}"


def comparison_table(results: Results, tasks: Sequence[str] | None = None, role: str = "floor") -> str:
    """A row for each task, share of the labels and figure: ours, the other, and the difference.

    Where one of them was not run there is nothing to compare, and the row counts as not run.

    Args:
        results: The results file.
        tasks: Which; by default all.
        role: What ours is compared with: "floor" (no pretraining) or "peer" (another pretext).
    """
    ours, other = (results["compare"][name] for name in ("ours", role))
    head, rows = ["task", "labels", "figure", ours, other, f"{ours} - {other}"], []
    for task, entry in _chosen(results, tasks):
        for fraction, setting in entry["fractions"].items():
            labels = setting.get("labels")
            share = _percent(float(fraction)) + (f" ({labels})" if labels else "")
            for figure in COMPARED:
                difference = _dig(setting, "differences", f"{ours} - {other}", entry["main"], figure)
                cells = [NOT_RUN] * 2
                if difference is not None:
                    reports = [_dig(setting, "inits", init, "reports", entry["main"]) for init in (ours, other)]
                    both = zip(reports, (ours, other), strict=True)
                    cells = [_with_spread(_dig(report, figure), setting, init) for report, init in both]
                rows.append([task, share, _figure_name(figure), *cells, _points(difference)])
    return _table(head, rows, 3)


def other_reports_table(results: Results, tasks: Sequence[str] | None = None) -> str:
    """Every report but the main one: other hospitals, other ages; a row for each figure."""
    inits = results["inits"]
    ours, floor = (results["compare"][name] for name in ("ours", "floor"))
    head, rows = ["task", "labels", "on", "figure", *inits, f"{ours} - {floor}"], []
    for task, entry in _chosen(results, tasks):
        for fraction, setting in entry["fractions"].items():
            for report, names in entry["reports"].items():
                if report == entry["main"]:
                    continue
                for figure in names:
                    cells = [
                        _with_spread(_dig(setting, "inits", init, "reports", report, figure), setting, init)
                        for init in inits
                    ]
                    difference = _dig(setting, "differences", f"{ours} - {floor}", report, figure)
                    words = [task, _percent(float(fraction)), report, _figure_name(figure)]
                    rows.append([*words, *cells, _points(difference)])
    return _table(head, rows, 4)


def probe_table(results: Results) -> str:
    """Linear probe and k-NN on frozen features: a row for each task, method and share of the labels.

    The draws of the labels are not resampled in their intervals, which is said below the table.
    """
    probing = results.get("probing", {})
    models, tasks = probing.get("models", []), probing.get("tasks", {})
    head, rows = ["task", "method", "labels", "metric", *models], []
    for task, metric in tasks.items():
        for method in probing["methods"]:
            for fraction in probing["fractions"]:
                found = [_probe(results, model, task, method, fraction) for model in models]
                cells = [NOT_RUN if summary is None else _summary(summary) for summary in found]
                rows.append([task, _method_name(method), _percent(float(fraction)), metric, *cells])
    table = _table(head, rows, 4)
    return table if table == NOTHING else f"{table}\n\n{PROBE_INTERVALS}"


def ablation_table(results: Results) -> str:
    """Short pretrainings, each other in one thing, by a linear probe."""
    entries = results.get("ablations", {}).get("variants", {})
    tasks = results.get("ablations", {}).get("tasks", [])
    if not any(entries.values()):
        return NOTHING
    rows = [
        [name, *(NOT_RUN if found is None else f"{found[task]:.3f}" for task in tasks)]
        for name, found in entries.items()
    ]
    return "\n\n".join([_table(["variant", *tasks], rows, 1), results["ablations"]["setting"]])


def cost_table(results: Results) -> str:
    """Cost of the checkpoints' trainings, where their runs' folders are available, and of the cells."""
    tables = [_training_costs(results), _cell_costs(results)]
    return "\n\n".join(table for table in tables if table) or "Not measured."


def _training_costs(results: Results) -> str:
    """Of the checkpoints that are compared. One whose run's folder was never at hand is named below the table."""
    trainings = results["cost"]["trainings"]
    rows = []
    for name, cost in trainings.items():
        if cost is not None:
            energy = f"{cost['energy_wh']:.0f} Wh" if cost.get("energy_wh") else "not read"
            views, rate = f"{cost['images']:,}", f"{cost['images_per_second']:.1f}"
            rows.append([name, cost["device"], f"{cost['minutes']:.1f}", views, rate, energy])
    if not rows:
        return ""
    table = _table(["training", "device", "minutes", "views", "images/s", "energy"], rows, 1)
    unknown = [name for name, cost in trainings.items() if cost is None]
    return table + (f"\n\nNot kept: {'; '.join(unknown)}." if unknown else "")


def _cell_costs(results: Results) -> str:
    """Of the cells whose results are kept: their minutes, added up, as they ran beside each other."""
    rows = [
        [section.replace("_", "-"), str(taken["cells"]), f"{taken['minutes']:.0f}", f"{taken['training_minutes']:.0f}"]
        for section, taken in results["cost"].get("cells", {}).items()
        if taken["cells"]
    ]
    return _table(["cells of", "number", "minutes", "of them training"], rows, 1) if rows else ""


def goal_table(results: Results) -> str:
    """The goals and whether they are reached."""
    rows = [_row([entry["goal"], entry["found"], entry["state"]]) for entry in results["goals"]]
    return "\n".join([_row(["goal", "found", "state"]), _row(["---"] * 3), *rows])


def _chosen(results: Results, tasks: Sequence[str] | None) -> list[tuple[str, Any]]:
    return [(task, entry) for task, entry in results["fine_tuning"].items() if tasks is None or task in tasks]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], names: int) -> str:
    """A Markdown table; the first `names` cells of a row say what it is.

    Rows and columns in which nothing was run are named in a line below it, so that the table stays compact.
    """
    known = [row for row in rows if set(row[names:]) != {NOT_RUN}]
    if not known:
        return NOTHING
    columns = [at for at in range(len(head)) if at < names or any(row[at] != NOT_RUN for row in known)]
    told = {tuple(row[:2]) for row in known}
    absent = [" ".join(row[: min(names, 2)]) for row in rows if row not in known and tuple(row[:2]) not in told]
    absent += [head[at] for at in range(len(head)) if at not in columns]
    lines = [_row([row[at] for at in columns]) for row in (head, ["---"] * len(head), *known)]
    return "\n".join([*lines, *(["", f"Not run: {'; '.join(dict.fromkeys(absent))}."] if absent else [])])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:g} %"


def _points(difference: Mapping[str, Any] | None) -> str:
    """A difference in points of a hundred, with its interval."""
    if difference is None:
        return NOT_RUN
    ends = difference["ci95"]
    interval = f" [{100 * ends[0]:+.1f}, {100 * ends[1]:+.1f}]" if ends else ""
    return f"{100 * difference['mean']:+.1f}{interval}"


def _with_spread(summary: Mapping[str, Any] | None, setting: Mapping[str, Any], init: str) -> str:
    """A mean with its interval, the deviation over the seeds, and how many seeds are still to come."""
    if summary is None:
        return NOT_RUN
    missing = setting["inits"][init]["missing"]
    gaps = f", {len(missing)} of {len(missing) + len(summary['seeds'])} seeds {NOT_RUN}" if missing else ""
    return _summary(summary) + gaps


def _summary(summary: Mapping[str, Any]) -> str:
    """A mean with its interval and the deviation over the seeds, each where there is one."""
    ends, deviation = summary.get("ci95"), summary.get("sd")
    interval = f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else ""
    spread = f", sd {deviation:.3f}" if deviation is not None else ""
    return f"{summary['mean']:.3f}{interval}{spread}"


def _figure_name(figure: str) -> str:
    if figure.startswith("recall_"):
        return f"recall of {figure.removeprefix('recall_')}"
    return LABELS[figure]


def _method_name(method: str) -> str:
    return {"linear": "linear probe", "knn": "k-NN"}[method]


def _probe(results: Results, model: str, task: str, method: str, fraction: str) -> Mapping[str, Any] | None:
    """What was found on the test images: mean over the draws of the labels, deviation and interval."""
    return _dig(results, "probing", "results", model, method, task, fraction, "test")


def _dig(entry: Any, *keys: str) -> Any:
    """The value at these keys, None where one is missing."""
    for key in keys:
        entry = entry.get(key) if isinstance(entry, Mapping) else None
    return entry


# ---- curves ------------------------------------------------------------------------------------------------------


def draw_curves(results: Results, folder: Path) -> list[Path]:
    """Label-efficiency curves: balanced accuracy over the share of the labels, a PNG for each task that was run.

    Without matplotlib (the extra `demo`) it says so and draws none.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot, which keeps global state
    except ImportError:
        print(f'{folder}: no curves without matplotlib; `pip install "spcxr-hf[demo]"`', flush=True)
        return []
    drawn = []
    for task, entry in results["fine_tuning"].items():
        curves = {init: _points_of_curve(entry, init) for init in results["inits"]}
        if not any(curves.values()):
            continue
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for init, points in curves.items():
            if points:
                shares, means, lows, highs = zip(*points, strict=True)
                axes.plot(shares, means, marker="o", label=init)
                axes.fill_between(shares, lows, highs, alpha=0.15)
        axes.set(xscale="log", xlabel="labels used, %", ylabel=f"balanced accuracy, {entry['main']}", title=task)
        axes.grid(alpha=0.3)
        axes.legend()
        drawn.append(folder / f"evidence_{task}.png")
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(drawn[-1], dpi=120)
    return drawn


def _points_of_curve(entry: Mapping[str, Any], init: str) -> list[tuple[float, float, float, float]]:
    points = []
    for fraction, setting in entry["fractions"].items():
        summary = _dig(setting, "inits", init, "reports", entry["main"], "balanced_accuracy")
        if summary is not None:
            low, high = summary["ci95"] or (summary["mean"], summary["mean"])
            points.append((100 * float(fraction), summary["mean"], low, high))
    return points
