"""What `SFTTrainer` takes, `BilevelTrainer` takes: the rows that are trained on are the same."""

import logging

import pandas as pd
import pyarrow.parquet as pq
import pytest
from conftest import PLAIN, message_of, pairs, write_jsonl
from datasets import Dataset, DatasetDict, IterableDatasetDict
from trl import SFTConfig, SFTTrainer

from tamis import BilevelConfig, BilevelTrainer, load_rows
from tamis.forms import as_rows, check_token_rows

MIXING = {"selector": "none", "overwrite_output_dir": True}
ALPACA = [{"instruction": "add", "input": f"{i}", "output": f"{i}{i}"} for i in range(4)]
QUESTIONS = [{"question": f"{i}=", "answer": f"{2 * i}"} for i in range(4)]


@pytest.fixture
def trainer(model_dir, tmp_path):
    def make(train, validation=None, evaluation=None, settings=MIXING, **arguments):
        args = BilevelConfig(**PLAIN, **settings, output_dir=str(tmp_path / "run"), max_steps=2)
        return BilevelTrainer(
            model_dir, args, train_dataset=train, validation_dataset=validation, eval_dataset=evaluation, **arguments
        )

    return make


@pytest.fixture
def sft(model_dir, tmp_path):
    def make(train, **arguments):
        args = SFTConfig(**PLAIN, output_dir=str(tmp_path / "sft"))
        return SFTTrainer(model_dir, args, train_dataset=train, **arguments)

    return make


def tokens(dataset) -> list[tuple]:
    return [(row["input_ids"], row["labels"]) for row in dataset]


@pytest.mark.parametrize("rows", [ALPACA, QUESTIONS], ids=["alpaca", "question and answer"])
def test_customary_columns_go_through_the_loader_of_files(trainer, tmp_path, rows):
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    own = trainer(Dataset.from_list(rows), Dataset.from_list(rows[:2]), {"a": Dataset.from_list(rows[2:3])}, {})
    assert tokens(own.train_dataset) == tokens(
        trainer(load_rows(path, role="train_dataset"), prompt_template="auto").train_dataset
    )
    assert tokens(own.validation_dataset) == tokens(own.train_dataset)[:2]
    assert tokens(own.eval_dataset["a"]) == tokens(own.train_dataset)[2:3]


def test_weights_and_names_of_rows_are_kept():
    rows = [row | {"weight": float(i), "row": 10 + i, "source": "x.csv"} for i, row in enumerate(QUESTIONS)]
    found = as_rows(Dataset.from_list(rows), "train_dataset")
    assert {"prompt", "completion"} <= set(found.column_names) and "question" not in found.column_names
    assert (
        found["weight"][:] == [0, 1, 2, 3] and found["row"][:] == [10, 11, 12, 13] and set(found["source"]) == {"x.csv"}
    )


def test_a_bad_row_in_customary_columns_is_named():
    rows = Dataset.from_list([*QUESTIONS, {"question": "5=", "answer": None}])
    assert message_of(lambda: as_rows(rows, "train_dataset")).startswith('train_dataset, row 4, column "answer"')


def test_formatting_func_makes_the_text_as_in_trl(trainer, sft):
    rows = Dataset.from_list(QUESTIONS)

    def formatting_func(row):
        return f"{row['question']}>{row['answer']}"

    own = trainer(rows, rows.select([1]), rows.select([0]), {"rho": 0.5}, formatting_func=formatting_func)
    assert tokens(own.train_dataset) == tokens(sft(rows, formatting_func=formatting_func).train_dataset)
    assert tokens(own.eval_dataset) == tokens(own.train_dataset)[:1]
    assert tokens(own.validation_dataset) == tokens(own.train_dataset)[1:2]


def test_formatting_func_beside_completion_only_loss_is_refused(trainer):
    rows = Dataset.from_list(QUESTIONS)
    settings = MIXING | {"completion_only_loss": True}
    assert "completion_only_loss" in message_of(lambda: trainer(rows, settings=settings, formatting_func=str))
    rows = Dataset.from_list(pairs(2))
    assert "would cover both" in message_of(lambda: trainer(rows, formatting_func=str))


# --- splits and streams -----------------------------------------------------------------------------------------------


def test_the_splits_of_one_dict_go_to_their_roles(trainer):
    splits = DatasetDict(
        train=Dataset.from_list(pairs(4)),
        validation=Dataset.from_list(pairs(2, 50)),
        test=Dataset.from_list(pairs(3, 70)),
    )
    own = trainer(splits, splits, {"test": splits["test"]}, {"selector": "mirror"})
    assert [len(own.train_dataset), len(own.validation_dataset), len(own.eval_dataset["test"])] == [4, 2, 3]


def test_a_dict_without_the_split_of_its_role():
    rows = Dataset.from_list(pairs(2))
    assert len(as_rows(DatasetDict(other=rows), "train_dataset")) == 2
    message = message_of(lambda: as_rows(DatasetDict(a=rows, b=rows), "validation_dataset"))
    assert message == "validation_dataset has the splits a, b: give one of them, as validation_dataset[NAME]"


def test_streams_are_refused_by_name():
    stream = Dataset.from_list(pairs(2)).to_iterable_dataset()
    message = message_of(lambda: as_rows(stream, "train_dataset"))
    assert message.startswith("train_dataset") and "IterableDataset" in message and "without streaming" in message
    assert "IterableDatasetDict" in message_of(lambda: as_rows(IterableDatasetDict(train=stream), "train_dataset"))


# --- rows in tokens ---------------------------------------------------------------------------------------------------


def test_rows_in_tokens_train_as_the_text_they_come_from(trainer, sft):
    prepared = sft(Dataset.from_list(pairs(4))).train_dataset.select_columns(["input_ids", "labels"])
    held_out = sft(Dataset.from_list(pairs(3, 60))).train_dataset.select_columns(["input_ids", "labels"])
    in_tokens, in_text = trainer(prepared, evaluation=held_out), trainer(Dataset.from_list(pairs(4)))
    assert tokens(in_tokens.train_dataset) == tokens(in_text.train_dataset)
    assert in_tokens.train().training_loss == in_text.train().training_loss
    assert in_tokens.evaluate()["eval_loss"] > 0
    assert pq.read_table(f"{in_tokens.args.output_dir}/weights.parquet")["content_hash"].to_pylist()[0]


def test_rows_in_tokens_without_labels_are_trained_on_whole(trainer):
    own = trainer(Dataset.from_list([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}]))
    assert tokens(own.train_dataset) == [([5, 6, 7], [5, 6, 7]), ([8, 9], [8, 9])]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"input_ids": [], "labels": []}, "input_ids has no tokens"),
        ({"input_ids": [1, 2], "labels": [1]}, "labels and input_ids differ in length"),
        ({"input_ids": [1, 2], "labels": None}, "labels and input_ids differ in length"),
        ({"input_ids": [1, 2], "labels": [-100, -100]}, "no token is trained on"),
    ],
)
def test_bad_rows_in_tokens_are_named(row, problem):
    rows = Dataset.from_list([{"input_ids": [1, 2], "labels": [-100, 2]}, row])
    message = message_of(lambda: check_token_rows(rows, "train_dataset"))
    assert message.startswith("train_dataset, row 1: ") and problem in message


def test_rows_in_tokens_beside_text_are_refused(trainer):
    in_tokens = Dataset.from_list([{"input_ids": [5, 6], "labels": [-100, 6]}])
    message = message_of(lambda: trainer(Dataset.from_list(pairs(4)), in_tokens, settings={"selector": "mirror"}))
    assert "validation_dataset has input_ids and labels" in message


def test_a_trusted_row_in_tokens_is_known_again_in_the_held_out_ones(trainer):
    rows = Dataset.from_list([{"input_ids": [5, 6]}, {"input_ids": [7, 8]}])
    other = Dataset.from_list([{"input_ids": [9, 6]}])
    message = message_of(lambda: trainer(other, rows, rows.select([1]), {"selector": "mirror"}))
    assert "share 1 row(s)" in message


def test_formatting_func_has_no_effect_on_rows_in_tokens(caplog):
    rows = Dataset.from_list([{"input_ids": [5, 6]}])
    with caplog.at_level(logging.WARNING):
        assert as_rows(rows, "train_dataset", str) is rows
    assert "formatting_func has no effect on train_dataset" in caplog.text


# --- weights ----------------------------------------------------------------------------------------------------------


def test_row_weights_make_a_data_frame(trainer, tmp_path):
    path = write_jsonl(tmp_path / "train.jsonl", [row | {"w": i + 1} for i, row in enumerate(pairs(4))])
    rows = load_rows(path, role="train_dataset", weight_column="w")
    own = trainer(rows, settings={"selector": "column"})
    own.train()
    frame = pd.DataFrame(own.row_weights)
    assert frame.columns.tolist() == ["row", "source", "weight", "p_right"]
    assert frame["row"].tolist() == [0, 1, 2, 3] and set(frame["source"]) == {"train.jsonl"}
    assert frame["weight"].tolist() == pytest.approx([0.4, 0.8, 1.2, 1.6]) and frame["p_right"].isna().all()
    written = pq.read_table(tmp_path / "run" / "weights.parquet", columns=list(frame)).to_pandas()
    assert written["weight"].tolist() == frame["weight"].tolist()
