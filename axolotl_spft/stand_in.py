"""Takes the plugin's place where it cannot be imported."""

from __future__ import annotations

from axolotl.integrations.base import BasePlugin


def refusing_plugin(error: ImportError) -> type[BasePlugin]:
    """A plugin that ends a run with `adapter: prune_spft` by one line, and leaves others alone."""
    line = f"axolotl-spft: {error}"

    class SPFTPlugin(BasePlugin):
        def register(self, cfg: dict) -> None:
            if cfg.get("adapter") == "prune_spft":
                raise SystemExit(line) from error

    return SPFTPlugin
