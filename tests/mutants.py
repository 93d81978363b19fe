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
        "litevae/order.py",
        "return rows[_permutation(len(rows), self.seed, epoch, window)], 1",
        "return rows[_permutation(len(rows), self.seed, 0, window)], 1",
        ("tests/litevae/test_order.py::test_rows_of_a_lone_group_come_otherwise_in_each_epoch_and_window",),
    ),
    Mutant(
        "litevae/order.py",
        'window = int(np.searchsorted(starts, offset, side="right")) - 1\n        return int',
        'window = int(np.searchsorted(starts, offset, side="left")) - 1\n        return int',
        ("tests/litevae/test_order.py::test_every_epoch_is_another_permutation",),
    ),
    Mutant(
        "litevae/loader.py",
        "mine = batch[self._rank :: self._world]",
        "mine = batch[:: self._world]",
        ("tests/litevae/test_loader.py::test_ranks_share_one_global_order",),
    ),
    Mutant(
        "litevae/diffusion.py",
        "decay = min(self.decay, (1 + self.updates) / (10 + self.updates))",
        "decay = self.decay",
        ("tests/litevae/test_diffusion.py::test_ema_follows_its_recurrence",),
    ),
    Mutant(
        "litevae/diffusion.py",
        'self.updates = state["updates"]',
        "self.updates = 0",
        ("tests/pipelines/test_ldm_task.py::test_a_task_that_goes_on_ends_with_the_same_bits",),
    ),
    Mutant(
        "pipelines/actors.py",
        '"num_gpus": share.resources.get("GPU", 0),',
        '"num_gpus": share.resources.get("GPU", 1),',
        ("tests/pipelines/test_cluster.py::test_actors_get_the_share_and_can_be_started_again",),
    ),
    Mutant(
        "pipelines/batches.py",
        "seed=seed_for(self._seed, position)",
        "seed=seed_for(self._seed, row)",
        ("tests/pipelines/test_vae_task.py::test_crops_and_flips_are_the_configs_and_others_in_each_epoch",),
    ),
    Mutant(
        "pipelines/batches.py",
        "self.order = EpochOrder(source.groups, seed, source.window)",
        "self.order = EpochOrder(source.groups, 0, source.window)",
        ("tests/pipelines/test_vae_task.py::test_images_come_in_another_order_with_another_seed",),
    ),
    Mutant(
        "pipelines/batches.py",
        "return ImageTransform(data.resolution, data.resize, data.crop, data.flip, decode=data.decode)",
        "return ImageTransform(data.resolution, data.resize, decode=data.decode)",
        (
            "tests/pipelines/test_ldm_task.py::test_online_images_are_cut_as_the_config_says_and_otherwise_in_each_epoch",
        ),
    ),
    Mutant(
        "pipelines/batches.py",
        "return (raw - mean) / std",
        "return raw - mean",
        ("tests/pipelines/test_ldm_task.py::test_online_latents_are_the_autoencoders_normalised",),
    ),
    Mutant(
        "pipelines/batches.py",
        "return len(set(gathered([*self.bad], world)))",
        "return len(gathered([*self.bad], world)) + 1",
        ("tests/pipelines/test_ldm_task.py::test_online_counts_what_it_can_not_read",),
    ),
    Mutant(
        "pipelines/checkpoint.py",
        'return str(max(whole, default=""))',
        'return str(min(whole, default=""))',
        ("tests/pipelines/test_loop.py::test_the_newest_checkpoint_is_the_last_whole_one",),
    ),
    Mutant(
        "pipelines/checkpoint.py",
        "fresh.chmod(0o755)",
        "fresh.chmod(0o700)",
        ("tests/pipelines/test_training.py::test_publish_replaces_whole_folders_or_nothing",),
    ),
    Mutant(
        "pipelines/checkpoint.py",
        "    if now < before:",
        "    if now > before:",
        ("tests/pipelines/test_training.py::test_a_run_may_only_get_longer",),
    ),
    Mutant(
        "pipelines/cluster.py",
        "SPARE_CPUS = 2",
        "SPARE_CPUS = 1",
        ("tests/pipelines/test_cluster.py::test_what_a_job_takes",),
    ),
    Mutant(
        "pipelines/cluster.py",
        "workers = config.min_workers or config.workers",
        "workers = config.workers",
        ("tests/pipelines/test_cluster.py::test_what_a_job_takes",),
    ),
    Mutant(
        "pipelines/cluster.py",
        "if labels.items() <= node",
        "if node and node",
        ("tests/pipelines/test_cluster.py::test_labels_choose_the_nodes_of_workers_and_of_decoding",),
    ),
    Mutant(
        "pipelines/cluster.py",
        'address="local",',
        "address=None,",
        ("tests/pipelines/test_cluster.py::test_without_a_cluster_one_is_started_on_loopback_alone",),
    ),
    Mutant(
        "pipelines/cluster.py",
        "Path(mark).unlink(missing_ok=True)",
        "Path(mark)",
        ("tests/pipelines/test_cluster.py::test_all_nodes_have_to_see_what_is_written_and_read",),
    ),
    Mutant(
        "pipelines/stopping.py",
        "        if asked:\n            _end(number, frame)",
        "        if asked and number == signal.SIGINT:\n            _end(number, frame)",
        ("tests/pipelines/test_cluster.py::test_a_second_signal_ends_it_at_once",),
    ),
    Mutant(
        "pipelines/stopping.py",
        "file.write_text(str(128 + number))",
        "file.write_text(str(number))",
        ("tests/pipelines/test_cluster.py::test_the_first_signal_asks_a_run_to_stop",),
    ),
    Mutant(
        "pipelines/tracking.py",
        "self._last.get(name := _name(key), -1) < step",
        "self._last.get(name := _name(key), -1) <= step",
        ("tests/pipelines/test_tracked.py::test_metrics_are_lines_and_reach_mlflow_once",),
    ),
    Mutant(
        "pipelines/tracking.py",
        "params=[Param(key, value) for key, value in values.items() if key not in known],",
        "params=[Param(key, value) for key, value in values.items()],",
        ("tests/pipelines/test_tracked.py::test_a_run_that_goes_on_is_found_by_its_folder_and_job",),
    ),
    Mutant(
        "pipelines/tracking.py",
        "values = {key: redact(value)[:6000]",
        "values = {key: value[:6000]",
        ("tests/pipelines/test_tracked.py::test_a_new_run_has_its_parameters_and_tags",),
    ),
    Mutant(
        "pipelines/train_ldm.py",
        "rate = optim.lr * training.learning_rate_factor(optim, images, self.config.images)",
        "rate = optim.lr",
        ("tests/pipelines/test_ldm_task.py::test_the_schedule_reaches_the_optimizer",),
    ),
    Mutant(
        "pipelines/train_ldm.py",
        "                with autocast(self.device, self.config.loop.precision):\n                    losses,",
        "                with autocast(self.device, 'fp32'):\n                    losses,",
        ("tests/pipelines/test_ldm_task.py::test_the_network_computes_in_the_precision_and_the_loss_in_fp32",),
    ),
    Mutant(
        "pipelines/train_ldm.py",
        "(loss / len(parts)).backward()",
        "loss.backward()",
        ("tests/pipelines/test_train_ldm.py::test_micro_batches_change_nothing_but_rounding",),
    ),
    Mutant(
        "pipelines/train_ldm.py",
        'noise, u, drop = draws(self.config.seed, batch["positions"], self._shape)',
        'noise, u, drop = draws(0, batch["positions"], self._shape)',
        ("tests/pipelines/test_ldm_task.py::test_weights_and_noise_are_the_seeds",),
    ),
    Mutant(
        "pipelines/train_ldm.py",
        'average.load_state_dict(state["averages"][decay])',
        "pass",
        ("tests/pipelines/test_ldm_task.py::test_a_task_that_goes_on_ends_with_the_same_bits",),
    ),
    Mutant(
        "pipelines/train_ldm.py",
        "with self._averaged(decay):\n            save_ldm",
        "with nullcontext():\n            save_ldm",
        ("tests/pipelines/test_ldm_task.py::test_each_average_is_exported_as_a_model",),
    ),
    Mutant(
        "pipelines/train_ldm.py",
        "n * classes // count % classes",
        "n % classes",
        ("tests/pipelines/test_ldm_task.py::test_the_picture_is_of_the_exported_model",),
    ),
    Mutant(
        "pipelines/train_vae.py",
        "self.optimizer.step(optim.lr * factor)",
        "self.optimizer.step(optim.lr)",
        ("tests/pipelines/test_vae_task.py::test_the_schedule_reaches_both_optimizers",),
    ),
    Mutant(
        "pipelines/train_vae.py",
        "self._discriminator_step(fakes, images, adversarial.lr * factor)",
        "self._discriminator_step(fakes, images, optim.lr * factor)",
        ("tests/pipelines/test_vae_task.py::test_the_schedule_reaches_both_optimizers",),
    ),
    Mutant(
        "pipelines/train_vae.py",
        "                with autocast(self.device, self.config.loop.precision):\n                    reconstruction",
        "                with autocast(self.device, 'fp32'):\n                    reconstruction",
        ("tests/pipelines/test_vae_task.py::test_networks_compute_in_the_precision_and_losses_in_fp32",),
    ),
    Mutant(
        "pipelines/train_vae.py",
        "(loss / len(parts)).backward()",
        "loss.backward()",
        ("tests/pipelines/test_train_vae.py::test_accumulated_micro_batches_are_one_batch",),
    ),
    Mutant(
        "pipelines/train_vae.py",
        "(loss / len(fakes)).backward()",
        "loss.backward()",
        ("tests/pipelines/test_train_vae.py::test_accumulated_micro_batches_are_one_batch",),
    ),
    Mutant(
        "pipelines/train_vae.py",
        "self.lpips(reconstruction, x).mean()",
        "self.lpips((reconstruction + 1) / 2, (x + 1) / 2).mean()",
        ("tests/pipelines/test_vae_task.py::test_lpips_gets_images_in_minus_one_to_one",),
    ),
    Mutant(
        "pipelines/train_vae.py",
        "networks.model(x, sample_posterior=False)",
        "networks.model(x)",
        ("tests/pipelines/test_vae_task.py::test_validation_judges_the_mode_with_the_averaged_weights",),
    ),
    Mutant(
        "pipelines/train_vae.py",
        "with networks.averaged(), training.uncompiled():",
        "with training.uncompiled():",
        ("tests/pipelines/test_vae_task.py::test_validation_judges_the_mode_with_the_averaged_weights",),
    ),
    Mutant(
        "pipelines/train_vae.py",
        "        with self.averaged():\n            self.model.save",
        "        with nullcontext():\n            self.model.save",
        ("tests/pipelines/test_vae_task.py::test_the_exported_model_is_the_average",),
    ),
    Mutant(
        "pipelines/train_vae.py",
        "ImageTransform(resolution, data.resize, data.crop, data.flip, decode=data.decode)",
        "ImageTransform(resolution, data.resize, data.crop, decode=data.decode)",
        ("tests/pipelines/test_vae_task.py::test_crops_and_flips_are_the_configs_and_others_in_each_epoch",),
    ),
    Mutant(
        "pipelines/train_vae.py",
        "now[: len(before) - 1] == before[:-1]",
        "now[: len(before) - 2] == before[:-2]",
        ("tests/pipelines/test_vae_task.py::test_stages_may_only_grow",),
    ),
    Mutant(
        "pipelines/train_vae.py",
        "vit_grid=wanted.vit_grid,",
        "",
        ("tests/pipelines/test_vae_task.py::test_every_field_of_the_model_reaches_it",),
    ),
    Mutant(
        "pipelines/training.py",
        'if state["digest"] != task.digest:',
        'if not state["digest"]:',
        ("tests/pipelines/test_loop.py::test_other_data_are_refused",),
    ),
    Mutant(
        "pipelines/training.py",
        "torch.manual_seed(seed_for(config.seed, before, rank))",
        "torch.manual_seed(seed_for(0, before, rank))",
        ("tests/pipelines/test_loop.py::test_chance_depends_on_seed_position_and_rank",),
    ),
    Mutant(
        "pipelines/training.py",
        "return nullcontext() if last or not hasattr",
        "return nullcontext() if not last or not hasattr",
        ("tests/pipelines/test_loop.py::test_gradients_cross_the_network_with_the_last_micro_batch_only",),
    ),
    Mutant(
        "pipelines/training.py",
        "batches = iter(task.batches(max(images, begin), end, batch_size))",
        "batches = iter(task.batches(begin, end, batch_size))",
        ("tests/pipelines/test_loop.py::test_a_stage_that_another_one_has_overrun_is_left_out",),
    ),
    Mutant(
        "pipelines/training.py",
        "or images >= end or stop\n",
        "or images >= end\n",
        ("tests/pipelines/test_loop.py::test_a_request_to_stop_ends_in_a_checkpoint_and_the_run_goes_on_later",),
    ),
    Mutant(
        "pipelines/training.py",
        ">= loop.max_skipped",
        "> loop.max_skipped",
        ("tests/pipelines/test_loop.py::test_too_many_skipped_steps_end_a_run_with_its_last_checkpoint",),
    ),
    Mutant(
        "pipelines/training.py",
        "max_failures=loop.max_restarts",
        "max_failures=loop.keep",
        ("tests/pipelines/test_loop.py::test_ray_train_gets_what_the_config_says",),
    ),
    Mutant(
        "pipelines/training.py",
        "        if world == 1:\n            return",
        "        if world:\n            return",
        (
            "tests/pipelines/test_loop.py::test_one_of_several_workers_leaves_it_for_all_which_return_it_when_they_begin_anew",
        ),
    ),
]
