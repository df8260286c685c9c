"""SelectedNeuronAdamW: AdamW for compact deltas, with 32- or 8-bit moments."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..errors import SpftError
from ..tuner.marks import is_marked
from .block_8bit import MIN_ELEMENTS, new_moments, update_8bit_
from .hyperparameters import TORCH_KEYS, check_hyperparameters
from .kernels import HALF, update_full_, update_half_
from .pieces import Update
from .state_dict import completed_groups, counter_device, fitting_state, moment_dtype

MEND = "pass trainer_ext.trained_parameters(model)"


class SelectedNeuronAdamW(Optimizer):
    """AdamW (Loshchilov & Hutter 2019) on the compact tensors that SPFT trains.

    Weight decay acts on the delta, so it pulls the selected neurons towards their pretrained
    weights. fp32 and fp64 parameters are stepped by torch's kernels: the same bits as
    torch.optim.AdamW, and state dicts go both ways. bf16 and fp16 parameters have fp32 moments and
    no fp32 copy that stays: a step computes in fp32 on at most 2**24 elements at a time and rounds
    back, bf16 stochastically, so that updates below its precision are kept in the mean.

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
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "state_bits": state_bits,
            "foreach": foreach,
            "fused": fused,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
            **TORCH_KEYS,
        }
        check_hyperparameters(defaults)
        params = params if isinstance(params, torch.Tensor) else list(params)
        if len(params) == 0:
            raise SpftError(f"there is no parameter to optimize; {MEND}")
        super().__init__(params, defaults)

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
        for group in self.param_groups:
            self._step_group(group, first)
            first += len(group["params"])
        return loss

    def _step_group(self, group: dict[str, Any], first: int) -> None:
        full, half = [], []
        stepped = []
        for position, parameter in enumerate(group["params"], first):
            if parameter.grad is None:
                continue
            stepped.append(parameter)
            state = self._state_of(parameter, group)
            update = _local_update(parameter, state, position)
            if state["exp_avg"].dtype == torch.uint8:
                update_8bit_(update, group)
                state["step"].fill_(update.step)
            elif parameter.dtype in HALF:
                half.append(update)
            else:
                full.append(update)
        update_full_(full, group)
        update_half_(half, group)
        for update in half:
            update.state["step"].fill_(update.step)
        # The fused kernel and bitsandbytes write past autograd; who caches values looks at this.
        torch.autograd.graph.increment_version(stepped)

    def _state_of(self, parameter: torch.Tensor, group: dict[str, Any]) -> dict[str, torch.Tensor]:
        state = self.state[parameter]
        if state:
            return state
        state["step"] = torch.zeros(
            (), dtype=torch.float32, device=counter_device(parameter, group)
        )
        if group["state_bits"] == 8 and parameter.numel() >= MIN_ELEMENTS:
            _refuse_8bit(parameter)
            state.update(new_moments(parameter))
        else:
            dtype = moment_dtype(parameter)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=dtype)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=dtype)
        return state

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
        hooks = (
            self.register_load_state_dict_pre_hook(set_aside),
            self.register_load_state_dict_post_hook(put_in, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()


def _check_parameter(parameter: torch.Tensor, position: int, group: int) -> None:
    which = f"parameter {position} of group {group}, of shape {tuple(parameter.shape)},"
    if not is_marked(parameter):
        raise SpftError(
            f"{which} is not one that SPFT trains (a compact delta or of modules_to_save); {MEND}"
        )
    if parameter.dtype not in (*HALF, torch.float32, torch.float64):
        raise SpftError(f"{which} is {parameter.dtype}; it must be bf16, fp16, fp32 or fp64")


def _refuse_8bit(parameter: torch.Tensor) -> None:
    shape = tuple(parameter.shape)
    if isinstance(parameter, DTensor):
        raise SpftError(
            f"state_bits is 8 but the parameter of shape {shape} is a DTensor (FSDP2), whose "
            "shards the blocks of 8-bit moments would not follow into checkpoints; use "
            "state_bits=32 (optimizer adamw_torch)"
        )
    if parameter.dtype == torch.float64:
        raise SpftError(
            f"state_bits is 8 but the parameter of shape {shape} is fp64; use state_bits=32"
        )


def _local_update(parameter: torch.Tensor, state: dict, position: int) -> Update:
    """The update in plain tensors: element-wise maths needs nothing of other processes."""
    grad = parameter.grad
    if grad.layout != torch.strided:
        raise SpftError(
            f"parameter {position} of shape {tuple(parameter.shape)} has a sparse gradient; make "
            "its module compute dense ones (sparse=False)"
        )
    counts_itself = parameter.dtype not in HALF and state["exp_avg"].dtype != torch.uint8
    step = None if counts_itself else int(state["step"]) + 1
    if isinstance(parameter, DTensor):
        if grad.placements != parameter.placements:
            grad = grad.redistribute(parameter.device_mesh, parameter.placements)
        state = {k: v.to_local() if isinstance(v, DTensor) else v for k, v in state.items()}
        parameter, grad = parameter.to_local(), grad.to_local()
    if grad.stride() != parameter.stride():
        grad = torch.empty_like(parameter).copy_(grad)  # kernels walk through both alike
    return Update(parameter, grad, state, step, position)
