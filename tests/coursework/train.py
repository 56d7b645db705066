"""Train with a student's functions: python -m tests.coursework.train my_solution.py --preset toy

What the file defines takes the place of the project's, wherever a module has the name, as it does
when it is graded; the rest is the project's. All that follows the file is for `python emprl.py`.
The first lines, report.md and metrics.json say whose functions trained. A file that has changed
gets a folder of its own.
"""

import functools
import hashlib
import sys
from pathlib import Path

from tests.coursework import student
from tests.coursework.student import Refused
from tests.coursework.units import all_graded


def put_all_in(path):
    """Put in all that the file defines and has written. Returns their names."""
    path = str(Path(path).resolve())
    module, tree = student.load(path)
    own = {}
    for name in student.defined(tree):
        value = getattr(module, name)
        problem = student.problem_of(value, all_graded()[name], path)
        if not problem and not student.unwritten(tree, name):
            own[name] = value
    for name, value in own.items():
        student.put_in(name, value)
    if not own:
        raise Refused(f"{path}: nothing in it is written yet; write a function first")
    return list(own)


def told(path, own):
    """Whose functions these are."""
    others = "" if len(own) == len(all_graded()) else "; all others are the project's"
    return f"with the functions of {Path(path).name}: {', '.join(own)}{others}"


def digest_of(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]


def mark_results(emprl, path, own):
    """The report, the figures and the commands of this run say what it is."""
    of_project = {
        name: getattr(emprl, name) for name in ("report_page", "code_version", "program")
    }
    words = ["python", "-m", "tests.coursework.train", str(path)]

    def report_page(*arguments):
        heading, _, rest = of_project["report_page"](*arguments).partition("\n")
        return "\n\n".join([heading, f"**Trained {told(path, own)}.**", rest.lstrip("\n")])

    def code_version():
        code = of_project["code_version"]()
        return {**code, "student": [Path(path).name, digest_of(path), *own]}

    def program(*others):
        if others and not others[0].startswith("-"):  # chat, evaluate
            return of_project["program"](*others)
        return emprl.command_line([*words, *others])

    emprl.report_page, emprl.code_version, emprl.program = report_page, code_version, program
    # The trainer is a default of run_all, found when the module was read.
    emprl.run_all = functools.partial(emprl.run_all, ppo_trainer=emprl.PPOTrainer)


def with_folder(emprl, path, words):
    """The words of the command, with a folder for the results if they name none."""
    if any(word.split("=")[0] == "--run" for word in words):
        return words
    arguments = emprl.make_parser().parse_args(["run", *words])
    name = f"{Path(path).stem}-{digest_of(path)}-{arguments.preset}-seed{arguments.seed}"
    return [*words, "--run", f"runs/{name}"]


def main(words=None):
    words = sys.argv[1:] if words is None else list(words)
    if not words or words[0].startswith("-"):
        print(__doc__, file=sys.stdout if words[:1] in (["-h"], ["--help"]) else sys.stderr)
        return 0 if words[:1] in (["-h"], ["--help"]) else 2
    path, *words = words
    import emprl  # here: --help needs no torch

    try:
        own = put_all_in(path)
        words = with_folder(emprl, path, words)
    except (Refused, emprl.DataError) as error:
        print(error, file=sys.stderr)
        return 2
    mark_results(emprl, path, own)
    emprl.say(told(path, own))
    code = emprl.main(words)
    if code == 0:
        emprl.say(f"\ntrained {told(path, own)}")
    return code


if __name__ == "__main__":
    sys.exit(main())
