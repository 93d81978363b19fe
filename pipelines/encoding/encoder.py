"""The Ray actor that encodes the pixels of a shard with the model and commits the shard."""

import json
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from litevae.any_autoencoder import fingerprint, load_autoencoder
from litevae.autoencoder_base import one_by_one
from litevae.cache import foreign
from litevae.commits import EXAMPLES, commit_shard, merged_losses, read_commit
from litevae.errors import UserError
from litevae.images import to_tensor
from litevae.inference import prepare_for_inference
from litevae.latents import encode_latents, latent_content
from litevae.native import NoKernels
from litevae.precision import autocast
from litevae.shards import QUARANTINE, read_quarantine, read_shard, row_schema, storage_errors, to_stored
from pipelines.data.decode import Lost, Shard, ShardTask, quarantined, unpack
from pipelines.encoding.plan import CachePlan
from pipelines.runtime.logs import say

# Rows whose latents have one shape: all other columns, and the latents (n, C, h, w) in the stored dtype.
Rows = tuple[pa.Table, np.ndarray]


class ShardEncoder:
    """A Ray actor that holds the model, encodes the pixels of a shard into latents, and commits the shard.

    Ray calls it from two threads: one thread commits a shard while the other encodes the next.

    Args:
        out: the cache folder.
        plan: the plan of the cache, with a number as its batch size.
        gpu: whether the model runs on a GPU.
        threads: CPU threads of PyTorch.
    """

    def __init__(self, out: str, plan: CachePlan, gpu: bool, threads: int):
        assert plan.settings.batch_size != "auto", "the plan was not settled"
        self.out, self.plan, self.how = out, plan, plan.latents
        self.batch_size = plan.settings.batch_size
        self._plan_id = plan.id
        self.device = torch.device("cuda" if gpu else "cpu")
        self.single = plan.kernels in ("native", "sliced")
        self.name = torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine()
        self._model: Callable[[torch.Tensor], torch.Tensor] | None = None
        self._threads, self._turn = threads, threading.Lock()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Encode and commit the shard of a row that `decode_shard` returned.

        Returns:
            The row that `EncodeTotals.add` takes: the commit as JSON, the device, seconds of each stage, and the time
            of completion. `error` is the message of a UserError, or empty.
        """
        error, commit, seconds = row["error"], {}, 0.0
        if not error:
            try:
                with self._turn:
                    torch.set_num_threads(self._threads)  # OpenMP keeps this number per thread
                    start = time.perf_counter()
                    encoded = list(self._latents(row["pixels"], row["sizes"]))
                    seconds = time.perf_counter() - start
                commit = self._commit(row, encoded)
            except UserError as problem:
                error = str(problem)
        return {
            "error": error,
            "commit": json.dumps(commit),
            "device": self.name,
            "decode_seconds": row["decode_seconds"],
            "encode_seconds": seconds,
            "finished": time.time(),  # the row reaches the driver later
        }

    def _commit(self, row: dict[str, Any], encoded: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
        """Commit a shard, or the next generation of a shard whose quarantine is retried.

        Args:
            row: what `decode_shard` returned.
            encoded: what `_latents` yielded.

        Returns:
            The commit that counts for the shard.
        """
        shard: Shard = row["shard"]
        parts, quarantine = self._storable(shard, unpack(row["rows"]), unpack(row["quarantine"]), encoded)
        losses = [{"lost_values": _lost_values(unpack(row["lost_values"]), quarantine)}]
        enlarged = row["enlarged"]
        if shard.task.only:
            before = read_commit(self.out, shard.task.shard, shard.task.generation - 1)
            old = read_quarantine(self.out, before)
            quarantine = _merged_quarantine(old, quarantine, shard.task)
            if _reasons(quarantine).equals(_reasons(old.sort_by("unit"))):
                return before  # the retry changed nothing
            parts += self._rows_of(before)
            losses.append(before)
            enlarged += before.get("enlarged", 0)
        elif shard.task.keep:
            kept, quarantine = self._kept(shard, quarantine)
            parts += kept
        table, latents = _merged_rows(parts, row_schema(shard.source.schema, self.plan.hashed))
        planned = self.plan.settings.batch_size
        commit = commit_shard(
            self.out,
            shard.task.shard,
            (shard.first, shard.first + shard.source.units),
            self.how,
            table,
            latents,
            quarantine.sort_by("unit"),
            shard.task.generation,
            device=self.name,
            plan=self._plan_id,
            **({"batch_size": self.batch_size} if self.batch_size != planned else {}),
            **({"lost_values": lost_values} if (lost_values := merged_losses(losses)) else {}),
            **({"enlarged": enlarged} if enlarged else {}),
        )
        if strange := foreign(commit, self._plan_id):
            raise UserError(f"{strange}; `encode_dataset.py repair {self.out}` encodes it again")
        return commit

    def _storable(
        self, shard: Shard, rows: pa.Table, quarantine: pa.Table, encoded: list[tuple[np.ndarray, np.ndarray]]
    ) -> tuple[list[Rows], pa.Table]:
        """Return the rows whose latents the cache's dtype can hold, and the quarantine with all other images added."""
        parts: list[Rows] = []
        lost: list[dict[str, Any]] = []
        for places, values in encoded:
            part = rows.take(pa.array(places))
            units = part["unit"].to_numpy()
            bad = {
                int(unit): problem
                for unit, problem in zip(units, storage_errors(values, self.how["dtype"]), strict=True)
                if problem
            }
            names = dict(zip(units.tolist(), part["id"].to_pylist(), strict=True))
            for unit, problem in bad.items():
                message = f"the model's latents are {problem} for {self.how['dtype']}"
                lost.append(quarantined(shard, unit, names[unit], Lost("encode", problem, message)))
            good = ~np.isin(units, list(bad))
            parts.append((part.filter(pa.array(good)), to_stored(values[good], self.how["dtype"])))
        return parts, pa.concat_tables([quarantine, pa.Table.from_pylist(lost, schema=QUARANTINE)])

    def _kept(self, shard: Shard, quarantine: pa.Table) -> tuple[list[Rows], pa.Table]:
        """Return the rows that images which can't be read any more had, and the quarantine without these images."""
        lost = quarantine.filter(pc.equal(quarantine["stage"], "read"))["unit"].combine_chunks()
        before = self._rows_of(read_commit(self.out, shard.task.shard, shard.task.generation - 1))
        found: list[Rows] = []
        for rows, values in before:
            chosen = pc.is_in(rows["unit"], value_set=lost)
            found.append((rows.filter(chosen), values[chosen.to_numpy()]))
        kept = pa.chunked_array([rows["unit"] for rows, _ in found], pa.int64()) if found else pa.array([], pa.int64())
        if len(kept):
            names = ", ".join(sorted({name for rows, _ in found for name in rows["id"].to_pylist()})[:EXAMPLES])
            say(f"shard {shard.task.shard}: images can't be read any more and keep their latents: {names}", "WARNING")
        return found, quarantine.filter(pc.invert(pc.is_in(quarantine["unit"], value_set=kept)))

    def _rows_of(self, commit: dict[str, Any]) -> list[Rows]:
        """Return the rows of a committed shard, one item per latent shape."""
        if not commit["rows"]:
            return []
        table, latents = read_shard(self.out, commit, self.how)
        starts = np.cumsum([0, *map(len, latents)])
        return [(table.slice(start, len(values)), values) for start, values in zip(starts, latents, strict=False)]

    def _latents(self, pixels: np.ndarray, sizes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield, for each image size, the indices of the rows of that size and their fp32 latents (n, C, h, w)."""
        counts = sizes.astype(np.int64).prod(axis=1) * 3
        starts = np.cumsum(counts) - counts
        for height, width in np.unique(sizes, axis=0).tolist():
            places = np.flatnonzero((sizes == (height, width)).all(axis=1))
            images = [pixels[starts[place] :][: counts[place]].reshape(height, width, 3) for place in places]
            yield places, self.encode(images)

    def close(self) -> None:
        """Free the memory of the model. The next call loads it again."""
        self._model = None

    def encode(self, images: list[np.ndarray]) -> np.ndarray:
        """Encode images of one size into latents.

        Every forward pass has the full batch size, and the last batch is padded: the batch size decides which kernels
        run, and so the last bits of a result. Where images are computed one by one, the bits are the same at any batch
        size, and there is no padding. If the memory of a GPU is too small for a batch, the batch size is halved from
        then on. While a GPU computes, the next batch is prepared and copied to it.

        Args:
            images: n arrays, uint8 (H, W, 3).

        Returns:
            Latents, fp32 (n, C, h, w).

        Raises:
            UserError: if not even one image fits into the memory of the GPU.
        """
        parts: list[np.ndarray] = []
        computing: tuple[torch.Tensor, int] | None = None
        done = 0
        while done < len(images):
            part = images[done : done + self.batch_size]
            batch = np.zeros((len(part) if self.single else self.batch_size, *part[0].shape), dtype=np.uint8)
            np.stack(part, out=batch[: len(part)])
            try:
                launched = self._forward(batch), len(part)
            except torch.OutOfMemoryError:
                if self.batch_size == 1:
                    raise UserError(f"not even one image of this size fits into the memory of {self.name}") from None
                self.batch_size //= 2
                say(f"encode: the memory of {self.name} is too small; batch_size={self.batch_size}", "WARNING")
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            if computing is not None:
                parts.append(_fetched(*computing))
            computing = launched
            done += len(part)
        if computing is not None:
            parts.append(_fetched(*computing))
        return np.concatenate(parts)

    @torch.inference_mode()
    def _forward(self, batch: np.ndarray) -> torch.Tensor:
        """Encode pixels, uint8 (N, H, W, 3), into fp32 latents (N, C, h, w) on the device.

        For a cache that stores only the mean, the latents are only the mean.
        """
        if self._model is None:
            self._model = load_encoder(self.plan, self.device)
        pixels = torch.from_numpy(batch)
        if self.device.type == "cuda":
            pixels = pixels.pin_memory()  # otherwise the copy would wait for the previous batch
        with deterministic_fp32(), autocast(self.device, self.plan.precision):
            latents = self._model(to_tensor(pixels.to(self.device, non_blocking=True)))
        return latents.float().contiguous()


def _fetched(latents: torch.Tensor, count: int) -> np.ndarray:
    """Wait until the latents are computed, and return the first `count` of them as an array."""
    return latents[:count].cpu().numpy()


def deterministic_fp32() -> AbstractContextManager[None]:
    """Return a context in which convolutions on a GPU compute fp32 without TF32, and the same pixels give the same
    latents."""
    return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)


def load_encoder(plan: CachePlan, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """Load the model of a plan as a function from images to latents.

    Raises:
        UserError: if the folder does not exist or holds another model than the one that the job was started with, or if
            the plan's kernels are not available on this node.
    """
    folder = plan.model.path
    if fingerprint(folder) != plan.model.fingerprint:
        raise UserError(f"{folder} on {platform.node()} is not the model that the job was started with")
    model = load_autoencoder(folder).to(device)
    if plan.kernels:
        try:
            prepare_for_inference(model, device, plan.kernels, plan.compile)
        except NoKernels as error:
            raise UserError(f"kernels=native fails on {platform.node()}: {error}; or set kernels=torch") from None
    single = plan.kernels in ("native", "sliced")  # also where the model itself has no slicing
    halve = latent_content(model) == "moments" and plan.latents["content"] == "mean"

    def latents(x: torch.Tensor) -> torch.Tensor:
        found = one_by_one(partial(encode_latents, model), x) if single else encode_latents(model, x)
        return found.chunk(2, dim=1)[0] if halve else found

    return torch.compile(latents) if plan.compile else latents


def _lost_values(values: pa.Table, quarantine: pa.Table) -> dict[str, Any]:
    """Return how many values of each column of the stored rows could not be carried, with examples, as a commit has it.

    Args:
        values: what `decode_shard` found.
        quarantine: the images that have no rows.
    """
    found: dict[str, Any] = {}
    absent = {*quarantine["unit"].to_pylist()}
    for value in values.to_pylist():
        if value["unit"] not in absent:
            of_column = found.setdefault(value["column"], {"count": 0, "examples": []})
            of_column["count"] += 1
            if of_column["count"] <= EXAMPLES:
                of_column["examples"].append([value["id"], value["reason"]])
    return found


def _merged_quarantine(old: pa.Table, new: pa.Table, task: ShardTask) -> pa.Table:
    """Return the quarantine after a retry: retried images with their new result, all others unchanged."""
    tried = pa.array(task.only, pa.int64())
    others = old.filter(pc.invert(pc.is_in(old["unit"], value_set=tried)))
    return pa.concat_tables([others, new]).sort_by("unit")


def _merged_rows(parts: list[Rows], schema: pa.Schema) -> tuple[pa.Table, list[np.ndarray]]:
    """Join parts into one block of rows and latents per latent shape, each sorted by unit and then by view."""
    shapes = sorted({values.shape[1:] for _, values in parts if len(values)})
    tables, latents = [schema.empty_table()], []
    for shape in shapes:
        same = [(table, values) for table, values in parts if values.shape[1:] == shape]
        table, values = pa.concat_tables([table for table, _ in same]), np.concatenate([values for _, values in same])
        order = np.lexsort((table["view"].to_numpy(), table["unit"].to_numpy()))
        tables.append(table.take(pa.array(order)))
        latents.append(values[order])
    return pa.concat_tables(tables), latents


def _reasons(quarantine: pa.Table) -> pa.Table:
    """Return a quarantine without the source's URI, which differs if the source was moved."""
    return quarantine.drop_columns(["source"])
