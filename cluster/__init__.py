"""Where a job runs: the Ray session, its sizing, the embedded bucket and the pinned versions."""
