"""A long run: memory, open files and the time of a step over 20,000 steps of refining.

    python benchmarks/long_run.py --output_dir runs/long_run [--num_steps 20000] [--quick]

A Llama of 0.05M parameters, 400 rows of which half are wrong, batches of 4 and one trusted row, new responses twenty
times, a log line every 50 steps, an evaluation and a checkpoint every tenth of the run. `memory_mb`, `num_files`: of
the process, at the end of each tenth; `step_ms`: the processor's time of a step, mean over the tenth without
evaluations, checkpoints and generation. `memory_growth` is from the end of the second tenth to that of the last: the
first has scouting and the first of everything. `time_growth` is that of the step from the second to the last.
"""

import time
from pathlib import Path
from typing import Any

import psutil
import torch
from common import finish, make_parser, random_model
from datasets import Dataset
from tokenizers.pre_tokenizers import Split
from transformers import TrainerCallback

from tamis import BilevelConfig, BilevelTrainer

SYMBOLS = "0123456789=abcdefghij"


class Watch(TrainerCallback):
    """What the process has and takes, tenth by tenth."""

    def __init__(self, num_steps: int) -> None:
        self.tenth, self.rows = num_steps // 10, list[dict[str, Any]]()
        self.began, self.seconds = 0.0, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step begins; its responses are there."""
        self.began = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step ends."""
        self.seconds += time.process_time() - self.began
        if state.global_step % self.tenth == 0:
            process = psutil.Process()
            found = {"step": state.global_step, "memory_mb": process.memory_info().rss / 2**20}
            found |= {"num_files": process.num_fds(), "step_ms": 1000 * self.seconds / self.tenth}
            self.rows.append(found)
            self.seconds = 0.0
            print(found, flush=True)


def make_model(folder: Path) -> str:
    """The model, which ends a response with any letter, and its tokenizer, one token a character."""
    model = random_model(
        folder, SYMBOLS, Split("", "isolated"),
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model.generation_config.eos_token_id = list(range(1, model.config.vocab_size, 2))
    model.save_pretrained(folder)
    return str(folder)


def make_rows(first: int, num_rows: int, letter: str) -> list[dict[str, str]]:
    """Numbers, each answered by one letter, up to three times."""
    return [{"prompt": f"{i * 37 % 1000}=", "completion": letter * (1 + i % 3)} for i in range(first, first + num_rows)]


def main() -> None:
    parser = make_parser(__doc__, quick="200 steps: shows that it runs", seeds=())
    parser.add_argument("--num_steps", type=int, default=20_000)
    arguments = parser.parse_args()
    num_steps = 200 if arguments.quick else arguments.num_steps
    torch.set_num_threads(1)
    args = BilevelConfig(
        output_dir=str(arguments.output_dir / "run"), overwrite_output_dir=True, max_steps=num_steps, use_cpu=True,
        bf16=False, activation_checkpointing=False, report_to=[], disable_tqdm=True, learning_rate=1e-4,
        per_device_train_batch_size=4, refine_fraction=0.5, num_generations=2, refine_every=0.05, max_new_tokens=8,
        logging_steps=50, eval_strategy="steps", eval_steps=num_steps // 10, save_steps=num_steps // 10,
        save_total_limit=2, scout_learning_rate=1e-2, scout_epochs=8,
    )  # fmt: skip
    right, wrong = make_rows(0, 200, "b"), make_rows(200, 200, "d")
    trainer = BilevelTrainer(
        make_model(arguments.output_dir / "model"),
        args,
        train_dataset=Dataset.from_list(right + wrong),
        validation_dataset=Dataset.from_list(make_rows(400, 40, "b")),
        eval_dataset=Dataset.from_list(make_rows(440, 40, "b")),
    )
    watch = Watch(num_steps)
    trainer.add_callback(watch)
    trainer.train()
    early, last = watch.rows[1], watch.rows[-1]
    growth = {f"{what}_growth": [last[name] / early[name] - 1] for what, name in
              (("memory", "memory_mb"), ("time", "step_ms"))}  # fmt: skip
    finish(arguments, watch.rows, growth | {"more_files": [float(last["num_files"] - early["num_files"])]})


if __name__ == "__main__":
    main()
