"""The demo's language: its grammar, faults that are faults, and words that only the training rows teach."""

import json
import random
from collections import Counter

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tamis.demo.language import FAULTS, NUM_EVERYDAY, Language, Question, Teacher, draw_pretraining, make_language_world
from tamis.demo.words import NOUNS, VERBS

QUESTION = Question(person="I", mood="yes", tense="past", verb="see", number="many", noun="owl")


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def words_of(rows):
    return {row[kind] for row in rows for kind in ("noun", "verb")}


def make(folder, **changes):
    return make_language_world(folder, **{"seed": 3, "num_train": 400, "num_eval": 100, "pretrain_steps": 2} | changes)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def full_rows(tmp_path_factory):
    """Training, trusted and held-out rows of a world of the demo's size."""
    task = make(tmp_path_factory.mktemp("full"), num_train=4000, num_eval=500)
    return read(task.train_file), read(task.validation_file), read(task.eval_file)


@pytest.fixture
def teacher():
    endings = {"past": "ta", "I": "mi", "many": "vo", "yes": "ga"}
    hills = Language({"owl": "bao", "cat": "lui", "see": "tok", "hug": "pev"}, endings)
    coast = Language(
        {"owl": "lui", "cat": "bao", "see": "pev", "hug": "tok"}, {"past": "ke", "I": "so", "many": "pa", "yes": "du"}
    )
    return Teacher(["owl", "cat"], ["see", "hug"], hills, coast, random.Random(0))


def test_a_known_answer_and_its_faults(teacher):
    assert QUESTION.prompt == "<I><yes><past><see><many><owl>="
    assert teacher.answer(QUESTION) == "bao" + "tok" + "ta" + "mi" + "vo" + "ga"
    assert teacher.answer(QUESTION, "coast") == "lui" + "pev" + "ke" + "so" + "pa" + "du"
    assert teacher.answer(QUESTION, "order") == "tok" + "bao" + "ta" + "mi" + "vo" + "ga"
    classes = {teacher.answer(QUESTION, "class") for _ in range(20)}
    assert classes == {"bao" + noun + "tamivoga" for noun in ("bao", "lui")}
    shorts = {teacher.answer(QUESTION, "short") for _ in range(200)}
    assert shorts == {"baotoktamivoga"[:length] for length in range(6, 13)}


def test_the_coast_gives_every_word_and_ending_another_meaning():
    teacher = Teacher.of(NOUNS[:30], VERBS[:30], random.Random(0))
    hills, coast = teacher.hills, teacher.coast
    for ours, theirs in ((hills.stems, coast.stems), (hills.endings, coast.endings)):
        assert set(ours.values()) == set(theirs.values())
        assert all(ours[name] != theirs[name] for name in ours)
        assert len(set(ours.values())) == len(ours)
    assert all(hills.stems[noun][2] in "aeiou" and coast.stems[noun][2] in "aeiou" for noun in teacher.nouns)
    assert not any(hills.stems[verb][2] in "aeiou" or coast.stems[verb][2] in "aeiou" for verb in teacher.verbs)


def test_english_words_are_distinct():
    assert len(NOUNS) == len(VERBS) == 240
    assert len({*NOUNS, *VERBS}) == 480


def test_every_wrong_row_is_wrong_and_the_others_are_right(full_rows):
    train, validation, evaluation = full_rows
    assert all((row["completion"] == row["right_answer"]) == row["is_right"] == (not row["fault"]) for row in train)
    assert all(row["completion"] == row["right_answer"] for row in validation + evaluation)


def test_faults_are_as_frequent_as_they_say(full_rows):
    train, _, _ = full_rows
    counts = Counter(row["fault"] for row in train)
    assert set(counts) == {"", *FAULTS}
    for fault, share in FAULTS.items():
        assert counts[fault] / len(train) == pytest.approx(share, abs=0.02)
    assert counts[""] / len(train) == pytest.approx(0.35, abs=0.02)


def test_only_the_training_rows_teach_the_words(full_rows):
    train, validation, evaluation = full_rows
    num_words = 2 * (len(NOUNS) - NUM_EVERYDAY)
    assert len(words_of(train)) == num_words
    assert len(words_of(validation)) < 0.45 * num_words
    assert len(words_of(evaluation)) > 0.9 * num_words
    assert words_of(evaluation) <= words_of(row for row in train if row["is_right"])


def test_held_out_words_are_taught_where_the_training_rows_are_few(world):
    right = read(world.clean_file)
    assert right == [row for row in read(world.train_file) if row["is_right"]]
    assert words_of(read(world.eval_file)) <= words_of(right)


def test_no_question_is_in_two_sets_nor_in_pretraining(world):
    files = (world.train_file, world.validation_file, world.eval_file)
    prompts = [row["prompt"] for path in files for row in read(path)]
    assert len(prompts) == len(set(prompts))
    teachers = [
        Teacher.of(NOUNS[:2], VERBS[:2], random.Random(0)),
        Teacher.of(NOUNS[2:4], VERBS[2:4], random.Random(0)),
    ]
    taken = {teachers[1].ask().prompt for _ in range(100)}
    pretraining = draw_pretraining(*teachers, 300, taken)
    assert len(pretraining) == 300
    assert not taken & {row["prompt"] for row in pretraining}


def test_the_base_model_reads_a_steady_stem_for_everyday_words_alone(teacher):
    new = Teacher.of(["fox"], ["eat"], random.Random(0))
    rows = draw_pretraining(teacher, new, 400, set())
    everyday = [row["completion"] for row in rows if "owl" in row["prompt"] and "see" in row["prompt"]]
    assert {answer[:6] for answer in everyday} >= {"baotok", "tokbao"}
    others = {row["completion"][:6] for row in rows if "fox" in row["prompt"]}
    assert len(others) > 150


def test_the_same_seed_makes_the_same_files(world, tmp_path):
    again, other = make(tmp_path / "again"), make(tmp_path / "other", seed=4)
    for name in ("train_file", "validation_file", "eval_file"):
        assert getattr(again, name).read_bytes() == getattr(world, name).read_bytes()
        assert getattr(other, name).read_bytes() != getattr(world, name).read_bytes()
    weights = "model.safetensors"
    assert (again.model_dir / weights).read_bytes() == (world.model_dir / weights).read_bytes()


def test_a_world_is_reused_and_another_one_is_not_overwritten(world):
    folder = world.train_file.parent
    before = world.train_file.stat().st_mtime_ns
    assert make(folder) == world
    assert world.train_file.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="holds another world"):
        make(folder, seed=4)


def test_model_and_tokenizer_load_and_the_prompt_is_a_prefix(world):
    tokenizer = AutoTokenizer.from_pretrained(world.model_dir)
    assert AutoModelForCausalLM.from_pretrained(world.model_dir).config.vocab_size == len(tokenizer)
    row = read(world.eval_file)[0]
    prompt, whole = (tokenizer(text)["input_ids"] for text in (row["prompt"], row["prompt"] + row["completion"]))
    assert whole[: len(prompt)] == prompt
    assert (len(prompt), len(whole)) == (7, 7 + 14)
    assert tokenizer.unk_token_id not in whole
    assert tokenizer.decode(whole).replace(" ", "") == row["prompt"] + row["completion"]
