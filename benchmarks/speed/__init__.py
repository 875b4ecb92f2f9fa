"""Training speed and memory: ours beside other trainers, on the same rows, in one run."""
