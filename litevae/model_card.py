"""The model card (README.md) of a model folder, and the upload of a model with its card to the Hugging Face Hub."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from diffusers.models.modeling_utils import ModelMixin
from torch import nn

CARD = "README.md"
LIBRARY, PAPER = "litevae", "2405.14477"
CITATION = """@inproceedings{sadat2024litevae,
  title = {LiteVAE: Lightweight and Efficient Variational Autoencoders for Latent Diffusion Models},
  author = {Sadat, Seyedmorteza and Buhmann, Jakob and Bradley, Derek and Hilliges, Otmar and Weber, Romann M.},
  booktitle = {Advances in Neural Information Processing Systems}, year = {2024}
}"""
DATA_TYPES = {"folder": "imagefolder", "list": "imagefolder"}  # what the Hub calls these kinds of sources


@dataclass(frozen=True)
class Metric:
    """A measured value.

    Attributes:
        name: as in metrics.json, such as "psnr".
        title: for people, such as "PSNR".
        value: the value.
        protocol: what distinguishes it from other metrics of this name.
    """

    name: str
    title: str
    value: float
    protocol: str


@dataclass(frozen=True)
class ModelFacts:
    """What a card says besides what the model tells itself. What is unknown stays empty and is left out of the card.

    Attributes:
        name: name of the model.
        data: path or URI of the training data, of which the card names only the last part.
        images: number of training images.
        left_out: what of the data was not trained on, such as "12 hidden (.jpg)".
        training: settings of the training for people, by name.
        validation: path or URI of the data that the metrics were measured on; the card names only its last part.
        validation_kind: kind of that source: "folder", "list", "parquet" or "webdataset".
        measured: what was measured there and how, such as "256 images at 256 px, resized and cropped".
        metrics: the metrics.
        limits: further sentences on what the model can't do.
        license: licence of the weights, as the Hub names it, such as "cc-by-4.0".
    """

    name: str = ""
    data: str = ""
    images: int = 0
    left_out: str = ""
    training: Mapping[str, str] = field(default_factory=dict)
    validation: str = ""
    validation_kind: str = ""
    measured: str = ""
    metrics: Sequence[Metric] = ()
    limits: Sequence[str] = ()
    license: str = ""


NOTHING = ModelFacts()


class LatentForm(NamedTuple):
    """What the latents of an autoencoder look like.

    Attributes:
        factor: downsampling factor.
        channels: number of channels.
        point: whether an image has one latent and no posterior.
    """

    factor: int
    channels: int
    point: bool


class ModelWithCard(ModelMixin):
    """A model of diffusers that is uploaded with our card.

    diffusers' own upload writes a card that says nothing of the model, also over one that is in the folder.
    """

    def latent_form(self) -> LatentForm:
        """Return what the latents look like, for the card."""
        raise NotImplementedError

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
        license: str | None = None,
    ) -> Any:
        """Upload the model to the Hugging Face Hub, with a model card.

        The card is README.md of the local folder that the model was loaded from, as it is. If there is none, a card
        that the repository has already stays; if it has none either, a new one says what the model itself tells.

        Args:
            repo_id: The repository, org/name. It is made if it does not exist.
            commit_message: Message of the commit.
            private: Whether a new repository is private; None: as the organisation has it.
            token: Token of the Hub; None: the one that `hf auth login` stored.
            create_pr: Whether to open a pull request instead of a commit.
            safe_serialization: Whether the weights are safetensors; others are not loaded here.
            variant: Variant of the weights' names, such as "fp16".
            subfolder: Folder of the repository to upload to; no card is sent there.
            license: Licence of the weights, for the card, such as "cc-by-4.0".

        Returns:
            What `huggingface_hub.upload_folder` returns.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization=safe_serialization, variant=variant)
            return _upload(self, folder, repo_id, commit_message, private, token, create_pr, subfolder, license)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        save_function: Callable | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Save the model as `ModelMixin.save_pretrained` does; the arguments are the same.

        With `push_to_hub=True` the folder is uploaded as by `push_to_hub`, whose arguments are among the options.
        """
        names = ("repo_id", "commit_message", "private", "token", "create_pr", "license")
        given = {name: options.pop(name) for name in names if push_to_hub and name in options}
        super().save_pretrained(
            save_directory, is_main_process, save_function, safe_serialization, variant, max_shard_size, **options
        )
        if push_to_hub:
            _upload(self, str(save_directory), **{"repo_id": Path(save_directory).name} | given)

    def to_json_string(self) -> str:
        """Return the config as JSON, without the path of this machine that the model was loaded from."""
        config = json.loads(super().to_json_string())
        config.pop("_name_or_path", None)
        return json.dumps(config, indent=2, sort_keys=True) + "\n"


def _upload(
    model: Any,
    folder: str,
    repo_id: str,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    create_pr: bool | None = False,
    subfolder: str | None = None,
    license: str | None = None,
) -> Any:
    """Upload a model's folder with its card; arguments as for `ModelWithCard.push_to_hub`."""
    from huggingface_hub import HfApi, ModelCard

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    card, own = Path(folder, CARD), _own_card(model)
    if subfolder or card.is_file():
        pass
    elif own is not None:
        card.write_bytes(own)
    elif not api.file_exists(repo_id, CARD):
        write_card(folder, model, ModelFacts(name=repo_id))
    if license and card.is_file():
        loaded = ModelCard(card.read_text(encoding="utf-8"))
        loaded.data["license"] = license
        loaded.save(card)
    return api.upload_folder(
        repo_id=repo_id, folder_path=folder, path_in_repo=subfolder, create_pr=create_pr,
        commit_message=commit_message or f"Upload {type(model).__name__}",
    )  # fmt: skip


def _own_card(model: Any) -> bytes | None:
    """Return the card in the local model folder that a model was loaded from; None if there is none."""
    place = model.config.get("_name_or_path")
    if not place or not Path(place, CARD).is_file() or not Path(place, "config.json").is_file():
        return None  # a folder without config.json is that of a pipeline, whose card is another one
    return Path(place, CARD).read_bytes()


def write_card(folder: str | Path, model: Any, facts: ModelFacts = NOTHING) -> None:
    """Write README.md into the folder of an autoencoder.

    Args:
        folder: The model folder.
        model: The model in it: a LiteVAE, a DistilledVAE or a NormalizedAutoencoder.
        facts: What is known of it besides.
    """
    Path(folder, CARD).write_text(_autoencoder_card(model, facts), encoding="utf-8")


def write_ldm_card(folder: str | Path, ldm: Any, facts: ModelFacts = NOTHING) -> None:
    """Write README.md into the folder of a latent diffusion model, an `LDM`; arguments as for `write_card`."""
    Path(folder, CARD).write_text(_ldm_card(ldm, facts), encoding="utf-8")


def _autoencoder_card(model: Any, facts: ModelFacts) -> str:
    kind, config = type(model).__name__, model.config
    inner = getattr(model, "autoencoder", model)  # of a NormalizedAutoencoder
    inputs, (factor, channels, point) = inner.config.get("in_channels", 3), model.latent_form()
    about = {"class": f"`{kind}`" + f" around `{type(inner).__name__}`" * (inner is not model)}
    if encoder := getattr(inner, "encoder", None):
        size = inner.config.get("size")
        about["encoder"] = f"{size}, " * bool(size) + f"{_parameters(encoder)} parameters"
    if decoder := getattr(inner, "teacher", None):
        about["decoder"] = f"{_parameters(decoder)} parameters, those of the teacher's `{type(decoder).__name__}`"
    elif decoder := getattr(inner, "decoder", None):
        about["decoder"] = f"{_parameters(decoder)} parameters"
    about["latent"] = f"{channels} channels, 1/{factor} of the image's height and width (downsampling factor {factor})"
    about["encoding"] = "one latent, no posterior" if point else "a normal posterior (mean and log-variance)"
    use = [
        "import torch",
        "import litevae",
        "",
        f'vae = litevae.{kind}.from_pretrained("FOLDER")  # this folder, or its name on the Hugging Face Hub',
        f"x = torch.zeros(1, {inputs}, {8 * factor}, {8 * factor})  # images in [-1, 1]",
        f"latents = vae.encode(x).{'latents' if point and kind == 'DistilledVAE' else 'latent_dist.mode()'}",
        "images = vae.decode(latents).sample",
    ]
    what = {
        "LiteVAE": "An image autoencoder for latent diffusion, with the interface of diffusers' `AutoencoderKL`.",
        "DistilledVAE": "A small encoder that has learned the latents of another autoencoder, with its decoder.",
        "NormalizedAutoencoder": "An image autoencoder whose latents are normalised for a diffusion model.",
    }[kind]
    text = [
        *[f"{what} It is made with litevae, after LiteVAE ([arXiv {PAPER}](https://arxiv.org/abs/{PAPER})).", ""],
        *_table(about),
        *["", "## Use", "", "```python", *use, "```", ""],
        "It needs the package litevae. A pipeline of diffusers that holds this model is loaded after `import litevae`;",
        f"`diffusers.AutoModel` looks for `{kind}` in diffusers only, and does not find it.",
        *_latents(kind, config),
        *_trained(facts),
        *_measured(facts),
        *["", "## Limits", ""],
        f"- Height and width of images are multiples of {factor}.",
        "- It knows images like those that it was trained on.",
        *[f"- {limit}" for limit in facts.limits],
    ]
    return _card(facts, kind, text, ["autoencoder", "vae", "latent-diffusion"])


def _ldm_card(ldm: Any, facts: ModelFacts) -> str:
    channels, height, width = ldm.shape
    about = {
        "network": f"`{type(ldm.network).__name__}`, {_parameters(ldm.network)} parameters",
        "latents": f"{channels} channels, {height} x {width}",
        "autoencoder": f"`{type(ldm.vae.autoencoder).__name__}`, {_parameters(ldm.vae)} parameters",
        "conditioning": f"{ldm.classes} classes" if ldm.classes else "none",
        "prediction": str(ldm.scheduler.config.prediction_type),
    }
    labels = "class_labels=0, " if ldm.classes else ""
    use = [
        "from litevae import LatentDiffusionPipeline",
        "",
        'pipeline = LatentDiffusionPipeline.from_pretrained("FOLDER")  # a local folder',
        f"image = pipeline({labels}seeds=[0], num_inference_steps=50).images[0]",
    ]
    text = [
        *["A latent diffusion model that was made with litevae.", "", *_table(about)],
        *["", "## Use", "", "```python", *use, "```", ""],
        "`diffusers.DiffusionPipeline.from_pretrained` opens the folder too, after `import litevae`. Neither takes the",
        "name of a repository whose parts are of other packages than diffusers: download it before, as by",
        "`hf download org/name --local-dir FOLDER`.",
        *_trained(facts),
        *_measured(facts),
        *["", "## Limits", "", "- It draws images like those that it was trained on. There is no text conditioning."],
        *[f"- {limit}" for limit in facts.limits],
    ]
    task = None if ldm.classes else "unconditional-image-generation"
    return _card(facts, "Latent diffusion model", text, ["latent-diffusion"], task)


def _latents(kind: str, config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the section on the statistics of the latents, if the config has any."""
    known = config.get("latents_std") is not None or config.get("scaling_factor", 1.0) != 1
    if not known and kind != "DistilledVAE":
        return
    yield from ("", "## Latents", "")
    if known:
        numbers = {name: config.get(name) for name in ("scaling_factor", "shift_factor", "latents_mean", "latents_std")}
        whose = {
            "LiteVAE": "Statistics of the latents, in `config.json` where pipelines of diffusers look for them:",
            "DistilledVAE": "Statistics of the latents, taken over from the teacher's config:",
            "NormalizedAutoencoder": "`encode` subtracts this mean and divides by this standard deviation, by channel:",
        }
        shown = {name: value for name, value in numbers.items() if value is not None}
        yield from (whose[kind], "", *_table({f"`{name}`": _number(value) for name, value in shown.items()}))
    if kind == "DistilledVAE":
        r2, space = config.get("latent_r2"), config.get("latent_space")
        yield from [""] * known
        if r2 is None:
            yield "How much of the variance of the teacher's latents the encoder explains was not measured."
        else:
            yield f"On validation images the encoder explains R² = {r2:.3f} of the variance of the teacher's latents."
        if space:
            yield f"So its latents count as those of {_code(space['name'])}, fingerprint `{space['fingerprint'][:12]}`."
        elif r2 is not None:
            yield "That is too little for them to count as the teacher's."


def _trained(facts: ModelFacts) -> Iterator[str]:
    """Yield the sections on data and training."""
    if facts.data:
        images = f": {facts.images:,} image{'s' if facts.images != 1 else ''}" if facts.images else ""
        left = f" Left out: {_plain(facts.left_out)}." if facts.left_out else ""
        yield from ("", "## Training data", "", f"{_code(_last_part(facts.data))}{images}.{left}")
    if facts.training:
        yield from ("", "## Training", "", *_table(facts.training))
    if not facts.data and not facts.training:
        yield from ("", "## Training", "", "This card was made from the model alone, which does not tell its training.")


def _measured(facts: ModelFacts) -> Iterator[str]:
    """Yield the section on metrics."""
    if not facts.metrics:
        return
    yield from ("", "## Metrics", "")
    where = f" on {_code(_last_part(facts.validation))}" if facts.validation else ""
    yield f"From the training's own validation{where}" + f": {facts.measured}." * bool(facts.measured)
    yield from ("Numbers of other images, sizes or protocols can't be compared with these.", "")
    yield from ("| metric | value | protocol |", "| --- | --- | --- |")
    yield from (f"| {metric.title} | {metric.value:.4g} | {_plain(metric.protocol)} |" for metric in facts.metrics)


def _card(facts: ModelFacts, kind: str, text: Sequence[str], tags: Sequence[str], task: str | None = None) -> str:
    """Return the whole card: the metadata that the Hub reads, the title, the text, the citation and the licence."""
    from huggingface_hub import EvalResult, ModelCardData

    name = _plain(facts.name) or kind
    results = [
        EvalResult(
            task_type="image-to-image",
            dataset_type=DATA_TYPES.get(facts.validation_kind, facts.validation_kind or "imagefolder"),
            dataset_name=_last_part(facts.validation) or "validation images",
            metric_type=metric.name,
            metric_name=metric.title,
            metric_value=metric.value,
            metric_args={"protocol": metric.protocol, "images": facts.measured},
        )
        for metric in facts.metrics
    ]
    data = ModelCardData(
        license=facts.license or None,
        library_name=LIBRARY,
        pipeline_tag=task,
        tags=[LIBRARY, *tags],
        model_name=name if results else None,
        eval_results=results or None,
    )
    licence = "None is given for these weights. Whoever publishes them can add one to the first lines of this file."
    if facts.license:
        licence = f"Of these weights: {facts.license}."
    end = ["", "## Citation", "", "```bibtex", CITATION, "```", "", "## Licence", "", licence, ""]
    return "\n".join(["---", data.to_yaml(), "---", "", f"# {name}", "", *text, *end])


def _parameters(module: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()):,}"


def _table(rows: Mapping[str, str]) -> list[str]:
    """Return the lines of a table with two columns and no heading."""
    return ["| | |", "| --- | --- |", *(f"| {name} | {_plain(text)} |" for name, text in rows.items())]


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, int | float) else ", ".join(f"{each:.6g}" for each in value)


def _last_part(place: str) -> str:
    """Return the last part of a path or URI: the rest may tell of the machine or the bucket that it lies on."""
    return place.rstrip("/").rpartition("/")[2]


def _plain(text: str) -> str:
    """Return a text on one line that ends no cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _code(text: str) -> str:
    """Return a text as Markdown's code."""
    return f"`{_plain(text.replace('`', ' '))}`"
