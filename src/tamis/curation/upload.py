"""Upload of selected rows to a data set of the hub, as the files that were written."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from tamis.settings import warn_without_effect


def check_upload(dataset_id: str | None, is_private: bool | None, token: str | None) -> None:
    """Check before rows are read that an upload can work.

    Raises:
        ValueError: the name cannot be one of the hub, or there is no login.
    """
    if dataset_id is None:
        given = {"hub_private_repo": is_private, "hub_token": token}
        names = [name for name, value in given.items() if value is not None]
        warn_without_effect(names, {"hub_dataset_id is not set": names})
        return
    try:
        validate_repo_id(dataset_id)
    except HFValidationError as error:
        raise ValueError(f"{dataset_id!r} is no name of the hub: `hub_dataset_id` takes USER/NAME") from error
    if not (token or get_token()):
        raise ValueError("`hub_dataset_id` needs a login: run `hf auth login`, or set HF_TOKEN")


def upload(folder: Path, names: Sequence[str], arguments: Any) -> str:
    """Upload files of a folder, and nothing else that is there; returns the address of the data set.

    Args:
        names: of the files, or of folders that are saved data sets.
        arguments: see `tamis.curation.select.SelectArguments`.

    Raises:
        ValueError: the hub refuses or cannot be reached. The files stay where they are.
    """
    api = HfApi(token=arguments.hub_token)
    patterns = [f"{name}/**" if (folder / name).is_dir() else name for name in names]
    try:
        repo = api.create_repo(
            arguments.hub_dataset_id, repo_type="dataset", private=arguments.hub_private_repo, exist_ok=True
        )
        api.upload_folder(
            repo_id=repo.repo_id,
            repo_type="dataset",
            folder_path=folder,
            allow_patterns=patterns,
            commit_message="Rows selected by tamis",
        )
    except (HfHubHTTPError, OSError) as error:
        problem = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"the rows are in {folder}, but the upload to {arguments.hub_dataset_id} failed ({problem}). Upload the "
            "folder by `hf upload` when that is mended"
        ) from error
    return str(repo)
