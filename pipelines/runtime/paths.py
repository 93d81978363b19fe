"""Folders that a job writes and reads: make them absolute, and check that every node of the cluster sees them."""

import os
import platform
import secrets
import tempfile
from pathlib import Path

from litevae import hub, storage
from litevae.errors import UserError


def in_ray_job() -> bool:
    """Return whether `ray job submit` started this process, so that its working directory is a temporary copy."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def output_path(field: str, path: str, remote: bool = False) -> str:
    """Return the absolute form of an output path.

    Args:
        field: the config field that named it, for error messages.
        path: the path.
        remote: whether an s3:// URI is allowed.

    Raises:
        UserError: if the path is empty, if it is an s3:// URI and `remote` is false, or if it is relative in a
            submitted job, whose working directory is deleted at the end.
    """
    if not path:
        raise UserError(f"{field}: give a path, e.g. {field}=/data/{field}")
    if storage.is_remote(path):
        if not remote:
            raise UserError(f"{field}={path}: only local paths can be written here")
        return storage.absolute(path)
    if in_ray_job() and not os.path.isabs(path):
        raise UserError(
            f"{field}={path} is relative; a submitted job runs in a temporary copy of its working directory, so what "
            f"it writes there is lost. Give an absolute path on storage that all nodes share."
        )
    return os.path.abspath(path)


def check_writable(field: str, path: str) -> str:
    """Check at once, by making a file and removing it again, that a job can write its output folder.

    The folder itself is not made. If it does not exist, the file is made in the nearest folder above it that does.

    Args:
        field: the config field that named the folder, for error messages.
        path: the folder, as `output_path` accepts it with `remote=True`.

    Returns:
        The absolute form of the path.

    Raises:
        UserError: if a file is in the way, or if nothing can be written there.
    """
    folder = output_path(field, path, remote=True)
    if storage.is_remote(folder):
        mark = storage.join(folder, f".tmp-writable-{secrets.token_hex(8)}")
        try:
            storage.put(mark, b"")
            storage.remove(mark)
        except UserError as error:
            raise UserError(f"{field}={path} can't be written: {error}") from None
        return folder
    try:
        there = next(parent for parent in (Path(folder), *Path(folder).parents) if _is_there(parent))
        if not there.is_dir():
            raise UserError(f"{field}={path} can't be written: {there} is not a folder; give another one")
        with tempfile.NamedTemporaryFile(prefix=".tmp-writable-", dir=there):
            pass
    except (OSError, ValueError) as error:  # ValueError: the path contains NUL
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{field}={path} can't be written: {reason}; give a folder that this user can write") from None
    return folder


def check_local(field: str, path: str) -> str:
    """Check, as `check_writable`, an output folder that must not be on S3, and return its absolute form."""
    output_path(field, path)
    return check_writable(field, path)


def _is_there(path: Path) -> bool:
    """Return whether there is something, also a link to nothing. An OSError says that nothing can be there."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def check_free(field: str, folder: str, needed: int, what: str) -> None:
    """Check that a local folder's file system has room for what a job will write.

    Nothing is checked where the file system does not tell its size, as some mounted stores do not.

    Args:
        field: the config field that named the folder, for error messages.
        folder: the folder; if it does not exist, the nearest folder above it that does counts.
        needed: bytes.
        what: what takes this room, for the error message.

    Raises:
        UserError: if less is free.
    """
    there = next(parent for parent in (Path(folder), *Path(folder).parents) if parent.is_dir())
    about = os.statvfs(there)
    free = about.f_bavail * about.f_frsize
    if about.f_blocks and free < needed:
        raise UserError(
            f"{field}: {folder} has room for {_size(free)}, but about {_size(needed)} are needed for {what}; make "
            f"room there, or give another {field}"
        )


def _size(count: int) -> str:
    """Return a number of bytes for people."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def check_folders(written: dict[str, str], read: dict[str, str]) -> None:
    """Check at the start of a job that every node sees the local folders that the job writes and reads.

    Args:
        written: folders to write, by the config field that named them. They are created. S3 URIs are not checked.
        read: folders and files to read, in the same way. Names of models on the Hub are not checked: each node
            downloads them.

    Raises:
        UserError: if a node does not see what this node has written, or what is to be read.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0)]
    mine = ray.get_runtime_context().get_node_id()
    others = {node["NodeID"]: node["NodeName"] for node in nodes if node["NodeID"] != mine}
    if not others:
        return

    def missing(paths: list[str]) -> list[str]:
        return [path for path in paths if not os.path.exists(path)]

    marks = {
        field: os.path.join(folder, f".tmp-shared-{secrets.token_hex(8)}")
        for field, folder in written.items()
        if not storage.is_remote(folder)
    }
    paths = marks | {
        field: os.path.abspath(path)
        for field, path in read.items()
        if path and not storage.is_remote(path) and not hub.is_name(path)
    }
    try:
        for mark in marks.values():
            os.makedirs(os.path.dirname(mark), exist_ok=True)
            Path(mark).touch()
        look = ray.remote(num_cpus=0, max_retries=1)(missing)
        asked = {
            name: look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
                list(paths.values())
            )
            for node, name in others.items()
        }
        for name, found in asked.items():
            try:
                unseen = ray.get(found)
            except (ray.exceptions.TaskUnschedulableError, ray.exceptions.NodeDiedError):
                continue  # the node has left the cluster in the meantime
            for field, path in paths.items():
                if path in unseen:
                    where = (written | read)[field]
                    raise UserError(
                        f"{field}={where} is not shared: node {name} of the cluster does not see what is there on "
                        f"{platform.node()}. Give a path that all nodes share"
                        + (" (NFS, EFS ...), or s3://" if field in ("out", "source.uri") else " (NFS, EFS ...)")
                    )
    finally:
        for mark in marks.values():
            Path(mark).unlink(missing_ok=True)
