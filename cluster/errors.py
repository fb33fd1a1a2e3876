"""The error of the cluster room."""


class ClusterError(Exception):
    """The job cannot run here. The message is one sentence for the user, and says what to do."""
