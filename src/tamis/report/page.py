"""`tamis report`: one page on a run, in one file that needs nothing else.

The rows are in the page as packed JSON, which the browser unpacks; texts are cut as far as the page would be too large
without. Nothing in a row is ever read as HTML or as a script.
"""

import base64
import gzip
import json
import math
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tamis.curation.refined import last_refinements
from tamis.files import write_atomically
from tamis.refinements import REFINEMENTS
from tamis.report import charts
from tamis.report.rows import RowTexts, grouped, hashes_of, read_texts, shown_rows, validation_texts
from tamis.report.run_folder import RunFolder, Values, read_run
from tamis.report.similar import nearest
from tamis.report.words import findings
from tamis.settings import given_fields, warn_without_effect

PAGE = "report.html"
_TITLE = b"tamis report</title>"
_TEXT_LIMITS = (2_000, 600, 300, 150, 80)  # characters of a prompt or a response
_MAX_DATA = 3_500_000  # bytes of the packed rows; with libraries and pictures the page stays below 5 MB
_NUM_COMPARED = 100  # of the best, the worst and the border rows, which get their nearest trusted rows
_NUM_REFINED = 200


@dataclass
class ReportArguments:
    """Settings of `tamis report`.

    Attributes:
        run: a run directory.
        output: the file to write; by default `report.html` in the run directory.
        label_column: a column of the training rows that sorts them into kinds, shown beside the weights.
        serve: show the page of a run that is going on at an address of this machine, instead of writing a file.
        port: of that address.
    """

    run: str = field(metadata={"help": "Run directory."})
    output: str | None = field(default=None, metadata={"help": "File to write; by default report.html in the run."})
    label_column: str | None = field(default=None, metadata={"help": "Column that sorts the training rows into kinds."})
    serve: bool = field(default=False, metadata={"help": "Show a run that is going on, on this machine only."})
    port: int = field(default=8765, metadata={"help": "Port of --serve."})


def report(arguments: ReportArguments) -> Path:
    """Write the page of a run; returns its file.

    Raises:
        ValueError: there is no run, the label column is missing, or the file is not one of ours.
    """
    inactive = {"serve is not set": ["port"]}
    warn_without_effect(given_fields(arguments), inactive)
    target = Path(arguments.output or Path(arguments.run) / PAGE).expanduser()
    if target.is_dir():
        raise ValueError(f"{target} is a folder: give a file to `output`")
    if target.exists() and _TITLE not in target.read_bytes()[:2_000]:
        raise ValueError(f"{target} is no page of tamis: give another file to `output`")
    page = render(read_run(arguments.run), arguments.label_column)
    write_atomically(target, lambda path: path.write_text(page, encoding="utf-8"))
    return target


def render(run: RunFolder, label_column: str | None = None, version_url: str = "") -> str:
    """The page of a run as HTML.

    Args:
        label_column: see `ReportArguments`.
        version_url: where a served page asks whether it is out of date.
    """
    environment = Environment(loader=PackageLoader("tamis.report"), autoescape=True, undefined=StrictUndefined)
    environment.policies["json.dumps_kwargs"] = {"sort_keys": True, "ensure_ascii": True}
    shown, texts, data = np.empty(0, dtype=int), RowTexts(), ""
    if run.weights is not None:
        shown = shown_rows(run)
        texts = read_texts(run, shown, label_column)
        data = packed_rows(run, shown, texts)
    library = files("tamis.report") / "vendor"
    own = files("tamis.report") / "templates"
    return environment.get_template("page.html.jinja").render(
        name=run.path.resolve().name,
        version=version("tamis"),
        findings=findings(run),
        pictures=_pictures(run, texts),
        num_rows=0 if run.weights is None else len(run.weights),
        num_shown=len(shown),
        problem=texts.problem,
        refined=_refined(run, texts),
        data=Markup(data),
        # Ours and the library's, not the user's.
        styles=[
            Markup(folder.joinpath(name).read_text("utf-8"))
            for folder, name in ((library, "tabulator.min.css"), (own, "page.css"))
        ],
        scripts=[
            Markup(folder.joinpath(name).read_text("utf-8"))
            for folder, name in ((library, "tabulator.min.js"), (own, "page.js"))
        ],
        page={"is_believed": run.is_believed, "version_url": version_url},
    )


def packed_rows(run: RunFolder, shown: Values, texts: RowTexts, max_bytes: int = _MAX_DATA) -> str:
    """The rows of the page: JSON, packed by gzip, as base64; texts are cut until it has at most ``max_bytes``."""
    assert run.weights is not None
    sources = run.weights["source"].unique().to_pylist()
    columns: dict[str, list[Any]] = {
        "place": shown.tolist(),
        "source": [sources.index(name) for name in run.weights["source"].take(shown).to_pylist()],
        "row": run.column("row")[shown].tolist(),
        "weight": _numbers(run.column("weight")[shown]),
        "p_right": _numbers(run.column("p_right")[shown]),
        "kept": run.column("kept")[shown].astype(int).tolist(),
        "hash": hashes_of(run, shown),
        "length": _numbers(texts.length_N[shown]) if len(texts.length_N) else [None] * len(shown),
    }
    score_N = run.training_scores()
    columns["score"] = _numbers((run.column("score") if score_N is None else score_N)[shown])
    if texts.label_N is not None:
        columns["label"] = [texts.label_N[i] for i in shown.tolist()]
    found = {"sources": sources, "columns": columns} | _neighbours(run, texts)
    for limit in _TEXT_LIMITS:
        content = [texts.content.get(i) for i in shown.tolist()]
        columns["prompt"] = [None if both is None else both[0][:limit] for both in content]
        columns["response"] = [None if both is None else both[1][:limit] for both in content]
        found["limit"] = limit
        data = gzip.compress(json.dumps(found, ensure_ascii=False, allow_nan=False).encode(), 6, mtime=0)
        text = base64.b64encode(data).decode()
        if len(text) <= max_bytes:
            break
    return text


def _numbers(values: Values) -> list[float | None]:
    """To four digits; None where a value is not known."""
    return [None if math.isnan(value) else float(f"{value:.4g}") for value in values.astype(float).tolist()]


def _neighbours(run: RunFolder, texts: RowTexts) -> dict[str, Any]:
    """The nearest trusted rows of those that a reader looks at first, and what these say."""
    trusted = validation_texts(run) if texts.content else []
    if not trusted or not run.is_believed:
        return {"trusted": [], "neighbours": {}}
    places = np.array(sorted(texts.content))
    score = run.column("score")[places].astype(float)
    places, score = places[~np.isnan(score)], score[~np.isnan(score)]
    by_score, by_distance = places[np.argsort(score)], places[np.argsort(np.abs(score))]
    compared = np.unique(
        np.concatenate([by_score[:_NUM_COMPARED], by_score[-_NUM_COMPARED:], by_distance[:_NUM_COMPARED]])
    )
    found = nearest([" ".join(texts.content[i]) for i in compared.tolist()], [" ".join(both) for both in trusted])
    used = sorted({v for row in found for v in row})
    renumbered = {v: k for k, v in enumerate(used)}
    return {
        "trusted": [[text[: _TEXT_LIMITS[1]] for text in trusted[v]] for v in used],
        "neighbours": {i: [renumbered[v] for v in row] for i, row in zip(compared.tolist(), found, strict=True) if row},
    }


def _pictures(run: RunFolder, texts: RowTexts) -> list[tuple[str, str, Markup]]:
    """Title, explanation and SVG of each picture."""
    found: list[tuple[str, str, str | None]] = [
        ("Losses", "Held-out rows take no part in training or selection.", charts.learning_curves(run))
    ]
    if run.weights is not None:
        histogram = charts.score_histogram(run)
        explained = "A row is kept while rows of its score are more likely right than wrong."
        if histogram:
            found.insert(0, ("Why rows are dropped", explained, histogram))
        else:
            found.append(("Weights", "How many rows have which weight.", charts.weight_histogram(run)))
        is_kept_N, weight_N = run.column("kept"), run.column("weight")
        sources = grouped(run.weights["source"])
        groups = {"By source": sources if len(sources) > 1 else []}
        groups["By length of the response, characters"] = charts.length_groups(texts.length_N)
        groups["By label"] = grouped(pa.chunked_array([texts.label_N])) if texts.label_N else []
        for k, (title, group) in enumerate(groups.items()):
            if group:
                found.append((title, "", charts.by_group(f"group{k}", group, is_kept_N, weight_N)))
    titles = {"ess_ratio": "Effective share of the rows", "weight_entropy": "Entropy of the weights"}
    titles["penalty_gap"] = "Penalty gap"
    if run.selector not in ("scout", "none", "column"):  # there the weights do not change
        found += [(title, "", charts.weighting_curve(run, name)) for name, title in titles.items()]
    return [(title, text, Markup(svg)) for title, text, svg in found if svg]


def _refined(run: RunFolder, texts: RowTexts) -> list[dict[str, Any]]:
    """Rows that were given new responses, with old and new ones; the first of them."""
    rows = list[dict[str, Any]]()
    path = run.path / REFINEMENTS
    for place, record in (last_refinements(path) if path.is_file() else {}).items():
        if place not in texts.content or not record["is_refined"] or len(rows) == _NUM_REFINED:
            continue
        prompt, original = texts.content[place]
        responses = [
            {"text": text[: _TEXT_LIMITS[0]], "weight": weight, "p_right": p}
            for text, weight, p in zip(
                record["responses"], record["response_weights"], record["response_p_right"], strict=True
            )
        ]
        rows.append(
            {"place": place, "step": record["step"], "prompt": prompt, "original": original, "responses": responses}
        )
    return rows
