#!/usr/bin/env python
"""Convert weights: ``python tools/convert_weights.py --weights W --config-file F --to published --output W.pkl``."""

import sys

from maskformer.convert import main

if __name__ == "__main__":
    sys.exit(main())
