"""The Axolotl plugin of structured-pruning-based sparse fine-tuning.

```yaml
plugins: [axolotl_spft.SPFTPlugin]   # Axolotl 0.21 finds it without this line
adapter: prune_spft
```
"""

import importlib

# Names are imported when they are asked for: `spft --help` needs neither Axolotl nor torch.
_HOMES = {"SPFTArgs": "args", "SPFTPlugin": "plugin"}
__all__ = ["SPFTArgs", "SPFTPlugin"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from trainer_ext.versions import imports_explained

        with imports_explained("axolotl"):
            home = importlib.import_module(f".{_HOMES[name]}", __name__)
            value = getattr(home, name)
    except ImportError as error:
        if name != "SPFTPlugin":
            raise
        # Axolotl imports every plugin that is installed, also for YAMLs that have no use for it.
        from .stand_in import refusing_plugin

        value = refusing_plugin(error)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
