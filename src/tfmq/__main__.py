"""Run the command line as `python -m tfmq`."""

from tfmq.cli.app import main

if __name__ == "__main__":
    main()
