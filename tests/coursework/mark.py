"""Grade a folder of submissions: python -m tests.coursework.mark FOLDER MARKS.csv

A submission is a file FOLDER/NAME.py, or a folder FOLDER/NAME with one .py file in it. Each is
graded by grade.py in a copy of the project, in processes of their own that have a time limit, no
more memory than --memory, and nothing of your environment. MARKS.csv gets a line for each: points
by unit, and in a note what a student should hear. --results keeps each results.json.

On Linux memory, processor time and the size of files are limited; on macOS processor time and
files; on Windows only the time is. A student's file is read before it runs, and what reaches for
files or the network is refused; for files of strangers take a container as well.
"""

import csv
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from tests.coursework.command import make_parser
from tests.coursework.plant import FILES, ROOT
from tests.coursework.units import UNITS, all_graded

try:
    import resource
except ImportError:  # Windows has no limits of this kind
    resource = None

LIMIT = 20  # seconds for each function
START = 120  # seconds more for all that is not a function: imports on a busy machine
MEMORY = 4096  # MiB
LARGEST = 10**6  # bytes of a submission
WRITTEN = 50 * 2**20  # bytes of any file that it may write


@dataclass
class Mark:
    """What became of a submission."""

    name: str
    points: int = 0
    units: list = field(default_factory=lambda: [0] * len(UNITS))
    not_written: list = field(default_factory=list)
    same_as_project: list = field(default_factory=list)
    note: str = ""

    def row(self):
        cells = [self.name, self.points, *self.units]
        cells += [" ".join(self.not_written), " ".join(self.same_as_project), self.note]
        return [as_text(cell) for cell in cells]


def header():
    units = [f"unit {unit.number} of {unit.points}" for unit in UNITS]
    most = sum(unit.points for unit in UNITS)
    return ["name", f"points of {most}", *units, "not written", "the project's code", "note"]


def as_text(cell):
    """No text that a spreadsheet would take for a formula, on one line."""
    if not isinstance(cell, str):
        return cell
    cell = " ".join(cell.split())
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@")) else cell


# ---- submissions


def submissions(folder):
    """[(name, its file or None, why there is none)], in the order of their names."""
    found = []
    for path in sorted(Path(folder).iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir() and not path.is_symlink():
            files = sorted(path.glob("*.py"))
            problem = "" if len(files) == 1 else f"{len(files)} .py files; one is wanted"
            file = files[0] if files else path
            found.append((path.name, file, problem or problem_with(file)))
        else:
            found.append((path.stem, path, problem_with(path)))
    return found


def problem_with(path):
    """Why a file is not graded; "": it is."""
    if path.suffix != ".py":
        return f"{path.name}: not a .py file"
    if path.is_symlink() or not path.is_file():
        return f"{path.name}: a link or no plain file"
    if path.stat().st_size > LARGEST:
        return f"{path.name}: larger than {LARGEST / 1e6:g} MB"
    return ""


# ---- one of them


def project_copy(folder):
    """The project in a folder that a submission may spoil."""
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    without = shutil.ignore_patterns("__pycache__", "results", "lab")
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=without)
    return folder


def environment(home):
    """What a process needs, and nothing of yours: no keys, no paths."""
    kept = ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "LANG")
    found = {name: os.environ[name] for name in kept if name in os.environ}
    places = dict.fromkeys(("HOME", "USERPROFILE", "TMPDIR", "TEMP", "TMP"), str(home))
    return {**found, **places, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def limits(memory, seconds):
    """Called in the new process, before anything else; processes that it starts inherit them."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_FSIZE, (WRITTEN, WRITTEN))
    if sys.platform == "linux":  # what is in use, not what is only reserved
        resource.setrlimit(resource.RLIMIT_DATA, (memory * 2**20, memory * 2**20))


def run_limited(words, folder, home, memory, seconds):
    """(exit code, the last line on stderr); the code is None if it took longer."""
    options = {}
    if resource is not None:
        options["preexec_fn"] = functools.partial(limits, memory, seconds)
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=folder,
        env=environment(home),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        **options,
    )
    try:
        _, errors = process.communicate(timeout=seconds)
        code = process.returncode
    except subprocess.TimeoutExpired:
        code, errors = None, ""
    finally:
        end(process)
    lines = errors.strip().splitlines()
    return code, lines[-1] if lines else ""


def end(process):
    """A process and all that it has started."""
    if resource is not None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (PermissionError, ProcessLookupError):  # all have ended
            pass
    process.kill()
    process.wait()


def mark(name, path, problem, options):
    """The Mark of one submission. options: --limit, --memory and --results."""
    if problem:
        return Mark(name, note=problem)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for part in ("project", "home"):
            (folder / part).mkdir()
        project_copy(folder / "project")
        file = folder / "home" / "submission.py"
        shutil.copyfile(path, file)
        results = folder / "results.json"  # nothing that the file is told of
        words = ["-m", "tests.coursework.grade", str(file), "--limit", str(options.limit)]
        seconds = START + 2 * options.limit * len(all_graded())
        code, last = run_limited(
            [*words, "--results", str(results)],
            folder / "project",
            folder / "home",
            options.memory,
            seconds,
        )
        if not results.exists():
            reason = f"took longer than {seconds} s" if code is None else last
            return Mark(name, note=f"not graded: {reason}".replace(f"{folder}/home/", ""))
        text = results.read_text(encoding="utf-8").replace(f"{folder}/home/", "")
    if options.results:
        (Path(options.results) / f"{name}.json").write_text(text, encoding="utf-8")
    return mark_of(name, json.loads(text), refused=code == 2)


def mark_of(name, results, refused):
    """A Mark from the content of results.json."""
    units = []
    for unit in UNITS:
        tests = [t for t in results["tests"] if t["number"].startswith(f"{unit.number}.")]
        units.append(sum(test["score"] for test in tests))
    extra = results["extra_data"]
    note = results["output"] if refused else first_failures(results)
    return Mark(
        name, results["score"], units, extra["not_written"], extra["same_as_project"], note
    )


def first_failures(results, count=3):
    """A line for each of the first functions that fail."""
    skipped = ("not in the file", "not written yet")
    failed = [t for t in results["tests"] if t["status"] == "failed"]
    failed = [t for t in failed if not t["output"].startswith(skipped)]
    lines = [f"{t['name']}: {t['output'].splitlines()[0][:160]}" for t in failed[:count]]
    if len(failed) > count:
        lines.append(f"and {len(failed) - count} more")
    return "; ".join(lines)


# ---- all of them


def main():
    parser = make_parser("mark", __doc__)
    parser.add_argument("folder", help="of submissions")
    parser.add_argument("marks", help="a new .csv file")
    parser.add_argument(
        "--limit", type=int, default=LIMIT, help=f"seconds a function ({LIMIT})"
    )
    parser.add_argument(
        "--memory", type=int, default=MEMORY, help=f"MiB of each process ({MEMORY})"
    )
    parser.add_argument("--results", help="a folder for each submission's results.json")
    options = parser.parse_args()
    if not Path(options.folder).is_dir():
        parser.exit(2, f"{options.folder}: no such folder; name the one with submissions\n")
    if Path(options.marks).exists():
        parser.exit(2, f"{options.marks} exists; name a new file\n")
    if options.results:
        Path(options.results).mkdir(parents=True, exist_ok=True)
    found = submissions(options.folder)
    with open(options.marks, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(header())
        for name, path, problem in found:
            line = mark(name, path, problem, options)
            table.writerow(line.row())
            file.flush()
            print(f"{line.points:4d}  {name}  {line.note[:100]}", flush=True)
    print(f"{len(found)} submissions; written: {options.marks}")


if __name__ == "__main__":
    sys.exit(main())
