"""`ResumableTrainer`: what `transformers` begins anew when a run goes on from a checkpoint goes on here."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTTrainer

from tamis.files import writing


class ResumableTrainer(SFTTrainer):
    """An [`~trl.SFTTrainer`] whose steps, evaluations and log lines are the same whether or not it was interrupted.

    Attributes:
        resumed_log: `log_state` of the checkpoint that the run goes on from; taken up when training begins.
    """

    model: Any
    resumed_log: dict[str, Tensor] = {}

    def log_state(self) -> dict[str, Tensor]:
        """What the next log line will be made of: losses and metrics of the steps since the last one."""
        metrics = {name: torch.tensor(values, dtype=torch.float64) for name, values in self._metrics["train"].items()}
        loss = self.accelerator.gather(self._tr_loss).mean()
        return {**metrics, "tr_loss": loss, "step": torch.tensor(self._globalstep_last_logged)}

    def _take_up_log(self) -> None:
        log, self.resumed_log = dict(self.resumed_log), {}
        if not log:
            return
        self._globalstep_last_logged = int(log.pop("step"))
        self._tr_loss.copy_(log.pop("tr_loss"))
        self._total_loss_scalar -= self._tr_loss.item()  # that is of this process alone
        self._metrics["train"] |= {name: tensor.tolist() for name, tensor in log.items()}

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        self._take_up_log()
        if self.state.global_step >= self.state.max_steps:  # transformers would take one step more
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """The last line is that of a training, whether or not there was a step to make, or an evaluation after it."""
        self._take_up_log()
        self.model.train()
        return super()._finalize_training(*args, **kwargs)

    def _evaluate(self, trial: Any, ignore_keys: Any, skip_scheduler: bool = False) -> dict[str, float]:
        """Only the evaluation at the start of a run skips the scheduler; one that goes on has had it."""
        has_had_it = skip_scheduler and self.state.global_step > 0
        return {} if has_had_it else super()._evaluate(trial, ignore_keys, skip_scheduler)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """One of this step may be there, of an earlier attempt: while its files are replaced it is not complete."""
        folder = Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        with writing(folder):
            super()._save_checkpoint(model, trial)
