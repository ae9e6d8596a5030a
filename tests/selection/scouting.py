"""What the tests of scouting share: rows that can be told apart, and a scout beside a trainer."""

import torch
from conftest import plain_loss, two_kinds

from tamis.selection.scout import Scout, ScoutSettings

RIGHT, WRONG, TRUSTED = two_kinds()


def scout_of(trainer, keep=False) -> Scout:
    scout = Scout(trainer.model, trainer.batches, batch_size=8, keep=keep, show_progress=False)
    scout.remember_base()
    return scout


def settings_of(trainer, **settings) -> ScoutSettings:
    defaults = {
        "learning_rates": (1e-2,),
        "num_steps": (6,),
        "betas": (0.9, 0.999),
        "epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "batch_size": 4,
        "num_micro_batches": trainer.args.gradient_accumulation_steps,
        "seed": 0,
    }
    return ScoutSettings(**defaults | settings)


def losses_one_by_one(model, dataset) -> torch.Tensor:
    """Without a batch, and without TRL's fused head."""
    was_training = model.training
    model.eval()
    losses = torch.stack([plain_loss(model, row["input_ids"], row["labels"]) for row in dataset]).detach()
    model.train(was_training)
    return losses
