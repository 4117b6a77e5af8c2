"""The table of keys is complete and commented."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from maskformer.config import defaults
from maskformer.config.compat import UNREAD
from maskformer.config.tree import flatten

LINE = re.compile(r'^ +"[A-Z0-9_]+": (?!\{)(?![A-Z_]+,)')


def test_every_key_has_a_comment() -> None:
    lines = Path(defaults.__file__).read_text().splitlines()
    keys = [(line, following) for line, following in itertools.pairwise(lines) if LINE.match(line)]
    bare = [line for line, following in keys if "  # " not in line and "# ^" not in following]
    assert bare == []
    assert len(keys) == len(list(flatten(defaults.DEFAULTS)))


def test_comments_say_published_or_ours() -> None:
    lines = [line for line in Path(defaults.__file__).read_text().splitlines() if LINE.match(line) and "# " in line]
    assert [line for line in lines if not re.search(r"[Pp]ublished|ours|Ours", line)] == []


def test_unread_keys_are_not_in_the_table_of_read_ones() -> None:
    assert set(UNREAD) & {key for key, _ in flatten(defaults.DEFAULTS)} == set()
    assert all(unread.values and unread.remedy for unread in UNREAD.values())
