"""What a kill leaves on disk: the contents of a folder before each file operation of a run.

A killed process runs no `finally`, flushes nothing and keeps no lock: all that is left of it is what lies on the disk.
So one run, watched through Python's audit events, gives every point at which it can be killed. Between two operations a
file is written; a kill there leaves it empty or cut short, which is added as states of their own. (Libraries that write
from Rust or C++ have no audit events; their files show as written between two operations.)
"""

import hashlib
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

OPERATIONS = {
    "open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "os.link", "os.symlink"
}  # fmt: skip
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CONTENTS: dict[str, bytes] = {}
"""By their hash, so that a state costs little."""
watching = None


def _hook(event, arguments):
    if watching is not None and event in OPERATIONS:
        watching.see(event, arguments)


sys.addaudithook(_hook)  # which cannot be taken away again


def tree(root):
    """Read a folder: name -> hash of the contents, or nothing for a folder."""
    found = {}
    for folder, inside, files in os.walk(root):
        for name in inside:
            found[os.path.relpath(os.path.join(folder, name), root)] = ""
        for name in files:
            path = Path(folder, name)
            content = path.read_bytes()
            key = hashlib.sha256(content).hexdigest()
            CONTENTS[key] = content
            found[str(path.relative_to(root))] = key
    return found


def put(root, state):
    """Make a folder hold what `tree` read."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for name, key in sorted(state.items()):
        if key:
            (root / name).write_bytes(CONTENTS[key])
        else:
            (root / name).mkdir()


@dataclass
class Moment:
    """What a kill leaves behind."""

    before: str
    """The operation that was not done any more."""
    state: dict[str, str]
    at_the_top: bool = False
    """Whether the operation is on something right in the folder, such as OUT itself."""


class Watch:
    """Keeps the moments of a run."""

    def __init__(self, root):
        self.root, self.moments, self.operations, self.busy = root, [], 0, False

    def see(self, event, arguments):
        if self.busy or (event == "open" and not arguments[2] & WRITES):
            return
        paths = [path for path in arguments[:2] if isinstance(path, str | bytes | os.PathLike)]
        found = [self.name(path, None if event == "open" else arguments[-1]) for path in paths]
        names = [name for name in found if name is not None]
        if names:
            self.keep(f"{event} {' -> '.join(names)}", event != "open" and any("/" not in name for name in names))

    def name(self, path, folder):
        """Name what an operation is on, seen from the root; None if it is elsewhere."""
        path = os.fsdecode(path)
        if not os.path.isabs(path) and folder not in (-1, None):  # shutil.rmtree works with open folders
            path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
        path = os.path.relpath(path, self.root)
        return None if path.startswith("..") else path

    def keep(self, before, at_the_top=False):
        self.busy = True
        self.operations += 1
        last = self.moments[-1] if self.moments else None
        state = tree(self.root)
        if last and last.before.startswith("os.rename"):
            last = None  # nothing was written
        for name, key in state.items() if last else ():
            old = CONTENTS.get(last.state.get(name, ""), b"")
            new = CONTENTS.get(key, b"")
            if new and key != last.state.get(name):
                start = len(old) if old and new.startswith(old) else 0  # appended
                for cut in {start, (start + len(new)) // 2}:
                    part = new[:cut]
                    half = hashlib.sha256(part).hexdigest()
                    CONTENTS[half] = part
                    self.moments.append(Moment(f"byte {cut} of {name}", state | {name: half}))
        self.moments.append(Moment(before, state, at_the_top))
        self.busy = False


def moments(root, run):
    """Run, and return (the states at which it could have been killed, the number of its file operations)."""
    global watching
    watching = watch = Watch(root)
    try:
        run()
        watch.keep("the end")
    finally:
        watching = None
    distinct, seen = [], set()
    for moment in watch.moments:
        known = tuple(sorted(moment.state.items()))
        if known not in seen:
            distinct.append(moment)
        elif moment.at_the_top:  # it is told by the last of the operations before which it is so
            next(m for m in distinct if m.state == moment.state).at_the_top = True
        seen.add(known)
    return distinct, watch.operations - 1
