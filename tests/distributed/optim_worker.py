"""One process of runs that train deltas by SelectedNeuronAdamW without a trainer: every process
has the same data, so all gradients are those of one process.

    optim_worker.py FOLDER none|zero|fsdp2
"""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from adamw_reference import SelectedNeuronAdamWReference
from adapters import selected
from engine_worker import start
from processes import hand_over
from tiny_models import batch
from torch.distributed.checkpoint import state_dict as checkpointing
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from trainer_ext import SelectedNeuronAdamW, SpftError, trained_parameters
from trainer_ext.distributed.shards import ShardLayout, read_neurons
from trainer_ext.report.figures import optimizer_state_bytes
from trainer_ext.tuner.model import deltas

R = 31  # odd: shards of different sizes, and padding
STEPS = 5
SAVED_AT = 3
# eps is well above gradient noise: a rounding error must not become a step
OPTIONS = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-3}
MODULES = ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ZERO_CASES = [(stage, bits) for stage in (1, 2, 3) for bits in (32, 8)]


def make_model():
    return selected(r=R, target_modules=MODULES)


def optimizer_of(model, **more) -> SelectedNeuronAdamW:
    return SelectedNeuronAdamW(trained_parameters(model), **OPTIONS, **more)


def figures(model, optimizer) -> dict:
    """Whole deltas, and this process's bytes of state."""
    return {
        "delta": {
            name: read_neurons(delta.weight, ShardLayout.of(delta.weight), torch.arange(R))
            for name, delta in deltas(model).items()
        },
        "state_bytes": optimizer_state_bytes(optimizer),
    }


def plain(folder: Path) -> dict:
    """One process, no engine."""
    model = make_model()
    optimizer = optimizer_of(model)
    for step in range(STEPS):
        model(**batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"plain": figures(model, optimizer)}


class Twin:
    """Steps the reference beside an optimizer, from the same values, gradients and state."""

    def __init__(self, optimizer, **options) -> None:
        self.error = 0.0
        self.shapes: list[tuple] = []
        self.options = options
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    def _before(self, optimizer, args, kwargs) -> None:
        self.pairs = []
        for group in optimizer.param_groups:
            for p in group["params"]:
                q = torch.nn.Parameter(p.detach().clone())
                q.grad = p.grad.clone()
                twin = SelectedNeuronAdamWReference([q], **OPTIONS, **self.options)
                if optimizer.state.get(p):
                    twin.state[q] = copy.deepcopy(dict(optimizer.state[p]))
                self.pairs.append((p, q, twin))

    def _after(self, optimizer, args, kwargs) -> None:
        self.shapes = [tuple(p.shape) for p, _, _ in self.pairs]
        for p, q, twin in self.pairs:
            twin.step()
            self.error = max(self.error, (p - q).abs().max().item())


def zero(folder: Path) -> dict:
    import deepspeed

    results = {}
    for stage, bits in ZERO_CASES:
        model = make_model()
        optimizer = optimizer_of(model, state_bits=bits)
        twin = Twin(optimizer, state_bits=bits)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,  # 1.0 by default since DeepSpeed 0.19
        }
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        assert engine.zero_optimization_stage() == stage
        assert engine.optimizer.optimizer is optimizer
        assert all(hasattr(p, "ds_tensor") == (stage == 3) for p in model.parameters())

        def train(first: int, last: int, engine=engine) -> None:
            for step in range(first, last):
                engine.backward(engine(**batch(step)).loss)
                engine.step()

        train(0, SAVED_AT)
        engine.save_checkpoint(str(folder / f"{stage}-{bits}"), exclude_frozen_parameters=True)
        train(SAVED_AT, STEPS)
        result = {**figures(model, optimizer), "twin_error": twin.error, "shapes": twin.shapes}
        state_dtypes = {s["exp_avg"].dtype for s in optimizer.state.values()}
        assert state_dtypes == {torch.uint8 if bits == 8 else torch.float32}
        engine.load_checkpoint(str(folder / f"{stage}-{bits}"), load_module_strict=False)
        train(SAVED_AT, STEPS)
        result["resumed"] = figures(model, optimizer)["delta"]
        results[f"zero{stage}-{bits}"] = result
        engine.destroy()
    return results


def fsdp2(folder: Path) -> dict:
    dist.init_process_group("gloo")
    results = {}
    for name, options in {"default": {}, "foreach": {"foreach": True}}.items():
        model, optimizer = _sharded(**options)
        _train(model, optimizer, 0, SAVED_AT)
        state = checkpointing.get_optimizer_state_dict(
            model, optimizer, options=checkpointing.StateDictOptions(full_state_dict=True)
        )
        state = copy.deepcopy(state)  # its counters are the optimizer's own
        at_save = {n: p.detach().clone() for n, p in _trained(model)}
        _train(model, optimizer, SAVED_AT, STEPS)
        result = figures(model, optimizer)
        result["local_bytes"] = sum(
            (t.to_local() if isinstance(t, DTensor) else t).nbytes
            for s in optimizer.state.values()
            for t in s.values()
        )
        assert all(isinstance(s["exp_avg"], DTensor) for s in optimizer.state.values())

        # a fresh optimizer goes on from the whole state dict of the first process
        model, optimizer = _sharded(**options)
        with torch.no_grad():
            for n, p in _trained(model):
                p.copy_(at_save[n])
        checkpointing.set_optimizer_state_dict(
            model,
            optimizer,
            state,
            options=checkpointing.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
        )
        _train(model, optimizer, SAVED_AT, STEPS)
        result["resumed"] = figures(model, optimizer)["delta"]
        results[name] = result
    results["refusal"] = _refusal()
    results["bf16"] = _bf16()
    return results


def _sharded(dtype=torch.float32, **options):
    model = make_model()
    for delta in deltas(model).values():
        delta.weight.data = delta.weight.data.to(dtype)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assert all(p.device_mesh.size() == dist.get_world_size() for p in model.parameters())
    return model, optimizer_of(model, **options)


def _trained(model):
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


def _train(model, optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        model(**batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _refusal() -> str:
    model, optimizer = _sharded(state_bits=8)
    large = torch.nn.Parameter(
        torch.distributed.tensor.zeros((64, 96), device_mesh=next(model.parameters()).device_mesh)
    )
    large.grad = torch.zeros_like(large)
    optimizer.param_groups[0]["params"] = [large]
    try:
        optimizer.step()
    except SpftError as error:
        return str(error)
    return ""


def _bf16() -> dict:
    """Deltas in bf16 on this process's shards, by prescribed gradients."""
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    whole = torch.randn(7, 33, generator=torch.Generator().manual_seed(0)).bfloat16()
    parameter = torch.nn.Parameter(
        torch.distributed.tensor.distribute_tensor(whole, mesh, [torch.distributed.tensor.Shard(0)])
    )
    parameter._spft_trained = True
    optimizer = SelectedNeuronAdamW([parameter], lr=1e-2, foreach=False)
    versions = [parameter._version]
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        gradient = torch.randn(7, 33, generator=generator).bfloat16()
        parameter.grad = torch.distributed.tensor.distribute_tensor(
            gradient, mesh, parameter.placements
        )
        optimizer.step()
        versions.append(parameter._version)
    assert versions == sorted(set(versions))
    state = optimizer.state[parameter]
    assert isinstance(state["exp_avg"], DTensor)
    return {
        "local": parameter.to_local().detach().clone(),
        "moment": state["exp_avg"].to_local().clone(),
    }


def main(folder: Path, engine: str) -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if engine == "zero":
        start("zero3")
    results = {"none": plain, "zero": zero, "fsdp2": fsdp2}[engine](folder)
    if world > 1:
        assert dist.get_world_size() == world
    hand_over(results, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
