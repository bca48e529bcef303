"""``python -m deltakd <command> ...`` is the console script where that is not installed."""

from deltakd.cli import main

if __name__ == "__main__":
    main()
