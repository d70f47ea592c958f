import pytest
from training_toy import config

from latentgnn.errors import UserError
from latentgnn.training.config import OptimizerConfig
from latentgnn.training.course import batch_told
from latentgnn.training.devices import Started, make_fabric, started
from latentgnn.training.processes import Processes, sharing
from latentgnn.training.sampling import share


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "TORCHELASTIC_RUN_ID",
        "SLURM_NTASKS",
        "SLURM_STEP_NUM_TASKS",
        "MASTER_ADDR",
        "MASTER_PORT",
        "NODE_RANK",
    ):
        monkeypatch.delenv(name, raising=False)


def under_torchrun(monkeypatch: pytest.MonkeyPatch, *, here: int, machines: int, world: int) -> None:
    named = {"LOCAL_WORLD_SIZE": here, "GROUP_WORLD_SIZE": machines, "WORLD_SIZE": world, "RANK": 0, "LOCAL_RANK": 0}
    for name, value in {"TORCHELASTIC_RUN_ID": "none", **named}.items():
        monkeypatch.setenv(name, str(value))


def test_what_a_launcher_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    assert started() is None
    under_torchrun(monkeypatch, here=2, machines=3, world=6)
    assert started() == Started("torchrun", 2, 3)
    under_torchrun(monkeypatch, here=2, machines=3, world=7)
    with pytest.raises(UserError, match="torchrun started 7 processes on 3 machines, 2 on this one: start as many"):
        started()
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    for name, value in {"SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_JOB_NAME": "train"}.items():
        monkeypatch.setenv(name, value)
    assert started() is None  # in the job's script
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    assert started() == Started("Slurm", 4, 2)


def test_its_numbers_are_taken_and_others_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    under_torchrun(monkeypatch, here=2, machines=3, world=6)
    assert make_fabric(config(devices="auto"), []).world_size == 6
    assert make_fabric(config(devices=2, machines=3), []).world_size == 6
    with pytest.raises(UserError, match=r"training.devices is 1, but torchrun started 2 processes on each of 3"):
        make_fabric(config(devices=1), [])
    with pytest.raises(UserError, match=r"training.machines is 2, but torchrun"):
        make_fabric(config(devices=2, machines=2), [])


def test_machines_without_a_place_to_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="MASTER_ADDR, MASTER_PORT, NODE_RANK is not in the environment"):
        make_fabric(config(machines=2), [])
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("NODE_RANK", "1")
    with pytest.raises(UserError, match="but MASTER_PORT is not in the environment"):
        make_fabric(config(machines=2), [])


def test_files_are_used_by_one_process_if_no_more_are_named() -> None:
    with sharing(config(devices="auto")) as processes:
        assert (processes.world, processes.is_first) == (1, True)
        assert processes.mine(5) == [0, 1, 2, 3, 4]
        assert list(processes.in_order(iter("abc"), 3)) == ["a", "b", "c"]


@pytest.mark.parametrize(("total", "world"), [(0, 2), (1, 2), (5, 2), (16, 2), (37, 3), (3, 5)])
def test_every_file_is_of_one_process(total: int, world: int) -> None:
    """And put together round by round, by rank, they are in their order."""
    all_of_them = []
    for rank in range(world):
        processes = Processes()
        processes.world, processes.rank = world, rank
        all_of_them.append(processes.mine(total))
        assert sorted([*processes.mine(total), *processes.others(total)]) == list(range(total))
    assert sorted(index for mine in all_of_them for index in mine) == list(range(total))
    rounds = [range(first, min(first + 8 * world, total)) for first in range(0, total, 8 * world)]
    taken = [iter(mine) for mine in all_of_them]
    put = [next(taken[rank]) for r in rounds for rank in range(world) for _ in share(len(r), world=world, rank=rank)]
    assert put == list(range(total))


def test_the_batch_and_the_rate_are_told() -> None:
    optimizer = OptimizerConfig(learning_rate=0.02, reference_batch=16)
    told = batch_told(config(batch_size=16, accumulate=2, optimizer=optimizer), processes=4)
    assert told == ["batch of 16 = 2 a process x 4 processes x 2 parts; learning rate 0.02 for the whole batch"]
    _, warning = batch_told(config(batch_size=8, accumulate=1, optimizer=optimizer), processes=1)
    assert "is meant for a batch of 16, and this run's is 8" in warning
    assert "--training.optimizer.learning_rate 0.01, with 2 times the steps" in warning
