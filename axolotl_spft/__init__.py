"""The Axolotl plugin of structured-pruning-based sparse fine-tuning.

```yaml
plugins: [axolotl_spft.SPFTPlugin]
adapter: prune_spft
```
"""

from .args import SPFTArgs
from .plugin import SPFTPlugin

__all__ = ["SPFTArgs", "SPFTPlugin"]
