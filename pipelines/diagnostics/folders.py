"""Doctor's checks of a folder: whether all nodes share it, whether exclusive creation works, and how fast it is."""

import os
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Iterator

from litevae import storage
from litevae.errors import UserError
from pipelines.diagnostics.machine import GB, LITTLE_DISK
from pipelines.diagnostics.probe import DRIVER, Ask, Finding, answered, counted

ROUNDS, THREADS = 4, 8  # rounds of the race to create one name, and threads per node in the race


def folder(ask: Ask, path: str) -> Iterator[Finding]:
    """Check that all nodes can write to a folder and see its files, and that of many writers of one name one wins.

    Args:
        ask: calls a function on every node.
        path: a local folder or s3://; "": the check is skipped.
    """
    if not path:
        yield Finding(DRIVER, "skipped", "not given")
        return
    made = not storage.is_remote(path) and not os.path.isdir(path)
    mark, nonce = storage.join(path, f".doctor-{secrets.token_hex(8)}"), secrets.token_hex(8)
    try:
        storage.put(storage.join(mark, DRIVER), nonce.encode())
        answers, lost = answered(ask(_reply, mark, nonce))
        yield from lost
        advice = "give a folder that all nodes share (NFS, EFS ...)" + (
            ", or s3:// for a cache" if not storage.is_remote(path) else ""
        )
        apart = [node for node, name in answers.items() if not name or _missing(storage.join(mark, name), nonce)]
        for node in apart:
            what = "sees nothing of what the driver wrote" if not answers[node] else "writes what the driver can't see"
            yield Finding(node, "failed", f"{path} is not shared: this node {what}", advice)
        if apart or lost:
            text = f"{path}: the race to create a file is skipped: not all nodes can take part"
            yield Finding(DRIVER, "skipped", text)
            return
        yield Finding(DRIVER, "ok", f"{path} is seen and written by the driver and {counted(len(answers), 'node')}")
        yield from _raced(ask, mark, path)
        yield from _speeds(ask, mark, path)
    finally:
        _clear(mark)
        if made and os.path.isdir(path) and not os.listdir(path):
            os.rmdir(path)


def _missing(path: str, nonce: str) -> bool:
    """Return whether a file is missing or does not hold the expected text."""
    try:
        return storage.read(path) != nonce.encode()
    except FileNotFoundError:
        return True


def _clear(mark: str) -> None:
    """Remove the check's files."""
    if storage.is_remote(mark):
        try:
            for name in storage.names(mark):
                storage.remove(storage.join(mark, name))
        except UserError as error:  # the failure of the store has already been reported
            print(f"doctor: {mark} may not have been removed ({error})", file=sys.stderr)
    else:
        shutil.rmtree(mark, ignore_errors=True)


def _reply(mark: str, nonce: str) -> str:
    """Write a file on a node and return its name; "" if the node does not see the driver's file."""
    if _missing(storage.join(mark, DRIVER), nonce):
        return ""
    name = f"node-{secrets.token_hex(8)}"
    storage.put(storage.join(mark, name), nonce.encode())
    return name


def _raced(ask: Ask, mark: str, path: str) -> Iterator[Finding]:
    """Let all nodes race to create the same names, and check that each name has exactly one winner."""
    nodes, lost = answered(ask(_race, mark))
    yield from lost
    wins = [[winner for found in nodes.values() for winner in found[number]] for number in range(ROUNDS)]
    held = [storage.read(storage.join(mark, f"race-{number}")).decode() for number in range(ROUNDS)]
    racers = len(nodes) * THREADS
    if any(winners != [holder] for winners, holder in zip(wins, held, strict=True)):
        text = (
            f"of {racers} writers that create the same file in {path} at once, not exactly one succeeds "
            f"({', '.join(str(len(w)) for w in wins)} in {ROUNDS} rounds)"
        )
        advice = "writers of a cache may overwrite each other: use a store that has If-None-Match (S3, Ceph, MinIO)"
        if not storage.is_remote(path):
            advice = "take a file system on which hard links are exclusive among nodes (NFS from version 3 on)"
        yield Finding(DRIVER, "failed", text, advice)
    elif not lost:
        text = f"of {racers} writers that create the same file at once, exactly one succeeds ({ROUNDS} rounds)"
        yield Finding(DRIVER, "ok", text)


def _race(mark: str) -> list[list[str]]:
    """Take part in the race on a node.

    Returns:
        For each round the ids of this node's threads that created the name.
    """
    wins: list[list[str]] = []
    problems: list[BaseException] = []
    for number in range(ROUNDS):
        won: list[str] = []
        together = threading.Barrier(THREADS)

        def enter(name: str, won: list[str], together: threading.Barrier) -> None:
            writer = secrets.token_hex(8)
            try:
                together.wait()
                if storage.put_new(name, writer.encode()):
                    won.append(writer)
            except Exception as error:  # noqa: BLE001 - raised again below
                problems.append(error)

        arguments = (storage.join(mark, f"race-{number}"), won, together)
        threads = [threading.Thread(target=enter, args=arguments) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if problems:
            raise problems[0]
        wins.append(won)
    return wins


def _speeds(ask: Ask, mark: str, path: str) -> Iterator[Finding]:
    """Measure how fast each node writes and reads, and check atomic replacement and free space."""
    nodes, lost = answered(ask(_throughput, mark))
    yield from lost
    for node, (write, read, torn) in nodes.items():
        text = f"{write:,.0f} MB/s written" + (f", {read:,.0f} read" if storage.is_remote(path) else ", to the disk")
        if torn:
            advice = "take a file system with atomic renames"
            found = f"{torn} reads of a file in {path} saw only a part of it while it was replaced"
            yield Finding(node, "failed", found, advice)
        if not storage.is_remote(path):
            free = shutil.disk_usage(path).free
            text += f", {free / GB:,.0f} GB free"
            if free < LITTLE_DISK:
                yield Finding(node, "warning", text, f"make room in {path}, or take another folder")
                continue
        yield Finding(node, "ok", text)


def _throughput(mark: str) -> tuple[float, float, int]:
    """Measure the folder's speed on a node with a file of 16 MiB.

    Returns:
        MB/s written, MB/s read, and how often a reader saw a part of a file while it was being replaced.
    """
    path = storage.join(mark, f"speed-{secrets.token_hex(8)}")
    data = os.urandom(16 * 2**20)
    begun = time.perf_counter()
    storage.put(path, data)
    written = time.perf_counter()
    if storage.read(path) != data:
        raise UserError(f"{path} does not hold what was written; check this storage for damage")
    read = time.perf_counter()
    whole = [bytes([letter]) * 2**18 for letter in b"ab"]
    storage.put(path, whole[0])
    torn: list[bytes] = []
    end = threading.Event()

    def look() -> None:
        while not end.is_set():
            if (seen := storage.read(path)) not in whole:
                torn.append(seen)

    reader = threading.Thread(target=look)
    reader.start()
    try:
        for number in range(10):
            storage.put(path, whole[number % 2])
    finally:
        end.set()
        reader.join()
        storage.remove(path)
    return len(data) / (written - begun) / 1e6, len(data) / (read - written) / 1e6, len(torn)
