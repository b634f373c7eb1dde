"""The configurations in experiments/accelerate: accelerate reads them, and the batch script launches with them."""

import os
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "experiments" / "accelerate"


@pytest.mark.parametrize(("name", "machines", "processes"), [("one_node_8_gpus", 1, 8), ("two_nodes", 2, 16)])
def test_accelerate_reads_a_configuration(name, machines, processes):
    read = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert isinstance(read, ClusterConfig)
    assert (read.num_machines, read.num_processes, read.distributed_type) == (
        machines, processes, DistributedType.MULTI_GPU
    )  # fmt: skip
    assert read.mixed_precision == "no" and not read.use_cpu


def test_a_launch_takes_processes_and_machines_from_the_file(monkeypatch):
    flags = ["--config_file", str(FOLDER / "two_nodes.yaml"), "--machine_rank", "1", "--main_process_ip", "node0"]
    arguments = launch_command_parser().parse_args([*flags, "script.py", "--scale", "paper"])
    arguments, _, _ = _validate_launch_command(arguments)
    assert arguments.multi_gpu and (arguments.num_machines, arguments.num_processes) == (2, 16)
    assert (arguments.machine_rank, arguments.main_process_ip, arguments.main_process_port) == (1, "node0", 29500)
    assert arguments.training_script_args == ["--scale", "paper"]


def test_the_batch_script_launches_on_each_node_with_its_rank(tmp_path):
    """Slurm's commands are replaced by scripts that do what they would on two nodes."""
    commands = {
        "scontrol": "printf 'node7\\nnode8\\n'",
        "srun": 'for rank in 0 1; do SLURM_NODEID=$rank "$@"; done',
        "accelerate": 'printf \'%s|\' "$EXPERIMENTS_CACHE" "$@"; echo',
    }
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[7-8]"}
    script = ["bash", str(FOLDER / "two_nodes.sbatch"), "a script.py", "--scale", "paper"]
    done = subprocess.run(script, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [line.split("|")[:-1] for line in done.stdout.splitlines()]
    file = "experiments/accelerate/two_nodes.yaml"
    assert (ROOT / file).is_file()
    for rank, line in enumerate(lines):
        launch = ["launch", "--config_file", file, "--machine_rank", str(rank), "--main_process_ip", "node7"]
        assert line == [f"{ROOT}/.cache", *launch, "a script.py", "--scale", "paper"]
    assert len(lines) == 2
