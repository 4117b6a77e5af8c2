#!/usr/bin/env python
"""Label maps of ADE20K: ``python datasets/prepare_ade20k_sem_seg.py`` (``--help`` tells the arguments)."""

import sys

from maskformer.data.preparation.ade20k import main

if __name__ == "__main__":
    sys.exit(main())
