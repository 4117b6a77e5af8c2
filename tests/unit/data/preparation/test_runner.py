"""What all preparations share: going on after a kill, parallel work, whole files, failures told in one sentence."""

from __future__ import annotations

import errno
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maskformer.data.preparation import ade20k, cityscapes, files, runner
from maskformer.errors import UserError
from tests.miniatures import write_miniature

ROOT = Path(__file__).parents[4]


@dataclass(frozen=True)
class Doubles:
    """Text files with twice the number in their name; fails where `bad` says so."""

    folder: Path
    bad: tuple[int, ...] = ()
    dies: tuple[int, ...] = ()
    breaks: tuple[int, ...] = ()

    def finished(self, item: int) -> int | None:
        path = self.folder / f"{item}.txt"
        return int(path.read_text()) if path.is_file() else None

    def make(self, item: int) -> int:
        if item in self.dies:
            os.kill(os.getpid(), signal.SIGKILL)
        if item in self.breaks:
            raise MemoryError("Unable to allocate 8.00 EiB")
        if item in self.bad:
            raise UserError(f"number {item} is bad")
        (self.folder / f"{item}.txt").write_text(str(2 * item))
        return 2 * item


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_there_is_kept(workers: int, tmp_path: Path) -> None:
    (tmp_path / "3.txt").write_text("333")
    outcome = runner.run(Doubles(tmp_path), range(6), what="numbers", workers=workers)
    assert (outcome.results, outcome.made, outcome.kept) == ([0, 2, 4, 333, 8, 10], 5, 1)
    outcome = runner.run(Doubles(tmp_path), range(6), what="numbers", workers=workers, overwrite=True)
    assert (outcome.results, outcome.made, outcome.kept) == ([0, 2, 4, 6, 8, 10], 6, 0)


@pytest.mark.parametrize("workers", [1, 2])
def test_others_are_made_though_some_fail(workers: int, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        runner.run(Doubles(tmp_path, bad=(2, 4)), range(6), what="numbers", workers=workers)
    assert str(error.value) == (
        "number 2 is bad (and 1 more); 4 numbers are finished, and running the same command again makes the others"
    )
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["0", "1", "3", "5"]


def test_too_many_failures_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"number 0 is bad \(and 9 more\)"):
        runner.run(Doubles(tmp_path, bad=tuple(range(30))), range(40), what="numbers", workers=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_that_nobody_thought_of_name_the_picture(workers: int, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        runner.run(Doubles(tmp_path, breaks=(3,)), range(6), what="numbers", workers=workers)
    assert str(error.value) == (
        "what '3' belongs to cannot be made (MemoryError: Unable to allocate 8.00 EiB): unpack it again, or report "
        "this; 5 numbers are finished, and running the same command again makes the others"
    )
    assert "in make" in str(error.value.__cause__)  # the traceback, which --debug shows
    assert len(list(tmp_path.iterdir())) == 5


def test_a_worker_that_is_ended_from_outside(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"probably because memory ran out: .* fewer --workers"):
        runner.run(Doubles(tmp_path, dies=(3,)), range(6), what="numbers", workers=2)


SLOW = """
import os, pathlib, signal, sys, time
from maskformer.data.preparation import command, runner

# Ctrl-C as in a terminal: what a script starts in the background ignores it, and so do the tests then.
signal.signal(signal.SIGINT, signal.default_int_handler)

class Sleeps:
    def finished(self, item):
        return None

    def make(self, item):
        (folder / f"{os.getpid()}.worker").touch()
        time.sleep(0.02)
        return item

folder = pathlib.Path(sys.argv[1])
work = lambda arguments: runner.run(Sleeps(), range(100_000), what="numbers", workers=2)
sys.exit(command.run_command(command.build_parser("", ["val"]), work, []))
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize(("sent", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGKILL", -9)])
def test_workers_end_with_the_command(sent: str, code: int, tmp_path: Path) -> None:
    words = [sys.executable, "-c", SLOW, str(tmp_path)]
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, start_new_session=True, text=True)
    try:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("*.worker"))) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(getattr(signal, sent))
        _, said = process.communicate(timeout=30)  # ends when the last of the processes has closed its output
        assert process.returncode == code
        assert "Traceback" not in said
        if sent != "SIGKILL":
            assert "the same command goes on from here" in said
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_the_end_is_counted(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level("INFO")
    outcome = runner.run(Doubles(tmp_path), range(3), what="numbers", workers=1)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    leftover = tmp_path / f".1.txt.{ended.pid}.tmp"
    # What a run beside this one is about to finish, and what is none of ours.
    others = [tmp_path / f".{name}.tmp" for name in (f"1.txt.{os.getpid()}", f"9.txt.{ended.pid}", "1.txt.x", "note")]
    for path in (leftover, *others):
        path.touch()
    targets = [tmp_path / f"{i}.txt" for i in range(3)]
    runner.verify("toy", targets, outcome, official=3, kind="numbers")
    assert caplog.messages == [f"toy: 3 numbers in {tmp_path} (3 made, 0 kept)"]
    assert not leftover.exists()
    assert all(path.exists() for path in others)
    caplog.clear()
    runner.verify("toy", targets, outcome, official=4, kind="numbers")
    assert caplog.messages[1] == "toy: the complete data set has 4 numbers, not 3"
    targets[1].unlink()
    targets[1].symlink_to("nowhere")  # its name is there, but no file
    with pytest.raises(UserError, match=r"1 numbers of toy have gone again, such as '.*1.txt'"):
        runner.verify("toy", targets, outcome, official=3, kind="numbers")


# ------------------------------------------------------------------ a real command
def make_ade20k(root: Path, count: int, save: Callable[..., Path]) -> Path:
    own = root / "ADEChallengeData2016"
    for i in range(count):
        save(np.full((20, 30, 3), i), own / "images" / "validation" / f"ADE_val_{i:08d}.jpg")
        save(np.full((20, 30), i + 1), own / "annotations" / "validation" / f"ADE_val_{i:08d}.png")
    return own


# The command, but that it never gets beyond the sixth picture.
HANGS = """
import sys, time
from maskformer.data.preparation import ade20k
read = ade20k.read_raw
ade20k.read_raw = lambda image, path: time.sleep(600) if path.stem.endswith("5") else read(image, path)
sys.exit(ade20k.main(["--splits", "val", "--workers", "1"]))
"""


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, save: Callable[..., Path], caplog: Any) -> None:
    own = make_ade20k(tmp_path, 8, save)
    environment = os.environ | {"DETECTRON2_DATASETS": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", HANGS], env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)
    target = own / "annotations_detectron2" / "validation"
    deadline = time.monotonic() + 120
    while not (target / "ADE_val_00000004.png").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert sorted(path.name for path in target.iterdir()) == [f"ADE_val_{i:08d}.png" for i in range(5)]
    # What a power failure can leave besides, whatever the order of writing and renaming was.
    (target / "ADE_val_00000001.png").write_bytes(b"")
    (target / "ADE_val_00000002.png").write_bytes((target / "ADE_val_00000002.png").read_bytes()[:-8])
    (target / f".ADE_val_00000006.png.{process.pid}.tmp").write_bytes(b"half")
    times = {path.name: path.stat().st_mtime_ns for path in target.iterdir()}
    caplog.set_level("INFO")
    ade20k.prepare(tmp_path, ["val"], workers=1)
    assert "8 label maps" in caplog.text
    assert "(5 made, 3 kept)" in caplog.text
    assert sorted(path.name for path in target.iterdir()) == [f"ADE_val_{i:08d}.png" for i in range(8)]
    for i in range(8):
        path = target / f"ADE_val_{i:08d}.png"
        assert np.unique(np.asarray(Image.open(path))).tolist() == [i]
        assert (path.stat().st_mtime_ns == times.get(path.name)) is (i in (0, 3, 4))


def test_the_command_works_in_parallel_and_names_what_is_wrong(
    tmp_path: Path, save: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    own = make_ade20k(tmp_path, 6, save)
    damaged = own / "annotations" / "validation" / "ADE_val_00000002.png"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-30])
    words = ["--root", str(tmp_path), "--splits", "val", "--workers", "2"]
    assert ade20k.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: annotation {str(damaged)!r} cannot be read (")
    assert line.endswith(
        "5 label maps of ade20k_sem_seg_val are finished, and running the same command again makes the others"
    )
    damaged.write_bytes(content)
    assert ade20k.main(words) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert "6 label maps in " in said.out
    assert "(1 made, 5 kept)" in said.out
    assert "the complete data set has 2000 label maps, not 6" in said.out


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "datasets").glob("prepare_*.py")))
def test_every_script_says_what_is_missing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [name])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "datasets" / name), run_name="__main__")
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    for part in ("error: folder", str(tmp_path), "does not exist: ", "$DETECTRON2_DATASETS", "http"):
        assert part in line, line


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cityscapes.main(["--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    for part in ("--root", "$DETECTRON2_DATASETS", "--splits", "--workers", "--overwrite", "goes on where it was"):
        assert part in said


@pytest.mark.parametrize("number", ["0", "-1", "two", "1.5"])
def test_numbers_of_workers_that_are_none(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cityscapes.main(["--workers", number])
    assert stopped.value.code == 2
    assert f"--workers: '{number}' is no number of processes: give 1 or more" in capsys.readouterr().err


def test_ctrl_c_is_no_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cityscapes, "prepare", interrupted)
    assert cityscapes.main([]) == 130
    assert "the same command goes on from here" in capsys.readouterr().err


# ------------------------------------------------------------------ files
def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_miniature("cityscapes", tmp_path, train=1, val=1)

    def full(self: Any, file: Any, *arguments: Any, **options: Any) -> None:
        file.write(b"\x89PNG, but only its beginning")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        with pytest.raises(UserError, match=r"_labelTrainIds.png cannot be written \(No space left on device\)"):
            cityscapes.prepare(tmp_path, ["train"], workers=1)
    left = [path.name for path in (tmp_path / "cityscapes" / "gtFine" / "train").rglob("*") if path.is_file()]
    assert [name for name in left if "labelIds" not in name] == []
    cityscapes.prepare(tmp_path, ["train"], workers=1)


def test_a_copy_takes_no_space_and_needs_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "a.jpg", tmp_path / "new" / "b.jpg"
    source.write_bytes(b"content")
    assert not files.is_copy(source, target)
    files.copy_file(source, target)
    assert target.samefile(source)
    files.copy_file(source, target)  # again, over itself
    assert [path.name for path in target.parent.iterdir()] == ["b.jpg"]

    def unsupported(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", unsupported)
    files.copy_file(source, tmp_path / "c.jpg")
    assert files.is_copy(source, tmp_path / "c.jpg")
    assert not (tmp_path / "c.jpg").samefile(source)
    with pytest.raises(UserError, match=r"'.*none.jpg' does not exist"):
        files.copy_file(tmp_path / "none.jpg", target)


def test_a_copy_of_a_relative_link_is_the_file_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.jpg").write_bytes(b"content")
    source, target = tmp_path / "images" / "a.jpg", tmp_path / "deep" / "new" / "a.jpg"
    source.parent.mkdir()
    source.symlink_to("../elsewhere/a.jpg")
    files.copy_file(source, target)
    assert not target.is_symlink()
    assert target.read_bytes() == b"content"
    assert files.is_copy(source, target)


def test_16_bits_survive(tmp_path: Path) -> None:
    values = np.array([[0, 846, 65535], [1, 256, 40000]], np.uint16)
    files.write_label_map(values, tmp_path / "a.tif")
    with Image.open(tmp_path / "a.tif") as image:
        assert image.mode == "I;16"
        assert np.array_equal(np.asarray(image), values)
    path = tmp_path / "a.tif"
    assert files.is_whole(path, (2, 3), "I;16")
    assert files.holds(path, values)
    assert not files.is_whole(path, (3, 2), "I;16")
    assert not files.is_whole(path, (2, 3), "L")
    assert not files.holds(path, values.T)
    assert not files.holds(path, values.astype(np.uint8))
    assert not files.holds(path, values + np.uint16(1))
    path.write_bytes(path.read_bytes()[:-200])
    assert not files.is_whole(path, (2, 3), "I;16")
    assert not files.holds(path, values)
