"""The plan of a cache: which images each shard has, and everything that decides what is stored for them."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self

from litevae import cache, hub, storage
from litevae.any_autoencoder import fingerprint, load_autoencoder
from litevae.errors import UserError
from litevae.images import ImageTransform
from litevae.inference import Kernels
from litevae.latents import downsampling, latent_content
from litevae.model_folder import model_config
from litevae.shards import SOURCE_HASH, latent_layout, row_schema
from pipelines.data.config import Source as SourceFields
from pipelines.data.config import Views
from pipelines.data.decode import transform_of
from pipelines.data.source import Source
from pipelines.encoding.config import Encode

DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


@dataclass(frozen=True)
class PlannedModel:
    """The autoencoder that encodes a cache.

    Attributes:
        path: its folder, which may move.
        fingerprint: SHA-256 of its weights and config, which must not change.
        config: the fields of its config.json.
    """

    path: str
    fingerprint: str
    config: dict[str, Any]


@dataclass(frozen=True)
class PlanSettings:
    """Settings that a cache was started with and that may change later: they do not decide what the cache holds.

    Attributes:
        source: the fields of the config's source section, by which a job recognises its source.
        batch_size: images per forward pass; "auto" until the job has examined its machine.
        error_budget: share of images, 0 to 1, that may be quarantined.
        transform: the fields of `Views`.
        left_out: what the first listing left out, by reason and suffix; empty in plans that are older than this.
    """

    source: dict[str, Any]
    batch_size: int | Literal["auto"]
    error_budget: float
    transform: dict[str, Any]
    left_out: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class CachePlan:
    """Everything that decides what a cache holds; `plan.json`, which is written before the first image is encoded.

    Attributes:
        model: the autoencoder.
        transform: `ImageTransform.identity`, and the seed of random crops.
        latents: how rows are stored; the result of `latent_layout`.
        precision: "fp32" or "bf16"; "auto" until the job has examined its machine.
        compile: whether torch.compile compiles the encoder.
        columns: the Arrow type of each column of a row except its latent, by name.
        rows_per_shard: largest number of images in a shard.
        source: `Source.identity` of the first listing.
        settings: what may change later.
        kernels: "native" (litevae/native.py), "torch", or "sliced" (PyTorch's, a batch's images one by one); "" in
            plans that are older than this choice.
    """

    model: PlannedModel
    transform: dict[str, Any]
    latents: dict[str, Any]
    precision: str
    compile: bool
    columns: dict[str, str]
    rows_per_shard: int
    source: dict[str, Any]
    settings: PlanSettings
    kernels: Kernels | Literal[""] = ""

    @classmethod
    def read(cls, out: str) -> Self:
        """Read the plan of the cache in folder `out`, with the settings that were last agreed to.

        Raises:
            UserError: if there is no plan, or it is damaged.
        """
        plan, agreed = cache.read_plan(out), cache.read_settings(out)
        if agreed is None:
            return cls.from_json(plan, storage.join(out, "plan.json"))
        return cls.from_json(plan | {"settings": agreed}, storage.join(out, cache.SETTINGS))

    @classmethod
    def from_json(cls, value: dict[str, Any], file: str) -> Self:
        """Return the plan that a plan.json or manifest.json of any version holds.

        Args:
            value: the content of the file.
            file: its path, for the error message.

        Raises:
            UserError: if a field is missing.
        """
        try:
            own = {field.name: value[field.name] for field in fields(cls) if field.name != "kernels"}
            parts = {"model": PlannedModel(**own["model"]), "settings": PlanSettings(**own["settings"])}
            return cls(**(own | parts), kernels=value.get("kernels", ""))
        except (KeyError, TypeError) as error:
            raise UserError(f"{file} is damaged: {error}; restore it from a copy") from error

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plan.json holds them."""
        written = asdict(self)
        if not self.kernels:
            del written["kernels"]
        return written

    def write(self, out: str) -> None:
        """Write plan.json if there is none; otherwise check that the existing plan is equal to this one.

        Raises:
            UserError: if the folder holds a cache of something else; the message lists what differs.
        """
        cache.write_plan(out, self.to_json())

    @property
    def id(self) -> str:
        """`plan_id` of the plan, by which commits name it."""
        return cache.plan_id(self.to_json())

    def agree(self, out: str) -> None:
        """Note the settings of this plan as those that the cache's commands go by from now on.

        The plan in the folder stays as it is: what it says beside them never changes.
        """
        if self.settings != type(self).read(out).settings:
            cache.write_settings(out, asdict(self.settings))

    @property
    def hashed(self) -> bool:
        """Whether rows hold the SHA-256 of their images' bytes in the source. Those of older caches do not."""
        return self.columns.get(SOURCE_HASH.name) == str(SOURCE_HASH.type)

    def described_source(self) -> dict[str, Any]:
        """Return the settings of the source, with the defaults of fields that are newer than the plan."""
        return SourceFields(**self.settings.source).model_dump(mode="json")

    @property
    def views(self) -> Views:
        """The settings that turn images into pixels. Plans that are older than `decode` were decoded by Pillow."""
        return Views(**{"decode": "pillow"} | self.settings.transform)


def make_plan(config: Encode, source: Source, identity: dict[str, Any], before: CachePlan | None) -> CachePlan:
    """Make the plan of a cache from the config. Values that an existing cache has chosen for "auto" are kept.

    Args:
        config: the job's config.
        source: the source of the first listing.
        identity: `Source.identity` as the cache records it.
        before: the plan of the existing cache; None for a new cache.

    Raises:
        UserError: if the model does not take images of the transform's sizes.
    """
    transform = transform_of(config.transform)
    described = {
        key: value for key, value in model_config(config.model).items() if key == "_class_name" or key[0] != "_"
    }
    content = _content_of(config.model, transform)
    if config.latents == "mean":
        content = "mean"
    kernels: Kernels | Literal[""] = "torch" if config.kernels == "auto" else config.kernels
    if before and (config.kernels == "auto" or not before.kernels):
        kernels = before.kernels
    return CachePlan(
        model=PlannedModel(hub.pinned(config.model), fingerprint(config.model), described),
        transform=transform.identity | ({"seed": config.transform.seed} if transform.crop == "random" else {}),
        latents=latent_layout(content, DTYPES[config.dtype], transform.views, not transform.buckets),
        precision=before.precision if before and config.precision == "auto" else config.precision,
        compile=config.compile,
        columns={field.name: str(field.type) for field in row_schema(source.schema, before is None or before.hashed)},
        rows_per_shard=config.rows_per_shard,
        source=identity,
        settings=PlanSettings(
            source=source_settings(config),
            batch_size=before.settings.batch_size if before and config.batch_size == "auto" else config.batch_size,
            error_budget=config.error_budget,
            transform=config.transform.model_dump(mode="json"),
            left_out=source.left_out.to_json(),
        ),
        kernels=kernels,
    )


def _content_of(folder: str, transform: ImageTransform) -> Literal["moments", "mean"]:
    """Return whether the model gives the moments of a posterior or only a latent.

    Raises:
        UserError: if the model does not take images of the transform's sizes.
    """
    model = load_autoencoder(folder)
    factor = downsampling(model)
    for height, width in transform.sizes:
        if height % factor or width % factor:
            raise UserError(
                f"{folder} takes sides that are multiples of {factor} pixels, not {width}x{height}; choose another "
                f"transform.resolution{' or transform.bucket_step' if transform.buckets else ''}"
            )
    return latent_content(model)


def source_settings(config: Encode) -> dict[str, Any]:
    """Return the fields of the config's source section, with an absolute URI. A job recognises its source by them."""
    return config.source.model_dump(mode="json") | {"uri": storage.absolute(config.source.uri)}
