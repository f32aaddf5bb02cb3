import subprocess
import sys


def test_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "ranvier", "--help"], capture_output=True, text=True, check=True)
    assert "usage: ranvier" in done.stdout
