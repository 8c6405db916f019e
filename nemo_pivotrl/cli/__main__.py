"""`python -m nemo_pivotrl.cli`, which is what torchrun starts."""

from nemo_pivotrl.cli import command

if __name__ == "__main__":
    command()
