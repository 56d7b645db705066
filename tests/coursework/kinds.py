"""Kinds of silent bugs, each a change of one place in a syntax tree, and where they are made.

changes() lists everything that could be changed in a function; secret.py draws from it and keeps
what runs without an error and yet has an effect. A kind is a mistake that people make; a place is
found by its form, in the project's functions and in a student's own alike.
"""

import ast
import copy
from dataclasses import dataclass

KINDS = {
    "sign": "A minus sign is missing.",
    "difference": "A difference is taken the wrong way round.",
    "mask": "A mask is left out, so what should not count does.",
    "extreme": "The larger of two is taken for the smaller, or the other way round.",
    "axis": "A sum, mean, softmax or index runs along another axis.",
    "off by one": "A position or a count is off by one.",
    "bound": "A comparison includes a bound that it should leave out, or leaves one out.",
    "term": "A summand is left out.",
    "factor": "A factor or a divisor is left out.",
    "detached": "No gradient flows where it should.",
    "stale": "A value is taken from another variable of the same kind: an old one, a copy.",
    "mean for sum": "A mean is taken for a sum, or the other way round.",
    "exponential": "An exponential, a logarithm or a softmax is left out or confused.",
    "ignored": "An argument is ignored: its default is always used.",
    "limit": "A limit, which keeps a number in its range, is left out.",
    "shift": "A slice begins or ends one position off.",
    "condition": "A condition is turned round.",
    "arguments": "Two arguments are swapped.",
    "left out": "A step is left out.",
    "power": "A square or a root is left out.",
    "order": "Two steps are done in the wrong order.",
    "constant": "A number is wrong.",
}
# Where they are made in a copy of the project: what a run of `toy` calls and learns by. None of
# these is graded: who pastes the copy's functions into a file and grades it learns nothing.
PLACES = {
    "ppo.py": """masked_mean RunningMoments.update Policy.values unpack response_log_probs
        rollout minibatches PPOTrainer.scaled PPOTrainer.learning_rate PPOTrainer.update
        PPOTrainer.accumulate_gradient""",
    "t5_small.py": """FeedForward.forward Stack.position_bias Stack.forward T5Encoder.encode
        T5.decode T5.logits T5.response_states T5.loss_sum generate Optimizer.set_lr
        Optimizer.step Trainer.step Trainer.learning_rate Trainer.validate_and_keep_best""",
    "identifiers.py": """BiEncoder.forward NetworkClassifier.forward classification_loss
        validation_loss EmpathyReward.of EmpathyReward.best_of confusions weighted_emp_f1""",
    "data.py": "Tokenizer.encode_context Tokenizer.encode_response Pairs.batch",
    "emprl.py": """mle_trainer total_loss train_classifier find_targets without_response
        PromptBatches.__call__ Evaluator.compare Evaluator.perplexities Evaluator.best_of_n
        Evaluator.floors""",
}
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
OTHER = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
}
EXTREMES = {"min": "max", "max": "min", "argmin": "argmax", "argmax": "argmin"}
EXTREMES |= {"minimum": "maximum", "maximum": "minimum"}
MEANS = {"mean": "sum", "sum": "mean", "nanmean": "nansum"}
CURVES = {"softmax": "log_softmax", "log_softmax": "softmax"}
# the age or the side of a quantity, which is easily confused
SIDES = (
    "old",
    "ref",
    "next",
    "new",
    "raw",
    "human",
    "valid",
    "test",
    "low",
    "high",
    "clipped",
)
AXES = ("dim", "axis")
ROLES = """rewards returns values advantages, context response source target, gold predicted,
before after, plain clipped, log_probs probs logits, mean variance, ids targets, delta advantage,
train valid test"""
ROLES = [set(words.split()) for words in ROLES.split(",")]


@dataclass
class Change:
    """One change of one function."""

    kind: str
    function: str  # its name, of a method with that of its class
    place: int  # number of the changed node, in the order of walk()
    new: ast.AST  # what takes its place; None: nothing, a statement is left out
    old: str  # the text that is changed

    def key(self):
        return self.kind, self.function, self.place, ast.unparse(self.new) if self.new else ""


def functions(tree):
    """name -> node, of all functions and methods of a module."""
    found = {}
    for node in tree.body:
        if isinstance(node, FUNCTION):
            found[node.name] = node
        elif isinstance(node, ast.ClassDef):
            for part in node.body:
                if isinstance(part, FUNCTION):
                    found[f"{node.name}.{part.name}"] = part
    return found


def walk(function):
    """All nodes of a function's body in a fixed order; no annotations, no docstrings."""
    nodes = []
    for statement in function.body:
        nodes += ast.walk(statement)
    return nodes


def changes(function, name):
    """Every change of a function that this file knows."""
    found = []
    parameters = defaults(function)
    names = {n.id for n in walk(function) if isinstance(n, ast.Name)}
    swappable = can_change_places(function)
    for place, node in enumerate(walk(function)):
        old = ast.unparse(node)
        for kind, new in changes_of(node, parameters, names):
            if new is None or ast.unparse(new) != old:
                found.append(Change(kind, name, place, new, old))
        if node in swappable:
            found.append(Change("order", name, place, ast.Module([], []), old))
    return found


def can_change_places(function):
    """Statements that share a name with the next one, so that their order may matter."""
    found = []
    plain = (ast.Assign, ast.AugAssign, ast.Expr)
    for node in ast.walk(function):
        for field in ("body", "orelse"):
            block = getattr(node, field, None)
            if not isinstance(block, list):
                continue
            for one, other in zip(block, block[1:]):
                both = isinstance(one, plain) and isinstance(other, plain)
                if both and words_of(one) & words_of(other):
                    found.append(one)
    return found


def words_of(node):
    """The names of variables and attributes."""
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    return names | {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}


def defaults(function):
    """name -> its default, of the parameters that have a plain one."""
    arguments = function.args
    named = arguments.posonlyargs + arguments.args
    pairs = list(zip(reversed(named), reversed(arguments.defaults)))
    pairs += zip(arguments.kwonlyargs, arguments.kw_defaults)
    constants = (ast.Constant, ast.Name)
    return {a.arg: default for a, default in pairs if isinstance(default, constants)}


def apply(tree, change):
    """A copy of a module's tree with one change."""
    tree = copy.deepcopy(tree)
    function = functions(tree)[change.function]
    target = walk(function)[change.place]
    new = copy.deepcopy(change.new)
    if isinstance(target, ast.stmt):
        replace_statement(function, target, new)
    else:
        ast.copy_location(new, target)
        Replace(target, new).visit(function)
    return ast.fix_missing_locations(tree)


class Replace(ast.NodeTransformer):
    def __init__(self, old, new):
        self.old = old
        self.new = new

    def visit(self, node):
        return self.new if node is self.old else self.generic_visit(node)


def replace_statement(function, old, new):
    """Another statement; None leaves it out; a list takes the place of it and the next one."""
    for node in ast.walk(function):
        for field in ("body", "orelse"):
            block = getattr(node, field, None)
            if isinstance(block, list) and old in block:
                at = block.index(old)
                if new is None:
                    block[at : at + 1] = [] if len(block) > 1 else [ast.Pass()]
                elif isinstance(new, ast.Module):  # two statements in another order
                    block[at : at + 2] = [block[at + 1], block[at]]
                else:
                    block[at] = ast.copy_location(new, old)


# ---- what a node may be replaced by


def changes_of(node, parameters, names):
    """(kind, new node or None) for each change of this very node."""
    if isinstance(node, ast.expr):
        yield from changes_of_expression(node)
        yield from changes_of_name(node, parameters, names)
    if isinstance(node, ast.Call):
        yield from changes_of_call(node)
    if isinstance(node, ast.Subscript):
        yield from changes_of_subscript(node)
    if isinstance(node, ast.stmt):
        yield from changes_of_statement(node)


def changes_of_expression(node):
    match node:
        case ast.UnaryOp(op=ast.USub()) if not isinstance(node.operand, ast.Constant):
            yield "sign", node.operand
        case ast.UnaryOp(op=ast.Not() | ast.Invert()):
            yield "condition", node.operand
        case ast.BinOp(op=ast.Sub(), left=left, right=right):
            if isinstance(right, ast.Constant):
                yield "off by one", left
            else:
                yield "difference", ast.BinOp(right, ast.Sub(), left)
                yield "term", left
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            if isinstance(right, ast.Constant):
                yield "off by one", left
            else:
                yield "term", left
                yield "term", right
        case ast.BinOp(op=ast.Mult(), left=left, right=right):
            yield factor_or_mask(right), left
            yield factor_or_mask(left), right
        case ast.BinOp(op=ast.Div(), left=left):
            yield "factor", left
        case ast.BinOp(op=ast.Pow(), left=left):
            yield "power", left
        case ast.Compare(ops=[op]) if type(op) in OTHER:
            yield "bound", changed(node, ops=[OTHER[type(op)]()])
        case ast.Constant(value=float(value)) if value not in (0.0,):
            yield "constant", ast.Constant(value / 2)
            yield "constant", ast.Constant(value * 10)


def factor_or_mask(factor):
    """A factor that is called a mask, or by what a mask is made of, is one."""
    words = ast.unparse(factor).lower()
    masks = ("mask", "weight", "keep", "occurs", "valid", "!=", "attend")
    return "mask" if any(word in words for word in masks) else "factor"


def changed(node, **fields):
    node = copy.copy(node)
    for name, value in fields.items():
        setattr(node, name, value)
    return node


def changes_of_call(node):
    function = node.func
    name = getattr(function, "attr", getattr(function, "id", ""))
    owner = getattr(function, "value", None)
    for table, kind in (
        (EXTREMES, "extreme"),
        (MEANS, "mean for sum"),
        (CURVES, "exponential"),
    ):
        if name in table:
            yield kind, changed(node, func=renamed(function, table[name]))
    yield from changes_of_axis(node)
    is_method = owner is not None and ast.unparse(owner) not in ("torch", "math", "F", "nn")
    value = owner if is_method else (node.args or [None])[0]
    if name in ("exp", "log") and value is not None:
        yield "exponential", value
    if name in ("sqrt", "rsqrt", "square") and value is not None:
        yield "power", value
    if name == "clamp" and value is not None:
        yield "limit", value
    if name == "masked_fill" and is_method:
        yield "mask", owner
    if name == "masked_mean" and len(node.args) == 2:
        mean = ast.Attribute(node.args[0], "mean", ast.Load())
        yield "mask", ast.Call(mean, [], [])
    if name == "abs" and value is not None:
        yield "sign", value
    yield from changes_of_arguments(node, name)


def changes_of_arguments(node, name):
    """Two that are swapped, one that is left out."""
    if len(node.args) > 1 and name not in (*EXTREMES, *MEANS):
        swapped = [node.args[1], node.args[0], *node.args[2:]]
        if all(isinstance(arg, (ast.Name, ast.Attribute)) for arg in swapped[:2]):
            yield "arguments", changed(node, args=swapped)
    for i, keyword in enumerate(node.keywords):
        if keyword.arg not in (None, *AXES, "dtype", "device"):
            rest = node.keywords[:i] + node.keywords[i + 1 :]
            yield "ignored", changed(node, keywords=rest)


def renamed(function, name):
    if isinstance(function, ast.Attribute):
        return changed(function, attr=name)
    return changed(function, id=name)


def axis_number(node):
    """The axis that a number stands for, -1 or 1; None: another expression."""
    try:
        value = ast.literal_eval(node)
    except ValueError:
        return None
    return value if type(value) is int and -2 <= value <= 2 else None


def changes_of_axis(node):
    """The same reduction along another axis."""
    name = getattr(node.func, "attr", "")
    along = ("sum", "mean", "softmax", "log_softmax", "cumsum", "prod", "argmax", "var", "cat")
    if name not in along:
        return
    for i, argument in enumerate(node.args):
        number = axis_number(argument)
        if number is not None:
            other = {-1: -2, -2: -1, 0: 1, 1: 0, 2: 1}[number]
            args = [*node.args[:i], constant(other), *node.args[i + 1 :]]
            yield "axis", changed(node, args=args)
            yield "axis", changed(node, args=node.args[:i] + node.args[i + 1 :])
    for i, keyword in enumerate(node.keywords):
        if keyword.arg in AXES and axis_number(keyword.value) is not None:
            other = {-1: -2, -2: -1, 0: 1, 1: 0, 2: 1}[axis_number(keyword.value)]
            new = ast.keyword(keyword.arg, constant(other))
            keywords = [*node.keywords[:i], new, *node.keywords[i + 1 :]]
            yield "axis", changed(node, keywords=keywords)


def constant(number):
    if number < 0:
        return ast.UnaryOp(ast.USub(), ast.Constant(-number))
    return ast.Constant(number)


def changes_of_subscript(node):
    """x[:, 1:] for x[:, :-1], a row more or less."""
    parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    for i, part in enumerate(parts):
        for new in shifted(part):
            others = [*parts[:i], new, *parts[i + 1 :]]
            index = ast.Tuple(others, ast.Load()) if len(others) > 1 else new
            yield "shift", changed(node, slice=index)


def shifted(part):
    if isinstance(part, ast.Slice) and part.step is None:
        if part.upper is not None and part.lower is None:
            yield ast.Slice(ast.Constant(1), None)
        if part.lower is not None and part.upper is None:
            yield ast.Slice(None, constant(-1))
    elif axis_number(part) in (0, -1):
        yield constant(-1 - axis_number(part))


def related(one, other):
    """Two names of one quantity: values and old_values, log_probs and ref_log_probs."""
    words = {*one.split("_")}
    others = {*other.split("_")}
    sides = (words ^ others) <= {*SIDES} and words & others
    return one != other and (sides or any({one, other} <= role for role in ROLES))


def changes_of_name(node, parameters, names):
    match node:
        case ast.Name(id=name, ctx=ast.Load()):
            if name in parameters:
                yield "ignored", parameters[name]
            for other in sorted(names):
                if related(name, other):
                    yield "stale", ast.Name(other, ast.Load())
        case ast.Attribute(value=owner, attr=name, ctx=ast.Load()):
            for role in ROLES:
                for other in sorted(role - {name}) if name in role else ():
                    yield "stale", ast.Attribute(owner, other, ast.Load())


def changes_of_statement(node):
    match node:
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            words = {n.id for n in ast.walk(value) if isinstance(n, ast.Name)}
            if name in words:  # x = f(x): x has a value without it, too
                yield "left out", None
            if isinstance(value, (ast.BinOp, ast.Call)):
                detached = ast.Call(ast.Attribute(value, "detach", ast.Load()), [], [])
                yield "detached", changed(node, value=detached)
        case ast.AugAssign():
            yield "left out", None
        case ast.Expr(value=ast.Call()):
            yield "left out", None
        case ast.If(body=[ast.Assign() | ast.AugAssign(), *_], orelse=[]):
            yield "left out", None
        case ast.If(test=test):
            yield "condition", changed(node, test=ast.UnaryOp(ast.Not(), test))


def all_changes(tree, names):
    """Every change of the functions of these names, those that are there."""
    found = []
    there = functions(tree)
    for name in names:
        if name in there:
            found += changes(there[name], name)
    return found
