"""One budget of trainable parameters, spread over the layers by their importance scores."""

from __future__ import annotations

import math

import torch

from .scores import check_finite


def allocate(
    scores: dict[str, torch.Tensor],
    d_in: dict[str, int],
    uniform: dict[str, int],
    floor: float,
    ceiling: float,
) -> dict[str, int]:
    """How many neurons each layer gets when the layers compete for one budget.

    The budget is what the uniform numbers cost: the sum of uniform * d_in parameters, since a
    neuron's trainable parameters are its d_in input weights. Every layer first gets its floor,
    max(1, ceil(floor * uniform)) of its best neurons. Then neurons are taken in descending order
    of `gains`, as long as they fit into what is left of the budget, and up to the layer's
    ceiling, min(d_out, max(its floor, int(ceiling * uniform))). Of equal gains the earlier layer
    and then the lower neuron wins. This is the greedy algorithm of the knapsack problem.

    The neurons taken are the count highest-scoring ones of each layer, so selecting by the same
    scores gives exactly them. With one layer the count is the uniform number.

    Args:
        scores: layer name -> (d_out,).
        d_in: layer name -> inputs of the layer.
        uniform: layer name -> neurons that an equal treatment would give, in [1, d_out]. The
            order of these names is the order of the layers.
        floor: least share of its uniform number that a layer keeps, in (0, 1].
        ceiling: largest multiple of its uniform number that a layer gets, at least 1.

    Returns:
        layer name -> count, in the order of `uniform`. A pure function of the arguments: the same
        on all processes, whatever the number of threads.

    Raises:
        SpftError: a score is NaN or infinite (the layer is named).
    """
    names = list(uniform)
    check_finite({name: scores[name] for name in names})
    counts: dict[str, int] = {}
    rooms: dict[str, int] = {}
    candidates: list[torch.Tensor] = []
    for name in names:
        least = max(1, math.ceil(floor * uniform[name]))
        most = min(scores[name].numel(), max(least, int(ceiling * uniform[name])))
        counts[name], rooms[name] = least, most - least
        candidates.append(gains(scores[name], d_in[name])[least:most])
    left = sum((uniform[name] - counts[name]) * d_in[name] for name in names)
    if not names or left == 0:
        return counts
    # Stable, so that of equal gains the earlier layer comes first, and in a layer its own order.
    order = torch.sort(torch.cat(candidates), descending=True, stable=True).indices
    owner = torch.repeat_interleave(torch.tensor(list(rooms.values())))
    cheapest = min(d_in[name] for name in names)
    for layer in owner[order].tolist():
        name = names[layer]
        if d_in[name] <= left:
            counts[name] += 1
            left -= d_in[name]
            if left < cheapest:
                break
    return counts


def gains(scores: torch.Tensor, d_in: int) -> torch.Tensor:
    """What each neuron of a layer gains per trainable parameter, comparable between layers.

    Raw scores of different layers are not comparable, since their scale depends on the layer's
    activations and width. Dividing by the l2 norm of the layer's scores makes them so (Molchanov
    et al. 2017, arXiv 1611.06440); the root-mean-square in its place makes the
    result independent of the number of neurons too. Dividing by d_in, a neuron's cost, is the
    value per cost by which a knapsack is filled.

    Args:
        scores: (d_out,) finite.
        d_in: inputs of the layer.

    Returns:
        float64 (d_out,) on the CPU, descending: score / rms(scores) / d_in. All zero for a layer
        whose scores are. Scaling the scores by a power of two or permuting them changes no bit.
    """
    ranked = torch.sort(scores.detach().double().cpu(), descending=True, stable=True).values
    largest = ranked.abs().max().item()
    if largest == 0.0:
        return ranked
    # Relative to the largest score, whose square could underflow or overflow.
    relative = ranked / largest
    # fsum is exact, so the sum depends on neither the order nor the number of threads.
    rms = math.sqrt(math.fsum(relative.square().tolist()) / relative.numel())
    return relative / rms / d_in
