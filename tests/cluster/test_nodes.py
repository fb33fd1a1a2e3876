"""Waiting for a cluster's nodes: what is asked of the autoscaler, when the job begins, and that all is withdrawn."""

import os
import signal
from contextlib import nullcontext

import pytest

from blocksight.cluster import nodes
from blocksight.cluster.errors import ClusterNotReadyError
from blocksight.cluster.nodes import MOST_ACTORS, NodeWatch, joined_nodes, wait_for_workers, withdrawn_request

HEAD = {"CPU": 0.0}
GPU_NODE, CPU_NODE = {"CPU": 8.0, "GPU": 1.0}, {"CPU": 4.0}


class FakeCluster:
    """A cluster whose nodes come one by one, as often as it is looked at, and that notes what is asked of it."""

    def __init__(self, *arrivals):
        self.arrivals, self.looks, self.asked = arrivals, 0, []

    def nodes(self):
        here = self.arrivals[min(self.looks, len(self.arrivals) - 1)]
        self.looks += 1
        return [{"Alive": True, "Resources": node} for node in here] + [{"Alive": False, "Resources": GPU_NODE}]

    def request_resources(self, bundles):
        self.asked.append(bundles)


@pytest.fixture
def cluster_of(monkeypatch):
    def make(*arrivals):
        cluster = FakeCluster(*arrivals)
        monkeypatch.setattr(nodes.ray, "nodes", cluster.nodes)
        monkeypatch.setattr(nodes, "request_resources", cluster.request_resources)
        monkeypatch.setattr(nodes, "POLL_SECONDS", 0.0)
        return cluster

    return make


def test_a_dead_node_is_no_node(cluster_of):
    cluster_of([HEAD, CPU_NODE])
    assert joined_nodes() == [HEAD, CPU_NODE]


def test_the_job_begins_once_enough_workers_fit_and_may_grow(cluster_of):
    cluster = cluster_of([HEAD], [HEAD], [HEAD, GPU_NODE], [HEAD, GPU_NODE, GPU_NODE])
    lines = []
    sizing = wait_for_workers(4, 2, "gpu", 60, lines.append)
    assert (sizing.num_actors, sizing.most_actors, sizing.gpus_per_actor) == (2, 4, 1.0)
    assert cluster.asked == [[{"GPU": 1.0, "CPU": 0.5}] * 4] * 4
    assert lines == [
        "waiting for 2 explain actors: 1 node with 0 CPUs and 0 GPUs",
        "waiting for 2 explain actors: 2 nodes with 8 CPUs and 1 GPU",
    ]


def test_without_a_number_every_node_that_joins_is_taken(cluster_of):
    cluster = cluster_of([HEAD], [HEAD, CPU_NODE])
    sizing = wait_for_workers(None, 3, "cpu", 60, print)
    assert (sizing.num_actors, sizing.most_actors, sizing.gpus_per_actor) == (3, MOST_ACTORS, 0.0)
    assert cluster.asked[0] == [{"CPU": 1.0}] * 3


def test_no_more_begin_than_were_asked_for(cluster_of):
    cluster_of([CPU_NODE, CPU_NODE])
    assert wait_for_workers(2, 1, "cpu", 60, print).num_actors == 2


def test_a_gpu_that_joins_is_asked_for_and_taken(cluster_of):
    cluster = cluster_of([HEAD], [HEAD, GPU_NODE], [HEAD, GPU_NODE, GPU_NODE])
    assert wait_for_workers(2, 2, "auto", 60, print).gpus_per_actor == 1.0
    assert [bundles[0] for bundles in cluster.asked] == [
        {"CPU": 1.0},
        {"GPU": 1.0, "CPU": 0.5},
        {"GPU": 1.0, "CPU": 0.5},
    ]


def test_who_does_not_come_in_time_is_named(cluster_of):
    cluster_of([HEAD, CPU_NODE])
    with pytest.raises(ClusterNotReadyError, match=r"0 of 1 explain actors.*2 nodes with 4 CPUs.*--min-workers"):
        wait_for_workers(None, 1, "gpu", -1, print)
    with pytest.raises(ClusterNotReadyError, match="3 of 5 explain actors"):
        wait_for_workers(None, 5, "cpu", -1, print)


@pytest.mark.parametrize(
    ("end", "raised"),
    [
        (lambda: None, nullcontext()),
        (lambda: 1 / 0, pytest.raises(ZeroDivisionError)),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), pytest.raises(SystemExit, match="143")),
    ],
)
def test_what_was_asked_is_withdrawn_on_every_way_out(cluster_of, end, raised):
    cluster = cluster_of([HEAD])
    before = signal.getsignal(signal.SIGTERM)
    with raised, withdrawn_request():
        end()
    assert cluster.asked == [[]]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_change_of_nodes_is_told_once(cluster_of, monkeypatch):
    cluster_of([CPU_NODE], [CPU_NODE], [CPU_NODE, GPU_NODE], [GPU_NODE])
    monkeypatch.setattr(nodes, "WATCH_SECONDS", 0.0)
    lines = []
    watch = NodeWatch(lines.append)
    for _ in range(5):
        watch.look()
    assert lines == [
        "the Ray cluster has 2 nodes with 12 CPUs and 1 GPU; before: 1 node with 4 CPUs and 0 GPUs",
        "the Ray cluster has 1 node with 8 CPUs and 1 GPU; before: 2 nodes with 12 CPUs and 1 GPU",
    ]


def test_a_cluster_is_looked_at_every_ten_seconds(cluster_of):
    cluster = cluster_of([CPU_NODE])
    watch = NodeWatch(print)
    watch.look()
    assert not cluster.looks
