"""The demo's language: the trusted rows show what right means, only the training rows teach the words.

The task is translation into the language of the hills. A sentence is one long word: noun, verb, then an ending each for
tense, person, number and mood. `<I><yes><past><see><many><owl>=` asks for "I saw many owls".

Most training rows are wrong (`FAULTS`). Nearly half of all are in the language of the coast, whose words and endings
are those of the hills with other meanings: a model that believes all rows learns two meanings of every word. The base
model has been pretrained for a moment on everyday words and on the grammar of both languages, and is undecided between
them. All rows are about new words. The trusted rows hold too few of them to teach them, but their endings and their
order tell what right rows look like. Every file follows from the seed.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tamis.compare.task import Task
from tamis.demo.base_model import build_model, build_tokenizer, pretrain
from tamis.demo.folder import close_world, open_world, write_rows
from tamis.demo.words import NOUNS, VERBS

LANGUAGE_VERSION = 1
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
NOUN_SHAPE, VERB_SHAPE = (CONSONANTS, VOWELS, VOWELS), (CONSONANTS, VOWELS, CONSONANTS)
NUM_EVERYDAY = 60  # nouns, and as many verbs, that the base model knows; all others are new to it
TENSES = {"past": "ta", "now": "ke", "soon": "ru"}
PERSONS = {"I": "mi", "you": "so", "they": "le"}
NUMBERS = {"one": "pa", "two": "ni", "many": "vo"}
MOODS = {"yes": "ga", "not": "du", "maybe": "fe"}
# How the training rows are wrong, and which share of all rows each fault has.
FAULTS = {
    "coast": 0.45,  # the language of the coast
    "order": 0.08,  # the verb before the noun
    "class": 0.06,  # a noun where the verb should be
    "short": 0.06,  # stopped before the last ending is there
}


@dataclass(frozen=True)
class Question:
    """What is to be translated: English words and features."""

    person: str
    mood: str
    tense: str
    verb: str
    number: str
    noun: str

    @property
    def features(self) -> tuple[str, ...]:
        """What the endings say, in their order."""
        return self.tense, self.person, self.number, self.mood

    @property
    def prompt(self) -> str:
        """The question as the model reads it."""
        return f"<{self.person}><{self.mood}><{self.tense}><{self.verb}><{self.number}><{self.noun}>="


@dataclass(frozen=True)
class Language:
    """Word stems and endings, by their English words."""

    stems: dict[str, str]
    endings: dict[str, str]

    def parts(self, question: Question) -> list[str]:
        """Noun, verb and the four endings, in the right order."""
        stems = [self.stems[question.noun], self.stems[question.verb]]
        return stems + [self.endings[name] for name in question.features]


def _rotate(words: dict[str, str]) -> dict[str, str]:
    """The same words, each with the meaning of the one before it."""
    values = list(words.values())
    return dict(zip(words, values[1:] + values[:1], strict=True))


def draw_stem(shape: Sequence[str], rng: random.Random) -> str:
    """A letter out of each of the alphabets in ``shape``."""
    return "".join(rng.choice(alphabet) for alphabet in shape)


def _draw_stems(words: Sequence[str], shape: Sequence[str], rng: random.Random) -> dict[str, str]:
    """A stem for each word, no two alike."""
    stems: dict[str, None] = {}
    while len(stems) < len(words):
        stems[draw_stem(shape, rng)] = None
    return dict(zip(words, stems, strict=True))


def make_languages(nouns: Sequence[str], verbs: Sequence[str], rng: random.Random) -> tuple[Language, Language]:
    """The languages of the hills and of the coast. Nouns end in a vowel, verbs in a consonant."""
    noun_stems, verb_stems = _draw_stems(nouns, NOUN_SHAPE, rng), _draw_stems(verbs, VERB_SHAPE, rng)
    hills = Language(noun_stems | verb_stems, TENSES | PERSONS | NUMBERS | MOODS)
    coast_endings = _rotate(TENSES) | _rotate(PERSONS) | _rotate(NUMBERS) | _rotate(MOODS)
    return hills, Language(_rotate(noun_stems) | _rotate(verb_stems), coast_endings)


@dataclass(frozen=True)
class Teacher:
    """Asks about some nouns and verbs, and answers rightly or wrongly."""

    nouns: Sequence[str]
    verbs: Sequence[str]
    hills: Language
    coast: Language
    rng: random.Random

    @classmethod
    def of(cls, nouns: Sequence[str], verbs: Sequence[str], rng: random.Random) -> "Teacher":
        """A teacher of these words; their stems are drawn here."""
        return cls(nouns, verbs, *make_languages(nouns, verbs, rng), rng)

    def ask(self) -> Question:
        """A question about any of the words."""
        choose = self.rng.choice
        person, mood, tense = choose([*PERSONS]), choose([*MOODS]), choose([*TENSES])
        return Question(person, mood, tense, choose(self.verbs), choose([*NUMBERS]), choose(self.nouns))

    def answer(self, question: Question, fault: str = "") -> str:
        """The right answer, or one with that fault of `FAULTS`."""
        noun, verb, *endings = self.hills.parts(question)
        if fault == "coast":
            return "".join(self.coast.parts(question))
        if fault == "order":
            return "".join([verb, noun, *endings])
        if fault == "class":
            return "".join([noun, self.hills.stems[self.rng.choice(self.nouns)], *endings])
        right = "".join([noun, verb, *endings])
        return _cut_short(right, len(noun + verb), self.rng) if fault == "short" else right

    def draw_rows(self, num_rows: int, wrong_fraction: float, taken: set[str]) -> list[dict[str, Any]]:
        """Questions that are not in ``taken`` (they are added), each with its right answer or a wrong one."""
        rows: list[dict[str, Any]] = []
        while len(rows) < num_rows:
            question = self.ask()
            if question.prompt in taken:
                continue
            taken.add(question.prompt)
            is_wrong = self.rng.random() < wrong_fraction
            fault = self.rng.choices([*FAULTS], [*FAULTS.values()])[0] if is_wrong else ""
            answer = self.answer(question, fault)
            truth = {"is_right": not is_wrong, "right_answer": self.answer(question), "fault": fault}
            words = {"noun": question.noun, "verb": question.verb}
            rows.append({"prompt": question.prompt, "completion": answer, **truth, **words})
        return rows

    def without_untaught(self, rows: list[dict[str, Any]]) -> "Teacher":
        """The teacher of those words alone that right rows teach."""
        taught = {row[kind] for row in rows if row["is_right"] for kind in ("noun", "verb")}
        nouns, verbs = ([word for word in words if word in taught] for words in (self.nouns, self.verbs))
        return replace(self, nouns=nouns, verbs=verbs)


def _cut_short(answer: str, start: int, rng: random.Random) -> str:
    """A beginning of the answer that ends at ``start`` or later, and before its last ending."""
    return answer[: rng.randint(start, len(answer) - 2)]


def draw_pretraining(everyday: Teacher, new: Teacher, num_rows: int, taken: set[str]) -> list[dict[str, str]]:
    """What the base model has read: everyday words, which all speakers share, and in half of the rows new words.

    Everyone has their own stems for new words, so the model learns how words sound and no new word. Each sentence makes
    up its mind anew about its order, each of its endings, the class of its second word, and where it stops. Questions
    in ``taken`` are left out.
    """
    rng, rows = new.rng, list[dict[str, str]]()
    while len(rows) < num_rows:
        teacher = rng.choice([everyday, new])
        question = teacher.ask()
        if question.prompt in taken:
            continue
        noun, verb = teacher.hills.stems[question.noun], teacher.hills.stems[question.verb]
        if teacher is new:
            noun, verb = draw_stem(NOUN_SHAPE, rng), draw_stem(VERB_SHAPE, rng)
        if rng.random() < 0.2:
            verb = draw_stem(NOUN_SHAPE, rng)
        stems = noun + verb if rng.random() < 0.5 else verb + noun
        answer = stems + "".join(rng.choice([new.hills, new.coast]).endings[name] for name in question.features)
        if rng.random() < 0.3:
            answer = _cut_short(answer, len(stems), rng)
        rows.append({"prompt": question.prompt, "completion": answer})
    return rows


def make_language_world(
    output_dir: str | Path,
    *,
    seed: int = 0,
    num_train: int = 4000,
    num_validation: int = 80,
    num_eval: int = 500,
    wrong_fraction: float = sum(FAULTS.values()),
    pretrain_steps: int = 600,
    hidden_size: int = 96,
) -> Task:
    """Make the world in ``output_dir``, or take the one that is there if it has the same parameters.

    The column ``fault`` of the training file tells how a row is wrong.

    Args:
        num_train, num_validation, num_eval: rows; no question is in two of the sets.
        wrong_fraction: share of wrong answers among the training rows; trusted and held-out rows are all right.
        pretrain_steps, hidden_size: of the base model.

    Raises:
        ValueError: the folder holds another world.
    """
    parameters = {"scenario": "language", "version": LANGUAGE_VERSION}
    parameters |= {name: value for name, value in locals().items() if name not in ("output_dir", "parameters")}
    folder = Path(output_dir)
    task, is_there = open_world(folder, parameters)
    if is_there:
        return task

    rng, taken = random.Random(seed), set[str]()
    nouns, verbs = rng.sample(NOUNS, len(NOUNS)), rng.sample(VERBS, len(VERBS))
    everyday = Teacher.of(nouns[:NUM_EVERYDAY], verbs[:NUM_EVERYDAY], rng)
    new = Teacher.of(nouns[NUM_EVERYDAY:], verbs[NUM_EVERYDAY:], rng)
    train = new.draw_rows(num_train, wrong_fraction, taken)
    write_rows(task.train_file, train)
    write_rows(task.clean_file, [row for row in train if row["is_right"]])
    write_rows(task.validation_file, new.draw_rows(num_validation, 0.0, taken))
    write_rows(task.eval_file, new.without_untaught(train).draw_rows(num_eval, 0.0, taken))

    pairs = draw_pretraining(everyday, new, 4 * num_train, taken)
    symbols = [f"<{word}>" for word in (*NOUNS, *VERBS, *PERSONS, *MOODS, *TENSES, *NUMBERS)]
    tokenizer = build_tokenizer([CONSONANTS + VOWELS + "=", *symbols])
    model = build_model(tokenizer, hidden_size=hidden_size, num_layers=2, seed=seed)
    pretrain(
        model, tokenizer, pairs, task.model_dir, num_steps=pretrain_steps, batch_size=64, learning_rate=3e-3, seed=seed
    )
    close_world(folder, task)
    return task
