"""What Axolotl's runs in one process need but once: imports, and pydantic classes of its keys."""

from __future__ import annotations

from functools import cache


@cache
def import_once() -> None:
    import axolotl.cli.train
    import axolotl.train  # noqa: F401

    _merge_schemas_once()


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
