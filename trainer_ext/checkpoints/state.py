"""The adapter and its optimizer's state, put together from an engine's parts and dealt out again.

What is written is what one process without an engine writes: `adapter_model.safetensors` by PEFT
and `optimizer.pt`, the optimizer's state dict over whole parameters. So a run may go on under any
engine and with any number of processes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict, load_peft_weights

from ..distributed.engine import Engine, innermost_optimizer
from ..distributed.parts import Part, held_part, like_tensor
from ..distributed.processes import any_process, process_rank, sum_over_processes, world_size
from ..distributed.shards import local_tensor
from ..errors import SpftError

OPTIMIZER_FILE = "optimizer.pt"
SCHEDULER_FILE = "scheduler.pt"
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")
_ADAPTERS_OWN = (".spft_delta.", ".modules_to_save.")
_KERNEL_KEYS = ("params", "foreach", "fused")


def plain_name(name: str) -> str:
    """A parameter's name without the wrappers of activation checkpointing and torch.compile."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


class TrainingState:
    """What a prepared trainer trains, wherever its engine keeps it. All processes must ask alike.

    Args:
        model: the PEFT model without the engine's wrapper.
        optimizer: as the trainer has it.
        groups: names of the trained parameters by group, as the optimizer was constructed.
    """

    def __init__(
        self,
        engine: Engine,
        model: PeftModel,
        optimizer: torch.optim.Optimizer,
        groups: list[list[str]],
    ) -> None:
        self._model, self._engine, self._wrapped = model, engine, optimizer
        own = {
            name: parameter
            for name, parameter in ((plain_name(n), p) for n, p in model.named_parameters())
            if parameter.requires_grad or any(part in name for part in _ADAPTERS_OWN)
        }
        trained = {name: p for name, p in own.items() if p.requires_grad}
        self._stepped = {part.name: part for part in engine.parts(optimizer, trained)}
        self._kept = {name: p for name, p in own.items() if name not in trained}
        self._groups = groups or [list(trained)]
        self._optimizer = innermost_optimizer(optimizer)

    def adapters(self) -> dict[str, torch.Tensor]:
        """All adapters' tensors, whole, on the CPU of process 0, by their names in the model.

        Trained values are those that are stepped: in fp32 where the engine keeps fp32 masters of
        16-bit parameters. The other processes get {} and hold one parameter whole at a time.
        """
        parts = {name: (s, s.values()) for name, s in self._stepped.items()}
        parts |= {name: held_part(name, p) for name, p in self._kept.items()}
        whole = {name: stepped.gather([part]) for name, (stepped, part) in parts.items()}
        if process_rank():
            return {}
        tensors = {name: values[0] for name, values in whole.items()}
        return tensors | {name: buffer.cpu() for name, buffer in self._buffers().items()}

    def load_adapter(self, folder: str | Path) -> None:
        """Take over the active adapter's tensors from a checkpoint's folder.

        Raises:
            SpftError: a tensor is missing, or of another shape; nothing is changed then.
        """
        adapter_name = self._model.active_adapter
        saved = load_peft_weights(str(folder), device="cpu")
        buffers = {n: b for n, b in self._buffers().items() if f".{adapter_name}." in n}
        shapes = {name: stepped.shape for name, stepped in self._stepped.items()}
        shapes |= {name: tuple(buffer.shape) for name, buffer in buffers.items()}
        # PEFT's own names for the files, whatever values they are to have
        in_file = get_peft_model_state_dict(
            self._model, state_dict={name: name for name in shapes}, adapter_name=adapter_name
        )
        tensors = {}
        for key, name in in_file.items():
            found = tuple(saved[key].shape) if key in saved else "missing"
            if found != shapes[name]:
                raise SpftError(
                    f"the adapter in {str(folder)!r} does not fit: {key} is {found} there and "
                    f"{shapes[name]} here; resume with the adapter configuration of the checkpoint"
                )
            tensors[name] = saved[key]
        for name, stepped in self._stepped.items():
            stepped.fill(tensors[name].to(torch.float32))
        with torch.no_grad():
            for name, buffer in buffers.items():
                buffer.copy_(tensors[name])

    def _buffers(self) -> dict[str, torch.Tensor]:
        buffers = ((plain_name(n), b) for n, b in self._model.named_buffers())
        return {n: b.detach() for n, b in buffers if any(part in n for part in _ADAPTERS_OWN)}

    def save_optimizer(self, folder: str | Path) -> None:
        """Write `optimizer.pt` of whole parameters.

        State that is not element-wise (8-bit moments come in blocks of a process's own part) is
        written by each process for itself, and needs as many processes of the same engine again.
        """
        if any_process(not self._is_elementwise()):
            with self._engine.whole_groups(self._wrapped) as optimizer:
                torch.save(optimizer.state_dict(), own_optimizer_file(folder))
            return
        stepped = [self._stepped[name] for names in self._groups for name in names]
        holding = torch.tensor([float(bool(self._state_of(s))) for s in stepped])
        holding = sum_over_processes({"holding": holding})["holding"].tolist()
        state: dict[int, dict[str, Any]] = {}
        for number, (s, count) in enumerate(zip(stepped, holding, strict=True)):
            whole = self._whole_state(s) if count else None
            if whole is not None:
                state[number] = whole
        if process_rank() == 0:
            saved = {"state": state, "param_groups": self._groups_of_whole()}
            torch.save(saved, Path(folder) / OPTIMIZER_FILE)

    def _groups_of_whole(self) -> list[dict[str, Any]]:
        """The optimizer's groups as they were constructed: engines leave empty ones out."""
        groups, first = [], 0
        with self._engine.whole_groups(self._wrapped) as optimizer:
            live = [group for group in optimizer.param_groups if group["params"]]
            of_names = iter(live)
            for names in self._groups:
                group = next(of_names) if names else live[0]
                groups.append({**group, "params": list(range(first, first + len(names)))})
                first += len(names)
        return groups

    def load_optimizer(self, folder: str | Path) -> None:
        """Take over what `save_optimizer` has written, under whichever engine.

        Raises:
            SpftError: groups or shapes do not fit; nothing is changed then.
        """
        own = own_optimizer_file(folder)
        path = own if own.is_file() else Path(folder) / OPTIMIZER_FILE
        # mapped: of the other processes' parts no byte is read
        saved = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        if own.is_file() or not self._engine.divides_state:
            with self._engine.whole_groups(self._wrapped) as optimizer:
                optimizer.load_state_dict(saved)
            return
        numbers = self._numbers_in(saved, folder)
        with self._engine.whole_groups(self._wrapped) as optimizer:
            groups, state, first = [], {}, 0
            filled = iter([group for group in saved["param_groups"] if group["params"]])
            for group in optimizer.param_groups:
                theirs = next(filled) if group["params"] else {}
                kernels = {key: group[key] for key in _KERNEL_KEYS if key in group}
                numbered = list(range(first, first + len(group["params"])))
                groups.append({**group, **theirs, **kernels, "params": numbered})
                for number, tensor in zip(numbered, group["params"], strict=True):
                    state[number] = self._assembled(tensor, numbers, saved["state"])
                first += len(numbered)
            state = {number: entries for number, entries in state.items() if entries}
            optimizer.load_state_dict({"state": state, "param_groups": groups})

    def save_scheduler(self, scheduler, folder: str | Path) -> None:
        """Write `scheduler.pt` for the groups as they were constructed; process 0 does."""
        sizes = list(map(len, self._groups))
        live = self._live_groups()
        of_group = [live.index(i) if i in live else 0 for i in range(len(sizes))]
        if process_rank() == 0:
            state = _by_group(scheduler.state_dict(), len(live), of_group)
            torch.save(state, Path(folder) / SCHEDULER_FILE)

    def load_scheduler(self, scheduler, folder: str | Path) -> None:
        """Take over what `save_scheduler` has written."""
        state = torch.load(Path(folder) / SCHEDULER_FILE, map_location="cpu", weights_only=True)
        scheduler.load_state_dict(_by_group(state, len(self._groups), self._live_groups()))

    def _live_groups(self) -> list[int]:
        """Which of the constructed groups the optimizer has: DeepSpeed drops empty ones."""
        every = range(len(self._groups))
        if len(self._optimizer.param_groups) == len(self._groups):
            return list(every)
        return [number for number in every if self._groups[number]]

    def _numbers_in(self, saved: dict, folder: str | Path) -> dict[str, int]:
        """Parameter name -> its number in a saved state dict."""
        sizes = [len(names) for names in self._groups]
        saved_sizes = [len(group["params"]) for group in saved["param_groups"]]
        if sizes != saved_sizes:
            raise SpftError(
                f"{OPTIMIZER_FILE} in {str(folder)!r} has groups of {saved_sizes} parameters and "
                f"this run has {sizes}; resume with the adapter configuration of the checkpoint"
            )
        numbers = {}
        for names, group in zip(self._groups, saved["param_groups"], strict=True):
            numbers |= dict(zip(names, group["params"], strict=True))
        for name, number in numbers.items():
            shape = self._stepped[name].shape
            for key, value in saved["state"].get(number, {}).items():
                if _is_whole_sized(value) and tuple(value.shape) != shape:
                    raise SpftError(
                        f"{OPTIMIZER_FILE} in {str(folder)!r} holds {key} of {tuple(value.shape)} "
                        f"for {name} of {shape}; 8-bit moments go on only as they were made (with "
                        "as many processes of the same engine), else resume with the "
                        "configuration of the checkpoint"
                    )
        return numbers

    def _assembled(self, tensor: torch.Tensor, numbers: dict, saved: dict) -> dict[str, Any]:
        """State of one tensor of the optimizer, from that of the parameters that it holds."""
        entries: dict[str, Any] = {}
        local = local_tensor(tensor)
        for name, number in numbers.items():
            stepped = self._stepped[name]
            if stepped.tensor is not tensor:
                continue
            for key, value in saved.get(number, {}).items():
                if not _is_whole_sized(value):
                    entries[key] = value
                    continue
                if key not in entries:
                    entries[key] = torch.zeros(
                        local.numel(), dtype=value.dtype, device=local.device
                    )
                stepped.part_of(entries[key]).copy_(stepped.cut(value))
        return {
            key: like_tensor(value, tensor) if _is_whole_sized(value) else value
            for key, value in entries.items()
        }

    def _state_of(self, stepped: Part) -> dict[str, Any]:
        return {} if stepped.tensor is None else self._optimizer.state.get(stepped.tensor, {})

    def _whole_state(self, stepped: Part) -> dict[str, Any] | None:
        """State of one parameter on process 0; None on the others."""
        # All tensors that one optimizer steps have the same entries; a process that steps nothing
        # of this one knows them from another.
        entries = self._state_of(stepped) or next(iter(self._optimizer.state.values()))
        keys = sorted(key for key, value in entries.items() if _is_whole_sized(value))
        if self._state_of(stepped):
            parts = [stepped.part_of(local_tensor(entries[key])) for key in keys]
        else:
            parts = [local_tensor(entries[key]).new_zeros(stepped.numel) for key in keys]
        whole = stepped.gather(parts)
        if whole is None:
            return None
        rest = {key: value for key, value in entries.items() if key not in keys}
        return {**rest, **dict(zip(keys, whole, strict=True))}

    def _is_elementwise(self) -> bool:
        """Whether all state that is no scalar is floating point of its tensor's shape."""
        return all(
            value.is_floating_point() and value.shape == tensor.shape
            for tensor, entries in self._optimizer.state.items()
            for value in entries.values()
            if _is_whole_sized(value)
        )


def _by_group(state: dict[str, Any], groups: int, chosen: list[int]) -> dict[str, Any]:
    """A scheduler's state with its lists of one value a group taken from the chosen ones."""
    return {
        key: [value[number] for number in chosen]
        if isinstance(value, list) and len(value) == groups
        else value
        for key, value in state.items()
    }


def _is_whole_sized(value: Any) -> bool:
    """Whether an entry of an optimizer's state has a value for each element."""
    return isinstance(value, torch.Tensor) and value.dim() > 0


def own_optimizer_file(folder: str | Path) -> Path:
    """Where this process writes state that cannot be put together."""
    return Path(folder) / f"optimizer_{process_rank()}_of_{world_size()}.pt"
