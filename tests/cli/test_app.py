"""Help answers at once; a slip of the pen is a usage error."""

import importlib.metadata
import subprocess
import sys


def test_help_imports_no_heavy_library():
    code = (
        "import sys; sys.argv = ['lorakit', '--help']\n"
        "from lorakit.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch','transformers','datasets','peft','trl'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip().endswith("[]")
    for command in (
        "demo",
        "train",
        "eval",
        "chat",
        "export",
        "serve",
        "inspect",
        "bench",
        "schema",
    ):
        assert f"  {command}" in done.stdout


def test_the_version_is_told(lorakit):
    code, said, _ = lorakit("--version")
    assert (code, said) == (0, f"lorakit {importlib.metadata.version('lorakit')}\n")


def test_unknown_command_and_flag_are_usage_errors(lorakit):
    assert lorakit("tarin")[0] == 2
    assert lorakit("train", "--nope")[0] == 2
