"""Runs that tests/test_distributed.py compares: the same script on one rank and, under torchrun, on two."""

import json
import os
import sys
from pathlib import Path

import torch
from conftest import PLAIN, lora, pairs
from datasets import Dataset, disable_progress_bars

from tamis import BilevelConfig, BilevelTrainer

# Plain gradient descent: Adam would blow rounding of tiny gradients up to whole steps. 19 rows: the last step of an
# epoch has fewer rows than the others, and of unlike numbers on the two ranks. A soft rule keeps rounding small.
COMMON = {"optim": "sgd", "learning_rate": 0.1, "num_train_epochs": 2.0, "selector_learning_rate": 0.1}
REFINING = {"refine_fraction": 0.5, "refine_start": 0, "refine_every": 2, "num_generations": 2, "max_new_tokens": 4}
RUNS = {
    "scores follow the steps": {"scout_ratio": 0.0},
    "scouted": {"scout_ratio": 0.5, "scout_learning_rate": 1e-3},
    "tokens, accumulation": {"scout_ratio": 0.0, "loss_reduction": "token", "gradient_accumulation_steps": 2},
    "tracked": {"reference": "tracked", "reference_learning_rate": 1e-4},
    "lora": {"scout_ratio": 0.0, "peft_config": True},
    "refining": {"scout_ratio": 0.0, **REFINING},
}
METRICS = (
    "loss", "grad_norm", "training_loss", "weighted_training_loss", "validation_loss", "penalty_gap", "rho", "ess",
    "ess_ratio", "weight_entropy", "num_tokens", "eval_loss",
)  # fmt: skip


def run(model_dir: str, folder: Path, global_batch_size: int, settings: dict) -> dict:
    """What a run leads to, as far as it should not depend on the number of ranks."""
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    backend = {"ddp_backend": "gloo"} if num_ranks > 1 else {}
    settings = COMMON | {"per_device_train_batch_size": global_batch_size // num_ranks} | settings
    peft_config = lora() if settings.pop("peft_config", False) else None
    torch.manual_seed(0)
    args = BilevelConfig(output_dir=str(folder), **PLAIN | settings, eval_strategy="epoch", **backend)
    trainer = BilevelTrainer(
        model_dir,
        args,
        train_dataset=Dataset.from_list(pairs(10) + pairs(9, 50, wrong=True)),
        validation_dataset=Dataset.from_list(pairs(6, 90)),
        eval_dataset=Dataset.from_list(pairs(5, 70)),
        peft_config=peft_config,
    )
    trainer.train()
    weighting = trainer.weighting
    return {
        "num_ranks": trainer.args.world_size,
        "history": [{n: line[n] for n in METRICS if n in line} for line in trainer.state.log_history],
        "scores": weighting.row_weights.all_scores().tolist(),
        "weights": weighting.row_weights.all_weights().tolist(),
        "num_updates": weighting.row_weights.num_updates_N.tolist(),
        "parameters": {n: p.tolist() for n, p in trainer.model.named_parameters() if p.requires_grad},
        "evidence": weighting.evidence and [weighting.evidence.criterion, weighting.evidence.error],
        "responses": weighting.refiner and {
            i: [r.token_ids for r in row.responses] for i, row in weighting.refiner.buffer.rows.items()
        },
    }  # fmt: skip


if __name__ == "__main__":
    model_dir, folder = sys.argv[1], Path(sys.argv[2])
    disable_progress_bars()
    for name, settings in RUNS.items():
        found = run(model_dir, folder / name, 4, settings)
        rank = os.environ.get("RANK", "0")
        (folder / f"{name}.{rank}.json").write_text(json.dumps(found))
