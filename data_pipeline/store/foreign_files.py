"""The names of `bounded.files` for rooms that have not moved to it yet."""

from data_pipeline.bounded.files import open_regular, read_small_file

__all__ = ["open_regular", "read_small_file"]
