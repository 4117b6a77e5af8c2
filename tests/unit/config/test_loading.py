"""Config files: bases, sizes without code, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from maskformer.config import find_config, get_cfg, shipped_configs
from maskformer.config.loading import decode, evaluate_size_list, read_config
from maskformer.errors import UserError


def write(folder: Path, text: str, name: str = "a.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def refused(path: Path, *fragments: str) -> str:
    """The message of the error; one sentence that starts with the file and holds the fragments."""
    with pytest.raises(UserError) as caught:
        get_cfg(path)
    message = str(caught.value)
    for fragment in fragments:
        assert fragment in message
    assert "\n" not in message
    return message


def test_settings_know_where_they_come_from(tmp_path: Path) -> None:
    path = write(tmp_path, "SEED: 3\nSOLVER:\n  AMP:\n    ENABLED: true\n")
    assert read_config(path) == [
        ("SEED", 3, f"{path}, line 1: ", False),
        ("SOLVER.AMP.ENABLED", True, f"{path}, line 4: ", False),
    ]


@pytest.mark.parametrize("text", ["", "# nothing\n", "SOLVER: {}\n"])
def test_empty_files_change_nothing(tmp_path: Path, text: str) -> None:
    assert get_cfg(write(tmp_path, text)) == get_cfg()


def test_nested_bases(tmp_path: Path) -> None:
    write(tmp_path, "SEED: 1\nSOLVER: {MAX_ITER: 10, BASE_LR: 0.5}\n", "deep/base.yaml")
    write(tmp_path, "_BASE_: base.yaml\nSOLVER: {MAX_ITER: 20}\n", "deep/middle.yaml")
    cfg = get_cfg(write(tmp_path, "_BASE_: deep/middle.yaml\nSEED: 7\n"))
    assert (cfg.SEED, cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR) == (7, 20, 0.5)


def test_base_may_stand_last_or_be_a_list(tmp_path: Path) -> None:
    write(tmp_path, "SEED: 1\nLOG_PERIOD: 1\n", "one.yaml")
    write(tmp_path, "SEED: 2\n", "two.yaml")
    assert get_cfg(write(tmp_path, "SEED: 5\n_BASE_: one.yaml\n")).SEED == 5
    cfg = get_cfg(write(tmp_path, "_BASE_: [one.yaml, two.yaml]\n"))
    assert (cfg.SEED, cfg.LOG_PERIOD) == (2, 1)


def test_base_in_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "SEED: 4\n", "mine.yaml")
    assert get_cfg(write(tmp_path, "_BASE_: ~/mine.yaml\n", "other/a.yaml")).SEED == 4


def test_cycles_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "_BASE_: a.yaml\n", "b.yaml")
    path = write(tmp_path, "_BASE_: b.yaml\n")
    refused(path, "name each other", "a.yaml", "b.yaml")
    refused(write(tmp_path, "_BASE_: self.yaml\n", "self.yaml"), "name each other")


def test_one_base_twice_is_no_cycle(tmp_path: Path) -> None:
    write(tmp_path, "SEED: 1\n", "base.yaml")
    write(tmp_path, "_BASE_: base.yaml\n", "b.yaml")
    assert get_cfg(write(tmp_path, "_BASE_: [base.yaml, b.yaml]\n")).SEED == 1


@pytest.mark.parametrize("base", ["missing.yaml", "3", "''", "[[a]]"])
def test_bad_bases(tmp_path: Path, base: str) -> None:
    refused(write(tmp_path, f"SEED: 1\n_BASE_: {base}\n"), "a.yaml, line 2: _BASE_")


@pytest.mark.parametrize(
    ("text", "line", "fragment"),
    [
        ("SEED: 1\nSEED: 2\n", 2, "already given in line 1"),
        ("SOLVER:\n  GAMMA: 1.0\n  GAMMA: 1.0\n", 3, "SOLVER.GAMMA was already given in line 2"),
        ("SOLVER:\n  GAMMA: [1\nSEED: 1\n", 3, "not valid YAML"),
        ("SEED: 1\n\tLOG_PERIOD: 2\n", 2, "not valid YAML"),
        ("SEED: *nowhere\n", 1, "not valid YAML"),
        ("SEED: 1\n---\nSEED: 2\n", 2, "not valid YAML"),
        ("- SEED\n- 1\n", 1, "a config is a mapping"),
        ("just text\n", 1, "a config is a mapping"),
        ("SOLVER:\n  1: 2\n", 2, "keys are names"),
        ("SOLVER:\n  <<: {GAMMA: 2.0}\n", 2, "merge key"),
        ("SOLVER: &s\n  GAMMA: 0.5\n  X: *s\n", 1, "SOLVER.X contains itself"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, line: int, fragment: str) -> None:
    path = write(tmp_path, text)
    assert refused(path, fragment).startswith(f"{path}, line {line}: ")


@pytest.mark.parametrize("text", ["SOLVER: &s\n  AMP: *s\n", "SOLVER:\n  STEPS: &s [1, [*s]]\n", "SEED: &s [*s]\n"])
def test_values_that_contain_themselves(tmp_path: Path, text: str) -> None:
    refused(write(tmp_path, text), "contains itself")


def test_aliases_are_plain_yaml(tmp_path: Path) -> None:
    cfg = get_cfg(write(tmp_path, "INPUT:\n  MIN_SIZE_TRAIN: &s [64]\nTEST:\n  AUG: {MIN_SIZES: *s}\n"))
    assert cfg.TEST.AUG.MIN_SIZES == [64]


def test_files_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xff\xfe\x00\x81")
    refused(path, "not UTF-8")
    path.write_bytes(b"SEED: \x00 1")
    refused(path, "not valid YAML")


@pytest.mark.parametrize(
    "value",
    [
        '!!python/object/apply:os.system ["echo pwned"]',
        "!!python/name:os.system",
        "!!python/tuple [1, 2]",
        "!!python/object/new:os.system [x]",
        "!mine 3",
        "[1, !!python/name:os.system ]",
        '!!python/object/apply:eval [\'__import__("os").system("echo pwned")\']',
        "!!python/object/apply:eval ['[int(x * 0.1 * 512) for x in range(5, 21)]', 1]",
        "!!python/object/apply:eval '[int(x * 0.1 * 512) for x in range(5, 21)]'",
        "!!python/object/apply:eval [[int(x * 0.1 * 512) for x in range(5]]",
    ],
)
def test_tags_are_refused_with_file_line_and_remedy(
    tmp_path: Path, value: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, f"SEED: 1\nINPUT:\n  MIN_SIZE_TRAIN: {value}\n")
    message = refused(path)
    assert message.startswith(f"{path}, line 3")
    assert "write" in message or "mend" in message
    assert "pwned" not in capfd.readouterr().out


def test_a_tagged_section_is_refused(tmp_path: Path) -> None:
    refused(write(tmp_path, "SOLVER: !!python/object:os.x {GAMMA: 1.0}\n"), "line 1", "tag")


# The lists that published recipes resolve to.
SIZES_512 = [256, 307, 358, 409, 460, 512, 563, 614, 665, 716, 768, 819, 870, 921, 972, 1024]
SIZES_640 = [320, 384, 448, 512, 576, 640, 704, 768, 832, 896, 960, 1024, 1088, 1152, 1216, 1280]
SIZES_1024 = [512, 614, 716, 819, 921, 1024, 1126, 1228, 1331, 1433, 1536, 1638, 1740, 1843, 1945, 2048]
SIZES_2048 = [1024, 1228, 1433, 1638, 1843, 2048, 2252, 2457, 2662, 2867, 3072, 3276, 3481, 3686, 3891, 4096]


@pytest.mark.parametrize(
    ("bounds", "side", "sizes"),
    [
        ("5, 21", 512, SIZES_512),
        ("5, 21", 640, SIZES_640),
        ("5, 16", 640, SIZES_640[:11]),
        ("5, 21", 1024, SIZES_1024),
        ("5, 21", 2048, SIZES_2048),
        ("5, 21, 5", 512, [256, 512, 768, 1024]),
    ],
)
def test_published_size_lists(tmp_path: Path, bounds: str, side: int, sizes: list[int]) -> None:
    expression = f"[int(x * 0.1 * {side}) for x in range({bounds})]"
    assert evaluate_size_list(expression) == sizes
    path = write(tmp_path, f'INPUT:\n  MIN_SIZE_TRAIN: !!python/object/apply:eval ["{expression}"]\n')
    cfg = get_cfg(path)
    assert cfg.INPUT.MIN_SIZE_TRAIN == sizes


def test_size_lists_round_like_python() -> None:
    # (x * 0.07) * 100 differs from x * (0.07 * 100) at some x: the order is part of the published numbers.
    assert evaluate_size_list("[ int( size*0.07*100 ) for size in range( 1,101 ) ]") == [
        int(x * 0.07 * 100) for x in range(1, 101)
    ]


@pytest.mark.parametrize(
    "text",
    [
        "[int(x * 0.1 * 512) for y in range(5, 21)]",
        "[int(x * 0.1 * 512) for x in range(21)]",
        "[int(x * 0.1) for x in range(5, 21)]",
        "[int(x * 0.1 * y) for x in range(5, 21)]",
        "[int(x * 0.1 * 512) for x in range(5, 21, 0)]",
        "[int(x * 0.1 * 512) for x in range(21, 5)]",
        "[int(x * 0.1 * 512) for x in range(0, 999999999)]",
        "[int(x * 0.1 * 512) for x in range(5, 21)] + [1]",
        "print(1)",
        "",
    ],
)
def test_other_expressions_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"form|step|elements"):
        evaluate_size_list(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("6E-05", 6e-5), ("1.0e-4", 1e-4), ("+2e3", 2e3), (".5e1", 5.0), ("1", 1.0), ("0.25", 0.25)],
)
def test_numbers_as_people_write_them(tmp_path: Path, text: str, value: float) -> None:
    rate = get_cfg(write(tmp_path, f"SOLVER:\n  BASE_LR: {text}\n")).SOLVER.BASE_LR
    assert rate == value
    assert isinstance(rate, float)


def test_shipped_recipes_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "configs/ade20k-150/maskformer_R50_bs16_160k.yaml"
    monkeypatch.chdir(tmp_path)
    assert find_config(name) == shipped_configs() / "ade20k-150" / "maskformer_R50_bs16_160k.yaml"
    assert get_cfg(name).MODEL.SEM_SEG_HEAD.NUM_CLASSES == 150
    own = write(tmp_path, "SEED: 9\n", name)
    assert find_config(name) == own.relative_to(tmp_path)


def test_missing_files_name_the_nearest_recipe(tmp_path: Path) -> None:
    refused(Path("configs/ade20k-150/maskformer_R50_bs16_160.yaml"), "maskformer_R50_bs16_160k.yaml")
    refused(tmp_path / "none.yaml", "none.yaml does not exist")
    refused(tmp_path, "does not exist")


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", 1), ("(1, 2)", (1, 2)), ("None", None), ("true", "true"), ("a.b", "a.b"), ("1 +", "1 +"), ("'x'", "x")],
)
def test_decode(text: str, value: object) -> None:
    assert decode(text) == value
