"""Entry point of the `egmla` command, installed as the package `egmla_command`.

It is no part of the package `egmla`, though its folder lies there: importing `egmla` loads PyTorch and Transformers,
which takes seconds. While `starting` is true the package leaves that to the command that runs, so help and completion
answer at once.
"""

starting = False


def main() -> None:
    """Run the command line."""
    global starting
    starting = True
    from egmla.commands import main

    main()
