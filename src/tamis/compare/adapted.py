"""The base model after a descent, as rivals score by it: of the validation rows, or of some training rows.

Afterwards the model is what it was. All that is needed is a trainer that has not trained yet.

Shape suffixes: R prepared training rows, V prepared validation rows.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import TrainerCallback

from tamis.config import BilevelConfig
from tamis.randomness import permutation, seeded
from tamis.selection.scout import descend, make_settings, put_back, scout_lengths
from tamis.trainer import BilevelTrainer
from tamis.training_progress import ProgressCallback, use_progress

# LESS (arXiv 2402.04333): a random 5% of the rows, four epochs.
_WARM_UP_SHARE, _WARM_UP_EPOCHS = 0.05, 4
AtEpochEnd = Callable[[torch.optim.Optimizer, float], None]


@contextmanager
def adapted_to_validation(trainer: BilevelTrainer) -> Iterator[None]:
    """Within it the model has descended the validation rows alone.

    AdamW at the constant learning rate of the run, as many steps as the longest scout of tamis: 2,000 rows are seen,
    none more than 40 times.
    """
    args, batches = trainer.args, trainer.batches
    assert batches.validation is not None, "the trainer has validation rows"
    batch_size = args.per_device_train_batch_size
    num_steps = scout_lengths(len(batches.validation), batch_size * args.gradient_accumulation_steps, None)[-1:]
    settings = make_settings(args, (args.learning_rate,), num_steps, batch_size)
    with put_back(trainer.model), seeded(args.seed, trainer.accelerator.device):
        steps = descend(
            trainer.model, batches, batches.validation.ids, settings,
            learning_rate=args.learning_rate, num_steps=num_steps,
            title="" if args.disable_tqdm else "adapting to the validation rows",
        )  # fmt: skip
        list(steps)
        yield


@contextmanager
def warmed_up(trainer: BilevelTrainer, at_epoch_end: AtEpochEnd = lambda *_: None) -> Iterator[None]:
    """Within it the model has been trained on a random 5% of the training rows for four epochs, as LESS does.

    Optimizer, schedule and batches are those of the run.

    Args:
        at_epoch_end: called with the optimizer and the mean learning rate of the epoch. The model of ``trainer`` is
            then that of the checkpoint.
    """
    rows = trainer.weighting.train_rows
    chosen = permutation(len(rows), trainer.args.seed, epoch=0, level=0)[: max(round(_WARM_UP_SHARE * len(rows)), 1)]
    given = trainer.args.given_settings
    quiet: dict[str, Any] = dict.fromkeys(("eval_strategy", "save_strategy", "logging_strategy"), "no")
    quiet |= {"report_to": "none", "load_best_model_at_end": False, "push_to_hub": False, "model_init_kwargs": None}
    length = {"num_train_epochs": _WARM_UP_EPOCHS, "max_steps": -1}
    with TemporaryDirectory() as folder, put_back(trainer.model), seeded(trainer.args.seed, trainer.accelerator.device):
        settings = given | quiet | length | {"output_dir": folder, "selector": "none", "rho": 0.0, "rho_start": None}
        warm = BilevelTrainer(
            trainer.model,
            BilevelConfig(**settings),
            train_dataset=rows.select(chosen.tolist()),
            processing_class=trainer.processing_class,
        )
        use_progress(warm, ProgressCallback("warming up"))
        warm.add_callback(_Epochs(at_epoch_end))
        warm.train()
        yield


class _Epochs(TrainerCallback):
    """Calls back at the end of every epoch."""

    def __init__(self, at_epoch_end: AtEpochEnd):
        self.at_epoch_end = at_epoch_end
        self.rates: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any) -> None:
        self.rates.append(lr_scheduler.get_last_lr()[0])

    def on_epoch_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.at_epoch_end(optimizer, sum(self.rates) / len(self.rates))
        self.rates = []
