"""Whose an output directory is: of one process at a time, of one run, and of a user whose files nobody overwrites."""

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard import metadata_load

from tamis.files import remove_temporaries, write_atomically, writing

logger = logging.getLogger(__name__)

SCOUT_TRIALS = "scout_trials.safetensors"
LOCK_FILE = "_tamis.lock"  # an upload to the hub leaves out what begins so
CONFIG_FILES = ("config.yaml", "tamis_config.yaml")  # the second where the first is the user's
CARD_FILES = ("README.md", "MODEL_CARD.md")
_KEPT_CARD = ".README.md.kept"  # the user's, while a library writes its own
EXAMPLE = "inference_example.py"
_RUN_FILES = (
    "metrics.jsonl", "refinements.parquet", "weights.parquet", "skipped_rows.jsonl", "scout.json",
    "scout_scores.parquet", "scout.safetensors", SCOUT_TRIALS,
)  # fmt: skip
_WRITTEN_FILES = (
    *_RUN_FILES, "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja", "training_args.bin", EXAMPLE,
)  # fmt: skip
_MODEL_FILES = (
    "model*.safetensors",
    "adapter_model.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
)
_held: dict[Path, int] = {}


# --- one process at a time --------------------------------------------------------------------------------------------


@contextmanager
def claimed(output_dir: str | Path) -> Iterator[None]:
    """Within it no other process may claim the directory, which is made if needed; the kernel ends it with the process.

    What a process that was killed has left in the middle of a write is cleared away.

    Raises:
        ValueError: another process writes there.
    """
    path = Path(output_dir).resolve() / LOCK_FILE
    if path in _held:
        yield
        return
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _held[path] = file = _lock(path)
    try:
        _clear_away(path.parent)
        yield
    finally:
        del _held[path]
        path.unlink(missing_ok=True)
        os.close(file)


def _clear_away(folder: Path) -> None:
    for written in (folder, *folder.glob("checkpoint-*/")):
        remove_temporaries(written)
    if (kept := folder / _KEPT_CARD).is_file():
        os.replace(kept, folder / CARD_FILES[0])


def refuse_busy(output_dir: str | Path) -> None:
    """Say early, before a model is loaded, what `claimed` would say; writes nothing.

    Raises:
        ValueError: another process writes there.
    """
    path = Path(output_dir).resolve() / LOCK_FILE
    if path not in _held and path.is_file():
        os.close(_lock(path))


def _lock(path: Path) -> int:
    """An open file with the lock on it. One of `fcntl.lockf`: it works on NFS, and forked workers do not inherit it."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            owner = os.read(file, 20).decode() or "unknown"
            os.close(file)
            raise ValueError(
                f"{path.parent} is in use by another run (process {owner}): wait for it, or choose another `output_dir`"
            ) from error
        except OSError as error:
            logger.warning(
                f"{path.parent} cannot be locked ({error.strerror}): see to it that no other run writes there"
            )
            return file
        if path.exists() and os.path.samestat(os.fstat(file), os.stat(path)):
            try:
                os.ftruncate(file, 0)
                os.pwrite(file, str(os.getpid()).encode(), 0)
            except OSError:
                path.unlink()
                os.close(file)
                raise
            return file
        os.close(file)  # its owner has removed it in between


# --- one run ----------------------------------------------------------------------------------------------------------


def refuse_earlier_run(output_dir: str | Path) -> None:
    """Check that a new run would not write over another, nor over files of the user.

    Raises:
        ValueError: metrics of a step, checkpoints or a model are there; or files with the names of those that a run
            writes, and no configuration of a run.
    """
    folder = Path(output_dir)
    has_stepped = any(record.get("step") for record in read_metrics(folder))
    has_saved = any(next(folder.glob(trace), None) for trace in ("checkpoint-*", *_MODEL_FILES))
    if has_stepped or has_saved or finished_step(folder) is not None:
        raise ValueError(
            f"{output_dir} holds a run already: choose another `output_dir`, go on with `resume_from_checkpoint`, "
            "or replace it with `overwrite_output_dir=True`"
        )
    if _is_our_config(config_path(folder)):
        return  # they are of a run that has ended before its first step
    if found := [name for name in _WRITTEN_FILES if (folder / name).exists()]:
        raise ValueError(
            f"{output_dir} holds {found[0]}, which a run would write over: move it, choose another `output_dir`, or "
            "replace it with `overwrite_output_dir=True`"
        )


def remove_earlier_run(output_dir: str | Path, *, keeps_trials: bool) -> None:
    """Remove what a run of tamis has left, so that nothing of it is taken for a part of the next; other files stay.

    Args:
        keeps_trials: what its scouts have measured stays, for a run that scouts in the same way.
    """
    folder = Path(output_dir)
    for checkpoint in folder.glob("checkpoint-*"):
        if (checkpoint / "tamis.safetensors").is_file() or (checkpoint / "trainer_state.json").is_file():
            shutil.rmtree(checkpoint)
    is_of_tamis = _is_our_config(config_path(folder))
    for pattern in (*_RUN_FILES, *(_MODEL_FILES if is_of_tamis else ())):
        for path in folder.glob(pattern):
            if not (keeps_trials and path.name == SCOUT_TRIALS):
                path.unlink()


def mark_finished(output_dir: str | Path, step: int) -> None:
    """Note in the run's configuration that its model is saved, after ``step`` optimizer steps."""
    path = config_path(output_dir)
    if _is_our_config(path):  # nobody has edited it in the meantime
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        config["run_info"]["finished_step"] = step
        write_config(path, config)


def finished_step(output_dir: str | Path) -> int | None:
    """The optimizer steps after which the run was finished and its model saved; None where it was not."""
    return _run_info(config_path(output_dir)).get("finished_step")


def was_cut_short(output_dir: str | Path) -> bool:
    """Whether a run of tamis has begun there and did not come to its end."""
    return "finished_step" not in (_run_info(config_path(output_dir)) or {"finished_step": None})


def read_metrics(output_dir: str | Path) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl`, as far as they are whole; none where there is no such file."""
    path, records = Path(output_dir) / "metrics.jsonl", list[dict[str, Any]]()
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:  # the last line, while it is written or where a kill has cut it
            break
    return records


# --- files of the user ------------------------------------------------------------------------------------------------


def config_path(output_dir: str | Path) -> Path:
    """Where the configuration of the run belongs: `config.yaml`, unless a user has put one there."""
    path = Path(output_dir) / CONFIG_FILES[0]
    return path if not path.exists() or _is_our_config(path) else path.with_name(CONFIG_FILES[1])


def write_config(path: Path, config: dict[str, Any]) -> None:
    """Write YAML in the form by which `config_path` knows our own."""
    write_atomically(path, lambda temporary: temporary.write_text(_as_yaml(config), encoding="utf-8"))


@contextmanager
def users_card_kept(output_dir: str | Path) -> Iterator[None]:
    """Within it TRL and PEFT write `README.md`: where there is one of the user, theirs becomes `MODEL_CARD.md`."""
    card, ours = (Path(output_dir) / name for name in CARD_FILES)
    if not card.is_file() or _is_our_card(card):
        yield
        return
    aside = card.with_name(_KEPT_CARD)
    os.replace(card, aside)
    try:
        yield
    finally:
        if card.exists():
            os.replace(card, ours)
        os.replace(aside, card)


def announce_users_files(output_dir: str | Path) -> None:
    """Warn where files of the user keep their names, and ours get others."""
    for names, is_ours in ((CONFIG_FILES, _is_our_config), (CARD_FILES, _is_our_card)):
        path = Path(output_dir) / names[0]
        if path.is_file() and not is_ours(path):
            logger.warning(f"{path} was not written by tamis and stays as it is: ours is called {names[1]}")


def _run_info(path: Path) -> dict[str, Any]:
    """What a configuration tells of its run; nothing where it was not written by tamis, or was edited since."""
    try:
        text = path.read_text(encoding="utf-8")
        config = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    is_ours = isinstance(config, dict) and isinstance(config.get("run_info"), dict) and text == _as_yaml(config)
    return config["run_info"] if is_ours else {}


def _as_yaml(config: dict[str, Any]) -> str:
    return str(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))


def _is_our_config(path: Path) -> bool:
    return bool(_run_info(path))


def _is_our_card(path: Path) -> bool:
    """TRL and PEFT tag the cards that they write with the names of the trainer; a kill may leave an empty one."""
    if path.stat().st_size == 0:
        return True
    try:
        return "tamis" in ((metadata_load(path) or {}).get("tags") or ())
    except (ValueError, yaml.YAMLError):
        return False
