"""The tasks that a run can train."""
