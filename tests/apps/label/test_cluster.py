"""`python -m apps.label --ray`: a cluster writes the table that one process writes, also when a worker is killed."""

import sys
import time
from threading import Thread

import psutil
import pytest
from conftest import call_script, small_model
from small_models import write_head

from apps.label import labelling

MISSING = "needs ray: pip install -r apps/label/ray_requirements.txt"


def test_without_ray_the_option_is_answered_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "apps.label.cluster", raising=False)
    printed = call_script("apps.label", tmp_path, "--reward_path", "x", "--ray", check=2).stderr
    assert "--ray needs a Python package" in printed and "apps/label/ray_requirements.txt" in printed
    assert printed.count("\n") == 1


@pytest.fixture(scope="module")
def head(sample, tmp_path_factory):
    encoder = small_model("bart", tmp_path_factory.mktemp("encoder") / "bart", sample)
    return write_head(tmp_path_factory.mktemp("runs") / "run", encoder)


@pytest.fixture(scope="module")
def two_nodes():
    """The address of a cluster of two nodes on this machine, with a worker each."""
    pytest.importorskip("ray", reason=MISSING)
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    yield cluster.address
    cluster.shutdown()


def kill_a_worker(killed: list[int]) -> None:
    """Kills one of this process' workers (`kill -9`) while it scores its first part."""
    while not killed:
        for process in psutil.Process().children(recursive=True):
            try:
                if process.cmdline()[:1] == ["ray::_score_part"]:
                    process.kill()
                    killed.append(process.pid)
                    return
            except psutil.Error:  # it has ended
                continue
        time.sleep(0.02)


@pytest.mark.slow
def test_the_table_is_the_same_though_a_worker_is_killed(two_nodes, sample, head, tmp_path, monkeypatch):
    monkeypatch.setattr(labelling, "TURNS_A_PART", 100)
    whole, out, killed = tmp_path / "whole.parquet", tmp_path / "out.parquet", []
    options = ("--reward_path", head, "--device", "cpu")
    call_script("apps.label", sample, *options, "--out", whole)
    score_part, parts = labelling.score_part, []

    def dies_at_the_third(*part):
        parts.append(part)
        if len(parts) == 3:
            raise KeyboardInterrupt
        return score_part(*part)

    monkeypatch.setattr(labelling, "score_part", dies_at_the_third)
    call_script("apps.label", sample, *options, "--out", out, check=130)  # without a cluster, which then continues
    killer = Thread(target=kill_a_worker, args=(killed,), daemon=True)
    killer.start()
    printed = call_script("apps.label", sample, *options, "--out", out, "--ray", two_nodes).stdout
    assert "Continuing with 2 parts" in printed and len(killed) == 1
    assert out.read_bytes() == whole.read_bytes() and len(parts) == 3


def test_an_address_without_a_cluster_is_answered_in_one_line(sample, head, tmp_path):
    pytest.importorskip("ray", reason=MISSING)
    options = ("--reward_path", head, "--device", "cpu", "--out", tmp_path / "out.parquet")
    printed = call_script("apps.label", sample, *options, "--ray", "127.0.0.1:1", check=2).stderr
    assert "--ray 127.0.0.1:1: expected a Ray cluster, found none" in printed and printed.count("\n") == 1
