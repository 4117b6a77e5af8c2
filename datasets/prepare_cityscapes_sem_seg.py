#!/usr/bin/env python
"""Train ids of Cityscapes: ``python datasets/prepare_cityscapes_sem_seg.py`` (``--help`` tells the arguments)."""

import sys

from maskformer.data.preparation.cityscapes import main

if __name__ == "__main__":
    sys.exit(main())
