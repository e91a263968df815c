"""torchrun that fails with the failed process's own message and exit code, not a report on it.

It passes SIGUSR1 on as it does SIGTERM, gives the processes time to save a checkpoint then, and
restarts them (--max_restarts) only where a restart can help.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from types import FrameType
from typing import Any

from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher import api
from torch.distributed.run import main

# A user's mistake, Ctrl-C, and stopped on request with all saved: see dbae.cli.run.
_FINAL_EXIT_CODES = (2, 130, 143)


class _Agent(LocalElasticAgent):
    def _monitor_workers(self, worker_group: Any) -> Any:
        result = super()._monitor_workers(worker_group)
        if result.is_failed() and self._remaining_restarts > 0:
            rank, failure = min(result.failures.items(), key=lambda item: item[1].timestamp)
            if failure.exitcode in _FINAL_EXIT_CODES:
                self._remaining_restarts = 0
            else:
                most = worker_group.spec.max_restarts
                number = most - self._remaining_restarts + 1
                _say(f"{_describe(rank, failure)}; restart {number} of {most}")
        return result


def _describe(rank: int, failure: ProcessFailure) -> str:
    if failure.exitcode < 0:
        return f"rank {rank} was killed by signal {-failure.exitcode}"
    return f"rank {rank} ended with exit code {failure.exitcode}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _stop(number: int, frame: FrameType | None) -> None:
    raise SignalException("stopped", signal.Signals(number))


logging.disable(logging.ERROR)
# Seconds until SIGKILL. torch's own are 30, too few for a large checkpoint on a slow disk.
os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "300")
signal.signal(signal.SIGUSR1, _stop)
api.LocalElasticAgent = _Agent  # type: ignore[misc]  # torchrun has no option for it
try:
    main()
except SignalException as stopped:
    sys.exit(130 if stopped.sigval == signal.SIGINT else 143)
except ChildFailedError as error:
    rank, failure = error.get_first_failure()
    if failure.exitcode < 0:  # it had no chance to say anything itself
        _say(f"error: {_describe(rank, failure)}")
        sys.exit(128 - failure.exitcode)
    sys.exit(failure.exitcode)
except RuntimeError as error:
    if "EADDRINUSE" not in str(error):
        raise
    port = re.search(r"port: (\d+)", str(error))
    _say(
        f"error: port {port[1] if port else ''} of this machine, where the processes are to meet, "
        "is in use: choose another with --master_port (the launchers: MASTER_PORT)"
    )
    sys.exit(2)
