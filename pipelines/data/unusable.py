"""Say what a uri names when it can't be read as a source, and what to give instead."""

import os
import re

from litevae import storage
from pipelines.data.left_out import LeftOut

PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
# What a file is, by its first bytes.
_COMPRESSED = {
    rb"\x1f\x8b": "gzip",
    rb"BZh[1-9]1AY&SY": "bzip2",
    rb"\xfd7zXZ\0": "xz",
    rb"\x28\xb5\x2f\xfd": "zstd",
    rb"\x04\x22\x4d\x18": "lz4",
    rb"LZIP\x01": "lzip",
}
_HTML = "an HTML page, as servers send it in place of a file; download it again"
_OTHER_KINDS = {
    rb"PK\x03\x04": "a zip archive; unpack it",
    rb"7z\xbc\xaf": "a 7z archive; unpack it",
    rb"Rar!\x1a": "a RAR archive; unpack it",
    rb"PAR1[\0-\x1f]": "a Parquet file; give it a name that ends in .parquet",
    rb"version https://git-lfs": "a pointer of Git LFS, not the file itself; fetch it: git lfs pull",
    rb"(?i)\s*<(?:!doctype )?html": _HTML,
}
_VIDEOS = (".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")
_ARCHIVES = (".zip", ".7z", ".rar")
_TABLES = (".arrow", ".feather", ".tfrecord", ".tfrecords", ".mdb", ".lmdb", ".h5", ".hdf5", ".npz", ".npy", ".beton")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?")


def explain_uri(uri: str) -> str:
    """Return what to give instead of a URI that is neither local nor on S3; "" if nothing better is known."""
    scheme, _, rest = uri.partition("://")
    if scheme in ("hf", "huggingface") or rest.startswith(("huggingface.co/datasets/", "hf.co/datasets/")):
        parts = re.sub(r"^(?:huggingface\.co/|hf\.co/)?datasets/", "", rest).split("/")
        return f"; {_download('/'.join(parts[:2]))}"
    if scheme in ("http", "https", "ftp"):
        return "; download it first, and give the folder or file that you have then"
    if scheme in ("gs", "gcs", "az", "abfs", "abfss", "wasb", "wasbs", "hdfs", "r2", "oci"):
        return "; copy it to a local folder or to S3 first, or give it by a mount"
    return ""


def explain_missing(shown: str, path: str) -> str:
    """Return the message for a path that does not exist.

    Args:
        shown: the field and its value as it was typed, such as "source.uri=imagenet-1k".
        path: the absolute path.
    """
    typed = shown.partition("=")[2]
    if re.search(r"[*?\[{]", path):
        return f"{shown} does not exist: no file matches"
    if not storage.is_remote(path) and re.match(r"[A-Za-z]:[\\/]|\\\\", typed):
        return f"{shown} does not exist: it is a path of Windows; give it as this system sees it, e.g. /mnt/c/photos"
    suffix = os.path.splitext(typed)[1].lower()
    known = (".parquet", ".tar", ".txt", ".csv", ".jsonl", ".jpg", ".jpeg", ".png", *_ARCHIVES, *_VIDEOS, *PACKED)
    if _HUB_ID.fullmatch(typed) and suffix not in known:
        return f"{shown} does not exist; if it is a data set of the Hugging Face Hub, {_download(typed)}"
    return f"{shown} does not exist"


def _download(name: str) -> str:
    folder = name.rpartition("/")[2]
    return (
        f"download it first: hf download --repo-type dataset {name} --local-dir {folder}, then source.uri={folder} "
        f"(a gated one needs `hf auth login` before)"
    )


def explain_file(shown: str, file: str) -> str:
    """Return the message for a file that is no source."""
    low, folder = file.lower(), os.path.splitext(os.path.basename(file))[0]
    if low.endswith(PACKED):
        return refuse_packed(file)
    if low.endswith(_ARCHIVES):
        return f"{shown}: {file} is an archive; unpack it (unzip {file} -d {folder}) and give the folder"
    if low.endswith(_VIDEOS):
        return f"{shown}: {file} is a video; write its frames first: mkdir {folder}; ffmpeg -i {file} {folder}/%06d.png"
    if low.endswith(_TABLES):
        return f"{shown}: {file} is of a format that is not read; write its images as files, or as a Parquet column"
    if low.endswith(".json"):
        return f"{shown}: {file} is a JSON file; a list of images is .jsonl, one object with a path in each line"
    return f"{shown}: {file} is neither a folder nor an image, nor a .parquet, .tar, .txt, .csv or .jsonl file"


def explain_content(file: str, head: bytes) -> str:
    """Return the message for a file whose first bytes show that it is not what its name says; "" if they don't."""
    for pattern, kind in _COMPRESSED.items():
        if re.match(pattern, head):
            return refuse_packed(file, kind)
    for pattern, kind in _OTHER_KINDS.items():
        if re.match(pattern, head):
            return f"{file} is {kind}"
    return ""


def refuse_packed(file: str, kind: str = "") -> str:
    """Return the message for a compressed tar, whose images can't be read one by one."""
    how = f"{kind}-compressed" if kind else "compressed"
    plain = os.path.splitext(file)[1].lower()
    if kind and plain not in (".tar", ""):
        return f"{file} is {how}; unpack it to a plain {plain}"
    return f"{file} is {how}, which leaves no way to read one image of it; unpack it to a plain .tar"


def explain_folder(shown: str, left_out: LeftOut, suffixes: tuple[str, ...], packed: str = "") -> str:
    """Return the message for a folder in which nothing can be read.

    Args:
        shown: the field and its value.
        left_out: what lies in the folder.
        suffixes: of images.
        packed: a compressed tar in it, if there is one.
    """
    if packed:
        return refuse_packed(packed)
    if not left_out.total:
        return f"{shown} is empty"
    held = {suffix for counter in left_out.counts.values() for suffix in counter}
    advice = ""
    if held & set(_ARCHIVES):
        advice = "; unpack the archives first"
    elif held & set(_VIDEOS):
        advice = "; write the frames of the videos as images first, e.g. by ffmpeg"
    elif held & {".csv", ".jsonl", ".txt"}:
        advice = "; a list of paths is given by its file name, not by its folder"
    elif held & set(_TABLES):
        advice = "; write its images as files, or as a Parquet column"
    return (
        f"{shown} has no images, Parquet files or tars in it, only {left_out}{advice} "
        f"(image suffixes: {' '.join(suffixes)})"
    )
