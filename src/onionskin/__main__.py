"""``python -m onionskin`` is the command line too."""

from onionskin.cli import main

if __name__ == "__main__":
    main()
