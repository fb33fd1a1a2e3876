"""The errors of the cluster room."""


class ClusterError(Exception):
    """The job cannot run here. The message is one sentence for the user, and says what to do."""


class ClusterNotReadyError(ClusterError):
    """The nodes that a job waited for did not come in time: the same command may find them later."""
