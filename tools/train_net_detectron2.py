#!/usr/bin/env python
"""Train or evaluate with Detectron2: ``python tools/train_net_detectron2.py --config-file F [KEY VALUE ...]``.

The same recipes as ``tools/train_net.py``, built and trained by Detectron2; docs/detectron2.md says how to have it.
"""

import sys

from maskformer.errors import UserError

if __name__ == "__main__":
    try:
        from maskformer.integrations.detectron2.command import main
    except UserError as error:
        sys.exit(f"error: {error}")
    sys.exit(main())
