#!/usr/bin/env python
"""Segment images: ``python tools/demo.py --config-file F --weights W --input <images or folder> --output <dir>``."""

import sys

from maskformer.demo import main

if __name__ == "__main__":
    sys.exit(main())
