"""The demo's world: reproducible, disjoint, as wrong as it says, and readable by what users load models with."""

import json
from collections import Counter

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tamis.demo.world import LETTERS, make_world


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"), seed=3, num_train=400, pretrain_steps=2)


def answer(prompt: str) -> str:
    """The right answer, worked out another way than in the package."""
    name, word = prompt[1:-1].split(">")
    places = {"reverse": "43210", "swap": "34012", "left": "12340", "ends": "41230", "right": "40123"}
    if name in places:
        return "".join(word[int(place)] for place in places[name])
    tables = {
        "next": LETTERS[1:] + LETTERS[0],
        "before": LETTERS[-1] + LETTERS[:-1],
        "mirror": "".join(reversed(LETTERS)),
    }
    return word.translate(str.maketrans(LETTERS, tables[name]))


def test_right_answers_are_right_and_wrong_ones_wrong(world):
    rows = read(world.train_file)
    assert all((row["completion"] == answer(row["prompt"])) == row["is_right"] for row in rows)
    for path in (world.clean_file, world.validation_file, world.eval_file):
        assert all(row["completion"] == answer(row["prompt"]) for row in read(path))


def test_half_of_the_rows_are_wrong_and_kinds_are_even(world):
    rows = read(world.train_file)
    assert 0.4 < sum(row["is_right"] for row in rows) / len(rows) < 0.6
    kinds = Counter(row["prompt"].split(">")[0] for row in rows)
    assert len(kinds) == 8
    assert min(kinds.values()) > 0.5 * len(rows) / 8


def test_no_question_is_in_two_sets(world):
    prompts = [
        row["prompt"] for path in (world.train_file, world.validation_file, world.eval_file) for row in read(path)
    ]
    assert len(prompts) == len(set(prompts))


def test_the_same_seed_makes_the_same_files(world, tmp_path):
    again = make_world(tmp_path / "again", seed=3, num_train=400, pretrain_steps=2)
    other = make_world(tmp_path / "other", seed=4, num_train=400, pretrain_steps=2)
    for name in ("train_file", "validation_file", "eval_file"):
        assert getattr(again, name).read_bytes() == getattr(world, name).read_bytes()
        assert getattr(other, name).read_bytes() != getattr(world, name).read_bytes()
    weights = "model.safetensors"
    assert (again.model_dir / weights).read_bytes() == (world.model_dir / weights).read_bytes()


def test_a_world_is_reused_and_another_one_is_not_overwritten(world):
    folder = world.train_file.parent
    before = world.train_file.stat().st_mtime_ns
    assert make_world(folder, seed=3, num_train=400, pretrain_steps=2) == world
    assert world.train_file.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="holds another world"):
        make_world(folder, seed=4, num_train=400, pretrain_steps=2)


def test_model_and_tokenizer_load_and_the_prompt_is_a_prefix(world):
    tokenizer = AutoTokenizer.from_pretrained(world.model_dir)
    assert AutoModelForCausalLM.from_pretrained(world.model_dir).config.vocab_size == len(tokenizer)
    row = read(world.train_file)[0]
    prompt, whole = (tokenizer(text)["input_ids"] for text in (row["prompt"], row["prompt"] + row["completion"]))
    assert whole[: len(prompt)] == prompt
    assert len(prompt) == 1 + 5 + 1
    assert tokenizer.unk_token_id not in whole
    assert tokenizer.decode(whole).replace(" ", "") == row["prompt"] + row["completion"]


def test_answers_of_unlike_entropy(tmp_path):
    task = make_world(tmp_path / "world", scenario="unlike_entropy", num_train=300, pretrain_steps=2)
    rows = read(task.train_file)
    families = Counter(row["family"] for row in rows)
    assert set(families) == {"easy", "open"}
    assert min(families.values()) > 100
    for row in rows:
        if row["family"] == "open" and row["prompt"].startswith("<shuffle>") and row["is_right"]:
            assert sorted(row["completion"]) == sorted(row["prompt"].split(">")[1][:-1])


def test_an_unknown_scenario_is_refused(tmp_path):
    with pytest.raises(ValueError, match="half_wrong"):
        make_world(tmp_path, scenario="all_wrong")
