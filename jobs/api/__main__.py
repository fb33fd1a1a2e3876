"""`python -m blocksight` is the same as `blocksight`."""

from blocksight.jobs.cli.main import main

if __name__ == "__main__":
    main()
