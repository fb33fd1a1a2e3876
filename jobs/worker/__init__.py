"""The steps of a unit on a worker: read, encode, commit, with attempts, isolation and watchdog."""
