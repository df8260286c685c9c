"""What Axolotl's runs in one process need but once: imports, and pydantic classes of its keys. And
what they need no process for: saving the tokenised data."""

from __future__ import annotations

from functools import cache


@cache
def import_once() -> None:
    import axolotl.cli.train
    import axolotl.train  # noqa: F401

    _merge_schemas_once()
    save_data_in_this_process()


def save_data_in_this_process() -> None:
    """`datasets` starts a process from nothing wherever it is given a number of them, even one."""
    from datasets import Dataset

    save = Dataset.save_to_disk

    def save_here(self, *args, num_proc=None, **kwargs):
        return save(self, *args, num_proc=None if num_proc == 1 else num_proc, **kwargs)

    Dataset.save_to_disk = save_here


def _merge_schemas_once() -> None:
    """Every run builds the classes of its own and its plugins' keys anew: half a second."""
    from axolotl.integrations.base import PluginManager
    from axolotl.utils import config

    merge, merged = config.merge_input_args, {}

    def merge_once():
        plugins = tuple(PluginManager.get_instance().get_input_args())
        if plugins not in merged:
            merged[plugins] = merge()
        return merged[plugins]

    config.merge_input_args = merge_once
