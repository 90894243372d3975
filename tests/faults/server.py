"""Runs ``qbb-export`` and ``qbb`` as it is told, each time in a process that is a copy of this one.

    server.py PROLOGUE

So modules are imported once, and a killed, starved or broken run costs a fraction of a second. A request is a line of
JSON on stdin: ``arguments``, ``errors`` (file for stderr), ``before`` and ``after`` (Python that the copy runs around
the command). Answered are the number of the process, and after another, empty line its status as of ``os.waitpid``.
PROLOGUE is Python that runs first; it may call ``run(arguments)``, so that what a command imports late is there, too.
"""

import faulthandler
import json
import os
import sys
import traceback

from qbb_export import cli

answers = os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def run(arguments: list[str]) -> int:
    verb, *rest = arguments
    return cli.export_main(rest) if verb == "qbb-export" else cli.main(arguments)


exec(sys.argv[1])  # a test's own
while line := sys.stdin.readline():
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(request["errors"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), 2)
        code = 70
        try:
            faulthandler.dump_traceback_later(100)  # where it hangs, if it does
            exec(request["before"])
            code = run(request["arguments"])
            exec(request["after"])
        except BaseException:  # what would end the real program with a traceback
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    print(child, file=answers, flush=True)
    sys.stdin.readline()  # until then the number of a process that has ended is not given away
    print(os.waitpid(child, 0)[1], file=answers, flush=True)
