"""What `report` shows of a run folder, read from its files: every one of them may be missing."""
