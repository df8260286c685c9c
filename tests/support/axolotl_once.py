"""What Axolotl's runs in one process need but once: imports, and pydantic classes of its keys."""

from __future__ import annotations

import gc
import sys

_done: set[str] = set()


def import_once() -> None:
    if "import" in _done:
        return
    import axolotl.cli.train
    import axolotl.train  # noqa: F401

    _merge_schemas_once()
    _freeze()
    _done.add("import")


def freeze_after_first_run() -> None:
    """The first run has imported as much again."""
    if "run" not in _done and "axolotl.core.trainers" in sys.modules:
        _freeze()
        _done.add("run")


def _freeze() -> None:
    """Axolotl collects garbage seven times a run; what is here now needs no looking through."""
    gc.collect()
    gc.freeze()


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
