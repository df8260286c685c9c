"""SelectedNeuronAdamW: AdamW for compact deltas, with 32- or 8-bit moments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..distributed.shards import local_tensor
from ..errors import SpftError
from ..tuner.marks import is_marked
from .block_8bit import has_8bit_moments, step_8bit_
from .half import HALF, Update, is_fused, step_half_
from .state_dict import (
    TORCH_KEYS,
    check_hyperparameters,
    completed_groups,
    fitting_state,
    new_state,
)

MEND = "pass trainer_ext.trained_parameters(model)"
# torch wraps the step of a class at its first instance, so that hooks are called around it. Here
# it is without: SelectedNeuronAdamW's own step is wrapped, and hooks are to be called once.
_step_of_torch = inspect.unwrap(torch.optim.AdamW.step)


class SelectedNeuronAdamW(torch.optim.AdamW):
    """AdamW (Loshchilov & Hutter 2019) on the compact tensors that SPFT trains.

    Weight decay acts on the delta, so it pulls the selected neurons towards their pretrained
    weights. fp32 and fp64 parameters are stepped by torch.optim.AdamW: the same bits, and state
    dicts go both ways. bf16 and fp16 parameters have fp32 moments and no fp32 copy that stays: a
    step computes in fp32 on at most 2**24 elements at a time and rounds back, bf16 stochastically,
    so that updates below its precision are kept in the mean.

    Memory: 8 bytes of state an element, 2.03 with `state_bits=8` (tensors of 4096 elements and
    more), and 4 a tensor. A step of 16-bit parameters takes up to 144 MiB for a moment.

    Args:
        params: parameters that trainer_ext.trained_parameters(model) gives, or groups of them.
        lr: learning rate; a float or a tensor of one element.
        betas: decay of the first and of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay, as a share of lr.
        state_bits: 32, or 8: moments quantised in blocks of 256 by bitsandbytes.
        foreach, fused: torch's kernels for 32-bit moments; with neither, the fused one where there
            is one (CPU, CUDA). 8-bit moments have a kernel of their own.
        stochastic_rounding: of bf16 parameters; False rounds to nearest. fp16 is always to nearest.
        seed: of the rounding. The random bits are a function of (seed, step, position of the
            parameter in the groups), so replicas stay alike and a resumed run goes on as it would.

    Raises:
        SpftError: a parameter is not one that SPFT trains, a value is out of range, or bitsandbytes
            is missing; when stepping, a gradient is sparse, or a parameter with 8-bit moments is
            fp64 or a DTensor; when loading, the state does not fit.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state_bits: int = 32,
        foreach: bool | None = None,
        fused: bool | None = None,
        stochastic_rounding: bool = True,
        seed: int = 0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"state_bits": state_bits, "foreach": foreach, "fused": fused}
        defaults |= {"stochastic_rounding": stochastic_rounding, "seed": seed, **TORCH_KEYS}
        check_hyperparameters(defaults)
        params = params if isinstance(params, torch.Tensor) else list(params)
        if len(params) == 0:
            raise SpftError(f"there is no parameter to optimize; {MEND}")
        # Not AdamW's: it has no place for further hyperparameters, and with `fused` it asks
        # GradScaler for scaled gradients, which only torch's fused kernel can unscale.
        Optimizer.__init__(self, params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's.

        Raises:
            SpftError: see the class. Only parameters that are added are looked at: ZeRO and FSDP2
                put their own tensors in their places afterwards.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_hyperparameters(group)
            for position, parameter in enumerate(group["params"]):
                _check_parameter(parameter, position, len(self.param_groups) - 1)
        except SpftError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: computes the loss and its gradients anew; called once.

        Returns:
            what the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        first = 0
        stepped: list[torch.Tensor] = []
        torch_groups: list[dict[str, Any]] = []
        for group in self.param_groups:
            full, half = [], []
            for position, parameter in enumerate(group["params"], first):
                if parameter.grad is None:
                    continue
                _check_gradient(parameter, position)
                if not self.state[parameter]:
                    self.state[parameter] = new_state(parameter, group)
                stepped.append(parameter)
                if has_8bit_moments(parameter, group):
                    step_8bit_(self._update(parameter, position), group)
                elif parameter.dtype in HALF:
                    half.append(self._update(parameter, position))
                else:
                    full.append(parameter)
            step_half_(half, group)
            torch_groups += _groups_by_kernel(full, group)
            first += len(group["params"])
        self._step_by_torch(torch_groups)
        # The fused kernel and bitsandbytes write past autograd; who caches values looks at this.
        torch.autograd.graph.increment_version(stepped)
        return loss

    def _update(self, parameter: torch.Tensor, position: int) -> Update:
        state = self.state[parameter]
        return Update(
            value=local_tensor(parameter),
            grad=_local_gradient(parameter),
            state={key: local_tensor(value) for key, value in state.items()},
            step=int(state["step"]) + 1,
            position=position,
        )

    def _step_by_torch(self, groups: list[dict[str, Any]]) -> None:
        """Let torch.optim.AdamW step the parameters of these groups alone."""
        if not groups:
            return
        own, self.param_groups = self.param_groups, groups
        try:
            _step_of_torch(self)
        finally:
            self.param_groups = own

    def _init_group(self, group, params, grads, exp_avgs, exp_avg_sqs, *others):
        """As torch's, but of DTensors the local parts: shards are stepped by themselves."""
        has_complex = super()._init_group(group, params, grads, exp_avgs, exp_avg_sqs, *others)
        grads[:] = map(_local_gradient, params)
        for tensors in (params, exp_avgs, exp_avg_sqs):
            tensors[:] = map(local_tensor, tensors)
        return has_complex

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state dict of this class or, with 32-bit moments, of torch.optim.AdamW.

        Hyperparameters are the saved ones, as with torch, but which kernel is used (foreach,
        fused) stays as it is here. Moments keep their precision: torch would cast them to the
        parameter's.

        Raises:
            SpftError: groups, shapes or `state_bits` differ; nothing is changed then.
        """
        state: dict[Any, Any] = {}

        def set_aside(_, state_dict):
            groups = completed_groups(self.param_groups, state_dict["param_groups"])
            state.update(fitting_state(self.param_groups, groups, state_dict["state"]))
            return {**state_dict, "state": {}, "param_groups": groups}

        def put_in(_):
            self.state.update(state)

        # Around all other hooks' work: after the last change of the dict, before the first look.
        with (
            self.register_load_state_dict_pre_hook(set_aside),
            self.register_load_state_dict_post_hook(put_in, prepend=True),
        ):
            super().load_state_dict(state_dict)


def _check_parameter(parameter: torch.Tensor, position: int, group: int) -> None:
    which = f"parameter {position} of group {group}, of shape {tuple(parameter.shape)},"
    if not is_marked(parameter):
        raise SpftError(
            f"{which} is not one that SPFT trains (a compact delta or of modules_to_save); {MEND}"
        )
    if parameter.dtype not in (*HALF, torch.float32, torch.float64):
        raise SpftError(f"{which} is {parameter.dtype}; it must be bf16, fp16, fp32 or fp64")


def _check_gradient(parameter: torch.Tensor, position: int) -> None:
    if parameter.grad.layout != torch.strided:
        raise SpftError(
            f"parameter {position} of shape {tuple(parameter.shape)} has a sparse gradient; make "
            "its module compute dense ones (sparse=False)"
        )


def _groups_by_kernel(
    parameters: list[torch.Tensor], group: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """A group of these parameters alone, divided by whether the fused kernel steps them."""
    for fused in (True, False):
        chosen = [p for p in parameters if is_fused(group, local_tensor(p)) == fused]
        if chosen:
            yield {**group, "params": chosen, "fused": fused or group["fused"]}


def _local_gradient(parameter: torch.Tensor) -> torch.Tensor:
    """The gradient as a plain tensor in the parameter's layout: kernels walk through both alike."""
    value, grad = local_tensor(parameter), parameter.grad
    if isinstance(parameter, DTensor) and grad.placements != parameter.placements:
        grad = grad.redistribute(parameter.device_mesh, parameter.placements)
    grad = local_tensor(grad)
    return grad if grad.stride() == value.stride() else torch.empty_like(value).copy_(grad)
