"""Config schemas of the jobs sweep and compare_runs."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from pipelines.encoding.config import Encode
from pipelines.evaluation.config import Evaluate, EvaluateComplexity, EvaluateSamples, Sample
from pipelines.runtime.schema import Count, Job, Needed, PathText, Positive, Shown, Tracked
from pipelines.runtime.typed_text import SectionOf, check_read
from pipelines.training.config import TrainData, TrainLDM, TrainVAE


class Compare(Tracked):
    """Compare runs of an MLflow experiment (tracking.experiment): a sweep's, or any by name."""

    shown: ClassVar[Shown] = Shown(
        groups={
            "Runs": {
                "sweep": "table-9-small",
                "runs": "['vae-a*', 'vae-b*']",
                "unfinished": "true",
                "baseline": "vae-a",
                "tracking.experiment": "faces",
                "root": "/shared/runs",
            },
            "What is shown": {
                "metrics": "['eval/*', train/images_per_second]",
                "test": "paired",
                "curves": "['val/*']",
                "pictures": "0",
                "out": "/data/comparison",
            },
        },
    )

    sweep: str = Field("", description="a sweep's name; with neither this nor runs: the newest sweep")
    runs: list[str] = Field(
        [], description="names or ids, * for any letters: [a, b], ['vae-*'], ['*']; runs but for the seed are one row"
    )
    unfinished: bool = Field(False, description="also runs that failed, were killed or still run, as rows of their own")
    baseline: str = Field("", description="the row that the others are compared with; empty: the first")
    metrics: list[str] = Field(
        [], description="columns, e.g. [eval/*, train/images_per_second]; empty: eval/*, else val/*, else train/*"
    )
    test: Literal["welch", "paired"] = Field(
        "welch", description="t-test over seeds, two-sided; paired: of the seeds that both rows have"
    )
    curves: list[str] = Field(
        ["val/*", "eval/scale/*", "train/*"], description="metrics drawn over the images seen; eval/scale: over pixels"
    )
    pictures: Count = Field(1024, description="pixels of a row's picture, longer side, at most; 0: no pictures")
    out: PathText = Field("comparison", description="folder for comparison.html, comparison.md and comparison.json")


class Sweep(Job):
    """Train and evaluate many autoencoders: a table of the paper, or any fields of train_vae.

    What all trials have in common is given in sections named as jobs: train_vae.optim.lr=2e-4,
    evaluate.squeezenet=FILE ... Trainings are kept in <root>/trained under the hash of their config, so that rows and
    tables that have one in common train it once.
    """

    shown: ClassVar[Shown] = Shown(
        needed={
            "table": Needed("9", note="this or space is required"),
            "space": Needed("{loss.wavelet.weight: [0, 0.1, 1]}", note="this or table is required", usual=False),
            "data.train.uri": Needed("/data/photos", note="required except with table=3", meaning="images to train on"),
            "data.val.uri": Needed(
                "/data/photos-val", note="required except with table=3", meaning="images to evaluate on"
            ),
        },
        groups={
            "Of a table": {
                "scale": "paper",
                "rows": "['LiteVAE*']",
            },
            "Of a space": {
                "search": "optuna",
                "trials": "20",
                "scheduler": "asha",
                "metric": "ssim",
            },
            "Of all trials": {
                "seeds": "[0, 1, 2]",
                "train_vae": "{loss: {lpips: {weight: 0}}}",
                "evaluate": "{images: 1000}",
            },
            "The sweep": {
                "name": "weights",
                "root": "/shared/runs",
                "concurrent": "2",
                "ray.workers": "2",
            },
        },
    )

    name: str = Field(
        "",
        description="of the sweep; the same name again resumes; empty: table-<table>-<scale>, or sweep",
        pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]*)?$",
    )
    table: str = Field("", description="table of the paper: 1, 2a, 2b, 3 to 22, figure-5, figure-8; empty: `space`")
    rows: list[str] = Field([], description="rows of the table, also as patterns: ['LiteVAE*']; empty: all")
    scale: Literal["paper", "small", "smoke"] = Field(
        "small",
        description="of a table: the paper's resolutions and steps; half and 1/50 of them with a smaller decoder; two "
        "steps, to see that it runs",
    )
    seeds: list[Count] = Field([0], min_length=1, description="every row or point is trained with each of them")
    data: TrainData = Field(TrainData(), description="of all trials; evaluation is on data.val")
    train_vae: Annotated[dict[str, Any], SectionOf(TrainVAE)] = Field(
        {}, description="of all trials, e.g. train_vae.loss.lpips.weights=FILE"
    )
    evaluate: Annotated[dict[str, Any], SectionOf(Evaluate)] = Field(
        {}, description="of all evaluations, e.g. evaluate.images=1000"
    )
    evaluate_complexity: Annotated[dict[str, Any], SectionOf(EvaluateComplexity)] = Field(
        {}, description="of table 3, e.g. evaluate_complexity.batch_size=8"
    )
    encode_dataset: Annotated[dict[str, Any], SectionOf(Encode)] = Field({}, description="of tables 7 and 13")
    train_ldm: Annotated[dict[str, Any], SectionOf(TrainLDM)] = Field(
        {}, description="of tables 7 and 13, e.g. train_ldm.images=1000000"
    )
    sample: Annotated[dict[str, Any], SectionOf(Sample)] = Field({}, description="of tables 7 and 13")
    evaluate_samples: Annotated[dict[str, Any], SectionOf(EvaluateSamples)] = Field(
        {}, description="of tables 7 and 13, e.g. evaluate_samples.inception=FILE"
    )
    space: Annotated[dict[str, Any], SectionOf(TrainVAE, space=True)] = Field(
        {},
        description="fields of train_vae to vary: a list of values, or {uniform: [a, b]}, {loguniform: [a, b]}, "
        "{randint: [a, b]}; e.g. space.loss.wavelet.weight=[0,0.1,1] 'space.optim.lr={loguniform: [1e-5, 1e-3]}'",
    )
    search: Literal["grid", "random", "optuna"] = Field(
        "grid", description="grid: every combination of lists; random, optuna: `trials` points"
    )
    trials: Positive = Field(8, description="points of random and optuna, and the population of pbt")
    scheduler: Literal["none", "asha", "pbt"] = Field(
        "none", description="asha stops poor trials early; pbt lets them go on from better ones with other values"
    )
    metric: Literal["psnr", "ssim"] = Field("psnr", description="what is best: of validations, and of the evaluation")
    every: Count = Field(
        0, description="asha, pbt: images between looks at the trials (validations); 0: an eighth of the run"
    )
    concurrent: Count = Field(0, description="trials at a time; 0: as many as GPUs hold, one without")

    _read = field_validator(
        *("train_vae", "evaluate", "evaluate_complexity", "encode_dataset"),
        *("train_ldm", "sample", "evaluate_samples", "space"),
    )(check_read)
