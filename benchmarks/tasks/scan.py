"""SCAN (Lake and Baroni 2018, the simple split): commands in English, actions as answers.

Words and actions are symbols of their own. A wrong answer has all of one kind of action replaced by another kind, or
is that of another command, as a coin says.
"""

import random
import re

from common import DATA

from tasks.pool import NUM_EVAL, NUM_TRAIN, NUM_TRUSTED_QUESTIONS, Pool, Question, read_by_halves

FOLDER = "scan"
ACTIONS = ("I_WALK", "I_LOOK", "I_RUN", "I_JUMP", "I_TURN_LEFT", "I_TURN_RIGHT")


def read(name: str) -> list[tuple[str, list[str]]]:
    """Commands and their actions; no command is there twice."""
    text = (DATA / FOLDER / f"tasks_{name}_simple.txt").read_text(encoding="utf-8")
    return [(command, actions.split()) for command, actions in re.findall(r"^IN: (.*) OUT: (.*)$", text, re.MULTILINE)]


def swap_action(actions: list[str], rng: random.Random) -> list[str]:
    """One kind of action, wherever it is, replaced by another one."""
    old = rng.choice(sorted(set(actions)))
    new = rng.choice([action for action in ACTIONS if action != old])
    return [new if action == old else action for action in actions]


def wrong_actions(actions: list[str], others: list[list[str]], rng: random.Random) -> list[str]:
    """Other actions than the right ones."""
    if rng.random() < 0.5:
        return swap_action(actions, rng)
    while (candidate := rng.choice(others)) == actions:
        pass
    return candidate


def draw_pool(seed: int, *, num_train: int = NUM_TRAIN, pretrain_steps: int = 300) -> Pool:
    """The kind of a question is whether it says `jump`; the more actions, the harder."""
    rng = random.Random(seed)
    train, test = read("train"), read("test")
    rng.shuffle(train)
    others = [actions for _, actions in train]

    def ask(command: str, actions: list[str]) -> Question:
        prompt = "".join(f"<{word}>" for word in command.split()) + "="
        wrong = wrong_actions(actions, others, rng)
        right_text, wrong_text = ("".join(f"<{action}>" for action in part) for part in (actions, wrong))
        return Question(prompt, right_text, wrong_text, "jump" if "jump" in command else "other", len(actions))

    questions = [ask(*row) for row in train]
    num_taken = num_train + NUM_TRUSTED_QUESTIONS
    return Pool(
        name="scan",
        seed=seed,
        train=questions[:num_train],
        trusted=questions[num_train:num_taken],
        held_out=[ask(*row) for row in rng.sample(test, NUM_EVAL)],
        pretraining=read_by_halves(questions[num_taken:], rng),
        missing_kind="jump",
        pretrain_steps=pretrain_steps,
    )
