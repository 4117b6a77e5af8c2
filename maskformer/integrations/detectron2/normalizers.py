"""The divisors of the losses where Detectron2 runs the loop.

Its loop knows nothing of normalisers, so the forward pass itself adds them up over the processes: a few numbers between
the hosts (Detectron2's gloo group), which wait for no GPU. It has no micro-batches: a forward pass is a step's share.
"""

from __future__ import annotations

from detectron2.utils import comm
from torch import Tensor

from maskformer.modeling.criterion import LossNormalizers


def over_all_processes(own: LossNormalizers) -> LossNormalizers:
    """The sums over all processes, each of which must call this in every training step."""
    if comm.get_world_size() == 1:
        return own
    whole = LossNormalizers()
    for other in comm.all_gather(tuple(own)):
        whole = whole.plus(LossNormalizers(*other))
    return whole


def share_of_mean(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """Losses whose sum over the processes is that of the step → losses whose mean is.

    Detectron2 averages gradients, and what it logs, over the processes.
    """
    processes = comm.get_world_size()
    return losses if processes == 1 else {name: loss * processes for name, loss in losses.items()}
