"""What can be known about a sweep or a comparison without PyTorch and Ray, so that mistakes are answered at once."""

import os

from litevae.errors import UserError
from pipelines.data.first_look import check_file, check_source
from pipelines.experiments import paper
from pipelines.experiments.config import Compare, Sweep
from pipelines.experiments.search_space import space_fields
from pipelines.runtime import mlflow_run, paths


def sweep(cfg: Sweep) -> None:
    """Check what is known at once about a sweep.

    Raises:
        UserError: if there is no such table or row, if images or files of weights are not there, or if the sweep's
            folder can't be written.
    """
    if bool(cfg.table) == bool(cfg.space):
        raise UserError("give either table=... (of the paper) or space.FIELD=... (fields of train_vae to vary)")
    if cfg.table and (cfg.search, cfg.scheduler) != ("grid", "none"):
        raise UserError("search and scheduler need space.FIELD=...: the rows of a table are all trained completely")
    table = paper.table(cfg.table) if cfg.table else None
    if table:
        paper.chosen(table, cfg.rows)
    else:
        dict(space_fields(cfg.space))
    paths.check_local("root", os.path.join(cfg.root, name_of(cfg)))
    if not table or table.kind != "complexity":
        if not cfg.data.train.uri or not cfg.data.val.uri:
            raise UserError("give data.train.uri=... to train on and data.val.uri=... to evaluate on")
        check_source(cfg.data.train, "data.train")
        check_source(cfg.data.val, "data.val")
        for field in ("lpips_weights", "inception", "squeezenet", "backbone"):
            check_file(f"evaluate.{field}", cfg.evaluate.get(field, ""))
    mlflow_run.check_place(cfg)


def name_of(cfg: Sweep) -> str:
    """Return the name of a sweep: the one that is given, or that of its table and scale."""
    return cfg.name or (f"table-{paper.table(cfg.table).name}-{cfg.scale}" if cfg.table else "sweep")


def compare(cfg: Compare) -> str:
    """Check what is known at once about a comparison, and return its output folder.

    Raises:
        UserError: if it can't be written, or if MLflow can't be read.
    """
    if not cfg.tracking.enabled:
        raise UserError("a comparison reads MLflow, so it needs tracking.enabled=true")
    mlflow_run.tracking_uri(cfg.tracking, cfg.root)
    return paths.check_local("out", cfg.out)
