"""`--metric lm_eval:TASK` where lm-evaluation-harness is installed (`pip install tamis[lm-eval]`)."""

import json

import pytest
from conftest import two_kinds, write_jsonl

from tamis.cli import main

pytest.importorskip("lm_eval")
TASK = """
task: letters
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_target: "{{completion[0]}}"
doc_to_choice: ["a", "b"]
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.mark.filterwarnings("ignore")  # of the harness
def test_a_task_of_the_harness_judges_the_methods(model_dir, tmp_path, monkeypatch):
    right, wrong, trusted = two_kinds(num_rows=12)
    held_out = write_jsonl(tmp_path / "eval.jsonl", trusted[6:])
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "letters.yaml").write_text(TASK % held_out)
    monkeypatch.setenv("LM_EVAL_TASKS", str(tmp_path / "tasks"))
    flags = ["--model_name_or_path", model_dir, "--output_dir", str(tmp_path / "comparison")]
    flags += ["--train_dataset", write_jsonl(tmp_path / "train.jsonl", right + wrong), "--eval_dataset", held_out]
    flags += ["--validation_dataset", write_jsonl(tmp_path / "validation.jsonl", trusted[:6])]
    flags += ["--learning_rate", "1e-2", "--scout_learning_rate", "1e-2", "--scout_epochs", "4", "--max_steps", "8"]
    flags += ["--methods", "plain_sft", "tamis", "--seeds", "0", "--metric", "lm_eval:letters", "eval_loss"]
    assert main(["compare", *flags, "--use_cpu", "--bf16", "false", "--report_to", "none"]) == 0
    lines = json.loads((tmp_path / "comparison" / "comparison.json").read_text())["methods"]
    found = {line["method"]: line["values"]["lm_eval:letters"] for line in lines}
    assert found["tamis"] == 1.0 and all(0 <= value <= 1 for value in found.values()), "right rows answer with a"
