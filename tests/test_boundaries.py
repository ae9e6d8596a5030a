"""Rows whose prompt ends in the token that the response begins with."""

import logging

import pytest
from conftest import PLAIN, tiny_model, tiny_tokenizer
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tamis import BilevelConfig, BilevelTrainer

SYMBOLS = ["<pad>", "<eos>", "<unk>", *"abcx", "ab", "cx"]


@pytest.fixture
def trainer_of(tmp_path):
    """Trainers of a model whose tokenizer merges "a" with "b", and "c" with "x"."""

    def make(train, validation=None, **settings):
        bpe = Tokenizer(models.BPE({s: i for i, s in enumerate(SYMBOLS)}, [("a", "b"), ("c", "x")], unk_token="<unk>"))
        bpe.pre_tokenizer = pre_tokenizers.Split("=", "isolated")
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


def test_merged_rows_are_counted_once_and_the_first_is_shown(trainer_of, caplog):
    trainer_of([row("xa", "bx"), row("x", "ab"), row("xc", "xb"), row("xx", "x")], [row("ba", "ba"), row("b", "b")])
    found = [record for record in caplog.records if "one token" in record.getMessage()]
    assert [record.levelno for record in found] == [logging.WARNING] * 2
    assert "train_dataset: in 2 of 4 rows" in found[0].getMessage() and "(first: 'xa')" in found[0].getMessage()
    assert "validation_dataset: in 1 of 2 rows" in found[1].getMessage()
    assert "prompt_template" in found[0].getMessage()
    assert not [record for record in caplog.records if "not a prefix" in record.getMessage()], "nor is TRL's there"


def test_rows_that_do_not_merge_are_passed_over(trainer_of, caplog):
    trainer = trainer_of([row("xa ", "bx"), row("", "ab"), row("xb", "x")])
    assert len(trainer.train_dataset) == 3
    assert not [record for record in caplog.records if "token" in record.getMessage()]


def test_a_row_that_was_cut_says_nothing(trainer_of, caplog):
    trainer_of([row("xxxa", "bxxxxxxx"), row("xa", "x")], max_length=6)
    assert not [record for record in caplog.records if "one token" in record.getMessage()]
