"""Rows whose prompt ends in the token that the response begins with."""

import logging

import pytest
from conftest import PLAIN, tiny_model, tiny_tokenizer
from datasets import Dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tamis import BilevelConfig, BilevelTrainer

SYMBOLS = ["<pad>", "<eos>", "<unk>", *"abcx", "ab", "cx", "▁", "\n"]


@pytest.fixture
def trainer_of(tmp_path):
    """Trainers of a model whose tokenizer merges "a" with "b", and "c" with "x"."""

    def make(train, validation=None, starts_with_space=False, **settings):
        bpe = Tokenizer(models.BPE({s: i for i, s in enumerate(SYMBOLS)}, [("a", "b"), ("c", "x")], unk_token="<unk>"))
        bpe.pre_tokenizer = pre_tokenizers.Split("=", "isolated")
        if starts_with_space:
            bpe.normalizer = normalizers.Prepend("▁")
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", chat_template=None
        )
        args = BilevelConfig(output_dir=str(tmp_path), **PLAIN | {"selector": "none"} | settings)
        model = tiny_model(tiny_tokenizer())
        data = {"train_dataset": Dataset.from_list(train)}
        if validation:
            data["validation_dataset"] = Dataset.from_list(validation)
        return BilevelTrainer(model, args, processing_class=tokenizer, prompt_template="plain", **data)

    return make


def row(prompt, completion):
    return {"prompt": prompt, "completion": completion}


def tokens(dataset, place, names=("input_ids", "labels")):
    return ["".join(SYMBOLS[i] if i >= 0 else "-" for i in dataset[place][name]) for name in names]


def test_rows_that_merge_are_tokenized_in_two_parts_and_the_others_as_trl_does(trainer_of, caplog):
    caplog.set_level(logging.INFO)
    rows = [row("xa", "bx"), row("x", "ab"), row("xc", "xb"), row("a", "b"), row("xx", "x")]
    trainer = trainer_of(rows, [row("ba", "ba"), row("b", "b")])
    assert SYMBOLS.index("ab") not in trainer.train_dataset[0]["input_ids"]
    assert [tokens(trainer.train_dataset, i) for i in range(5)] == [
        ["xabx<eos>", "--bx<eos>"],
        ["xab<eos>", "-ab<eos>"],
        ["xcxb<eos>", "--xb<eos>"],
        ["ab<eos>", "-b<eos>"],
        ["xxx<eos>", "--x<eos>"],
    ]
    assert SYMBOLS.index("ab") in trainer.train_dataset[1]["input_ids"], "within the response tokens merge"
    assert list(trainer.train_dataset["num_tokens"]) == [5, 3, 5, 3, 4]
    found = [record for record in caplog.records if "one token" in record.getMessage()]
    assert [record.levelno for record in found] == [logging.INFO] * 2
    assert "train: in 3 of 5 rows" in found[0].getMessage() and "(first: 'xa')" in found[0].getMessage()
    assert "validation: in 1 of 2 rows" in found[1].getMessage()
    assert not [record for record in caplog.records if "not a prefix" in record.getMessage()], "nor is TRL's there"


def test_the_tokens_are_those_of_the_prompt_alone_and_of_what_generation_is_to_answer(trainer_of):
    rows = [row(prompt, response) for prompt in ("xa", "xc", "ab", "x") for response in ("b", "xb", "ab")]
    trainer = trainer_of(rows)
    for asked, example in zip(rows, trainer.train_dataset, strict=True):
        prompt_ids = trainer.processing_class(asked["prompt"])["input_ids"]
        assert example["input_ids"][: len(prompt_ids)] == prompt_ids
        response_ids = [label for label in example["labels"] if label != -100]
        assert example["input_ids"] == prompt_ids + response_ids
        assert "".join(SYMBOLS[i] for i in response_ids) == asked["completion"] + "<eos>"


def test_every_token_is_trained_on_where_completion_only_loss_is_false(trainer_of):
    trainer = trainer_of([row("xa", "bx"), row("x", "ab")], completion_only_loss=False)
    assert tokens(trainer.train_dataset, 0) == ["xabx<eos>"] * 2


def test_rows_that_do_not_merge_say_nothing(trainer_of, caplog):
    caplog.set_level(logging.INFO)
    trainer = trainer_of([row("xa ", "bx"), row("", "ab"), row("xb", "x")])
    assert len(trainer.train_dataset) == 3
    assert not [record for record in caplog.records if "one token" in record.getMessage()]


def test_a_row_is_cut_after_it_was_tokenized_in_two_parts(trainer_of):
    trainer = trainer_of([row("xxxa", "bxxxxxxx"), row("xa", "x")], max_length=6)
    assert tokens(trainer.train_dataset, 0) == ["xxxabx", "----bx"]
    assert trainer.train_dataset[0]["num_tokens"] == 13


def test_rows_in_tokens_are_left_as_they_are(trainer_of):
    ids = [SYMBOLS.index(symbol) for symbol in ("x", "ab", "x")]
    trainer = trainer_of([{"prompt": "xa", "completion": "bx", "input_ids": ids}])
    assert tokens(trainer.train_dataset, 0, ["input_ids"]) == ["xabx"]


def test_a_tokenizer_that_begins_texts_with_a_space_adds_none_to_a_response(trainer_of):
    rows = [row("xa", "bx"), row("xc", "xb"), row("x", "ab"), row("xa", "\nb")]
    trainer = trainer_of(rows, starts_with_space=True)
    found = [tokens(trainer.train_dataset, i) for i in range(4)]
    assert [text for text, _ in found] == ["▁xabx<eos>", "▁xcxb<eos>", "▁xab<eos>", "▁xa\nb<eos>"]
    assert [labels for _, labels in found[:3]] == ["---bx<eos>", "---xb<eos>", "--ab<eos>"]
