"""Measure the cost of encoders or decoders against a baseline: parameters, MACs, memory and speed (Table 3).

Each model is measured in a new process, one after the other, so that nothing that another model has left in memory
counts and nothing else runs at the same time.
"""

import os
import time
from collections.abc import Iterator
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from litevae import hub
from litevae.any_autoencoder import load_autoencoder
from litevae.autoencoder import ENCODERS, LiteVAE
from litevae.errors import UserError
from litevae.latents import downsampling, encode_latents, latent_content
from pipelines.evaluation import config, first_look, report
from pipelines.evaluation.timed_half import TimedHalf
from pipelines.runtime import cluster, mlflow_run, outputs, tables
from pipelines.runtime.actor_pool import pool, spread
from pipelines.runtime.host import PeakMemory, processor
from pipelines.runtime.logs import say

FIXED = {"dwt": 12, "dwt-2": 48}  # latent channels of the encoders that are not learned


class Column(NamedTuple):
    """A measured quantity: its title, the digits to print, and how it is measured."""

    title: str
    digits: int
    protocol: str


COLUMNS = {
    "params_m": Column("parameters (M)", 3, "of the encoder or the decoder alone, without a convolution between them"),
    "gmacs": Column(
        "GMACs",
        2,
        "of one image: half the FLOPs that torch.utils.flop_counter counts, of convolutions and of products of "
        "matrices (attention's, too); additions, activations and normalisations are not counted",
    ),
    "memory_mb": Column(
        "memory (MB)",
        1,
        "10^6 bytes. GPU: the most that PyTorch had allocated (max_memory_allocated), weights and input among it. CPU: "
        "the most resident memory of a fresh process beyond what it had before the first forward pass, when weights "
        "and input were there",
    ),
    "images_per_s": Column("images/s", 2, "batch size by median seconds of a forward pass; in brackets the extremes"),
    "latency_ms": Column("latency (ms)", 2, "median of a forward pass of one image; in brackets the extremes"),
}


class ModelToMeasure(NamedTuple):
    """A model to measure.

    Attributes:
        name: the absolute path of a model folder, or a size of `LiteVAE`.
        factor: downsampling factor.
        channels: number of channels of a latent (not of its moments).
    """

    name: str
    factor: int
    channels: int


def complexity(cfg: config.EvaluateComplexity) -> dict[str, Any]:
    """Measure all models, print a table, and write metrics.json into `cfg.out`.

    Returns:
        The content of metrics.json.

    Raises:
        UserError: if the config or a model is wrong, or if a model needs more memory than there is.
    """
    out = first_look.complexity(cfg).announce("evaluate complexity")
    plans = list(_plans(cfg))
    mlflow_run.check(cfg)
    placement = cluster.start(cfg.ray.model_copy(update={"workers": 1}))
    with mlflow_run.tracked_run(cfg, "evaluate", os.path.basename(out), out) as (tracker, run):
        found: dict[str, dict[str, float]] = {}
        machine = ""
        for plan in plans:
            say(f"complexity: {plan.name}")
            found[plan.name], machine = _measured(plan, cfg, placement)
        first = found[plans[0].name]
        shown = {"part", "batch_size", "resolution", "precision", "compile", "warmup", "repeats"}
        summary: dict[str, Any] = {
            **cfg.model_dump(mode="json", include=shown),
            "machine": machine,
            "baseline": plans[0].name,
            "complexity": found,
            "against": {
                name: {key: values[key] / first[key] for key in COLUMNS if key in values and first.get(key)}
                for name, values in found.items()
            },
            "protocols": {name: column.protocol for name, column in COLUMNS.items()},
            "run": mlflow_run.link(run),
            "config": outputs.measured(cfg),
        }
        for name, values in found.items():
            tracker.metrics({f"eval/complexity/{name.strip('/')}/{key}": v for key, v in values.items()}, step=0)
        report.write_summary(summary, out, tracker)
    print(summary_text(summary, out, cfg.verbose))
    return summary


def summary_text(summary: dict[str, Any], out: str, verbose: bool) -> str:
    """Format the summary for people; `verbose` adds how each number was measured."""

    def cell(values: dict[str, float], key: str) -> str:
        digits = COLUMNS[key].digits
        if key not in values:
            return ""
        low, high = (values.get(f"{key}_{end}") for end in ("low", "high"))
        extremes = "" if low is None or high is None else f" ({low:,.{digits}f} to {high:,.{digits}f})"
        return f"{values[key]:,.{digits}f}{extremes}"

    titles = [column.title for column in COLUMNS.values()]
    rows = [[summary["part"], *titles]]
    rows += [[name, *(cell(values, key) for key in COLUMNS)] for name, values in summary["complexity"].items()]
    ratios = [[f"times {summary['baseline']}", *titles]]
    for name, values in summary["against"].items():
        ratios.append([name, *(f"{values[key]:.3f}" if key in values else "" for key in COLUMNS)])
    how = {COLUMNS[name].title: text for name, text in summary["protocols"].items()}
    compiled = ", compiled" if summary["compile"] else ""
    lines = [
        *report.wrapped(
            f"batches of {summary['batch_size']} images of {summary['resolution']} px, {summary['precision']}"
            f"{compiled}, {summary['repeats']} times after {summary['warmup']}; {summary['machine']}"
        ),
        "",
        tables.fitted(rows),
        "",
        tables.fitted(ratios),
        "",
        *report.closing_lines(how, summary, out, verbose),
    ]
    return "\n".join(lines)


# --- models -----------------------------------------------------------------------------------------------------


def _plans(cfg: config.EvaluateComplexity) -> Iterator[ModelToMeasure]:
    """Yield the models of a config.

    Raises:
        UserError: if a model is neither a size nor a folder, is named twice, or does not take `cfg.resolution`.
    """
    names = [each.strip() if each.strip() in ENCODERS else hub.pinned(each.strip()) for each in cfg.models]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise UserError(f"models has {name} twice")
        if name not in ENCODERS and not hub.is_name(name) and not os.path.isdir(name):
            raise UserError(
                f"models: {cfg.models[number]!r} is neither a model folder nor one of {', '.join(ENCODERS)}"
            )
        channels = FIXED.get(name, cfg.latent_channels)
        with torch.device("meta" if name in ENCODERS else "cpu"), torch.no_grad():
            model = _model(name, channels)
            factor = downsampling(model)
            if cfg.resolution % factor:
                raise UserError(f"resolution={cfg.resolution}: {name} takes multiples of {factor} px")
            if name not in ENCODERS:
                given = encode_latents(model, torch.zeros(1, 3, 4 * factor, 4 * factor)).shape[1]
                channels = given // 2 if latent_content(model) == "moments" else given
        yield ModelToMeasure(name, factor, channels)


def _model(name: str, channels: int) -> torch.nn.Module:
    return LiteVAE(name, channels).eval() if name in ENCODERS else load_autoencoder(name)


# --- measuring --------------------------------------------------------------------------------------------------


def _measured(
    plan: ModelToMeasure, cfg: config.EvaluateComplexity, placement: cluster.Placement
) -> tuple[dict[str, float], str]:
    """Run `CostMeter.measure` in a new process."""
    import ray

    # Ray reuses a process only for actors with the same environment, and no two have this one.
    fresh = {"env_vars": {"LITEVAE_METER": f"{plan.name} {time.time_ns()}"}}
    (actor,) = pool(CostMeter, placement, plan, cfg, placement, max_restarts=0, max_task_retries=0, runtime_env=fresh)
    try:
        (found,) = spread([actor], lambda actor, _: actor.measure.remote(), [None])
    except ray.exceptions.RayActorError:
        raise UserError(f"{plan.name}: {_TOO_LARGE.format(cfg.batch_size, cfg.resolution)}") from None
    finally:
        ray.kill(actor)
    return found


_TOO_LARGE = (
    "its process ended; batches of {} images of {} px probably need more memory than there is: lower batch_size"
)


class CostMeter:
    """A Ray actor that measures one model on one device."""

    def __init__(self, plan: ModelToMeasure, cfg: config.EvaluateComplexity, placement: cluster.Placement):
        self.plan, self.cfg, self.device, self.threads = plan, cfg, placement.configure_torch(), placement.threads
        torch.manual_seed(0)
        torch.backends.cudnn.deterministic = False  # as in a user's own run
        self.half = TimedHalf(_model(plan.name, plan.channels), cfg.part, self.device, cfg.precision)

    @torch.no_grad()
    def measure(self) -> tuple[dict[str, float], str]:
        """Measure the model.

        Returns:
            The values by the names in `COLUMNS`, with the extremes of timings as <name>_low and <name>_high; and a
            description of the machine.

        Raises:
            UserError: if the memory of the GPU is too small.
        """
        cfg = self.cfg
        if cfg.compile:
            self.half.forward = torch.compile(self.half.run)
        found = {"params_m": self.half.parameters / 1e6}
        batch, one = (self.half.input(count, cfg.resolution) for count in (cfg.batch_size, 1))
        try:
            memory = self._watch_memory()
            seconds = self._seconds(batch)
            if memory is not None:
                loaded = memory.before if self.device.type == "cuda" else 0  # as COLUMNS describes
                found["memory_mb"] = (memory.bytes() + loaded) / 1e6
        except torch.OutOfMemoryError:
            raise UserError(f"{self.plan.name}: {_TOO_LARGE.format(cfg.batch_size, cfg.resolution)}") from None
        latencies = self._seconds(one)
        for name, values in (
            ("images_per_s", [cfg.batch_size / value for value in seconds]),
            ("latency_ms", [1000 * value for value in latencies]),
        ):
            found |= {name: median(values), f"{name}_low": min(values), f"{name}_high": max(values)}
        # Compute attention as matrix products, because the counter does not know every fused kernel.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            self.half.run(one)
        found["gmacs"] = counter.get_total_flops() / 2e9
        return found, self._machine()

    def _seconds(self, x: Tensor) -> list[float]:
        """Return the seconds of each forward pass after the warm-up."""
        return [self.half.seconds(x) for _ in range(self.cfg.warmup + self.cfg.repeats)][self.cfg.warmup :]

    def _watch_memory(self) -> PeakMemory | None:
        """Return a meter of the peak from now on, or None if the system does not report it."""
        try:
            return PeakMemory(self.device)
        except OSError:
            return None

    def _machine(self) -> str:
        versions = f"torch {torch.__version__}"
        if self.device.type == "cuda":
            return f"{torch.cuda.get_device_name()}, {versions}, TF32 off"
        return f"{self.threads} thread{'s' if self.threads > 1 else ''} of {processor()}, {versions}"
