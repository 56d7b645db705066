"""Would the graded tests notice? python -m tests.coursework.mutants [FUNCTION ...]

Makes small mistakes in the project's own graded functions, by program, and runs on each what
grades it. Prints how many are caught, and every one that is not, with the reason if it is known
to be no mistake. All of them take about a minute.

    sign         + and -, * and /, a minus sign taken away
    compare      < and <=, > and >=, == and !=
    axis         another dimension
    off by one   an integer, 1 more or 1 less
    constant     another number, or text
    detach       no gradient through a value that is returned or kept
    in place     x.clamp(...) -> x.clamp_(...), x * y -> x.mul_(y)
    ignored      an argument has its default, or ones, whatever is handed in
    left out     a keyword, a conversion, a statement, a branch
"""

import ast
import copy
import importlib
import inspect
import os
import subprocess
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass

import torch

from tests.coursework.command import make_parser
from tests.coursework import student, worker
from tests.coursework.grade import environment
from tests.coursework.kinds import Replace, changed
from tests.coursework.units import TEST_FILES, all_graded

OTHER = {
    ast.Add: ("sign", ast.Sub),
    ast.Sub: ("sign", ast.Add),
    ast.Mult: ("sign", ast.Div),
    ast.Div: ("sign", ast.Mult),
    ast.Lt: ("compare", ast.LtE),
    ast.LtE: ("compare", ast.Lt),
    ast.Gt: ("compare", ast.GtE),
    ast.GtE: ("compare", ast.Gt),
    ast.Eq: ("compare", ast.NotEq),
    ast.NotEq: ("compare", ast.Eq),
    ast.Is: ("compare", ast.IsNot),
    ast.IsNot: ("compare", ast.Is),
}
IN_PLACE = {ast.Add: "add_", ast.Sub: "sub_", ast.Mult: "mul_", ast.Div: "div_"}
METHODS_IN_PLACE = "clamp masked_fill abs pow exp log cumsum scatter".split()
WITH_AXIS = """sum mean softmax log_softmax cumsum prod argmax sort gather scatter scatter_add_
diagonal flatten unflatten transpose topk searchsorted stack cat""".split()
# through whose results a gradient has to come; for the others none does in PPO
WITH_GRADIENT = """RMSNorm Attention mean_pool token_log_probs kl_estimate policy_loss value_loss
Block loss""".split()
OBJECTS = "self sampling part cache i".split()  # arguments that nothing else can stand for
CONVERSIONS = "float double long contiguous clone item to".split()
SWAPS = {"min": "max", "max": "min", "argmax": "argmin", "sum": "mean", "mean": "sum"}

ANY_LAST = "the last dimension is the default"
SIZE_ONE = "that dimension has size 1"
NUMBERS = "true and false count as 1 and 0 in arithmetic"
ROUNDING = "differs by rounding only"
LOGGED = "is only logged: no gradient is wanted"
FINITE = "matters for NaN logits only, which a diverged model gives"
MEMORY = "how much is drawn at once: test_paired_bootstrap_in_pieces, which grades nothing"
# (function, the changed line): why it is no mistake.
HARMLESS = {
    ("relative_position_bucket", "offset = (relative_position > 0) * num_buckets"): NUMBERS,
    (
        "relative_position_bucket",
        "log_distance = torch.log(distance.clamp(min=2) / max_exact)",
    ): "distance 1 has a bucket of its own",
    (
        "relative_position_bucket",
        "log_distance = torch.log(distance.clamp(min=0) / max_exact)",
    ): "distance 0 has a bucket of its own",
    (
        "relative_position_bucket",
        "return offset + torch.where(distance <= max_exact, distance, far)",
    ): "at n/2 both formulas give n/2",
    ("filter_logits", "kth = logits.topk(top_k).values[:, -1:]"): ANY_LAST,
    ("filter_logits", "ordered, order = logits.sort(descending=True)"): ANY_LAST,
    ("mean_pool", "weight = mask[:, :, None].to(x.dtype).detach()"): "a mask has no gradient",
    ("mean_pool", "weight = mask[:, :, None]"): NUMBERS,
    (
        "class_weights",
        "counts = torch.stack([(levels == k).sum(0) for k in range(LEVELS)], 1)",
    ): "integers become floats when they are divided",
    ("empathy_reward", "levels = torch.arange(LEVELS)"): "the same on a CPU",
    ("empathy_reward", "target = F.one_hot(target, LEVELS)"): NUMBERS,
    ("f1_scores", "pass"): ROUNDING,
    ("f1_scores", "counts = counts"): ROUNDING,
    (
        "f1_scores",
        "f1 = 2 * hits / (gold + predicted).clamp(min=2)",
    ): "what occurs once, in gold or prediction, has no hits",
    ("f1_scores", "occurs = gold + predicted > 0"): NUMBERS,
    (
        "f1_scores",
        "return {'accuracy': hits.sum(-1) / total, 'macro_f1': f1.sum(-1) / "
        "occurs.sum(-1).clamp(min=1), 'weighted_f1': (f1 * gold).sum(-1) / total}",
    ): "what does not occur has an F1 of 0",
    ("paired_bootstrap", "size = max(2, 2 ** 18 // contexts)"): MEMORY,
    ("paired_bootstrap", "size = max(0, 2 ** 18 // contexts)"): MEMORY,
    ("paired_bootstrap", "size = max(1, 3 ** 18 // contexts)"): MEMORY,
    ("paired_bootstrap", "size = max(1, 1 ** 18 // contexts)"): MEMORY,
    ("paired_bootstrap", "size = max(1, 2 ** 19 // contexts)"): MEMORY,
    ("paired_bootstrap", "size = max(1, 2 ** 17 // contexts)"): MEMORY,
    ("paired_bootstrap", "count = min(size, resamples + start)"): MEMORY,
    (
        "token_log_probs",
        "logits = logits.masked_fill_(~support, HIDDEN)",
    ): "these are the logits over the temperature, the function's own",
    (
        "token_log_probs",
        "entropy = (-(logits.softmax(-1) * log_probs).sum(-1)).detach()",
    ): LOGGED,
    (
        "token_log_probs",
        "return (log_probs.gather(-1, ids[..., None])[..., 0], entropy.detach())",
    ): LOGGED,
    (
        "token_log_probs",
        "return (log_probs.gather(-1, ids[..., None])[..., -1], entropy)",
    ): SIZE_ONE,
    (
        "policy_loss",
        "clip_share = masked_mean((clipped > plain).float(), mask).detach()",
    ): LOGGED,
    ("policy_loss", "clip_share = masked_mean(clipped > plain, mask)"): NUMBERS,
    ("policy_loss", "return (loss, clip_share.detach())"): LOGGED,
    ("draw", "cumulative = log_probs.exp().cumsum(-1)"): ROUNDING,
    ("draw", "uniform = torch.rand(len(logits), 1, device=logits.device)"): ROUNDING,
    ("draw", "uniform = torch.rand(len(logits), 1, dtype=torch.double)"): "the same on a CPU",
    (
        "draw",
        "uniform = torch.rand(len(logits), 2, dtype=torch.double, device=logits.device)",
    ): "the second number is not used",
    (
        "draw",
        "chosen = torch.searchsorted(cumulative, uniform * cumulative[:, -1:])",
    ): "matters for a uniform number of exactly 0",
    (
        "draw",
        "chosen = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=False)",
    ): "matters for a uniform number of exactly 0",
    (
        "draw",
        "chosen = torch.searchsorted(cumulative, uniform / cumulative[:, -1:], right=True)",
    ): ROUNDING,
    ("draw", "chosen = torch.searchsorted(cumulative, uniform, right=True)"): ROUNDING,
    ("draw", "pass"): FINITE,
    ("draw", "chosen = chosen.clamp(max=logits.shape[-1] + 1)"): FINITE,
    ("draw", "chosen = chosen.clamp(max=logits.shape[-1] - 0)"): FINITE,
    ("draw", "chosen_log_probs = log_probs.gather(1, chosen)[:, -1]"): SIZE_ONE,
    ("draw", "return (chosen[:, -1], chosen_log_probs, log_probs > -torch.inf)"): SIZE_ONE,
    (
        "PPOTrainer",
        "config, mask = (self.config, part.mask.detach())",
    ): "a mask has no gradient",
    ("PPOTrainer", "new = log_probs.detach().detach()"): "it is detached already",
    ("PPOTrainer", "ratio = torch.exp(new - part.log_probs).detach()"): LOGGED,
    ("PPOTrainer", "update_kl = kl_estimate(part.log_probs, new, 'k3').detach()"): LOGGED,
    (
        "PPOTrainer",
        "update_kl = kl_estimate(part.log_probs, new, 'k3_')",
    ): "all but k1 is k3",
    ("PPOTrainer", "ratio_error = ((ratio - 1).abs() * mask).max().detach()"): LOGGED,
    (
        "PPOTrainer",
        "ratio_error = (ratio - 1).abs().max()",
    ): "both log-probs are 0 on padding, and their ratio 1",
    (
        "PPOTrainer",
        "return (policy_part + config.value_coef * value_part, measured, ratio_error.detach())",
    ): LOGGED,
}


@dataclass
class Mutant:
    name: str  # of the function
    kind: str
    before: str  # the line that is changed
    after: str
    source: str  # of the whole function

    @property
    def key(self):
        return self.name, self.after


# ---- what can be changed --------------------------------------------------------------------


def method_call(value, name, *arguments):
    attribute = ast.Attribute(value=value, attr=name, ctx=ast.Load())
    return ast.Call(func=attribute, args=list(arguments), keywords=[])


def integer(node):
    """The value of an integer in the source, -1 included; None for all else."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = integer(node.operand)
        return None if value is None else -value
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    return None


def changes(node):
    """(kind, what may stand in the place of an expression)."""
    if isinstance(node, ast.BinOp):
        yield from changes_of_operation(node)
    if isinstance(node, ast.Compare) and type(node.ops[0]) in OTHER:
        kind, operator = OTHER[type(node.ops[0])]
        yield kind, changed(node, ops=[operator()])
    signs = ast.USub, ast.Not, ast.Invert
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, signs) and not integer(node):
        yield "sign", node.operand
    if isinstance(node, ast.Constant):
        yield from changes_of_constant(node.value)
    if isinstance(node, ast.Call):
        yield from changes_of_call(node)
    if isinstance(node, ast.BoolOp):
        for value in node.values:
            yield "left out", value
    if isinstance(node, ast.IfExp):
        yield "left out", node.body
        yield "left out", node.orelse


def changes_of_operation(node):
    kind = type(node.op)
    if kind in OTHER:
        name, operator = OTHER[kind]
        yield name, changed(node, op=operator())
    if kind in IN_PLACE and isinstance(node.left, ast.Name):
        yield "in place", method_call(node.left, IN_PLACE[kind], node.right)
    if kind in (ast.Mult, ast.Add, ast.MatMult):
        yield "left out", node.left
        yield "left out", node.right


def changes_of_constant(value):
    if isinstance(value, bool):
        yield "constant", ast.Constant(not value)
    elif isinstance(value, int):
        yield "off by one", ast.Constant(value + 1)
        yield "off by one", ast.Constant(value - 1)
    elif isinstance(value, float):
        yield "constant", ast.Constant(value * 2 + 0.1)
        if value:
            yield "constant", ast.Constant(-value)
    elif isinstance(value, str):
        yield "constant", ast.Constant(value + "_")


def changes_of_call(node):
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    for i, argument in enumerate(node.args):
        if name in WITH_AXIS and integer(argument) is not None:
            arguments = [*node.args]
            arguments[i] = ast.Constant(0 if integer(argument) != 0 else 1)
            yield "axis", changed(node, args=arguments)
    for i, keyword in enumerate(node.keywords):
        others = node.keywords[:i] + node.keywords[i + 1 :]
        yield "left out", changed(node, keywords=others)
        if keyword.arg == "dim":
            axis = ast.keyword("dim", ast.Constant(0))
            yield "axis", changed(node, keywords=[*others, axis])
    if not isinstance(node.func, ast.Attribute):
        return
    if name in METHODS_IN_PLACE and ast.unparse(node.func.value) != "torch":
        yield "in place", changed(node, func=changed(node.func, attr=name + "_"))
    if name in CONVERSIONS:
        yield "left out", node.func.value
    if name in SWAPS:
        yield "sign", changed(node, func=changed(node.func, attr=SWAPS[name]))


def changes_of_statement(node):
    if isinstance(node, (ast.Assign, ast.Return)) and node.value:
        for value in kept_values(node.value):
            yield "detach", replaced(node, value, method_call(value, "detach"))
    if isinstance(node, ast.AugAssign) and type(node.op) in OTHER:
        yield "sign", changed(node, op=OTHER[type(node.op)][1]())
    if isinstance(node, ast.If):
        yield "left out", changed(node, test=ast.Constant(True))
        yield "left out", changed(node, test=ast.Constant(False))
    again = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ast.unparse(
        node.value
    )
    if again or isinstance(node, ast.AugAssign):
        yield "left out", ast.Pass()


def kept_values(value):
    """The parts of a value that is returned or kept: of a tuple each, else itself."""
    parts = value.elts if isinstance(value, ast.Tuple) else [value]
    return [part for part in parts if not isinstance(part, (ast.Constant, ast.Dict))]


def replaced(tree, old, new):
    """A copy of a tree in which a node is another."""
    return Replace(old, new).visit(copy.deepcopy(tree, {id(old): old}))


def ignoring(function):
    """(argument, a statement that makes its value not matter)."""
    arguments = function.args.args
    defaults = function.args.defaults
    by_default = dict(
        zip([a.arg for a in arguments[len(arguments) - len(defaults) :]], defaults)
    )
    for argument in arguments:
        name = argument.arg
        if name in OBJECTS:
            continue
        value = ast.unparse(by_default[name]) if name in by_default else f"ignored({name})"
        yield name, ast.parse(f"{name} = {value}").body[0]


def ignored(value):
    """What stands in the place of an argument that is ignored."""
    if torch.is_tensor(value):
        return torch.ones_like(value)
    if isinstance(value, (list, tuple)):
        return [ignored(part) for part in value]
    return 1 if isinstance(value, (int, float)) else value


# ---- mutants --------------------------------------------------------------------------------


def functions_of(tree, graded):
    if not graded.methods:
        return [tree.body[0]]
    return [part for part in tree.body[0].body if getattr(part, "name", "") in graded.methods]


def mutants_of(graded):
    """All mutants of a graded function, without those whose text is the same."""
    module = importlib.import_module(graded.module)
    source = textwrap.dedent(inspect.getsource(getattr(module, graded.name)))
    tree = ast.parse(source)
    right = ast.unparse(tree)
    found = {}
    for function in functions_of(tree, graded):
        for kind, old, new in changes_in(graded, function):
            mutant = ast.fix_missing_locations(replaced(tree, old, new))
            text = ast.unparse(mutant)
            lines = changed_line(right, text)
            found.setdefault(text, Mutant(graded.name, kind, *lines, text))
        for name, statement in ignoring(function):
            body = [statement, *function.body]
            mutant = replaced(tree, function, changed(function, body=body))
            text = ast.unparse(ast.fix_missing_locations(mutant))
            found[text] = Mutant(graded.name, "ignored", name, ast.unparse(statement), text)
    found.pop(right, None)
    return list(found.values())


def changes_in(graded, function):
    """(kind, old node, new node), the docstring and what is raised left alone."""
    nodes = [function]
    for part in function.body:
        if not student.is_text(part):
            nodes += within(part)
    arguments = {argument.arg for argument in function.args.args}
    for node in nodes[1:]:
        for kind, new in (*changes(node), *changes_of_statement(node)):
            if kind == "in place" and receiver(new) not in arguments:
                continue  # a value of the function's own
            if kind == "detach" and not {function.name, graded.name} & {*WITH_GRADIENT}:
                continue
            yield kind, node, new


def receiver(call):
    """x of x.mul_(y)."""
    return ast.unparse(call.func.value)


def within(node):
    """A node and all below it but what is raised and f-strings."""
    if isinstance(node, (ast.Raise, ast.JoinedStr)):
        return []
    found = [node]
    for child in ast.iter_child_nodes(node):
        found += within(child)
    return found


def changed_line(before, after):
    """The first line in which two texts differ, in both."""
    for one, other in zip(before.splitlines(), after.splitlines()):
        if one != other:
            return one.strip(), other.strip()
    return "", ""


# ---- are they caught? -----------------------------------------------------------------------


def remade(graded, source):
    """The function, or class, that a source makes in the module."""
    namespace = {**vars(importlib.import_module(graded.module)), "ignored": ignored}
    exec(compile(source, graded.name, "exec"), namespace)
    return namespace[graded.name]


def caught_by(graded, source):
    """The first test that fails, and why; ("", "") if none does."""
    value = worker.guard(graded, remade(graded, source))
    places = student.put_in(graded.name, value)
    try:
        for test, reason in worker.failures(worker.tests_of(graded), graded.name):
            return test, reason
    finally:
        student.put_back(graded.name, places)
    return "", ""


def survivors(names):
    """(how many mutants by kind, those that no test catches)."""
    for file in TEST_FILES.values():
        importlib.import_module(file.removesuffix(".py"))
    made, missed = Counter(), []
    for name in names:
        graded = all_graded()[name]
        for mutant in mutants_of(graded):
            made[mutant.kind] += 1
            test, _ = caught_by(graded, mutant.source)
            if not test:
                missed.append(mutant)
        still_right(graded)
    return made, missed


def still_right(graded):
    """The project's own function passes: no mutant has left something behind."""
    module = importlib.import_module(graded.module)
    test, reason = caught_by(graded, inspect.getsource(getattr(module, graded.name)))
    if test:
        raise RuntimeError(f"{graded.name} itself fails {test}: {reason}")


def main():
    parser = make_parser("mutants", __doc__)
    parser.add_argument("names", nargs="*", metavar="FUNCTION", help="all, if none is named")
    names = parser.parse_args().names or list(all_graded())
    wrong = [name for name in names if name not in all_graded()]
    if wrong:
        parser.exit(2, f"{wrong[0]} is not graded; name some of: {', '.join(all_graded())}\n")
    if str(student.ROOT / "tests") not in os.environ.get("PYTHONPATH", ""):
        command = [sys.executable, "-m", "tests.coursework.mutants", *names]
        return subprocess.run(command, env=environment()).returncode
    torch.set_num_threads(1)
    made, missed = survivors(names)
    for mutant in missed:
        reason = HARMLESS.get(mutant.key, "NOT KNOWN")
        print(f"{mutant.name}, {mutant.kind}: {mutant.before}\n    -> {mutant.after}")
        print(f"    {reason}")
    known = sum(mutant.key in HARMLESS for mutant in missed)
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(made.items()))
    print(f"{made.total()} mutants ({kinds})")
    print(
        f"{made.total() - len(missed)} caught, {known} harmless, {len(missed) - known} others"
    )
    return 1 if len(missed) > known else 0


if __name__ == "__main__":
    sys.exit(main())
