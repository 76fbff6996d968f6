"""Services of the process: errors, files, foreign texts, memory, execution modes, process groups."""
