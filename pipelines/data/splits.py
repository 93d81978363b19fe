"""Recognise the splits of a data set by the names of its folders and files, so that they are never mixed unasked.

The rules are those of Hugging Face's `datasets`: a word such as "train" names a split if it is a whole name, or stands
between the ends of a name, digits and `-`, `.`, `_` or spaces: train/cat/1.jpg, val2017/1.jpg, data/test-0001.parquet.
"""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from litevae.errors import UserError
from pipelines.data.config import Source
from pipelines.data.discovery import File, Found
from pipelines.data.left_out import LeftOut
from pipelines.runtime.logs import say

ALL = "all"
OTHER_SPLITS = "of other splits"
# Several words for one split, by the name that stands for them.
_SAME = {"training": "train", "testing": "test", "val": "validation", "valid": "validation", "evaluation": "eval"}
_WORDS = "training|train|testing|test|validation|valid|val|dev|evaluation|eval"
_BETWEEN = r"[-._ 0-9=]"  # with Hive's "=": split=train
_NAMED = re.compile(rf"(?:^|{_BETWEEN})({_WORDS})(?=$|{_BETWEEN})", re.IGNORECASE)
_NUMBERED = re.compile(r"(?:^|/)(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*$")  # train-00000-of-00002.parquet: any word


def split_of(path: str, folders_only: bool = False) -> str:
    """Return the split that a path is in; "" if no name in it is that of a split.

    The name of a file counts if it is numbered as train-00000-of-00002; else the topmost folder that names a split
    counts, else the name of the file.

    Args:
        path: relative to the root of the source.
        folders_only: whether file names don't count, because each is the name of one image.
    """
    folder, _, name = path.rpartition("/")
    if not folders_only and (numbered := _NUMBERED.search(path)):
        return canonical(numbered[1])
    for part in [*folder.split("/"), *([] if folders_only else [name])]:
        if named := _NAMED.search(part):
            return canonical(named[1])
    return ""


def canonical(split: str) -> str:
    """Return the name that stands for a split, e.g. "validation" for "val"."""
    return _SAME.get(split.lower(), split.lower() if re.fullmatch(_WORDS, split, re.IGNORECASE) else split)


def choose_split(
    splits: Sequence[str], counts: Sequence[int], asked: str, name: str, uri: str, left_out: LeftOut
) -> np.ndarray:
    """Return which parts of a source belong to the split that was asked for, and count the others as left out.

    Args:
        splits: the split of each folder or file, as `split_of` returns it.
        counts: how many files each of them stands for.
        asked: `source.split`.
        name: the name of the config section, for error messages.
        uri: the source's URI as it was given, for error messages.
        left_out: where files of other splits are counted.

    Returns:
        bool (parts,).

    Raises:
        UserError: if there is no such split, or if there are several and none was asked for.
    """
    sizes: Counter[str] = Counter()
    for split, count in zip(splits, counts, strict=True):
        sizes[split] += count
    there = sorted(split for split in sizes if split)
    listed = ", ".join(f"{split} ({sizes[split]:,} file{'s' if sizes[split] != 1 else ''})" for split in there)
    if asked == ALL:
        return np.ones(len(splits), bool)
    if asked:
        wanted = canonical(asked)
        if wanted not in sizes:
            known = f"there is {listed}" if there else "no folder or file in it is named as a split"
            raise UserError(f"{name}.split: no split {asked!r} in {uri}; {known}")
        for split in sizes.keys() - {wanted}:
            left_out.add(OTHER_SPLITS, split or "none", sizes[split])
        return np.array([split == wanted for split in splits])
    if len(there) > 1:
        choices = " or ".join(f"{name}.split={split}" for split in there)
        raise UserError(
            f"{name}.uri={uri} holds several splits: {listed}; give {choices}, or {name}.split={ALL} for all of them"
        )
    if there and "" in sizes:
        say(
            f"{name}.uri={uri}: {listed} lies under a name of a split, {sizes['']:,} do not; all are read "
            f"({name}.split={there[0]} takes only those)",
            "WARNING",
        )
    return np.ones(len(splits), bool)


def files_of_split(found: Found, config: Source, name: str) -> list[File]:
    """Return the files of the split that a config asks for, of files that hold several images each.

    Args:
        found: the files; those of other splits are counted as left out.
        config: the source's config section.
        name: the name of that section, for error messages.

    Raises:
        UserError: if there is no such split, or if there are several and none was asked for.
    """
    splits = [split_of(file.name) for file in found.files]
    ones = [1] * len(splits)
    kept = choose_split(splits, ones, config.split, name, config.uri, found.left_out)
    return [file for file, keep in zip(found.files, kept, strict=True) if keep]


def without_split(folder: str) -> str:
    """Return the name of a folder without the part that names its split: the class "cat" for "train/cat"."""
    parts = folder.split("/")
    place = next((place for place, part in enumerate(parts) if _NAMED.search(part)), None)
    return folder if place is None else "/".join([*parts[:place], *parts[place + 1 :]])
