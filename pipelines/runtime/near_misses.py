"""What was probably meant by a word that does not exist: a field, a job, an action, a value.

Two things count: how many letters differ, and what the same thing is called in the scripts of diffusers and in the
options of accelerate, whose users type `learning_rate` where this project says `optim.lr`.
"""

import shlex
from collections.abc import Callable, Iterable, Sequence

MOST = 4  # names that one suggestion holds


Alias = dict[str, str]  # by field of this project: how its values differ, with an example; "": not at all


def _called(*fields: str, note: str = "") -> Alias:
    """Return an alias of these fields, of which a job's first one is suggested."""
    return dict.fromkeys(fields, note)


_STEPS = "lengths are in images here: steps x batch size"
_STAGES = {"stages": "a list: stages='[{resolution: 256, images: 800000, batch_size: 16}]'"}
_LENGTH = _called("images", note=_STEPS) | _STAGES
_BATCH = _called("batch_size") | _STAGES
_PIXELS = _called("transform.resolution", "data.resolution", "resolution", "resolutions") | _STAGES
_IMAGES_IN = _called("data.train.uri", "source.uri", "data.source.uri", "source")
_MODEL = _called("model.init", "vae", "model", "models")
_OUT = _called("out") | {"root": "runs are written to <root>/<name>"}
_PRECISION = _called("loop.precision", "precision", note="auto, fp32 or bf16")
_WORKERS = _called("ray.workers", "threads")
_LOADERS = _called("data.loaders", "ray.decode_tasks", "threads")
_EMA = _called("loop.ema", note="the decay of the average, e.g. loop.ema=0.9999; 0: none")
_BETAS = _called("optim.betas", note="both in one list, e.g. optim.betas=[0.9,0.999]")
_RESUME = _called("name", "out", note="the same one again goes on where it stopped")
_TRACKING = _called("tracking.enabled", note="runs are tracked in MLflow; false: only in the run's metrics.jsonl")

# What diffusers' training scripts, accelerate and neighbouring projects call it. `_` and `-` do not count.
ALIASES: dict[str, Alias] = {
    "learning_rate": _called("optim.lr"),
    "lr": _called("optim.lr"),
    "base_lr": _called("optim.lr"),
    "discriminator_lr": _called("loss.adversarial.lr"),
    "batch_size": _BATCH,
    "train_batch_size": _BATCH,
    "eval_batch_size": _called("batch_size"),
    "per_device_train_batch_size": _BATCH,
    "max_train_steps": _LENGTH,
    "num_train_steps": _LENGTH,
    "max_steps": _LENGTH,
    "num_steps": _LENGTH,
    "steps": _LENGTH,
    "num_train_epochs": _LENGTH,
    "num_epochs": _LENGTH,
    "epochs": _LENGTH,
    "max_epochs": _LENGTH,
    "resolution": _PIXELS,
    "image_size": _PIXELS,
    "img_size": _PIXELS,
    "size": _PIXELS,
    "train_data_dir": _IMAGES_IN,
    "train_data": _IMAGES_IN,
    "data_dir": _IMAGES_IN,
    "data_path": _IMAGES_IN,
    "dataset": _IMAGES_IN,
    "dataset_name": _IMAGES_IN,
    "dataset_path": _IMAGES_IN,
    "instance_data_dir": _IMAGES_IN,
    "input_dir": _IMAGES_IN,
    "input": _IMAGES_IN,
    "images_dir": _IMAGES_IN,
    "val_data_dir": _called("data.val.uri"),
    "validation_data_dir": _called("data.val.uri"),
    "output_dir": _OUT,
    "output": _OUT,
    "save_dir": _OUT,
    "out_dir": _OUT,
    "logging_dir": _called("tracking.uri"),
    "pretrained_model_name_or_path": _MODEL,
    "pretrained_vae_model_name_or_path": _MODEL,
    "vae_path": _MODEL,
    "model_path": _MODEL,
    "model_name": _MODEL,
    "checkpoint": _MODEL,
    "ckpt": _MODEL,
    "mixed_precision": _PRECISION,
    "dtype": _PRECISION,
    "fp16": _PRECISION,
    "bf16": _PRECISION,
    "gradient_accumulation_steps": _called("optim.accumulate"),
    "accumulate_grad_batches": _called("optim.accumulate"),
    "gradient_checkpointing": _called("checkpointing"),
    "enable_gradient_checkpointing": _called("checkpointing"),
    "random_seed": _called("seed", "transform.seed"),
    "seed": _called("seed", "seeds", "transform.seed"),
    "checkpointing_steps": _called("loop.checkpoint_every", note=_STEPS),
    "save_steps": _called("loop.checkpoint_every", note=_STEPS),
    "save_every": _called("loop.checkpoint_every", note="in images"),
    "checkpoints_total_limit": _called("loop.keep"),
    "validation_steps": _called("loop.val_every", note=_STEPS),
    "validation_epochs": _called("loop.val_every", note="in images"),
    "eval_steps": _called("loop.val_every", note=_STEPS),
    "eval_every": _called("loop.val_every", note="in images"),
    "logging_steps": _called("loop.log_every"),
    "num_validation_images": _called("val_images", "sample_images"),
    "report_to": _TRACKING,
    "wandb": _TRACKING,
    "tensorboard": _TRACKING,
    "tracker_project_name": _called("tracking.experiment"),
    "tracking_uri": _called("tracking.uri"),
    "mlflow": _called("tracking.uri"),
    "run_name": _called("name", "tracking.run"),
    "num_processes": _WORKERS,
    "num_gpus": _WORKERS,
    "gpus": _WORKERS,
    "nproc_per_node": _WORKERS,
    "devices": _WORKERS,
    "num_machines": _called("ray.workers", note="one worker for each GPU of all machines"),
    "device": _called("ray.gpu", "gpu", note="auto, true or false"),
    "cuda": _called("ray.gpu", "gpu", note="auto, true or false"),
    "dataloader_num_workers": _LOADERS,
    "num_workers": _LOADERS,
    "use_ema": _EMA,
    "ema_decay": _EMA,
    "ema_max_decay": _EMA,
    "lr_scheduler": _called("optim.schedule", note="constant or cosine, after optim.warmup"),
    "scheduler": _called("optim.schedule", note="constant or cosine, after optim.warmup") | _called("sampler"),
    "lr_warmup_steps": _called("optim.warmup", note=_STEPS),
    "warmup_steps": _called("optim.warmup", note=_STEPS),
    "max_grad_norm": _called("optim.clip"),
    "grad_clip": _called("optim.clip"),
    "gradient_clip_val": _called("optim.clip"),
    "resume_from_checkpoint": _RESUME,
    "resume": _RESUME,
    "adam_beta1": _BETAS,
    "adam_beta2": _BETAS,
    "adam_weight_decay": _called("optim.weight_decay"),
    "center_crop": _called("data.crop", "transform.crop", note="center or random"),
    "random_crop": _called("data.crop", "transform.crop", note="center or random"),
    "random_flip": _called("data.flip", "transform.flips"),
    "flip": _called("data.flip", "transform.flips"),
    "flips": _called("data.flip", "transform.flips"),
    "caption_column": _called("source.columns", note="a list, e.g. source.columns=[caption]"),
    "label_column": _called("label", "source.columns", note="source.columns is a list, e.g. [label]"),
    "snr_gamma": _called("objective.gamma", note="with objective.weighting=min-snr"),
    "prediction_type": _called("objective.prediction", note="epsilon, v or flow"),
    "noise_schedule": _called("objective.schedule", note="sqrt-linear or cosine"),
    "rescale_betas_zero_snr": _called("objective.zero_snr"),
    "num_inference_steps": _called("steps", "sample_steps"),
    "ddim_num_inference_steps": _called("steps", "sample_steps"),
    "guidance_scale": _called("guidance", "sample_guidance"),
    "cfg_scale": _called("guidance", "sample_guidance"),
    "num_images": _called("images"),
    "num_images_per_prompt": _called("images"),
    "num_samples": _called("images"),
    "max_train_samples": _called("images"),
    "class_labels": _called("classes", note="a list of class numbers, e.g. classes=[207,360]"),
    "num_classes": _called("classes"),
    "class_dropout_prob": _called("label_dropout"),
    "unet": _called("network", note="see --help network"),
    "latent_dim": _called("model.latent_channels", "latent_channels"),
    "z_channels": _called("model.latent_channels", "latent_channels"),
    "kl_weight": _called("loss.kl.weight", note="on means over elements: Rombach's 1e-6 is 2.1e-8 here"),
    "kl_scale": _called("loss.kl.weight", note="on means over elements: Rombach's 1e-6 is 2.1e-8 here"),
    "perceptual_weight": _called("loss.lpips.weight"),
    "lpips_scale": _called("loss.lpips.weight"),
    "disc_weight": _called("loss.adversarial.weight"),
    "disc_start": _called("loss.adversarial.start", note=_STEPS),
}  # fmt: skip
# Values that others use, and what they are here.
VALUES = {
    "float32": "fp32", "fp16": "bf16", "float16": "fp16", "half": "fp16", "bfloat16": "bf16", "linear": "cosine",
    "constant_with_warmup": "constant", "v_prediction": "v", "v-prediction": "v", "eps": "epsilon", "vgg16": "vgg",
    "alexnet": "alex", "dpmsolver++": "dpm++", "centre": "center", "jpg": "png", "jpeg": "png",
}  # fmt: skip


def distance(one: str, other: str) -> int:
    """Return how many letters must be put in, left out, replaced or swapped with their neighbour between two words.

    This is the Damerau-Levenshtein distance of which no letter is changed twice (optimal string alignment).
    """
    before: list[int] = []
    last = list(range(len(other) + 1))
    for row, letter in enumerate(one, 1):
        now = [row]
        for column, another in enumerate(other, 1):
            best = min(last[column] + 1, now[column - 1] + 1, last[column - 1] + (letter != another))
            if row > 1 and column > 1 and letter == other[column - 2] and one[row - 2] == another:
                best = min(best, before[column - 2] + 1)
            now.append(best)
        before, last = last, now
    return last[-1]


def nearest(word: str, known: Iterable[str]) -> list[str]:
    """Return the known words that are nearest to a word, all that are equally near, and none that is far.

    Near is what differs in a third of its letters at most. A word that is the end of a longer one, behind `-`, is near
    to it, too: `small` to `vae-small`.
    """
    ranks = {other: rank for other in known if (rank := _rank(_plain(word), _plain(other))) is not None}
    return [other for other, rank in ranks.items() if rank == min(ranks.values())]


def field_hint(
    name: str, known: Sequence[str], value: str = "", takes: Callable[[str], bool] = lambda field: True
) -> str:
    """Return what a field that does not exist may be here, as the end of a message; empty where nothing is near.

    Args:
        name: the field that was given, perhaps dotted.
        known: dotted names of all fields and sections of the job.
        value: the value that was given, which is shown with the name where that field can have it.
        takes: whether a field can have this value.
    """

    def meant(fields: Sequence[str], note: str = "") -> str:
        fitting = len(fields) == 1 and bool(value) and not note and takes(fields[0])
        said = shlex.quote(f"{fields[0]}={value}") if fitting else _listed(fields)
        return f"; did you mean {said}?" + (f" ({note})" if note else "")

    def alias(of: Alias) -> str:
        found = next(((field, note) for field, note in of.items() if field in known and field != name), None)
        return meant([found[0]], found[1]) if found else ""

    whole, last = _plain(name), _plain(name.rpartition(".")[2])
    aliases = {_plain(other): of for other, of in ALIASES.items()}
    if close := [field for field in known if _plain(field) == whole]:  # other separators: optim_lr
        return meant(close)
    for word in dict.fromkeys((whole, last)):
        if word in aliases and (hint := alias(aliases[word])):
            return hint
    if close := _near_fields(name, known):
        return meant(close)
    return next(filter(None, (alias(aliases[word]) for word in nearest(whole, aliases))), "")


def value_hint(value: object, words: Sequence[str]) -> str:
    """Return what a value may be of those that a field can have, as the end of a message; empty where none is near."""
    others = {other: meant for other, meant in VALUES.items() if meant in words and other not in words}
    found = nearest(str(value), [*words, *others])
    close = list(dict.fromkeys(others.get(word, word) for word in found))
    return f"; did you mean {_listed(close)}?" if close else ""


def _near_fields(name: str, known: Sequence[str]) -> list[str]:
    """Return the fields that are nearest to a name by their letters."""
    ranks: dict[str, tuple[int, int, int]] = {}
    parent, _, last = name.rpartition(".")
    for field in known:
        section, _, end = field.rpartition(".")
        if section == parent:
            # In the right section one letter may be wrong even in a short name.
            rank = distance(_plain(last), _plain(end))
            if rank <= max(1, max(len(last), len(end)) // 3):
                ranks[field] = (rank, 0, 0)
            continue
        ends = [_rank(_plain(name), _plain(part)) for part in _ends(field)]
        ends += [rank + 1 for rank in [_rank(_plain(last), _plain(end))] if parent and rank is not None]
        if (near := [rank for rank in ends if rank is not None]) and _rank(_plain(last), _plain(end)) is not None:
            ranks[field] = (min(near), 1, distance(_plain(name), _plain(field)) if parent else 0)
    return [field for field, rank in ranks.items() if rank == min(ranks.values())]


def _ends(field: str) -> list[str]:
    """Return a dotted name without none, one, two ... of its first parts."""
    parts = field.split(".")
    return [".".join(parts[number:]) for number in range(len(parts))]


def _rank(word: str, other: str) -> int | None:
    """Return the distance of two words if they are near, else None."""
    if word and len(word) > 2 and other.endswith(f"-{word}"):
        return 1
    if abs(len(word) - len(other)) > max(len(word), len(other)) // 3:
        return None
    apart = distance(word, other)
    return apart if apart <= max(len(word), len(other)) // 3 else None


def _plain(name: str) -> str:
    """Return a name in small letters, with one kind of separator."""
    return name.strip().strip("-").lower().replace("_", "-").replace(".", "-")


def _listed(words: Sequence[str]) -> str:
    """Return words in quotes, the last behind `or`, and not more than a person reads."""
    shown = [repr(word) for word in words[:MOST]]
    if len(words) > MOST:
        return f"{', '.join(shown)} or one of {len(words) - MOST} others"
    return " or ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else shown[0]
