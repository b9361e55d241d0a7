"""`python -m wanflow`: the same as the `wanflow` command, for launchers such as torchrun."""

from wanflow.cli import entry

if __name__ == "__main__":
    entry()
