from __future__ import annotations

from pathlib import Path

import pytest

from maskformer.data.paths import inside
from maskformer.errors import UserError


@pytest.mark.parametrize("name", ["a.png", "val/a.png", "./a.png", "a..b/..c.png"])
def test_names_in_a_folder(name: str) -> None:
    assert inside(Path("/data"), name, "x.json") == Path("/data") / name


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../a.png", "val/../../a.png", "val/..", "..", "", "/", "//host/a.png"]
)
def test_names_that_leave_it(name: str) -> None:
    with pytest.raises(UserError) as error:
        inside(Path("/data"), name, "x.json")
    assert f"x.json has the file_name {name!r}, which leaves the folder '/data'" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [None, 3, ["a.png"], b"a.png"])
def test_names_that_are_no_text(name: object) -> None:
    with pytest.raises(TypeError, match="file_name is"):
        inside(Path("/data"), name, "x.json")
