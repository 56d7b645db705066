"""What all tests share: one thread, and a comparison that says what was expected and what came."""

import pytest
import torch

pytest_plugins = ["tests.coursework.grade"]  # the option --impl, which grades a student's file

# The tests' models are too small for more, which on a busy machine is far slower.
torch.set_num_threads(1)


def check(what, got, expected, tol=1e-5):
    """got is expected (numbers, lists or tensors) to tol; otherwise fails saying what was expected and got."""
    got, expected = (
        x.detach() if torch.is_tensor(x) else torch.tensor(x) for x in (got, expected)
    )
    if got.shape != expected.shape:
        pytest.fail(
            f"{what}\n  expected shape {tuple(expected.shape)}\n  got      {tuple(got.shape)}",
            pytrace=False,
        )
    got, expected = got.double(), expected.double()
    wrong = ~torch.isclose(got, expected, rtol=tol, atol=tol)
    if wrong.any() and got.numel() > 100:  # too many to read: only those that differ
        what, got, expected = (
            f"{what} ({wrong.sum()} of {wrong.numel()} differ)",
            got[wrong][:20],
            expected[wrong][:20],
        )
    if wrong.any():
        pytest.fail(
            f"{what}\n  expected {expected.tolist()}\n  got      {got.tolist()}", pytrace=False
        )
