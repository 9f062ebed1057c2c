"""The commands, one file each: ``python -m experiments.sweep``, or ``specmd sweep``."""

import sys

if sys.argv[:1] == ["-m"]:  # Python is about to run one of them: an interrupt meanwhile ends as it does later

    def _end(kind, error, trace):
        if not issubclass(kind, KeyboardInterrupt):
            return sys.__excepthook__(kind, error, trace)
        print("error: interrupted", file=sys.stderr)
        raise SystemExit(130)

    sys.excepthook = _end
