"""Whether a file can be written, found out before long work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from maskformer.errors import UserError
from maskformer.writing import check_writable, write_text


def test_places_that_can_be_written_stay_as_they_were(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("old")
    for place in ("new.json", "old.json", "a/b/new.json"):
        check_writable(tmp_path / place)
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"]
    assert (tmp_path / "old.json").read_text() == "old"
    write_text(tmp_path / "a/b/new.json", "{}")


def test_places_that_cannot(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a folder: name a file in it"):
        check_writable(tmp_path)
    for place in ("file/x.json", "file/below/x.json", "n" * 300 + "/x.json"):
        with pytest.raises(UserError, match="cannot be written") as error:
            check_writable(tmp_path / place)
        assert "\n" not in str(error.value)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written"):
        check_writable(tmp_path / "x.json")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs Linux")
def test_a_file_system_that_takes_no_files() -> None:
    with pytest.raises(UserError, match="cannot be written"):
        check_writable(Path("/proc/x.json"))
