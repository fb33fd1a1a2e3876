"""Runs jobs and evaluations on a runner: the Ray Data pipeline, or this process."""
