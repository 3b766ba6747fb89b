"""Ctrl-C ends a process that imports this without a traceback; the fork server imports it first."""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # blocked since the process started
