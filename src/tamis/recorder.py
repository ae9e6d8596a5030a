"""The run directory: what a run leaves behind besides the model, for people and for other tools.

| file                   | what                                                                                        |
|------------------------|---------------------------------------------------------------------------------------------|
| `config.yaml`          | settings that differ from the defaults; `tamis train --config config.yaml` replays the run  |
| `metrics.jsonl`        | one JSON object per log step, appended as training goes                                     |
| `weights.parquet`      | one row per training row: example_id, source, row, content_hash, weight, score, ...         |
| `refinements.parquet`  | one row per refresh and refined row: its new responses and their weights at that step       |
| `skipped_rows.jsonl`   | one JSON object per row that was left out: source, row, problem, content                    |
| `scout.json`           | what scouting found: share of right rows, AUROC to expect, every trial (selector `scout`)   |
| `scout_scores.parquet` | what it found that by: scores of training rows, and of unseen validation rows               |
| `scout_trials.safetensors` | losses that trials of scouts have measured: scouting that was cut short goes on there |
| `scout.safetensors`    | what scores new responses (`tamis.selection.scout`); runs with refining only                |

Files are written under a temporary name and renamed, so that a reader never meets half of one. `metrics.jsonl` is the
exception: it grows by whole lines and is cut back to the checkpoint on resume.
"""

import json
import logging
import math
import shutil
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from tamis.earlier_scores import SCOUT_REPORT
from tamis.files import write_atomically, writing
from tamis.output_dir import config_path, was_cut_short, write_config
from tamis.refinements import REFINEMENTS, SCHEMA, add_refresh, drop_refreshes

logger = logging.getLogger(__name__)

FORMAT_VERSION = 4
SCOUT_SCORES = "scout_scores.parquet"
LAST = ("last", "true", "True")  # what `resume_from_checkpoint` may say instead of True
SKIPPED_ROWS = "skipped_rows.jsonl"
_RECORDED_PACKAGES = ("tamis", "torch", "transformers", "trl", "peft", "accelerate", "datasets")


def run_info(fingerprints: dict[str, str], resolved: Sequence[str]) -> dict[str, Any]:
    """Where and from what a run was made: time (UTC), versions, git commit, dataset fingerprints, resolved settings."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:  # a machine without git
        commit = ""
    return {
        "format_version": FORMAT_VERSION,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {package: version(package) for package in _RECORDED_PACKAGES},
        "git_commit": commit or None,
        "dataset_fingerprints": fingerprints,
        "resolved": list(resolved),
    }


class Recorder:
    """Writes one run directory. Only the main process should own one.

    Args:
        output_dir: the run directory; made by the first file that is written.
    """

    def __init__(self, output_dir: str | Path):
        self.output_dir = Path(output_dir)

    def write_config(self, settings: dict[str, Any], info: dict[str, Any]) -> None:
        """``settings`` are command line names and values; ``info`` goes under ``run_info``, which replays ignore."""
        write_config(config_path(self.output_dir), {**settings, "run_info": info})

    def write_skipped(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write ``skipped_rows.jsonl``, where there are such rows; see `tamis.bad_rows.RowSieve`."""
        if rows:
            text = "".join(json.dumps(row, default=str) + "\n" for row in rows)
            write_atomically(self.output_dir / SKIPPED_ROWS, lambda path: path.write_text(text, encoding="utf-8"))

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to ``metrics.jsonl``. NaN and infinity are written as null: the lines are strict JSON."""
        path = self.output_dir / "metrics.jsonl"
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(_as_json(record)) + "\n")

    def rewind(self, step: int, num_records: int) -> None:
        """Drop what was logged after a checkpoint, and responses from its step on: those steps run again.

        Args:
            step: of the checkpoint.
            num_records: of this step, when it was written. What follows is the end of a run that was to end here.
        """
        drop_refreshes(self.output_dir / REFINEMENTS, step)
        path = self.output_dir / "metrics.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # the line that a kill cut short
                break
            num_records -= record["step"] == step
            if record["step"] > step or num_records < 0:
                break
            kept.append(line + "\n")
        write_atomically(path, lambda temporary: temporary.write_text("".join(kept), encoding="utf-8"))

    def write_scout(self, found: dict[str, Any], scores: dict[str, Any]) -> None:
        """Write ``scout.json`` and ``scout_scores.parquet``.

        Args:
            found, scores: see `to_dict` and `scores` of `tamis.selection.trials.Outcome`.
        """
        table = pa.table(scores).replace_schema_metadata({"tamis_format_version": str(FORMAT_VERSION)})
        write_atomically(self.output_dir / SCOUT_SCORES, lambda path: pq.write_table(table, path))
        text = json.dumps({"format_version": FORMAT_VERSION, **found}, indent=1, allow_nan=False)
        write_atomically(self.output_dir / SCOUT_REPORT, lambda path: path.write_text(text, encoding="utf-8"))

    def take_over(self, earlier: Path, *names: str) -> None:
        """Copy files of an earlier run or scoring, where it is in another folder and has them."""
        for name in names:
            source, target = earlier / name, self.output_dir / name
            if source.is_file() and source.resolve() != target.resolve():
                write_atomically(target, partial(shutil.copyfile, source))

    def write_weights(self, row_table: pa.Table, columns: dict[str, np.ndarray[Any, Any]]) -> None:
        """Write ``weights.parquet``: one row per training row, in order.

        Args:
            row_table: how each row is named, see `tamis.rows.row_table`; the same at every checkpoint.
            columns: see `tamis.weighting.RowWeighting.columns`.
        """
        table = row_table
        for name, values in columns.items():
            table = table.append_column(name, pa.array(values, from_pandas=True))
        table = table.replace_schema_metadata({"tamis_format_version": str(FORMAT_VERSION)})
        write_atomically(self.output_dir / "weights.parquet", lambda path: pq.write_table(table, path))

    def add_refinements(
        self, records: list[dict[str, Any]], train_rows: Dataset, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Add a refresh to ``refinements.parquet``: one row per row that got new responses.

        Args:
            records: see `tamis.refining.refiner.Refiner.refresh`.
        """
        rows = []
        for record in records:
            row = train_rows[record["example_id"]]
            original: dict[str, str | None] = {"prompt": None, "original": None}
            if "prompt" in row:
                original = {"prompt": as_text(row["prompt"]), "original": as_text(row["completion"])}
            elif "messages" in row:
                original = {"prompt": as_text(row["messages"][:-1]), "original": as_text(row["messages"][-1:])}
            texts = tokenizer.batch_decode([list(ids) for ids in record["token_ids"]], skip_special_tokens=True)
            rows.append(
                {
                    **record,
                    "source": row.get("source"),
                    "row": row.get("row", record["example_id"]),
                    **original,
                    "responses": texts,
                }
            )
        refresh = pa.Table.from_pylist(rows, schema=SCHEMA)
        add_refresh(self.output_dir / REFINEMENTS, refresh, {"tamis_format_version": str(FORMAT_VERSION)})


def _as_json(value: Any) -> Any:
    """The same with null for every number that is none."""
    if isinstance(value, dict):
        return {name: _as_json(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_as_json(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_text(content: Any) -> str:
    """A prompt or completion as it is, or the last message of a conversation."""
    return content if isinstance(content, str) else str(content[-1]["content"]) if content else ""


def find_checkpoint(output_dir: str | Path, resume: str | bool) -> str | None:
    """The folder that `resume_from_checkpoint` means: the one that it names, or the newest complete one of the run.

    None where the last of a run is meant that was cut short before it had written one: it goes on from its beginning.

    Raises:
        ValueError: there is none.
    """
    if resume in (True, *LAST):
        found = last_complete_checkpoint(output_dir)
        if found is None and not was_cut_short(output_dir):
            raise ValueError(
                f"{output_dir} holds no complete checkpoint to resume from: leave `resume_from_checkpoint` out, and "
                "set `overwrite_output_dir=True` if there is a run without one"
            )
        return found
    if not Path(str(resume)).is_dir():
        raise ValueError(f"{resume}: no such folder. Give a checkpoint, or 'last', to `resume_from_checkpoint`")
    return str(resume)


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """The newest ``checkpoint-*`` folder of a run that was written to its end; those that were not are warned of.

    `transformers` writes ``trainer_state.json`` last, so a folder without a readable one was cut short by a kill.
    """
    for folder in _checkpoints(output_dir):
        try:
            checkpoint_state(folder)
        except (OSError, json.JSONDecodeError):
            logger.warning(f"{folder} was cut off while it was written: skipped")
            continue
        return str(folder)
    return None


def end_rotation(resume: str | Path, save_total_limit: int | None) -> None:
    """Remove what a kill kept `transformers` from removing: checkpoints before ``resume`` beyond the limit.

    It orders them by the time of their last change, so that one half removed would count as the newest, and whole ones
    would go in its place.
    """
    if not save_total_limit:
        return
    own, state = Path(resume), checkpoint_state(resume)
    best = state["best_model_checkpoint"]
    num_later = sum(_step_of(folder) > state["global_step"] for folder in _checkpoints(own.parent))
    num_kept = max(save_total_limit, len({str(own), str(Path(best or own))}))
    rotate_checkpoints(str(own.parent), num_kept + num_later, best)


def _checkpoints(output_dir: str | Path) -> list[Path]:
    """The newest first."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
    return sorted(folders, key=_step_of, reverse=True)


def _step_of(folder: Path) -> int:
    return int(folder.name.split("-")[-1])


def checkpoint_state(checkpoint: str | Path) -> dict[str, Any]:
    """How far the run was when a checkpoint was written, see [`~transformers.TrainerState`]."""
    state: dict[str, Any] = json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    return state


def checkpoint_step(checkpoint: str | Path) -> int:
    """The optimizer step at which a checkpoint was written."""
    return int(checkpoint_state(checkpoint)["global_step"])
