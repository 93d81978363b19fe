"""Small faults that the fast tests have to notice: `make mutants` puts them into the code, one at a time."""

from typing import NamedTuple


class Mutant(NamedTuple):
    """Where `old`, which the product holds once, is replaced by `new`, each of `tests` has to fail (of a test with
    several cases one case). `file` is where it stood last: it is found by its text."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def __str__(self) -> str:
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        return f"{self.file}: {old}  ->  {new}"


MUTANTS = [
    Mutant(
        "pipelines/training.py",
        "return (images + 1) / (config.warmup + 1)",
        "return 1.0",
        ("tests/pipelines/test_training.py::test_the_rate_warms_up_and_falls",),
    ),
    Mutant(
        "pipelines/training.py",
        "return every > 0 and before // every != after // every",
        "return before // every != after // every if every else True",
        ("tests/pipelines/test_training.py::test_due_where_a_multiple_was_passed",),
    ),
    Mutant(
        "jobs/configs/demo.yaml",
        "optim: {lr: 1.0e-3, betas: [0.9, 0.99]",
        "optim: {lr: 1.0e-3, betas: [0.9, 0.999]",
        ("tests/pipelines/test_config.py::test_shipped_presets_are_valid",),
    ),
    Mutant(
        "jobs/configs/imagenet-256.yaml",
        "sampler: heun",
        "sampler: euler",
        ("tests/pipelines/test_config.py::test_shipped_presets_are_valid",),
    ),
    Mutant(
        "litevae/cache.py",
        "np.exp(logvar.clip(*MAX_LOGVAR))",
        "np.exp(logvar)",
        ("tests/litevae/test_cache.py::test_statistics_clip_log_variances_as_diffusers_does",),
    ),
    Mutant(
        "litevae/cache.py",
        "noise *= np.exp(0.5 * logvar.numpy().clip(*MAX_LOGVAR))",
        "noise *= np.exp(0.5 * logvar.numpy())",
        ("tests/litevae/test_cache.py::test_draws_clip_log_variances_as_diffusers_does",),
    ),
    Mutant(
        "litevae/encoder.py",
        "with torch.no_grad(), torch.autocast(x.device.type, enabled=False):",
        "with torch.no_grad():",
        ("tests/litevae/test_encoder.py::test_the_transform_stays_in_fp32_under_autocast",),
    ),
    Mutant(
        "litevae/layers.py",
        "group_width: int = 1, eps: float = 1e-6) -> nn.GroupNorm:",
        "group_width: int = 1, eps: float = 1e-5) -> nn.GroupNorm:",
        ("tests/litevae/test_layers.py::test_every_normalisation_of_a_model_has_sd_vaes_epsilon",),
    ),
    Mutant(
        "litevae/layers.py",
        "channels if channels >= 128 else",
        "channels if channels > 128 else",
        ("tests/litevae/test_layers.py::test_groups_of_a_normalisation",),
    ),
    Mutant(
        "pipelines/audit.py",
        "STALE = 3600.0",
        "STALE = 360.0",
        ("tests/pipelines/test_audit_parts.py::test_files_that_no_commit_names",),
    ),
    Mutant(
        "pipelines/audit.py",
        "if not np.array_equal(np.sort(views), wanted):",
        "if len(views) != len(wanted):",
        ("tests/pipelines/test_audit_parts.py::test_each_kind_of_damage_is_named",),
    ),
    Mutant(
        "pipelines/audit.py",
        "and all(np.allclose(ours[key], theirs[key], rtol=1e-9) for key in ours)",
        "",
        ("tests/pipelines/test_audit_parts.py::test_statistics_agree_to_nine_digits",),
    ),
    Mutant(
        "pipelines/complexity.py",
        "return found[self.cfg.warmup :]",
        "return found",
        ("tests/pipelines/test_complexity.py::test_one_model_is_measured",),
    ),
    Mutant(
        "pipelines/complexity.py",
        "counter.get_total_flops() / 2e9",
        "counter.get_total_flops() / 1e9",
        ("tests/pipelines/test_complexity.py::test_macs_are_half_the_flops",),
    ),
    Mutant(
        "pipelines/config.py",
        "kl: Term = Field(Term(weight=2.1e-8)",
        "kl: Term = Field(Term(weight=2.1e-6)",
        ("tests/pipelines/test_config.py::test_defaults_are_those_recorded",),
    ),
    Mutant(
        "pipelines/config.py",
        'weight_decay: Weight = Field(0.0, description="decoupled',
        'weight_decay: Weight = Field(0.01, description="decoupled',
        ("tests/pipelines/test_config.py::test_defaults_are_those_recorded",),
    ),
    Mutant(
        "pipelines/config.py",
        "zero_snr: bool = Field(False,",
        "zero_snr: bool = Field(True,",
        ("tests/pipelines/test_config.py::test_defaults_are_those_recorded",),
    ),
    Mutant(
        "pipelines/config.py",
        "calibrate: Positive = Field(\n        2048,",
        "calibrate: Positive = Field(\n        1024,",
        ("tests/pipelines/test_config.py::test_defaults_are_those_recorded",),
    ),
    Mutant(
        "pipelines/config.py",
        "Fraction = Annotated[float, Field(ge=0, le=1)]",
        "Fraction = Annotated[float, Field(ge=0)]",
        ("tests/pipelines/test_config.py::test_fields_allow_what_is_recorded",),
    ),
    Mutant(
        "pipelines/config.py",
        'if self.cutmix and self.kind != "unet"',
        'if self.cutmix and self.kind == "unet"',
        ("tests/pipelines/test_config.py::test_fields_that_go_together",),
    ),
    Mutant(
        "pipelines/decode.py",
        'rows.append({"id": item.id, "unit": shard.first + unit,',
        'rows.append({"id": item.id, "unit": unit,',
        ("tests/pipelines/test_encode_parts.py::test_a_shard_is_decoded_in_order",),
    ),
    Mutant(
        "pipelines/decode.py",
        'f"{views.seed}\\0{identity}".encode()',
        "identity.encode()",
        ("tests/pipelines/test_encode_parts.py::test_random_crops_are_by_seed_and_id",),
    ),
    Mutant(
        "pipelines/encode.py",
        'halve = latent_content(model) == "moments" and',
        'halve = latent_content(model) == "mean" and',
        ("tests/pipelines/test_encode_parts.py::test_of_moments_the_mean_is_the_first_half",),
    ),
    Mutant(
        "pipelines/encode.py",
        'if fingerprint(folder) != plan["model"]["fingerprint"]:\n        raise UserError(f"{folder} on',
        'if False:\n        raise UserError(f"{folder} on',
        ("tests/pipelines/test_encode_parts.py::test_a_model_that_was_exchanged_is_noticed_where_it_encodes",),
    ),
    Mutant(
        "pipelines/encode.py",
        "for number in range(len(planned)) if number not in committed]",
        "for number in range(len(planned))]",
        ("tests/pipelines/test_encode_parts.py::test_shards_without_a_commit_are_done",),
    ),
    Mutant(
        "pipelines/encode.py",
        "if quarantined > budget * total:",
        "if quarantined >= budget * total:",
        ("tests/pipelines/test_encode_parts.py::test_a_budget_is_exceeded_by_more_than_its_share",),
    ),
    Mutant(
        "pipelines/encode.py",
        'todo.append(Task(commit["shard"], committed[commit["shard"]] + 1,',
        'todo.append(Task(commit["shard"], committed[commit["shard"]],',
        ("tests/pipelines/test_encode_parts.py::test_a_retry_is_of_the_quarantined_for_these_reasons",),
    ),
    Mutant(
        "pipelines/encode.py",
        'order = np.lexsort((table["view"].to_numpy(), table["unit"].to_numpy()))',
        'order = np.lexsort((table["unit"].to_numpy(), table["view"].to_numpy()))',
        ("tests/pipelines/test_encode_parts.py::test_rows_are_in_the_order_of_units_and_views",),
    ),
    Mutant(
        "pipelines/encode.py",
        "for _, images in finished[1:])",
        "for _, images in finished)",
        ("tests/pipelines/test_encode_parts.py::test_what_a_run_has_done_is_counted",),
    ),
    Mutant(
        "pipelines/encode.py",
        "batch = np.zeros((len(part) if self.native else self.batch_size,",
        "batch = np.zeros((len(part),",
        ("tests/pipelines/test_encode_parts.py::test_batches_are_full_and_rows_in_order",),
    ),
    Mutant(
        "pipelines/evaluate.py",
        "metric.measure(x, other).double()",
        "metric.measure(other, x).double()",
        ("tests/pipelines/test_judging_parts.py::test_a_batch_is_measured_beside_bicubic",),
    ),
    Mutant(
        "pipelines/evaluate.py",
        "latent = encoded.chunk(2, dim=1)[0] if self.posterior else encoded\n            middle",
        "latent = encoded.chunk(2, dim=1)[1] if self.posterior else encoded\n            middle",
        ("tests/pipelines/test_judging_parts.py::test_a_batch_is_measured_beside_bicubic",),
    ),
    Mutant(
        "pipelines/evaluate.py",
        "-(-cfg.images // cfg.pictures)",
        "max(1, cfg.images // cfg.pictures)",
        ("tests/pipelines/test_judging_parts.py::test_pictures_are_evenly_spaced",),
    ),
    Mutant(
        "pipelines/evaluate.py",
        "if (wanted := units < self.cfg.mmd_images).any():",
        "if (wanted := units <= self.cfg.mmd_images).any():",
        ("tests/pipelines/test_judging_parts.py::test_a_batch_is_measured_beside_bicubic",),
    ),
    Mutant(
        "pipelines/judge.py",
        "generation.precision_recall(of, kept)",
        "generation.precision_recall(kept, of)",
        ("tests/pipelines/test_judging_parts.py::test_generated_images_are_judged_by_the_reference",),
    ),
    Mutant(
        "pipelines/judge.py",
        "scores.caution(min(counts), network)",
        "scores.caution(max(counts), network)",
        ("tests/pipelines/test_judging_parts.py::test_generated_images_are_judged_by_the_reference",),
    ),
    Mutant(
        "pipelines/judge.py",
        "found[name].kept.append(values[mask])",
        "found[name].kept.append(values)",
        ("tests/pipelines/test_judging_parts.py::test_features_are_of_the_images_that_can_be_read",),
    ),
    Mutant(
        "pipelines/latents.py",
        "count = len(raw) // subset",
        "count = -(-len(raw) // subset)",
        ("tests/pipelines/test_judging_parts.py::test_subsets_of_an_mmd_are_told",),
    ),
    Mutant(
        "pipelines/paper.py",
        "- {pixels(row.at)})\n",
        "| {pixels(row.at)})\n",
        ("tests/pipelines/test_paper.py::test_tables_of_evaluations_and_samples",),
    ),
    Mutant(
        "pipelines/paper.yaml",
        "+ wavelet loss: {paper: [0.96,",
        "+ wavelet loss: {paper: [0.98,",
        ("tests/pipelines/test_paper.py::test_the_numbers_are_the_papers",),
    ),
    Mutant(
        "pipelines/paper.yaml",
        "imagenet-256: {schedule: [[256, 100000]]",
        "imagenet-256: {schedule: [[256, 150000]]",
        ("tests/pipelines/test_paper.py::test_rows_train_what_the_paper_trained",),
    ),
    Mutant(
        "pipelines/paper.yaml",
        "n12: {train_vae: {model: {latent_channels: 12}, loss: {kl: {weight: 6.3e-8}}}}",
        "n12: {train_vae: {model: {latent_channels: 12}, loss: {kl: {weight: 2.1e-8}}}}",
        ("tests/pipelines/test_paper.py::test_kl_weighs_the_same_for_every_number_of_channels",),
    ),
    Mutant(
        "pipelines/paper.yaml",
        "discriminator: 0.25",
        "discriminator: 0.5",
        ("tests/pipelines/test_paper.py::test_what_smaller_scales_set",),
    ),
    Mutant(
        "pipelines/reading.py",
        "[units[number * len(units) // count] for number in range(count)]",
        "[units[number] for number in range(count)]",
        ("tests/pipelines/test_judging_parts.py::test_images_are_taken_evenly",),
    ),
    Mutant(
        "pipelines/sample.py",
        "[cfg.classes[number % len(cfg.classes)] for number in numbers]",
        "[cfg.classes[0] for number in numbers]",
        ("tests/pipelines/test_sample.py::test_a_worker_gives_the_model_all_that_decides_on_an_image",),
    ),
    Mutant(
        "pipelines/sample.py",
        "                guidance=cfg.guidance,\n            )",
        "            )",
        ("tests/pipelines/test_sample.py::test_a_worker_gives_the_model_all_that_decides_on_an_image",),
    ),
    Mutant(
        "pipelines/sample.py",
        "[(cfg.seed, number) for number in numbers]",
        "[(cfg.seed, place) for place in range(len(numbers))]",
        ("tests/pipelines/test_sample.py::test_a_worker_gives_the_model_all_that_decides_on_an_image",),
    ),
    Mutant(
        "pipelines/sample.py",
        "while waiting and waiting[0].numbers.stop <= batch.stop:",
        "while waiting and waiting[0].numbers.start < batch.stop:",
        ("tests/pipelines/test_sample.py::test_batches_are_whole_and_files_written_as_they_are_complete",),
    ),
    Mutant(
        "pipelines/scores.py",
        "if count > network.dimension:",
        "if count >= network.dimension:",
        ("tests/pipelines/test_judging_parts.py::test_few_images_are_warned_of",),
    ),
    Mutant(
        "pipelines/sweep.py",
        '"mode": "max"}',
        '"mode": "min"}',
        ("tests/pipelines/test_sweep_parts.py::test_what_is_best_is_the_highest",),
    ),
    Mutant(
        "pipelines/sweep.py",
        "grace_period=every, max_t=total + 1",
        "grace_period=total, max_t=total + 1",
        ("tests/pipelines/test_sweep_parts.py::test_asha_may_stop_a_trial_from_its_first_look_on",),
    ),
    Mutant(
        "pipelines/sweep.py",
        "return tune.randint(arguments[0], arguments[1] + 1)",
        "return tune.randint(arguments[0], arguments[1])",
        ("tests/pipelines/test_sweep_parts.py::test_what_a_field_is_drawn_from",),
    ),
    Mutant(
        "pipelines/sweep.py",
        "num_samples=1 if given else cfg.trials",
        "num_samples=cfg.trials",
        ("tests/pipelines/test_sweep_parts.py::test_given_trials_are_run_once_and_so_many_at_a_time",),
    ),
    Mutant(
        "pipelines/trial.py",
        'if cfg.scheduler != "pbt":',
        'if cfg.scheduler == "pbt":',
        ("tests/pipelines/test_sweep_parts.py::test_what_a_training_reports_at_checkpoints_is_tunes",),
    ),
    Mutant(
        "pipelines/trial.py",
        'own = trained["row"] == row.folder and',
        'own = trained["row"] != row.folder and',
        ("tests/pipelines/test_sweep_parts.py::test_a_row_is_evaluated_and_joins_its_trainings_run",),
    ),
]
