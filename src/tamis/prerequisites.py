"""What a run needs besides its rows: packages, a login to the hub, a folder to write to, and a model that is there.

Checked before anything is loaded, so that a mistake is known in a moment.
"""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils._validators import validate_repo_id
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl import ModelConfig, SFTConfig

from tamis._compat import INTEGRATIONS
from tamis.trl_options import refuse_out_of_range

# By part of the name of an optimizer: the package that has it.
_OPTIMIZERS = {
    "bnb": "bitsandbytes",
    "8bit": "bitsandbytes",
    "paged": "bitsandbytes",
    "ademamix": "bitsandbytes",
    "galore": "galore-torch",
    "apollo": "apollo-torch",
    "schedule_free": "schedulefree",
    "4bit": "torchao",
    "stable_adamw": "torch-optimi",
}
# Where the package is imported by another name than it is installed by.
_MODULES = {"torch-optimi": "optimi", "azureml": "azureml.core", "neptune": "neptune"}
# What every model may have; a kernel of the hub has a slash in its name, and a variant of them a bar.
_ATTENTION = ("eager", *sorted(name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in name))
_MODEL_FILES = ("config.json", "adapter_config.json")
_TIMEOUT = 10.0  # seconds, for one question to the hub


def check_prerequisites(args: SFTConfig, model_args: ModelConfig) -> None:
    """Refuse a run whose numbers cannot be meant, or whose packages, login or folder are missing.

    Raises:
        ValueError: with the remedy.
    """
    refuse_out_of_range(args)  # again when the rows are there; reading them may take a while
    refuse_out_of_range(model_args)
    for flag, package in _packages(args, model_args):
        if not is_installed(package):
            raise ValueError(f"{flag} needs the package {package}: pip install {package}")
    if args.push_to_hub and not (args.hub_token or get_token()):
        raise ValueError("`push_to_hub` needs a login: run `hf auth login`, or set HF_TOKEN")
    template = args.chat_template_path
    if template and template.endswith((".jinja", ".j2")) and not Path(template).is_file():
        raise ValueError(f"{template}: no such file. Check `chat_template_path`")
    _refuse_output_dir(str(args.output_dir))


def _refuse_output_dir(output_dir: str) -> None:
    if not output_dir:
        raise ValueError("`output_dir` is empty: name a folder")
    path = Path(output_dir)
    nearest = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not nearest.is_dir():
        raise ValueError(f"{nearest} is a file: choose another `output_dir`")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"{nearest} cannot be written to: choose another `output_dir`")


def _packages(args: SFTConfig, model_args: ModelConfig) -> Iterator[tuple[str, str]]:
    """Each flag that needs a package that tamis does without, and the package."""
    for name in [args.report_to] if isinstance(args.report_to, str) else args.report_to or []:
        if name not in ("all", "none", *INTEGRATIONS):
            raise ValueError(f"unknown report_to '{name}': choose from none, all, {', '.join(sorted(INTEGRATIONS))}")
        if name in INTEGRATIONS:
            yield f"`report_to={name}`", {"comet_ml": "comet-ml"}.get(name, name)
    for flag in ("load_in_4bit", "load_in_8bit"):
        if getattr(model_args, flag):
            yield f"`{flag}`", "bitsandbytes"
    optimizer = str(getattr(args.optim, "value", args.optim))
    for part, package in _OPTIMIZERS.items():
        if part in optimizer:
            yield f"`optim={optimizer}`", package
            break
    if args.use_liger_kernel:
        yield "`use_liger_kernel`", "liger-kernel"
    if args.deepspeed:
        yield "`deepspeed`", "deepspeed"
    attention = model_args.attn_implementation or ""
    if attention and "/" not in attention and "|" not in attention and attention not in _ATTENTION:
        raise ValueError(
            f"unknown attn_implementation '{attention}': choose from {', '.join(_ATTENTION)}, or a kernel of the hub"
        )
    is_flash = attention.startswith("flash_attention_2") and not is_installed("flash-attn")
    if is_flash or "/" in attention:  # the second is a name of the hub
        yield f"`attn_implementation={attention}`", "kernels"


def is_installed(package: str) -> bool:
    """Whether a package, by the name that pip knows it under, can be imported."""
    module = _MODULES.get(package, package.replace("-", "_"))
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that the module is part of
        return False


def find_model(name: str) -> str:
    """The model as `transformers` takes it: the absolute path of a folder, or a hub name as it is.

    Absolute, because an adapter notes the path of its base model, and may be loaded from elsewhere. A name is taken for
    that of a folder where it cannot be one of the hub, or where the folder above it is there.

    Raises:
        ValueError: no such folder, it holds no model, or it is no name that the hub could have.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not any((path / file).is_file() for file in _MODEL_FILES):
            raise ValueError(f"{name}: a folder without {' or '.join(_MODEL_FILES)}. Check `model_name_or_path`")
        return str(path.absolute())
    if path.is_file():
        raise ValueError(f"{name} is a file: give the folder of the model to `model_name_or_path`")
    is_local = name.startswith((".", "~")) or path.is_absolute() or name.count("/") > 1 or name.endswith("/")
    if is_local or ("/" in name and path.parent.is_dir()):
        raise ValueError(f"{name}: no such folder. Check `model_name_or_path`")
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ValueError(
            f"{name!r}: no such folder, nor a name that the hub could have. Check `model_name_or_path`"
        ) from None
    return name


def refuse_unreachable(model: Any, args: SFTConfig) -> None:
    """Refuse a model that is not there. The hub is asked once; loading would ask for half a minute.

    Args:
        model: a name, or anything else, which is let pass.

    Raises:
        ValueError: see `find_model`; or the hub has no such model, does not give it to this user, or does not answer.
    """
    if not isinstance(model, str) or Path(find_model(model)).is_dir():
        return
    loading = args.model_init_kwargs
    revision = loading.get("revision") if isinstance(loading, dict) else None
    cached = [try_to_load_from_cache(model, file, revision=revision or "main") for file in _MODEL_FILES]
    if any(isinstance(file, str) for file in cached):
        return
    try:
        HfApi().model_info(model, revision=revision, timeout=_TIMEOUT)
    except GatedRepoError:
        problem = "its owner grants access on its page; then run `hf auth login`"
    except RepositoryNotFoundError:
        problem = "no such folder, nor a model of the hub that you may read; check `model_name_or_path`"
    except HfHubHTTPError:
        return  # whatever that is, loading will tell
    except Exception as error:  # no network, in the dozen kinds that there are
        problem = f"no such folder, and the hub cannot be reached ({type(error).__name__})"
    else:
        return
    raise ValueError(f"{model}: {problem}")
