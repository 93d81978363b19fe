"""Values in the names of folders, as Hive, Spark and others write partitions: split=train/year=2020/part-0.parquet."""

from collections.abc import Sequence
from urllib.parse import unquote


def hive_columns(folders: Sequence[str]) -> dict[str, list[str | None]]:
    """Return the values that folder names give as Hive writes them, e.g. "split=train/year=2020".

    Args:
        folders: paths of folders, relative to the root.

    Returns:
        For each key, its value for each of the folders; None where a folder has none, or Hive's name for none.
    """
    found: dict[str, list[str | None]] = {}
    for place, folder in enumerate(folders):
        for part in folder.split("/") if "=" in folder else ():
            key, equals, value = part.partition("=")
            if equals and key:
                values = found.setdefault(key, [None] * len(folders))
                values[place] = None if value == "__HIVE_DEFAULT_PARTITION__" else unquote(value)
    return found
