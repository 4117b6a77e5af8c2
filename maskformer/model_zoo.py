"""MODEL_ZOO.md: published results and weights, and what we measured of each recipe (``tools/make_model_zoo.py``)."""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from maskformer.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
PAGE = Path("MODEL_ZOO.md")
MEASUREMENTS = Path("docs/measurements.json")
COMMAND = "python tools/make_model_zoo.py --measure --threads {threads}"
METRICS = {"mIoU": "mIoU", "PQ_st": "PQ^St", "PQ": "PQ"}
GIGA, MEGA, GIB = 10**9, 10**6, 2**30

HEAD = """# Model zoo

<!-- Made by tools/make_model_zoo.py from maskformer/data/metadata/ and docs/measurements.json: change those. -->

**Licences.** The weights linked here are the original authors', under **CC BY-NC 4.0: not for commercial use**. They
are no part of this project, whose own code is under Apache 2.0; the commands download them from the authors' server.

**What is whose.** Scores, the schedules and *memory, published* are those the authors published with the weights; the
ablations are the paper's. **None of these scores has been measured again here**: no published weights were evaluated,
and none of these recipes was trained to its end. *Parameters*, *G multiply-adds* and *memory, ours* are measured, of
random weights on random images, and kept in `docs/measurements.json`; `docs/analysis.md` says how.

* *Parameters* in millions. Buffers, such as frozen batch norm, are none.
* *G multiply-adds*: 10^9 of one image at the size that stands there, network and semantic inference.
* *Memory, published*: MB of a GPU in the authors' training.
* *Memory, ours*: GiB at the peak of a training step of **one** image at the size that stands there, in float32 on the
  CPU ({machine}): weights, gradients, optimizer state and activations. Not to be compared
  with the column beside it, which is of a GPU with its own share of the batch. -: not measured.

Paths are found from any folder, also where only the package is installed. `--num-gpus` is how many GPUs the
machine has: the batch is the recipe's in any case. Data sets are laid out and prepared as `datasets/README.md` says.
"""


def load(name: str) -> dict[str, Any]:
    """One of the tables that come with the package."""
    table: dict[str, Any] = json.loads((files("maskformer") / "data" / "metadata" / name).read_text(encoding="utf-8"))
    return table


# ------------------------------------------------------------------ the page
def render(zoo: Mapping[str, Any], ablations: Mapping[str, Any], measured: Mapping[str, Any]) -> str:
    """The page in Markdown.

    Args:
        zoo: ``model_zoo.json``.
        ablations: ``ablations.json``.
        measured: ``docs/measurements.json``.

    Raises:
        UserError: if a recipe has not been measured.
    """
    from maskformer.evaluation.report import format_table

    blocks = [HEAD.format(machine=measured["machine"]["description"])]
    for section, models in sections(zoo).items():
        metrics = [name for name in ("mIoU", "mIoU (ms+flip)", "PQ") if any(name in model for model in models)]
        header = ["model", "backbone", "schedule", *metrics, "parameters", "G multiply-adds"]
        header += ["memory, published", "memory, ours", "recipe", "weights"]
        rows = [model_row(model, metrics, measured["recipes"]) for model in models]
        commands = "\n\n".join(model_commands(model) for model in models)
        blocks.append(f"## {section}\n\n{format_table(header, rows)}\n\n```bash\n{commands}\n```\n")
    blocks.append(
        "## Ablations\n\nNumbers of the paper; - where it gives none. PQ^St: panoptic quality of semantic results.\n"
    )
    for table, entries in grouped(ablations["ablations"], "table").items():
        columns = {n: title for n, title in METRICS.items() if any(n in entry for entry in entries)}
        rows = [[e["what"], *(_number(e.get(name)) for name in columns), f"`{e['config']}`"] for e in entries]
        blocks.append(f"### {table}\n\n{format_table(['', *columns.values(), 'config'], rows)}\n")
    example = next(entry["config"] for entry in ablations["ablations"] if "/ablations/" in entry["config"])
    blocks.append(f"```bash\nmaskformer train --config-file {example} --num-gpus 8\n```\n")
    return "\n".join(blocks)


def sections(zoo: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Section → its models, in the order of the table."""
    return grouped(zoo["models"], "section")


def grouped(entries: Sequence[dict[str, Any]], key: str) -> dict[str, list[dict[str, Any]]]:
    """Value of `key` → the entries that have it, in their order."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in entries:
        groups.setdefault(entry[key], []).append(entry)
    return groups


def model_row(model: Mapping[str, Any], metrics: Sequence[str], measured: Mapping[str, Any]) -> list[str]:
    """Cells of one recipe."""
    config = model["config"]
    if config not in measured:
        raise UserError(f"{MEASUREMENTS} has no {config}: run python tools/make_model_zoo.py --measure")
    costs = measured[config]
    height, width = costs["flops"]["size"]
    flops = f"{costs['flops']['total'] / GIGA:.1f} ({width}x{height})"
    return [
        model["name"],
        model["Backbone"],
        model["lr sched"],
        *(_number(model.get(metric)) for metric in metrics),
        f"{costs['parameters'] / MEGA:.1f}",
        flops,
        model["train mem (MB)"],
        memory_cell(costs.get("memory")),
        f"`{config}`",
        f"[{model['model id']}]({model['weights_url']})",
    ]


def memory_cell(memory: Mapping[str, Any] | None) -> str:
    """Such as ``1.2 (512x512)``, or what it did not fit into; "-" where it was not measured."""
    if memory is None:
        return "-"
    height, width = memory["size"]
    if "peak" not in memory:
        return f"more than {memory['limit'] / GIB:.0f} ({width}x{height})"
    return f"{memory['peak'] / GIB:.1f} ({width}x{height})"


def model_commands(model: Mapping[str, Any]) -> str:
    """Shell lines that evaluate the published weights and train the recipe."""
    config = f"--config-file {model['config']}"
    evaluate = f"maskformer eval {config} MODEL.WEIGHTS {model['weights_url']}"
    lines = [f"# {model['name']}, {model['Backbone']}", evaluate]
    if "mIoU" in model:
        lines.append(f"{evaluate} TEST.AUG.ENABLED True")
    return "\n".join([*lines, f"maskformer train {config} --num-gpus 8"])


def _number(value: Any) -> str:
    return "-" if value is None else str(value)


# ------------------------------------------------------------------ measuring
def measure_counts(config: str) -> dict[str, Any]:
    """Parameters and multiply-adds of one recipe."""
    from maskformer.analysis import count_flops, count_parts, counting_size
    from maskformer.analyze import on_meta
    from maskformer.config import get_cfg

    cfg = get_cfg(config)
    model = on_meta(cfg)
    counts = count_flops(model, counting_size(cfg))
    return {
        "parameters": count_parts(model.network)["total"].parameters,
        "flops": {"size": list(counts.size), "total": counts.total, "parts": counts.by_part()},
    }


def measure_memory(config: str, limit: int, threads: int) -> dict[str, Any]:
    """The peak of a training step of one recipe on the CPU, or the limit that it did not fit into.

    Args:
        config: path of the recipe.
        limit: bytes that the step may have.
        threads: of torch.
    """
    from maskformer.analysis import measure_training_memory, training_size
    from maskformer.config import get_cfg

    cfg = get_cfg(config, ["MODEL.DEVICE", "cpu"])
    size = training_size(cfg)
    memory: dict[str, Any] = {"size": list(size), "batch": 1, "device": "cpu", "dtype": "float32"}
    try:
        memory["peak"] = measure_training_memory(cfg, size, batch=1, limit=limit, threads=threads).peak
    except UserError:
        memory["limit"] = limit
    return memory


def measure_missing(path: Path, configs: Sequence[str], limit: float, threads: int) -> Iterator[str]:
    """Measure what the file has not got yet, small recipes first; it is written after each of them.

    Parameters and multiply-adds take a moment and are always counted anew.

    Args:
        path: ``docs/measurements.json``; measurements of another machine or torch are dropped.
        configs: paths of recipes.
        limit: GiB that a training step may have.
        threads: of torch.

    Yields:
        A line for each recipe whose memory was measured.
    """
    from maskformer.writing import write_text

    machine = describe_machine(threads)
    table: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    known = table["recipes"] if table.get("machine") == machine else {}
    recipes = {config: {**known.get(config, {}), **measure_counts(config)} for config in configs}
    table = {"command": COMMAND.format(threads=threads), "machine": machine, "recipes": recipes}
    missing = [config for config in configs if "memory" not in recipes[config]]
    for config in sorted(missing, key=lambda config: recipes[config]["flops"]["total"]):
        recipes[config]["memory"] = measure_memory(config, int(limit * GIB), threads)
        write_text(path, json.dumps(table, indent=1) + "\n")
        yield f"{config}: memory {memory_cell(recipes[config].get('memory'))}"
    write_text(path, json.dumps(table, indent=1) + "\n")


def describe_machine(threads: int) -> dict[str, Any]:
    """Where the numbers were measured."""
    import torch

    system, torch_version = f"{platform.system()} {platform.machine()}", torch.__version__
    words = f"{threads} {'thread' if threads == 1 else 'threads'}, {system}, torch {torch_version}"
    return {"description": words, "threads": threads, "torch": torch_version, "python": platform.python_version()}


# ------------------------------------------------------------------ the command
def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write MODEL_ZOO.md from the published table and our measurements.")
    parser.add_argument("--measure", action="store_true", help=f"first measure what {MEASUREMENTS} lacks; takes long")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of the CPU; default: 1")
    parser.add_argument(
        "--memory-limit", type=float, default=math.inf, metavar="GIB", help="default: nine tenths of what is free"
    )
    return parser


def check_numbers(arguments: argparse.Namespace) -> None:
    """Refuse numbers that are not positive; NaN is none.

    Raises:
        UserError: naming the argument.
    """
    for name in ("threads", "memory_limit"):
        value = getattr(arguments, name)
        if not value > 0:
            raise UserError(f"--{name.replace('_', '-')} is {value:g}, but must be more than 0")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page; exit code 2 after a mistake of the user's."""
    arguments = build_parser().parse_args(argv)
    zoo = load("model_zoo.json")
    try:
        if arguments.measure:
            from maskformer.analysis.memory import available_memory

            check_numbers(arguments)
            limit = min(arguments.memory_limit, 0.9 * available_memory() / GIB)
            configs = [model["config"] for model in zoo["models"]]
            for line in measure_missing(ROOT / MEASUREMENTS, configs, limit, arguments.threads):
                print(line, flush=True)  # noqa: T201
        write_page(zoo)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


def write_page(zoo: Mapping[str, Any]) -> None:
    """Write ``MODEL_ZOO.md`` of this checkout.

    Raises:
        UserError: if there are no measurements.
    """
    from maskformer.writing import write_text

    if not (ROOT / MEASUREMENTS).is_file():
        raise UserError(f"{ROOT / MEASUREMENTS} is missing: run python tools/make_model_zoo.py --measure in a checkout")
    measured = json.loads((ROOT / MEASUREMENTS).read_text(encoding="utf-8"))
    write_text(ROOT / PAGE, render(zoo, load("ablations.json"), measured))


if __name__ == "__main__":
    sys.exit(main())
