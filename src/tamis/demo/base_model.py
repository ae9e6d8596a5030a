"""A tiny base model for a demo or a benchmark: its tokenizer, its shape, and a moment of pretraining."""

import logging
import shutil
from collections.abc import Iterable
from pathlib import Path

from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

from tamis.training_progress import ProgressCallback, use_progress

logger = logging.getLogger(__name__)


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Characters, and `<...>` as one symbol; the vocabulary is what occurs in ``texts``, in sorted order."""
    splitter = pre_tokenizers.Split(Regex(r"<[^<>]*>|[^<]"), "isolated")
    symbols = {symbol for text in texts for symbol, _ in splitter.pre_tokenize_str(text)}
    vocabulary = {symbol: i for i, symbol in enumerate(["<pad>", "<eos>", "<unk>", *sorted(symbols)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Fuse()  # symbols are joined without spaces
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, *, hidden_size: int, num_layers: int, seed: int
) -> LlamaForCausalLM:
    """A Llama with random weights: 4 heads, MLP three times as wide as the model, tied embeddings, 128 positions."""
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


class PlainTrainer(SFTTrainer):
    """TRL's `SFTTrainer` that tells nobody about the run and shows one bar."""

    def _send_telemetry(self) -> None:
        pass

    def train_with_bar(self, title: str) -> None:
        """Train, with a progress bar of that name instead of printed logs."""
        use_progress(self, ProgressCallback(title))
        self.train()


def pretrain(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    pairs: list[dict[str, str]],
    model_dir: Path,
    *,
    num_steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> None:
    """Plain SFT of ``model`` on prompt and completion pairs, saved with its tokenizer to ``model_dir`` when done."""
    logger.info(f"pretraining the base model: {num_steps} steps")
    temporary = model_dir.with_name(model_dir.name + ".unfinished")
    args = SFTConfig(
        str(temporary),
        max_steps=num_steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        warmup_steps=min(100, num_steps // 4),
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        bf16=False,
        use_cpu=True,
        activation_checkpointing=False,
        gradient_checkpointing=None,  # type: ignore[arg-type]
        seed=seed,
    )
    trainer = PlainTrainer(model, args, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer)
    trainer.train_with_bar("pretraining the base model")
    trainer.save_model()
    shutil.rmtree(model_dir, ignore_errors=True)
    temporary.rename(model_dir)
