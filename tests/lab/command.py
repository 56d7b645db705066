"""What the commands of the lab share: how they start, end and read finished runs."""

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean

import torch

from data import DataError
from emprl import command_line, in_one_line, to_json


class Parser(argparse.ArgumentParser):
    """Its description is the script's docstring; a wrong option is one line."""

    def __init__(self, description):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def error(self, message):
        raise DataError(f"{message}; see --help")

    def can_write(self):
        self.add_argument(
            "--write", type=new_file, metavar="FILE", help="also write the figures, as JSON"
        )


def new_file(path):
    """Its folder must be there before anything is measured for hours."""
    path = Path(path)
    if not path.resolve().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path.parent}: no such folder; make it first")
    return path


def start(main):
    """Run a command. Returns its exit code: 0, 2 bad input (one line), 130 Ctrl-C."""
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from there", file=sys.stderr)
        return 130
    except Exception as error:
        message = in_one_line(error)
        if not message:
            raise
        print(message, file=sys.stderr)
        return 2
    return 0


def read_metrics(folder):
    """metrics.json of a finished run."""
    path = Path(folder) / "metrics.json"
    if not path.exists():
        command = command_line(["python", "emprl.py", "--run", str(folder)])
        raise DataError(f"{folder}: no finished run there; make one with `{command}`")
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        metrics["made_of"], metrics["config"]["preset"], metrics["config"]["seed"]
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{path}: damaged; delete it and finish the run again") from None
    return metrics


def read_runs(folders):
    """{folder: metrics} of finished runs of one preset and of different seeds, by seed."""
    runs = {Path(folder): read_metrics(folder) for folder in folders}
    presets = {metrics["config"]["preset"] for metrics in runs.values()}
    seeds = {metrics["config"]["seed"] for metrics in runs.values()}
    if len(presets) > 1 or len(seeds) < len(folders):
        raise DataError("the runs must be of one preset and of different seeds; give others")
    return dict(sorted(runs.items(), key=lambda item: item[1]["config"]["seed"]))


def read_replies(path):
    """The records of a responses.jsonl, a context each. Raises DataError."""
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            record = json.loads(line)
            record["id"], record["context"], record["human"], record["replies"]
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{path}:{number}: damaged; repair or remove this line") from None
        records.append(record)
    return records


def write_json(path, content):
    """Nothing is written without --write."""
    if path:
        path.write_text(to_json(content, indent=1) + "\n", encoding="utf-8")


def peak_memory(device):
    """Bytes held at most so far: by torch on a GPU; by this process on a CPU (Linux)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def means(rows):
    """[{column: number}] -> the mean of each column."""
    columns = zip(*(row.values() for row in rows))
    return dict(zip(rows[0], map(fmean, columns)))


def sheet(rows):
    """{row: {column: number or text}} -> Markdown; rows may have different columns."""
    columns = {}
    for row in rows.values():
        columns |= row
    lines = [["", *columns], ["---"] + ["---:"] * len(columns)]
    for name, row in rows.items():
        lines.append([name, *(figure(row.get(column, "")) for column in columns)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def figure(x):
    """Three decimals; none of what is large."""
    if isinstance(x, str):
        return x
    return f"{x:.3f}" if abs(x) < 100 else f"{x:,.0f}"
