"""Who started this process, and what a command line asks to be started."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from maskformer.engine import launch, main
from maskformer.engine.launch import Place, adopt_slurm, check_arguments, check_place, find_place, first_host
from maskformer.errors import UserError

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_MAX_RESTARTS": "3",
}
# What `srun --nodes 2 --ntasks-per-node 4` sets for the first task of the second node.
SRUN = {
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "1234567",
}


def arguments(*words: Any) -> argparse.Namespace:
    parsed: argparse.Namespace = main.build_parser().parse_args(["--config-file", "c.yaml", *map(str, words)])
    return parsed


def test_torchrun_says_where_a_process_stands() -> None:
    assert find_place({}) is None
    assert find_place(TORCHRUN) == Place(5, 8, local_rank=1, local_world_size=4, restarts=2, max_restarts=3)
    # Launchers that set only these two start all processes on one machine.
    assert find_place({"RANK": "1", "WORLD_SIZE": "2"}) == Place(1, 2, 1, 2, 0)


@pytest.mark.parametrize(
    ("name", "value"), [("RANK", "8"), ("LOCAL_RANK", "4"), ("WORLD_SIZE", "many"), ("RANK", "-1")]
)
def test_variables_that_contradict_each_other_are_refused(name: str, value: str) -> None:
    with pytest.raises(UserError, match="torchrun"):
        find_place({**TORCHRUN, name: value})


def test_slurm_tasks_become_processes() -> None:
    environment = dict(SRUN)
    assert adopt_slurm(environment, num_machines=1)
    assert find_place(environment) == Place(rank=4, world_size=8, local_rank=0, local_world_size=4)
    assert environment["MASTER_ADDR"] == "gpu07"
    assert environment["MASTER_PORT"] == "24567"


def test_steps_of_one_job_meet_at_ports_of_their_own() -> None:
    environment = {**SRUN, "SLURM_STEP_ID": "3"}
    adopt_slurm(environment, 1)
    assert environment["MASTER_PORT"] == "24570"


def test_slurm_is_left_alone_where_torchrun_or_the_user_starts_the_processes() -> None:
    assert not adopt_slurm({}, 1)
    assert not adopt_slurm({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, 1)  # in a batch script, outside srun
    assert not adopt_slurm({**SRUN, **TORCHRUN}, 1)
    one_per_node = {**SRUN, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    assert not adopt_slurm(one_per_node, 2)
    assert "RANK" not in one_per_node
    with pytest.raises(UserError, match="SLURM started 8 tasks but --num-machines is 2: start one task per machine"):
        adopt_slurm(dict(SRUN), 2)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu7", "gpu7"),
        ("gpu[07-09,12],login1", "gpu07"),
        ("a,b", "a"),
        ("rack3-[1,4]", "rack3-1"),
        ("n[001-002]-ib", "n001-ib"),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_a_node_list_that_cannot_be_read_is_told() -> None:
    with pytest.raises(UserError, match="MASTER_ADDR"):
        first_host("")


def test_uneven_nodes_have_their_own_number_of_tasks() -> None:
    environment = {"SLURM_STEP_NUM_TASKS": "11", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_NODEID": "2"}
    assert launch.tasks_on_this_node(environment) == 3
    assert launch.tasks_on_this_node({**environment, "SLURM_NODEID": "1"}) == 4


def test_a_command_line_that_contradicts_its_launcher_is_refused() -> None:
    place = Place(0, 4, 0, 2)
    check_place(arguments(), place)
    check_place(arguments("--num-gpus", 2), place)
    with pytest.raises(UserError, match="--num-gpus is 4 but torchrun or srun started 2 processes"):
        check_place(arguments("--num-gpus", 4), place)
    address = ("--dist-url", "tcp://a:1")
    check_place(arguments("--num-machines", 2, *address), place)
    with pytest.raises(UserError, match="--num-machines is 3 but 4 processes were started, 2 of them on this machine"):
        check_place(arguments("--num-machines", 3, *address), place)
    check_place(arguments("--num-gpus", 0), Place())
    with pytest.raises(UserError, match="started 1 processes on this machine: leave it out, or let one process per"):
        check_place(arguments("--num-gpus", 4), Place(0, 2, 0, 1))  # srun with one task on each of two nodes
    check_place(arguments("--max-restarts", 3), Place(max_restarts=3))
    with pytest.raises(UserError, match=r"--max-restarts is 3 but .* allows 0: give it to torchrun"):
        check_place(arguments("--max-restarts", 3), place)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--num-gpus", -1], "--num-gpus is -1"),
        (["--num-machines", 0], "--num-machines is 0"),
        (["--machine-rank", 1], "--machine-rank is 1"),
        (["--num-machines", 2, "--machine-rank", 2, "--dist-url", "tcp://a:1"], "machines 0 to 1"),
        (["--num-machines", 2], "--dist-url is missing"),
        (["--num-machines", 2, "--dist-url", "tcp://a:70000"], "tcp://a:70000"),
        (["--num-machines", 2, "--dist-url", "file:///a"], "file:///a"),
        (["--max-restarts", -1], "--max-restarts is -1"),
        (["--profile", "2:3", "--eval-only"], "--profile 2:3 traces training"),
    ],
)
def test_impossible_arguments_are_refused(words: list[Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        check_arguments(arguments(*words))


def test_machines_meet_at_the_address_and_one_machine_anywhere() -> None:
    assert launch.endpoint(arguments()) == "localhost:0"
    assert launch.endpoint(arguments("--num-machines", 2, "--dist-url", "tcp://node-0:29500")) == "node-0:29500"
    assert launch.endpoint(arguments("--dist-url", "tcp://[::1]:29500")) == "[::1]:29500"
    several = ("--num-machines", 2, "--machine-rank", 1, "--dist-url", "tcp://a:1")
    assert launch.rendezvous_options(arguments(*several)) == {"rank": 1}
    assert launch.rendezvous_options(arguments(*several, "--max-restarts", 1)) == {"is_host": "0"}


def test_processes_share_the_cores_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    for processes, threads in ((1, "16"), (4, "4"), (32, "1")):
        environment: dict[str, str] = {}
        launch.share_cores(environment, processes)
        assert environment == {"OMP_NUM_THREADS": threads}
    environment = {"OMP_NUM_THREADS": "3"}
    launch.share_cores(environment, 4)
    assert environment == {"OMP_NUM_THREADS": "3"}


def test_the_first_failure_is_told_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path("out")
    assert launch.report_failure(3, SimpleNamespace(exitcode=-9), folder) == 1
    assert capsys.readouterr().err == "error: process 3 was ended by signal 9; see above and out/log.txt.rank3\n"
    assert launch.report_failure(0, SimpleNamespace(exitcode=1), folder) == 1
    assert "process 0 failed with exit code 1; see above and out/log.txt\n" in capsys.readouterr().err
    # The process has told its mistake itself.
    assert launch.report_failure(1, SimpleNamespace(exitcode=2), folder) == 2
    assert capsys.readouterr().err == ""
