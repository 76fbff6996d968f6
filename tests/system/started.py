"""Runner of several commands at the same time: tests/system/started.py <folder> <commands as JSON>.

A command is a list of arguments and a mapping of additional environment variables. The folder receives the standard
output and the standard error of command n as ``n.out`` and ``n.err``. The exit statuses are printed as JSON. Under
``Entry``, Python commands are forked, and so are the Python processes that they start.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    folder, commands = Path(sys.argv[1]), json.loads(sys.argv[2])
    processes = []
    for number, (arguments, environment) in enumerate(commands):
        with (folder / f"{number}.out").open("w") as out, (folder / f"{number}.err").open("w") as err:
            processes.append(subprocess.Popen(arguments, stdout=out, stderr=err, env={**os.environ, **environment}))
    print(json.dumps([process.wait() for process in processes]))
