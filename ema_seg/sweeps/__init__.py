"""Sweeps: many jobs in one folder, each identified by its configuration, and their states.

Launchers, not this package, start the jobs. The processes of a sweep share only its folder. A job's state follows from
the files in its own folder, so that a kill at any moment leaves nothing to repair.
"""

from ema_seg.sweeps.devices import count_devices, deal_devices
from ema_seg.sweeps.folder import (
    ANY,
    JobState,
    Plan,
    PlannedJob,
    is_running,
    job_state,
    read_plan,
    record_failure,
    write_plan,
)
from ema_seg.sweeps.identity import identity, job_name, machine_keys
from ema_seg.sweeps.job import Pruned, hold_run, is_settled, read_job, run_job

__all__ = [
    "ANY",
    "JobState",
    "Plan",
    "PlannedJob",
    "Pruned",
    "count_devices",
    "deal_devices",
    "hold_run",
    "identity",
    "is_running",
    "is_settled",
    "job_name",
    "job_state",
    "machine_keys",
    "read_job",
    "read_plan",
    "record_failure",
    "run_job",
    "write_plan",
]
