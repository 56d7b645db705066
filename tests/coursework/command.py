"""How the commands of the course begin."""

import argparse


def make_parser(name, description):
    """Of `python -m tests.coursework.NAME`; its description is the script's docstring."""
    return argparse.ArgumentParser(
        prog=f"python -m tests.coursework.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
