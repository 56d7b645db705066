"""The pictures of train.ipynb, and what it needs to show sources, texts, tokens and alt texts.

Nothing is computed here that belongs to the method: each function draws what it is given. Colours
are those of emprl.py's own plots: blue for MLE, orange-red for EmpRL, pink for the identifiers'
opinion, grey for people and for the truth.
"""

import ast
import inspect
import textwrap

import matplotlib.pyplot as plt
import sentencepiece
import torch
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter

import emprl
import ppo
from data import MECHANISMS

MLE, BEST_OF_N, EMPRL, HUMAN = (
    emprl.COLOURS[who] for who in ("mle", "best_of_n", "emprl", "human")
)
PINK = "#CC79A7"  # the identifiers, as in emprl.draw_learnt_vs_truth
PURPLE = "#542788"
WIDTH = 7.8  # inches; at 100 dots an inch the width of a page on GitHub
COLUMNS = 95  # of a line of text on that page


def use_style():
    """Sizes that can be read where a page is 780 pixels wide."""
    plt.rcParams["figure.figsize"] = (WIDTH, 3.0)
    plt.rcParams["figure.dpi"] = 100
    plt.rcParams["figure.constrained_layout.use"] = True
    plt.rcParams["figure.constrained_layout.w_pad"] = 0.08  # a label keeps off its neighbour
    plt.rcParams["font.size"] = 10


def show(figure, alt):
    """Show a figure with a text for people who cannot see it.

    In Jupyter the text goes into the output's metadata, where screen readers find it. Elsewhere
    it becomes the figure's label, from which tests/lab/notebook.py does the same.
    """
    figure.set_label(alt)
    try:
        from IPython import get_ipython
        from IPython.display import display
    except ImportError:
        return
    if get_ipython() is not None:
        display(figure, metadata={"image/png": {"alt": alt}})
        plt.close(figure)


def show_source(function, docstring=True):
    """Print the source of one of the project's functions, if wanted without its docstring."""
    source = textwrap.dedent(inspect.getsource(function))
    lines = source.splitlines()
    if not docstring:
        text = ast.parse(source).body[0].body[0]
        del lines[text.lineno - 1 : text.end_lineno]
    print("\n".join(lines))


def show_text(line, indent=""):
    """Print a long line, broken between words to fit the page; the indent is for what goes on."""
    print(textwrap.fill(line, COLUMNS, subsequent_indent=indent, break_on_hyphens=False))


def pieces(tokenizer, ids):
    """What each id stands for: "▁" begins a word, <X0>, <X1> ... are sentinels."""
    model = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    found = []
    for i in map(int, ids):
        if i >= tokenizer.num_pieces:
            found.append(f"<X{tokenizer.vocab_size - 1 - i}>")
        else:
            found.append(model.id_to_piece(i))
    return found


def hyphenated(pieces):
    """["▁even", "t", "."] -> ["▁even-", "t", "."]: which pieces have more of their word to come."""
    labels = []
    for piece, following in zip(pieces, [*pieces[1:], ""]):
        goes_on = piece != "▁" and following[:1].isalpha()
        labels.append(f"{piece}-" if goes_on else piece)
    return labels


def numbers(tensor, digits=2):
    """All entries in one line, rounded."""
    return " ".join(f"{x:.{digits}f}" for x in tensor.flatten().tolist())


# ---- reinforcement learning on a table -------------------------------------------------------


def draw_rewards(runs):
    """{title: the rewards of several seeds, step by step}: a panel for each title."""
    figure, axes = plt.subplots(1, len(runs), figsize=(WIDTH, 2.6), sharey=True)
    for axis, (title, seeds) in zip(axes, runs.items()):
        for rewards in seeds:
            axis.plot(rewards, color=EMPRL, alpha=0.7, lw=1)
        axis.set_title(title, fontsize=10)
    axes[0].set_ylabel('reward: how many "you"')
    figure.supxlabel("step", fontsize=10)
    return figure


def draw_gradients(estimates):
    """{label: many estimates of one entry of the gradient}: a histogram for each label."""
    figure, axes = plt.subplots(
        1, len(estimates), figsize=(WIDTH, 2.6), sharex=True, sharey=True
    )
    for axis, (label, numbers) in zip(axes, estimates.items()):
        numbers = torch.tensor(numbers)
        axis.hist(numbers.tolist(), bins=30, range=(-1.5, 1.5), color=EMPRL)
        axis.axvline(numbers.mean(), color="black", ls="--")
        axis.set_title(
            f"{label}: mean {numbers.mean():.2f}, sd {numbers.std():.2f}", fontsize=10
        )
    axes[0].set_ylabel("batches")
    figure.supxlabel('gradient of one entry of the table: "you" after "feel"', fontsize=10)
    return figure


def draw_frontier(path, ends):
    """path: [(KL, reward)] of a run without penalty. ends: {beta: (KL, reward)}."""
    figure, axis = plt.subplots(figsize=(WIDTH, 3.2))
    axis.plot(
        *zip(*path), "o-", ms=3, color=HUMAN, label="beta 0, stopped early, here or there"
    )
    axis.plot(*zip(*ends.values()), "s-", color=EMPRL, label="KL penalty, at its end")
    for beta, place in ends.items():
        left = {"xytext": (-7, -3), "textcoords": "offset points", "ha": "right"}
        axis.annotate(f"beta {beta}", place, fontsize=9, color=EMPRL, **left)
    axis.margins(x=0.13, y=0.1)
    axis.set(xlabel="KL to the start (nats per response)", ylabel='reward: how many "you"')
    axis.legend(loc="lower right")
    return figure


def draw_kl_directions(words, distributions, titles):
    """A panel for each distribution over the words; the first one is the reference."""
    figure, axes = plt.subplots(1, len(distributions), figsize=(WIDTH, 2.6), sharey=True)
    for axis, probs, title in zip(axes, distributions, titles):
        axis.bar(range(len(words)), probs.tolist(), color=HUMAN if axis is axes[0] else EMPRL)
        axis.set_xticks(range(len(words)), words, fontsize=9)
        axis.set_title(title, fontsize=10)
    axes[0].set_ylabel("probability")
    return figure


# ---- the data and the T5 ---------------------------------------------------------------------


def draw_levels(tables):
    """{who: levels (N, M)}: how often each level occurs, a panel for each mechanism."""
    figure, axes = plt.subplots(1, len(MECHANISMS), sharey=True)
    for k, (who, levels) in enumerate(tables.items()):
        for m, axis in enumerate(axes):
            share = torch.bincount(levels[:, m], minlength=3) / len(levels)
            places = [level + 0.4 * k for level in range(3)]
            axis.bar(places, share.tolist(), 0.38, color=("0.7", HUMAN)[k], label=who)
            axis.set(title=MECHANISMS[m].upper(), xlabel="level of the human reply")
            axis.set_xticks([0.2, 1.2, 2.2], range(3))
    axes[0].set_ylabel("share of dialogues")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def box(axis, ends, y, text, colour="white"):
    """A box from ends[0] to ends[1] with a text in it."""
    left, right = ends
    style = {"facecolor": colour, "edgecolor": "black"}
    axis.add_patch(plt.Rectangle((left, y - 0.26), right - left, 0.52, **style))
    axis.text((left + right) / 2, y, text, ha="center", va="center")


def arrow(axis, begin, end, colour="black"):
    style = {"arrowstyle": "-|>", "color": colour, "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", end, begin, arrowprops=style)


def draw_t5(context, reply):
    """Encoder, decoder and cross-attention while the decoder is taught `reply` (lists of str)."""
    figure, axis = plt.subplots(figsize=(WIDTH, 3.8))
    encoder = (-0.45, len(context) - 0.55)
    decoder = (5.35, len(reply) + 5.25)
    for x, word in enumerate(context):
        box(axis, (x - 0.42, x + 0.42), 0, word)
        arrow(axis, (x, 0.26), (x, 0.84))
    for k, (given, written) in enumerate(zip(["<pad>", *reply], reply)):
        x = 5.8 + k
        box(axis, (x - 0.42, x + 0.42), 0, given)
        box(axis, (x - 0.42, x + 0.42), 3.3, written)
        for y in (0, 1.1, 2.2):
            arrow(axis, (x, y + 0.26), (x, y + 0.84))
    box(axis, encoder, 1.1, "encoder: all see all", "#DCE9F5")
    box(axis, decoder, 1.1, "decoder: each sees only its past", "#FBE3D6")
    box(axis, decoder, 2.2, "cross-attention: each sees the encoder", "#FBE3D6")
    arrow(axis, (encoder[1], 1.25), (decoder[0], 2.2), MLE)
    axis.text(sum(encoder) / 2, -0.65, "the context", ha="center")
    below = "given: the human's reply, moved by one"
    axis.text(sum(decoder) / 2, -0.65, below, ha="center")
    axis.text(decoder[0] - 0.1, 3.3, "to predict:", ha="right", va="center")
    axis.set(xlim=(-0.6, decoder[1] + 0.1), ylim=(-0.9, 3.7))
    axis.axis("off")
    return figure


def draw_buckets(encoder, decoder):
    """Two tables of buckets (T, T), each with a colour bar of its own range."""
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.4))
    titles = "encoder: both directions", "decoder: the past only"
    for axis, buckets, title in zip(axes, (encoder, decoder), titles):
        image = axis.imshow(buckets.numpy(), cmap="viridis")
        axis.set(title=title, xlabel="position of the key", ylabel="position of the query")
        bar = figure.colorbar(image, ax=axis, label=f"bucket, 0 to {buckets.max()}")
        bar.locator = MaxNLocator(integer=True)
        bar.update_ticks()
    return figure


def draw_loss(log):
    """Training and validation loss; the axis is logarithmic, and its labels plain numbers."""
    figure, axis = plt.subplots()
    emprl.curve(axis, log, "loss", color="0.7", lw=0.8, label="training")
    emprl.curve(axis, log, "valid", color="black", marker="o", label="validation")
    axis.set(xlabel="step", ylabel="loss (nats per token)", yscale="log")
    axis.yaxis.set_major_locator(FixedLocator([0.2, 0.3, 0.5, 1, 2, 4, 8]))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.legend()
    return figure


def draw_attention(weights, context, reply):
    """weights (T, S): how much each token of the reply attends to each of the context."""
    figure, axis = plt.subplots(figsize=(WIDTH, 1.6 + 0.2 * len(reply)))
    image = axis.imshow(weights.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axis.set_xticks(range(len(context)), hyphenated(context), rotation=90)
    axis.set_yticks(range(len(reply)), hyphenated(reply))
    axis.set(xlabel="context", ylabel="the token that is written")
    label = "attention weight (black line: the 0.3 of the list below)"
    bar = figure.colorbar(image, label=label, aspect=40)
    bar.ax.axhline(0.3, color="black")
    return figure


# ---- measures and classifiers ----------------------------------------------------------------


def draw_constant(shares, constant, sampled):
    """Weighted F1 of two policies that know only how often each level occurs."""
    figure, axis = plt.subplots()
    axis.plot(shares, constant, color="black", ls=":", label="always the commonest level")
    axis.plot(shares, sampled, color=MLE, label="levels drawn at random, as people have them")
    axis.set(xlabel="share of the commonest level", ylabel="weighted F1", ylim=(0, 1))
    axis.legend()
    return figure


def draw_confusions(figures):
    """What emprl's classifier_figures gives: a table of counts for each mechanism."""
    figure, axes = plt.subplots(1, len(figures), figsize=(WIDTH, 3.3))
    for axis, (name, found) in zip(axes, figures.items()):
        counts = torch.tensor(found["confusion"])  # (L, L)
        axis.imshow(counts.numpy(), cmap="Blues")
        for gold in range(3):
            for predicted in range(3):
                count = int(counts[gold, predicted])
                colour = "white" if count > counts.max() / 2 else "black"
                axis.text(predicted, gold, count, ha="center", va="center", color=colour)
        axis.set_title(f"{name.upper()}: macro-F1 {found['macro_f1']:.2f}", fontsize=10)
        axis.set(xlabel="level predicted", xticks=range(3), yticks=range(3))
    axes[0].set_ylabel("true level")
    return figure


def draw_occlusion(change, reply, levels):
    """change (M, T): of the probability of each mechanism's level, without the tokens around."""
    figure, axis = plt.subplots(figsize=(WIDTH, 2.4))
    image = axis.imshow(change.numpy(), cmap="PuOr", vmin=-1, vmax=1, aspect="auto")
    axis.set_xticks(range(len(reply)), reply, rotation=60)
    names = [f"{m.upper()}: level {k}" for m, k in zip(MECHANISMS, levels)]
    axis.set_yticks(range(3), names)
    figure.colorbar(image, label="change")
    return figure


# ---- PPO -------------------------------------------------------------------------------------


def draw_clipping(eps=0.2):
    """PPO's objective of one token over its ratio, for an advantage of 1 and of -1."""
    ratio = torch.linspace(0.4, 1.6, 241)[:, None]  # (B, 1): each is a reply of one token
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.0))
    for axis, advantage in zip(axes, (1.0, -1.0)):
        a = torch.tensor([[advantage]])
        one = torch.ones(1, 1, dtype=torch.bool)
        losses = [ppo.policy_loss(r[None].log(), 0 * a, a, one, eps)[0] for r in ratio]
        objective = -torch.stack(losses)
        axis.plot(ratio, advantage * ratio, color="0.6", ls="--", label="ratio A, unclipped")
        axis.plot(ratio, objective, color=EMPRL, lw=2, label="PPO's objective")
        axis.axvspan(1 - eps, 1 + eps, color="0.93", zorder=0)
        axis.axvline(1, color="0.6", lw=0.8)
        axis.set_title(f"advantage {advantage:+.0f}", fontsize=10)
        axis.set_xlabel("ratio p / p_old")
    axes[0].set_ylabel("objective (to be maximised)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def draw_passes(share, kl):
    """By passes over one rollout: the share of clipped tokens, and how far the policy went."""
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 2.6))
    passes = range(1, len(share) + 1)
    axes[0].bar(passes, share, color=EMPRL)
    axes[0].set(xlabel="pass over the same rollout", ylabel="share of tokens clipped")
    axes[1].bar(passes, kl, color=EMPRL)
    label = "KL of the update\n(nats per token)"
    axes[1].set(xlabel="pass over the same rollout", ylabel=label)
    for axis in axes:
        axis.set_xticks(passes)
    return figure


def draw_surprises(expected, places):
    """What a reply is expected to earn in all, before each token and at its end."""
    figure, axis = plt.subplots(figsize=(WIDTH, 3.2))
    for t, height in enumerate(expected):
        axis.hlines(height, t - 0.3, t + 0.3, color=EMPRL, lw=3)
    for t in range(len(expected) - 1):
        low, high = expected[t : t + 2]
        arrow(axis, (t + 0.3, low), (t + 0.7, high))
        axis.text(t + 0.55, (low + high) / 2, f"δ = {high - low:.2f}", va="top")
    last = len(expected) - 1 + 0.4
    arrow(axis, (last, expected[0]), (last, expected[-1]), MLE)
    whole = f"A of the first token\n(λ = 1): {expected[-1] - expected[0]:.2f}"
    axis.text(last + 0.05, expected[0], whole, color=MLE)
    axis.set_xticks(range(len(places)), places)
    axis.set(xlim=(-0.5, last + 1), ylabel="expected in all")
    return figure


def draw_bias_and_spread(lambdas, bias, spread):
    figure, axis = plt.subplots()
    axis.plot(lambdas, bias, "o-", color=PINK, label="bias: how wrong on average")
    axis.plot(lambdas, spread, "s-", color=MLE, label="spread: standard deviation")
    axis.set(xlabel="lambda", ylabel="points")
    axis.legend()
    return figure


def draw_strip(rows, tokens, title):
    """{name: (T,)}: a line for each token, a column for each quantity; numbers below 0.005 in
    size are left out. Colours compare within a column."""
    table = torch.stack(list(rows.values()), 1)  # (T, columns)
    shade = table / table.abs().amax(0, keepdim=True).clamp(min=1e-6)
    figure, axis = plt.subplots(figsize=(WIDTH, 1.2 + 0.26 * len(tokens)))
    image = axis.imshow(shade.numpy(), cmap="PuOr", vmin=-1, vmax=1, aspect="auto")
    for t in range(len(tokens)):
        for column in range(len(rows)):
            if table[t, column].abs() >= 0.005:
                colour = "white" if shade[t, column].abs() > 0.6 else "black"
                text = f"{table[t, column]:.2f}"
                axis.text(column, t, text, ha="center", va="center", color=colour)
    axis.set_xticks(range(len(rows)), rows)
    axis.xaxis.tick_top()
    axis.set_yticks(range(len(tokens)), tokens)
    axis.set_xlabel(title)
    bar = figure.colorbar(image, label="share of the column's\nlargest number in size")
    bar.set_ticks([-1, 0, 1])
    return figure


def draw_lambdas(advantages, tokens):
    """{lambda: (T,)}: the advantages of one reply."""
    figure, axis = plt.subplots(figsize=(WIDTH, 3.2))
    styles = (EMPRL, "o-"), (PINK, "s-"), (HUMAN, "^-")
    for (lam, values), (colour, marker) in zip(advantages.items(), styles):
        axis.plot(values.tolist(), marker, ms=4, color=colour, label=f"lambda {lam}")
    axis.axhline(0, color="0.8", zorder=0)
    axis.set_xticks(range(len(tokens)), tokens, rotation=60)
    axis.set_ylabel("advantage")
    axis.legend()
    return figure


def draw_ratios(ratio, advantages):
    """Two histograms of log2 of the ratios (tokens,), by the sign of the advantage.

    Each is of shares of its own tokens, so that the two lines compare.
    """
    logs = ratio.log2().clamp(-1, 1)
    good = advantages > 0
    figure, axis = plt.subplots()
    groups = (logs[good], "above", PURPLE, "-"), (logs[~good], "below", "black", "--")
    for group, side, colour, line in groups:
        share = torch.histc(group, bins=21, min=-1, max=1) / max(len(group), 1)
        edges = torch.linspace(-1, 1, 22).tolist()
        label = f"advantage {side} 0"
        axis.stairs(share.tolist(), edges, color=colour, ls=line, lw=1.8, label=label)
    axis.axvline(0, color="0.8", zorder=0)
    axis.set(xlabel="log2 of the ratio after the update (beyond ±1: outermost bins)")
    axis.set(ylabel="share of these tokens", yscale="log")
    axis.legend()
    return figure


def draw_curves(logs, panels):
    """{name: log of PPO}, {key: label}: a panel for each key, a line for each run."""
    figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 2.8))
    styles = ("-", EMPRL), ("--", "black"), ("-.", "#56B4E9"), (":", "#E69F00")
    for axis, (key, label) in zip(axes, panels.items()):
        for (name, log), (line, colour) in zip(logs.items(), styles):
            emprl.curve(axis, log, key, color=colour, ls=line, label=name)
        axis.set(xlabel="PPO iteration", ylabel=label)
    if len(logs) > 1:
        handles = axes[0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside upper center", ncols=len(logs))
    return figure


def draw_opinion_and_truth(logs):
    """{title: log of PPO}: all three levels right, by the identifiers and by the oracle."""
    figure, axes = plt.subplots(1, len(logs), figsize=(WIDTH, 2.8), sharey=True)
    for axis, (title, log) in zip(axes, logs.items()):
        points = [{"step": -1, **log[0]["start"]}, *log]
        lines = ("exact_match", PINK, "identifiers"), ("oracle_exact_match", HUMAN, "oracle")
        for name, colour, label in lines:
            emprl.curve(
                axis, points, f"valid_{name}", color=colour, marker="o", ms=3, label=label
            )
        axis.set_title(title, fontsize=10)
    axes[0].set(ylabel="all three levels right", ylim=(0, None))
    axes[0].legend(fontsize=9)
    figure.supxlabel("PPO iteration", fontsize=10)
    return figure
