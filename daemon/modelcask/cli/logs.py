"""How the service's log is written: text for people and journald, JSON for machines."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from typing import Literal

from modelcask.errors import printable

LogFormat = Literal["text", "json"]

# What every record has; anything else was given by `extra`.
_OWN = frozenset(logging.makeLogRecord({}).__dict__) | {"message"}
# syslog's priorities, as journald reads them off the beginning of a line (sd-daemon(3)).
_PRIORITIES = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}


def log_to_stderr(log_format: LogFormat) -> None:
    """Write the logs to stderr: one line each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if log_format == "json" else _Journal() if _is_journal() else _Text())
    logging.basicConfig(level=logging.INFO, handlers=[handler])


class _Text(logging.Formatter):
    """`modelcask: what happened`, safe for a terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return f"modelcask: {printable(record.getMessage())}"


class _Journal(logging.Formatter):
    """The message after its priority; journald adds the rest."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return f"<{_PRIORITIES.get(record.levelno, 6)}>{printable(record.getMessage())}"


class _Json(logging.Formatter):
    """`{"time","level","message", …}`: the time in RFC 3339, then what the event is about (`model`, `new_bytes`)."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{moment}.{int(record.msecs):03}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **{key: value for key, value in record.__dict__.items() if key not in _OWN},
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def _is_journal() -> bool:
    """Whether stderr is journald's: it names the device and inode of its stream (systemd.exec(5), JOURNAL_STREAM)."""
    status = os.fstat(sys.stderr.fileno())
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
