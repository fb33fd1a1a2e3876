"""What the cluster refuses, in a sentence for the user."""


class ClusterError(Exception):
    """The job cannot run where it was asked to; the message is one sentence, with the way out."""
