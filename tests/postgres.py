"""A PostgreSQL server for the tests: made in a folder of its own, reached by a socket in it."""

import contextlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

NOBODY = "postgres"
"""The server refuses to run as root; this user comes with Debian's packages."""


def find(program):
    """Where a program of the server is, also where Debian leaves it out of PATH."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return shutil.which(program, path=os.pathsep.join([os.environ["PATH"], *map(str, folders)]))


def why_not():
    """Why there can be no server here; None if there can."""
    if find("initdb") is None or find("pg_ctl") is None:
        return "needs PostgreSQL's initdb and pg_ctl"
    if importlib.util.find_spec("psycopg") is None:
        return "needs psycopg; install the extra 'postgres'"
    if os.geteuid() == 0:
        known = subprocess.run(["id", NOBODY], capture_output=True).returncode == 0
        if not known or shutil.which("runuser") is None:
            return f"PostgreSQL does not run as root, and there is no user {NOBODY!r} to run it"
    return None


@contextlib.contextmanager
def server():
    """A running server's address for SQLAlchemy."""
    # Not a test's own folder: those are closed to other users, and too long for a socket's name.
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    prefix = []
    if os.geteuid() == 0:
        shutil.chown(folder, NOBODY)
        prefix = ["runuser", "-u", NOBODY, "--"]

    def call(program, *arguments):
        # Its own output file: the server inherits it, and a pipe would never end.
        with open(os.devnull, "wb") as nothing:
            command = [*prefix, find(program), "-D", str(folder / "data"), *arguments]
            subprocess.run(command, check=True, cwd=folder, stdout=nothing, stderr=nothing)

    try:
        call("initdb", "-A", "trust", "-U", "tester", "--no-sync")
        options = f"-k {folder} -c listen_addresses='' -c fsync=off"
        call("pg_ctl", "-w", "-o", options, "start")
        try:
            yield f"postgresql+psycopg://tester@/postgres?host={folder}"
        finally:
            call("pg_ctl", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
