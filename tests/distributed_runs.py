"""Runs that tests/test_distributed.py compares: the same script on one rank and, under torchrun, on two."""

import json
import os
import sys
from pathlib import Path

import torch
from conftest import ONE_TRIAL, PLAIN, lora, pairs, two_kinds
from datasets import Dataset, disable_progress_bars

from tamis import BilevelConfig, BilevelTrainer

# Plain gradient descent: Adam would blow rounding of tiny gradients up to whole steps. 19 rows: the last step of an
# epoch has fewer rows than the others, and of unlike numbers on the two ranks. A soft rule keeps rounding small.
COMMON = {"optim": "sgd", "learning_rate": 0.1, "num_train_epochs": 2.0}
REFINING = {"refine_fraction": 0.5, "refine_start": 0, "refine_every": 2, "num_generations": 2, "max_new_tokens": 4}
FOLLOWING = {"selector": "mirror", "selector_learning_rate": 0.1}
RUNS = {
    "scores follow the steps": FOLLOWING,
    "scouted": ONE_TRIAL,
    "tokens, accumulation": FOLLOWING | {"loss_reduction": "token", "gradient_accumulation_steps": 2},
    "tracked": FOLLOWING | {"reference": "tracked", "reference_learning_rate": 1e-4},
    "lora": FOLLOWING | {"peft_config": True},
    "refining": FOLLOWING | REFINING,
    "scouted, refining": ONE_TRIAL | REFINING,
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
    train, validation = pairs(10) + pairs(9, 50, wrong=True), pairs(6, 90)
    if args.selector == "scout":
        right, wrong, validation = two_kinds()
        train = right[:10] + wrong[:9]
    trainer = BilevelTrainer(
        model_dir,
        args,
        train_dataset=Dataset.from_list(train),
        validation_dataset=Dataset.from_list(validation),
        eval_dataset=Dataset.from_list(pairs(5, 100)),
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
        "p_right": weighting.row_weights.p_right_N().nan_to_num(-1).tolist(),
        "trials": weighting.outcome and [
            [t.evidence, t.criterion, t.error, *t.rank_V] for t in weighting.outcome.trials
        ],
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
