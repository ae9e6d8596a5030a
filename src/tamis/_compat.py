"""The only imports from libraries that they do not promise to keep, in one place."""

from accelerate.data_loader import prepare_data_loader  # not exported at top level; documented
from trl.data_utils import is_conversational, maybe_convert_to_chatml

__all__ = ["is_conversational", "maybe_convert_to_chatml", "prepare_data_loader"]
