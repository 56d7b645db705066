"""The blind rating: its two statistics by hand, and whole sessions with scripted raters."""

import builtins
import io
import json
import re
import runpy
import sys

import pytest

import emprl
import rate
from data import DataError

QUESTIONS = ("empathy", "relevance", "fluency")


def write(folder, number, changed=""):
    """A responses.jsonl of `number` contexts with two different responses, and one with the same response twice."""
    records = [
        {
            "id": f"test/{i}",
            "context": [f"Hello {i}.", "Oh?", "My dog\x1b[1m is sick \U0001f436 \ud800."],
            "target": "I see.",
            "responses": {
                "sft": f"flat {i}{changed}",
                "best_of_n": "unused",
                "emprl": f"{'warm' if i else 'flat'} {i}{changed}",
            },
            "levels": {"target": [0, 1, 2]},
        }
        for i in range(number + 1)
    ]
    (folder / "responses.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in records), encoding="utf-8"
    )


class Rater:
    """In input's place: `prefer(A, B)` to each question, and `stop` after `patience` questions."""

    def __init__(self, monkeypatch, capsys, prefer, patience=1000, stop=""):
        self.prefer, self.patience, self.stop, self.capsys = prefer, patience, stop, capsys
        self.read, self.pairs = (
            "",
            [],
        )  # all that was shown before the table, and the (A, B) of each question
        monkeypatch.setattr(builtins, "input", self.answer)

    def answer(self, prompt):
        self.read += self.capsys.readouterr().out + prompt + "\n"
        if not self.patience:
            if self.stop:
                raise self.stop
            return self.stop
        self.patience -= 1
        self.pairs.append(re.findall(r"^A: (.*)\nB: (.*)$", self.read, re.M)[-1])
        return self.prefer(*self.pairs[-1])

    def rate(self, folder, name, **options):
        """{question: the table's figures}, and the number of raters."""
        rate.main(folder, name, **options)
        out = self.capsys.readouterr().out
        assert f"answers in {folder}/ratings-{name}.jsonl" in out
        head, *rows = out.partition("\nraters: ")[2].splitlines()
        assert [row.split()[0] for row in rows] == [*QUESTIONS]
        return {
            **{row.split()[0]: row.split()[1:] for row in rows},
            "raters": int(head.split()[0]),
        }


def warm(a, b):
    return "a" if "warm" in a else "b"


def flat(a, b):
    return "b" if "warm" in a else "a"


def figures(*row):
    return dict.fromkeys(QUESTIONS, [*row])


# ---- the statistics


@pytest.mark.parametrize(
    "wins, losses, p",
    [
        (0, 0, 1),
        (1, 0, 1),
        (1, 1, 1),
        (5, 0, 2 / 32),
        (4, 1, 2 * (1 + 5) / 32),
        (8, 2, 2 * (1 + 10 + 45) / 1024),
        (3, 3, 1),
        (2000, 0, 0),
    ],
)
def test_sign_test_by_hand(wins, losses, p):
    assert (
        rate.sign_test(wins, losses)
        == pytest.approx(p, abs=1e-12)
        == rate.sign_test(losses, wins)
    )


@pytest.mark.parametrize(
    "a, b, expected",
    [
        ([1, 1, 0, -1], [1, 1, 0, -1], 1),
        ([1, -1], [-1, 1], -1),  # p_o 0, p_e 1/2
        ([1, 1, -1, -1], [1, -1, 1, -1], 0),  # p_o 1/2, p_e 1/2
        (
            [1] * 25 + [0] * 25,
            [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15,
            0.4,
        ),  # p_o 35/50, p_e (25 * 30 + 25 * 20) / 2500
        (
            [1, 1, 0, -1, 0],
            [1, 0, 0, -1, -1],
            7 / 17,
        ),  # p_o 3/5, p_e (2 * 1 + 2 * 2 + 1 * 2) / 25
        ([1, 1], [1, 1], None),
        ([], [], None),
    ],
)  # they can not but agree; nothing in common
def test_kappa_by_hand(a, b, expected):
    assert (
        rate.kappa(a, b)
        == (expected if expected is None else pytest.approx(expected))
        == rate.kappa(b, a)
    )


# ---- sessions


def test_who_prefers_one_system_is_counted_for_it_whatever_the_order(
    tmp_path, monkeypatch, capsys
):
    write(tmp_path, 12)
    rater = Rater(monkeypatch, capsys, warm)
    assert rater.rate(tmp_path, "ann") == {
        **figures("12", "0", "0", "0.000", "-", "-"),
        "raters": 1,
    }
    assert len(rater.pairs) == 36 and len({a[:4] for a, _ in rater.pairs}) == 2, (
        "A is now the one, now the other"
    )
    assert not any("0" in a.split() for a, _ in rater.pairs), (
        "the same response twice is not asked about"
    )
    assert not re.search("sft|emprl|mle|unused", rater.read, re.I), "blind"
    assert (
        rater.read.count("My dog\x1b[1m is sick \U0001f436 ?.") == 12
        and "12 of 12" in rater.read
    )
    rater = Rater(monkeypatch, capsys, flat)
    assert rater.rate(tmp_path, "bob") == {
        **figures("0", "0", "12", "1.000", "0.00", "0.00"),
        "raters": 2,
    }
    (tmp_path / "ratings-bob.jsonl").unlink()
    assert Rater(monkeypatch, capsys, warm).rate(tmp_path, "cy")["empathy"][3:] == [
        "0.000",
        "1.00",
        "-",
    ], "no kappa without variety"


def test_all_raters_see_the_same_draw_each_in_an_order_of_his_own(
    tmp_path, monkeypatch, capsys
):
    write(tmp_path, 40)
    pairs = {}
    for name in ("ann", "bob"):
        rater = Rater(monkeypatch, capsys, warm)
        rater.rate(tmp_path, name)
        pairs[name] = rater.pairs[::3]
    assert len(pairs["ann"]) == 30 and [{*p} for p in pairs["ann"]] == [
        {*p} for p in pairs["bob"]
    ]
    assert 5 < sum(a == b for a, b in zip(*pairs.values())) < 25
    rater = Rater(monkeypatch, capsys, warm)
    rater.rate(tmp_path, "cy", seed=1)
    assert {frozenset(p) for p in rater.pairs} != {frozenset(p) for p in pairs["ann"]}


@pytest.mark.parametrize("stop", ["", EOFError, KeyboardInterrupt])
def test_stopped_at_any_question_it_goes_on_there(tmp_path, monkeypatch, capsys, stop):
    write(tmp_path, 3)
    file, asked = tmp_path / "ratings-ann.jsonl", []
    for patience, whole in ((0, 0), (5, 1), (3, 2), (1, 2), (1000, 3)):
        rater = Rater(monkeypatch, capsys, warm, patience, stop)
        counted = rater.rate(tmp_path, "ann")
        assert counted["fluency"][:3] == [str(whole), "0", "0"] and counted["raters"] == bool(
            whole
        )
        assert len(file.read_text(encoding="utf-8").splitlines()) == whole
        asked.append(rater.pairs)
    assert [len(pairs) for pairs in asked] == [0, 5, 3, 1, 3] and asked[1][3] == asked[2][0], (
        "a half answered item is asked again"
    )
    Rater(monkeypatch, capsys, lambda *_: pytest.fail("asked again")).rate(tmp_path, "ann")


def test_a_content_note_comes_before_the_first_text(tmp_path, monkeypatch, capsys):
    write(tmp_path, 3)
    rater = Rater(monkeypatch, capsys, warm, patience=1)
    rater.rate(tmp_path, "ann")
    assert rater.read.startswith("Content note: ") and rater.read.count("Content note") == 1
    assert rater.read.index("findahelpline.com") < rater.read.index("1 of 3")


def test_each_item_is_on_disk_at_once(tmp_path, monkeypatch, capsys):
    write(tmp_path, 3)
    lines = []

    def prefer(a, b):
        lines.append(
            len((tmp_path / "ratings-ann.jsonl").read_text(encoding="utf-8").splitlines())
        )
        return "a"

    Rater(monkeypatch, capsys, prefer).rate(tmp_path, "ann")
    assert lines == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_anything_but_a_b_t_is_asked_again(tmp_path, monkeypatch, capsys):
    write(tmp_path, 1)
    said = iter(["ab", "?", " T ", "1", "t", "T"])
    rater = Rater(monkeypatch, capsys, lambda *_: next(said))
    assert (
        rater.rate(tmp_path, "ann")
        == {**figures("0", "0", "1", "1.000", "-", "-"), "raters": 1}
        and len(rater.pairs) == 6
    )


def test_table_of_three_raters_by_hand(tmp_path, monkeypatch, capsys):
    write(tmp_path, 4)
    for name, tastes in (
        ("ann", [warm, warm, warm, flat]),
        ("bob", [warm, warm, flat, flat]),
        ("cy", [warm, flat]),
    ):
        script = iter([prefer for prefer in tastes for _ in QUESTIONS])
        counted = Rater(
            monkeypatch, capsys, lambda a, b: next(script)(a, b), 3 * len(tastes)
        ).rate(tmp_path, name)
    # Items: 3:0, 2:1, 1:1, 0:2. Equal: ann and bob 3 of 4, ann and cy 1 of 2, bob and cy 1 of 2.
    # Kappas: ann and bob (3/4 - (3 * 2 + 1 * 2) / 16) / (1 - 8/16) = 1/2; with cy (1/2 - 2/4) / (1 - 2/4) = 0 twice.
    assert counted == {**figures("2", "1", "1", "1.000", "0.62", "0.17"), "raters": 3}


def test_ratings_of_other_responses_do_not_count(tmp_path, monkeypatch, capsys):
    write(tmp_path, 3)
    Rater(monkeypatch, capsys, warm).rate(tmp_path, "ann")
    write(tmp_path, 3, changed=" after another training")
    assert Rater(monkeypatch, capsys, warm, patience=0).rate(tmp_path, "bob")["raters"] == 0
    assert Rater(monkeypatch, capsys, flat).rate(tmp_path, "ann") == {
        **figures("0", "3", "0", "0.250", "-", "-"),
        "raters": 1,
    }


def test_the_name_can_not_leave_the_folder(tmp_path, monkeypatch, capsys):
    write(tmp_path, 1)
    monkeypatch.setattr(rate.getpass, "getuser", lambda: "login name")
    for name in ("../Zoë/\0", ""):
        monkeypatch.setattr(builtins, "input", lambda _: "a")
        rate.main(tmp_path, name)
    assert {p.name for p in tmp_path.iterdir()} == {
        "responses.jsonl",
        "ratings-..%2FZoë%2F%00.jsonl",
        "ratings-login%20name.jsonl",
    }


@pytest.mark.parametrize(
    "file, text, line",
    [
        ("responses.jsonl", None, ""),
        ("responses.jsonl", '\n{"id": "x"', ":2"),
        ("responses.jsonl", "[]", ":1"),
        ("responses.jsonl", '{"id": "x", "context": ["Hi"], "responses": {"sft": "a"}}', ":1"),
        ("responses.jsonl", "\xff", ":1"),
        (
            "ratings-ann.jsonl",
            '{"item": "x", "empathy": 1, "relevance": 0, "fluency": -1}\n{"item": "x", "empa',
            ":2",
        ),
        (
            "ratings-ann.jsonl",
            '{"item": "x", "empathy": 2, "relevance": 0, "fluency": 0}',
            ":1",
        ),
        ("ratings-bob.jsonl", '{"item": "x", "empathy": 1}', ":1"),
    ],
)
def test_missing_and_damaged_files_are_one_line(
    tmp_path, monkeypatch, capsys, file, text, line
):
    write(tmp_path, 1)
    (tmp_path / file).unlink(missing_ok=True)
    if text:
        (tmp_path / file).write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError) as error:
        Rater(monkeypatch, capsys, warm, patience=0).rate(tmp_path, "ann")
    assert str(error.value).startswith(f"{tmp_path / file}{line}: ") and "\n" not in str(
        error.value
    )


def test_as_a_program(tmp_path, monkeypatch, capsys):
    write(tmp_path, 2)
    monkeypatch.setattr(sys, "tracebacklimit", 1000, raising=False)
    monkeypatch.setattr(sys, "argv", ["rate.py", str(tmp_path), "ann"])
    monkeypatch.setattr(builtins, "input", lambda _: "t")
    runpy.run_path(rate.__file__, run_name="__main__")
    assert "raters: 1" in capsys.readouterr().out and (tmp_path / "ratings-ann.jsonl").exists()


def test_answers_that_are_not_text(tmp_path, monkeypatch, capsys):
    """A key that types what is not UTF-8 is asked again, not a traceback."""
    write(tmp_path, 1)
    answers = b"\xff\xfe\na\nb\nt\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(answers), encoding="utf-8"))
    rate.main(tmp_path, "ANNE")
    assert len((tmp_path / "ratings-ANNE.jsonl").read_text(encoding="utf-8").splitlines()) == 1


@pytest.mark.parametrize("error", [KeyError("uid not found"), OSError("No username set")])
def test_a_system_without_names_asks_for_one(error, tmp_path, monkeypatch, capsys):
    """As in a container whose user has no entry in passwd."""
    write(tmp_path, 1)

    def nobody():
        raise error

    monkeypatch.setattr(rate.getpass, "getuser", nobody)
    assert emprl.main(["rate", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"rate {tmp_path} NAME" in err, err
