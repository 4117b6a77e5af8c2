"""The stop watch, by a clock that moves only when told to."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from maskformer import timing
from maskformer.timing import StopWatch, section


class Clock:
    now = 0.0

    def wait(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


@pytest.fixture
def watch() -> StopWatch:
    return StopWatch(torch.device("cpu"))


def test_sections_are_added_up_and_time_between_them_is_nobodys(clock: Clock, watch: StopWatch) -> None:
    with watch.measuring():
        for seconds in (1.0, 2.0):
            with section("forward"):
                clock.wait(seconds)
            clock.wait(100.0)
            with section("backward"):
                clock.wait(8.0)
    assert watch.read() == {"forward": 3.0, "backward": 16.0}
    assert watch.read() == {}


def test_a_section_inside_another_interrupts_it(clock: Clock, watch: StopWatch) -> None:
    with watch.measuring(), section("forward"):
        clock.wait(1.0)
        with section("matching"):
            clock.wait(2.0)
            with section("costs"):
                clock.wait(4.0)
            clock.wait(8.0)
        clock.wait(16.0)
        with section("forward"):
            clock.wait(32.0)
    assert watch.read() == {"forward": 49.0, "matching": 10.0, "costs": 4.0}


def test_nothing_is_measured_when_nobody_listens(clock: Clock, watch: StopWatch) -> None:
    def work() -> None:
        with section("forward"):
            clock.wait(1.0)

    work()
    with watch.measuring():
        pass
    work()
    assert watch.read() == {}


def test_an_exception_closes_its_sections(clock: Clock, watch: StopWatch) -> None:
    def fail() -> None:
        with watch.measuring(), section("forward"), section("matching"):
            clock.wait(1.0)
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        fail()
    clock.wait(100.0)
    with watch.measuring(), section("backward"):
        clock.wait(2.0)
    assert watch.read() == {"matching": 1.0, "forward": 0.0, "backward": 2.0}
    with section("forward"):
        clock.wait(1.0)
    assert watch.read() == {}


def test_the_inner_of_two_watches_listens(clock: Clock, watch: StopWatch) -> None:
    inner = StopWatch(torch.device("cpu"))
    with watch.measuring(), section("forward"):
        clock.wait(1.0)
        with inner.measuring(), section("evaluation"):
            clock.wait(2.0)
        clock.wait(4.0)
    assert watch.read() == {"forward": 7.0}
    assert inner.read() == {"evaluation": 2.0}


def test_a_section_under_way_is_read_up_to_now(clock: Clock, watch: StopWatch) -> None:
    with watch.measuring(), section("forward"):
        clock.wait(1.0)
        with section("matching"):
            clock.wait(2.0)
            assert watch.read() == {"forward": 1.0, "matching": 2.0}
            clock.wait(4.0)
        clock.wait(8.0)
    assert watch.read() == {"matching": 4.0, "forward": 8.0}


def test_the_watch_that_a_section_entered_is_the_one_it_leaves(clock: Clock, watch: StopWatch) -> None:
    with watch.measuring():
        forward = section("forward")
        forward.__enter__()
    clock.wait(1.0)
    forward.__exit__(None, None, None)
    assert watch.read() == {"forward": 1.0}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_device_measures_on_cuda() -> None:
    watch = StopWatch(torch.device("cuda"))
    with watch.measuring():
        for _ in range(2):
            with section("forward"):
                torch.cuda._sleep(10_000_000)
                with section("matching"):
                    torch.cuda._sleep(20_000_000)
    seconds = watch.read()
    assert 1.5 < seconds["matching"] / seconds["forward"] < 2.5
