"""Files of rows that were weighed, without a model: what `tamis select` and the report start from."""

import csv
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, load_from_disk

from tamis.curation.select import SelectArguments, select
from tamis.output_dir import write_config
from tamis.rows import check_rows, row_table
from tamis.sources import load_sources

ROWS = [
    {"prompt": "1=", "completion": "11", "note": "é"},
    {"prompt": "2=", "completion": 'say "no",\nthen go', "note": "007"},
    {"prompt": "3=", "completion": "33", "note": ""},
    {"prompt": "4=", "completion": "44", "note": "NA"},
]
P_RIGHT = [0.9, 0.7, 0.1, 0.8]


def weigh_files(tmp_path, *sources, p_right=P_RIGHT, **config):
    """Weigh the rows of files, as a run in the folder ``run`` has."""
    names = ("prompt_column", "response_column", "weight_column")
    options = {name: config[name] for name in names if name in config}
    split = config.get("train_split", "train")
    skipped = [] if config.get("skip_bad_rows") else None
    rows = load_sources([str(s) for s in sources], role="train_dataset", split=split, skipped=skipped, **options)
    weights = row_table(rows, check_rows(rows, "train_dataset"))
    p_right = np.resize(p_right, len(rows))
    columns = {"weight": p_right**2 / np.mean(p_right**2), "p_right": p_right, "score": np.log(p_right)}
    for name, values in (columns | {"kept": p_right >= 0.5}).items():
        weights = weights.append_column(name, pa.array(values))
    (tmp_path / "run").mkdir(exist_ok=True)
    pq.write_table(weights, tmp_path / "run" / "weights.parquet")
    settings = {"train_dataset": list(map(str, sources)), **config, "run_info": {"format_version": 4}}
    write_config(tmp_path / "run/config.yaml", settings)
    return tmp_path


def chosen(**settings):
    return select(SelectArguments(**{"weights": "run", "output_dir": "clean"} | settings))


def json_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def as_csv(path, rows, delimiter=",", end="\r\n"):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter, lineterminator=end)
        writer.writeheader()
        writer.writerows(rows)


def write_as(path, rows):
    """Write rows in the format of the file's name; without a suffix as a saved data set."""
    if path.suffix in (".csv", ".tsv"):
        as_csv(path, rows, "," if path.suffix == ".csv" else "\t")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix:
        path.write_text(json_lines(rows) if path.suffix == ".jsonl" else json.dumps(rows), encoding="utf-8")
    else:
        Dataset.from_list(rows).save_to_disk(path)


def rows_in(path):
    """The rows of a file of any format."""
    if path.is_dir():
        return load_from_disk(path).to_list()
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    with path.open(newline="", encoding="utf-8") as file:
        if path.suffix in (".csv", ".tsv"):
            return list(csv.DictReader(file, delimiter="," if path.suffix == ".csv" else "\t"))
        return json.load(file) if path.suffix == ".json" else [json.loads(line) for line in file]
