"""Command line: from typed overrides to a validated configuration."""
