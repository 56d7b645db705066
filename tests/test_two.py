"""Two processes that share the tests tell what one would tell."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = {
    "conftest.py": 'pytest_plugins = ["tests.two"]\n',
    "test_one.py": """
        import os, time, warnings
        from pathlib import Path
        import pytest

        @pytest.mark.parametrize("i", range(8))
        def test_many(i, capfd, record_property):
            os.system(f"echo {i}")
            assert capfd.readouterr().out == f"{i}\\n"
            Path(f"{os.getpid()}.pid").touch()
            time.sleep(0.05)
            if i == 3:
                warnings.warn("take care")

        @pytest.mark.skip(reason="not today")
        def test_skipped():
            pass
        """,
    "test_two.py": """
        import os
        import pytest

        @pytest.fixture
        def broken():
            raise ValueError("in a fixture")

        @pytest.mark.parametrize("i", range(4))
        def test_fails(i):
            print(f"printed by {i}")
            assert i != 2

        def test_error(broken):
            pass

        def test_last():
            if "DIE" in os.environ:
                os._exit(7)
        """,
}


@pytest.fixture
def tell(tmp_path):
    """tell(option, ...) -> exit code and lines of pytest on two small files."""
    for name, text in FILES.items():
        text = re.sub("^        ", "", text, flags=re.M)
        (tmp_path / name).write_text(text, encoding="utf-8")

    def start(*options, **more):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **more}
        environment.pop("PYTEST_CURRENT_TEST", None)  # which says: a test runs pytest
        line = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options]
        done = subprocess.run(
            line, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, encoding="utf-8"
        )
        return done.returncode, done.stdout.splitlines()

    return start


def what_is_told(lines):
    """The lines in any order, but for the dots and the seconds."""
    told = [line for line in lines if not re.match(r"[.FEs]+ +\[100%\]", line)]
    return sorted(re.sub(r" in [\d.]+s", "", line) for line in told)


@pytest.mark.skipif(sys.platform != "linux" or os.cpu_count() < 2, reason="one process")
def test_two_processes_tell_what_one_does(tell, tmp_path):
    code, lines = tell("-q", "-rA", "--processes", "2")
    assert code == 1
    assert len([*tmp_path.glob("*.pid")]) == 2, "both had some"
    assert "1 failed, 12 passed, 1 skipped, 1 warning, 1 error" in lines[-1]
    _, expected = tell("-q", "-rA", "--processes", "1")
    assert what_is_told(lines) == what_is_told(expected)


def test_x_stops_both_processes(tell):
    code, lines = tell("-x", "-q")
    assert code == 1
    assert re.search("1 (failed|error)", lines[-1]) and "12 passed" not in lines[-1]


@pytest.mark.skipif(sys.platform != "linux" or os.cpu_count() < 2, reason="one process")
def test_a_second_process_that_dies_is_no_success(tell):
    code, lines = tell("-q", DIE="1")
    assert code == 2
    assert any("the second process ended with 7" in line for line in lines)


def test_one_file_is_not_shared(tell, tmp_path):
    code, _ = tell("-q", "test_one.py")
    assert code == 0
    assert len([*tmp_path.glob("*.pid")]) == 1
