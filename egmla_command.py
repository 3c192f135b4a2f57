"""Entry point of the `egmla` command.

This module stands outside the package: importing the package loads PyTorch and Transformers, which takes seconds.
While `starting` is true the package leaves that to the command that runs, so help and completion answer at once.
"""

starting = False


def main() -> None:
    """Run the command line."""
    global starting
    starting = True
    from egmla.commands import main

    main()
