#!/usr/bin/env python
"""Train or evaluate a model: ``python tools/train_net.py --config-file F [--resume] [--eval-only] [KEY VALUE ...]``."""

import sys

from maskformer.engine.main import main

if __name__ == "__main__":
    sys.exit(main())
