"""A simulated cluster on the real protocol: nothing is lost or twice, no storm, and what would be one is seen."""

import json
from dataclasses import replace

import pytest

from blocksight.jobs.worker.attempts import MAX_DEATHS
from tests.faults.simulator import Setting, main, simulated

SMALL = Setting(nodes=40, units=1_500, losses_per_node_hour=4.0, driver_stops=3)


@pytest.mark.parametrize("seed", range(3))
def test_losses_and_stops_leave_every_unit_once(seed):
    found = simulated(replace(SMALL, seed=seed))
    assert (found.committed, found.dead) == (SMALL.units, 0)
    assert found.lost_attempts > 20  # the faults did bite
    assert found.begun >= SMALL.units + found.lost_attempts
    assert found.put_like_per_unit < 2.5
    assert found.lists_per_unit < 0.05
    assert found.share_of_503 == 0


def test_with_gpus_a_unit_has_two_markers_more_and_no_listing():
    found = simulated(replace(SMALL, has_gpus=True))
    assert (found.committed, found.dead) == (SMALL.units, 0)
    assert found.lost_attempts > 20
    assert 4.0 <= found.put_like_per_unit < 4.5
    assert found.lists_per_unit < 0.05
    assert found.share_of_503 == 0


@pytest.mark.parametrize("has_gpus", [False, True])
def test_machines_that_only_the_network_lost_commit_nothing_twice(has_gpus):
    found = simulated(replace(SMALL, cut_off=1.0, driver_stops=0, losses_per_node_hour=20.0, has_gpus=has_gpus))
    assert (found.committed, found.dead) == (SMALL.units, 0)
    assert found.adopted > 20  # the faults did bite


def test_one_prefix_of_a_slow_store_is_asked_too_much_and_hashed_ones_are_not():
    crowd = replace(SMALL, nodes=200, unit_seconds=1.0, driver_stops=0, losses_per_node_hour=0.0, puts_per_second=5.0)
    one, many = (simulated(replace(crowd, is_hashed=is_hashed)) for is_hashed in (False, True))
    assert one.share_of_503 > 0.2
    assert many.share_of_503 < 0.1
    assert one.committed == many.committed == SMALL.units


def test_a_unit_that_kills_every_process_is_given_up_after_so_many():
    found = simulated(replace(SMALL, losses_per_node_hour=0.0, driver_stops=0, killer=7))
    assert (found.committed, found.dead, found.lost_attempts) == (SMALL.units - 1, 1, MAX_DEATHS)


QUICK = ("--nodes", "20", "--units", "200", "--driver-stops", "0")


def test_the_command_ends_with_1_for_a_storm_and_not_for_a_unit_that_kills(capsys):
    assert main(QUICK) == 0
    capsys.readouterr()
    assert main([*QUICK, "--killer", "7", "--losses-per-node-hour", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["dead"] == 1
    slow = ("--puts-per-second", "2", "--is-hashed", "False", "--unit-seconds", "1")
    assert main([*QUICK, *slow]) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        ("--nodes", "0"),
        ("--units", "0"),
        ("--puts-per-second", "0.5"),
        ("--driver-stops", "-1"),
        ("--cut-off", "3"),
        ("--has-gpus", "banana"),
    ],
)
def test_a_setting_that_cannot_be_simulated_is_refused_in_a_sentence(wrong, capsys):
    with pytest.raises(SystemExit) as ended:
        main(wrong)
    assert ended.value.code == 2
    assert f"{wrong[0]}" in capsys.readouterr().err
