"""Functions for a child process that die or raise; few imports, because each child process makes them anew."""

import os

import numpy as np

from blocksight.jobs.worker.isolation import free_bytes
from blocksight.storage.rejects import Reject, RejectCode


def itself(function):
    return function


class OddError(Exception):
    def __init__(self, one, two):
        super().__init__("it does not pickle")


def fatal(item):
    if item == "abort":
        os.abort()
    if item == "raise":
        raise ZeroDivisionError("by nothing")
    if item == "reject":
        raise Reject(RejectCode.CORRUPT, "one of ours")
    if item == "odd":
        raise OddError(1, 2)
    if item == "result":
        return lambda: "which does not pickle"
    if item == "much":
        return len(np.zeros(int(0.9 * free_bytes()), np.uint8))
    return item, os.getpid()


def cannot_be_made():
    raise OSError("no such weights")
