"""The course: right solutions pass, wrong ones are told what and why, bugs can be planted."""

import ast
import functools
import importlib
import inspect
import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import emprl
import t5_small
from tests.coursework import grade as grader
from tests.coursework import measure_bugs, mutants, plant, specify, student, train
from tests.coursework.units import MINUTES_A_POINT, TEST_FILES, UNITS, all_graded, graders
from tests.coursework.wrong import WRONG
from tests.tools import read_json

pytestmark = pytest.mark.usefixtures("few_imports")
TESTS = Path(__file__).parent
COURSE = TESTS / "coursework"


def in_a_process(line):
    """A command from the project's folder, on one thread: (exit code, all output)."""
    done = subprocess.run(
        list(map(str, line)),
        cwd=plant.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return done.returncode, done.stdout


@pytest.fixture
def grade(call):
    """grade(path, text, word, ...) -> the exit code and the output of grading a file with this
    text ("": no file)."""

    def start(path, text, *words):
        if text:
            path.write_text(text, encoding="utf-8")
        return call(grader, path, *words)

    return start


def parameters(test):
    """The values that a test is parametrized with; [()] if it is not."""
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "parametrize":
            return [(value,) for value in mark.args[1]]
    return [()]


def all_pass(file, names):
    """Call test functions as pytest would, with all their parameters. Does none fail?"""
    module = importlib.import_module(Path(file).stem)
    for name in names:
        test = getattr(module, name)
        for values in parameters(test):
            try:
                test(*values)
            except KeyboardInterrupt:
                raise
            except BaseException:  # pytest.fail is no Exception
                return False
    return True


def remade(module, source, filename):
    """What a module would hold if this source were executed in it."""
    namespace = dict(vars(module))
    exec(compile(source, filename, "exec"), namespace)
    return namespace


# ---- the graded functions and their tests


@pytest.fixture
def as_in_the_grader(monkeypatch):
    """Global generator and test files as a student's function finds them."""
    for file in TEST_FILES.values():
        importlib.import_module(Path(file).stem)
    torch.manual_seed(0)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_solutions_are_caught(name, as_in_the_grader):
    graded = all_graded()[name]
    source = inspect.getsource(getattr(importlib.import_module(graded.module), name))
    assert mutants.caught_by(graded, source) == ("", ""), "the project's own function passes"
    assert len(WRONG[name]) >= 3
    for right, wrong in WRONG[name]:
        assert right in source, f"{name} has no {right!r}: correct wrong.py"
        test, _ = mutants.caught_by(graded, source.replace(right, wrong, 1))
        assert test, f"{wrong!r} instead of {right!r} is not caught"


@functools.cache
def mutants_of(name):
    return mutants.mutants_of(all_graded()[name])


@pytest.mark.parametrize("name", all_graded())
def test_mutants_are_caught(name, as_in_the_grader, thorough):
    """All with --thorough, else a fifth of them, and of the trainer, whose tests train, fewer.
    But for those that are known to be no mistake."""
    graded = all_graded()[name]
    found = mutants_of(name)
    assert len(found) >= 5
    few = found[::15] if name == "PPOTrainer" else found[::5]
    for mutant in found if thorough else few:
        test, _ = mutants.caught_by(graded, mutant.source)
        assert test or mutant.key in mutants.HARMLESS, f"not caught: {mutant.key}"
    mutants.still_right(graded)


def test_there_are_many_mutants_of_every_kind():
    """As many as tests/README.md says. And what is called harmless is still made."""
    found = list(itertools.chain(*map(mutants_of, all_graded())))
    by_hand = sum(map(len, WRONG.values()))
    page = (TESTS / "README.md").read_text(encoding="utf-8")
    assert f"{by_hand} by hand, {len(found)} by program" in page
    kinds = Counter(mutant.kind for mutant in found)
    named = re.findall(r"^    (\w[\w ]*?)  +\S", mutants.__doc__, re.MULTILINE)
    assert len(named) == 9
    for kind in named:
        assert kinds[kind] >= 10, kind
    assert {*mutants.HARMLESS} <= {mutant.key for mutant in found}


def test_every_function_has_wrong_solutions():
    assert set(WRONG) == set(all_graded())


def test_units_are_whole():
    """Every grading test is there, every file grades something, hours are whole."""
    assert [unit.number for unit in UNITS] == [1, 2, 3, 4, 5, 6]
    assert len(all_graded()) == sum(len(unit.functions) for unit in UNITS) >= 14
    assert sum(unit.points for unit in UNITS) == 180
    for unit in UNITS:
        assert unit.hours == round(unit.hours), unit.title
    for graded in all_graded().values():
        assert graded.minutes % MINUTES_A_POINT == 0, graded.name
    for file, test in graders():
        text = (TESTS / file).read_text(encoding="utf-8")
        assert f"def {test}(" in text, f"{file} has no {test}"
    assert {file for file, _ in graders()} == set(TEST_FILES.values())


def test_the_students_page_has_these_units_and_functions():
    page = (COURSE / "README.md").read_text(encoding="utf-8")
    for unit in UNITS:
        names = ", ".join(f"`{graded.name}`" for graded in unit.functions)
        assert f"| {unit.title} | {names} | {unit.hours:g} hours |" in page


# ---- the specification


def test_specification_is_python_with_nothing_solved(tmp_path):
    specify.write(tmp_path / "mine.py")
    text = (tmp_path / "mine.py").read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert student.defined(tree) == list(all_graded())
    for name, graded in all_graded().items():
        assert f"# {name}: {graded.points} points, about {graded.minutes} minutes." in text
        wanted = [f"{name}.{method}" for method in graded.methods] or [name]
        assert student.unwritten(tree, name) == wanted
    assert text.count("\n# Example:\n") == len(all_graded())
    assert "error =" not in text
    # Only lines that hold the path of the file may be longer.
    assert not [line for line in text.splitlines()[30:] if len(line) > 95]


def examples(text):
    """{name: (lines that can be pasted, the result that is shown)} of a specification."""
    found = {}
    for part in text.split("\n# Example:\n")[1:]:
        above, _, rest = part.partition("\ndef ")
        if "\nclass " in above:
            above, _, rest = part.partition("\nclass ")
        lines = [line.removeprefix("# ") for line in above.splitlines()]
        code = [line for line in lines if not line.startswith("#   ") and line[0] != " "]
        result = [line.strip("# ") for line in lines if line not in code]
        found[re.match(r"\w+", rest)[0]] = code, " ".join(result)
    return found


def test_examples_can_be_pasted_as_they_are(tmp_path):
    """In the specification, with the project's function in place of the stub."""
    specify.write(tmp_path / "mine.py")
    text = (tmp_path / "mine.py").read_text(encoding="utf-8")
    found = examples(text)
    assert list(found) == list(all_graded())
    for name, (code, result) in found.items():
        namespace = {}
        exec(compile(text, "mine.py", "exec"), namespace)
        module = importlib.import_module(all_graded()[name].module)
        namespace[name] = getattr(module, name)
        torch.manual_seed(0)
        exec("\n".join(code[:-1]), namespace)
        value = eval(code[-1], namespace)
        assert specify.shown(value) == " ".join(result.split()), name


def test_the_example_of_attention_tells_a_wrong_scale():
    graded = all_graded()["Attention"]
    source = inspect.getsource(t5_small.Attention)
    right = specify.example_value(graded)
    scaled = source.replace(".transpose(-1, -2) + bias", ".transpose(-1, -2) / 2 + bias")
    places = student.put_in("Attention", mutants.remade(graded, scaled))
    wrong = specify.example_value(graded)
    student.put_back("Attention", places)
    assert (right - wrong).abs().max() > 0.05


@pytest.mark.parametrize("where", ["mine.py", "no_such_folder/mine.py"])
def test_a_students_work_is_not_written_over(where, tmp_path, call):
    (tmp_path / "mine.py").write_text("work\n", encoding="utf-8")
    code, output = call(specify, tmp_path / where)
    assert code == 2
    assert output.count("\n") == 1
    assert (tmp_path / "mine.py").read_text(encoding="utf-8") == "work\n"


# ---- the grader

SOLUTION = """
import torch
from ppo import gae
import ppo

def kl_estimate(log_probs, ref_log_probs, kind="k1"):
    d = log_probs - ref_log_probs
    return d if kind == "k1" else (-d).exp() - 1 + d

def whiten(x, mask, shift_mean=True):
    return (x - x.mean()) / x.std()

def token_rewards(rewards, kl, mask, kl_coef):
    return rewards

def policy_loss(log_probs, old_log_probs, advantages, mask, clip_range=0.2):
    return (log_probs * advantages).sum()

def value_loss(values, old_values, returns, mask, clip_range=0.2):
    print("values are", values.shape)
    return values.no_such_method()

def mean_pool(x, mask):
    raise NotImplementedError
"""


def test_a_solution_is_graded_by_unit(tmp_path, grade):
    """Right, wrong, imported, of another shape, one value for two, broken, not written yet."""
    code, output = grade(tmp_path / "mine.py", SOLUTION)
    assert code == 1
    for words in (
        "4 from a reward to advantages         3 of 36 points",
        "kl_estimate                 3 / 3",
        "gae                         0 / 10\n      gae is the project's own: write it yourself",
        "2, 4, 6 have mean 4 and sample std 2; padding becomes 0\n        expected [[-1, 0, 0]",
        "expected shape (2, 4)\n        got      (2,)",
        "has to return two tensors: loss and share; it returns a tensor of shape ()",
        "value_loss",
        "has no attribute 'no_such_method' (line 21 of your file)",
        "  not written yet: mean_pool (3 points)\n",
        "not in your file: token_log_probs",
        "hint: Clip around the old value",
        "all units together                    3 of 180 points",
        "what your file printed (the end of it):\nvalues are torch.Size([2, 4])",
    ):
        assert words in output, f"{words!r} is not in:\n{output}"
    assert "Traceback" not in output
    heads = re.findall(r"^(\d) .* points$", output, re.MULTILINE)
    assert heads == list("123456")


@pytest.mark.parametrize(
    "text, words",
    [
        ("def gae(:\n", "mine.py:1: SyntaxError"),
        ("x = 1\n", "defines none of the graded functions"),
        ("def gae(): pass\n1 / 0\n", "mine.py:2: ZeroDivisionError: division by zero"),
        ("def gae(): pass\nraise SystemExit(0)\n", "mine.py:2: SystemExit: 0"),
        ("def gae(): pass\nimport sys\n", "mine.py:2: import of sys"),
        ("import torch\ntorch.isclose = max\ndef gae(): pass\n", "mine.py:2: a change of"),
    ],
)
def test_a_file_that_can_not_be_graded_is_one_line(text, words, tmp_path, grade):
    results = tmp_path / "results.json"
    code, output = grade(tmp_path / "mine.py", text, "--results", results)
    assert code == 2
    assert words in output
    assert output.count("\n") == 1, output
    content = json.loads(results.read_text(encoding="utf-8"))
    assert content["score"] == 0 and words in content["output"]


def test_an_empty_specification_earns_nothing(tmp_path, grade):
    specify.write(tmp_path / "source.py")
    text = (tmp_path / "source.py").read_text(encoding="utf-8")
    code, output = grade(tmp_path / "mine.py", text)
    assert code == 1
    assert output.count("not written yet: ") == len(all_graded())
    assert len(output.splitlines()) == len(all_graded()) + len(UNITS) + 1
    assert "   0 of 180 points" in output


def right_solutions():
    """The project's own functions, as a student's file would hold them."""
    parts = [specify.header_imports(), "from data import *", "from identifiers import *"]
    parts += ["from ppo import *", "from t5_small import *", "from collections import *"]
    parts += ["from identifiers import weighted_emp_f1", "GAMMA = 1.0"]
    for name, graded in all_graded().items():
        value = getattr(importlib.import_module(graded.module), name)
        if graded.inherits:
            parts.append(f"class {name}({graded.module}.{name}):")
            parts += [inspect.getsource(getattr(value, method)) for method in graded.methods]
        else:
            parts.append(inspect.getsource(value))
    return "\n\n".join(parts)


def test_right_solutions_get_all_points_and_are_recognised(tmp_path, grade):
    """Also in the two files for programs that grade."""
    results, junit = tmp_path / "results.json", tmp_path / "report.xml"
    wanted = ["--results", results, "--junitxml", junit]
    code, output = grade(tmp_path / "mine.py", right_solutions(), *wanted)
    assert code == 0, output
    assert "all units together                  180 of 180 points" in output
    content = json.loads(results.read_text(encoding="utf-8"))
    assert content["score"] == content["max_score"] == 180
    assert len(content["tests"]) == len(all_graded())
    assert sum(test["max_score"] for test in content["tests"]) == 180
    assert {"gae", "whiten", "PPOTrainer"} <= {*content["extra_data"]["same_as_project"]}
    assert "mean_pool" not in content["extra_data"]["same_as_project"], "too short to tell"

    suites = ElementTree.parse(junit).getroot()
    assert [suite.get("name") for suite in suites] == [unit.title for unit in UNITS]
    points = [p.get("value") for p in suites.iter("property") if p.get("name") == "points"]
    assert sum(map(int, points)) == 180


def test_pytest_hands_a_file_over_to_the_grader(tmp_path):
    (tmp_path / "mine.py").write_text(SOLUTION, encoding="utf-8")
    junit = tmp_path / "report.xml"
    words = ["--impl", tmp_path / "mine.py", "--junitxml", junit]
    pytest_on_tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    code, output = in_a_process([*pytest_on_tests, *words])
    assert code == 1
    assert "all units together                    3 of 180 points" in output
    failures = [case.get("name") for case in ElementTree.parse(junit).iter("testcase")]
    assert failures == list(all_graded())


def test_only_some_units(tmp_path, grade):
    code, output = grade(tmp_path / "mine.py", SOLUTION, "--units", "4")
    assert code == 1
    assert "all units together                    3 of 36 points" in output
    assert "mean_pool" not in output
    code, output = grade(tmp_path / "mine.py", SOLUTION, "--units", "4,7")
    assert code == 2
    assert output.count("\n") == 1


@pytest.mark.parametrize("option", ["--results", "--junitxml"])
def test_a_path_that_can_not_be_written_is_one_line(option, tmp_path, grade):
    text = "def kl_estimate(a, b, kind='k1'):\n    return a\n"
    path = tmp_path / "no_such_folder" / "file"
    code, output = grade(tmp_path / "mine.py", text, "--units", "4", option, path)
    assert code == 2
    assert output.count("\n") == 1 and "name another path" in output
    code, output = grade(tmp_path / "no" / "mine.py", "")
    assert code == 2
    assert output.count("\n") == 1


# ---- cheats

ENDLESS = "def kl_estimate(a, b, kind='k1'):\n    while True:\n        pass\n"
RIGHT_KL = """
def kl_estimate(a, b, kind="k1"):
    return a - b if kind == "k1" else (b - a).exp() - 1 + a - b
"""
LEAVES = (
    RIGHT_KL
    + """
def whiten(x, mask, shift_mean=True):
    import os
    os._exit(0)

def gae(*a):
    raise SystemExit(0)

def policy_loss(*a):
    return policy_loss(*a)

def value_loss(*a):
    import os, time
    if os.fork() == 0:
        time.sleep(60)  # and keeps all that is open
    os._exit(3)

def adapt_kl_coef(*a):
    import os
    for i in range(20):
        try:
            os.close(i)
        except OSError:
            pass
    while True:
        pass
"""
)


def results_of(path, text, **options):
    path.write_text(text, encoding="utf-8")
    return grader.grade(path, checked=False, **options)


def test_an_endless_loop_ends_and_the_others_are_graded(tmp_path):
    text = ENDLESS + "def adapt_kl_coef(a, b, c, d, e):\n    return a\n"
    results = results_of(tmp_path / "mine.py", text, limit=2)
    message = results["kl_estimate"].message
    assert message == "it takes longer than 2 s: an endless loop? (--limit SECONDS)"
    assert "10 % above" in results["adapt_kl_coef"].message


def test_who_ends_the_process_gets_nothing_and_the_others_are_graded(tmp_path):
    """Also without the reading of the file, which refuses `import os`."""
    results = results_of(tmp_path / "mine.py", LEAVES, limit=2)
    assert results["kl_estimate"].passed
    assert "ends the process that grades it (exit status 0)" in results["whiten"].message
    assert "ends the program (SystemExit, line 10" in results["gae"].message
    assert "RecursionError" in results["policy_loss"].message
    assert "longer than 2 s" in results["value_loss"].message, "a child of it holds on"
    assert "disturbs" in results["adapt_kl_coef"].message


OF_THE_PROJECT = {  # each function in another way; all of them are one file
    "gae": "from ppo import gae",
    "whiten": "whiten = ppo.whiten",
    "adapt_kl_coef": "from ppo import adapt_kl_coef as k\ndef adapt_kl_coef(*a): return k(*a)",
    "kl_estimate": "def kl_estimate(*a): return ppo.kl_estimate(*a)",
    "policy_loss": "policy_loss = functools.partial(ppo.policy_loss)",
    "value_loss": "@functools.wraps(ppo.value_loss)\ndef value_loss(*a): return a[0].sum()",
    "Attention": "Attention = identifiers.Attention",
    "RMSNorm": "class RMSNorm(t5_small.RMSNorm):\n    pass",
    "Block": "class Block(t5_small.Block):\n"
    "    def forward(self, *a): return super().forward(*a)",
    "PPOTrainer": "class PPOTrainer(ppo.PPOTrainer):\n"
    "    def step(self, i): return super().step(i)\n"
    "    def loss(self, part): return super().loss(part)",
    "emp_f1": "def emp_f1(a, b, kind='weighted_f1'): return by_another(a, b)\n"
    "def by_another(a, b): return identifiers.compare_levels(a, b)['emp_f1']",
    # one that is graded early keeps another for later
    "response_mask": "kept = []\ndef response_mask(ids, eos_id=1):\n"
    "    kept.append(ppo.token_rewards)\n    return ids",
    "token_rewards": "def token_rewards(*a, **b): return kept[0](*a, **b)",
    "mean_pool": "space = dict(vars(identifiers))\n"
    "exec(open(identifiers.__file__).read(), space)\nmean_pool = space['mean_pool']",
}


def test_the_projects_own_functions_earn_nothing(tmp_path):
    """Also without the reading of the file, which refuses open and exec."""
    head = "import functools\nimport identifiers\nimport ppo\nimport t5_small\n"
    results = results_of(tmp_path / "mine.py", head + "\n".join(OF_THE_PROJECT.values()))
    words = "project's own|RecursionError|write it as a function|not from your file|defines no"
    for name in OF_THE_PROJECT:
        assert not results[name].passed, name
        if name != "response_mask":
            assert re.search(words, results[name].message), f"{name}: {results[name].message}"


LOOSE = "def kl_estimate(a, b, kind='k1'):\n    return a\n"
SWITCHES = {  # what would make a wrong solution pass, if nobody looked
    "check": "import conftest\nconftest.check = lambda *a, **b: None",
    "pytest.fail": "import pytest\npytest.fail = print",
    "isclose": "import torch\ntorch.isclose = lambda *a, **b: torch.tensor(True)",
    "a tensor's method": "import torch\ntorch.Tensor.any = lambda *a: False",
    "all assertions": "import builtins\nbuiltins.AssertionError = KeyError",
    "the tests": "import sys\nfor m in list(sys.modules.values()):\n"
    "    if hasattr(m, 'test_kl_estimate'):\n        m.test_kl_estimate = print",
    "the file of the tests": "import sys, types\nfake = types.ModuleType('test_ppo')\n"
    "fake.test_kl_estimate = fake.test_kl_estimate_passes_its_gradient = lambda: None\n"
    "sys.modules['test_ppo'] = fake",
    "at the end": "import atexit, os\natexit.register(os._exit, 0)",
    "an answer of its own": 'import os\nos.write(1, b\'{"failures": {}, "seconds": 0}\')',
    "from within": "import os, pytest\ndef whiten(*a, **b):\n    pytest.skip('not today')\n"
    "def gae(*a, **b):\n    pytest.exit('done', 0)\ndef policy_loss(*a):\n"
    "    for i in range(9):\n"
    "        try: os.write(i, b'{\"failures\": {}}')\n        except OSError: pass\n"
    "    os._exit(0)",
}


@pytest.mark.parametrize("how", SWITCHES)
def test_the_checks_can_not_be_switched_off(how, tmp_path):
    """Not even by a file that is not read before; reading refuses all of them by their line."""
    path = tmp_path / "mine.py"
    try:
        results = results_of(path, f"{SWITCHES[how]}\n{LOOSE}")
        assert not any(result.passed for result in results.values())
    except student.Refused as error:
        assert "changes" in str(error), error
    with pytest.raises(student.Refused, match=r"mine\.py:\d+: "):
        grader.grade(path)


ALWAYS_WRONG = """
import torch

def kl_estimate(a, b, kind="k1"):
    a -= b
    return a

def whiten(x, mask, shift_mean=True):
    torch.manual_seed(0)
    return x

def response_mask(ids, eos_id=1):
    ids == eos_id

def mean_pool(x, mask):
    return 1.0

def policy_loss(log_probs, old, advantages, mask, clip_range=0.2):
    return log_probs.mean(), 0.5

def gae(rewards, values):
    return rewards, values
"""
SAID = {
    "kl_estimate": "changes its arguments in place",
    "whiten": "torch's global generator",
    "response_mask": "returns nothing: is there a `return`?",
    "mean_pool": "has to return a tensor; it returns float 1.0",
    "policy_loss": "has to return two tensors: loss and share; "
    "it returns a tuple of 2 (a tensor of shape (), float 0.5)",
    "gae": "it cannot be called as the specification says",
}


def test_what_is_wrong_whatever_is_computed_is_said_in_words(tmp_path):
    results = results_of(tmp_path / "mine.py", ALWAYS_WRONG)
    for name, words in SAID.items():
        assert words in results[name].message, f"{name}: {results[name].message}"


def test_a_mistake_costs_only_once(tmp_path):
    """emp_f1 calls f1_scores by its module: the project's while emp_f1 is graded."""
    text = (
        "import identifiers\n"
        "def f1_scores(counts):\n    return {}\n"
        "def emp_f1(predicted, gold, kind='weighted_f1'):\n"
        "    counts = identifiers.confusions(predicted, gold)\n"
        "    return identifiers.f1_scores(counts)[kind].mean().item()\n"
    )
    results = results_of(tmp_path / "mine.py", text)
    assert results["emp_f1"].passed
    assert not results["f1_scores"].passed


LAVISH = """
def kl_estimate(*a):
    print("\\x1b[2J" + "word " * 10**7)

def whiten(*a):
    many = [0]
    while True:
        many += many

def gae(*a):
    raise ValueError("\\x1b[2J\\x00 & < \\ud800")

def adapt_kl_coef(kl_coef, kl, target, batch_size, horizon):
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * min(max(1 + error * batch_size / horizon, 0.5), 2.0)
"""


def test_memory_and_output_have_limits_and_messages_are_harmless(tmp_path, grade):
    junit = tmp_path / "report.xml"
    code, output = grade(tmp_path / "mine.py", LAVISH, "--units", "4,5", "--junitxml", junit)
    assert code == 1
    assert "MemoryError" in output
    assert "\x1b" not in output
    assert len(output) < 20_000
    assert "ValueError: ?[2J? & < ?" in output
    failures = {case.get("name"): case for case in ElementTree.parse(junit).iter("testcase")}
    assert failures["gae"].find("failure") is not None
    assert failures["adapt_kl_coef"].find("failure") is None


# ---- training with a student's functions


def that_tell(text):
    """Solutions, each of which prints "used NAME" when it is called."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            told = ast.parse(f"print('used {node.name}', flush=True)").body
            node.body = told + node.body
    return ast.unparse(tree)


def test_training_uses_the_students_functions_and_says_so(finished, tmp_path):
    """With the project's own code in the student's file the figures are the project's."""
    (tmp_path / "mine.py").write_text(that_tell(right_solutions()), encoding="utf-8")
    run = tmp_path / "run"
    words = [tmp_path / "mine.py", "--preset", "smoke", "--run", run]
    program = plant.WITHOUT_PICTURES.format(module="tests.coursework.train")
    code, output = in_a_process([sys.executable, "-c", program, *words])
    assert code == 0, output[-2000:]
    said = f"with the functions of mine.py: {', '.join(all_graded())}"
    assert output.splitlines()[0] == said
    assert f"**Trained {said}.**" in (run / "report.md").read_text(encoding="utf-8")

    used = set(re.findall(r"^used (\w+)$", output, re.MULTILINE))
    for name, graded in all_graded().items():
        if name != "adapt_kl_coef":  # is off in this preset
            assert used.issuperset(graded.methods or [name]), f"{name} was not used"
    mine, projects = (read_json(folder / "metrics.json") for folder in (run, finished))
    assert mine["code"].pop("student")[0] == "mine.py"
    for figures in (mine, projects):
        figures.pop("seconds")
    assert mine == projects


@pytest.mark.parametrize(
    "text, words",
    [("import os\ndef gae(): pass\n", []), (SOLUTION, ["--no-such-option"]), ("x = 1\n", [])],
)
def test_training_refuses_in_one_line(text, words, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(text, encoding="utf-8")
    monkeypatch.setattr(student, "put_in", lambda *_: None)  # into this process
    code = train.main([str(tmp_path / "mine.py"), *words])
    told = capsys.readouterr()
    output = told.out + told.err
    assert code == 2
    assert output.count("\n") == 1, output


# ---- silent bugs


def teachers_tests(number):
    """The test file and the names of the tests that teacher.md names for a bug."""
    page = (COURSE / "teacher.md").read_text(encoding="utf-8")
    row = re.search(rf"^\| {number} \| .*$", page, re.MULTILINE)[0]
    file = re.search(r"`(test_\w+\.py)::", row)[1]
    return file, re.findall(r"(test_\w+)`", row)


def put_in(monkeypatch, module, namespace):
    """The namespace's functions and classes take the place of the module's, for all users."""
    for name, value in namespace.items():
        if not callable(value) or getattr(value, "__module__", "") != module.__name__:
            continue
        original = getattr(module, name)
        for user in list(sys.modules.values()):
            if getattr(user, "__dict__", {}).get(name) is original:
                monkeypatch.setattr(user, name, value)


@pytest.mark.parametrize("number", plant.BUGS)
def test_the_tests_that_the_teacher_names_catch_the_bug(number, monkeypatch):
    """The program made anew passes them, with the bug it passes none."""
    name, buggy = plant.with_bug(number)
    file, tests = teachers_tests(number)
    assert tests
    module = importlib.import_module(Path(name).stem)
    importlib.import_module(Path(file).stem)  # before its names are replaced
    right = (plant.ROOT / name).read_text(encoding="utf-8")
    for source, expected in ((right, True), (buggy, False)):
        put_in(monkeypatch, module, remade(module, source, name))
        for test in tests:
            assert all_pass(file, [test]) == expected, f"bug {number}: {test}"
        monkeypatch.undo()


def test_a_planted_copy_has_one_change_and_nothing_that_tells(tmp_path, call):
    code, output = call(plant, 5, tmp_path / "copy")
    assert code == 0
    assert "start with: cd " in output
    changed = []
    for path in (tmp_path / "copy").glob("**/*"):
        original = plant.ROOT / path.relative_to(tmp_path / "copy")
        if path.is_file() and path.read_bytes() != original.read_bytes():
            changed.append(path.name)
    assert changed == ["ppo.py"]
    assert not [*(tmp_path / "copy").glob("**/test_*")]
    course = tmp_path / "copy" / "tests" / "coursework"
    assert {path.name for path in course.glob("*")} <= {plant.PICTURES.name}


IMPORT_ALL = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        print(error.name)
"""


def test_a_planted_copy_is_complete(tmp_path):
    """The modules and the scripts of the lab need nothing of the project that is not there."""
    plant.plant(3, tmp_path / "copy")
    lab = (tmp_path / "copy" / "tests" / "lab").glob("*.py")
    scripts = [f"tests.lab.{path.stem}" for path in lab]
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, "emprl", *scripts],
        cwd=tmp_path / "copy",
        stdout=subprocess.PIPE,
        check=True,
        encoding="utf-8",
    )
    for missing in done.stdout.split():  # packages that only the lab's users have
        assert not missing.startswith("tests"), missing
        assert not (plant.ROOT / f"{missing}.py").exists(), missing


def test_planting_over_a_folder_is_refused_in_one_line(call, tmp_path):
    code, output = call(plant, 5, tmp_path)
    assert code == 2
    assert output.count("\n") == 1


@pytest.mark.parametrize("bug", [5, 8])
def test_the_teachers_curves_can_be_measured(bug, finished):
    """The printed command in a copy, from a finished run; bug 8 trains everything anew."""
    found = measure_bugs.train_with(bug, finished, ["ppo.steps=2", "eval.contexts=8"])
    assert len(found["ppo"]) == 2
    for record in found["ppo"]:
        assert set(record) == set(measure_bugs.PANELS)
    assert set(found["mle"]) == set(found["emprl"]) == set(measure_bugs.FIGURES)


def test_the_teachers_curves_are_of_the_printed_command():
    """Both pages for students name it as plant.py prints it, and it can be parsed."""
    command = plant.training_command()
    assert command == "python emprl.py --set " + " ".join(plant.SETTINGS)
    emprl.make_config("toy", settings=plant.SETTINGS)
    for page in ("README.md", "teacher.md"):
        assert command in (COURSE / page).read_text(encoding="utf-8")


def test_what_is_no_finished_run_is_not_measured(call, tmp_path):
    code, output = call(measure_bugs, tmp_path)
    assert code == 2
    assert output.count("\n") == 1


def test_the_teachers_curves_are_drawn(tmp_path):
    figures = json.loads((COURSE / "bugs.json").read_text(encoding="utf-8"))
    few = {name: figures[name] for name in ("0/0", "3/0")}
    measure_bugs.draw(few, tmp_path / "bugs.png")
    assert (tmp_path / "bugs.png").read_bytes().startswith(b"\x89PNG")


def test_the_teachers_table_is_that_of_the_curves():
    figures = json.loads((COURSE / "bugs.json").read_text(encoding="utf-8"))
    page = (COURSE / "teacher.md").read_text(encoding="utf-8")
    for line in measure_bugs.table(figures).splitlines():
        assert line.removesuffix(" |") in page
