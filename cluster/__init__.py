"""Where it runs: the Ray session, its sizing, the embedded bucket, the pins."""
