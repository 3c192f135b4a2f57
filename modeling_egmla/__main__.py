"""`python -m egmla`, the same as the `egmla` command."""

from .commands import main


if __name__ == "__main__":
    main()
