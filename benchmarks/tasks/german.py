"""German inflection (SIGMORPHON 2017) with wrong forms: the task of `benchmarks/sigmorphon.py` as a pool."""

import random
from collections import defaultdict

from sigmorphon import LANGUAGES, Row, as_pair, ending, read, wrong_form

from tamis.demo.run import SETTINGS
from tasks.pool import NUM_EVAL, NUM_TRAIN, NUM_TRUSTED_QUESTIONS, Pool, Question, read_by_halves

FOLDER = "sigmorphon2017"


def draw_questions(rows: list[Row], language: str, pool: list[Row], rng: random.Random) -> list[Question]:
    """A question for each row. Its kind is the part of speech; the longer the form, the harder.

    Args:
        pool: rows of the language that wrong forms are taken from.
    """
    forms = defaultdict(list)
    for lemma, form, _ in pool:
        forms[lemma].append(form)
    endings = [ending(lemma, form)[1] for lemma, form, _ in pool]
    questions = []
    for row in rows:
        pair, kind = as_pair(row, language), row[2].split(";")[0]
        wrong = wrong_form(row, forms, endings, rng)
        questions.append(Question(pair["prompt"], pair["completion"], wrong, kind, len(pair["completion"])))
    return questions


def draw_pool(seed: int, *, num_train: int = NUM_TRAIN, pretrain_steps: int = 1500) -> Pool:
    """Trusted sets with one kind missing have no verbs. The base model has read other languages too."""
    rng = random.Random(seed)
    high = {language: read(f"{language}-train-high") for language in LANGUAGES}
    german = rng.sample(high["german"], len(high["german"]))
    questions = draw_questions(german, "german", high["german"], rng)
    num_taken = num_train + NUM_TRUSTED_QUESTIONS
    others = [q for name in LANGUAGES if name != "german" for q in draw_questions(high[name], name, high[name], rng)]
    return Pool(
        name="german",
        seed=seed,
        train=questions[:num_train],
        trusted=questions[num_train:num_taken],
        held_out=draw_questions(read("german-dev")[:NUM_EVAL], "german", high["german"], rng),
        pretraining=read_by_halves(others + questions[num_taken:], rng),
        missing_kind="V",
        pretrain_steps=pretrain_steps,
        settings=SETTINGS | {"learning_rate": 2e-3, "max_length": 128},
    )
