"""torchrun whose failure is the failed process's own message and exit code, not a report on it."""

from __future__ import annotations

import logging
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
try:
    main()
except SignalException as stopped:
    print("interrupted", file=sys.stderr)
    sys.exit(128 + stopped.sigval.value)
except ChildFailedError as error:
    rank, failure = error.get_first_failure()
    if failure.exitcode < 0:  # killed: it had no chance to say anything itself
        print(f"error: rank {rank} was killed by signal {-failure.exitcode}", file=sys.stderr)
        sys.exit(128 - failure.exitcode)
    sys.exit(failure.exitcode)
