"""Grade a student's file: python -m tests.coursework.grade my_solution.py

The project's own tests of what the file defines are run, each function by itself, in the units'
order. What another function of the file gets wrong costs nothing here: all others are the
project's. Points are earned when all tests of a function pass. Exit code 0: everything that the
file defines passes; 1: something fails or is not written yet; 2: the file cannot be graded.
`python -m pytest -q tests --impl my_solution.py` does the same.
"""

import argparse
import contextlib
import json
import os
import queue
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.coursework import student
from tests.coursework.student import ROOT, Refused
from tests.coursework.units import UNITS, all_graded, unit_of

LIMIT = 20  # seconds for each function
PRINTED = 20  # lines of what the file prints
LONGEST = 4000  # characters of a message


@dataclass
class Result:
    """What became of one function."""

    name: str
    status: str  # passed, failed, unwritten, absent
    messages: list = field(default_factory=list)
    seconds: float = 0.0
    hint: str = ""  # of use where the function computes something wrong

    @property
    def passed(self):
        return self.status == "passed"

    @property
    def points(self):
        return all_graded()[self.name].points if self.passed else 0

    @property
    def message(self):
        return "\n".join(self.messages)


# ---- the child in which the file runs -------------------------------------------------------


def environment():
    """That of this process, in which the test files can be imported by their names."""
    folders = [str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders))}


def start_worker(path, log):
    """The process of worker.py; what is printed there goes into the file `log`."""
    return subprocess.Popen(
        [sys.executable, "-u", "-W", "ignore", "-m", "tests.coursework.worker", path],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        encoding="utf-8",
        errors="replace",
        env=environment(),
        start_new_session=True,  # what it starts ends with it
    )


class Child:
    """A process with the student's file. What it does not answer as agreed is a failure."""

    def __init__(self, path, limit, log):
        self.path = path
        self.limit = limit
        self.log = log  # a file, for what is printed there
        self.process = None
        self.answers = None
        self.secret = ""

    def start(self):
        """Raises Refused if the file cannot be run."""
        self.process = start_worker(self.path, self.log)
        self.answers = queue.Queue()
        arguments = [self.process, self.answers]
        threading.Thread(target=self.listen, args=arguments, daemon=True).start()
        self.secret = secrets.token_hex(16)
        # Importing torch takes time on a busy machine; so the file gets more of it, once.
        answer, problem = self.ask(self.secret, self.limit + 40)
        if problem:
            self.end()
            raise Refused(f"{self.path}: cannot be imported: {problem}; correct it")
        if not answer.get("loaded"):
            self.end()
            raise Refused(printable(answer.get("problem")))
        if answer.get("changed"):
            self.end()
            raise Refused(f"{self.path}: changes {answer['changed']}; take it out")

    @staticmethod
    def listen(process, answers):
        for line in process.stdout:
            answers.put(line)
        answers.put("")

    def ask(self, line, limit):
        """(the answer, why there is none)."""
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            text = self.answers.get(timeout=limit)
        except queue.Empty:
            return {}, f"it takes longer than {limit} s: an endless loop? (--limit SECONDS)"
        except OSError:
            text = ""
        try:
            answer = json.loads(text)
            if answer["secret"] == self.secret:
                return answer, ""
        except (ValueError, KeyError, TypeError):
            pass
        try:
            code = self.process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return {}, "it disturbs the process that grades it"
        return {}, f"it ends the process that grades it (exit status {code})"

    def grade(self, name):
        """A Result."""
        if self.process is None:
            self.start()
        answer, problem = self.ask(name, self.limit)
        if problem:
            self.end()
            return Result(name, "failed", [problem], float(self.limit), hint="")
        if answer["problem"]:
            return Result(name, "failed", [printable(answer["problem"])], hint="")
        messages = list(dict.fromkeys(map(printable, answer["failures"].values())))
        status = "failed" if messages else "passed"
        return Result(name, status, messages, answer["seconds"], all_graded()[name].hint)

    def end(self):
        """Kill it, and all that it has started."""
        if self.process:
            if hasattr(os, "killpg"):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)
            self.process.kill()
            self.process.wait()
        self.process = None


def grade(path, names=None, limit=LIMIT, log=None, checked=True):
    """{name: Result} of all graded functions, or of some. Raises Refused.

    log: a file that gets what the student's file prints. checked=False leaves out the reading of
    the file, which is for the tests of what comes after it.
    """
    path = str(Path(path).resolve())
    tree = student.parse(path)
    if checked:
        student.check(path, tree)
    defined = student.defined(tree)
    if not defined:
        raise Refused(
            f"{path}: defines none of the graded functions; "
            "`python -m tests.coursework.specify NEW_FILE.py` writes them down"
        )
    child = Child(path, limit, log or subprocess.DEVNULL)
    results = {}
    try:
        child.start()
        for name in names or all_graded():
            missing = student.unwritten(tree, name)
            if name not in defined:
                results[name] = Result(name, "absent")
            elif missing:
                results[name] = Result(name, "unwritten", [", ".join(missing)])
            else:
                results[name] = child.grade(name)
    finally:
        child.end()
    return results


# ---- what is written ------------------------------------------------------------------------


def indented(text, width):
    return "\n".join(" " * width + line for line in text.splitlines())


def lines_of(result):
    """What a student reads of one function."""
    graded = all_graded()[result.name]
    head = f"  {result.name:<26}{result.points:3d} / {graded.points}"
    if result.status == "unwritten":
        return [f"  not written yet: {result.message} ({graded.points} points)"]
    if result.passed:
        return [head]
    return [head, indented(advice(result), 6)]


def page(results, units):
    """The units in their order, with all functions that the file defines, and the sum."""
    lines = []
    for unit in units:
        found = [results[graded.name] for graded in unit.functions]
        points = sum(result.points for result in found)
        lines.append(f"{unit.title:<36}{points:3d} of {unit.points} points")
        for result in found:
            if result.status != "absent":
                lines += lines_of(result)
        absent = [result.name for result in found if result.status == "absent"]
        if absent:
            lines.append(f"  not in your file: {', '.join(absent)}")
    total = sum(result.points for result in results.values())
    lines.append(f"{'all units together':<36}{total:3d} of {most(units)} points")
    return "\n".join(lines)


def most(units):
    return sum(unit.points for unit in units)


def names_of(units):
    """The names of their functions, in order."""
    names = []
    for unit in units:
        names += [graded.name for graded in unit.functions]
    return names


def printed(log):
    """The last lines of what the student's file has printed."""
    log.seek(max(0, log.seek(0, os.SEEK_END) - LONGEST))
    lines = printable(log.read().decode(errors="replace")).splitlines()[-PRINTED:]
    return "\n".join(["", "what your file printed (the end of it):", *lines]) if lines else ""


def printable(text):
    """Without what would steer a terminal or is no XML, and not endless."""
    return re.sub(r"[^\t\n\x20-\x7e\xa0-\ud7ff\ue000-\ufffd]", "?", str(text)[:LONGEST])


def gradescope(results, units, seconds, output, same):
    """The content of results.json."""
    return {
        "score": sum(result.points for result in results.values()),
        "max_score": most(units),
        "execution_time": round(seconds, 1),
        "output": output,
        "visibility": "visible",
        "stdout_visibility": "hidden",
        "tests": [gradescope_test(results[name]) for name in names_of(units)],
        "extra_data": {
            "same_as_project": same,
            "not_written": [r.name for r in results.values() if r.status == "unwritten"],
            "not_in_file": [r.name for r in results.values() if r.status == "absent"],
        },
    }


def gradescope_test(result):
    graded, unit = all_graded()[result.name], unit_of(result.name)
    return {
        "name": result.name,
        "number": f"{unit.number}.{unit.functions.index(graded) + 1}",
        "score": result.points,
        "max_score": graded.points,
        "status": "passed" if result.passed else "failed",
        "output": explanation(result),
        "tags": [f"unit {unit.number}"],
        "visibility": "visible",
    }


def explanation(result):
    """Why there are no points."""
    if result.status == "absent":
        return "not in the file"
    if result.status == "unwritten":
        return f"not written yet: {result.message}"
    if result.passed:
        return ""
    return advice(result)


def advice(result):
    """What is wrong, with a hint for what is computed wrong."""
    return "\n".join([*result.messages, *([f"hint: {result.hint}"] if result.hint else [])])


def junit(results, units):
    """A JUnit tree: a suite for each unit, a case for each function, points as properties."""
    root = ElementTree.Element("testsuites", name="coursework")
    for unit in units:
        found = [results[graded.name] for graded in unit.functions]
        absent = [result for result in found if result.status == "absent"]
        failed = [r for r in found if r.status in ("failed", "unwritten")]
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            name=unit.title,
            tests=str(len(found)),
            failures=str(len(failed)),
            skipped=str(len(absent)),
            errors="0",
            time=str(sum(result.seconds for result in found)),
        )
        for result in found:
            add_case(suite, unit, result)
    return ElementTree.ElementTree(root)


def add_case(suite, unit, result):
    case = ElementTree.SubElement(
        suite,
        "testcase",
        classname=f"coursework.unit{unit.number}",
        name=result.name,
        time=str(result.seconds),
    )
    properties = ElementTree.SubElement(case, "properties")
    points = {"points": result.points, "max_points": all_graded()[result.name].points}
    for name, value in points.items():
        ElementTree.SubElement(properties, "property", name=name, value=str(value))
    text = explanation(result)
    if result.status == "absent":
        ElementTree.SubElement(case, "skipped", message=text)
    elif text:
        first = text.splitlines()[0]
        ElementTree.SubElement(case, "failure", message=first).text = text


# ---- the command ----------------------------------------------------------------------------


def units_of(text):
    """ "1,4" -> these units; "" -> all."""
    numbers = [word.strip() for word in text.split(",") if word.strip()]
    known = {str(unit.number): unit for unit in UNITS}
    wrong = [word for word in numbers if word not in known]
    if wrong:
        raise Refused(
            f"--units {text}: there is no unit {wrong[0]}; units are 1 to {len(UNITS)}"
        )
    return [unit for unit in UNITS if not numbers or str(unit.number) in numbers]


def make_parser():
    parser = argparse.ArgumentParser(
        prog="python -m tests.coursework.grade",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", help="the student's file")
    parser.add_argument("--units", default="", help="only these, such as 1,4")
    parser.add_argument(
        "--limit", type=int, default=LIMIT, help=f"seconds for each function ({LIMIT})"
    )
    parser.add_argument("--results", help="write results.json, as Gradescope reads it")
    parser.add_argument("--junitxml", help="write JUnit XML, points as properties")
    return parser


def report(arguments, units, log):
    """Grade, print, write. Returns the exit code."""
    started = time.time()
    names = names_of(units)
    results, same, refusal = {}, [], ""
    try:
        results = grade(arguments.file, names, arguments.limit, log)
        same = student.same_as_project(student.parse(arguments.file))
    except Refused as error:
        refusal = str(error)
        results = {name: Result(name, "failed", [refusal]) for name in names}
    output = refusal or page(results, units) + printed(log)
    seconds = time.time() - started
    if arguments.results:
        content = gradescope(results, units, seconds, output, same)
        text = json.dumps(content, indent=2, ensure_ascii=False)
        Path(arguments.results).write_text(text + "\n", encoding="utf-8")
    if arguments.junitxml:
        junit(results, units).write(arguments.junitxml, "utf-8", xml_declaration=True)
    if refusal:
        raise Refused(refusal)
    print(output)
    failed = any(result.status in ("failed", "unwritten") for result in results.values())
    return 1 if failed else 0


def main(words=None):
    arguments = make_parser().parse_args(words)
    try:
        if arguments.limit < 1:
            raise Refused(f"--limit {arguments.limit}: give each function a second at least")
        with tempfile.TemporaryFile() as log:
            return report(arguments, units_of(arguments.units), log)
    except KeyboardInterrupt:
        return 130
    except Refused as error:
        print(error, file=sys.stderr)
    except OSError as error:
        print(f"{error.filename}: {error.strerror}; name another path", file=sys.stderr)
    return 2


# ---- the same, asked for by pytest ----------------------------------------------------------


def pytest_addoption(parser):
    parser.addoption("--impl", help="a student's file, to be graded")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """pytest ... --impl FILE runs no tests of its own: it grades the file."""
    path = config.getoption("--impl")
    if not path:
        return None
    file = config.getoption("xmlpath", None)
    return main([path, *(["--junitxml", file] if file else [])])


if __name__ == "__main__":
    sys.exit(main())
