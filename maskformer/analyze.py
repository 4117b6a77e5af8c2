"""The command that tells what a model costs: ``maskformer analyze``, ``tools/analyze_model.py``."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import platform
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from maskformer.errors import UserError
from maskformer.writing import check_writable, write_text

INTERRUPTED = 130  # what shells report for Ctrl-C
TASKS = ("parameters", "flops", "speed", "memory", "structure")
GIGA = 10**9
GIB = 2**30
Answer = dict[str, Any]


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Tell what the model of a config file costs. No data and no weights are needed.",
        epilog="example: %(prog)s --config-file configs/ade20k-150/maskformer_R50_bs16_160k.yaml --tasks flops memory",
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="YAML file, or a shipped configs/... path")
    parser.add_argument(
        "--tasks", nargs="+", default=["parameters", "flops"], metavar="TASK", help=f"some of {', '.join(TASKS)}"
    )
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        metavar=("H", "W"),
        help="of the images; default: what the paper counts at, for memory what the recipe trains at",
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images in a batch; default: 1")
    parser.add_argument("--iterations", type=int, default=10, metavar="N", help="batches timed for speed; default: 10")
    parser.add_argument("--images", type=int, metavar="N", help="instead of --iterations: images timed for speed")
    parser.add_argument("--threads", type=int, metavar="N", help="of the CPU; default: as torch chooses")
    parser.add_argument("--depth", type=int, default=2, metavar="N", help="of the structure; default: 2")
    parser.add_argument("--operators", action="store_true", help="show the multiply-adds of each operator of each part")
    parser.add_argument(
        "--memory-limit",
        type=float,
        metavar="GIB",
        help="what a training step may have; default: 90 %% of what is free",
    )
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")
    parser.add_argument("--debug", action="store_true", help="show where in the code an error was found")
    parser.add_argument(
        "opts", nargs="*", metavar="KEY VALUE", help="config keys to override, such as MODEL.DEVICE cpu"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments after the program's name; None takes those of the process.

    Returns:
        Exit code: 0, 2 after a mistake of the user's, or 130 after Ctrl-C.
    """
    arguments = build_parser().parse_args(argv)
    try:
        file = Path(arguments.json).expanduser() if arguments.json else None
        if file is not None:
            check_writable(file)  # now, not after all the work
        answer = analyze(arguments)
        if file is not None:
            write_text(file, json.dumps(answer, indent=2) + "\n")
    except UserError as error:
        if arguments.debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def split_tasks(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tasks, and the overrides that argparse took for tasks because they follow them: those begin with a capital.

    Raises:
        UserError: for a task that does not exist, or if there is none.
    """
    end = next((i for i, word in enumerate(words) if is_override(word)), len(words))
    for word in words[:end]:
        if word not in TASKS:
            near = difflib.get_close_matches(word.lower(), TASKS, n=1, cutoff=0.5)
            remedy = f"did you mean {near[0]!r}?" if near else f"choose some of {', '.join(TASKS)}"
            raise UserError(f"--tasks has no {word!r}; {remedy}")
    if end == 0:
        raise UserError(f"--tasks names no task before {words[0]!r}; choose some of {', '.join(TASKS)}")
    return [task for task in TASKS if task in words[:end]], list(words[end:])


def is_override(word: str) -> bool:
    """Whether a word begins the overrides: a config key, or what is meant for one rather than for a task."""
    if not word[:1].isupper():
        return False
    if "." in word:
        return True
    from maskformer.config import get_cfg

    keys = {key.lower() for key in get_cfg()}
    near = difflib.get_close_matches(word.lower(), [*keys, *TASKS], n=1)
    return word.lower() in keys or not near or near[0] in keys


def check_numbers(arguments: argparse.Namespace) -> None:
    """Refuse numbers that are not positive, or are none.

    Raises:
        UserError: if there is one.
    """
    for name in ("batch", "iterations", "images", "threads", "depth", "memory_limit"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} is {value:g}, but must be more than 0")
    if arguments.memory_limit is not None and not math.isfinite(arguments.memory_limit * GIB):
        raise UserError(
            f"--memory-limit is {arguments.memory_limit:g}, but must be finite; "
            "leave it out for nine tenths of what is free"
        )
    if arguments.size is not None and min(arguments.size) < 32:
        raise UserError(f"--size is {arguments.size[0]} {arguments.size[1]}, but each side needs at least 32 pixels")


def analyze(arguments: argparse.Namespace) -> Answer:
    """Do the tasks one after the other, each shown when it is done.

    Returns:
        The numbers of all tasks, for JSON.

    Raises:
        UserError: for every mistake in arguments or config.
    """
    tasks, opts = split_tasks(arguments.tasks)
    check_numbers(arguments)
    # Here, so that a mistake in the arguments, and --help, need not wait for PyTorch.
    from maskformer.config import get_cfg

    cfg: Any = get_cfg(arguments.config_file, [*opts, *arguments.opts])
    cfg.MODEL.TIMM.PRETRAINED = False
    import torch

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    answer: Answer = {
        "config": arguments.config_file,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
    steps: dict[str, Callable[[Any, argparse.Namespace], Answer]] = {
        "parameters": _parameters,
        "flops": _flops,
        "speed": _speed,
        "memory": _memory,
        "structure": _structure,
    }
    for task in tasks:
        answer[task] = steps[task](cfg, arguments)
    return answer


def on_meta(cfg: Any) -> Any:
    """The model of a config without values: nothing is computed or kept."""
    import torch

    from maskformer.build import assemble_model

    cfg = cfg.clone()
    cfg.MODEL.BACKBONE.GRADIENT_CHECKPOINTING = False  # trying it out needs values, and evaluation does without
    with torch.device("meta"):
        return assemble_model(cfg)


def _size(cfg: Any, arguments: argparse.Namespace) -> tuple[int, int]:
    from maskformer.analysis import counting_size

    return (arguments.size[0], arguments.size[1]) if arguments.size else counting_size(cfg)


def _parameters(cfg: Any, arguments: argparse.Namespace) -> Answer:
    from maskformer.analysis import count_parts

    counts = count_parts(on_meta(cfg).network)
    rows = [[part, *(f"{number:,}" for number in (c.parameters, *c))] for part, c in counts.items()]
    _table("Parameters", ["part", "parameters", "trained", "frozen", "buffers"], rows)
    return {part: {"parameters": count.parameters, **count._asdict()} for part, count in counts.items()}


def _flops(cfg: Any, arguments: argparse.Namespace) -> Answer:
    from maskformer.analysis import count_flops

    counts = count_flops(on_meta(cfg), _size(cfg, arguments), arguments.batch)
    height, width = counts.size
    rows = []
    for part, operators in counts.parts.items():
        rows.append([part, "", f"{sum(operators.values()) / GIGA:.2f}"])
        if arguments.operators:
            rows += [["", operator, f"{count / GIGA:.3f}"] for operator, count in operators.items()]
    rows.append(["total", "", f"{counts.total / GIGA:.2f}"])
    if arguments.operators:
        rows += [["", operator, f"{count / GIGA:.3f}"] for operator, count in counts.by_operator().items()]
    images = "1 image" if counts.batch == 1 else f"{counts.batch} images"
    _table(f"Multiply-adds of {images} of {width}x{height} in 10^9", ["part", "operator", "multiply-adds"], rows)
    return {"size": list(counts.size), "batch": counts.batch, "total": counts.total, "parts": counts.parts}


def _speed(cfg: Any, arguments: argparse.Namespace) -> Answer:
    import torch

    from maskformer.analysis import measure_speed
    from maskformer.build import build_model

    model = build_model(cfg)
    size = _size(cfg, arguments)
    iterations = -(-arguments.images // arguments.batch) if arguments.images else arguments.iterations
    speed = measure_speed(model, size, batch=arguments.batch, iterations=iterations)
    where = describe_device(model.device)
    rows = [
        ["network", f"{speed.network * 1000:.1f}", f"{speed.network_images_per_second:.2f}"],
        ["end to end", f"{speed.end_to_end * 1000:.1f}", f"{speed.images_per_second:.2f}"],
    ]
    title = f"Speed at {size[1]}x{size[0]}, batch {speed.batch}, median of {iterations}, {where}"
    _table(title, ["", "ms a batch", "images/s"], rows)
    settings = {"size": list(size), "iterations": iterations, "device": where, "threads": torch.get_num_threads()}
    return {**settings, **speed._asdict(), "images_per_second": speed.images_per_second}


def _memory(cfg: Any, arguments: argparse.Namespace) -> Answer:
    import torch

    from maskformer.analysis import measure_training_memory, training_size

    size = (arguments.size[0], arguments.size[1]) if arguments.size else training_size(cfg)
    limit = None if arguments.memory_limit is None else int(arguments.memory_limit * GIB)
    threads = torch.get_num_threads()
    memory = measure_training_memory(cfg, size, batch=arguments.batch, limit=limit, threads=threads)
    what = "resident memory" if memory.device == "cpu" else "allocated memory"
    rows = [[memory.device, what, f"{memory.peak / GIB:.2f}", f"{memory.seconds:.1f}"]]
    title = f"Peak of a training step at {size[1]}x{size[0]}, batch {memory.batch}"
    _table(title, ["device", "what", "GiB", "seconds"], rows)
    return {**memory._asdict(), "size": list(size), "threads": threads}


def _structure(cfg: Any, arguments: argparse.Namespace) -> Answer:
    from maskformer.analysis import module_costs

    size = _size(cfg, arguments)
    costs = module_costs(on_meta(cfg), size, arguments.depth)
    rows = []
    for cost in costs:
        level = len(cost.name.split(".")) if cost.name else 0
        label = "  " * level + (cost.name.rpartition(".")[2] or "network")
        rows.append([label, cost.kind, f"{cost.parameters:,}", f"{cost.multiply_adds / GIGA:.3f}"])
    title = f"Structure, multiply-adds at {size[1]}x{size[0]} in 10^9"
    _table(title, ["module", "class", "parameters", "multiply-adds"], rows)
    return {"size": list(size), "modules": [cost._asdict() for cost in costs]}


def describe_device(device: Any) -> str:
    """Such as ``CPU with 2 threads, float32`` or a GPU's name."""
    import torch

    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, float32"
    threads = torch.get_num_threads()
    return f"{device.type.upper()} with {threads} {'thread' if threads == 1 else 'threads'}, float32"


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on the console: words to the left, numbers to the right."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(title, style="bold", soft_wrap=True, highlight=False)
    table = Table()
    for column, name in enumerate(header):
        numbers = all(not row[column] or row[column][0].isdigit() for row in rows) and any(row[column] for row in rows)
        table.add_column(name, justify="right" if numbers else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
