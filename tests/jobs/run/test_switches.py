"""Switches that let Ray unpickle files are refused in each process that reads files."""

import pytest

from blocksight.cluster.errors import ClusterError
from blocksight.cluster.switches import UNSAFE_SWITCHES, refuse_unsafe_switches
from blocksight.jobs.cli import main
from blocksight.jobs.run import pipeline
from blocksight.jobs.worker import isolation

ANY: object = None

PROCESSES = {
    "data worker that reads": lambda: pipeline._read(ANY, ANY),
    "data worker that writes": lambda: pipeline._commit(ANY, ANY),
    "actor that explains": lambda: pipeline._Explain(ANY, ANY, ANY),
    "actor that reads, explains and commits": lambda: pipeline._Work(ANY, ANY, ANY),
    "actor that measures": lambda: pipeline._Evaluate(ANY, ANY, ANY),
    "task that learns": lambda: list(pipeline._learn(ANY, [], ANY)),
    "child process": lambda: isolation._serve(ANY),
    "parent of a child process": lambda: isolation._start(),
}


@pytest.mark.parametrize("switch", [*UNSAFE_SWITCHES, "RAY_DATA_AUTOLOAD_OF_A_LATER_VERSION"])
def test_each_switch_is_refused_by_name(monkeypatch, switch):
    monkeypatch.setenv(switch, "1")
    with pytest.raises(ClusterError, match=f"{switch} lets input files run code; unset it"):
        refuse_unsafe_switches()


@pytest.mark.parametrize(("name", "value"), [(UNSAFE_SWITCHES[0], "0"), ("RAY_PICKLE_VERBOSE_DEBUG", "1")])
def test_what_lets_nothing_run_is_not_refused(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    refuse_unsafe_switches()


@pytest.mark.parametrize("process", PROCESSES)
def test_each_process_asks(monkeypatch, process):
    monkeypatch.setenv(UNSAFE_SWITCHES[1], "true")
    with pytest.raises(ClusterError, match=UNSAFE_SWITCHES[1]):
        PROCESSES[process]()


def test_the_command_asks_first(monkeypatch, capsys):
    monkeypatch.setenv(UNSAFE_SWITCHES[0], "yes")
    monkeypatch.setattr("sys.argv", ["blocksight", "list", "models"])
    with pytest.raises(SystemExit, match="2"):
        main.main()
    assert f"error: {UNSAFE_SWITCHES[0]} lets input files run code" in capsys.readouterr().err
