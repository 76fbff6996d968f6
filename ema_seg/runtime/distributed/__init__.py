"""Process groups on one machine or many: ranks, launchers, group, spawning, collectives, preemption, exit handlers."""
