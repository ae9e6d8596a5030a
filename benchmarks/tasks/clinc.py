"""CLINC150 (Larson et al. 2019): what a user of an assistant wants, one of 150 intents.

Words and intents are symbols of their own. A wrong answer is any other intent.
"""

import json
import random
import re

from common import DATA

from tasks.pool import NUM_EVAL, NUM_TRAIN, NUM_TRUSTED_QUESTIONS, Pool, Question, read_by_halves

FOLDER = "clinc150"


def draw_pool(seed: int, *, num_train: int = NUM_TRAIN, pretrain_steps: int = 1000) -> Pool:
    """The kind of a question is its intent; the more words, the harder."""
    rng = random.Random(seed)
    data = json.loads((DATA / FOLDER / "data_full.json").read_text(encoding="utf-8"))
    intents = sorted({intent for _, intent in data["train"]})

    def ask(part: str, taken: set[str]) -> list[Question]:
        """A question for each utterance of a part that is not in ``taken`` (it is added)."""
        questions = []
        for utterance, intent in rng.sample(data[part], len(data[part])):
            words = re.findall(r"\w+|[^\w\s<>]", utterance)
            prompt = "".join(f"<{word}>" for word in words) + "="
            if prompt in taken:
                continue
            taken.add(prompt)
            wrong = rng.choice([other for other in intents if other != intent])
            questions.append(Question(prompt, f"<:{intent}>", f"<:{wrong}>", intent, len(words)))
        return questions

    taken: set[str] = set()
    held_out, trusted, train = (ask(part, taken) for part in ("test", "val", "train"))
    return Pool(
        name="clinc",
        seed=seed,
        train=train[:num_train],
        trusted=trusted[:NUM_TRUSTED_QUESTIONS],
        held_out=held_out[:NUM_EVAL],
        pretraining=read_by_halves(train[num_train:], rng),
        missing_kind="translate",
        pretrain_steps=pretrain_steps,
    )
