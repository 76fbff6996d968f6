"""Sweeps: many jobs in one folder, each identified by its configuration, and their states.

Launchers, not this package, start the jobs. The processes of a sweep share only its folder. A job's state follows from
the files in its own folder, so that a kill at any moment leaves nothing to repair.
"""

from ema_seg.sweeps.devices import claim_devices, count_devices
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
from ema_seg.sweeps.identity import hash_config, job_name, machine_keys, setting_text
from ema_seg.sweeps.job import Pruned, is_settled, lock_run, read_job, run_job

__all__ = [
    "ANY",
    "JobState",
    "Plan",
    "PlannedJob",
    "Pruned",
    "claim_devices",
    "count_devices",
    "hash_config",
    "is_running",
    "is_settled",
    "job_name",
    "job_state",
    "lock_run",
    "machine_keys",
    "read_job",
    "read_plan",
    "record_failure",
    "run_job",
    "setting_text",
    "write_plan",
]
