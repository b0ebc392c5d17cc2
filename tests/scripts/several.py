"""Runs trainers one after the other in the same processes, since TensorFlow takes longer to start than they take.

python several.py "train_keras --epochs 1" "train_tf --epochs 1"
"""

import importlib
import shlex
import sys
from pathlib import Path

if __name__ == "__main__":
    command_lines = sys.argv[1:]
    sys.path[0] = str(Path(__file__).resolve().parents[2] / "scripts")  # as if they were started by themselves
    for command_line in command_lines:
        name, *arguments = shlex.split(command_line)
        sys.argv = [f"{name}.py", *arguments]  # messages begin with it
        try:
            importlib.import_module(name).main(arguments)
        except SystemExit as error:
            print(f"{name}.py exits: {error}", flush=True)
