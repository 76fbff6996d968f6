"""Process groups on one machine or many: start, collectives, preemption, exit handlers."""
