"""Which launcher started a job, and a process that stands alone; tests/commands/test_processes.py starts several."""

import pytest

from ntkjax.errors import ConfigError
from ntkjax.job import cluster, process, start


@pytest.mark.parametrize(
    ("env", "launcher"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, None),  # sbatch without srun: this process stands alone
        ({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"}, "slurm"),
        ({"SLURM_STEP_NODELIST": "n1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "kubernetes"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "tpu"),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"JAX_COORDINATOR_ADDRESS": "h:1", "SLURM_STEP_NODELIST": "n1", "SLURM_STEP_NUM_TASKS": "2"}, "environment"),
    ],
)
def test_who_started_this_process(env, launcher):
    assert cluster(env) == launcher


def test_a_process_alone_starts_nothing_and_half_an_address_is_refused():
    assert start({}) == process() == (0, 1)
    with pytest.raises(ConfigError, match="JAX_NUM_PROCESSES and JAX_PROCESS_ID must be whole numbers"):
        start({"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_PROCESS_ID": "first"})
