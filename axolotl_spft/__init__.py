"""The Axolotl plugin of structured-pruning-based sparse fine-tuning.

```yaml
plugins: [axolotl_spft.SPFTPlugin]   # Axolotl 0.21 finds it without this line
adapter: prune_spft
```
"""

try:
    from trainer_ext.versions import imports_explained

    with imports_explained("axolotl"):
        from .args import SPFTArgs
        from .plugin import SPFTPlugin

    __all__ = ["SPFTArgs", "SPFTPlugin"]
except ImportError as error:
    # Axolotl imports every plugin that is installed, also for YAMLs that have no use for it.
    from .stand_in import refusing_plugin

    SPFTPlugin = refusing_plugin(error)
    __all__ = ["SPFTPlugin"]
