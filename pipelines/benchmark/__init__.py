"""The job `benchmark`: measure contenders in turn in one run, and write a Markdown report and every sample."""
