#!/usr/bin/env python
"""Pictures of ADE20K-Full: ``python datasets/prepare_ade20k_full_sem_seg.py`` (``--help`` tells the arguments)."""

import sys

from maskformer.data.preparation.ade20k_full import main

if __name__ == "__main__":
    sys.exit(main())
