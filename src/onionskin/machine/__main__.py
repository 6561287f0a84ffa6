"""Run the supervisor of a machine: `python -m onionskin.machine`, as `onionskin.machine.daemon` starts it."""

import sys

from onionskin.machine.daemon import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
