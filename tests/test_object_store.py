"""A work directory in an emulated object store: a killed run continues and ends as on a disk."""

import json
import re
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request

import pytest
import runs

pytest.importorskip("gcsfs", reason="needs the extra gcs")
pytest.importorskip("gcp_storage_emulator", reason="needs the extra dev")

STEPS = "--config.training.num_steps=16"
FEW = (  # The test is about files, so the computation is small and compiles fast.
    "--config.eval.estimators=bound",
    "--config.eval.max_images=8",
    "--config.eval.bound.sweeps=2",
    "--config.sampling.sampler.name=ddim",
    "--config.sampling.sampler.steps=2",
)


class Bucket:
    """Google Cloud Storage's ``gs://bucket`` in the memory of a process of its own."""

    def __init__(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "gcp_storage_emulator", "start", f"--port={port}"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        options = ["--in-memory", "--default-bucket=bucket"]
        self.process = subprocess.Popen([*command, *options], **quiet)
        while True:
            try:
                self.names()
                break
            except OSError:
                assert self.process.poll() is None, "the emulator does not start"
                time.sleep(0.1)

    @property
    def env(self):
        return {
            "STORAGE_EMULATOR_HOST": self.address,  # for gcsfs, which etils uses
            "TENSORSTORE_GCS_HTTP_URL": self.address,  # for TensorStore, which orbax uses
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any",
            "FSSPEC_GS_TOKEN": "anon",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # Else it asks another service.
            "EPATH_USE_TF": "0",
        }

    def names(self):
        with urllib.request.urlopen(f"{self.address}/storage/v1/b/bucket/o") as found:
            return [item["name"] for item in json.load(found).get("items", [])]

    def read(self, name):
        url = f"{self.address}/download/storage/v1/b/bucket/o/{urllib.parse.quote(name, safe='')}"
        with urllib.request.urlopen(f"{url}?alt=media") as found:
            return found.read()


@pytest.fixture(scope="module")
def bucket():
    made = Bucket()
    yield made
    made.process.terminate()
    made.process.wait()


@pytest.mark.slow
def test_a_run_that_was_killed_in_an_object_store_ends_as_on_a_disk(bucket, tmp_path):
    """The training is killed as soon as the second checkpoint is begun."""
    process = runs.start("gs://bucket/run", "--mode=train", STEPS, env=bucket.env)
    while process.poll() is None and not any("checkpoints/8" in name for name in bucket.names()):
        time.sleep(0.1)
    process.kill()
    process.communicate()
    before = bucket.names()
    assert not any(name.startswith("run/checkpoints/16/") for name in before)
    err = runs.run("gs://bucket/run", "--mode=train,eval,sample", STEPS, *FEW, env=bucket.env)
    runs.run(tmp_path, "--mode=train,eval,sample", STEPS, *FEW)
    rows = [json.loads(row) for row in bucket.read("run/metrics.jsonl").splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 17))
    local = [json.loads(row) for row in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == [row["loss"] for row in local]
    for name in ("per_image.npz", "samples.npz", "samples.png"):
        assert bucket.read(f"run/{name}") == (tmp_path / name).read_bytes()
    assert b"bits/dim" in bucket.read("run/report.html")
    whole = any(name == "run/checkpoints/4/commit_success.txt" for name in before)
    # It continued: the bar of the training does not begin at 0.
    assert whole and not re.search(r"^train: .* 0/16 \[", err, re.MULTILINE)
