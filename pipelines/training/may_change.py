"""Names of the fields that may differ when a run resumes; of sections, every field."""

# Of train_vae. Stages may only grow; see `vae._check_stages`.
VAE = (
    "root", "ray", "yes", "stages", "checkpointing", "val_images", "data.val", "data.loaders", "data.max_bad",
    "data.max_pixels", "loss.lpips.required", "loop.val_every", "loop.checkpoint_every", "loop.keep", "loop.log_every",
    "loop.max_restarts",
)  # fmt: skip

# Of train_ldm. `images` may only grow.
LDM = (
    "root", "ray", "yes", "images", "vae", "cache_version", "cache_local", "sample_images", "sample_steps",
    "sample_guidance", "checkpointing", "data.loaders", "data.max_bad", "data.max_pixels", "data.calibrate", "optim.lr",
    "optim.clip", "loop.precision", "loop.val_every", "loop.checkpoint_every", "loop.keep", "loop.log_every",
    "loop.max_restarts", "loop.max_skipped",
)  # fmt: skip
LDM_CACHED = (*LDM, "data.decode")  # of train_ldm with mode=cache, which decodes no images
