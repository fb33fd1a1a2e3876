"""A unit's way on a worker: read, attempt, watch, encode, commit."""
