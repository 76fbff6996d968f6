"""Runs commands at once, which stand as JSON on the command line: arguments, and what they have in their environment.

Each is a file of standard output and one of standard error in the folder that comes before them, by its number. The
exit statuses are printed as JSON. Run by ``Entry``, it forks those that are Python, and so are their own in turn.
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
