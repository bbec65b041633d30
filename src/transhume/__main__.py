"""`python -m transhume` is the command `transhume`."""

from transhume.cli.main import run

if __name__ == "__main__":
    run()
