#!/usr/bin/env python
"""Tell what a model costs: ``python tools/analyze_model.py --config-file F --tasks parameters flops speed memory``."""

import sys

from maskformer.analyze import main

if __name__ == "__main__":
    sys.exit(main())
