"""Who else takes part in a run: processes, engines, and what each process holds.

Everything that knows of DeepSpeed or FSDP is in this package; the rest of `trainer_ext` asks it.
"""

from .engines import (
    Engine,
    bare_model,
    keep_from_broadcast,
    keep_one_dtype_whole,
    keeps_client_optimizer,
    note_trained_parameters,
    refuse_unsupported_engine,
    release_gathered_weights,
    settle_checkpointing,
)
from .parts import (
    Stepped,
    held_parameter,
    innermost_optimizer,
    like_stepped,
    stepped_parameters,
    whole_groups,
)
from .processes import (
    any_process,
    from_main_process,
    mean_over_processes,
    process_rank,
    sum_over_processes,
    wait_for_all,
    world_size,
)
from .shards import (
    Block,
    ShardLayout,
    any_nonzero,
    is_sharded,
    local_shard,
    local_tensor,
    read_neurons,
    whole_in_forward,
    whole_numel,
    whole_shape,
    write_neurons,
    write_whole_neurons,
)

__all__ = [
    "Block",
    "Engine",
    "ShardLayout",
    "Stepped",
    "any_nonzero",
    "any_process",
    "bare_model",
    "from_main_process",
    "held_parameter",
    "innermost_optimizer",
    "is_sharded",
    "keep_from_broadcast",
    "keep_one_dtype_whole",
    "keeps_client_optimizer",
    "like_stepped",
    "local_shard",
    "local_tensor",
    "mean_over_processes",
    "note_trained_parameters",
    "process_rank",
    "read_neurons",
    "refuse_unsupported_engine",
    "release_gathered_weights",
    "settle_checkpointing",
    "stepped_parameters",
    "sum_over_processes",
    "wait_for_all",
    "whole_groups",
    "whole_in_forward",
    "whole_numel",
    "whole_shape",
    "world_size",
    "write_neurons",
    "write_whole_neurons",
]
