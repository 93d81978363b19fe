"""What a running cluster shows Prometheus."""

import re
import time
import urllib.request

import pytest

from pipelines.runtime import prometheus


@pytest.fixture
def exported():
    """Reads what this machine's node exports: {name{tags}: value}."""
    import ray

    ray.init(address="local", num_cpus=1, include_dashboard=True, dashboard_host="127.0.0.1", logging_level="ERROR")
    (node,) = ray.nodes()

    def read():
        with urllib.request.urlopen(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics") as page:
            lines = page.read().decode().splitlines()
        found = (re.fullmatch(r"(ray_litevae_\w+)\{(.*)\} (\S+)", line) for line in lines)
        return {
            (match[1], *sorted(re.findall(r'(?:run|stage|reason)="(.*?)"', match[2]))): float(match[3])
            for match in found
            if match
        }

    yield read
    ray.shutdown()


@pytest.mark.slow
def test_what_is_shown_is_exported(exported):
    training, encoding = prometheus.TrainingGauges("vae"), prometheus.EncodingGauges("cache")
    speed = {"images_per_second": 25.0, "waiting_for_data": 0.5}
    training.show(64, 8, {"loss": 2.0, "skipped_steps": 0.25} | speed)
    training.show(64, 8, {"loss": float("nan"), "skipped_steps": 0.0} | speed)
    training.show(64, 8, {"loss": 1.5} | speed)
    encoding.show(30, {"corrupt": 2}, {"decode": 0.5, "encode": 0.75})
    encoding.show(0, {}, {"decode": 0.25, "encode": 0.5})
    wanted = {
        ("ray_litevae_train_loss", "vae"): 1.5,
        ("ray_litevae_train_images_per_second", "vae"): 25.0,
        ("ray_litevae_train_waiting_for_data", "vae"): 0.5,
        ("ray_litevae_images_trained_total", "vae"): 192.0,
        ("ray_litevae_steps_skipped_total", "vae"): 2.0,
        ("ray_litevae_images_encoded_total", "cache"): 30.0,
        ("ray_litevae_shards_committed_total", "cache"): 2.0,
        ("ray_litevae_images_quarantined_total", "cache", "corrupt"): 2.0,
        ("ray_litevae_encode_busy", "cache", "decode"): 0.25,
        ("ray_litevae_encode_busy", "cache", "encode"): 0.5,
    }
    end = time.monotonic() + 240
    while (found := exported()) != wanted and time.monotonic() < end:
        time.sleep(1)
    assert found == wanted


@pytest.mark.parametrize("run", ["café", "日本 #2", "plain"])
def test_runs_of_any_name_are_exported(run):
    """Ray takes ASCII only; a cache folder may have any name."""
    prometheus.EncodingGauges(run).show(1, {"corrupt": 1}, {"decode": 0.5})
    prometheus.TrainingGauges(run).show(1, 1, {"loss": 1.0, "images_per_second": 1.0, "waiting_for_data": 0.0})
