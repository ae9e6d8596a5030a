"""The only imports from libraries that they do not promise to keep, in one place."""

from accelerate.data_loader import prepare_data_loader  # documented, but not exported at top level

__all__ = ["prepare_data_loader"]
