"""The same program in other words: what it does is kept, and neither `diff` nor a search finds
the lines that it was made from.

restyled() renames local variables, reorders functions and methods, drops comments and all but the
first line of docstrings, and writes many expressions in another way that means the same. What is
drawn depends on the secret, the module and the place only: with one bug more, all else is equal.
Public names and parameters stay, so every command and every test still works.
"""

import ast
import builtins
import copy
import hashlib

WIDTH = 95
SYNONYMS = """mean average, variance spread_sq, squares squared, whitened normed, total overall,
last final_at, advantages gains, delta surprise, ratio quotient, plain unclipped, clipped bounded,
loss cost, error miss, difference gap, log_probs logp, probs p_all, logits raw, entropy ent,
mask keep, rows picked, part piece, parts pieces, record entry, records entries, norm size_of_grad,
sampled drawn_batch, ids tokens, source src, memory encoded, state hidden_now, states hiddens,
keys k_all, values v_all, queries q_all, scores affinity, weights coeff, bias offset, hidden h_mid,
context ctx, bucket slot, position places, relative offsets, count n_items, counts tally, hits same,
gold truth, f1 per_level, reward pay, rewards pays, lengths sizes, length size, config settings,
shift moved, step_size stride, lr rate_now, rise going_up, fall going_down, name label, text string,
figures numbers, levels grades, targets aims, share portion, train fit_on, test held_out,
responses answers, texts strings, tokens pieces_n, token tok, chosen picked_one, order ranking,
found result_of, log history, batch group, per_token by_token, kl divergence, width columns,
next_value value_after, next_advantage gain_after, cumulative running, uniform u, steps taken,
ended over, support allowed, new fresh, old before_it, path where, folder place, line row_text,
measured seen_now, number amount, generator rng, gains relative_gains, start begin, end stop"""
SYNONYMS = dict(pair.split() for pair in SYNONYMS.split(","))
AFFIXES = ("the_{}", "this_{}", "{}_now", "{}_here", "cur_{}", "{}_val")
# x.exp() and torch.exp(x) are the same
BOTH_WAYS = ("exp", "softmax", "log_softmax", "cumsum", "masked_fill", "gather")
FLIPPED = {
    ast.Lt: ast.Gt,
    ast.Gt: ast.Lt,
    ast.LtE: ast.GtE,
    ast.GtE: ast.LtE,
    ast.Eq: ast.Eq,
    ast.NotEq: ast.NotEq,
}
NEGATED = {ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
OFTEN = 0.75  # all of them could be undone all at once
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
SIMPLE = (ast.Call, ast.BinOp, ast.Compare)
NAMED = (*SIMPLE, ast.List, ast.Dict, ast.Subscript, ast.IfExp, ast.BoolOp)


def draw(*what):
    """A number from 0 to 1 that depends on these words alone."""
    content = "/".join(map(str, what)).encode()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") / 2**64


def shuffled(items, *what):
    """The items, all of them different, in an order that depends on them and these words."""
    return sorted(items, key=lambda item: draw(*what, getattr(item, "name", item)))


def restyled(tree, text, secret, module):
    """The text of a module whose syntax tree is `tree`; `text` is what tree was made from."""
    public = names_of_module(tree)
    lines = text.splitlines()
    parts = []
    for node in reordered(tree.body, secret, module):
        if isinstance(node, (*FUNCTION, ast.ClassDef)):
            node = copy.deepcopy(node)
            for function in functions_of(node):
                rewrite(function, public, (secret, module))
            parts.append("\n\n" + pretty(node))
        elif has_long_text(node):
            parts.append("\n".join(lines[node.lineno - 1 : node.end_lineno]))
        else:
            parts.append(pretty(node))
    return "\n".join(parts) + "\n"


def names_of_module(tree):
    """Names that mean something outside of a function: they are not for locals."""
    found = set(dir(builtins))
    for node in tree.body:
        found.update(getattr(alias, "asname", 0) or alias.name for alias in aliases(node))
        if isinstance(node, (*FUNCTION, ast.ClassDef)):
            found.add(node.name)
        else:
            found.update(n.id for n in ast.walk(node) if isinstance(n, ast.Name))
    return found


def aliases(node):
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return node.names
    return []


def has_long_text(node):
    """A text of many lines, which reads best as it stands."""
    return any(
        isinstance(part, ast.Constant) and isinstance(part.value, str) and "\n" in part.value
        for part in ast.walk(node)
    )


# ---- the order of functions


def reordered(body, secret, module):
    """Functions that stand side by side, in another order; everything else stays."""
    result, run = [], []
    for node in body:
        if isinstance(node, FUNCTION) and is_free(node, run):
            run.append(node)
            continue
        result += [*shuffled(run, secret, module), node]
        run = []
    result += shuffled(run, secret, module)
    return [reordered_class(node, secret, module) for node in result]


def is_free(function, others):
    """Its decorators and defaults, which are evaluated at once, need none of the others. Two
    functions of one name, a property and its setter, stay in their order."""
    used = set()
    for part in [*function.decorator_list, function.args]:
        used.update(n.id for n in ast.walk(part) if isinstance(n, ast.Name))
    return not any(other.name in used or other.name == function.name for other in others)


def reordered_class(node, secret, module):
    """A class with its methods in another order; __init__ stays first."""
    if not isinstance(node, ast.ClassDef):
        return node
    node = copy.copy(node)
    node.body = reordered(node.body, secret, f"{module}.{node.name}")
    first = [part for part in node.body if getattr(part, "name", "") == "__init__"]
    fields = [part for part in node.body if not isinstance(part, FUNCTION)]
    methods = [part for part in node.body if part not in first + fields]
    node.body = fields + first + methods
    return node


def functions_of(node):
    """A function itself, or the methods of a class."""
    if isinstance(node, FUNCTION):
        return [node]
    return [part for part in node.body if isinstance(part, FUNCTION)]


# ---- inside a function


def rewrite(function, public, key):
    """Other words and other names; what is left of the docstring is its first line."""
    before = locals_of(function) - public
    used = {n.id for n in ast.walk(function) if isinstance(n, ast.Name)} | public
    Paraphrase(key, used, has_torch="torch" in public).visit(function)
    ast.fix_missing_locations(function)
    rename(function, before, public, key)
    for node in ast.walk(function):
        if isinstance(node, FUNCTION):
            shorten_docstring(node)


def shorten_docstring(node):
    if ast.get_docstring(node):
        node.body[0].value = ast.Constant(ast.get_docstring(node).splitlines()[0])


def locals_of(function):
    """Names that are bound in a function or inside it, and not by being parameters."""
    stored, kept = set(), set()
    for node in ast.walk(function):
        match node:
            case ast.Name(id=name, ctx=ast.Store() | ast.Del()):
                stored.add(name)
            case ast.arg(arg=name):
                kept.add(name)
            case ast.Global(names=names) | ast.Nonlocal(names=names):
                kept.update(names)
            case ast.FunctionDef(name=name) | ast.ExceptHandler(name=name):
                kept.add(name)
            case ast.MatchAs(name=name) | ast.MatchStar(name=name):
                kept.add(name)
            case ast.Import() | ast.ImportFrom():
                kept.update(alias.asname or alias.name for alias in node.names)
    return stored - kept - {"_"}


def rename(function, old_names, public, key):
    names = {n.id for n in ast.walk(function) if isinstance(n, ast.Name)}
    taken = names | public | {n.arg for n in ast.walk(function) if isinstance(n, ast.arg)}
    new_names = {}
    for name in sorted(old_names):
        choices = [
            affix.format(name) for affix in shuffled(AFFIXES, *key, function.name, name)
        ]
        if name in SYNONYMS and draw(*key, function.name, name, "synonym") < 0.8:
            choices.insert(0, SYNONYMS[name])
        free = [choice for choice in choices if choice not in taken]
        new_names[name] = free[0]
        taken.add(free[0])
    for node in ast.walk(function):
        if isinstance(node, ast.Name):
            node.id = new_names.get(node.id, node.id)


class Paraphrase(ast.NodeTransformer):
    """Most of the places where something can be written in another way are written so."""

    def __init__(self, key, used, has_torch):
        self.key = key
        self.used = used
        self.has_torch = has_torch

    def wanted(self, node, kind):
        return draw(*self.key, node.lineno, node.col_offset, kind) < OFTEN

    def free(self, *names):
        """A name that the function does not use yet."""
        numbered = [f"{names[0]}{i}" for i in range(1, 50)]
        name = next(name for name in [*names, *numbered] if name not in self.used)
        self.used.add(name)
        return name

    def visit_Compare(self, node):
        """a < b, b > a"""
        self.generic_visit(node)
        kind = type(node.ops[0])
        if len(node.ops) == 1 and kind in FLIPPED and self.wanted(node, "compare"):
            sides = [node.comparators[0], node.left]
            new = ast.Compare(sides[0], [FLIPPED[kind]()], [sides[1]])
            return ast.copy_location(new, node)
        return node

    def visit_BinOp(self, node):
        """a * b, b * a"""
        self.generic_visit(node)
        if isinstance(node.op, ast.Mult) and self.wanted(node, "product"):
            node.left, node.right = node.right, node.left
        return node

    def visit_AugAssign(self, node):
        """n += 1, n = n + 1; a tensor or another object could be changed in place: not those."""
        self.generic_visit(node)
        function = getattr(node.value, "func", None)
        is_number = getattr(function, "attr", getattr(function, "id", "")) in ("item", "len")
        new_object = is_number or isinstance(node.value, (ast.Constant, ast.List))
        if isinstance(node.target, ast.Name) and new_object and self.wanted(node, "augmented"):
            old = ast.copy_location(ast.Name(node.target.id, ast.Load()), node.target)
            total = ast.copy_location(ast.BinOp(old, node.op, node.value), node)
            return ast.copy_location(ast.Assign([node.target], total), node)
        return node

    def visit_IfExp(self, node):
        """a if c else b, b if not c else a"""
        self.generic_visit(node)
        if self.wanted(node, "choice"):
            node.test = negated(node.test)
            node.body, node.orelse = node.orelse, node.body
        return node

    def visit_If(self, node):
        self.generic_visit(node)
        plain = node.orelse and not isinstance(node.orelse[0], ast.If)
        if plain and not isinstance(node.body[0], ast.If) and self.wanted(node, "branches"):
            node.test = negated(node.test)
            node.body, node.orelse = node.orelse, node.body
        node.body = self.statements(node.body)
        node.orelse = self.statements(node.orelse)
        return node

    def visit_Call(self, node):
        """x.exp(), torch.exp(x)"""
        self.generic_visit(node)
        function = node.func
        known = isinstance(function, ast.Attribute) and function.attr in BOTH_WAYS
        if not known or not self.has_torch or not self.wanted(node, "method"):
            return node
        owner = function.value
        if not isinstance(owner, ast.Name) or owner.id not in ("torch", "math", "np", "F"):
            node.args.insert(0, owner)
            function.value = ast.copy_location(ast.Name("torch", ast.Load()), owner)
        elif owner.id == "torch" and not isinstance(node.args[0], ast.Starred):
            function.value = node.args.pop(0)
        return node

    def visit_FunctionDef(self, node):
        self.generic_visit(node)
        node.body = self.statements(node.body)
        return node

    visit_For = visit_With = visit_FunctionDef

    def statements(self, body):
        """A step may get a line of its own: y = f(g(x)); return y."""
        result = []
        for statement in body:
            value = getattr(statement, "value", None)
            if isinstance(statement, ast.Return) and isinstance(value, NAMED):
                if self.wanted(statement, "return"):
                    result.append(self.named(value, "answer", "outcome"))
                    statement.value = self.load(result[-1], value)
            inner = first_argument(statement)
            if inner is not None and self.wanted(statement, "inner"):
                result.append(self.named(inner, "inner", "piece"))
                statement.value.args[0] = self.load(result[-1], inner)
            elif is_pair(statement) and self.wanted(statement, "pair"):
                result.append(self.named(statement.value.elts[0], "one", "left"))
                statement.value.elts[0] = self.load(result[-1], statement)
            result.append(statement)
        return result

    def named(self, value, *names):
        target = ast.Name(self.free(*names), ast.Store())
        return ast.copy_location(ast.Assign([target], value), value)

    def load(self, assignment, like):
        name = ast.Name(assignment.targets[0].id, ast.Load())
        return ast.copy_location(name, like)


def negated(test):
    kind = type(test.ops[0]) if isinstance(test, ast.Compare) else None
    if kind in NEGATED and len(test.ops) == 1:
        new = ast.Compare(test.left, [NEGATED[kind]()], test.comparators)
    elif isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return test.operand
    else:
        new = ast.UnaryOp(ast.Not(), test)
    return ast.copy_location(new, test)


def is_pair(statement):
    """a, b = f(x), ...; return f(x), ...: what comes first may be evaluated before."""
    value = getattr(statement, "value", None)
    if not isinstance(statement, (ast.Assign, ast.Return)) or not isinstance(value, ast.Tuple):
        return False
    return bool(value.elts) and isinstance(value.elts[0], SIMPLE)


def first_argument(statement):
    """What `x = f(g(...), ...)` evaluates before all else: g(...). None: there is no such."""
    if not isinstance(statement, (ast.Assign, ast.Expr, ast.Return)):
        return None
    call = statement.value
    if not isinstance(call, ast.Call) or not call.args:
        return None
    calls_before = [node for node in ast.walk(call.func) if isinstance(node, ast.Call)]
    inner = call.args[0]
    return inner if isinstance(inner, SIMPLE) and not calls_before else None


# ---- text


def pretty(node):
    """Source text with lines of at most WIDTH columns, where they can be broken."""
    plain = ast.unparse(node)
    lines = []
    for line in plain.splitlines():
        begins = line.strip().startswith(
            ("for ", "while ", "with ", "if ", "try:", "def ", "@")
        )
        if begins and lines and lines[-1] and not lines[-1].endswith(":"):
            if not lines[-1].strip().startswith("@"):
                lines.append("")
        lines += broken(line)
    text = "\n".join(lines)
    same = ast.dump(ast.parse(text)) == ast.dump(ast.parse(plain))
    return text if same else plain


def broken(line):
    """A line, or several: what stands in its longest brackets moves to lines of its own."""
    if len(line) <= WIDTH:
        return [line]
    pairs = outer_brackets(line)
    if not pairs:
        return [line]
    begin, end, commas = max(pairs, key=lambda pair: pair[1] - pair[0])
    if end - begin < 2:
        return [line]
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    inside = indent + line[begin + 1 : end].strip()
    pieces = [inside]
    if len(inside) > WIDTH and commas:
        edges = [begin, *commas, end - 1]
        pairs = zip(edges, edges[1:])
        pieces = [indent + line[left + 1 : right + 1].strip() for left, right in pairs]
    result = [line[: begin + 1]]
    for piece in pieces:
        result += broken(piece) if piece != line else [piece]
    return [*result, indent[:-4] + line[end:]]


def outer_brackets(line):
    """(begin, end, its commas) of each pair of brackets that stands in no other."""
    pairs, depth, quote, begin, commas = [], 0, "", 0, []
    escaped = False
    for i, sign in enumerate(line):
        if quote:
            if sign == quote and not escaped:
                quote = ""
            escaped = sign == "\\" and not escaped
        elif sign in "'\"":
            quote = sign
        elif sign in "([{":
            if depth == 0:
                begin, commas = i, []
            depth += 1
        elif sign in ")]}":
            depth -= 1
            if depth == 0:
                pairs.append((begin, i, commas))
        elif sign == "," and depth == 1:
            commas.append(i)
    return pairs
