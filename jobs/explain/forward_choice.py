"""Chooses a job's forward setting on the device that its models are on, once, before the first unit."""

import os

import torch

from blocksight.cluster.errors import ClusterError
from blocksight.engine.model.device_errors import device_trouble, told_by_device
from blocksight.engine.scoring.forward import release_memory
from blocksight.engine.scoring.setting_choice import ForwardRequest
from blocksight.jobs.explain.forward_pass import choose_forward
from blocksight.jobs.explain.step import load, refuse_other_weights
from blocksight.jobs.plan.context import JobContext
from blocksight.jobs.plan.forward_setting import PlannedForward


def choose_here(context: JobContext, state: bytes | None, request: ForwardRequest) -> PlannedForward:
    """The forward setting for the job's device, measured in this process, which holds no model afterwards.

    Raises ModelError if the precision asked for is unusable or the weights are not the driver's, and ClusterError if
    the device fails.
    """
    torch.set_num_threads(context.num_threads)
    try:
        adapter = load(
            context.config, state, context.device, context.import_path, context.readout, context.facts.vectors
        )
        refuse_other_weights(adapter, context.facts)
        planned = choose_forward(adapter, request)
        release_memory(adapter)
    except Exception as error:
        if device_trouble(error) is None:
            raise
        raise ClusterError(
            f"{os.uname().nodename} cannot choose how masks are scored: {told_by_device(error)}"
        ) from error
    return planned
